// Collectives between the GPUs of one machine: include/collective.h.
//
// Every rank's buffer is mapped by all others: two slots for each block, and a word for each rank and block that says how
// many pieces that rank's block has put into its slots. A call is one launch. Block b passes its pieces of the message
// through its own slots, alternating between the two: it copies a piece into its slot here, tells block b of every rank,
// waits until theirs have told it, and reads the slots of all. To write a slot again it must have passed the wait of the
// piece between, and every rank's block had finished reading the slot before it told of that piece: so one wait a piece is
// enough. Blocks do not wait for each other, but for the same block of other ranks: all of a launch's blocks fit a GPU at
// once.
//
// Counts of pieces stay in device memory, so a launch that was captured into a graph may be replayed.
#include <string.h>

#include <algorithm>

#include "../include/collective.h"
#include "ptx.cuh"
#include "scalar.cuh"

namespace pm::cuda {
namespace {

constexpr int kThreads = 256, kBlocks = 64;
constexpr int64_t kSlotFloats = 4096, kLeastPiece = 512;  // of a block; so few that a short message uses many blocks

struct Buffer {
  uint32_t told[PM_MAX_RANKS][kBlocks];  // pieces that block b of rank r has told this rank of
  uint32_t done[kBlocks];                // pieces that block b here has passed
  uint32_t lost;                         // a wait took too long: nothing here means anything any more
  alignas(256) float slots[2][kBlocks][kSlotFloats];
};
static_assert(sizeof(cudaIpcMemHandle_t) == PM_CUDA_HANDLE_BYTES, "what callers move");

struct Group {
  Buffer* buffers[PM_MAX_RANKS];  // as mapped here
  int rank, world;
  uint64_t timeout;     // in nanoseconds
  uint32_t* host_lost;  // Buffer::lost for the host
};

// The host's: null where there is no group.
struct Membership {
  Group group = {};
  volatile uint32_t* lost = nullptr;
  bool open = false;
};
Membership membership;

// Tells block blockIdx.x of every rank of `piece` and waits for all of theirs; false when one did not come in time.
__device__ bool meet(const Group& g, uint32_t piece) {
  const int r = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  Buffer* const mine = g.buffers[g.rank];
  bool lost = false;
  if (threadIdx.x < 32) {
    if (r < g.world) {
      __threadfence_system();
      store_release_system(&g.buffers[r]->told[g.rank][block], piece);
    }
    __syncwarp();
    if (r < g.world) {
      const uint64_t start = nanoseconds();
      // Counts wrap around: a rank is at most one piece ahead.
      while (static_cast<int32_t>(load_acquire_system(&mine->told[r][block]) - piece) < 0 && !lost)
        lost = load_acquire_system(&mine->lost) != 0 || nanoseconds() - start > g.timeout;
    }
    if (lost) {
      store_release_system(&mine->lost, 1);
      store_release_system(g.host_lost, 1);
    }
  }
  return !__syncthreads_or(lost);
}

// Passes x [n] in pieces: finish(begin, size, slot) once all ranks' pieces from `begin` on are there, rank r's at
// g.buffers[r]->slots[slot][block].
template <class Finish>
__device__ __forceinline__ void exchange(const Group& g, const float* x, int64_t n, int64_t piece_floats, Finish finish) {
  const int block = static_cast<int>(blockIdx.x);
  Buffer* const mine = g.buffers[g.rank];
  uint32_t piece = mine->done[block];
  if (mine->lost) return;
  for (int64_t begin = block * piece_floats; begin < n; begin += gridDim.x * piece_floats) {
    const int64_t size = min(piece_floats, n - begin);
    const int slot = static_cast<int>(++piece % 2);
    for (int64_t i = threadIdx.x; i < size; i += kThreads) mine->slots[slot][block][i] = x[begin + i];
    __syncthreads();
    if (!meet(g, piece)) return;
    finish(begin, size, slot);
  }
  if (threadIdx.x == 0) mine->done[block] = piece;
}

__global__ void __launch_bounds__(kThreads, 1)
    all_reduce_decode(const Group g, const float* x, float* y, int64_t n, int64_t piece_floats) {
  exchange(g, x, n, piece_floats, [&](int64_t begin, int64_t size, int slot) {
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      float values[PM_MAX_RANKS];
#pragma unroll
      for (int r = 0; r < PM_MAX_RANKS; ++r)  // all on their way at once
        values[r] = r < g.world ? __ldcg(&g.buffers[r]->slots[slot][blockIdx.x][i]) : 0.0f;
      float sum = values[0];
#pragma unroll
      for (int r = 1; r < PM_MAX_RANKS; ++r)
        if (r < g.world) sum = __fadd_rn(sum, values[r]);
      y[begin + i] = sum;
    }
  });
}

__global__ void __launch_bounds__(kThreads, 1)
    all_gather_decode(const Group g, const float* x, float* y, int64_t n, uint32_t cols, int64_t piece_floats) {
  exchange(g, x, n, piece_floats, [&](int64_t begin, int64_t size, int slot) {
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      const uint32_t at = static_cast<uint32_t>(begin + i), row = at / cols, col = at % cols;
      for (int r = 0; r < g.world; ++r)
        y[(int64_t{row} * g.world + r) * cols + col] = __ldcg(&g.buffers[r]->slots[slot][blockIdx.x][i]);
    }
  });
}

