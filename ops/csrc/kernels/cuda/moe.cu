// Sparse mixture of experts: include/moe.h, on tokens and weights as device.h says.
//
// FEW         up to 32 tokens (decode.cuh): route, w13 with SwiGLU, with int8 rounding of h, w2 with the weighted sum: four
//             launches, three of 16-bit weights. w13 has a block for each strip of each expert hit, w2 a block for each
//             strip, through all experts hit. An expert's weights are read once, those of experts not hit never.
// MANY        (grouped.cuh): route, lists of the experts' tokens, w13 with SwiGLU, with int8 rounding of h, w2 to a row for
//             each token and expert, their sum.
// ORDER       every product as tile.cuh says; scales, SwiGLU and the sum over a token's experts, y = fma(share, w2_scale *
//             (w2 h), y) in increasing expert index from zero, as on the CPU: with int8 weights y has the CPU's bits. With
//             weights of 16 bits h is rounded to the activations' type, in float16 to infinity where it is too large.
// WORKSPACE   at most 2,048 tokens at a time (kSlab), so that it is bounded: of top_k rows a token, with int8 4 I bytes of
//             h, 2 I of it rounded and, where I < H, 4 H - 4 I more; with 16 bits 2 I and 4 H; and 2 H a token.
//             Mixtral-8x7B, int8 (bfloat16): 1 token 0.2 MB (0.06), 32 5.8 MB (1.8), 512 92 MB (46), 2,048 369 MB (185),
//             never more; 8x22B 428 MB (235).
// UNSUPPORTED E > 64, and what linear.cu refuses.
#include "decode.cuh"
#include "formats.cuh"
#include "grouped.cuh"
#include "route.cuh"
#include "tokens.cuh"
#include "vector.cuh"

namespace pm::cuda {
namespace {

constexpr int64_t kSlab = 2048;  // tokens at a time: so many, an expert's weights are read once for 512 of them
constexpr int kHalfTile = 16;    // gate rows, then as many up rows
constexpr int kSumThreads = 256;
static_assert(kDecodeTokens <= 32, "find_hits has a lane for each token");

// Running totals of a device, include/counters.h: calls, experts hit, tokens of the busiest.
__device__ unsigned long long expert_totals[3];

// By one thread of a call of fused_moe: adds what experts have so many tokens each.
__device__ void count_experts(const int32_t* tokens, int experts) {
  int hit = 0, busiest = 0;
  for (int e = 0; e < experts; ++e) {
    hit += tokens[e] > 0;
    busiest = max(busiest, tokens[e]);
  }
  atomicAdd(&expert_totals[0], 1);
  atomicAdd(&expert_totals[1], hit);
  atomicAdd(&expert_totals[2], busiest);
}

// h [rows][stride]: SwiGLU of w13's strips, zeros from I on.
struct HiddenOut {
  const float* scale;  // [E][2 I]; NULL: 1
  void* h;
  pm_dtype dtype;
  int64_t I, stride;

  __device__ float gate(int expert, int64_t i, float sum) const { return scaled(expert * 2 * I + i, sum, i); }
  __device__ float up(int expert, int64_t i, float sum) const { return scaled((expert * 2 + 1) * I + i, sum, i); }
  __device__ float scaled(int64_t at, float sum, int64_t i) const {
    return scale != nullptr && i < I ? __fmul_rn(sum, scale[at]) : sum;
  }
  // Whether i is in the half tile beyond the last strip that rows of whole tiles have.
  __device__ bool is_last(int64_t strip) const { return (strip + 1) * kHalfTile >= I; }

  __device__ void store_one(int row, int64_t strip, int64_t i, float value) const {
    if (i < stride) store_element(h, dtype, row * stride + i, i < I ? value : 0.0f);
    if (is_last(strip) && i + kHalfTile < stride) store_element(h, dtype, row * stride + i + kHalfTile, 0.0f);
  }

