// What the kernels with one thread per number of the crops share: how many there are, and which
// pixels of the images belong to a number.
#pragma once

#include "crop_and_resize.h"

namespace roialign {

constexpr int kThreads = 256;

inline int64_t count_values(const Shape& shape) {
  return shape.crops * shape.channels * shape.crop_height * shape.crop_width;
}

inline int count_blocks(const Shape& shape) {
  constexpr int64_t kMaxBlocks = 1 << 16;
  const int64_t blocks = (count_values(shape) + kThreads - 1) / kThreads;
  return int(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// Number (i, j) of a channel of a crop.
struct Place {
  int64_t crop, i, j;
  int64_t origin, step;  // pixel (y, x) of the channel is at origin + (y * width + x) * step
  bool known;  // An index out of range cannot raise without a synchronisation: it is outside.

  __device__ int64_t offset(int64_t row, int64_t column, int64_t width) const {
    return origin + (row * width + column) * step;
  }
};

// Where number k of the crops is, in their memory order.
__device__ inline Place find_place(const Shape& shape, const int64_t* box_index, int64_t k) {
  Place place;
  int64_t channel = 0;
  if (shape.channels_last) {
    channel = k % shape.channels;
    k /= shape.channels;
  }
  place.j = k % shape.crop_width;
  k /= shape.crop_width;
  place.i = k % shape.crop_height;
  k /= shape.crop_height;
  if (!shape.channels_last) {
    channel = k % shape.channels;
    k /= shape.channels;
  }
  place.crop = k;
  const int64_t index = box_index[k], pixels = shape.height * shape.width;
  place.known = index >= 0 && index < shape.images;
  place.step = shape.channels_last ? shape.channels : 1;
  place.origin = index * shape.channels * pixels + channel * (shape.channels_last ? 1 : pixels);
  return place;
}

}  // namespace roialign
