// Launchers of nms_cuda.cu on raw device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nms {

// One bit per pair of boxes, in words of one block of boxes.
constexpr int kBlock = 64;

// boxes: [count, 4] in order of rank. mask: [mask_rows, words] scratch, mask_rows a multiple of
// kBlock, words = ceil(count / kBlock). removed: [words] zeros. keep: [count], written.
template <class T>
cudaError_t sweep_boxes(const T* boxes, int64_t count, T threshold, uint64_t* mask,
                        int64_t mask_rows, uint64_t* removed, bool* keep, cudaStream_t stream);

}  // namespace nms
