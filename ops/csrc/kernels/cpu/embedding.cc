// Rows of the embedding table: include/embedding.h.
#include "../include/embedding.h"

#include "dispatch.h"

namespace pm {
namespace PM_ISA {
namespace {

template <class Element>
void embedding_rows(const int32_t* ids, const Element* table, float* out, int64_t T, int64_t H) {
  const int64_t full = H & ~int64_t{15};
#pragma omp parallel for num_threads(pm_num_threads()) schedule(static) if (T > 1)
  for (int64_t t = 0; t < T; ++t) {
    const Element* row = table + ids[t] * H;
    float* to = out + t * H;
    for (int64_t i = 0; i < full; i += 16) store(to + i, load(row + i));
    for (int64_t i = full; i < H; ++i) to[i] = to_float(row[i]);
  }
}

}  // namespace

int embedding(const int32_t* ids, const void* table, pm_dtype table_dtype, float* out, int64_t T, int64_t, int64_t H,
              void*) {
  if (table_dtype == PM_BF16)
    embedding_rows(ids, static_cast<const bf16*>(table), out, T, H);
  else
    embedding_rows(ids, static_cast<const float*>(table), out, T, H);
  return PM_OK;
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(embedding,
          (const int32_t* ids, const void* table, pm_dtype table_dtype, float* out, int64_t T, int64_t V, int64_t H,
           void* stream),
          (ids, table, table_dtype, out, T, V, H, stream))
