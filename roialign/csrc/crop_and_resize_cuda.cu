// crop_and_resize and its gradient: one thread per number of the crops, in their memory order.
#include "crop_and_resize_cuda.h"
#include "places_cuda.h"

namespace roialign {
namespace {

template <class T>
struct Sample {
  Place place;
  Tap<T> y, x;
  bool inside;
};

// The sample point behind number k of the crops.
template <class T>
__device__ Sample<T> find_sample(const Shape& shape, const T* boxes, const int64_t* box_index,
                                 int64_t k) {
  Sample<T> sample;
  const Place place = sample.place = find_place(shape, box_index, k);
  const T* box = boxes + 4 * place.crop;
  sample.y = make_tap(box[0], box[2], place.i, shape.crop_height, shape.height);
  sample.x = make_tap(box[1], box[3], place.j, shape.crop_width, shape.width);
  sample.inside = sample.y.inside && sample.x.inside && place.known;
  return sample;
}

template <class T>
__global__ void forward(Shape shape, int64_t count, const T* image, const T* boxes,
                        const int64_t* box_index, T extrapolation_value, T* crops) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < count; k += stride) {
    const Sample<T> at = find_sample(shape, boxes, box_index, k);
    crops[k] = !at.inside ? extrapolation_value
                          : interpolate(at.y, at.x, [&](int64_t row, int64_t column) {
                              return image[at.place.offset(row, column, shape.width)];
                            });
  }
}

template <class T>
__global__ void backward(Shape shape, int64_t count, const T* grad, const T* boxes,
                         const int64_t* box_index, T* grad_image) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < count; k += stride) {
    const Sample<T> at = find_sample(shape, boxes, box_index, k);
    if (!at.inside) continue;
    distribute(at.y, at.x, grad[k], [&](int64_t row, int64_t column, T value) {
      atomicAdd(grad_image + at.place.offset(row, column, shape.width), value);
    });
  }
}

}  // namespace

template <class T>
cudaError_t crop_forward(const Shape& shape, const T* image, const T* boxes,
                         const int64_t* box_index, T extrapolation_value, T* crops,
                         cudaStream_t stream) {
  LAUNCH(forward<T>, count_blocks(shape), kThreads, stream, shape, count_values(shape), image,
         boxes, box_index, extrapolation_value, crops);
  return cudaGetLastError();
}

template <class T>
cudaError_t crop_backward(const Shape& shape, const T* grad, const T* boxes,
                          const int64_t* box_index, T* grad_image, cudaStream_t stream) {
  LAUNCH(backward<T>, count_blocks(shape), kThreads, stream, shape, count_values(shape), grad,
         boxes, box_index, grad_image);
  return cudaGetLastError();
}

template cudaError_t crop_forward(const Shape&, const float*, const float*, const int64_t*, float,
                                  float*, cudaStream_t);
template cudaError_t crop_forward(const Shape&, const double*, const double*, const int64_t*,
                                  double, double*, cudaStream_t);
template cudaError_t crop_backward(const Shape&, const float*, const float*, const int64_t*,
                                   float*, cudaStream_t);
template cudaError_t crop_backward(const Shape&, const double*, const double*, const int64_t*,
                                   double*, cudaStream_t);

}  // namespace roialign
