// roialign::roi_align and its gradient for CPU, and the binding of the CUDA kernels in
// roi_align_cuda.cu.
#include "roi_align.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "arguments.h"

#ifdef WITH_CUDA
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "roi_align_cuda.h"
#endif

namespace roialign {
namespace {

// A cell of the map, or of one of its axes, and its share of the mean of a bin.
template <class T>
struct Cell {
  int64_t place;
  T weight;
};

// The cells of all bins along one axis. A bilinear sample is a product of two axes, and so is the
// mean of a grid of samples: each cell that several of them share is read once.
template <class T>
class Axis {
 public:
  // box[0] and box[2] are the ends of the first box, box[4] and box[6] of the second, and so on.
  Axis(const T* box, int64_t boxes, int64_t bins, int64_t size, const Sampling& sampling) {
    begin_.reserve(boxes * bins + 1);
    begin_.push_back(0);
    for (; boxes > 0; --boxes, box += 4) {
      const Span<T> span = make_span(box[0], box[2], bins, sampling);
      for (int64_t p = 0; p < bins; ++p) {
        each_sample(span, p, size, [&](const Tap<T>& tap) {
          add(tap.low, (1 - tap.share) / T(span.samples));
          if (tap.high > tap.low) add(tap.high, tap.share / T(span.samples));
        });
        begin_.push_back(cells_.size());
      }
    }
  }

  const Cell<T>* begin(int64_t bin) const { return cells_.data() + begin_[bin]; }
  const Cell<T>* end(int64_t bin) const { return cells_.data() + begin_[bin + 1]; }

 private:
  // Samples are in order, so a cell that the bin already has is one of the last two.
  void add(int64_t place, T weight) {
    const int64_t count = cells_.size();
    for (int64_t k = count - 1; k >= std::max(begin_.back(), count - 2); --k) {
      if (cells_[k].place == place) {
        cells_[k].weight += weight;
        return;
      }
    }
    cells_.push_back({place, weight});
  }

  std::vector<Cell<T>> cells_;
  std::vector<int64_t> begin_;  // of each bin in cells_, and the end
};

template <class T>
class Bins {
 public:
  Bins(const Shape& shape, const T* boxes, const Sampling& sampling)
      : height_(shape.crop_height),
        width_(shape.crop_width),
        channels_(shape.channels),
        row_(shape.width * shape.channels),
        y_(boxes, shape.crops, height_, shape.height, sampling),
        x_(boxes + 1, shape.crops, width_, shape.width, sampling) {}

  int64_t size() const { return height_ * width_; }

  // The cells of bin k of a crop, each by the place of its first channel.
  void find_cells(int64_t crop, int64_t k, std::vector<Cell<T>>& cells) const {
    const int64_t i = crop * height_ + k / width_, j = crop * width_ + k % width_;
    cells.clear();
    for (const Cell<T>* y = y_.begin(i); y < y_.end(i); ++y) {
      for (const Cell<T>* x = x_.begin(j); x < x_.end(j); ++x) {
        cells.push_back({y->place * row_ + x->place * channels_, y->weight * x->weight});
      }
    }
  }

