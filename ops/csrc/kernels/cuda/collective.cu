// The group of this process' GPU with those of other ranks, and its collectives: include/collective.h.
#include <stdio.h>
#include <string.h>

#include <vector>

#include "collective.cuh"
#include "nccl.h"

namespace pm::cuda {
namespace {

// Of a trial: sums in one shot, and (from 3 ranks on) in shares.
constexpr int kTrials[] = {5, 400'003};

// The host's.
struct Membership {
  Group group = {};
  Report* report = nullptr;  // null where there is no group
  double step_timeout_s = 0;
  enum { closed, by_ipc, by_nccl } way = closed;
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

}  // namespace

int group_status() {
  if (membership.way == Membership::closed)
    return fail(PM_NOT_CONNECTED, "no group of GPUs: pm_cuda_group_create and pm_cuda_group_open first");
  const Report& report = *membership.report;
  const auto status = static_cast<pm_status>(__atomic_load_n(&report.status, __ATOMIC_ACQUIRE));
  if (status == PM_OK) return PM_OK;
  const int rank = membership.group.rank;
  if (status == PM_RANKS_DISAGREE)
    return fail(status, "rank %d called %s where rank %d called %s; give every rank the same command and artefact", rank,
                CallText(report.mine).text, report.rank, CallText(report.theirs).text);
  if (membership.way == Membership::by_ipc)
    return fail(status, "rank %d did not come to %s of rank %d within %g s", report.rank, CallText(report.mine).text, rank,
                membership.step_timeout_s);
  if (const char* error = nccl_error()) return fail(status, "NCCL reports on rank %d: %s", rank, error);
  return fail(status, "no collective of rank %d by NCCL has ended for %g s", rank, membership.step_timeout_s);
}

int all_reduce(const float* x, float* y, int64_t n, void* stream) {
  if (const int status = group_status()) return status;
  const auto reduce = membership.way == Membership::by_ipc ? all_reduce_by_ipc : all_reduce_by_nccl;
  return reduce(membership.group, x, y, n, all_reduce_word(n), stream);
}

int all_gather(const float* x, float* y, int64_t rows, int64_t cols, void* stream) {
  if (const int status = group_status()) return status;
  if (rows > kMostRowsOrColumns || cols > kMostRowsOrColumns || rows * cols > UINT32_MAX)
    return fail(
        PM_UNSUPPORTED,
        "all_gather between GPUs takes less than 2^23 rows and columns and 2^32 numbers of a rank; x is [%lld, %lld]",
        static_cast<long long>(rows), static_cast<long long>(cols));
  const auto gather = membership.way == Membership::by_ipc ? all_gather_by_ipc : all_gather_by_nccl;
  return gather(membership.group, x, y, rows, cols, all_gather_word(rows, cols), stream);
}

namespace {

uint64_t nanoseconds_of(double seconds) { return seconds < 1e9 ? static_cast<uint64_t>(seconds * 1e9) : UINT64_MAX; }

int create_group(int rank, int world, double step_timeout_s, void* handle) {
  if (membership.report) return fail(PM_UNSUPPORTED, "this process already has a group of GPUs: pm_cuda_group_leave first");
  if (world < 1 || world > PM_MAX_RANKS || rank < 0 || rank >= world)
    return fail(PM_UNSUPPORTED, "rank %d of %d ranks; a group of GPUs has 1 to %d", rank, world, PM_MAX_RANKS);
  void *buffer = nullptr, *host = nullptr, *host_on_device = nullptr;
  int status = check(cudaMalloc(&buffer, sizeof(Buffer)), "a buffer for collectives");
  if (status == PM_OK) status = check(cudaMemset(buffer, 0, sizeof(Buffer)), "clearing it");
  if (status == PM_OK) status = check(cudaDeviceSynchronize(), "clearing it");
  if (status == PM_OK) status = check(cudaHostAlloc(&host, sizeof(Report), cudaHostAllocMapped), "memory of the host");
  if (status == PM_OK) status = check(cudaHostGetDevicePointer(&host_on_device, host, 0), "memory of the host");
  if (status != PM_OK) {
    if (host) cudaFreeHost(host);
    if (buffer) cudaFree(buffer);
    return status;
  }
  cudaIpcMemHandle_t ipc = {};
  static_assert(sizeof ipc == PM_CUDA_HANDLE_BYTES, "what callers move");
  if (cudaIpcGetMemHandle(&ipc, buffer) != cudaSuccess) {
    (void)cudaGetLastError();  // or another call would report it
    ipc = {};
  }
  memcpy(handle, &ipc, sizeof ipc);
  memset(host, 0, sizeof(Report));
  Group& g = membership.group;
  g.rank = rank;
  g.world = world;
  g.buffers[rank] = static_cast<Buffer*>(buffer);
  g.timeout = nanoseconds_of(step_timeout_s);
  g.report = static_cast<Report*>(host_on_device);
  membership.step_timeout_s = step_timeout_s;
  membership.report = static_cast<Report*>(host);
  return PM_OK;
}

int not_created() { return fail(PM_NOT_CONNECTED, "no group of GPUs: pm_cuda_group_create first"); }

int open_group(const void* handles) {
  if (!membership.report) return not_created();
  Group& g = membership.group;
  const cudaIpcMemHandle_t none = {};
  for (int r = 0; r < g.world; ++r) {
    if (g.buffers[r]) continue;  // its own, or mapped already
    cudaIpcMemHandle_t ipc;
    memcpy(&ipc, static_cast<const char*>(handles) + r * PM_CUDA_HANDLE_BYTES, sizeof ipc);
    if (memcmp(&ipc, &none, sizeof ipc) == 0) return fail(PM_UNSUPPORTED, "rank %d's GPU does not share its memory", r);
    void* buffer = nullptr;
    if (const cudaError_t error = cudaIpcOpenMemHandle(&buffer, ipc, cudaIpcMemLazyEnablePeerAccess)) {
      (void)cudaGetLastError();  // or another call would report it
      return fail(PM_UNSUPPORTED, "mapping the memory of rank %d's GPU: %s", r, cudaGetErrorString(error));
    }
    g.buffers[r] = static_cast<Buffer*>(buffer);
  }
  membership.way = Membership::by_ipc;
  return PM_OK;
}

// One sum of n numbers, whose result is known; of integers, so that it is exact.
int try_sum(const Group& g, int n) {
  const int64_t ranks = g.world * (g.world + 1) / 2;
  const auto number = [](int i) { return static_cast<float>(i % 1021); };
  std::vector<float> host(n);
  for (int i = 0; i < n; ++i) host[i] = number(i) * static_cast<float>(g.rank + 1);
  const size_t bytes = n * sizeof(float);
  void* x = nullptr;
  int status = check(cudaMalloc(&x, bytes), "numbers for a trial");
  if (status == PM_OK) status = check(cudaMemcpy(x, host.data(), bytes, cudaMemcpyHostToDevice), "a trial");
  float* const numbers = static_cast<float*>(x);
  if (status == PM_OK) status = all_reduce_by_ipc(g, numbers, numbers, n, all_reduce_word(n), nullptr);
  if (status == PM_OK) status = check(cudaMemcpy(host.data(), x, bytes, cudaMemcpyDeviceToHost), "a trial");
  cudaFree(x);
  if (status != PM_OK) return status;
  if (__atomic_load_n(&membership.report->status, __ATOMIC_ACQUIRE) != PM_OK)
    return fail(PM_UNSUPPORTED, "a trial sum through mapped memory did not end within %g s",
                static_cast<double>(g.timeout) * 1e-9);
  for (int i = 0; i < n; ++i)
    if (host[i] != number(i) * static_cast<float>(ranks))
      return fail(PM_UNSUPPORTED, "a trial sum through mapped memory is wrong: number %d is %g, not %g", i, host[i],
                  number(i) * static_cast<float>(ranks));
  return PM_OK;
}

int try_group(double timeout_s) {
  if (membership.way != Membership::by_ipc) return fail(PM_NOT_CONNECTED, "no group of GPUs: pm_cuda_group_open first");
  Group g = membership.group;
  g.timeout = nanoseconds_of(timeout_s);
  for (const int n : kTrials)
    if (const int status = try_sum(g, n)) return status;
  return PM_OK;
}

int open_nccl_group(const void* id, double timeout_s) {
  if (!membership.report) return not_created();
  if (!loaded_nccl()) return fail(PM_NOT_CONNECTED, "no NCCL: pm_cuda_nccl_load first");
  // What a trial may have left.
  Buffer* const buffer = membership.group.buffers[membership.group.rank];
  if (const int status = check(cudaMemset(buffer, 0, sizeof(Buffer)), "clearing a buffer for collectives")) return status;
  if (const int status = check(cudaDeviceSynchronize(), "clearing a buffer for collectives")) return status;
  memset(membership.report, 0, sizeof(Report));
  const double step_timeout_s = membership.step_timeout_s;
  if (const int status = open_by_nccl(membership.group, membership.report, step_timeout_s, id, timeout_s)) return status;
  membership.way = Membership::by_nccl;
  return PM_OK;
}

int new_nccl_id(void* id) {
  const Nccl* const nccl = loaded_nccl();
  if (!nccl) return fail(PM_NOT_CONNECTED, "no NCCL: pm_cuda_nccl_load first");
  const int result = nccl->GetUniqueId(static_cast<NcclId*>(id));
  return result == kNcclSuccess ? PM_OK : fail(PM_LAUNCH_FAILED, "NCCL makes no id: %s", nccl->GetErrorString(result));
}

void leave_group() {
  if (!membership.report) return;
  Group& g = membership.group;
  cudaDeviceSynchronize();
  close_nccl();
  for (int r = 0; r < g.world; ++r)
    if (r != g.rank && g.buffers[r]) cudaIpcCloseMemHandle(g.buffers[r]);
  cudaFree(g.buffers[g.rank]);
  cudaFreeHost(membership.report);
  membership = Membership();
}

}  // namespace
}  // namespace pm::cuda

#define PM_EXPORTED extern "C" __attribute__((visibility("default")))

PM_EXPORTED int pm_cuda_group_create(int rank, int world, double step_timeout_s, void* handle) {
  return pm::cuda::create_group(rank, world, step_timeout_s, handle);
}
PM_EXPORTED int pm_cuda_group_open(const void* handles) { return pm::cuda::open_group(handles); }
PM_EXPORTED int pm_cuda_group_try(double timeout_s) { return pm::cuda::try_group(timeout_s); }
PM_EXPORTED int pm_cuda_nccl_load(const char* library, int* version) { return pm::cuda::load_nccl(library, version); }
PM_EXPORTED int pm_cuda_nccl_id(void* id) { return pm::cuda::new_nccl_id(id); }
PM_EXPORTED int pm_cuda_group_open_nccl(const void* id, double timeout_s) {
  return pm::cuda::open_nccl_group(id, timeout_s);
}
PM_EXPORTED int pm_cuda_group_status(void) { return pm::cuda::group_status(); }
PM_EXPORTED void pm_cuda_group_leave(void) { pm::cuda::leave_group(); }
