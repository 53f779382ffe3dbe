// Many tokens: groups of tokens with a weight of each, one launch.
//
// BLOCK       128 rows of weights (four strips) with up to Tokens tokens of one group, 64 or 128; eight warps, each 64 rows
//             with a quarter of the tokens. A step is one tile of K; steps come through shared memory kStages - 1 stages
//             ahead, weights in the order of fragments, tokens as they lie: every load is free of bank conflicts.
// GRID        for the worst case, without knowing how tokens fell to groups: a block beyond the last group's tokens returns
//             at once. Blocks that follow each other take kTogether runs of tokens with the same weights, so that weights
//             come from memory about once and tokens stay in the second-level cache.
// ORDER       16 bits: quarters of K as tile.cuh says, a second set of sums takes each in its turn. Everything of a row of
//             the result is in one thread: nothing depends on which tokens are beside it.
// BUDGET      (counted in machine code, not measured; tests/gpu/PREDICTIONS.md) int8 with two planes, 128 tokens: a tile is
//             64 products of 16 x 8 x 32 a warp, 128 a scheduler: 830 cycles at 6.5 each (assumed: mma.sync reaches 62 % of
//             what Hopper's tensor cores can do); beside them 310 issue slots, 512 cycles of shared memory's reads and 192
//             of its writes, 26 bytes a cycle of the second-level cache. 2 * 128 * 128 * 64 operations in some 910 cycles on
//             132 processors are 530 TFLOP/s of 16-bit arithmetic before the first and after the last tile, 430 with them.
//             16-bit weights are bound by shared memory: 512 cycles for half as many operations. One block a processor, 64
//             to 96 KB under way.
#ifndef PADDLE_MIXTRAL_CUDA_GROUPED_CUH_
#define PADDLE_MIXTRAL_CUDA_GROUPED_CUH_

#include "tile.cuh"
#include "vector.cuh"

