// Collectives between the ranks of one job on one machine, over POSIX shared memory.
//
// pm_cpu_group_join   every rank calls it once, with the same name (unique per job), world size and time-out; it returns when
//                     all have joined, PM_PEER_LOST when they have not within timeout_s. The shared memory's name is removed
//                     as soon as all have it mapped, so nothing outlives the processes however they end.
// pm_cpu_group_leave  forgets the group (for tests and for an orderly end).
// pm_cpu_all_reduce   x [n] float32, in place: the sum over ranks, added in rank order (the same bits on every rank).
// pm_cpu_all_gather   x [rows, cols] of every rank -> y [rows, world * cols] float32: rank r's columns at r * cols.
// A rank that dies (its process gone or a zombie) makes the others return PM_PEER_LOST within a second; so does one that does
// not arrive within timeout_s.
#ifndef PADDLE_MIXTRAL_COLLECTIVE_H_
#define PADDLE_MIXTRAL_COLLECTIVE_H_

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

int pm_cpu_group_join(const char* name, int rank, int world, double timeout_s);
void pm_cpu_group_leave(void);
int pm_cpu_group_rank(void);   // 0 when no group has been joined
int pm_cpu_group_world(void);  // 1 when no group has been joined
int pm_cpu_all_reduce(float* x, int64_t n, void* stream);
int pm_cpu_all_gather(const float* x, float* y, int64_t rows, int64_t cols, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_COLLECTIVE_H_
