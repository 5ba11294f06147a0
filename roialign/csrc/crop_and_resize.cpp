// roialign::crop_and_resize and its gradient for CPU, and the binding of the CUDA kernels in
// crop_and_resize_cuda.cu.
#include "crop_and_resize.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

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

// The tensors of a call in the form the kernels take; `values` is the image or the gradient of the
// crops, and its memory format is that of the result.
struct Arguments {
  at::Tensor values, boxes, box_index;
  at::MemoryFormat layout;
};

void check_devices(const at::Tensor& values, const at::Tensor& boxes,
                   const at::Tensor& box_index) {
  TORCH_CHECK_VALUE(boxes.device() == values.device() && box_index.device() == values.device(),
                    "crop_and_resize: image, boxes and box_index must be on one device, got ",
                    values.device(), ", ", boxes.device(), " and ", box_index.device());
}

Arguments prepare(const at::Tensor& values, const at::Tensor& boxes, const at::Tensor& box_index,
                  const Shape& shape) {
  TORCH_CHECK_TYPE(values.scalar_type() == at::kFloat || values.scalar_type() == at::kDouble,
                   "crop_and_resize: image must be float32 or float64, got ",
                   values.scalar_type());
  TORCH_CHECK_TYPE(boxes.scalar_type() == values.scalar_type(),
                   "crop_and_resize: boxes must have the dtype of image, ", values.scalar_type(),
                   ", got ", boxes.scalar_type());
  TORCH_CHECK_TYPE(box_index.scalar_type() == at::kInt || box_index.scalar_type() == at::kLong,
                   "crop_and_resize: box_index must be int32 or int64, got ",
                   box_index.scalar_type());
  TORCH_CHECK_VALUE(box_index.dim() == 1 && box_index.size(0) == shape.crops,
                    "crop_and_resize: box_index must be [R] = [", shape.crops, "], got ",
                    box_index.sizes());
  check_devices(values, boxes, box_index);
  TORCH_CHECK_VALUE(shape.crop_height > 0 && shape.crop_width > 0,
                    "crop_and_resize: crops must have at least one pixel, got ",
                    shape.crop_height, " x ", shape.crop_width);
  // Beyond 2^24, a float cannot tell the last pixel from the one after.
  constexpr int64_t kMaxSide = 1 << 24;
  TORCH_CHECK_VALUE(shape.images >= 0 && shape.height > 0 && shape.width > 0 &&
                        shape.height <= kMaxSide && shape.width <= kMaxSide,
                    "crop_and_resize: image must have sides of 1 to ", kMaxSide, " pixels, got ",
                    shape.images, " of ", shape.height, " x ", shape.width);
  const auto layout =
      shape.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor index = box_index.to(at::kLong).contiguous();
  for (int64_t crop = 0; index.is_cpu() && crop < shape.crops; ++crop) {
    const int64_t image = index.const_data_ptr<int64_t>()[crop];
    TORCH_CHECK_INDEX(image >= 0 && image < shape.images, "crop_and_resize: box_index[", crop,
                      "] must be within 0..", shape.images - 1, ", got ", image);
  }
  return {values.contiguous(layout), boxes.contiguous(), index, layout};
}

bool is_channels_last(const at::Tensor& values) {
  return values.is_contiguous(at::MemoryFormat::ChannelsLast) && !values.is_contiguous();
}

