// Four elements at a time, 16-byte (float32) or 8-byte (16 bits) aligned.
#ifndef PADDLE_MIXTRAL_CUDA_VECTOR_CUH_
#define PADDLE_MIXTRAL_CUDA_VECTOR_CUH_

#include <string.h>

#include "scalar.cuh"

namespace pm::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }

// Two values rounded to a type of 16 bits, the first in the lower half: an operand word of mma.
template <class Element>
__device__ __forceinline__ uint32_t pack_two(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_two<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}
template <>
__device__ __forceinline__ uint32_t pack_two<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

// The elements of such a word: i = 0 the lower.
template <class Element>
__device__ __forceinline__ float unpack(uint32_t word, int i) {
  const uint16_t half = static_cast<uint16_t>(word >> 16 * i);
  Element element;
  memcpy(&element, &half, 2);
  return to_float(element);
}

template <class Element>
__device__ __forceinline__ float4 load_four(const Element* p) {
  if constexpr (sizeof(Element) == 4) {
    return *reinterpret_cast<const float4*>(p);
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(p);
    return make_float4(unpack<Element>(words.x, 0), unpack<Element>(words.x, 1), unpack<Element>(words.y, 0),
                       unpack<Element>(words.y, 1));
  }
}

template <class Element>
__device__ __forceinline__ void store_four(Element* p, float4 v) {
  if constexpr (sizeof(Element) == 4)
    *reinterpret_cast<float4*>(p) = v;
  else
    *reinterpret_cast<uint2*>(p) = make_uint2(pack_two<Element>(v.x, v.y), pack_two<Element>(v.z, v.w));
}

// Elements i .. i + 3 of an array of any type of activations.
__device__ __forceinline__ void store_four(void* p, pm_dtype dtype, int64_t i, float4 v) {
  if (dtype == PM_BF16)
    store_four(static_cast<__nv_bfloat16*>(p) + i, v);
  else if (dtype == PM_F16)
    store_four(static_cast<__half*>(p) + i, v);
  else
    store_four(static_cast<float*>(p) + i, v);
}

// Those of elements i .. i + 3 that come before `end`. aligned: i is a multiple of four whose four elements are aligned.
__device__ __forceinline__ void store_up_to_four(void* p, pm_dtype dtype, int64_t i, const float (&v)[4], int64_t end,
                                                 bool aligned) {
  if (aligned && i + 4 <= end) return store_four(p, dtype, i, make_float4(v[0], v[1], v[2], v[3]));
#pragma unroll
  for (int r = 0; r < 4; ++r)
    if (i + r < end) store_element(p, dtype, i + r, v[r]);
}

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_VECTOR_CUH_