int ready() {
  if (!membership.open) return fail(PM_NOT_CONNECTED, "no group of GPUs: pm_cuda_group_create and pm_cuda_group_open first");
  if (*membership.lost) return fail(PM_PEER_LOST, "another rank did not come to a collective in time");
  return PM_OK;
}

// What one block passes at a time, and the blocks of a message.
struct Cut {
  int64_t piece_floats;
  dim3 blocks;
  explicit Cut(int64_t n) {
    const int64_t share = equal_parts(equal_parts(n, kBlocks), kLeastPiece) * kLeastPiece;
    piece_floats = std::min(std::max(share, kLeastPiece), kSlotFloats);
    blocks = dim3(static_cast<unsigned>(std::min<int64_t>(equal_parts(n, piece_floats), kBlocks)));
  }
};

}  // namespace

int all_reduce(const float* x, float* y, int64_t n, void* stream) {
  if (const int status = ready()) return status;
  const Cut cut(n);
  return launch(all_reduce_decode, cut.blocks, dim3(kThreads), 0, stream, membership.group, x, y, n, cut.piece_floats);
}

int all_gather(const float* x, float* y, int64_t rows, int64_t cols, void* stream) {
  if (const int status = ready()) return status;
  if (rows * cols > UINT32_MAX)
    return fail(PM_UNSUPPORTED, "all_gather between GPUs takes at most 2^32 - 1 elements of a rank; there are %lld",
                static_cast<long long>(rows * cols));
  const Cut cut(rows * cols);
  return launch(all_gather_decode, cut.blocks, dim3(kThreads), 0, stream, membership.group, x, y, rows * cols, cols,
                cut.piece_floats);
}

namespace {

int create_group(int rank, int world, double step_timeout_s, void* handle) {
  if (membership.lost) return fail(PM_UNSUPPORTED, "this process already has a group of GPUs: pm_cuda_group_leave first");
  if (world < 1 || world > PM_MAX_RANKS || rank < 0 || rank >= world)
    return fail(PM_UNSUPPORTED, "rank %d of %d ranks; a group of GPUs has 1 to %d", rank, world, PM_MAX_RANKS);
  void *buffer = nullptr, *host = nullptr, *host_on_device = nullptr;
  int status = check(cudaMalloc(&buffer, sizeof(Buffer)), "a buffer for collectives");
  if (status == PM_OK) status = check(cudaMemset(buffer, 0, sizeof(Buffer)), "clearing it");
  if (status == PM_OK) status = check(cudaDeviceSynchronize(), "clearing it");
  if (status == PM_OK) status = check(cudaHostAlloc(&host, sizeof(uint32_t), cudaHostAllocMapped), "a word for the host");
  if (status == PM_OK) status = check(cudaHostGetDevicePointer(&host_on_device, host, 0), "a word for the host");
  cudaIpcMemHandle_t ipc;
  if (status == PM_OK) status = check(cudaIpcGetMemHandle(&ipc, buffer), "sharing it with other processes");
  if (status != PM_OK) {
    if (host) cudaFreeHost(host);
    if (buffer) cudaFree(buffer);
    return status;
  }
  memcpy(handle, &ipc, sizeof ipc);
  Group& g = membership.group;
  g.rank = rank;
  g.world = world;
  g.buffers[rank] = static_cast<Buffer*>(buffer);
  g.timeout = step_timeout_s < 1e9 ? static_cast<uint64_t>(step_timeout_s * 1e9) : UINT64_MAX;
  g.host_lost = static_cast<uint32_t*>(host_on_device);
  membership.lost = static_cast<uint32_t*>(host);
  *membership.lost = 0;
  return PM_OK;
}

int open_group(const void* handles) {
  if (!membership.lost) return fail(PM_NOT_CONNECTED, "no group of GPUs: pm_cuda_group_create first");
  Group& g = membership.group;
  for (int r = 0; r < g.world; ++r) {
    if (g.buffers[r]) continue;  // its own, or mapped already
    cudaIpcMemHandle_t ipc;
    memcpy(&ipc, static_cast<const char*>(handles) + r * PM_CUDA_HANDLE_BYTES, sizeof ipc);
    void* buffer = nullptr;
    const int status = check(cudaIpcOpenMemHandle(&buffer, ipc, cudaIpcMemLazyEnablePeerAccess), "mapping a rank's buffer");
    if (status != PM_OK) return status;
    g.buffers[r] = static_cast<Buffer*>(buffer);
  }
  membership.open = true;
  return PM_OK;
}

void leave_group() {
  if (!membership.lost) return;
  Group& g = membership.group;
  cudaDeviceSynchronize();
  for (int r = 0; r < g.world; ++r)
    if (r != g.rank && g.buffers[r]) cudaIpcCloseMemHandle(g.buffers[r]);
  cudaFree(g.buffers[g.rank]);
  cudaFreeHost(const_cast<uint32_t*>(membership.lost));
  membership = Membership();
}

}  // namespace
}  // namespace pm::cuda

#define PM_EXPORTED extern "C" __attribute__((visibility("default")))

PM_EXPORTED int pm_cuda_group_create(int rank, int world, double step_timeout_s, void* handle) {
  return pm::cuda::create_group(rank, world, step_timeout_s, handle);
}
PM_EXPORTED int pm_cuda_group_open(const void* handles) { return pm::cuda::open_group(handles); }
PM_EXPORTED int pm_cuda_group_status(void) { return pm::cuda::ready(); }
PM_EXPORTED void pm_cuda_group_leave(void) { pm::cuda::leave_group(); }
