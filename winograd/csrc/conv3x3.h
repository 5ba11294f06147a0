// Winograd's minimal filtering F(4x4, 3x3) of a few tiles, for any width of vector.
//
// A tile of 4 x 4 outputs sees 6 x 6 inputs, the last two of which it shares with the next tile.
// Both transforms are those of the points 0, +-1/sqrt(2), +-sqrt(2) and infinity, whose rounding
// errors are a quarter of those of the usual 0, +-1, +-2. ops.py has the matrices.
//
// Channels come in panels of 16, tiles in strips of as many as there are registers for. A strip of
// transformed tiles is [panels, 36, tiles, 16], which keeps the 36 writes of a transform on few
// pages of memory; the transformed weight is [36, panels of outputs, input channels, 16].
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../operators/csrc/compilers.h"

namespace winograd {

constexpr int64_t kPanel = 16, kPoints = 36, kChunk = 32;

struct Convolution {
  const float* input;    // [images, height, width, channels]
  const float* weight;   // [36, output_panels, channels, 16]
  const float* bias;     // [output_panels * 16], or null
  const float* padding;  // [channels] zeros
  float* output;         // [images, height, width, output_panels * 16]
  int64_t images, height, width, channels, output_panels;
  bool relu;

  int64_t rows() const { return (height + 3) / 4; }
  int64_t columns() const { return (width + 3) / 4; }
  int64_t tiles() const { return images * rows() * columns(); }
  int64_t panels() const { return channels / kPanel; }
};

// Tiles first_tile.. and panels of outputs first_panel.., for which one thread has scratch memory.
struct Block {
  int64_t first_tile, tiles, first_panel, output_panels;
  float *input, *output;  // strips of tiles, each [panels, 36, tiles of the strip, 16]
};

struct Tile {
  int64_t image, top, left;
};

INLINE Tile find_tile(const Convolution& conv, int64_t index) {
  const int64_t rows = conv.rows(), columns = conv.columns();
  return {index / (rows * columns), index / columns % rows * 4, index % columns * 4};
}

// Width floats, unaligned.
template <int Width>
struct Vector {
  typedef float Type __attribute__((vector_size(4 * Width), aligned(4), may_alias));
};

template <class V>
INLINE void transform_input(const V (&d)[6], V (&v)[6]) {
  constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
  const V even = d[4] - 2.f * d[2], odd = d[3] - 2.f * d[1];
  const V even_b = d[4] - .5f * d[2], odd_b = d[3] - .5f * d[1];
  v[0] = d[0] + d[4] - 2.5f * d[2];
  v[1] = even + a * odd;
  v[2] = even - a * odd;
  v[3] = even_b + b * odd_b;
  v[4] = even_b - b * odd_b;
  v[5] = d[1] + d[5] - 2.5f * d[3];
}

template <class V>
INLINE void transform_output(const V (&m)[6], V (&y)[4]) {
  constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
  const V even = m[1] + m[2], odd = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + even + even_b;
  y[1] = a * odd + b * odd_b;
  y[2] = .5f * even + 2.f * even_b;
  y[3] = m[5] + .5f * a * odd + 2.f * b * odd_b;
}

// The transpose of transform_output.
template <class V>
INLINE void transform_gradient(const V (&y)[4], V (&m)[6]) {
  constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
  const V even = y[0] + .5f * y[2], odd = a * y[1] + .5f * a * y[3];
  const V even_b = y[0] + 2.f * y[2], odd_b = b * y[1] + 2.f * b * y[3];
  m[0] = y[0];
  m[1] = even + odd;
  m[2] = even - odd;
  m[3] = even_b + odd_b;
  m[4] = even_b - odd_b;
  m[5] = y[3];
}

struct Strip {
  int64_t start, tiles;
};

// The tiles of a block in strips of about the same length, Rows at most.
template <int Rows>
struct Strips {
  int64_t tiles, count;
  explicit Strips(int64_t tiles) : tiles(tiles), count((tiles + Rows - 1) / Rows) {}
  INLINE Strip operator[](int64_t index) const {
    const int64_t start = tiles * index / count;
    return {start, tiles * (index + 1) / count - start};
  }
};

// Where the Size x Size pixels from (top, left) on are, and zeros outside of the image.
template <int Size>
INLINE void find_pixels(const Convolution& conv, const float* input, int64_t channels,
                        const Tile& tile, int64_t top, int64_t left,
                        const float* (&pixels)[Size][Size]) {
  for (int i = 0; i < Size; ++i) {
    for (int j = 0; j < Size; ++j) {
      const int64_t y = top + i, x = left + j;
      const bool inside = y >= 0 && y < conv.height && x >= 0 && x < conv.width;
      const int64_t pixel = (tile.image * conv.height + y) * conv.width + x;
      pixels[i][j] = inside ? input + pixel * channels : conv.padding;
    }
  }
}

// The 6 x 6 points of Width channels from c on, `step` floats apart.
template <int Width>
INLINE void transform_tile(const float* const (&pixels)[6][6], int64_t c, int64_t channels,
                           float* target, int64_t step) {
  using V = typename Vector<Width>::Type;
  V rows[6][6];
  for (int i = 0; i < 6; ++i) {
    V d[6];
    for (int j = 0; j < 6; ++j) d[j] = *reinterpret_cast<const V*>(pixels[i][j] + c);
    // The columns that the tile to the right adds.
    for (int j = 2; j < 6; ++j) __builtin_prefetch(pixels[i][j] + c + 4 * channels);
    transform_input(d, rows[i]);
  }
  for (int j = 0; j < 6; ++j) {
    const V d[6] = {rows[0][j], rows[1][j], rows[2][j], rows[3][j], rows[4][j], rows[5][j]};
    V v[6];
    transform_input(d, v);
    for (int i = 0; i < 6; ++i) *reinterpret_cast<V*>(target + (6 * i + j) * step) = v[i];
  }
}

// The transpose of transform_outputs: 6 x 6 points of a tile of 4 x 4 gradients.
template <int Width>
INLINE void transform_gradient_tile(const float* const (&pixels)[4][4], int64_t c, float* target,
                                    int64_t step) {
  using V = typename Vector<Width>::Type;
  V rows[4][6];
  for (int i = 0; i < 4; ++i) {
    V y[4];
    for (int j = 0; j < 4; ++j) y[j] = *reinterpret_cast<const V*>(pixels[i][j] + c);
    transform_gradient(y, rows[i]);
  }
  for (int j = 0; j < 6; ++j) {
    const V y[4] = {rows[0][j], rows[1][j], rows[2][j], rows[3][j]};
    V m[6];
    transform_gradient(y, m);
    for (int i = 0; i < 6; ++i) *reinterpret_cast<V*>(target + (6 * i + j) * step) = m[i];
  }
}

template <int Width>
INLINE void transform_inputs(const Convolution& conv, const Block& block, Strip strip) {
  const int64_t step = strip.tiles * kPanel;
  float* strip_input = block.input + strip.start * kPoints * conv.channels;
  for (int64_t t = 0; t < strip.tiles; ++t) {
    const Tile tile = find_tile(conv, block.first_tile + strip.start + t);
    const float* pixels[6][6];
    find_pixels(conv, conv.input, conv.channels, tile, tile.top - 1, tile.left - 1, pixels);
    for (int64_t c = 0; c < conv.channels; c += Width) {
      float* target = strip_input + (c / kPanel * kPoints * strip.tiles + t) * kPanel + c % kPanel;
      transform_tile<Width>(pixels, c, conv.channels, target, step);
    }
  }
}

// Of a block's tiles the inputs, [36, tiles, channels], and the gradients of the outputs,
// [36, tiles, outputs], from `tile` to `tile_end`, counted in the block.
template <int Width>
INLINE void transform_for_weight(const Convolution& conv, const float* gradient, const Block& block,
                                 int64_t tile, int64_t tile_end) {
  const int64_t outputs = conv.output_panels * kPanel;
  for (int64_t t = tile; t < tile_end; ++t) {
    const Tile place = find_tile(conv, block.first_tile + t);
    const float *pixels[6][6], *gradients[4][4];
    find_pixels(conv, conv.input, conv.channels, place, place.top - 1, place.left - 1, pixels);
    find_pixels(conv, gradient, outputs, place, place.top, place.left, gradients);
    for (int64_t c = 0; c < conv.channels; c += Width) {
      transform_tile<Width>(pixels, c, conv.channels, block.input + t * conv.channels + c,
                            block.tiles * conv.channels);
    }
    for (int64_t k = 0; k < outputs; k += Width) {
      transform_gradient_tile<Width>(gradients, k, block.output + t * outputs + k,
                                     block.tiles * outputs);
    }
  }
}

template <int Width>
INLINE void transform_outputs(const Convolution& conv, const Block& block, Strip strip) {
  using V = typename Vector<Width>::Type;
  const int64_t step = strip.tiles * kPanel;
  const int64_t output_channels = conv.output_panels * kPanel;
  const int64_t first = block.first_panel * kPanel;
  const float* strip_output = block.output + strip.start * kPoints * block.output_panels * kPanel;
  for (int64_t t = 0; t < strip.tiles; ++t) {
    const Tile tile = find_tile(conv, block.first_tile + strip.start + t);
    const int64_t pixel = (tile.image * conv.height + tile.top) * conv.width + tile.left;
    const int64_t height = std::min<int64_t>(4, conv.height - tile.top);
    const int64_t width = std::min<int64_t>(4, conv.width - tile.left);
    float* target = conv.output + pixel * output_channels + first;
    for (int64_t k = 0; k < block.output_panels * kPanel; k += Width) {
      const float* source =
          strip_output + (k / kPanel * kPoints * strip.tiles + t) * kPanel + k % kPanel;
      V rows[4][6];
      for (int j = 0; j < 6; ++j) {
        V m[6], y[4];
        for (int i = 0; i < 6; ++i) m[i] = *reinterpret_cast<const V*>(source + (6 * i + j) * step);
        transform_output(m, y);
        for (int i = 0; i < 4; ++i) rows[i][j] = y[i];
      }
      V bias = {};
      if (conv.bias) bias = *reinterpret_cast<const V*>(conv.bias + first + k);
      for (int i = 0; i < height; ++i) {
        V y[4];
        transform_output(rows[i], y);
        for (int j = 0; j < width; ++j) {
          V value = y[j] + bias;
          if (conv.relu) value = value < 0.f ? V{} : value;  // keeps NaN
          *reinterpret_cast<V*>(target + (i * conv.width + j) * output_channels + k) = value;
        }
      }
    }
  }
}

// Rows x (Panels * 16) sums over all input channels at one point of a strip, kChunk channels at a
// time in registers. Most of the error of a sum in one go comes from adding to what is large
// already: over 256 channels it is four fifths of the error of a convolution.
// input: [Rows, 16] of the first panel. weight: Panels of [channels, 16]. output: as input.
// For each panel of inputs, `lines` cache lines from `next` on are fetched for later.
template <int Width, int Rows, int Panels>
INLINE void multiply_rows(const float* input, const float* weight, const float* next, int64_t lines,
                          float* output, int64_t channels) {
  using V = typename Vector<Width>::Type;
  constexpr int kParts = kPanel / Width, kVectors = Panels * kParts;
  constexpr int64_t kStep = kPoints * Rows * kPanel;
  for (int64_t start = 0; start < channels; start += kChunk) {
    const int64_t end = std::min(start + kChunk, channels);
    V sums[Rows][kVectors] = {};
    for (int64_t panel = start; panel < end; panel += kPanel) {
      for (int64_t line = 0; line < lines; ++line, next += kPanel) __builtin_prefetch(next, 0, 2);
      for (int c = 0; c < kPanel; ++c) {
        V w[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          w[v] = *reinterpret_cast<const V*>(weight + v / kParts * channels * kPanel +
                                             v % kParts * Width);
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) sums[r][v] += input[r * kPanel + c] * w[v];
        }
        weight += kPanel;
      }
      input += kStep;
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        V* target = reinterpret_cast<V*>(output + v / kParts * kStep + r * kPanel +
                                         v % kParts * Width);
        *target = start == 0 ? sums[r][v] : *target + sums[r][v];
      }
    }
  }
}