  // As RowsOut's: m = 0 are gate rows, m = 1 the up rows of the same columns i and i + 1 of h.
  struct Columns {
    int64_t i;
    bool last;
    float scale[2][2];
  };
  __device__ Columns columns(int expert, int64_t strip, int lane) const {
    Columns of{strip * kHalfTile + lane / 4 * 2, is_last(strip), {}};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t i = of.i + r % 2;
      of.scale[r / 2][r % 2] = scale != nullptr && i < I ? scale[(expert * 2 + r / 2) * I + i] : 1.0f;
    }
    return of;
  }
  __device__ void store(const Columns& of, int row, const float (&value)[2][2]) const {
    float result[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float h_value = swiglu(__fmul_rn(value[0][r], of.scale[0][r]), __fmul_rn(value[1][r], of.scale[1][r]));
      result[r] = of.i + r < I ? h_value : 0.0f;
    }
    const int64_t at = row * stride + of.i, left = stride - of.i;
    store_up_to_two(h, dtype, at, result[0], result[1], left, stride % 2 == 0);
    if (of.last) store_up_to_two(h, dtype, at + kHalfTile, 0.0f, 0.0f, left - kHalfTile, stride % 2 == 0);
  }
};

// h = SwiGLU of w13's strips of each expert hit with its tokens. Of all these strips a block takes each gridDim.x-th.
template <class Format, int Groups>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks)
    gate_up_decode(TokenRows tokens, const unsigned char* w13, Routing routing, HiddenOut out, int T, int tiles,
                   int strips) {
  using Work = Stream<Format, Groups, false>;
  __shared__ Hits hits;
  await_previous();  // it says for which experts
  find_hits(routing, T, hits);
  const int items = of_this_block(hits.number * strips);
  Work work(dynamic_shared(), tiles, items, tokens.stride);
  const auto locate = [&](int i) {
    const int item = static_cast<int>(blockIdx.x + i * gridDim.x), hit = item / strips, strip = item % strips;
    typename Work::Segment segment;
    const int count = hits.count[hit];
    if (out.scale != nullptr && threadIdx.x < 2)
      prefetch(out.scale + (hits.expert[hit] * 2 + threadIdx.x) * out.I + strip * kHalfTile);
    segment.weights = w13 + ((hits.expert[hit] * static_cast<int64_t>(strips) + strip) * tiles + work.first) * kTileBytes;
#pragma unroll
    for (int n = 0; n < Groups; ++n) {
      const int member = n * kGroupTokens + work.lane / 4;
      segment.token[n] = member < count ? work.of_token(tokens, hits.token[hit][member]) : nullptr;
    }
    return segment;
  };
  work.start(locate);
  if (blockIdx.x == 0 && threadIdx.x == 0) count_experts(hits.count, hits.number);
  const int half_row = threadIdx.x % kHalfTile;
  for (int i = 0; i < items; ++i) {
    const int item = static_cast<int>(blockIdx.x + i * gridDim.x), hit = item / strips, strip = item % strips;
    const int expert = hits.expert[hit], count = hits.count[hit], groups = (count + kGroupTokens - 1) / kGroupTokens;
    typename Work::Sums sum;
    work.multiply_segment(sum, groups, {}, locate);
    const int64_t column = strip * kHalfTile + half_row;
    static_assert(kDecodeThreads == kHalfTile * kGroupTokens, "a thread has a column with a token");
    work.share(sum, groups, [&](int group) {
      const int i = threadIdx.x / kHalfTile, member = group * kGroupTokens + i;
      if (member >= count) return;
      const int token = hits.token[hit][member];
      const float scale = Format::kFixed ? tokens.scale[token] : 1.0f;
      const int32_t total = Format::kFixed ? tokens.total[token] : 0;
      const float gate = out.gate(expert, column, work.total(i, half_row, scale, total));
      const float up = out.up(expert, column, work.total(i, half_row + kHalfTile, scale, total));
      out.store_one(routing.row(token, hits.chosen[token], expert), strip, column, swiglu(gate, up));
    });
  }
}

