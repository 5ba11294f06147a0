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

constexpr int64_t kPanel = 16, kPoints = 36;

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

template <int Width>
INLINE void transform_inputs(const Convolution& conv, const Block& block, Strip strip) {
  using V = typename Vector<Width>::Type;
  const int64_t step = strip.tiles * kPanel;
  float* strip_input = block.input + strip.start * kPoints * conv.channels;
  for (int64_t t = 0; t < strip.tiles; ++t) {
    const Tile tile = find_tile(conv, block.first_tile + strip.start + t);
    const float* pixels[6][6];
    for (int i = 0; i < 6; ++i) {
      for (int j = 0; j < 6; ++j) {
        const int64_t y = tile.top + i - 1, x = tile.left + j - 1;
        const bool inside = y >= 0 && y < conv.height && x >= 0 && x < conv.width;
        const int64_t pixel = (tile.image * conv.height + y) * conv.width + x;
        pixels[i][j] = inside ? conv.input + pixel * conv.channels : conv.padding;
      }
    }
    for (int64_t c = 0; c < conv.channels; c += Width) {
      V rows[6][6];
      for (int i = 0; i < 6; ++i) {
        V d[6];
        for (int j = 0; j < 6; ++j) d[j] = *reinterpret_cast<const V*>(pixels[i][j] + c);
        // The columns that the tile to the right adds.
        for (int j = 2; j < 6; ++j) __builtin_prefetch(pixels[i][j] + c + 4 * conv.channels);
        transform_input(d, rows[i]);
      }
      float* target = strip_input + (c / kPanel * kPoints * strip.tiles + t) * kPanel + c % kPanel;
      for (int j = 0; j < 6; ++j) {
        const V d[6] = {rows[0][j], rows[1][j], rows[2][j], rows[3][j], rows[4][j], rows[5][j]};
        V v[6];
        transform_input(d, v);
        for (int i = 0; i < 6; ++i) *reinterpret_cast<V*>(target + (6 * i + j) * step) = v[i];
      }
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

// Rows x (Panels * 16) sums over all input channels, in registers, at one point of a strip.
// input: [Rows, 16] of the first panel. weight: Panels of [channels, 16]. output: as input.
// For each panel of inputs, `lines` cache lines from `next` on are fetched for later.
template <int Width, int Rows, int Panels>
INLINE void multiply_rows(const float* input, const float* weight, const float* next, int64_t lines,
                          float* output, int64_t channels) {
  using V = typename Vector<Width>::Type;
  constexpr int kParts = kPanel / Width, kVectors = Panels * kParts;
  constexpr int64_t kStep = kPoints * Rows * kPanel;
  V sums[Rows][kVectors] = {};
  for (int64_t panel = 0; panel < channels; panel += kPanel) {
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
      *reinterpret_cast<V*>(output + v / kParts * kStep + r * kPanel + v % kParts * Width) =
          sums[r][v];
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
