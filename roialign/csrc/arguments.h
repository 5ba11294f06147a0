// What the operators on crops share: checks of their tensors, the tensor they return, its memory
// format. Include it in the .cpp files only.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "crop_and_resize.h"

namespace roialign {

// How the messages call an operator and what it crops.
struct Names {
  const char *name, *image;
};

// The tensors of a call in the form the kernels take; `values` is the image or the gradient of the
// crops, and its memory format, `layout`, is that of the result.
struct Arguments {
  at::Tensor values, boxes, box_index;
  at::MemoryFormat layout;
};

inline void check_devices(const Names& names, const at::Tensor& values, const at::Tensor& boxes,
                          const at::Tensor& box_index) {
  TORCH_CHECK_VALUE(boxes.device() == values.device() && box_index.device() == values.device(),
                    names.name, ": ", names.image,
                    ", boxes and box_index must be on one device, got ", values.device(), ", ",
                    boxes.device(), " and ", box_index.device());
}

inline Arguments prepare(const Names& names, const at::Tensor& values, const at::Tensor& boxes,
                         const at::Tensor& box_index, const Shape& shape) {
  TORCH_CHECK_TYPE(values.scalar_type() == at::kFloat || values.scalar_type() == at::kDouble,
                   names.name, ": ", names.image, " must be float32 or float64, got ",
                   values.scalar_type());
  TORCH_CHECK_TYPE(boxes.scalar_type() == values.scalar_type(), names.name,
                   ": boxes must have the dtype of ", names.image, ", ", values.scalar_type(),
                   ", got ", boxes.scalar_type());
  TORCH_CHECK_TYPE(box_index.scalar_type() == at::kInt || box_index.scalar_type() == at::kLong,
                   names.name, ": box_index must be int32 or int64, got ",
                   box_index.scalar_type());
  TORCH_CHECK_VALUE(box_index.dim() == 1 && box_index.size(0) == shape.crops, names.name,
                    ": box_index must be [R] = [", shape.crops, "], got ", box_index.sizes());
  check_devices(names, values, boxes, box_index);
  TORCH_CHECK_VALUE(shape.crop_height > 0 && shape.crop_width > 0, names.name,
                    ": crops must have at least one pixel, got ", shape.crop_height, " x ",
                    shape.crop_width);
  TORCH_CHECK_VALUE(shape.images >= 0 && shape.height > 0 && shape.width > 0 &&
                        shape.height <= kMaxSide && shape.width <= kMaxSide,
                    names.name, ": ", names.image, " must have sides of 1 to ", kMaxSide,
                    " pixels, got ", shape.images, " of ", shape.height, " x ", shape.width);
  const auto layout =
      shape.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor index = box_index.to(at::kLong).contiguous();
  for (int64_t crop = 0; index.is_cpu() && crop < shape.crops; ++crop) {
    const int64_t image = index.const_data_ptr<int64_t>()[crop];
    TORCH_CHECK_INDEX(image >= 0 && image < shape.images, names.name, ": box_index[", crop,
                      "] must be within 0..", shape.images - 1, ", got ", image);
  }
  return {values.contiguous(layout), boxes.contiguous(), index, layout};
}

inline bool is_channels_last(const at::Tensor& values) {
  return values.is_contiguous(at::MemoryFormat::ChannelsLast) && !values.is_contiguous();
}

// kernel(shape, image, boxes, box_index, crops)
template <class Kernel>
at::Tensor forward(const Names& names, const at::Tensor& image, const at::Tensor& boxes,
                   const at::Tensor& box_index, int64_t crop_height, int64_t crop_width,
                   bool channels_last, Kernel kernel) {
  TORCH_CHECK_VALUE(image.dim() == 4, names.name, ": ", names.image, " must be [B, C, H, W], got ",
                    image.sizes());
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4, names.name,
                    ": boxes must be [R, 4], got ", boxes.sizes());
  const Shape shape{image.size(0), image.size(1), image.size(2), image.size(3),
                    boxes.size(0), crop_height,   crop_width,    channels_last};
  const Arguments in = prepare(names, image, boxes, box_index, shape);
  const at::Tensor crops = at::empty({shape.crops, shape.channels, crop_height, crop_width},
                                     image.options().memory_format(in.layout));
  if (crops.numel() == 0) return crops;
  AT_DISPATCH_FLOATING_TYPES(image.scalar_type(), "roialign", [&] {
    kernel(shape, in.values.const_data_ptr<scalar_t>(), in.boxes.const_data_ptr<scalar_t>(),
           in.box_index.const_data_ptr<int64_t>(), crops.mutable_data_ptr<scalar_t>());
  });
  return crops;
}

// kernel(shape, grad, boxes, box_index, grad_image)
template <class Kernel>
at::Tensor backward(const Names& names, const at::Tensor& grad, const at::Tensor& boxes,
                    const at::Tensor& box_index, int64_t images, int64_t height, int64_t width,
                    bool channels_last, Kernel kernel) {
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4, names.name,
                    ": boxes must be [R, 4], got ", boxes.sizes());
  TORCH_CHECK_VALUE(grad.dim() == 4 && grad.size(0) == boxes.size(0), names.name,
                    ": grad must be [R, C, h, w] with the R of boxes, got ", grad.sizes(), " and ",
                    boxes.sizes());
  const Shape shape{images,       grad.size(1), height,       width,
                    grad.size(0), grad.size(2), grad.size(3), channels_last};
  const Arguments in = prepare(names, grad, boxes, box_index, shape);
  const at::Tensor grad_image = at::empty({images, shape.channels, height, width},
                                          grad.options().memory_format(in.layout))
                                    .zero_();
  if (grad.numel() == 0) return grad_image;
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "roialign", [&] {
    kernel(shape, in.values.const_data_ptr<scalar_t>(), in.boxes.const_data_ptr<scalar_t>(),
           in.box_index.const_data_ptr<int64_t>(), grad_image.mutable_data_ptr<scalar_t>());
  });
  return grad_image;
}

}  // namespace roialign
