// One C entry point for the variants of a kernel: PM_EXPORT(name, (parameters), (arguments)) at the end of a family's file
// defines `int pm_cpu_name(parameters)`, which calls pm::avx512::name, pm::avx2::name or pm::baseline::name, whichever
// pm_cpu_isa() says, and counts its calls and time. avx512_vnni and amx are avx512 with faster units for int8 and bfloat16,
// which its kernels choose. Every variant's object defines its own; the baseline's object alone holds the entry point.
#ifndef PADDLE_MIXTRAL_DISPATCH_H_
#define PADDLE_MIXTRAL_DISPATCH_H_

#include "../include/common.h"
#include "counters.h"
#include "vec.h"

namespace pm {
enum class Isa { unknown, baseline, avx2, avx512, avx512_vnni, amx };
bool has_bf16_tiles();  // tdpbf16ps, and the variant in use is amx
bool has_bf16_unit();   // vdpbf16ps, and the variant in use is avx512_vnni or amx: one named avx512 has multiply-adds alone
Isa isa();  // the variant in use; the baseline where PADDLE_MIXTRAL_ISA could not be obeyed (loading refuses that first)
}  // namespace pm

#ifdef PM_ISA_IS_BASELINE
#define PM_EXPORT(name, parameters, arguments)   \
  namespace pm {                                 \
  namespace avx512 {                             \
  int name parameters;                           \
  }                                              \
  namespace avx2 {                               \
  int name parameters;                           \
  }                                              \
  }                                              \
  static pm::KernelClock pm_clock_##name(#name); \
  extern "C" int pm_cpu_##name parameters {      \
    const pm::TimedCall timed(pm_clock_##name);  \
    switch (pm::isa()) {                         \
      case pm::Isa::amx:                         \
      case pm::Isa::avx512_vnni:                 \
      case pm::Isa::avx512:                      \
        return pm::avx512::name arguments;       \
      case pm::Isa::avx2:                        \
        return pm::avx2::name arguments;         \
      default:                                   \
        return pm::baseline::name arguments;     \
    }                                            \
  }
#else
#define PM_EXPORT(name, parameters, arguments)
#endif

#endif  // PADDLE_MIXTRAL_DISPATCH_H_
