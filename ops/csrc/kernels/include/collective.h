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

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_COLLECTIVE_H_
