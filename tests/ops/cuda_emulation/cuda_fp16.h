// __half and its conversions.
#ifndef CUDA_EMULATION_CUDA_FP16_H_
#define CUDA_EMULATION_CUDA_FP16_H_

#include "cuda_runtime.h"

namespace simt {

// To nearest, ties to even. (g++ has _Float16 from version 12 on.)
inline uint16_t half_bits(float x) {
  const uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // from 65520 on: infinity
  if (magnitude < 0x38800000) {                                              // below 2^-14: a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(__builtin_nearbyintf(__builtin_fabsf(x) * 0x1p24f)));
  }
  return static_cast<uint16_t>(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

inline float from_half_bits(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(fraction);
  return bits<float>(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13);
}

}  // namespace simt

struct __half {
  uint16_t bits;

  __half() = default;
  explicit __half(float x) : bits(simt::half_bits(x)) {}
  operator float() const { return simt::from_half_bits(bits); }
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
