// winograd::conv3x3 for the CPU.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "conv3x3.h"

namespace winograd {
namespace {

using Kernel = void (*)(const Convolution&, const Block&);

#ifdef __x86_64__
__attribute__((target("avx512f"))) void convolve_avx512(const Convolution& conv,
                                                        const Block& block) {
  convolve_block<16, 14, 2>(conv, block);
}

__attribute__((target("avx2,fma"))) void convolve_avx2(const Convolution& conv,
                                                       const Block& block) {
  convolve_block<8, 6, 1>(conv, block);
}
#endif

void convolve_default(const Convolution& conv, const Block& block) {
#ifdef __aarch64__
  convolve_block<4, 6, 1>(conv, block);
#else
  convolve_block<4, 3, 1>(conv, block);
#endif
}

// An installed build runs on any processor and uses the vectors that torch uses on this one;
// ATEN_CPU_CAPABILITY=avx2 or default restricts both.
Kernel find_kernel() {
#ifdef __x86_64__
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return convolve_avx512;
  if (capability == "AVX2") return convolve_avx2;
#endif
  return convolve_default;
}

// How a convolution is cut in blocks: `blocks` parts of the tiles times `groups` of the outputs.
struct Cut {
  int64_t blocks, groups;
};

Cut cut_convolution(const Convolution& conv, int64_t threads) {
  // Every block sends all weights and its own transformed tiles through the caches: the tiles may
  // take half as much memory as the weights.
  const int64_t outputs = conv.output_panels * kPanel;
  const int64_t tiles = conv.tiles();
  const int64_t most =
      std::clamp<int64_t>(conv.channels * outputs / (2 * (conv.channels + outputs)), 28, 128);
  const int64_t blocks = (tiles + most - 1) / most;
  if (blocks < threads) {
    const int64_t pairs = (conv.output_panels + 1) / 2;
    return {blocks, std::min((threads + blocks - 1) / blocks, pairs)};
  }
  return {std::min((blocks + threads - 1) / threads * threads, tiles), 1};
}

void convolve(const Convolution& conv, const at::TensorOptions& options) {
  static const Kernel kernel = find_kernel();
  const int64_t threads = at::get_num_threads();
  const Cut cut = cut_convolution(conv, threads);
  const int64_t tiles = conv.tiles(), pairs = (conv.output_panels + 1) / 2;
  const int64_t most_tiles = (tiles + cut.blocks - 1) / cut.blocks;
  const int64_t most_panels = (pairs + cut.groups - 1) / cut.groups * 2;
  const int64_t point = most_tiles * kPanel * kPoints;
  const int64_t size = point * (conv.panels() + most_panels);
  const at::Tensor scratch = at::empty({threads, size}, options);
  float* memory = scratch.mutable_data_ptr<float>();
  at::parallel_for(0, cut.blocks * cut.groups, 1, [&](int64_t begin, int64_t end) {
    float* own = memory + at::get_thread_num() * size;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / cut.groups, group = task % cut.groups;
      const int64_t tile = tiles * block / cut.blocks;
      const int64_t tile_end = tiles * (block + 1) / cut.blocks;
      const int64_t panel = pairs * group / cut.groups * 2;
      const int64_t panel_end =
          std::min(pairs * (group + 1) / cut.groups * 2, conv.output_panels);
      kernel(conv, {tile, tile_end - tile, panel, panel_end - panel, own,
                    own + point * conv.panels()});
    }
  });
}

at::Tensor conv3x3(const at::Tensor& input, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, bool relu) {
  TORCH_CHECK_TYPE(input.scalar_type() == at::kFloat, "conv3x3: input must be float32, got ",
                   input.scalar_type());
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat, "conv3x3: weight must be float32, got ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(input.dim() == 4, "conv3x3: input must be [B, C, H, W], got ", input.sizes());
  const int64_t channels = input.size(1);
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) == kPoints && weight.size(2) == channels &&
                        weight.size(3) == kPanel && channels % kPanel == 0,
                    "conv3x3: weight must be [36, K / 16, ", channels,
                    ", 16], as transform_weight makes it for the channels of input, got ",
                    weight.sizes());
  const int64_t outputs = weight.size(1) * kPanel;
  at::Tensor offset;
  if (bias) {
    TORCH_CHECK_TYPE(bias->scalar_type() == at::kFloat, "conv3x3: bias must be float32, got ",
                     bias->scalar_type());
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == outputs,
                      "conv3x3: bias must be [K] = [", outputs, "], got ", bias->sizes());
    offset = bias->contiguous();
  }
  TORCH_CHECK_VALUE(weight.device() == input.device(), "conv3x3: weight must be on ",
                    input.device(), " like input, got ", weight.device());
  TORCH_CHECK_VALUE(!bias || bias->device() == input.device(), "conv3x3: bias must be on ",
                    input.device(), " like input, got ", bias->device());

  constexpr auto kLast = at::MemoryFormat::ChannelsLast;
  const at::Tensor output = at::empty({input.size(0), outputs, input.size(2), input.size(3)},
                                      input.options().memory_format(kLast));
  if (output.numel() == 0) return output;
  const at::Tensor pixels = input.contiguous(kLast), weights = weight.contiguous();
  const at::Tensor padding = at::zeros({channels}, input.options());
  convolve({pixels.const_data_ptr<float>(), weights.const_data_ptr<float>(),
            bias ? offset.const_data_ptr<float>() : nullptr, padding.const_data_ptr<float>(),
            output.mutable_data_ptr<float>(), input.size(0), input.size(2), input.size(3), channels,
            weight.size(1), relu},
           input.options());
  return output;
}

}  // namespace
}  // namespace winograd

// ops.py defines the schemas.
TORCH_LIBRARY_IMPL(winograd, CPU, m) { m.impl("conv3x3", &winograd::conv3x3); }