// y = the weighted sum of w2's strip blockIdx.x of all experts hit, with their rows of h.
template <class Format, int Groups>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks)
    down_decode(TokenRows h, const unsigned char* w2, Routing routing, RowsOut out, int T, int tiles) {
  using Work = Stream<Format, Groups, false>;
  __shared__ Hits hits;
  __shared__ float y[Work::kTokens][kTileRows];
  await_previous();  // it says for which experts
  find_hits(routing, T, hits);
  const int64_t strip = blockIdx.x;
  Work work(dynamic_shared(), tiles, hits.number, h.stride);
  const auto locate = [&](int hit) {
    typename Work::Segment segment;
    const int expert = hits.expert[hit], count = hits.count[hit];
    if (out.scale != nullptr && threadIdx.x == 0) prefetch(out.scale + expert * out.N + strip * kTileRows);
    segment.weights = w2 + ((expert * static_cast<int64_t>(gridDim.x) + strip) * tiles + work.first) * kTileBytes;
#pragma unroll
    for (int n = 0; n < Groups; ++n) {
      const int member = n * kGroupTokens + work.lane / 4;
      const int token = member < count ? hits.token[hit][member] : -1;
      segment.token[n] = token >= 0 ? work.of_token(h, routing.row(token, hits.chosen[token], expert)) : nullptr;
    }
    return segment;
  };
  work.start(locate);
  const int64_t n = strip * kTileRows + work.lane;
  for (int token = work.warp; token < T; token += kQuarters) y[token][work.lane] = 0.0f;
  for (int hit = 0; hit < hits.number; ++hit) {
    const int expert = hits.expert[hit], count = hits.count[hit], groups = (count + kGroupTokens - 1) / kGroupTokens;
    typename Work::Sums sum;
    work.multiply_segment(sum, groups, {}, locate);
    work.share(sum, groups, [&](int group) {
      for (int i = work.warp, member = group * kGroupTokens + i; i < kGroupTokens && member < count && n < out.N;
           i += kQuarters, member += kQuarters) {
        const int token = hits.token[hit][member], row = routing.row(token, hits.chosen[token], expert);
        const float result =
            work.total(i, work.lane, Format::kFixed ? h.scale[row] : 1.0f, Format::kFixed ? h.total[row] : 0);
        float& to = y[token][work.lane];
        to = __fmaf_rn(routing.share[token * routing.E + expert], out.scaled(expert, n, result), to);
      }
    });
  }
  __syncthreads();
  if (n < out.N)
    for (int token = work.warp; token < T; token += kQuarters)
      store_element(out.y, out.dtype, token * out.N + n, y[token][work.lane]);
}

// y [T][H] from parts [T * top_k][H]. A block a token.
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const float* parts, Routing routing, const int32_t* count, float* y, int64_t H) {
  const int64_t token = blockIdx.x;
  if (token == 0 && threadIdx.x == 0) count_experts(count, routing.E);
  for (int64_t n = threadIdx.x; n < H; n += kSumThreads) {
    float sum = 0.0f;
    const float* part = parts + token * routing.top_k * H + n;
    for (uint64_t left = routing.chosen[token]; left != 0; left &= left - 1, part += H) {
      const int expert = __popcll((left & (0 - left)) - 1);
      sum = __fmaf_rn(routing.share[token * routing.E + expert], *part, sum);
    }
    y[token * H + n] = sum;
  }
}

// Of T tokens those that are multiplied at a time: as many in each slab, but for the last.
int64_t slab_of(int64_t T) { return T > kSlab ? equal_parts(T, equal_parts(T, kSlab)) : T; }

struct Sizes {
  int64_t T, H, I, E, top_k;
  int64_t rows() const { return T * top_k; }
  bool few() const { return T <= kDecodeTokens; }
};

// What a call needs beside its arguments: fused_moe_workspace and fused_moe agree on it.
template <class Format>
struct Rooms {
  Workspace all;
  Routing routing;
  TokenRows x{}, h_tokens{};  // x.data NULL: as it is
  void* h;                    // [rows][I] float32, or what h_tokens are
  float* parts = nullptr;     // [rows][H]
  int32_t *count = nullptr, *list = nullptr;

