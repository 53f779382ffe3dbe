// Linear layers: include/linear.h.
#include "../include/linear.h"

#include "matmul_bf16.h"
#include "matmul_bf16_tiles.h"
#include "matmul_float.h"
#include "matmul_int8.h"

namespace pm {
namespace PM_ISA {
namespace {

// y [T, N] = product of x [T, K] with each block's tokens. product_of(tokens): the weight with a block of them.
template <class X, class Y, class Blocks, class ProductOf>
int linear_blocks(const X* x, const float* scale, Y* y, int64_t T, int64_t N, int64_t K, const Blocks& scratch,
                  int64_t blocks, ProductOf product_of) {
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t origin = block * T / blocks, count = (block + 1) * T / blocks - origin;
    const auto tokens = scratch.block(count, K);
    pack_tokens(tokens, [&](int64_t t) { return x + (origin + t) * K; });
    matmul(product_of(tokens), equal_parts(N, kTile), [&](int64_t i, int64_t t, const float* sums) {
      for (int64_t n = i * kTile; n < N && n < (i + 1) * kTile; n += 16) {
        F32x16 sum = load(sums + n - i * kTile);
        if (scale) sum = mul(sum, load_upto(scale + n, N - n));
        store_upto(y + (origin + t) * N + n, sum, N - n);
      }
    });
  }
  return PM_OK;
}

template <class X, class Y>
int linear_typed(const X* x, const void* w, pm_dtype w_dtype, const float* scale, int activation_bits, Y* y, int64_t T,
                 int64_t N, int64_t K) {
  const int64_t blocks = equal_parts(T, block_tokens(K)), largest = equal_parts(T, blocks);
  const auto run = [&](const auto& scratch, auto product_of) -> int {
    if (scratch.failed()) return PM_OUT_OF_MEMORY;
    return linear_blocks(x, scale, y, T, N, K, scratch, blocks, product_of);
  };
  const uint8_t* packed = static_cast<const uint8_t*>(w);
  switch (w_dtype) {
    case PM_I8:
      return run(FixedScratch(largest, K, activation_bits),
                 [&](const FixedTokens& tokens) { return FixedProduct{tokens, packed}; });
    case PM_BF16:
#if defined(__AVX512F__)
      if (has_bf16_tiles())
        return run(TileScratch(largest, K), [&](const TileTokens& tokens) { return TileProduct{tokens, packed}; });
#endif
      return run(PairScratch(largest, K), [&](const PairTokens& tokens) { return PairProduct{tokens, packed}; });
    default:
      return run(FloatScratch(largest, K),
                 [&](const FloatTokens& tokens) { return FloatProduct(tokens, static_cast<const float*>(w), N); });
  }
}

template <class X>
int linear_out(const X* x, const void* w, pm_dtype w_dtype, const float* scale, int activation_bits, void* y,
               pm_dtype y_dtype, int64_t T, int64_t N, int64_t K) {
  return y_dtype == PM_BF16 ? linear_typed(x, w, w_dtype, scale, activation_bits, static_cast<bf16*>(y), T, N, K)
                            : linear_typed(x, w, w_dtype, scale, activation_bits, static_cast<float*>(y), T, N, K);
}

}  // namespace

int linear(const void* x, pm_dtype x_dtype, const void* w, pm_dtype w_dtype, const float* scale, int activation_bits,
           void* y, pm_dtype y_dtype, int64_t T, int64_t N, int64_t K, void*) {
  return x_dtype == PM_BF16
             ? linear_out(static_cast<const bf16*>(x), w, w_dtype, scale, activation_bits, y, y_dtype, T, N, K)
             : linear_out(static_cast<const float*>(x), w, w_dtype, scale, activation_bits, y, y_dtype, T, N, K);
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(linear,
          (const void* x, pm_dtype x_dtype, const void* w, pm_dtype w_dtype, const float* scale, int activation_bits,
           void* y, pm_dtype y_dtype, int64_t T, int64_t N, int64_t K, void* stream),
          (x, x_dtype, w, w_dtype, scale, activation_bits, y, y_dtype, T, N, K, stream))
