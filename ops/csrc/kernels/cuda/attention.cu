// Append attention on pages: include/attention.h; attention_tile.cuh says in which order sums are made.
//
// Two launches, sized by what the host knows (T, B, M * block_size); blocks without work leave at once.
//   append_decode   rotates queries into the workspace and keys into their pages, copies values, and plans: which sequences
//                   are split over their keys, and how much work precedes each sequence
//   attend_decode   some blocks take 64 rows, (token, query head of one key/value head) pairs, of a sequence and walk all
//                   keys that these see (here); the others go through the chunks of the split ones (attention_chunks.cuh)
//
// QUERIES ARE ROUNDED to the activations' type (the CPU's are not), because they are operands of mma.
#include <algorithm>

#include "attention_append.cuh"
#include "attention_chunks.cuh"

namespace pm::cuda {
namespace attention {
namespace {

constexpr int kBlocksAtOnce = 2;  // on a multiprocessor

// Of attend_decode: 96 KB for heads of 128.
//   chunks     each warp: three halves of a tile of keys or values
//   64 rows    two tiles of keys and values; the rows' sums [64, Width] float32
template <int Width>
constexpr size_t shared_bytes() {
  static_assert(kWarps * 3 * kHalf * 2 == 2 * 2 * kTile * 2 + kTileRows * 4, "both take as much");
  return size_t{kWarps * 3 * kHalf * 2} * Width;
}

// Longer sequences: 64 rows, 16 a warp, against all keys that they see, a tile fetched ahead of the one in use.
template <class Element, int Width>
__device__ __forceinline__ void attend_rows(const Problem<Element>& p, int ordinal, int kv) {
  constexpr int kPiece = kTile * Width;  // elements
  Element* const shared = reinterpret_cast<Element*>(dynamic_shared());
  float* const values = reinterpret_cast<float*>(shared + 4 * kPiece) + threadIdx.x;  // [Width / 8 * 4, kThreads], but mine
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int group = p.group(), b = owner(p.tiles_to, p.B, ordinal), context = p.context_lens[b];
  const int begin = (ordinal - p.tiles_to[b]) * kTileRows, end = min(p.length(b) * group, begin + kTileRows);
  const auto position_of = [&](int row) { return context + row / group; };
  const int first = first_seen(position_of(begin), p.window), last = position_of(end - 1);
  const Pages pages = p.pages(b, kv, first, last + 1);

  const int mine = begin + warp * kRows, mine_end = min(end, mine + kRows);  // the warp's rows: none where mine >= end
  const int warp_first = position_of(mine), warp_last = position_of(mine_end - 1);
  const auto query = [&](int row) -> int64_t {
    return (int64_t{p.cu_seqlens[b] + row / group} * p.Hq + kv * group + row % group) * p.D;
  };
  Rows<Element, Width> rows;
  const int low = mine + g, high = mine + g + 8;
  rows.load(low < end ? p.queries + query(low) : nullptr, high < end ? p.queries + query(high) : nullptr, p.D);
  for (int i = 0; i < 2; ++i) {
    const int row = mine + g + 8 * i;
    rows.position[i] = row < end ? position_of(row) : -1;
  }
  rows.window = p.window;

  const int first_tile = first / kTile, last_tile = last / kTile;
  const auto fetch_tile = [&](int tile) {
    Element* const keys = shared + tile % 2 * 2 * kPiece;
    const uint32_t offset = pages.offset(tile * kTile + warp * kRows + lane % kRows);
    fetch<Width, kRows>(pages, p.key_cache, offset, keys, warp * kRows);
    fetch<Width, kRows>(pages, p.value_cache, offset, keys + kPiece, warp * kRows);
    cp_async_commit();
  };
  fetch_tile(first_tile);

  __shared__ Softmax finished[kWarps][kRows];
  if (lane < kRows) finished[warp][lane] = Softmax{};
  Softmax chunk[2];
  float chunk_values[Width / 8][4] = {};
#pragma unroll
  for (int i = 0; i < Width / 2; ++i) values[i * kThreads] = 0.0f;
  for (int tile = first_tile; tile <= last_tile; ++tile) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile < last_tile) fetch_tile(tile + 1);
    const int start = tile * kTile;
    if (mine < end && start <= warp_last && start + kTile > first_seen(warp_first, p.window)) {
      const Element* const keys = shared + tile % 2 * 2 * kPiece;
      float s[kTile / 8][4];
      score<Element, Width>(rows, {keys, keys + kHalf * Width}, s);
      const bool all_seen = start + kTile - 1 <= warp_first && start >= first_seen(warp_last, p.window);
      uint32_t weights[kTile / 16][4];
      Softmax parts[2];
      soften(rows, s, p.scale, start, all_seen, weights, parts);
      const Merge by[2] = {merge(chunk[0], parts[0]), merge(chunk[1], parts[1])};
      const Element* const halves[2] = {keys + kPiece, keys + kPiece + kHalf * Width};
      const auto take = [&](int n, const float (&o)[4], int i) {
        for (int j = 2 * i; j < 2 * i + 2; ++j) chunk_values[n][j] = by[i](chunk_values[n][j], o[j]);
      };
      if (all_seen || are_numbers<kPiece>(halves[0])) {
        add_values<Element, Width>(weights, halves, [&](int n, const float (&o)[4]) {
          take(n, o, 0);
          take(n, o, 1);
        });
      } else {
        add_seen_values(rows, start, weights, halves, take);
      }
    }
    if (tile % kChunkTiles == kChunkTiles - 1 || tile == last_tile) {
      Softmax all[2] = {finished[warp][g], finished[warp][g + 8]};
      const Merge by[2] = {merge(all[0], chunk[0]), merge(all[1], chunk[1])};
      __syncwarp();
      if (t == 0)
        for (int i = 0; i < 2; ++i) finished[warp][g + 8 * i] = all[i];
      __syncwarp();
#pragma unroll
      for (int n = 0; n < Width / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& value = values[(4 * n + i) * kThreads];
          value = by[i / 2](value, chunk_values[n][i]);
          chunk_values[n][i] = 0.0f;
        }
      chunk[0] = chunk[1] = Softmax{};
    }
  }
  for (int i = 0; i < 2; ++i) {
    const int row = mine + g + 8 * i;
    if (row >= end) continue;
    Element* const out = p.out + query(row);
    const float sum = finished[warp][g + 8 * i].sum;
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
      const int d = 8 * n + 2 * t;
      if (d >= p.D) continue;
      *reinterpret_cast<uint32_t*>(out + d) = pack_two<Element>(__fdiv_rn(values[(4 * n + 2 * i) * kThreads], sum),
                                                                __fdiv_rn(values[(4 * n + 2 * i + 1) * kThreads], sum));
    }
  }
}

