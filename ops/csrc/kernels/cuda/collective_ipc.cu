// Collectives between GPUs that map one another's memory.
//
// A call is one launch. Block b passes its pieces of the message through its own slots, alternating between the two. A
// meeting: block b tells block b of every rank, and waits until theirs have told it; what a rank wrote before is then there
// to be read. Blocks do not wait for each other, but for the same block of other ranks: all of a launch's blocks fit a GPU
// at once.
//
// ONE-SHOT  a piece is copied into the slot here; all meet; each rank adds up the slots of all.
// TWO-SHOT  each rank adds up only its share of the piece, in its own slot, where nobody else reads that share; all meet
//           again, and each copies the shares of all.
// Both add in rank order, so the bits are the same.
//
// To write a slot again, a rank must have passed the first meeting of the piece between, and every rank's block had
// finished reading the slot before it came to that: so no meeting is needed at a piece's end.
//
// At a meeting ranks also see what the others call. A rank that waits for a meeting cannot be told of a later one but the
// next, so two words, for even and odd numbers, keep what it has not yet seen. Block 0 takes part in every call, however
// short: so calls that differ always meet. A rank whose wait fails ends all its blocks and tells the host.
//
// Numbers of meetings and pieces stay in device memory, so a launch that was captured into a graph may be replayed.
#include <algorithm>

#include "collective.cuh"
#include "ptx.cuh"
#include "scalar.cuh"

namespace pm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kLeastPiece = 512;  // so few that a short message uses many blocks
constexpr int kLoads = 16;            // of 16 bytes that a thread has on their way at once

// When a message is cut into shares. A model of b bytes between N ranks, with links of bandwidth B to and from each rank and
// L for a meeting and the first byte after it:
//   one-shot  L + (N - 1) b / B        two-shot  2 L + 2 (N - 1) / N b / B
// So shares pay from b = L B N / ((N - 1)(N - 2)) on: 1.35 MB with 3 ranks, 600 KB with 4, 171 KB with 8; with 2 never,
// which move as much either way. L and B are predictions for NVLink 4 (two crossings and a fence; 80 % of 450 GB/s), which
// nobody has measured; a wrong one costs time, not a bit of the result.
constexpr double kMeetingSeconds = 2.5e-6, kLinkBytesPerSecond = 360e9;

bool in_shares(int64_t n, int world) {
  const double bytes = static_cast<double>(n) * sizeof(float);
  return bytes * (world - 1) * (world - 2) > kMeetingSeconds * kLinkBytesPerSecond * world;
}

// Tells block blockIdx.x of every rank of `meeting` and waits for all of theirs; false when the group has failed.
__device__ bool meet(const Group& g, uint64_t call, uint32_t meeting) {
  const int r = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  Buffer* const mine = g.buffers[g.rank];
  const uint64_t number = meeting & ((1u << kNumberBits) - 1), word = call | number;
  bool failed = false;
  if (threadIdx.x < 32) {
    if (r < g.world) {
      __threadfence_system();
      store_release_system(&g.buffers[r]->told[meeting % 2][g.rank][block], word);
    }
    __syncwarp();
    if (r < g.world) {
      const uint64_t start = nanoseconds();
      uint64_t told;
      do {
        told = load_acquire_system(&mine->told[meeting % 2][r][block]);
        const bool came = (told ^ number) << (64 - kNumberBits) == 0;
        if (came && told != word) {
          fail_group(g, PM_RANKS_DISAGREE, r, word, told);
          failed = true;
        }
        if (came) break;
        failed = *static_cast<volatile uint32_t*>(&mine->failed) != 0;
        if (!failed && nanoseconds() - start > g.timeout) {
          fail_group(g, PM_PEER_LOST, r, word, 0);
          failed = true;
        }
      } while (!failed);
    }
  }
  return !__syncthreads_or(failed);
}