  Rooms(void* base, const Sizes& of) : all{static_cast<unsigned char*>(base)} {
    routing.E = static_cast<int>(of.E);
    routing.top_k = static_cast<int>(of.top_k);
    routing.share = all.take<float>(of.T * of.E);
    routing.chosen = all.take<uint64_t>(of.T);
    if (!taken_as_they_are<Format>(of.H)) x = take_tokens<Format>(all, of.T, of.H);
    h_tokens = take_tokens<Format>(all, of.rows(), of.I);
    // Of fixed point h is of no more use when w2's results come.
    const bool shared = Format::kFixed;
    h = shared ? all.take<float>(of.rows() * (of.few() || of.I > of.H ? of.I : of.H)) : static_cast<void*>(h_tokens.data);
    if (of.few()) return;
    parts = shared ? static_cast<float*>(h) : all.take<float>(of.rows() * of.H);
    count = all.take<int32_t>(of.E);
    list = all.take<int32_t>(of.E * of.T);
  }
};

template <class Format>
struct Experts {
  const Sizes& of;
  const Rooms<Format>& rooms;
  const void *w13, *w2;
  TokenRows x;
  HiddenOut hidden;
  const float* w2_scale;
  float* y;
  void* stream;
  int h_tiles = tiles_of(of.H), i_tiles = tiles_of(of.I);
  int64_t gate_up_strips = equal_parts(of.I, kHalfTile), down_strips = equal_parts(of.H, kTileRows);

  static int tiles_of(int64_t K) { return static_cast<int>(equal_parts(K, Format::kColumns)); }

  int round_hidden() const {
    if (!Format::kFixed) return PM_OK;
    return launch(Overlap::previous, prepare_kernel<Format>, dim3(of.rows()), dim3(kPrepareThreads), 0, stream,
                  Activations{rooms.h, PM_F32, of.I}, i_tiles, rooms.h_tokens);
  }

  template <int Groups>
  int few() const {
    constexpr size_t kShared = Stream<Format, Groups, false>::kSharedBytes;
    static_assert(kShared + sizeof(Hits) + sizeof(float[Groups * kGroupTokens][kTileRows]) <= 163 * 1024,
                  "more than sm_80 has");
    const int64_t hits = of.E < of.rows() ? of.E : of.rows();
    unsigned blocks;
    if (int status = decode_blocks(kShared, gate_up_strips * hits, &blocks)) return status;
    if (int status =
            launch(Overlap::previous, gate_up_decode<Format, Groups>, dim3(blocks), dim3(kDecodeThreads), kShared, stream, x,
                   static_cast<const unsigned char*>(w13), rooms.routing, hidden, of.T, h_tiles, gate_up_strips))
      return status;
    if (int status = round_hidden()) return status;
    return launch(Overlap::previous, down_decode<Format, Groups>, dim3(down_strips), dim3(kDecodeThreads), kShared, stream,
                  rooms.h_tokens, static_cast<const unsigned char*>(w2), rooms.routing, RowsOut{w2_scale, y, PM_F32, of.H},
                  of.T, i_tiles);
  }

  template <int Tokens>
  int many() const {
    ExpertLists lists{rooms.count, rooms.list, of.T, rooms.routing.E, rooms.routing.top_k, rooms.routing.top_k};
    if (int status =
            launch(list_kernel, dim3(of.E), dim3(kListThreads), 0, stream, rooms.routing, of.T, rooms.count, rooms.list))
      return status;
    if (int status = launch_grouped<Format, Tokens>(x, w13, gate_up_strips, h_tiles, lists, hidden, stream)) return status;
    if (int status = round_hidden()) return status;
    lists.token_rows = 1;
    const RowsOut parts{w2_scale, rooms.parts, PM_F32, of.H};
    if (int status = launch_grouped<Format, Tokens>(rooms.h_tokens, w2, down_strips, i_tiles, lists, parts, stream))
      return status;
    return launch(sum_kernel, dim3(of.T), dim3(kSumThreads), 0, stream, rooms.parts, rooms.routing, rooms.count, y, of.H);
  }
};

