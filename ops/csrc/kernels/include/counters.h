// What the kernels of this process have done since it started: running totals, of which a measurement takes differences.
// They cost a kernel some 50 ns; any thread may read them at any time.
#ifndef PADDLE_MIXTRAL_COUNTERS_H_
#define PADDLE_MIXTRAL_COUNTERS_H_

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

// Entry number `index` of the library's timed entry points pm_cpu_NAME: its NAME, calls, and nanoseconds from call to
// return. Returns 1, or 0 where index is no entry (they are numbered from 0 without a gap).
int pm_cpu_kernel_time(int index, const char** name, int64_t* calls, int64_t* nanoseconds);

// Totals over all calls of fused_moe: calls; experts with at least one token, each of which reads its weights once a call;
// and tokens of the call's busiest expert.
void pm_cpu_expert_counts(int64_t* calls, int64_t* experts_hit, int64_t* busiest_tokens);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_COUNTERS_H_
