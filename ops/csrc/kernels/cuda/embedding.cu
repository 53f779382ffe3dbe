// Token embedding: include/embedding.h. A block a row.
#include "vector.cuh"

namespace pm::cuda {
namespace {

constexpr int kThreads = 256;

template <class Element, bool Four>
__global__ void __launch_bounds__(kThreads)
    embedding_decode(const int32_t* ids, const Element* table, float* out, int64_t H) {
  const Element* const row = table + ids[blockIdx.x] * H;
  out += blockIdx.x * H;
  if constexpr (Four) {
    for (int64_t i = 4 * threadIdx.x; i < H; i += 4 * kThreads) store_four(out + i, load_four(row + i));
  } else {
    for (int64_t i = threadIdx.x; i < H; i += kThreads) out[i] = to_float(row[i]);
  }
}

template <class Element>
int embedding_of(const int32_t* ids, const void* table, float* out, int64_t T, int64_t H, void* stream) {
  return launch(H % 4 == 0 ? embedding_decode<Element, true> : embedding_decode<Element, false>,
                dim3(static_cast<unsigned>(T)), dim3(kThreads), 0, stream, ids, static_cast<const Element*>(table), out, H);
}

}  // namespace

int embedding(const int32_t* ids, const void* table, pm_dtype table_dtype, float* out, int64_t T, int64_t, int64_t H,
              void* stream) {
  switch (table_dtype) {
    case PM_F32:
      return embedding_of<float>(ids, table, out, T, H, stream);
    case PM_BF16:
      return embedding_of<__nv_bfloat16>(ids, table, out, T, H, stream);
    case PM_F16:
      return embedding_of<__half>(ids, table, out, T, H, stream);
    default:
      return fail(PM_UNSUPPORTED, "embedding table of pm_dtype %d; needed: PM_F32, PM_BF16 or PM_F16", table_dtype);
  }
}

}  // namespace pm::cuda
