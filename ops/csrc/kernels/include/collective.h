// Collectives between the ranks of one job on one machine, over POSIX shared memory.
//
// pm_cpu_group_join   every rank calls it once, with the same name (unique per job, no '/'), world size (1..16) and
// time-outs in
//                     seconds (may be infinite). It returns PM_OK when all have joined, PM_PEER_LOST when they have not
//                     within join_timeout_s or one of them died meanwhile, and -errno where the system refuses (-EBUSY: this
//                     process already has a group; -ENOSPC: /dev/shm is full). The shared memory's name is removed as soon
//                     as all have it mapped, so nothing outlives the processes however they end; a job killed while it was
//                     still joining leaves a name that the next job of the same user removes. World 1 needs no memory and no
//                     peer.
// pm_cpu_group_leave  forgets the group (for tests and for an orderly end); ranks still waiting for this one get
// PM_PEER_LOST. pm_cpu_all_reduce   x [n] float32 of every rank -> y [n]: the sum over ranks, added in rank order, ((x0 +
// x1) + x2) + ..., so
//                     the same bits on every rank. y may be x.
// pm_cpu_all_gather   x [rows, cols] of every rank -> y [rows, world * cols] float32: rank r's columns at r * cols.
// pm_cpu_broadcast    x [bytes] of rank 0 -> x of every rank.
// pm_cpu_group_alive  1 while no rank has died or left (and without a group); it waits for nobody.
//
// All ranks make the same calls in the same order, one at a time; a call that differs (operator or sizes) makes every rank
// return PM_RANKS_DISAGREE. A rank that dies (its process gone or a zombie) or leaves makes the others return PM_PEER_LOST
// within a second; so does one that does not arrive within step_timeout_s. After either the group is of no more use: every
// later call returns the same status. The last argument, a stream, is unused on a CPU.
#ifndef PADDLE_MIXTRAL_COLLECTIVE_H_
#define PADDLE_MIXTRAL_COLLECTIVE_H_

#include "common.h"

#define PM_MAX_RANKS 16

#ifdef __cplusplus
extern "C" {
#endif

int pm_cpu_group_join(const char* name, int rank, int world, double join_timeout_s, double step_timeout_s);
void pm_cpu_group_leave(void);
int pm_cpu_group_rank(void);   // 0 when no group has been joined
int pm_cpu_group_world(void);  // 1 when no group has been joined
int pm_cpu_all_reduce(const float* x, float* y, int64_t n, void* stream);
int pm_cpu_all_gather(const float* x, float* y, int64_t rows, int64_t cols, void* stream);
int pm_cpu_broadcast(void* x, int64_t bytes, void* stream);
int pm_cpu_group_alive(void);

// The same between the GPUs of one machine: the table's all_reduce and all_gather (device.h). Sums in rank order, so the
// same bits on every rank, however long the message and whichever way it goes; all ranks make the same calls in the same
// order, each on one stream at a time.
//
// pm_cuda_group_create     this process' part, of its current GPU, for world ranks (1..16): PM_CUDA_HANDLE_BYTES to
// `handle`,
//                          which the caller moves to all other ranks (zeros where the GPU does not share its memory). A wait
//                          longer than step_timeout_s (it may be infinite) is a lost peer.
// Then one of the two, the same on every rank:
// pm_cuda_group_open       the handles of all ranks, in rank order [world, PM_CUDA_HANDLE_BYTES]: the group is there.
//                          PM_UNSUPPORTED where a rank's memory cannot be mapped; the group may then be opened by NCCL.
// pm_cuda_group_try        once all ranks have opened it so: adds up numbers whose sums are known, and waits for them, ten
//                          seconds at most. PM_UNSUPPORTED where they do not come or are wrong: what could be mapped need
//                          not be shared in truth (a virtual machine, an IOMMU). The group may then be opened by NCCL.
// pm_cuda_group_open_nccl  for GPUs that do not map one another's memory: returns when all ranks have called it with the
//                          same id, PM_CUDA_NCCL_ID_BYTES, or PM_PEER_LOST after timeout_s. NCCL refuses ranks on one GPU.
//                          Its calls cannot be captured into a graph.
//
// pm_cuda_nccl_load        opens NCCL's library (dlopen): before the next two. *version as NCCL numbers it: 22703 is 2.27.3.
//                          PM_UNSUPPORTED where it cannot be used.
// pm_cuda_nccl_id          a new id, which one rank makes for all.
//
// pm_cuda_group_status     PM_OK; PM_NOT_CONNECTED; PM_PEER_LOST once a wait took too long; PM_RANKS_DISAGREE once another
//                          rank was seen to make another call (operator or sizes): what that call and all later ones wrote
//                          is of no use. It asks the host's memory alone, so after a step's results have been waited for.
// pm_cuda_group_leave      waits for this GPU and gives everything back; only when all ranks are past their last call.
// Status as device.h says, the text in the table's last_error().
#define PM_CUDA_HANDLE_BYTES 64
#define PM_CUDA_NCCL_ID_BYTES 128
int pm_cuda_group_create(int rank, int world, double step_timeout_s, void* handle);
int pm_cuda_group_open(const void* handles);
int pm_cuda_group_try(double timeout_s);
int pm_cuda_group_open_nccl(const void* id, double timeout_s);
int pm_cuda_nccl_load(const char* library, int* version);
int pm_cuda_nccl_id(void* id);
int pm_cuda_group_status(void);
void pm_cuda_group_leave(void);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_COLLECTIVE_H_
