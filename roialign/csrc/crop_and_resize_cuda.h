// Launchers of crop_and_resize_cuda.cu on raw device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include "crop_and_resize.h"

namespace roialign {

// image: shape.images x ... . boxes: [crops, 4]. box_index: [crops]. crops: written.
template <class T>
cudaError_t crop_forward(const Shape& shape, const T* image, const T* boxes,
                         const int64_t* box_index, T extrapolation_value, T* crops,
                         cudaStream_t stream);

// grad: of the crops. grad_image: zeros, added to.
template <class T>
cudaError_t crop_backward(const Shape& shape, const T* grad, const T* boxes,
                          const int64_t* box_index, T* grad_image, cudaStream_t stream);

}  // namespace roialign
