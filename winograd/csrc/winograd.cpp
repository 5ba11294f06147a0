// The operators of winograd for the CPU.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/kron.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "conv3x3.h"

namespace winograd {
namespace {

using Kernel = void (*)(const Convolution&, const Block&);
using WeightKernel = void (*)(const Convolution&, const float*, const Block&, int64_t, int64_t);

#ifdef __x86_64__
__attribute__((target("avx512f"))) void convolve_avx512(const Convolution& conv,
                                                        const Block& block) {
  convolve_block<16, 14, 2>(conv, block);
}

__attribute__((target("avx512f"))) void transform_avx512(const Convolution& conv,
                                                         const float* gradient, const Block& block,
                                                         int64_t tile, int64_t tile_end) {
  transform_for_weight<16>(conv, gradient, block, tile, tile_end);
}

__attribute__((target("avx2,fma"))) void convolve_avx2(const Convolution& conv,
                                                       const Block& block) {
  convolve_block<8, 6, 1>(conv, block);
}

__attribute__((target("avx2,fma"))) void transform_avx2(const Convolution& conv,
                                                        const float* gradient, const Block& block,
                                                        int64_t tile, int64_t tile_end) {
  transform_for_weight<8>(conv, gradient, block, tile, tile_end);
}
#endif

void transform_default(const Convolution& conv, const float* gradient, const Block& block,
                       int64_t tile, int64_t tile_end) {
  transform_for_weight<4>(conv, gradient, block, tile, tile_end);
}

void convolve_default(const Convolution& conv, const Block& block) {
#ifdef __aarch64__
  convolve_block<4, 5, 1>(conv, block);  // with 6 rows g++ keeps two of the sums in memory
#else
  convolve_block<4, 3, 1>(conv, block);
#endif
}

struct Kernels {
  Kernel convolve;
  WeightKernel transform_for_weight;
};

// An installed build runs on any processor and uses the vectors that torch uses on this one;
// ATEN_CPU_CAPABILITY=avx2 or default restricts both.
Kernels find_kernels() {
#ifdef __x86_64__
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return {convolve_avx512, transform_avx512};
  if (capability == "AVX2") return {convolve_avx2, transform_avx2};
#endif
  return {convolve_default, transform_default};
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
  static const Kernel kernel = find_kernels().convolve;
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
  if (channels == 0) {  // an empty sum
    output.zero_();
    if (bias) output.add_(offset.view({1, -1, 1, 1}));
    return relu ? output.relu_() : output;
  }
  const at::Tensor pixels = input.contiguous(kLast), weights = weight.contiguous();
  const at::Tensor padding = at::zeros({channels}, input.options());
  convolve({pixels.const_data_ptr<float>(), weights.const_data_ptr<float>(),
            bias ? offset.const_data_ptr<float>() : nullptr, padding.const_data_ptr<float>(),
            output.mutable_data_ptr<float>(), input.size(0), input.size(2), input.size(3), channels,
            weight.size(1), relu},
           input.options());
  return output;
}

// The points at which the transforms of filters are taken, as in ops.py.
constexpr double kThird = 1. / 3, kRoot = 1.41421356237309505;
constexpr double kG[6][3] = {{1, 0, 0},
                             {-2 * kThird, -kRoot * kThird, -kThird},
                             {-2 * kThird, kRoot * kThird, -kThird},
                             {kThird / 2, kRoot * kThird / 2, kThird},
                             {kThird / 2, -kRoot * kThird / 2, kThird},
                             {0, 0, 1}};

// G w G' of every filter, in double, for all outputs of a panel at once.
at::Tensor transform_weight(const at::Tensor& weight) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat,
                   "transform_weight: weight must be float32, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) % kPanel == 0 &&
                        weight.size(1) % kPanel == 0 && weight.size(2) == 3 && weight.size(3) == 3,
                    "transform_weight: weight must be [K, C, 3, 3] with multiples of 16 for K and "
                    "C, got shape ",
                    weight.sizes(), "; use F.conv2d for others");
  const int64_t panels = weight.size(0) / kPanel, channels = weight.size(1);
  const at::Tensor output =
      at::empty({kPoints, panels, channels, kPanel},
                weight.options().memory_format(at::MemoryFormat::Contiguous));
  float* const target = output.mutable_data_ptr<float>();
  const float* const source = weight.const_data_ptr<float>();
  const auto strides = weight.strides();
  at::parallel_for(0, panels * channels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const float* const filters =
          source + index / channels * kPanel * strides[0] + index % channels * strides[1];
      double w[3][3][kPanel], rows[6][3][kPanel];
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
          for (int k = 0; k < kPanel; ++k) {
            w[i][j][k] = filters[k * strides[0] + i * strides[2] + j * strides[3]];
          }
        }
      }
      for (int p = 0; p < 6; ++p) {
        for (int j = 0; j < 3; ++j) {
          for (int k = 0; k < kPanel; ++k) {
            rows[p][j][k] = kG[p][0] * w[0][j][k] + kG[p][1] * w[1][j][k] + kG[p][2] * w[2][j][k];
          }
        }
      }
      for (int p = 0; p < 6; ++p) {
        for (int q = 0; q < 6; ++q) {
          float* const place = target + ((6 * p + q) * panels * channels + index) * kPanel;
          for (int k = 0; k < kPanel; ++k) {
            place[k] = static_cast<float>(kG[q][0] * rows[p][0][k] + kG[q][1] * rows[p][1][k] +
                                          kG[q][2] * rows[p][2][k]);
          }
        }
      }
    }
  });
  return output;
}

