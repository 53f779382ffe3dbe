// __half and its conversions.
#ifndef CUDA_EMULATION_CUDA_FP16_H_
#define CUDA_EMULATION_CUDA_FP16_H_

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;

  __half() = default;
  explicit __half(float x) : bits(simt::bits<uint16_t>(static_cast<_Float16>(x))) {}  // to nearest, ties to even
  operator float() const { return simt::bits<_Float16>(bits); }
};
struct __attribute__((aligned(4))) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return simt::bits<__half>(bits); }

#endif  // CUDA_EMULATION_CUDA_FP16_H_