// Passes x [n] in pieces: finish(begin, size, slot, meeting) once all ranks' pieces from `begin` on are there, rank r's at
// g.buffers[r]->slots[slot][block]; it may meet again, counts that in `meeting`, and is false when the group has failed.
template <class Finish>
__device__ __forceinline__ void exchange(const Group& g, uint64_t call, const float* x, int64_t n, int64_t piece_floats,
                                         Finish finish) {
  const int block = static_cast<int>(blockIdx.x);
  Buffer* const mine = g.buffers[g.rank];
  auto passed = mine->passed[block];
  const bool aligned = reinterpret_cast<uintptr_t>(x) % sizeof(float4) == 0;
  if (__syncthreads_or(mine->failed != 0)) return;
  for (int64_t begin = block * piece_floats; begin < n || begin == 0; begin += gridDim.x * piece_floats) {
    const int size = static_cast<int>(min(piece_floats, n - begin)), whole = aligned ? size / 4 : 0;
    const int slot = static_cast<int>(++passed.pieces % 2);
    float* const to = mine->slots[slot][block];
    for (int i = threadIdx.x; i < whole; i += kThreads)
      reinterpret_cast<float4*>(to)[i] = reinterpret_cast<const float4*>(x + begin)[i];
    for (int i = 4 * whole + threadIdx.x; i < size; i += kThreads) to[i] = x[begin + i];
    __syncthreads();
    if (!meet(g, call, ++passed.meetings)) return;
    if (!finish(begin, size, slot, passed.meetings)) return;
  }
  if (threadIdx.x == 0) mine->passed[block] = passed;
}

// The four floats of a slot from 4 i on, whoever has written them.
__device__ __forceinline__ float4 load_4(const Group& g, int rank, int slot, int i) {
  return __ldcg(reinterpret_cast<const float4*>(g.buffers[rank]->slots[slot][blockIdx.x]) + i);
}

// y[4 i ..] = v, as far as y [size] goes.
__device__ __forceinline__ void store_4(float* y, int i, int size, bool aligned, float4 v) {
  if (aligned && 4 * i + 4 <= size) {
    reinterpret_cast<float4*>(y)[i] = v;
    return;
  }
  const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (4 * i + j < size) y[4 * i + j] = values[j];
}

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w));
}

// y [size], which begins where the slots do: y[4 first .. 4 last) = the sums of all ranks' slots there, in rank order. At
// most kRanks ranks. y may be this rank's slot.
template <int kRanks>
__device__ __forceinline__ void add_up(const Group& g, int slot, int first, int last, float* y, int size) {
  constexpr int kTogether = kLoads / kRanks;
  const bool aligned = reinterpret_cast<uintptr_t>(y) % sizeof(float4) == 0;
  for (int i = first + threadIdx.x; i < last; i += kTogether * kThreads) {
    float4 values[kTogether][kRanks];
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
#pragma unroll
      for (int r = 0; r < kRanks; ++r)  // all on their way at once
        if (r < g.world && i + j * kThreads < last) values[j][r] = load_4(g, r, slot, i + j * kThreads);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (i + j * kThreads >= last) break;
      float4 sum = values[j][0];
#pragma unroll
      for (int r = 1; r < kRanks; ++r)
        if (r < g.world) sum = add(sum, values[j][r]);
      store_4(y, i + j * kThreads, size, aligned, sum);
    }
  }
}