// The first row_blocks blocks may have 64 rows of a longer sequence, those with the most keys first; the rest share the
// chunks of split ones.
template <class Element, int Width>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) attend_decode(const Problem<Element> p, int row_blocks) {
  await_previous();
  const int block = static_cast<int>(blockIdx.x);
  if (block >= row_blocks) {
    attend_chunks<Element, Width>(p, block - row_blocks, static_cast<int>(gridDim.x) - row_blocks);
  } else {
    const int ordinal = p.tiles_to[p.B] - 1 - block / p.Hkv;
    if (ordinal >= 0) attend_rows<Element, Width>(p, ordinal, block % p.Hkv);
  }
}

// Of split sequences at most: chunks of one, and of all the sums that a token has in a chunk.
int64_t most_chunks(const int64_t M, int64_t block_size) { return equal_parts(M * block_size, kChunk); }
int64_t most_parts(int64_t T, int64_t B, int64_t M, int64_t block_size) {
  return (std::min(T, B) + (T > 1 ? std::min<int64_t>(T, kSplitTokens) : 0)) * most_chunks(M, block_size);
}

// The workspace's arrays; the bytes they take.
template <class Element>
int64_t lay_out(Problem<Element>& p, void* workspace) {
  Workspace space{static_cast<unsigned char*>(workspace)};
  const int64_t heads = most_parts(p.T, p.B, p.M, p.block_size) * p.Hq;
  p.queries = space.take<Element>(int64_t{p.T} * p.Hq * p.D);
  p.items_to = space.take<int32_t>(p.B + 1);
  p.parts_to = space.take<int32_t>(p.B + 1);
  p.tiles_to = space.take<int32_t>(p.B + 1);
  p.arrived = space.take<int32_t>(int64_t{p.T} * p.units(1) * p.Hkv);
  p.parts = space.take<Softmax>(heads);
  p.part_values = space.take<float>(heads * p.D);
  return space.used;
}

