// Threads and the choice of the instruction set. Compiled once, for baseline x86-64.
#include <cpuid.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

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

bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
// Linux gives a process the tile registers when it asks for them.
bool has_amx() {
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25, kNeeded = kAmxTile | kAmxInt8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM
  unsigned eax, ebx, ecx, edx;
  return has_vnni() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kNeeded) == kNeeded &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct Variant {
  const char* name;
  pm::Isa isa;
  bool (*available)();
};
// From the best down.
const Variant kVariants[] = {
    {"amx", pm::Isa::amx, has_amx},
    {"avx512_vnni", pm::Isa::avx512_vnni, has_vnni},
    {"avx512", pm::Isa::avx512, has_avx512},
    {"avx2", pm::Isa::avx2, has_avx2},
    {"baseline", pm::Isa::baseline, [] { return true; }},
};

pm::Isa choose_isa() {
  __builtin_cpu_init();
  const char* asked = getenv("PADDLE_MIXTRAL_ISA");
  const bool any = asked == nullptr || *asked == 0;
  for (const Variant& variant : kVariants)
    if ((any || strcmp(asked, variant.name) == 0) && variant.available()) return variant.isa;
  return pm::Isa::unknown;
}

}  // namespace

namespace pm {
Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}
bool has_bf16_tiles() {
  static const bool has = isa() == Isa::amx && __builtin_cpu_supports("amx-bf16");
  return has;
}
bool has_bf16_unit() {
  static const bool has = isa() >= Isa::avx512_vnni && __builtin_cpu_supports("avx512bf16");
  return has;
}
}  // namespace pm

extern "C" {

int pm_ops_abi_version(void) { return PM_OPS_ABI_VERSION; }
void pm_set_num_threads(int n) { g_num_threads = n; }
int pm_num_threads(void) { return g_num_threads; }

const char* pm_cpu_isa(void) {
  for (const Variant& variant : kVariants)
    if (variant.isa == pm::isa()) return variant.name;
  return nullptr;
}

}  // extern "C"