// kernel(shape, image, boxes, box_index, extrapolation_value, crops)
template <class Kernel>
at::Tensor forward(const at::Tensor& image, const at::Tensor& boxes, const at::Tensor& box_index,
                   int64_t crop_height, int64_t crop_width, double extrapolation_value,
                   Kernel kernel) {
  TORCH_CHECK_VALUE(image.dim() == 4, "crop_and_resize: image must be [B, C, H, W], got ",
                    image.sizes());
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4,
                    "crop_and_resize: boxes must be [R, 4], got ", boxes.sizes());
  const Shape shape{image.size(0), image.size(1), image.size(2), image.size(3),
                    boxes.size(0), crop_height,   crop_width,    is_channels_last(image)};
  const Arguments in = prepare(image, boxes, box_index, shape);
  const at::Tensor crops = at::empty({shape.crops, shape.channels, crop_height, crop_width},
                                     image.options().memory_format(in.layout));
  AT_DISPATCH_FLOATING_TYPES(image.scalar_type(), "crop_and_resize", [&] {
    TORCH_CHECK_VALUE(!std::isfinite(extrapolation_value) ||
                          std::abs(extrapolation_value) <= std::numeric_limits<scalar_t>::max(),
                      "crop_and_resize: extrapolation_value must fit ", image.scalar_type(),
                      ", got ", extrapolation_value);
    if (crops.numel() == 0) return;
    kernel(shape, in.values.const_data_ptr<scalar_t>(), in.boxes.const_data_ptr<scalar_t>(),
           in.box_index.const_data_ptr<int64_t>(), static_cast<scalar_t>(extrapolation_value),
           crops.mutable_data_ptr<scalar_t>());
  });
  return crops;
}

// kernel(shape, grad, boxes, box_index, grad_image)
template <class Kernel>
at::Tensor backward(const at::Tensor& grad, const at::Tensor& boxes, const at::Tensor& box_index,
                    int64_t images, int64_t height, int64_t width, Kernel kernel) {
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4,
                    "crop_and_resize: boxes must be [R, 4], got ", boxes.sizes());
  TORCH_CHECK_VALUE(grad.dim() == 4 && grad.size(0) == boxes.size(0),
                    "crop_and_resize: grad must be [R, C, h, w] with the R of boxes, got ",
                    grad.sizes(), " and ", boxes.sizes());
  const Shape shape{images,       grad.size(1), height,       width,
                    grad.size(0), grad.size(2), grad.size(3), is_channels_last(grad)};
  const Arguments in = prepare(grad, boxes, box_index, shape);
  const at::Tensor grad_image = at::empty({images, shape.channels, height, width},
                                          grad.options().memory_format(in.layout))
                                    .zero_();
  if (grad.numel() == 0) return grad_image;
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "crop_and_resize_backward", [&] {
    kernel(shape, in.values.const_data_ptr<scalar_t>(), in.boxes.const_data_ptr<scalar_t>(),
           in.box_index.const_data_ptr<int64_t>(), grad_image.mutable_data_ptr<scalar_t>());
  });
  return grad_image;
}

at::Tensor forward_cpu(const at::Tensor& image, const at::Tensor& boxes,
                       const at::Tensor& box_index, int64_t crop_height, int64_t crop_width,
                       double extrapolation_value) {
  return forward(image, boxes, box_index, crop_height, crop_width, extrapolation_value,
                 [](auto... arguments) { crop_forward_cpu(arguments...); });
}

at::Tensor backward_cpu(const at::Tensor& grad, const at::Tensor& boxes,
                        const at::Tensor& box_index, int64_t images, int64_t height,
                        int64_t width) {
  return backward(grad, boxes, box_index, images, height, width,
                  [](auto... arguments) { crop_backward_cpu(arguments...); });
}

#ifdef WITH_CUDA
at::Tensor forward_cuda(const at::Tensor& image, const at::Tensor& boxes,
                        const at::Tensor& box_index, int64_t crop_height, int64_t crop_width,
                        double extrapolation_value) {
  check_devices(image, boxes, box_index);
  const c10::cuda::CUDAGuard guard(image.device());
  return forward(image, boxes, box_index, crop_height, crop_width, extrapolation_value,
                 [](auto... arguments) {
                   C10_CUDA_CHECK(crop_forward(arguments..., c10::cuda::getCurrentCUDAStream()));
                 });
}

at::Tensor backward_cuda(const at::Tensor& grad, const at::Tensor& boxes,
                         const at::Tensor& box_index, int64_t images, int64_t height,
                         int64_t width) {
  check_devices(grad, boxes, box_index);
  const c10::cuda::CUDAGuard guard(grad.device());
  at::globalContext().alertNotDeterministic("crop_and_resize_backward on CUDA");
  return backward(grad, boxes, box_index, images, height, width, [](auto... arguments) {
    C10_CUDA_CHECK(crop_backward(arguments..., c10::cuda::getCurrentCUDAStream()));
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
