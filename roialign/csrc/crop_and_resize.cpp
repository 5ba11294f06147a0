// roialign::crop_and_resize and its gradient for CPU, and the binding of the CUDA kernels in
// crop_and_resize_cuda.cu.
#include "crop_and_resize.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "arguments.h"

#ifdef WITH_CUDA
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "crop_and_resize_cuda.h"
#endif

namespace roialign {
namespace {

// The sample points of all crops, which are the same for every channel.
template <class T>
class Points {
 public:
  Points(const Shape& shape, const T* boxes)
      : height_(shape.crop_height), width_(shape.crop_width) {
    y_.reserve(shape.crops * height_);
    x_.reserve(shape.crops * width_);
    for (const T* box = boxes; box < boxes + 4 * shape.crops; box += 4) {
      for (int64_t i = 0; i < height_; ++i) {
        y_.push_back(make_tap(box[0], box[2], i, height_, shape.height));
      }
      for (int64_t j = 0; j < width_; ++j) {
        x_.push_back(make_tap(box[1], box[3], j, width_, shape.width));
      }
    }
  }

  int64_t size() const { return height_ * width_; }

  // visit(k, y, x, inside) for point k of a crop
  template <class Visit>
  void each(int64_t crop, Visit visit) const {
    const Tap<T>*y = y_.data() + crop * height_, *x = x_.data() + crop * width_;
    for (int64_t i = 0, k = 0; i < height_; ++i) {
      for (int64_t j = 0; j < width_; ++j, ++k) visit(k, y[i], x[j], y[i].inside && x[j].inside);
    }
  }

 private:
  int64_t height_, width_;
  std::vector<Tap<T>> y_, x_;
};

template <class T>
void crop_forward_cpu(const Shape& shape, const T* image, const T* boxes, const int64_t* box_index,
                      T extrapolation_value, T* crops) {
  const Points<T> points(shape, boxes);
  const int64_t width = shape.width, pixels = shape.height * width, channels = shape.channels;
  if (shape.channels_last) {
    at::parallel_for(0, shape.crops, 1, [&](int64_t begin, int64_t end) {
      for (int64_t crop = begin; crop < end; ++crop) {
        const T* source = image + box_index[crop] * pixels * channels;
        points.each(crop, [&](int64_t k, Tap<T> y, Tap<T> x, bool inside) {
          T* target = crops + (crop * points.size() + k) * channels;
          if (!inside) std::fill_n(target, channels, extrapolation_value);
          for (int64_t c = 0; inside && c < channels; ++c) {
            target[c] = interpolate(y, x, [&](int64_t row, int64_t column) {
              return source[(row * width + column) * channels + c];
            });
          }
        });
      }
    });
  } else {
    // All crops of one channel, then the next: its plane stays in the cache.
    at::parallel_for(0, channels * shape.crops, 64, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t c = plane / shape.crops, crop = plane % shape.crops;
        const T* source = image + (box_index[crop] * channels + c) * pixels;
        T* target = crops + (crop * channels + c) * points.size();
        points.each(crop, [&](int64_t k, Tap<T> y, Tap<T> x, bool inside) {
          target[k] = !inside ? extrapolation_value
                              : interpolate(y, x, [&](int64_t row, int64_t column) {
                                  return source[row * width + column];
                                });
        });
      }
    });
  }
}

// Every thread owns channels or planes of grad_image and visits the crops in order, so the sums do
// not depend on the number of threads.
template <class T>
void crop_backward_cpu(const Shape& shape, const T* grad, const T* boxes, const int64_t* box_index,
                       T* grad_image) {
  const Points<T> points(shape, boxes);
  const int64_t width = shape.width, pixels = shape.height * width, channels = shape.channels;
  if (shape.channels_last) {
    at::parallel_for(0, channels, 16, [&](int64_t begin, int64_t end) {
      for (int64_t crop = 0; crop < shape.crops; ++crop) {
        T* target = grad_image + box_index[crop] * pixels * channels;
        points.each(crop, [&](int64_t k, Tap<T> y, Tap<T> x, bool inside) {
          const T* source = grad + (crop * points.size() + k) * channels;
          for (int64_t c = begin; inside && c < end; ++c) {
            distribute(y, x, source[c], [&](int64_t row, int64_t column, T value) {
              target[(row * width + column) * channels + c] += value;
            });
          }
        });
      }
    });
  } else {
    at::parallel_for(0, shape.images * channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        T* target = grad_image + plane * pixels;
        for (int64_t crop = 0; crop < shape.crops; ++crop) {
          if (box_index[crop] != plane / channels) continue;
          const T* source = grad + (crop * channels + plane % channels) * points.size();
          points.each(crop, [&](int64_t k, Tap<T> y, Tap<T> x, bool inside) {
            if (!inside) return;
            distribute(y, x, source[k], [&](int64_t row, int64_t column, T value) {
              target[row * width + column] += value;
            });
          });
        }
      }
    });
  }
}