// multiply_rows of 1 to Rows rows
template <int Width, int Rows, int Panels>
INLINE void multiply_some(int64_t rows, const float* input, const float* weight, const float* next,
                          int64_t lines, float* output, int64_t channels) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      return multiply_some<Width, Rows - 1, Panels>(rows, input, weight, next, lines, output,
                                                    channels);
    }
  }
  multiply_rows<Width, Rows, Panels>(input, weight, next, lines, output, channels);
}

// All tiles of the block times Panels of outputs from `panel` on, at one point. Meanwhile the
// strips share the fetching of the weights that come next, which do not fit the cache.
template <int Width, int Rows, int Panels>
INLINE void multiply_panels(const Convolution& conv, const Block& block, int64_t point,
                            int64_t panel) {
  const Strips<Rows> strips(block.tiles);
  const int64_t lines = (Panels * kPanel + strips.count - 1) / strips.count;
  const float* weight =
      conv.weight +
      (point * conv.output_panels + block.first_panel + panel) * conv.channels * kPanel;
  const float* next = weight + Panels * conv.channels * kPanel;
  for (int64_t s = 0; s < strips.count; ++s) {
    const Strip strip = strips[s];
    const int64_t step = strip.tiles * kPanel;
    multiply_some<Width, Rows, Panels>(
        strip.tiles,
        block.input + strip.start * kPoints * conv.channels + point * step, weight,
        next + s * lines * conv.channels, lines,
        block.output + strip.start * kPoints * block.output_panels * kPanel +
            (panel * kPoints + point) * step,
        conv.channels);
  }
}

// Rows x Panels * 16 / Width sums have to fit in registers.
template <int Width, int Rows, int Panels>
INLINE void convolve_block(const Convolution& conv, const Block& block) {
  const Strips<Rows> strips(block.tiles);
  for (int64_t s = 0; s < strips.count; ++s) transform_inputs<Width>(conv, block, strips[s]);
  for (int64_t point = 0; point < kPoints; ++point) {
    int64_t panel = 0;
    for (; panel + Panels <= block.output_panels; panel += Panels) {
      multiply_panels<Width, Rows, Panels>(conv, block, point, panel);
    }
    for (; panel < block.output_panels; ++panel) {
      multiply_panels<Width, Rows, 1>(conv, block, point, panel);
    }
  }
  for (int64_t s = 0; s < strips.count; ++s) transform_outputs<Width>(conv, block, strips[s]);
}

}  // namespace winograd
