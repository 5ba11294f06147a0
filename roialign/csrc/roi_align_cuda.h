// Launchers of roi_align_cuda.cu on raw device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include "roi_align.h"

namespace roialign {

// features: shape.images x ... . boxes: [crops, 4]. box_index: [crops]. crops: written.
template <class T>
cudaError_t align_forward(const Shape& shape, const T* features, const T* boxes,
                          const int64_t* box_index, const Sampling& sampling, T* crops,
                          cudaStream_t stream);

// grad: of the crops. grad_features: zeros, added to.
template <class T>
cudaError_t align_backward(const Shape& shape, const T* grad, const T* boxes,
                           const int64_t* box_index, const Sampling& sampling, T* grad_features,
                           cudaStream_t stream);

}  // namespace roialign
