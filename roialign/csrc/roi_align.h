// The geometry of roi_align, for the host and the device. Compile it without fused multiply-add
// (see setup.py): whether a sample near -1 or the size of the map counts depends on the last bit
// of its position.
#pragma once

#include "crop_and_resize.h"

namespace roialign {

struct Sampling {
  int64_t ratio;  // samples per bin and axis, or 0: as many as a bin has cells, rounded up
  bool aligned;   // whether cells have their centre at a half
};

// One axis of a box.
template <class T>
struct Span {
  T start, bin;  // where the first bin begins, and how long each is, in cells
  int64_t samples;  // per bin

  // Never decreases with i where bin is not negative.
  HOST_DEVICE T position(int64_t p, int64_t i) const {
    return start + T(p) * bin + (T(i) + T(0.5)) * bin / T(samples);
  }
};

// An adaptive number has no samples where the box is empty, flipped, not finite or longer than
// kMaxSide: a larger number could neither be counted in T nor be visited.
template <class T>
HOST_DEVICE Span<T> make_span(T start, T end, int64_t bins, const Sampling& sampling) {
  const T shift = sampling.aligned ? T(0.5) : T(0);
  start -= shift;
  T side = end - shift - start;
  if (!sampling.aligned && side < 1) side = 1;
  const T bin = side / T(bins);
  if (sampling.ratio > 0) return {start, bin, sampling.ratio};
  if (!(side > 0 && side <= T(kMaxSide))) return {start, bin, 0};
  const int64_t whole = int64_t(bin);
  return {start, bin, whole + (bin > T(whole))};
}

// visit(tap) for the samples of bin p that count, on a map of `size` cells. They are a cell apart
// or less where their number is adaptive, so those on the map are about twice its size at most;
// those before it are skipped by bisection, those behind it by the end of the loop.
template <class T, class Visit>
HOST_DEVICE void each_sample(const Span<T>& span, int64_t p, int64_t size, Visit visit) {
  int64_t i = 0;
  if (span.bin > 0 && span.samples > 0 && span.position(p, 0) < -1) {
    for (int64_t step = kMaxSide; step > 0; step /= 2) {
      if (i + step <= span.samples && span.position(p, i + step - 1) < -1) i += step;
    }
  }
  for (; i < span.samples; ++i) {
    T position = span.position(p, i);
    if (span.bin > 0 && position > T(size)) return;
    if (!(position >= -1 && position <= T(size))) continue;  // NaN, too
    if (position < 0) position = 0;
    if (position > T(size - 1)) position = T(size - 1);
    const int32_t low = int32_t(position);
    visit(Tap<T>{low, low + (position > T(low)), position - T(low), true});
  }
}

}  // namespace roialign
