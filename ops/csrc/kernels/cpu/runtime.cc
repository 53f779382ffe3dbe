// Threads and the choice of the instruction set. Compiled once, for baseline x86-64.
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"

namespace {

int available_processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

int g_num_threads = available_processors();

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

pm::Isa choose_isa() {
  __builtin_cpu_init();
  const char* asked = getenv("PADDLE_MIXTRAL_ISA");
  if (asked == nullptr || *asked == 0)
    return has_avx512() ? pm::Isa::avx512 : has_avx2() ? pm::Isa::avx2 : pm::Isa::baseline;
  if (strcmp(asked, "avx512") == 0 && has_avx512()) return pm::Isa::avx512;
  if (strcmp(asked, "avx2") == 0 && has_avx2()) return pm::Isa::avx2;
  if (strcmp(asked, "baseline") == 0) return pm::Isa::baseline;
  return pm::Isa::unknown;
}

}  // namespace

namespace pm {
Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}
}  // namespace pm

extern "C" {

int pm_ops_abi_version(void) { return PM_OPS_ABI_VERSION; }
void pm_set_num_threads(int n) { g_num_threads = n; }
int pm_num_threads(void) { return g_num_threads; }

const char* pm_cpu_isa(void) {
  switch (pm::isa()) {
    case pm::Isa::avx512:
      return "avx512";
    case pm::Isa::avx2:
      return "avx2";
    case pm::Isa::baseline:
      return "baseline";
    default:
      return nullptr;
  }
}

}  // extern "C"
