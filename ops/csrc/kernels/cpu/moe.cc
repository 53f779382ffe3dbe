// Sparse mixture of experts: include/moe.h.
#include "../include/moe.h"

#include <omp.h>

#include "matmul.h"

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
  const int64_t padded = vectors_of(H) * 16;
  const Scratch rows(pm_num_threads() * padded);
  if (!rows.data) return PM_OUT_OF_MEMORY;
#pragma omp parallel for num_threads(pm_num_threads()) schedule(static) if (T * H * E > kWorthThreads && T > 1)
  for (int64_t t = 0; t < T; ++t) {
    const Tokens token = {rows.data + omp_get_thread_num() * padded, 1, vectors_of(H)};
    pack_token(token, 0, x + t * H, H);
    for (int64_t e = 0; e < E; e += kGroup)
      dots<kGroup, 1>(gate + e * H, static_cast<int>(E - e < kGroup ? E - e : kGroup), H, token.data, share + t * E + e);
    softmax(share + t * E, E);
    choose(share + t * E, chosen + t * E, E, top_k);
  }
  return PM_OK;
}

// silu(gate) * up
inline F32x16 swiglu(F32x16 gate, F32x16 up) { return mul(div(gate, add(set1(1.0f), exp(sub(zero(), gate)))), up); }

template <class W>
struct Expert {
  const W *w13, *w2;
  const float *w13_scale, *w2_scale;
};

// Adds the expert's share of a block of tokens to y: h = swiglu(w1 x, w3 x), y[token_of[t]] += share_of[t] * (w2 h).
template <class W>
void run_expert(const Expert<W>& expert, const Tokens& x, const Tokens& h, const int64_t* token_of, const float* share_of,
                float* y, int64_t H, int64_t I) {
  matmul(
      x, H, h.vectors,
      [&](int64_t i) {
        const int count = static_cast<int>(I - i * 16 < 16 ? I - i * 16 : 16);
        const W* gate = expert.w13 + i * 16 * H;
        return Tile<W>{{gate, gate + I * H}, {count, count}};
      },
      [&](int64_t i, int64_t t, const float* sums) {
        F32x16 gate = load(sums), up = load(sums + kHalfTile);
        if (expert.w13_scale) {
          gate = mul(gate, load_upto(expert.w13_scale + i * 16, I - i * 16));
          up = mul(up, load_upto(expert.w13_scale + I + i * 16, I - i * 16));
        }
        store(h.slot(t, i), swiglu(gate, up));
      });
  matmul(
      h, I, equal_parts(H, kTile), [&](int64_t i) { return consecutive_tile(expert.w2, H, I, i); },
      [&](int64_t i, int64_t t, const float* sums) {
        for (int64_t n = i * kTile; n < H && n < (i + 1) * kTile; n += 16) {
          F32x16 sum = load(sums + n - i * kTile);
          if (expert.w2_scale) sum = mul(sum, load_upto(expert.w2_scale + n, H - n));
          float* to = y + token_of[t] * H + n;
          store_upto(to, fma(set1(share_of[t]), sum, load_upto(to, H - n)), H - n);
        }
      });
}

template <class X, class W>
int fused_moe_typed(const X* x, const float* gate, const W* w13, const W* w2, const float* w13_scale, const float* w2_scale,
                    float* y, int64_t T, int64_t H, int64_t I, int64_t E, int64_t top_k) {
  const int64_t limit = block_tokens(H > I ? H : I), largest = T < limit ? T : limit;
  const Scratch shares(T * E), choices(T * E / 4 + 1), tokens(largest * vectors_of(H) * 16);
  const Scratch hidden(largest * vectors_of(I) * 16), share_of(largest), indices(largest * 2);
  if (!shares.data || !choices.data || !tokens.data || !hidden.data || !share_of.data || !indices.data)
    return PM_OUT_OF_MEMORY;
  uint8_t* chosen = reinterpret_cast<uint8_t*>(choices.data);
  int64_t* token_of = reinterpret_cast<int64_t*>(indices.data);
  const int status = route(x, gate, shares.data, chosen, T, H, E, top_k);
  if (status != PM_OK) return status;
  memset(y, 0, static_cast<size_t>(T * H) * sizeof(float));
  int64_t hit = 0, busiest = 0;
  // Experts in increasing index, so that every token sums its experts in that order.
  for (int64_t e = 0; e < E; ++e) {
    const Expert<W> expert = {w13 + e * 2 * I * H, w2 + e * H * I, w13_scale ? w13_scale + e * 2 * I : nullptr,
                              w2_scale ? w2_scale + e * H : nullptr};
    int64_t total = 0, next = 0;
    for (int64_t t = 0; t < T; ++t) total += chosen[t * E + e];
    hit += total > 0;
    busiest = total > busiest ? total : busiest;
    const int64_t blocks = equal_parts(total, limit);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t count = (block + 1) * total / blocks - block * total / blocks;
      for (int64_t i = 0; i < count; ++next)
        if (chosen[next * E + e]) {
          share_of.data[i] = shares.data[next * E + e];
          token_of[i++] = next;
        }
      const Tokens block_x = {tokens.data, count, vectors_of(H)}, block_h = {hidden.data, count, vectors_of(I)};
#pragma omp parallel for num_threads(pm_num_threads()) schedule(static) if (count * H > kWorthThreads)
      for (int64_t t = 0; t < count; ++t) pack_token(block_x, t, x + token_of[t] * H, H);
      run_expert(expert, block_x, block_h, token_of, share_of.data, y, H, I);
    }
  }
  count_experts(hit, busiest);
  return PM_OK;
}

template <class X>
int fused_moe_weight(const X* x, const float* gate, const void* w13, const void* w2, pm_dtype w_dtype,
                     const float* w13_scale, const float* w2_scale, float* y, int64_t T, int64_t H, int64_t I, int64_t E,
                     int64_t top_k) {
  switch (w_dtype) {
    case PM_I8:
      return fused_moe_typed(x, gate, static_cast<const int8_t*>(w13), static_cast<const int8_t*>(w2), w13_scale, w2_scale,
                             y, T, H, I, E, top_k);
    case PM_BF16:
      return fused_moe_typed(x, gate, static_cast<const bf16*>(w13), static_cast<const bf16*>(w2), nullptr, nullptr, y, T, H,
                             I, E, top_k);
    default:
      return fused_moe_typed(x, gate, static_cast<const float*>(w13), static_cast<const float*>(w2), nullptr, nullptr, y, T,
                             H, I, E, top_k);
  }
}

}  // namespace

int fused_moe(const void* x, pm_dtype x_dtype, const float* gate, const void* w13, const void* w2, pm_dtype w_dtype,
              const float* w13_scale, const float* w2_scale, float* y, int64_t T, int64_t H, int64_t I, int64_t E,
              int64_t top_k, void*) {
  return x_dtype == PM_BF16 ? fused_moe_weight(static_cast<const bf16*>(x), gate, w13, w2, w_dtype, w13_scale, w2_scale, y,
                                               T, H, I, E, top_k)
                            : fused_moe_weight(static_cast<const float*>(x), gate, w13, w2, w_dtype, w13_scale, w2_scale, y,
                                               T, H, I, E, top_k);
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(fused_moe,
          (const void* x, pm_dtype x_dtype, const float* gate, const void* w13, const void* w2, pm_dtype w_dtype,
           const float* w13_scale, const float* w2_scale, float* y, int64_t T, int64_t H, int64_t I, int64_t E,
           int64_t top_k, void* stream),
          (x, x_dtype, gate, w13, w2, w_dtype, w13_scale, w2_scale, y, T, H, I, E, top_k, stream))
