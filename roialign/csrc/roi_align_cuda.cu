// roi_align and its gradient: one thread per number of the crops, in their memory order.
#include "roi_align_cuda.h"

#include "places_cuda.h"

namespace roialign {
namespace {

// visit(y, x, samples) for the sample points of a number that count, of `samples` in its bin
template <class T, class Visit>
__device__ void each_point(const Shape& shape, const Place& place, const T* boxes,
                           const Sampling& sampling, Visit visit) {
  const T* box = boxes + 4 * place.crop;
  const Span<T> rows = make_span(box[0], box[2], shape.crop_height, sampling);
  const Span<T> columns = make_span(box[1], box[3], shape.crop_width, sampling);
  const T samples = T(rows.samples) * T(columns.samples);
  each_sample(rows, place.i, shape.height, [&](const Tap<T>& y) {
    each_sample(columns, place.j, shape.width, [&](const Tap<T>& x) { visit(y, x, samples); });
  });
}

template <class T>
__global__ void average(Shape shape, int64_t count, const T* features, const T* boxes,
                        const int64_t* box_index, Sampling sampling, T* crops) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < count; k += stride) {
    const Place place = find_place(shape, box_index, k);
    T sum = 0, samples = 1;
    if (place.known) {
      each_point(shape, place, boxes, sampling, [&](const Tap<T>& y, const Tap<T>& x, T number) {
        samples = number;
        sum += interpolate(y, x, [&](int64_t row, int64_t column) {
          return features[place.offset(row, column, shape.width)];
        });
      });
    }
    crops[k] = sum / samples;
  }
}

template <class T>
__global__ void spread(Shape shape, int64_t count, const T* grad, const T* boxes,
                       const int64_t* box_index, Sampling sampling, T* grad_features) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < count; k += stride) {
    const Place place = find_place(shape, box_index, k);
    if (!place.known) continue;
    each_point(shape, place, boxes, sampling, [&](const Tap<T>& y, const Tap<T>& x, T number) {
      distribute(y, x, grad[k] / number, [&](int64_t row, int64_t column, T value) {
        atomicAdd(grad_features + place.offset(row, column, shape.width), value);
      });
    });
  }
}

}  // namespace

template <class T>
cudaError_t align_forward(const Shape& shape, const T* features, const T* boxes,
                          const int64_t* box_index, const Sampling& sampling, T* crops,
                          cudaStream_t stream) {
  LAUNCH(average<T>, count_blocks(shape), kThreads, stream, shape, count_values(shape), features,
         boxes, box_index, sampling, crops);
  return cudaGetLastError();
}

template <class T>
cudaError_t align_backward(const Shape& shape, const T* grad, const T* boxes,
                           const int64_t* box_index, const Sampling& sampling, T* grad_features,
                           cudaStream_t stream) {
  LAUNCH(spread<T>, count_blocks(shape), kThreads, stream, shape, count_values(shape), grad, boxes,
         box_index, sampling, grad_features);
  return cudaGetLastError();
}

template cudaError_t align_forward(const Shape&, const float*, const float*, const int64_t*,
                                   const Sampling&, float*, cudaStream_t);
template cudaError_t align_forward(const Shape&, const double*, const double*, const int64_t*,
                                   const Sampling&, double*, cudaStream_t);
template cudaError_t align_backward(const Shape&, const float*, const float*, const int64_t*,
                                    const Sampling&, float*, cudaStream_t);
template cudaError_t align_backward(const Shape&, const double*, const double*, const int64_t*,
                                    const Sampling&, double*, cudaStream_t);

}  // namespace roialign