// The gradient of the weight: at each point the product of the transformed gradients and inputs of
// all tiles, and G' of that on either side. Tiles come in blocks, whose memory is bounded.
at::Tensor weight_gradient(const at::Tensor& input, const at::Tensor& gradient) {
  for (const at::Tensor* tensor : {&input, &gradient}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat,
                     "weight_gradient: input and gradient must be float32, got ",
                     tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->dim() == 4 && tensor->size(1) % kPanel == 0,
                      "weight_gradient: input and gradient must be [B, C, H, W] with multiples of "
                      "16 for C, got ",
                      tensor->sizes());
  }
  TORCH_CHECK_VALUE(input.size(0) == gradient.size(0) && input.size(2) == gradient.size(2) &&
                        input.size(3) == gradient.size(3),
                    "weight_gradient: input and gradient must have the same images, got ",
                    input.sizes(), " and ", gradient.sizes());
  constexpr auto kLast = at::MemoryFormat::ChannelsLast;
  const at::Tensor pixels = input.contiguous(kLast), gradients = gradient.contiguous(kLast);
  const int64_t channels = input.size(1), outputs = gradient.size(1);
  const at::Tensor padding = at::zeros({std::max(channels, outputs)}, input.options());
  const Convolution conv{pixels.const_data_ptr<float>(), nullptr, nullptr,
                         padding.const_data_ptr<float>(), nullptr, input.size(0), input.size(2),
                         input.size(3), channels, outputs / kPanel, false};
  const float* const source = gradients.const_data_ptr<float>();
  static const WeightKernel kernel = find_kernels().transform_for_weight;

  constexpr int64_t kMost = 512;
  const int64_t tiles = conv.tiles(), blocks = (tiles + kMost - 1) / kMost;
  at::Tensor products = at::zeros({kPoints, outputs, channels}, input.options());
  for (int64_t index = 0; index < blocks; ++index) {
    const int64_t first = tiles * index / blocks, count = tiles * (index + 1) / blocks - first;
    const at::Tensor inputs = at::empty({kPoints, count, channels}, input.options());
    const at::Tensor factors = at::empty({kPoints, count, outputs}, input.options());
    const Block block{first, count, 0, conv.output_panels, inputs.mutable_data_ptr<float>(),
                      factors.mutable_data_ptr<float>()};
    at::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
      kernel(conv, source, block, begin, end);
    });
    products.baddbmm_(factors.transpose(1, 2), inputs);
  }
  const at::Tensor g = at::empty({6, 3}, input.options().dtype(at::kDouble));
  std::copy(&kG[0][0], &kG[0][0] + 18, g.mutable_data_ptr<double>());
  const at::Tensor factor = at::kron(g, g).to(at::kFloat);  // [36, 9]
  return factor.t().mm(products.view({kPoints, -1})).t().contiguous().view(
      {outputs, channels, 3, 3});
}

}  // namespace
}  // namespace winograd

// ops.py defines the schemas.
TORCH_LIBRARY_IMPL(winograd, CPU, m) {
  m.impl("conv3x3", &winograd::conv3x3);
  m.impl("transform_weight", &winograd::transform_weight);
  m.impl("weight_gradient", &winograd::weight_gradient);
}
