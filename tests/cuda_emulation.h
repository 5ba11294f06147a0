// Runs CUDA kernels on the host, for machines without a GPU: the .cu files are compiled by g++ with
// this header in the place of cuda_runtime_api.h.
//
// Blocks run one after the other. The threads of a block are fibers, each with a stack of its own,
// that run up to the next __syncthreads() in turn: forwards, or backwards with `reversed`, so that
// a missing barrier changes the result in one of the two orders.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

namespace emulation {

inline bool reversed = false;
inline cudaError_t last_error = cudaSuccess;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  unsigned thread = 0;
  bool done = false;
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* kernel = nullptr;

inline void enter() {
  (*kernel)();
  current->done = true;  // and on to the scheduler, by uc_link
}

inline void run_block(std::vector<Fiber>& fibers) {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    fiber.done = false;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool running = true; running;) {  // one round from barrier to barrier
    running = false;
    for (size_t k = 0; k < fibers.size(); ++k) {
      current = &fibers[reversed ? fibers.size() - 1 - k : k];
      if (current->done) continue;
      threadIdx = dim3(current->thread);
      swapcontext(&scheduler, &current->context);
      running = running || !current->done;
    }
  }
}

inline void launch(dim3 blocks, dim3 threads, const std::function<void()>& body) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.y > 65535 || threads.x == 0 || threads.x > 1024) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim = blocks;
  blockDim = threads;
  kernel = &body;
  std::vector<Fiber> fibers(threads.x);
  for (unsigned t = 0; t < threads.x; ++t) fibers[t].thread = t;
  for (unsigned k = 0; k < blocks.x * blocks.y; ++k) {
    const unsigned block = reversed ? blocks.x * blocks.y - 1 - k : k;
    blockIdx = dim3(block % blocks.x, block / blocks.x);
    run_block(fibers);
  }
}

}  // namespace emulation

#define LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), emulation::launch(blocks, threads, [&] { kernel(__VA_ARGS__); }))

inline void __syncthreads() {
  emulation::Fiber* fiber = emulation::current;
  swapcontext(&fiber->context, &emulation::scheduler);
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}

template <class T>
T atomicAdd(T* address, T value) {  // no other fiber runs in between
  const T old = *address;
  *address += value;
  return old;
}
