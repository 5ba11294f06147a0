// Greedy suppression in passes over `mask_rows` boxes: one kernel finds all overlaps of the pass
// in parallel, a second one of a single block walks through them in order of rank.
#include "nms_cuda.h"

#include "nms.h"

namespace nms {
namespace {

constexpr int kSweepThreads = 512;

__device__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Bit c of mask[row - first_row][word]: box `row` overlaps the lower ranked box 64 * word + c.
template <class T>
__global__ void find_overlaps(const T* boxes, int64_t count, T threshold, int64_t first_row,
                              uint64_t* mask) {
  const int64_t first_column = int64_t(blockIdx.x) * kBlock;
  first_row += int64_t(blockIdx.y) * kBlock;
  if (first_column < first_row) return;  // the whole block: nobody reads these words

  __shared__ Box<T> columns[kBlock];
  const int thread = threadIdx.x;
  const int64_t column = first_column + thread;
  if (column < count) columns[thread] = make_box(boxes + 4 * column);
  __syncthreads();

  const int64_t row = first_row + thread;
  if (row >= count) return;
  const Box<T> box = make_box(boxes + 4 * row);
  const int end = int(least(kBlock, count - first_column));
  uint64_t word = 0;
  for (int c = first_column == first_row ? thread + 1 : 0; c < end; ++c) {
    word |= uint64_t(overlaps(box, columns[c], threshold)) << c;
  }
  mask[(int64_t(blockIdx.y) * kBlock + thread) * gridDim.x + blockIdx.x] = word;
}

__global__ void sweep_overlaps(const uint64_t* mask, int64_t count, int64_t first_row,
                               int64_t end_row, uint64_t* removed, bool* keep) {
  __shared__ uint64_t diagonal[kBlock];
  __shared__ uint64_t kept;
  const int64_t words = (count + kBlock - 1) / kBlock;
  const int thread = threadIdx.x;

  for (int64_t start = first_row; start < end_row; start += kBlock) {
    const uint64_t* rows = mask + (start - first_row) * words;
    const int64_t word = start / kBlock;
    const int size = int(least(kBlock, end_row - start));

    // Thread 0 is done with the last diagonal, and behind the barrier it sees all of `removed`.
    if (thread < size) diagonal[thread] = rows[thread * words + word];
    __syncthreads();
    if (thread == 0) {
      uint64_t gone = removed[word];
      for (int r = 0; r < size; ++r) {
        if (!(gone >> r & 1)) gone |= diagonal[r];
      }
      kept = ~gone;
    }
    __syncthreads();

    if (thread < size) keep[start + thread] = kept >> thread & 1;
    for (int64_t w = word + 1 + thread; w < words; w += blockDim.x) {
      uint64_t gone = removed[w];
      for (int r = 0; r < size; ++r) {
        if (kept >> r & 1) gone |= rows[r * words + w];
      }
      removed[w] = gone;
    }
  }
}

}  // namespace

template <class T>
cudaError_t sweep_boxes(const T* boxes, int64_t count, T threshold, uint64_t* mask,
                        int64_t mask_rows, uint64_t* removed, bool* keep, cudaStream_t stream) {
  const int64_t words = (count + kBlock - 1) / kBlock;
  for (int64_t row = 0; row < count; row += mask_rows) {
    const int64_t end = row + mask_rows < count ? row + mask_rows : count;
    const dim3 blocks(words, (end - row + kBlock - 1) / kBlock);
    LAUNCH(find_overlaps<T>, blocks, kBlock, stream, boxes, count, threshold, row, mask);
    if (const cudaError_t error = cudaGetLastError()) return error;
    LAUNCH(sweep_overlaps, 1, kSweepThreads, stream, mask, count, row, end, removed, keep);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

template cudaError_t sweep_boxes(const float*, int64_t, float, uint64_t*, int64_t, uint64_t*,
                                 bool*, cudaStream_t);
template cudaError_t sweep_boxes(const double*, int64_t, double, uint64_t*, int64_t, uint64_t*,
                                 bool*, cudaStream_t);

}  // namespace nms
