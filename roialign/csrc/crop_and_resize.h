// The geometry of crop_and_resize, for the host and the device. Compile it without fused
// multiply-add (see setup.py): whether a sample on the border counts as inside depends on the last
// bit of its position, and TensorFlow rounds every step.
#pragma once

#include <cstdint>

#include "../../operators/csrc/compilers.h"

namespace roialign {

// Beyond 2^24, a float32 cannot tell the last pixel from the one after.
constexpr int64_t kMaxSide = 1 << 24;

struct Shape {
  int64_t images, channels, height, width;  // of the image
  int64_t crops, crop_height, crop_width;   // of the result, with the same channels
  bool channels_last;                       // of both
};

// One axis of a sample point: the two pixels around it and the share of the second one.
template <class T>
struct Tap {
  int32_t low, high;
  T share;
  bool inside;
};

// Sample `i` of `count` between the unit coordinates `start` and `end` of an axis of `size` pixels.
template <class T>
HOST_DEVICE Tap<T> make_tap(T start, T end, int64_t i, int64_t count, int64_t size) {
  const T last = T(size - 1);
  const T position = count > 1 ? start * last + T(i) * ((end - start) * last / T(count - 1))
                               : T(0.5) * (start + end) * last;
  if (!(position >= 0 && position <= last)) return {0, 0, T(0), false};  // NaN, too
  const int32_t low = int32_t(position);
  return {low, low + (position > T(low)), position - T(low), true};
}

// Bilinear value at a point. load(y, x) -> T
template <class T, class Load>
HOST_DEVICE T interpolate(const Tap<T>& y, const Tap<T>& x, Load load) {
  const T top_left = load(y.low, x.low), top_right = load(y.low, x.high);
  const T bottom_left = load(y.high, x.low), bottom_right = load(y.high, x.high);
  const T top = top_left + (top_right - top_left) * x.share;
  const T bottom = bottom_left + (bottom_right - bottom_left) * x.share;
  return top + (bottom - top) * y.share;
}

// The transpose of interpolate. add(y, x, T)
template <class T, class Add>
HOST_DEVICE void distribute(const Tap<T>& y, const Tap<T>& x, T grad, Add add) {
  const T top = (1 - y.share) * grad, bottom = y.share * grad;
  add(y.low, x.low, (1 - x.share) * top);
  add(y.low, x.high, x.share * top);
  add(y.high, x.low, (1 - x.share) * bottom);
  add(y.high, x.high, x.share * bottom);
}

}  // namespace roialign