namespace pm::cuda {

constexpr int kManyThreads = 256;
constexpr int kBlockStrips = 4;  // 128 rows
constexpr int kWarpStrips = 2, kWarpColumns = 4;
constexpr int64_t kTogether = 8;
constexpr int64_t kFewRuns = 256;  // tokens of a product up to which blocks of 64 waste less than blocks of 128

// Tokens of one group: its members first .. first + count - 1; count 0: none.
struct Run {
  int group, first, count;
};

// One group of all tokens.
struct WholeBatch {
  int64_t T;
  int64_t runs(int tokens) const { return equal_parts(T, tokens); }
  __device__ Run run(int64_t index, int tokens) const {
    const int first = static_cast<int>(index) * tokens;
    return {0, first, min(tokens, static_cast<int>(T) - first)};
  }
  __device__ int result_row(int, int member) const { return member; }
  __device__ int token_row(int row) const { return row; }
};

template <class Format, int Tokens>
struct ManyShape {
  static constexpr int kWeightBytes = kBlockStrips * kTileBytes, kPlaneBytes = Tokens * kTokenBytes;
  // A stage is kSteps tiles of K: between two barriers there is work for some 1,000 cycles.
  static constexpr int kSteps = Tokens <= 64 ? 1 : 2, kStages = Tokens <= 64 ? 4 : 3;
  static constexpr int kStepBytes = kWeightBytes + Format::kPlanes * kPlaneBytes, kStageBytes = kSteps * kStepBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kWarpGroups = Tokens / kWarpColumns / kGroupTokens;  // groups of eight tokens
  static constexpr int kWeightCopies = kWeightBytes / 16 / kManyThreads;
  static constexpr int kTokenCopies = Format::kPlanes * kPlaneBytes / 16 / kManyThreads;
  static_assert(kTokenCopies * kManyThreads * 16 == Format::kPlanes * kPlaneBytes, "whole copies");
};

// Groups: which tokens a block has, as WholeBatch. Out: where results go, as RowsOut. w:
// [groups][strips][tiles][kTileBytes].
template <class Format, int Tokens, class Groups, class Out>
__global__ void __launch_bounds__(kManyThreads, Tokens <= 64 ? 2 : 1)
    grouped_kernel(TokenRows tokens, const unsigned char* w, int64_t strips, int tiles, int64_t runs, Groups groups,
                   Out out) {
  using Shape = ManyShape<Format, Tokens>;
  using Sum = typename Format::Sum;
  constexpr int P = Format::kPlanes, G = Shape::kWarpGroups;
  __shared__ int result_row[Tokens];
  __shared__ float scale[Tokens];
  __shared__ int32_t total[Tokens];

  const int64_t row_blocks = equal_parts(strips, kBlockStrips), together = blockIdx.x / (kTogether * row_blocks);
  const int64_t within = blockIdx.x - together * kTogether * row_blocks;
  const int64_t width = min(kTogether, runs - together * kTogether);
  const Run run = groups.run(together * kTogether + within % width, Tokens);
  if (run.count <= 0) return;
  const int64_t first_strip = within / width * kBlockStrips;

  for (int i = threadIdx.x; i < Tokens; i += kManyThreads) {
    const bool any = i < run.count;
    const int row = any ? groups.result_row(run.group, run.first + i) : -1, token = any ? groups.token_row(row) : 0;
    result_row[i] = row;
    if constexpr (Format::kFixed) {
      scale[i] = any ? tokens.scale[token] : 0.0f;
      total[i] = any ? tokens.total[token] : 0;
    }
  }
  __syncthreads();

  // What this thread copies, step by step.
  unsigned char* shared = dynamic_shared();
  const unsigned char* weights[Shape::kWeightCopies];
  bool weights_valid[Shape::kWeightCopies];
  const unsigned char* token[Shape::kTokenCopies];
  bool token_valid[Shape::kTokenCopies];
#pragma unroll
  for (int i = 0; i < Shape::kWeightCopies; ++i) {
    const int chunk = i * kManyThreads + threadIdx.x;  // [strip][chunk]
    const int64_t strip = first_strip + chunk / kChunks;
    weights_valid[i] = strip < strips;
    weights[i] = w + (run.group * strips + (weights_valid[i] ? strip : 0)) * tiles * kTileBytes + chunk % kChunks * 16;
  }
#pragma unroll
  for (int i = 0; i < Shape::kTokenCopies; ++i) {
    const int chunk = i * kManyThreads + threadIdx.x;  // [plane][token][4 of 16 bytes]
    const int row = result_row[chunk / 4 % Tokens];
    token_valid[i] = row >= 0;
    token[i] = tokens.data +
               ((row >= 0 ? groups.token_row(row) : 0) * static_cast<int64_t>(P) + chunk / 4 / Tokens) * tokens.stride +
               chunk % 4 * 16;
  }
  const auto copy = [&](int stage, int tile) {
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      if (tile + step >= tiles) return;
      unsigned char* to = shared + stage * Shape::kStageBytes + step * Shape::kStepBytes;
#pragma unroll
      for (int i = 0; i < Shape::kWeightCopies; ++i) {
        const int chunk = i * kManyThreads + threadIdx.x;
        cp_async_16(to + chunk / kChunks * kTileBytes + place(chunk % kChunks), weights[i], weights_valid[i]);
        weights[i] += kTileBytes;
      }
#pragma unroll
      for (int i = 0; i < Shape::kTokenCopies; ++i) {
        cp_async_16(to + Shape::kWeightBytes + (i * kManyThreads + threadIdx.x) * 16, token[i], token_valid[i]);
        token[i] += kTokenBytes;
      }
    }
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_strip = warp % (kBlockStrips / kWarpStrips) * kWarpStrips;
  const int warp_token = warp / (kBlockStrips / kWarpStrips) * G * kGroupTokens;
  const bool live = warp_token < run.count;
  Sum sum[kWarpStrips][G][P][2][4] = {}, quarters[kWarpStrips][G][P][2][4] = {};

  for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
    copy(stage, stage * Shape::kSteps);
    cp_async_commit();
  }
  int left = quarter_tiles(tiles);  // of this quarter
  for (int tile = 0, stage = 0; tile < tiles; tile += Shape::kSteps) {
    cp_async_wait<Shape::kStages - 2>();
    __syncthreads();
    // To where the stage before this one was.
    copy(stage == 0 ? Shape::kStages - 1 : stage - 1, tile + (Shape::kStages - 1) * Shape::kSteps);
    cp_async_commit();
    const unsigned char* const stage_at = shared + stage * Shape::kStageBytes;
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    if (!live) continue;
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      if (tile + step >= tiles) break;
      const unsigned char* const at = stage_at + step * Shape::kStepBytes;
      TileFragment fragment[kWarpStrips];
#pragma unroll
      for (int s = 0; s < kWarpStrips; ++s) fragment[s] = load_tile(at + (warp_strip + s) * kTileBytes, lane);
#pragma unroll
      for (int n = 0; n < G; ++n)
#pragma unroll
        for (int plane = 0; plane < P; ++plane) {
          const int place = plane * Tokens + warp_token + n * kGroupTokens + lane / 4;
          const uint4 of_lane =
              *reinterpret_cast<const uint4*>(at + Shape::kWeightBytes + place * kTokenBytes + lane % 4 * 16);
#pragma unroll
          for (int s = 0; s < kWarpStrips; ++s) multiply<Format>(sum[s][n][plane], fragment[s], of_lane);
        }
      if constexpr (!Format::kFixed) {
        if (--left == 0 || tile + step + 1 == tiles) {
          left = quarter_tiles(tiles);
#pragma unroll
          for (int s = 0; s < kWarpStrips; ++s)
#pragma unroll
            for (int n = 0; n < G; ++n)
#pragma unroll
              for (int i = 0; i < 8; ++i) {
                quarters[s][n][0][i / 4][i % 4] += sum[s][n][0][i / 4][i % 4];
                sum[s][n][0][i / 4][i % 4] = 0;
              }
        }
      }
    }
  }

