// Append attention split over keys: what a decode, or a few new tokens after a long context, has enough blocks by.
//
// An item is a chunk of a sequence with 16 of its rows, (token, query head of one key/value head) pairs. Each warp of a
// block has a tile of the chunk, with all rows; the tiles are merged in order, and the block that is the last to finish a
// chunk of these rows merges the chunks in order, whichever it is.
#ifndef PADDLE_MIXTRAL_CUDA_ATTENTION_CHUNKS_CUH_
#define PADDLE_MIXTRAL_CUDA_ATTENTION_CHUNKS_CUH_

#include "attention_problem.cuh"

namespace pm::cuda::attention {

// 16 rows of a split sequence, for one key/value head.
template <class Element>
struct Unit {
  const Problem<Element>& p;
  int b, kv, length, begin, rows;  // rows begin .. begin + rows - 1 of length * group

  __device__ int position(int row) const { return p.context_lens[b] + (begin + row) / p.group(); }
  // Of a row: elements of queries and of the result before it, in heads.
  __device__ int64_t head(int row) const {
    const int group = p.group();
    return int64_t{p.cu_seqlens[b] + (begin + row) / group} * p.Hq + kv * group + (begin + row) % group;
  }
  // Its place in parts, for the sequence's chunk `i`.
  __device__ int64_t part(int i, int row) const {
    const int group = p.group();
    return (int64_t{p.parts_to[b]} + int64_t{i} * length + (begin + row) / group) * p.Hq + kv * group +
           (begin + row) % group;
  }
};

// The chunks of a unit's rows, merged in order, are the result: a row a warp.
template <class Element>
__device__ __forceinline__ void merge_chunks(const Unit<Element>& unit, int chunks) {
  const Problem<Element>& p = unit.p;
  const int d = static_cast<int>(threadIdx.x % 32) * 4;
  if (d >= p.D) return;
  for (int row = static_cast<int>(threadIdx.x / 32); row < unit.rows; row += kWarps) {
    Softmax all;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8  // their sums are under way at once
    for (int i = 0; i < chunks; ++i) {
      const int64_t at = unit.part(i, row);
      const float4 part = load_four(p.part_values + at * p.D + d);
      const Merge by = merge(all, p.parts[at]);
      value = make_float4(by(value.x, part.x), by(value.y, part.y), by(value.z, part.z), by(value.w, part.w));
    }
    store_four(p.out + unit.head(row) * p.D + d, make_float4(__fdiv_rn(value.x, all.sum), __fdiv_rn(value.y, all.sum),
                                                             __fdiv_rn(value.z, all.sum), __fdiv_rn(value.w, all.sum)));
  }
}

// Each warp fetches three of the four halves (keys, values) of its tile at once.
template <class Element, int Width>
__device__ __forceinline__ void attend_chunks(const Problem<Element>& p, int block, int blocks) {
  constexpr int kPiece = kHalf * Width;  // elements
  __shared__ Softmax softmaxes[kWarps][kRows];
  __shared__ bool is_last;
  Element* const shared = reinterpret_cast<Element*>(dynamic_shared());
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  Element* const piece[3] = {shared + (warp * 3 + 0) * kPiece, shared + (warp * 3 + 1) * kPiece,
                             shared + (warp * 3 + 2) * kPiece};

  for (int item = block; item < p.items_to[p.B] * p.Hkv; item += blocks) {
    const int ordinal = item / p.Hkv, b = owner(p.items_to, p.B, ordinal), length = p.length(b), units = p.units(length);
    const int chunk = (ordinal - p.items_to[b]) / units, number = (ordinal - p.items_to[b]) % units;
    const int begin = number * kRows;
    const Unit<Element> unit{p, b, item % p.Hkv, length, begin, min(kRows, length * p.group() - begin)};
    const int low_position = unit.position(0), high_position = unit.position(unit.rows - 1);
    const int first = first_seen(low_position, p.window);
    const int start = (p.first_chunk(b) + chunk) * kChunk + warp * kTile;

    if (start > high_position || start + kTile <= first) {
      if (lane < kRows) softmaxes[warp][lane] = Softmax{};
    } else {
      const Pages pages = p.pages(b, unit.kv, first, high_position + 1);
      const uint32_t low = pages.offset(start + lane), high = pages.offset(start + kHalf + lane);
      fetch<Width, kHalf>(pages, p.key_cache, low, piece[0], 0);
      fetch<Width, kHalf>(pages, p.key_cache, high, piece[1], 0);
      cp_async_commit();
      fetch<Width, kHalf>(pages, p.value_cache, low, piece[2], 0);
      cp_async_commit();
      Rows<Element, Width> rows;
      rows.load(g < unit.rows ? p.queries + unit.head(g) * p.D : nullptr,
                g + 8 < unit.rows ? p.queries + unit.head(g + 8) * p.D : nullptr, p.D);
      for (int i = 0; i < 2; ++i) rows.position[i] = g + 8 * i < unit.rows ? unit.position(g + 8 * i) : -1;
      rows.window = p.window;
      float s[kTile / 8][4];
      cp_async_wait<1>();
      __syncwarp();
      score<Element, Width>(rows, {piece[0], piece[1]}, s);
      __syncwarp();
      fetch<Width, kHalf>(pages, p.value_cache, high, piece[0], 0);
      cp_async_commit();
      uint32_t weights[kTile / 16][4];
      Softmax parts[2];
      soften(rows, s, p.scale, start, false, weights, parts);
      if (t == 0)
        for (int i = 0; i < 2; ++i) softmaxes[warp][g + 8 * i] = parts[i];
      cp_async_wait<0>();
      __syncwarp();
      float* const sums = reinterpret_cast<float*>(piece[1]);  // [16, Width], instead of the second half of the keys
      const auto keep = [&](int n, const float (&o)[4], int i) {
        if (g + 8 * i < unit.rows)
          *reinterpret_cast<float2*>(sums + (g + 8 * i) * Width + 8 * n + 2 * t) = make_float2(o[2 * i], o[2 * i + 1]);
      };
      // What rows of one position do not see was not fetched: zeros.
      const Element* const values[2] = {piece[2], piece[0]};
      if (low_position == high_position || (are_numbers<kPiece>(values[0]) && are_numbers<kPiece>(values[1]))) {
        add_values<Element, Width>(weights, values, [&](int n, const float (&o)[4]) {
          keep(n, o, 0);
          keep(n, o, 1);
        });
      } else {
        add_seen_values(rows, start, weights, values, keep);
      }
    }
    __syncthreads();

    for (int i = static_cast<int>(threadIdx.x); i < unit.rows * p.D; i += kThreads) {
      const int row = i / p.D, d = i % p.D;
      Softmax all;
      float value = 0.0f;
      for (int w = 0; w < kWarps; ++w) {
        const Softmax part = softmaxes[w][row];
        if (part.largest == -INFINITY) continue;
        const float* const sums = reinterpret_cast<const float*>(shared + (w * 3 + 1) * kPiece);
        value = merge(all, part)(value, sums[row * Width + d]);
      }
      const int64_t at = unit.part(chunk, row);
      p.part_values[at * p.D + d] = value;
      if (d == 0) p.parts[at] = all;
    }
    const int chunks = p.chunks(b);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const int64_t counter = (int64_t{p.cu_seqlens[b]} * p.units(1) + number) * p.Hkv + unit.kv;
      is_last = atomicAdd(p.arrived + counter, 1) == chunks - 1;
    }
    __syncthreads();
    if (is_last) {
      __threadfence();
      merge_chunks(unit, chunks);
    }
    __syncthreads();
  }
}

}  // namespace pm::cuda::attention
#endif  // PADDLE_MIXTRAL_CUDA_ATTENTION_CHUNKS_CUH_