template <class Element, int Width>
int attend(const Problem<Element>& p, void* stream) {
  int multiprocessors;
  if (const int status = device_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors)) return status;
  const int64_t longer = std::min(p.B, p.T / 2), G = p.group();  // sequences with several new tokens at most
  const int64_t row_blocks = longer ? (p.T * G / kTileRows + longer) * p.Hkv : 0;
  const int64_t items = most_parts(p.T, p.B, p.M, p.block_size) * p.units(1) * p.Hkv;
  const int64_t chunk_blocks = std::min<int64_t>(items, int64_t{multiprocessors} * kBlocksAtOnce);
  return launch(Overlap::previous, attend_decode<Element, Width>, dim3(static_cast<unsigned>(row_blocks + chunk_blocks)),
                dim3(kThreads), shared_bytes<Width>(), stream, p, row_blocks);
}

template <class Element>
int run(Problem<Element> p, double rope_theta, void* workspace, void* stream) {
  lay_out(p, workspace);
  InverseFrequencies inverse;
  for (int i = 0; i < p.D / 2; ++i) inverse.of[i] = static_cast<float>(pow(rope_theta, -2.0 * i / p.D));
  // Many tokens: a block a token, so that cosines are computed once; few: a block for each of its key/value heads.
  const unsigned slices = p.T < 256 ? static_cast<unsigned>(p.Hkv) : 1;
  if (const int status = launch(Overlap::previous, append_decode<Element>, dim3(static_cast<unsigned>(p.T + 1), slices),
                                dim3(kAppendThreads), 0, stream, p, inverse))
    return status;
  return p.D <= 16   ? attend<Element, 16>(p, stream)
         : p.D <= 32 ? attend<Element, 32>(p, stream)
         : p.D <= 64 ? attend<Element, 64>(p, stream)
                     : attend<Element, 128>(p, stream);
}

template <class Element>
Problem<Element> problem(int64_t T, int64_t B, int64_t M, int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size) {
  Problem<Element> p = {};
  p.M = M;
  p.T = static_cast<int>(T);
  p.B = static_cast<int>(B);
  p.Hq = static_cast<int>(Hq);
  p.Hkv = static_cast<int>(Hkv);
  p.D = static_cast<int>(D);
  p.block_size = static_cast<int>(block_size);
  p.split_parts = static_cast<int>(kSplitTokens * most_chunks(M, block_size));
  return p;
}

}  // namespace
}  // namespace attention

int64_t append_attention_workspace(int64_t T, int64_t B, int64_t M, int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size) {
  auto p = attention::problem<__half>(T, B, M, Hq, Hkv, D, block_size);
  return attention::lay_out(p, nullptr);
}

int append_attention(const void* qkv, pm_dtype dtype, void* key_cache, void* value_cache, const int32_t* cu_seqlens,
                     const int32_t* context_lens, const int32_t* block_tables, void* out, int64_t T, int64_t B, int64_t M,
                     int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size, double rope_theta, int64_t window, float scale,
                     void* workspace, void* stream) {
  using namespace attention;
  if (T == 0) return PM_OK;
  if (D % 8 != 0 || D > kMostWidth)
    return fail(PM_UNSUPPORTED,
                "append_attention on a GPU needs a head size that is a multiple of 8, at most %d; it is %lld", kMostWidth,
                static_cast<long long>(D));
  const auto of = [&](auto element) {
    using Element = decltype(element);
    auto p = problem<Element>(T, B, M, Hq, Hkv, D, block_size);
    p.qkv = static_cast<const Element*>(qkv);
    p.key_cache = static_cast<Element*>(key_cache);
    p.value_cache = static_cast<Element*>(value_cache);
    p.cu_seqlens = cu_seqlens;
    p.context_lens = context_lens;
    p.block_tables = block_tables;
    p.out = static_cast<Element*>(out);
    p.window = static_cast<int>(std::min<int64_t>(window, INT32_MAX));
    p.scale = scale * 1.44269504088896341f;
    return run(p, rope_theta, workspace, stream);
  };
  if (dtype == PM_BF16) return of(__nv_bfloat16{});
  if (dtype == PM_F16) return of(__half{});
  return fail(PM_UNSUPPORTED, "append_attention on a GPU needs activations PM_BF16 or PM_F16; they are pm_dtype %d", dtype);
}

}  // namespace pm::cuda
