// The geometry of nms, for the host and the device. Compile it without fused multiply-add (see
// setup.py): in float32 it then rounds like TensorFlow's IOU() and takes the same decisions.
#pragma once

#include "../../operators/csrc/compilers.h"

namespace nms {

template <class T>
struct Box {
  T y1, x1, y2, x2, area;
};

template <class T>
HOST_DEVICE T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
HOST_DEVICE T larger(T a, T b) {
  return a < b ? b : a;
}

// corners: y1, x1, y2, x2; a flipped pair is put in order.
template <class T>
HOST_DEVICE Box<T> make_box(const T* corners) {
  const T y1 = smaller(corners[0], corners[2]), y2 = larger(corners[0], corners[2]);
  const T x1 = smaller(corners[1], corners[3]), x2 = larger(corners[1], corners[3]);
  return {y1, x1, y2, x2, (y2 - y1) * (x2 - x1)};
}

// IoU > threshold. False where an area is 0, infinite or NaN: the quotient is then 0 or NaN.
template <class T>
HOST_DEVICE bool overlaps(const Box<T>& a, const Box<T>& b, T threshold) {
  const T height = larger(smaller(a.y2, b.y2) - larger(a.y1, b.y1), T(0));
  const T width = larger(smaller(a.x2, b.x2) - larger(a.x1, b.x1), T(0));
  const T intersection = height * width;
  // threshold * union would save the division, but gets exact ties wrong: 63 / 90 at 0.7.
  return intersection / (a.area + b.area - intersection) > threshold;
}

}  // namespace nms