 private:
  int64_t height_, width_, channels_, row_;
  Axis<T> y_, x_;
};

// Adds kCells cells of `count` channels each to `target`, one after the other.
template <int kCells, class T>
INLINE void add_cells(const Cell<T>* cells, const T* source, int64_t count, T* __restrict target) {
  for (int64_t c = 0; c < count; ++c) {
    T sum = target[c];
    for (int k = 0; k < kCells; ++k) sum += cells[k].weight * source[cells[k].place + c];
    target[c] = sum;
  }
}

template <class T>
INLINE void gather_cells(const std::vector<Cell<T>>& cells, const T* source, int64_t count,
                         T* target) {
  std::fill_n(target, count, T(0));
  const Cell<T>*cell = cells.data(), *end = cell + cells.size();
  for (; end - cell >= 8; cell += 8) add_cells<8>(cell, source, count, target);
  if (end - cell >= 4) add_cells<4>(cell, source, count, target), cell += 4;
  if (end - cell >= 2) add_cells<2>(cell, source, count, target), cell += 2;
  if (end - cell >= 1) add_cells<1>(cell, source, count, target);
}

template <class T>
INLINE void scatter_cells(const std::vector<Cell<T>>& cells, const T* source, int64_t count,
                          T* target) {
  for (const Cell<T>& cell : cells) {
    T* __restrict to = target + cell.place;
    for (int64_t c = 0; c < count; ++c) to[c] += cell.weight * source[c];
  }
}

// Overloads, since a template has no versions.
MULTIVERSION void gather(const std::vector<Cell<float>>& cells, const float* source, int64_t count,
                         float* target) {
  gather_cells(cells, source, count, target);
}
MULTIVERSION void gather(const std::vector<Cell<double>>& cells, const double* source,
                         int64_t count, double* target) {
  gather_cells(cells, source, count, target);
}
MULTIVERSION void scatter(const std::vector<Cell<float>>& cells, const float* source,
                          int64_t count, float* target) {
  scatter_cells(cells, source, count, target);
}
MULTIVERSION void scatter(const std::vector<Cell<double>>& cells, const double* source,
                          int64_t count, double* target) {
  scatter_cells(cells, source, count, target);
}

// Both kernels take channels_last alone: a bin's cells are then vectors, which is worth a copy.
template <class T>
void average_cpu(const Shape& shape, const T* features, const T* boxes, const int64_t* box_index,
                 const Sampling& sampling, T* crops) {
  const Bins<T> bins(shape, boxes, sampling);
  const int64_t image = shape.height * shape.width * shape.channels;
  at::parallel_for(0, shape.crops, 1, [&](int64_t begin, int64_t end) {
    std::vector<Cell<T>> cells;
    for (int64_t crop = begin; crop < end; ++crop) {
      for (int64_t k = 0; k < bins.size(); ++k) {
        bins.find_cells(crop, k, cells);
        gather(cells, features + box_index[crop] * image, shape.channels,
               crops + (crop * bins.size() + k) * shape.channels);
      }
    }
  });
}

// Every thread owns channels of the gradient and visits the crops in order, so the sums do not
// depend on the number of threads.
template <class T>
void distribute_cpu(const Shape& shape, const T* grad, const T* boxes, const int64_t* box_index,
                    const Sampling& sampling, T* grad_features) {
  const Bins<T> bins(shape, boxes, sampling);
  const int64_t image = shape.height * shape.width * shape.channels;
  at::parallel_for(0, shape.channels, 16, [&](int64_t begin, int64_t end) {
    std::vector<Cell<T>> cells;
    for (int64_t crop = 0; crop < shape.crops; ++crop) {
      for (int64_t k = 0; k < bins.size(); ++k) {
        bins.find_cells(crop, k, cells);
        scatter(cells, grad + (crop * bins.size() + k) * shape.channels + begin, end - begin,
                grad_features + box_index[crop] * image + begin);
      }
    }
  });
}

constexpr Names kNames{"roi_align", "features"};

Sampling make_sampling(int64_t ratio, bool aligned) {
  constexpr int64_t kMaxRatio = 1024;  // so that a call ends
  TORCH_CHECK_VALUE(ratio >= 0 && ratio <= kMaxRatio,
                    "roi_align: sampling_ratio must be within 0..", kMaxRatio, ", got ", ratio, "; 0 adapts the number of samples to the box");
  return {ratio, aligned};
}

// The result of a kernel that takes channels_last alone, in the memory format of `values`.
at::Tensor in_layout(const at::Tensor& values, const at::Tensor& result) {
  return is_channels_last(values) ? result
                                  : at::empty(result.sizes(), result.options()).copy_(result);
}

at::Tensor align_cpu(const at::Tensor& features, const at::Tensor& boxes,
                     const at::Tensor& box_index, int64_t height, int64_t width,
                     int64_t sampling_ratio, bool aligned) {
  const Sampling sampling = make_sampling(sampling_ratio, aligned);
  return in_layout(
      features,
      forward(kNames, features, boxes, box_index, height, width, true,
              [&](const Shape& shape, auto* from, auto* corners, auto* index, auto* crops) {
                average_cpu(shape, from, corners, index, sampling, crops);
              }));
}

at::Tensor align_backward_cpu(const at::Tensor& grad, const at::Tensor& boxes,
                              const at::Tensor& box_index, int64_t images, int64_t height,
                              int64_t width, int64_t sampling_ratio, bool aligned) {
  const Sampling sampling = make_sampling(sampling_ratio, aligned);
  return in_layout(
      grad, backward(kNames, grad, boxes, box_index, images, height, width, true,
                     [&](const Shape& shape, auto* from, auto* corners, auto* index, auto* to) {
                       distribute_cpu(shape, from, corners, index, sampling, to);
                     }));
}

#ifdef WITH_CUDA
at::Tensor align_cuda(const at::Tensor& features, const at::Tensor& boxes,
                      const at::Tensor& box_index, int64_t height, int64_t width,
                      int64_t sampling_ratio, bool aligned) {
  const Sampling sampling = make_sampling(sampling_ratio, aligned);
  check_devices(kNames, features, boxes, box_index);
  const c10::cuda::CUDAGuard guard(features.device());
  return forward(kNames, features, boxes, box_index, height, width, is_channels_last(features),
                 [&](const Shape& shape, auto* from, auto* corners, auto* index, auto* crops) {
                   C10_CUDA_CHECK(align_forward(shape, from, corners, index, sampling, crops,
                                                c10::cuda::getCurrentCUDAStream()));
                 });
}

at::Tensor align_backward_cuda(const at::Tensor& grad, const at::Tensor& boxes,
                               const at::Tensor& box_index, int64_t images, int64_t height,
                               int64_t width, int64_t sampling_ratio, bool aligned) {
  const Sampling sampling = make_sampling(sampling_ratio, aligned);
  check_devices(kNames, grad, boxes, box_index);
  const c10::cuda::CUDAGuard guard(grad.device());
  at::globalContext().alertNotDeterministic("roi_align_backward on CUDA");
  return backward(kNames, grad, boxes, box_index, images, height, width, is_channels_last(grad),
                  [&](const Shape& shape, auto* from, auto* corners, auto* index, auto* to) {
                    C10_CUDA_CHECK(align_backward(shape, from, corners, index, sampling, to,
                                                  c10::cuda::getCurrentCUDAStream()));
                  });
}
#endif

}  // namespace
}  // namespace roialign

// align.py defines the schemas.
TORCH_LIBRARY_IMPL(roialign, CPU, m) {
  m.impl("roi_align", &roialign::align_cpu);
  m.impl("roi_align_backward", &roialign::align_backward_cpu);
}

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(roialign, CUDA, m) {
  m.impl("roi_align", &roialign::align_cuda);
  m.impl("roi_align_backward", &roialign::align_backward_cuda);
}
#endif