constexpr Names kNames{"crop_and_resize", "image"};

void check_value(const at::Tensor& image, double extrapolation_value) {
  const double most = image.scalar_type() == at::kDouble ? std::numeric_limits<double>::max()
                                                         : std::numeric_limits<float>::max();
  TORCH_CHECK_VALUE(
      !std::isfinite(extrapolation_value) || std::abs(extrapolation_value) <= most,
      "crop_and_resize: extrapolation_value must fit ", image.scalar_type(), ", got ",
      extrapolation_value);
}

at::Tensor forward_cpu(const at::Tensor& image, const at::Tensor& boxes,
                       const at::Tensor& box_index, int64_t crop_height, int64_t crop_width,
                       double extrapolation_value) {
  check_value(image, extrapolation_value);
  return forward(kNames, image, boxes, box_index, crop_height, crop_width,
                 is_channels_last(image),
                 [&](const Shape& shape, auto* from, auto* corners, auto* index, auto* crops) {
                   using T = std::remove_pointer_t<decltype(crops)>;
                   crop_forward_cpu(shape, from, corners, index, T(extrapolation_value), crops);
                 });
}

at::Tensor backward_cpu(const at::Tensor& grad, const at::Tensor& boxes,
                        const at::Tensor& box_index, int64_t images, int64_t height,
                        int64_t width) {
  return backward(kNames, grad, boxes, box_index, images, height, width, is_channels_last(grad),
                  [](auto... arguments) { crop_backward_cpu(arguments...); });
}

#ifdef WITH_CUDA
at::Tensor forward_cuda(const at::Tensor& image, const at::Tensor& boxes,
                        const at::Tensor& box_index, int64_t crop_height, int64_t crop_width,
                        double extrapolation_value) {
  check_value(image, extrapolation_value);
  check_devices(kNames, image, boxes, box_index);
  const c10::cuda::CUDAGuard guard(image.device());
  return forward(kNames, image, boxes, box_index, crop_height, crop_width,
                 is_channels_last(image),
                 [&](const Shape& shape, auto* from, auto* corners, auto* index, auto* crops) {
                   using T = std::remove_pointer_t<decltype(crops)>;
                   C10_CUDA_CHECK(crop_forward(shape, from, corners, index, T(extrapolation_value),
                                               crops, c10::cuda::getCurrentCUDAStream()));
                 });
}

at::Tensor backward_cuda(const at::Tensor& grad, const at::Tensor& boxes,
                         const at::Tensor& box_index, int64_t images, int64_t height,
                         int64_t width) {
  check_devices(kNames, grad, boxes, box_index);
  const c10::cuda::CUDAGuard guard(grad.device());
  at::globalContext().alertNotDeterministic("crop_and_resize_backward on CUDA");
  return backward(kNames, grad, boxes, box_index, images, height, width, is_channels_last(grad),
                  [](auto... arguments) {
                    C10_CUDA_CHECK(
                        crop_backward(arguments..., c10::cuda::getCurrentCUDAStream()));
                  });
}
#endif

}  // namespace
}  // namespace roialign

// ops.py defines the schemas.
TORCH_LIBRARY_IMPL(roialign, CPU, m) {
  m.impl("crop_and_resize", &roialign::forward_cpu);
  m.impl("crop_and_resize_backward", &roialign::backward_cpu);
}

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(roialign, CUDA, m) {
  m.impl("crop_and_resize", &roialign::forward_cuda);
  m.impl("crop_and_resize_backward", &roialign::backward_cuda);
}
#endif