// The layer for of.T tokens.
template <class Format>
int multiply_slab(const Sizes& of, const Activations& x, const float* gate, const void* w13, const void* w2,
                  const float* w13_scale, const float* w2_scale, float* y, void* workspace, void* stream) {
  const Rooms<Format> rooms(workspace, of);
  const TokenRows as_it_is{static_cast<unsigned char*>(const_cast<void*>(x.data)), of.H * 2, nullptr, nullptr};
  const int64_t stride = Format::kFixed ? of.I : rooms.h_tokens.stride / 2;
  const HiddenOut hidden{Format::kFixed ? w13_scale : nullptr, rooms.h, Format::kFixed ? PM_F32 : x.dtype, of.I, stride};
  const Experts<Format> experts{
      of, rooms, w13, w2, rooms.x.data != nullptr ? rooms.x : as_it_is, hidden, Format::kFixed ? w2_scale : nullptr,
      y,  stream};
  if (int status = launch(Overlap::previous, route_kernel<Format>, dim3(of.T, rooms.x.data != nullptr ? 2 : 1),
                          dim3(kRouteThreads), 0, stream, x, gate, rooms.routing, experts.h_tiles, rooms.x))
    return status;
  if (of.T <= kGroupTokens) return experts.template few<1>();
  if (of.few()) return experts.template few<kDecodeTokens / kGroupTokens>();
  return of.rows() <= kFewRuns * of.E ? experts.template many<64>() : experts.template many<128>();
}

}  // namespace

int64_t fused_moe_workspace(pm_dtype w_dtype, int64_t T, int64_t H, int64_t I, int64_t E, int64_t top_k) {
  const Sizes of{slab_of(T), H, I, E, top_k};
  return w_dtype == PM_I8 ? Rooms<FixedPoint<2>>(nullptr, of).all.used : Rooms<Floating<__half>>(nullptr, of).all.used;
}

int fused_moe(const void* x, pm_dtype x_dtype, const float* gate, const void* w13, const void* w2, pm_dtype w_dtype,
              const float* w13_scale, const float* w2_scale, int activation_bits, float* y, int64_t T, int64_t H, int64_t I,
              int64_t E, int64_t top_k, void* workspace, void* stream) {
  if (E > kMostExperts)
    return fail(PM_UNSUPPORTED, "fused_moe: %lld experts, a GPU takes at most %d", static_cast<long long>(E), kMostExperts);
  return with_format("fused_moe", x_dtype, w_dtype, activation_bits, H > I ? H : I, [&](auto format) {
    using Format = decltype(format);
    for (int64_t begin = 0, slab = slab_of(T); begin < T; begin += slab) {
      const Sizes of{T - begin < slab ? T - begin : slab, H, I, E, top_k};
      const Activations tokens{static_cast<const uint16_t*>(x) + begin * H, x_dtype, H};
      if (int status =
              multiply_slab<Format>(of, tokens, gate, w13, w2, w13_scale, w2_scale, y + begin * H, workspace, stream))
        return status;
    }
    return static_cast<int>(PM_OK);
  });
}

int expert_counts(int64_t* calls, int64_t* experts_hit, int64_t* busiest_tokens) {
  unsigned long long totals[3] = {};
  if (const int status = check(cudaDeviceSynchronize(), "waiting for the GPU")) return status;
  if (const int status = check(cudaMemcpyFromSymbol(totals, expert_totals, sizeof totals), "the counts of experts"))
    return status;
  *calls = static_cast<int64_t>(totals[0]);
  *experts_hit = static_cast<int64_t>(totals[1]);
  *busiest_tokens = static_cast<int64_t>(totals[2]);
  return PM_OK;
}

}  // namespace pm::cuda
