// What g++, nvcc and Visual C++ spell differently.
#pragma once

#ifdef __GNUC__
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#else  // tests/cuda_emulation.h has a LAUNCH for the host
#define HOST_DEVICE INLINE
#endif
