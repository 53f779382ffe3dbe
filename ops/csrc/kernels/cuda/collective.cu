// The group of this process' GPU with those of other ranks, and its collectives: include/collective.h.
#include <stdio.h>
#include <string.h>

#include "collective.cuh"

namespace pm::cuda {
namespace {

// The host's.
struct Membership {
  Group group = {};
  Failure* failure = nullptr;  // null where there is no group
  double step_timeout_s = 0;
  bool open = false;
};
Membership membership;

struct CallText {
  char text[80];
  explicit CallText(uint64_t word) {
    const auto size = static_cast<long long>(word >> (kNumberBits + kKindBits));
    const auto kind = static_cast<CallKind>(word >> kNumberBits & ((1 << kKindBits) - 1));
    if (kind == kAllReduce)
      snprintf(text, sizeof text, "all_reduce of [%lld]", size);
    else
      snprintf(text, sizeof text, "all_gather of [%lld, %lld]", size >> kColumnBits, size & kMostRowsOrColumns);
  }
};

int ready() {
  if (!membership.open) return fail(PM_NOT_CONNECTED, "no group of GPUs: pm_cuda_group_create and pm_cuda_group_open first");
  const Failure& failure = *membership.failure;
  const auto status = static_cast<pm_status>(__atomic_load_n(&failure.status, __ATOMIC_ACQUIRE));
  if (status == PM_RANKS_DISAGREE)
    return fail(status, "rank %d called %s where rank %d called %s; give every rank the same command and artefact",
                membership.group.rank, CallText(failure.mine).text, failure.rank, CallText(failure.theirs).text);
  if (status == PM_PEER_LOST)
    return fail(status, "rank %d did not come to %s of rank %d within %g s", failure.rank, CallText(failure.mine).text,
                membership.group.rank, membership.step_timeout_s);
  return PM_OK;
}

}  // namespace

int all_reduce(const float* x, float* y, int64_t n, void* stream) {
  if (const int status = ready()) return status;
  return all_reduce_by_ipc(membership.group, x, y, n, all_reduce_word(n), stream);
}

int all_gather(const float* x, float* y, int64_t rows, int64_t cols, void* stream) {
  if (const int status = ready()) return status;
  if (rows > kMostRowsOrColumns || cols > kMostRowsOrColumns || rows * cols > UINT32_MAX)
    return fail(
        PM_UNSUPPORTED,
        "all_gather between GPUs takes less than 2^23 rows and columns and 2^32 numbers of a rank; x is [%lld, %lld]",
        static_cast<long long>(rows), static_cast<long long>(cols));
  return all_gather_by_ipc(membership.group, x, y, rows, cols, all_gather_word(rows, cols), stream);
}

namespace {

int create_group(int rank, int world, double step_timeout_s, void* handle) {
  if (membership.failure) return fail(PM_UNSUPPORTED, "this process already has a group of GPUs: pm_cuda_group_leave first");
  if (world < 1 || world > PM_MAX_RANKS || rank < 0 || rank >= world)
    return fail(PM_UNSUPPORTED, "rank %d of %d ranks; a group of GPUs has 1 to %d", rank, world, PM_MAX_RANKS);
  void *buffer = nullptr, *host = nullptr, *host_on_device = nullptr;
  int status = check(cudaMalloc(&buffer, sizeof(Buffer)), "a buffer for collectives");
  if (status == PM_OK) status = check(cudaMemset(buffer, 0, sizeof(Buffer)), "clearing it");
  if (status == PM_OK) status = check(cudaDeviceSynchronize(), "clearing it");
  if (status == PM_OK) status = check(cudaHostAlloc(&host, sizeof(Failure), cudaHostAllocMapped), "a word for the host");
  if (status == PM_OK) status = check(cudaHostGetDevicePointer(&host_on_device, host, 0), "a word for the host");
  cudaIpcMemHandle_t ipc;
  if (status == PM_OK) status = check(cudaIpcGetMemHandle(&ipc, buffer), "sharing it with other processes");
  if (status != PM_OK) {
    if (host) cudaFreeHost(host);
    if (buffer) cudaFree(buffer);
    return status;
  }
  static_assert(sizeof ipc == PM_CUDA_HANDLE_BYTES, "what callers move");
  memcpy(handle, &ipc, sizeof ipc);
  memset(host, 0, sizeof(Failure));
  Group& g = membership.group;
  g.rank = rank;
  g.world = world;
  g.buffers[rank] = static_cast<Buffer*>(buffer);
  g.timeout = step_timeout_s < 1e9 ? static_cast<uint64_t>(step_timeout_s * 1e9) : UINT64_MAX;
  g.failure = static_cast<Failure*>(host_on_device);
  membership.step_timeout_s = step_timeout_s;
  membership.failure = static_cast<Failure*>(host);
  return PM_OK;
}

int open_group(const void* handles) {
  if (!membership.failure) return fail(PM_NOT_CONNECTED, "no group of GPUs: pm_cuda_group_create first");
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
  if (!membership.failure) return;
  Group& g = membership.group;
  cudaDeviceSynchronize();
  for (int r = 0; r < g.world; ++r)
    if (r != g.rank && g.buffers[r]) cudaIpcCloseMemHandle(g.buffers[r]);
  cudaFree(g.buffers[g.rank]);
  cudaFreeHost(membership.failure);
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
