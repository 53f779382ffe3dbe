// A group of GPUs: what the two ways between them (collective_ipc.cu, collective_nccl.cu) and their entry points
// (collective.cu) share.
#ifndef PADDLE_MIXTRAL_CUDA_COLLECTIVE_CUH_
#define PADDLE_MIXTRAL_CUDA_COLLECTIVE_CUH_

#include <stdint.h>

#include "../include/collective.h"
#include "launch.cuh"

namespace pm::cuda {

// A call in the upper 48 bits of a word, which ranks show each other to see that they make the same: its kind, and n of
// an all_reduce or rows and columns of an all_gather. The lower bits are free for what numbers the word.
constexpr int kNumberBits = 16, kKindBits = 2, kColumnBits = 23;
constexpr int64_t kMostRowsOrColumns = (int64_t{1} << kColumnBits) - 1;
enum CallKind : uint64_t { kAllReduce = 1, kAllGather = 2 };

inline uint64_t call_word(CallKind kind, int64_t size) {
  return static_cast<uint64_t>(size) << (kNumberBits + kKindBits) | kind << kNumberBits;
}
inline uint64_t all_reduce_word(int64_t n) { return call_word(kAllReduce, n); }
inline uint64_t all_gather_word(int64_t rows, int64_t cols) { return call_word(kAllGather, rows << kColumnBits | cols); }
__host__ __device__ inline uint64_t call_of(uint64_t word) { return word >> kNumberBits; }

// What the GPU tells the host, in the host's memory.
struct Report {
  uint32_t status;  // a pm_status, written last: why the group is of no more use
  int32_t rank;     // the one that did not come or made another call; the calls
  uint64_t mine, theirs;
  uint32_t done;  // by NCCL: the number of the last call that has ended
};

// A rank's part of the GPUs' memory: two slots for each block.
constexpr int kBlocks = 64;
constexpr int64_t kSlotFloats = 16 * 1024;
struct Buffer {
  // What block b of rank r last told this rank at a meeting of even and of odd number: the call, and the number's end.
  uint64_t told[2][PM_MAX_RANKS][kBlocks];
  // How far block b here has come.
  struct {
    uint32_t meetings, pieces;
  } passed[kBlocks];
  uint32_t failed;  // a pm_status: nothing here means anything any more
  alignas(256) float slots[2][kBlocks][kSlotFloats];
};

// As kernels get it.
struct Group {
  Buffer* buffers[PM_MAX_RANKS];  // as mapped here; by NCCL, this rank's alone
  int rank, world;
  uint64_t timeout;  // in nanoseconds
  Report* report;    // as the GPU sees it
};

// Tells the host, if nothing has been told before. Blocks and their lanes may call it at once.
__device__ inline void fail_group(const Group& g, pm_status status, int rank, uint64_t mine, uint64_t theirs) {
  if (atomicCAS(&g.buffers[g.rank]->failed, 0u, static_cast<uint32_t>(status)) != 0) return;
  g.report->rank = rank;
  g.report->mine = mine;
  g.report->theirs = theirs;
  __threadfence_system();
  *static_cast<volatile uint32_t*>(&g.report->status) = status;
}

// PM_OK while the group that this process has opened is of use.
int group_status();

// x [n] -> y [n] and x [rows, cols] -> y [rows, world * cols] of an open group; `call` is their word.
int all_reduce_by_ipc(const Group& g, const float* x, float* y, int64_t n, uint64_t call, void* stream);
int all_gather_by_ipc(const Group& g, const float* x, float* y, int64_t rows, int64_t cols, uint64_t call, void* stream);
int all_reduce_by_nccl(const Group& g, const float* x, float* y, int64_t n, uint64_t call, void* stream);
int all_gather_by_nccl(const Group& g, const float* x, float* y, int64_t rows, int64_t cols, uint64_t call, void* stream);

// Connects the ranks by NCCL, which is loaded; returns when all are there, or one has not come within timeout_s.
int open_by_nccl(const Group& g, Report* report, double step_timeout_s, const void* id, double timeout_s);
void close_nccl();
// What NCCL has reported itself, or null.
const char* nccl_error();

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_COLLECTIVE_CUH_
