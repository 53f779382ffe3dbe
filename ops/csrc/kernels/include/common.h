// What every kernel family of this library shares: element types, status codes, threads and the instruction set in use.
//
// The C ABI: plain functions on raw pointers and sizes, row-major and contiguous unless a header says otherwise. Every entry
// point returns PM_OK or a status below and takes a `stream` last (unused on a CPU). Kernels assume the contract of their
// header; whoever calls them (ops/csrc/paddle) has checked it.
#ifndef PADDLE_MIXTRAL_COMMON_H_
#define PADDLE_MIXTRAL_COMMON_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Raised whenever an operator's inputs, outputs, attributes or meaning change. Exported programs record it.
#define PM_OPS_ABI_VERSION 6

typedef enum {
  PM_F32 = 0,
  PM_BF16 = 1,
  PM_F16 = 2,
  PM_I8 = 3,  // only of weights
} pm_dtype;

typedef enum {
  PM_OK = 0,
  PM_OUT_OF_MEMORY = 1,   // a kernel's own scratch could not be allocated
  PM_PEER_LOST = 2,       // collective: another rank died or did not arrive in time
  PM_NOT_CONNECTED = 3,   // collective: no group has been joined
  PM_NOT_FINITE = 4,      // sampling: a row of logits holds NaN or +inf, or nothing above -inf
  PM_RANKS_DISAGREE = 5,  // collective: the ranks made different calls
  PM_UNSUPPORTED = 6,     // device: no kernel for these sizes or types
  PM_LAUNCH_FAILED = 7,   // device: its runtime refused a call
} pm_status;

int pm_ops_abi_version(void);

// Threads a kernel may use; n >= 1. Default: the processors this process may run on.
void pm_set_num_threads(int n);
int pm_num_threads(void);

// "amx", "avx512_vnni", "avx512", "avx2" or "baseline": the best this processor has, or what PADDLE_MIXTRAL_ISA asks for.
// NULL when PADDLE_MIXTRAL_ISA names something this processor or this build does not have.
const char* pm_cpu_isa(void);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_COMMON_H_
