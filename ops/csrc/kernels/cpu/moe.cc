// Sparse mixture of experts: include/moe.h.
#include "../include/moe.h"

#include <omp.h>

#include "matmul_bf16.h"
#include "matmul_bf16_tiles.h"
#include "matmul_float.h"
#include "matmul_int8.h"

namespace pm {
namespace PM_ISA {
namespace {

// p[E]: the logits of one token in, their softmax out.
void softmax(float* p, int64_t E) {
  F32x16 largest = set1(-INFINITY);
  for (int64_t e = 0; e < E; e += 16)
    largest = max(largest, E - e >= 16 ? load(p + e) : load_partial(p + e, static_cast<int>(E - e), -INFINITY));
  const F32x16 top = set1(reduce_max(largest));
  F32x16 sum = zero();
  for (int64_t e = 0; e < E; e += 16) {
    const int n = static_cast<int>(E - e < 16 ? E - e : 16);
    store_partial(p + e, exp(sub(load_partial(p + e, n), top)), n);
    sum = add(sum, load_partial(p + e, n));
  }
  const float total = reduce_add(sum);
  for (int64_t e = 0; e < E; ++e) p[e] = p[e] / total;
}

// Turns the probabilities p[E] of one token into its share of each expert: 0 where it was not chosen.
// A share may be 0 for a chosen expert too, so chosen[E] says which are.
void choose(float* p, uint8_t* chosen, int64_t E, int64_t top_k) {
  memset(chosen, 0, static_cast<size_t>(E));
  float sum = 0.0f;
  for (int64_t k = 0; k < top_k; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < E; ++e)
      if (!chosen[e] && (best < 0 || p[e] > p[best])) best = e;
    chosen[best] = 1;
    sum += p[best];
  }
  for (int64_t e = 0; e < E; ++e) p[e] = chosen[e] ? p[e] / sum : 0.0f;
}

// share [T, E], chosen [T, E].
template <class X>
int route(const X* x, const float* gate, float* share, uint8_t* chosen, int64_t T, int64_t H, int64_t E, int64_t top_k) {
  const int64_t padded = FloatTokens::elements(1, H);
  const Scratch<float> rows(pm_num_threads() * padded);
  if (!rows.data) return PM_OUT_OF_MEMORY;
#pragma omp parallel for num_threads(pm_num_threads()) schedule(static) if (T * H * E > kWorthThreads && T > 1)
  for (int64_t t = 0; t < T; ++t) {
    const FloatTokens token(rows.data + omp_get_thread_num() * padded, 1, H);
    token.pack(0, x + t * H);
    for (int64_t e = 0; e < E; e += kGroup)
      dots<kGroup, 1>(gate + e * H, static_cast<int>(E - e < kGroup ? E - e : kGroup), H, token.data, share + t * E + e);
    softmax(share + t * E, E);
    choose(share + t * E, chosen + t * E, E, top_k);
  }
  return PM_OK;
}

// silu(gate) * up
inline F32x16 swiglu(F32x16 gate, F32x16 up) { return mul(div(gate, add(set1(1.0f), exp(sub(zero(), gate)))), up); }

// Experts of rows of float32, and their products with a block of tokens. Hidden: what h is kept in.
struct FloatExperts {
  using Hidden = float;
  const float *w13, *w2;
  int64_t H, I;
  FloatScratch scratch(int64_t count, int64_t K) const { return {count, K}; }
  FloatProduct gate_up(int64_t e, const FloatTokens& x) const {
    const float* gate = w13 + e * 2 * I * H;
    return {x, gate, gate + I * H, I};
  }
  FloatProduct down(int64_t e, const FloatTokens& h) const { return {h, w2 + e * H * I, H}; }
};

// Packed experts: the two halves of a tile of w13 hold gate and up rows.
template <class Product>
struct PackedExperts {
  using Tokens = typename Product::Tokens;
  const uint8_t *w13, *w2;
  int64_t H, I;
  PackedExperts(const void* w13_, const void* w2_, int64_t H_, int64_t I_)
      : w13(static_cast<const uint8_t*>(w13_)), w2(static_cast<const uint8_t*>(w2_)), H(H_), I(I_) {}
  Product gate_up(int64_t e, const Tokens& x) const {
    return {x, w13 + e * equal_parts(I, kHalfTile) * Tokens::tiles_of(H) * kTileBytes};
  }
  Product down(int64_t e, const Tokens& h) const {
    return {h, w2 + e * equal_parts(H, kTile) * Tokens::tiles_of(I) * kTileBytes};
  }
};
template <class Product, class Scratch>
struct Bf16Experts : PackedExperts<Product> {
  using Hidden = bf16;
  using PackedExperts<Product>::PackedExperts;
  Scratch scratch(int64_t count, int64_t K) const { return {count, K}; }
};
struct FixedExperts : PackedExperts<FixedProduct> {
  using Hidden = float;
  int activation_bits;
  FixedExperts(const void* w13, const void* w2, int64_t H, int64_t I, int bits)
      : PackedExperts(w13, w2, H, I), activation_bits(bits) {}
  FixedScratch scratch(int64_t count, int64_t K) const { return {count, K, activation_bits}; }
};

template <class X, class Experts>
int run_experts(const X* x, const float* gate, const Experts& experts, const float* w13_scale, const float* w2_scale,
                float* y, int64_t T, int64_t H, int64_t I, int64_t E, int64_t top_k) {
  const int64_t limit = block_tokens(H > I ? H : I), largest = T < limit ? T : limit;
  const Scratch<float> shares(T * E), share_of(largest);
  const Scratch<typename Experts::Hidden> hidden(largest * I);
  const Scratch<uint8_t> chosen(T * E);
  const Scratch<int64_t> token_of(largest);
  const auto x_block = experts.scratch(largest, H), h_block = experts.scratch(largest, I);
  if (!shares.data || !share_of.data || !hidden.data || !chosen.data || !token_of.data || x_block.failed() ||
      h_block.failed())
    return PM_OUT_OF_MEMORY;
  const int status = route(x, gate, shares.data, chosen.data, T, H, E, top_k);
  if (status != PM_OK) return status;
  memset(y, 0, static_cast<size_t>(T * H) * sizeof(float));
  int64_t hit = 0, busiest = 0;
  // Experts in increasing index, so that every token sums its experts in that order.
  for (int64_t e = 0; e < E; ++e) {
    int64_t total = 0, next = 0;
    for (int64_t t = 0; t < T; ++t) total += chosen.data[t * E + e];
    hit += total > 0;
    busiest = total > busiest ? total : busiest;
    const int64_t blocks = equal_parts(total, limit);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t count = (block + 1) * total / blocks - block * total / blocks;
      for (int64_t i = 0; i < count; ++next)
        if (chosen.data[next * E + e]) {
          share_of.data[i] = shares.data[next * E + e];
          token_of.data[i++] = next;
        }
      const auto tokens = x_block.block(count, H);
      pack_tokens(tokens, [&](int64_t t) { return x + token_of.data[t] * H; });
      matmul(experts.gate_up(e, tokens), equal_parts(I, kHalfTile), [&](int64_t i, int64_t t, const float* sums) {
        F32x16 gates = load(sums), ups = load(sums + kHalfTile);
        if (w13_scale) {
          gates = mul(gates, load_upto(w13_scale + e * 2 * I + i * 16, I - i * 16));
          ups = mul(ups, load_upto(w13_scale + (e * 2 + 1) * I + i * 16, I - i * 16));
        }
        store_upto(hidden.data + t * I + i * 16, swiglu(gates, ups), I - i * 16);
      });
      const auto middle = h_block.block(count, I);
      pack_tokens(middle, [&](int64_t t) { return hidden.data + t * I; });
      matmul(experts.down(e, middle), equal_parts(H, kTile), [&](int64_t i, int64_t t, const float* sums) {
        for (int64_t n = i * kTile; n < H && n < (i + 1) * kTile; n += 16) {
          F32x16 sum = load(sums + n - i * kTile);
          if (w2_scale) sum = mul(sum, load_upto(w2_scale + e * H + n, H - n));
          float* to = y + token_of.data[t] * H + n;
          store_upto(to, fma(set1(share_of.data[t]), sum, load_upto(to, H - n)), H - n);
        }
      });
    }
  }
  count_experts(hit, busiest);
  return PM_OK;
}

template <class X>
int fused_moe_typed(const X* x, const float* gate, const void* w13, const void* w2, pm_dtype w_dtype, const float* w13_scale,
                    const float* w2_scale, int activation_bits, float* y, int64_t T, int64_t H, int64_t I, int64_t E,
                    int64_t top_k) {
  const auto run = [&](const auto& experts) {
    return run_experts(x, gate, experts, w13_scale, w2_scale, y, T, H, I, E, top_k);
  };
  switch (w_dtype) {
    case PM_I8:
      return run(FixedExperts(w13, w2, H, I, activation_bits));
    case PM_BF16:
#if defined(__AVX512F__)
      if (has_bf16_tiles()) return run(Bf16Experts<TileProduct, TileScratch>(w13, w2, H, I));
#endif
      return run(Bf16Experts<PairProduct, PairScratch>(w13, w2, H, I));
    default:
      return run(FloatExperts{static_cast<const float*>(w13), static_cast<const float*>(w2), H, I});
  }
}

}  // namespace

int fused_moe(const void* x, pm_dtype x_dtype, const float* gate, const void* w13, const void* w2, pm_dtype w_dtype,
              const float* w13_scale, const float* w2_scale, int activation_bits, float* y, int64_t T, int64_t H, int64_t I,
              int64_t E, int64_t top_k, void*) {
  return x_dtype == PM_BF16 ? fused_moe_typed(static_cast<const bf16*>(x), gate, w13, w2, w_dtype, w13_scale, w2_scale,
                                              activation_bits, y, T, H, I, E, top_k)
                            : fused_moe_typed(static_cast<const float*>(x), gate, w13, w2, w_dtype, w13_scale, w2_scale,
                                              activation_bits, y, T, H, I, E, top_k);
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(fused_moe,
          (const void* x, pm_dtype x_dtype, const float* gate, const void* w13, const void* w2, pm_dtype w_dtype,
           const float* w13_scale, const float* w2_scale, int activation_bits, float* y, int64_t T, int64_t H, int64_t I,
           int64_t E, int64_t top_k, void* stream),
          (x, x_dtype, gate, w13, w2, w_dtype, w13_scale, w2_scale, activation_bits, y, T, H, I, E, top_k, stream))
