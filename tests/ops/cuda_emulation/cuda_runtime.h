// The part of CUDA's language and runtime that kernels of this project use, for g++ (see simt.h).
#ifndef CUDA_EMULATION_CUDA_RUNTIME_H_
#define CUDA_EMULATION_CUDA_RUNTIME_H_

#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <type_traits>
#include <utility>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// In .tbss, which simt.cc finds and fills before every block.
#define __shared__ thread_local

#define threadIdx (simt::running.thread)
#define blockIdx (simt::running.block)
#define blockDim (simt::running.block_size)
#define gridDim (simt::running.grid_size)
constexpr int warpSize = 32;

#define CUDA_EMULATION_VECTOR(Name, Element, Bytes2, Bytes4)                           \
  struct Name##1 { Element x; };                                                       \
  struct __attribute__((aligned(Bytes2))) Name##2 { Element x, y; };                   \
  struct Name##3 { Element x, y, z; };                                                 \
  struct __attribute__((aligned(Bytes4))) Name##4 { Element x, y, z, w; };             \
  inline Name##2 make_##Name##2(Element x, Element y) { return {x, y}; }               \
  inline Name##3 make_##Name##3(Element x, Element y, Element z) { return {x, y, z}; } \
  inline Name##4 make_##Name##4(Element x, Element y, Element z, Element w) { return {x, y, z, w}; }
#define uint3 uint3_of_simt_h  // which has it already
CUDA_EMULATION_VECTOR(char, signed char, 2, 4)
CUDA_EMULATION_VECTOR(uchar, unsigned char, 2, 4)
CUDA_EMULATION_VECTOR(short, short, 4, 8)
CUDA_EMULATION_VECTOR(ushort, unsigned short, 4, 8)
CUDA_EMULATION_VECTOR(int, int, 8, 16)
CUDA_EMULATION_VECTOR(uint, unsigned, 8, 16)
CUDA_EMULATION_VECTOR(float, float, 8, 16)
CUDA_EMULATION_VECTOR(longlong, long long, 16, 16)
CUDA_EMULATION_VECTOR(ulonglong, unsigned long long, 16, 16)
CUDA_EMULATION_VECTOR(double, double, 16, 16)
#undef uint3
#undef CUDA_EMULATION_VECTOR

#include "device_functions.h"
#include "host_runtime.h"

#endif  // CUDA_EMULATION_CUDA_RUNTIME_H_