// y [size] = the shares of all ranks, rank r's first floats being r * share quads on. Ranks begin at different ones.
__device__ __forceinline__ void copy_shares(const Group& g, int slot, int share, float* y, int size) {
  constexpr int kTogether = kLoads / 2;
  const int quads = (size + 3) / 4;
  const bool aligned = reinterpret_cast<uintptr_t>(y) % sizeof(float4) == 0;
  for (int i = threadIdx.x; i < g.world * share; i += kTogether * kThreads) {
    float4 values[kTogether];
    int at[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int turn = i + j * kThreads, r = (g.rank + turn / share) % g.world;
      at[j] = turn < g.world * share ? r * share + turn % share : quads;
      if (at[j] < quads) values[j] = load_4(g, r, slot, at[j]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (at[j] < quads) store_4(y, at[j], size, aligned, values[j]);
  }
}

template <int kRanks>
__global__ void __launch_bounds__(kThreads, 1)
    all_reduce_decode(const Group g, uint64_t call, const float* x, float* y, int64_t n, int64_t piece_floats) {
  exchange(g, call, x, n, piece_floats, [&](int64_t begin, int size, int slot, uint32_t&) {
    add_up<kRanks>(g, slot, 0, (size + 3) / 4, y + begin, size);
    return true;
  });
}

template <int kRanks>
__global__ void __launch_bounds__(kThreads, 1)
    all_reduce_in_shares(const Group g, uint64_t call, const float* x, float* y, int64_t n, int64_t piece_floats) {
  exchange(g, call, x, n, piece_floats, [&](int64_t begin, int size, int slot, uint32_t& meeting) {
    const int quads = (size + 3) / 4, share = (quads + g.world - 1) / g.world;
    const int first = min(g.rank * share, quads), last = min(first + share, quads);
    float* const mine = g.buffers[g.rank]->slots[slot][blockIdx.x];
    add_up<kRanks>(g, slot, first, last, mine, static_cast<int>(kSlotFloats));
    __syncthreads();
    if (!meet(g, call, ++meeting)) return false;
    copy_shares(g, slot, share, y + begin, size);
    return true;
  });
}

template <int kRanks>
__global__ void __launch_bounds__(kThreads, 1) all_gather_decode(const Group g, uint64_t call, const float* x, float* y,
                                                                 int64_t n, uint32_t cols, int64_t piece_floats) {
  exchange(g, call, x, n, piece_floats, [&](int64_t begin, int size, int slot, uint32_t&) {
    for (int i = threadIdx.x; i < size; i += kThreads) {
      float values[kRanks];
#pragma unroll
      for (int r = 0; r < kRanks; ++r)  // all on their way at once
        if (r < g.world) values[r] = __ldcg(&g.buffers[r]->slots[slot][blockIdx.x][i]);
      const uint32_t at = static_cast<uint32_t>(begin) + i, row = at / cols, col = at % cols;
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
        if (r < g.world) y[(int64_t{row} * g.world + r) * cols + col] = values[r];
    }
    return true;
  });
}

// What one block passes at a time, and the blocks of a message.
struct Cut {
  int64_t piece_floats;
  dim3 blocks;
  explicit Cut(int64_t n) {
    const int64_t share = equal_parts(equal_parts(n, kBlocks), kLeastPiece) * kLeastPiece;
    piece_floats = std::min(std::max(share, kLeastPiece), kSlotFloats);
    blocks = dim3(static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>(equal_parts(n, piece_floats), 1), kBlocks)));
  }
};

template <int kRanks>
int reduce(const Group& g, const float* x, float* y, int64_t n, uint64_t call, void* stream) {
  const Cut cut(n);
  auto kernel = all_reduce_decode<kRanks>;
  if constexpr (kRanks > 2)
    if (in_shares(n, g.world)) kernel = all_reduce_in_shares<kRanks>;
  return launch(kernel, cut.blocks, dim3(kThreads), 0, stream, g, call, x, y, n, cut.piece_floats);
}

template <int kRanks>
int gather(const Group& g, const float* x, float* y, int64_t rows, int64_t cols, uint64_t call, void* stream) {
  const Cut cut(rows * cols);
  return launch(all_gather_decode<kRanks>, cut.blocks, dim3(kThreads), 0, stream, g, call, x, y, rows * cols,
                static_cast<uint32_t>(cols), cut.piece_floats);
}

}  // namespace

int all_reduce_by_ipc(const Group& g, const float* x, float* y, int64_t n, uint64_t call, void* stream) {
  const auto reduce_them = g.world <= 2 ? reduce<2> : g.world <= 4 ? reduce<4> : g.world <= 8 ? reduce<8> : reduce<16>;
  return reduce_them(g, x, y, n, call, stream);
}

int all_gather_by_ipc(const Group& g, const float* x, float* y, int64_t rows, int64_t cols, uint64_t call, void* stream) {
  const auto gather_them = g.world <= 2 ? gather<2> : g.world <= 4 ? gather<4> : g.world <= 8 ? gather<8> : gather<16>;
  return gather_them(g, x, y, rows, cols, call, stream);
}

static_assert(PM_MAX_RANKS <= 16 && PM_MAX_RANKS <= kLoads, "the largest of the templates above");

}  // namespace pm::cuda