#pragma unroll
  for (int s = 0; s < kWarpStrips; ++s) {
    const int64_t strip = first_strip + warp_strip + s;
    if (strip >= strips || !live) continue;
    const typename Out::Columns columns = out.columns(run.group, strip, lane);
#pragma unroll
    for (int n = 0; n < G; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int place = warp_token + n * kGroupTokens + lane % 4 * 2 + i, row = result_row[place];
        if (row < 0) continue;
        const float token_scale = Format::kFixed ? scale[place] : 1.0f;
        const int32_t token_total = Format::kFixed ? total[place] : 0;
        float value[2][2];  // [m][h]
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            Sum of_planes[P];
#pragma unroll
            for (int plane = 0; plane < P; ++plane)
              of_planes[plane] = (Format::kFixed ? sum : quarters)[s][n][plane][m][2 * h + i];
            value[m][h] = product<Format>(of_planes, token_scale, token_total);
          }
        out.store(columns, row, value);
      }
  }
}

// Results as rows [T][N], times a scale of each of a group's N columns.
struct RowsOut {
  const float* scale;  // [groups][N]; NULL: 1
  void* y;
  pm_dtype dtype;
  int64_t N;

  __device__ float scaled(int group, int64_t n, float sum) const {
    return scale != nullptr ? __fmul_rn(sum, scale[group * N + n]) : sum;
  }

  // Of this lane: columns n + 16 m + h as tile.cuh's sums have them, and their scales.
  struct Columns {
    int64_t n;
    float scale[2][2];
  };
  __device__ Columns columns(int group, int64_t strip, int lane) const {
    Columns of{strip * kTileRows + lane / 4 * 2, {}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t n = of.n + 16 * (i / 2) + i % 2;
      of.scale[i / 2][i % 2] = scale != nullptr && n < N ? scale[group * N + n] : 1.0f;
    }
    return of;
  }
  // value [m][h]
  __device__ void store(const Columns& of, int row, const float (&value)[2][2]) const {
#pragma unroll
    for (int m = 0; m < 2; ++m)
      store_up_to_two(y, dtype, row * N + of.n + 16 * m, __fmul_rn(value[m][0], of.scale[m][0]),
                      __fmul_rn(value[m][1], of.scale[m][1]), N - of.n - 16 * m, N % 2 == 0);
  }
};

template <class Format, int Tokens, class Groups, class Out>
int launch_grouped(const TokenRows& tokens, const void* w, int64_t strips, int tiles, const Groups& groups, const Out& out,
                   void* stream) {
  const int64_t runs = groups.runs(Tokens);
  return launch(grouped_kernel<Format, Tokens, Groups, Out>, dim3(runs * equal_parts(strips, kBlockStrips)),
                dim3(kManyThreads), ManyShape<Format, Tokens>::kSharedBytes, stream, tokens,
                static_cast<const unsigned char*>(w), strips, tiles, runs, groups, out);
}

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_GROUPED_CUH_
