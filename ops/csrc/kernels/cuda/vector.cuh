// Four elements at a time, 16-byte (float32) or 8-byte (16 bits) aligned.
#ifndef PADDLE_MIXTRAL_CUDA_VECTOR_CUH_
#define PADDLE_MIXTRAL_CUDA_VECTOR_CUH_

#include <string.h>

#include "ptx.cuh"
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

// Two values that follow each other, 8-byte aligned.
__device__ __forceinline__ void store_pair(float* p, float a, float b) { *reinterpret_cast<float2*>(p) = make_float2(a, b); }
__device__ __forceinline__ void store_pair(int32_t* p, int32_t a, int32_t b) {
  *reinterpret_cast<int2*>(p) = make_int2(a, b);
}

// Elements i and i + 1 of an array of any type of activations, as far as there are `left`. aligned: i is even.
__device__ __forceinline__ void store_up_to_two(void* p, pm_dtype dtype, int64_t i, float a, float b, int64_t left,
                                                bool aligned) {
  if (!aligned || left < 2) {
    if (left > 0) store_element(p, dtype, i, a);
    if (left > 1) store_element(p, dtype, i + 1, b);
  } else if (dtype == PM_F32) {
    store_pair(static_cast<float*>(p) + i, a, b);
  } else {
    const uint32_t word = dtype == PM_BF16 ? pack_two<__nv_bfloat16>(a, b) : pack_two<__half>(a, b);
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p) + i) = word;
  }
}

// Asks for an array to come to the second level cache, by the whole block.
__device__ __forceinline__ void prefetch_floats(const float* global, int64_t count) {
  constexpr int kLine = 32;
  for (int64_t i = int64_t{threadIdx.x} * kLine; i < count; i += int64_t{blockDim.x} * kLine) prefetch(global + i);
}

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_VECTOR_CUH_
