// nms::nms for CPU, and the binding of the CUDA kernels in nms_cuda.cu.
#include "nms.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "nms_cuda.h"
#endif

namespace nms {
namespace {

// Whether any of `count` kept boxes overlaps `box`. Member m of kept box k is kept[m * stride + k].
template <class T>
HOST_DEVICE bool find_overlap(const Box<T>& box, const T* kept, int64_t stride, int64_t count,
                              T threshold) {
  constexpr int64_t kChunk = 128;
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t end = start + kChunk < count ? start + kChunk : count;
    // An integer as wide as T and no early exit let the compiler vectorise the loop.
    std::conditional_t<sizeof(T) == 4, int32_t, int64_t> found = 0;
    for (int64_t k = start; k < end; ++k) {
      const T* member = kept + k;
      found |= overlaps({member[0], member[stride], member[2 * stride], member[3 * stride],
                         member[4 * stride]},
                        box, threshold);
    }
    if (found) return true;
  }
  return false;
}

MULTIVERSION bool is_suppressed(const Box<float>& box, const float* kept, int64_t stride,
                                int64_t count, float threshold) {
  return find_overlap(box, kept, stride, count, threshold);
}

MULTIVERSION bool is_suppressed(const Box<double>& box, const double* kept, int64_t stride,
                                int64_t count, double threshold) {
  return find_overlap(box, kept, stride, count, threshold);
}

struct Ranked {
  at::Tensor boxes, order;
};

void check(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold) {
  for (const auto& [name, tensor] : {std::pair("boxes", boxes), std::pair("scores", scores)}) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble,
                     "nms: ", name, " must be float32 or float64, got ", tensor.scalar_type());
  }
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4, "nms: boxes must be [N, 4], got ",
                    boxes.sizes());
  TORCH_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == boxes.size(0),
                    "nms: scores must be [N] with the N of boxes, got ", scores.sizes(), " and ",
                    boxes.sizes());
  TORCH_CHECK_VALUE(scores.device() == boxes.device(),
                    "nms: boxes and scores must be on one device, got ", boxes.device(), " and ",
                    scores.device());
  TORCH_CHECK_VALUE(iou_threshold >= 0 && iou_threshold <= 1,  // false for NaN, too
                    "nms: iou_threshold must be within 0..1, got ", iou_threshold);
}

// A NaN score ranks last, and its box becomes NaN so that it overlaps nothing.
Ranked rank_boxes(const at::Tensor& boxes, const at::Tensor& scores) {
  const at::Tensor unscored = scores.isnan();
  const at::Tensor key = scores.masked_fill(unscored, -std::numeric_limits<double>::infinity());
  const at::Tensor order = std::get<1>(key.sort(/*stable=*/true, /*dim=*/0, /*descending=*/true));
  const at::Tensor scored =
      boxes.masked_fill(unscored.unsqueeze(1), std::numeric_limits<double>::quiet_NaN());
  return {scored.index_select(0, order).contiguous(), order};
}

at::Tensor nms_cpu(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold) {
  check(boxes, scores, iou_threshold);
  const Ranked ranked = rank_boxes(boxes, scores);
  const int64_t count = boxes.size(0);
  const int64_t* index = ranked.order.const_data_ptr<int64_t>();
  std::vector<int64_t> keep;
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "nms", [&] {
    const scalar_t* corners = ranked.boxes.const_data_ptr<scalar_t>();
    const scalar_t threshold = static_cast<scalar_t>(iou_threshold);
    std::vector<scalar_t> kept(5 * count);
    // Each round of boxes is tested against those kept before it in parallel, then against those
    // of its own in order.
    constexpr int64_t kRound = 1024, kTestsPerTask = 1 << 17;
    std::vector<char> suppressed(kRound);
    for (int64_t start = 0; start < count; start += kRound) {
      const int64_t end = std::min(start + kRound, count), before = keep.size();
      const int64_t grain = kTestsPerTask / (before + 1) + 1;
      at::parallel_for(start, end, grain, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          const Box<scalar_t> box = make_box(corners + 4 * i);
          suppressed[i - start] = is_suppressed(box, kept.data(), count, before, threshold);
        }
      });
      for (int64_t i = start; i < end; ++i) {
        if (suppressed[i - start]) continue;
        const Box<scalar_t> box = make_box(corners + 4 * i);
        const int64_t size = keep.size();
        if (is_suppressed(box, kept.data() + before, count, size - before, threshold)) continue;
        const scalar_t members[] = {box.y1, box.x1, box.y2, box.x2, box.area};
        for (int64_t m = 0; m < 5; ++m) kept[m * count + size] = members[m];
        keep.push_back(index[i]);
      }
    }
  });
  at::Tensor result = at::empty({static_cast<int64_t>(keep.size())}, ranked.order.options());
  std::copy(keep.begin(), keep.end(), result.mutable_data_ptr<int64_t>());
  return result;
}

#ifdef WITH_CUDA
at::Tensor nms_cuda(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold) {
  check(boxes, scores, iou_threshold);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const Ranked ranked = rank_boxes(boxes, scores);
  const int64_t count = boxes.size(0);
  if (count == 0) return ranked.order;

  // At most 64 MB of mask: 6,000 boxes take one pass, 100,000 take 19.
  const int64_t words = (count + kBlock - 1) / kBlock;
  const int64_t mask_blocks = std::clamp<int64_t>((1 << 23) / (words * kBlock), 1, words);
  const int64_t mask_rows = mask_blocks * kBlock;
  const at::Tensor mask = at::empty({mask_rows, words}, ranked.order.options());
  const at::Tensor removed = at::zeros({words}, ranked.order.options());
  const at::Tensor keep = at::empty({count}, ranked.order.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "nms", [&] {
    C10_CUDA_CHECK(sweep_boxes<scalar_t>(
        ranked.boxes.const_data_ptr<scalar_t>(), count, static_cast<scalar_t>(iou_threshold),
        reinterpret_cast<uint64_t*>(mask.mutable_data_ptr<int64_t>()), mask_rows,
        reinterpret_cast<uint64_t*>(removed.mutable_data_ptr<int64_t>()),
        keep.mutable_data_ptr<bool>(), c10::cuda::getCurrentCUDAStream()));
  });
  return ranked.order.masked_select(keep);
}
#endif

}  // namespace
}  // namespace nms

// ops.py defines the schema.
TORCH_LIBRARY_IMPL(nms, CPU, m) { m.impl("nms", &nms::nms_cpu); }

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(nms, CUDA, m) { m.impl("nms", &nms::nms_cuda); }
#endif
