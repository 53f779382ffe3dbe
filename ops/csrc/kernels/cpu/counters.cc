// Running totals of the kernels: include/counters.h. Compiled once, for baseline x86-64.
#include "../include/counters.h"

#include <time.h>

#include "counters.h"

namespace pm {
namespace {

KernelClock* g_clocks = nullptr;  // written while the library is loaded, by one thread
std::atomic<int64_t> g_moe_calls{0}, g_experts_hit{0}, g_busiest_tokens{0};

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

void add(std::atomic<int64_t>& total, int64_t n) { total.fetch_add(n, std::memory_order_relaxed); }

}  // namespace

KernelClock::KernelClock(const char* entry_name) : name(entry_name), next(g_clocks) { g_clocks = this; }

TimedCall::TimedCall(KernelClock& clock) : clock_(clock), started_(now()) {}
TimedCall::~TimedCall() {
  add(clock_.calls, 1);
  add(clock_.nanoseconds, now() - started_);
}

void count_experts(int64_t hit, int64_t busiest_tokens) {
  add(g_moe_calls, 1);
  add(g_experts_hit, hit);
  add(g_busiest_tokens, busiest_tokens);
}

}  // namespace pm

extern "C" {

int pm_cpu_kernel_time(int index, const char** name, int64_t* calls, int64_t* nanoseconds) {
  const pm::KernelClock* clock = index < 0 ? nullptr : pm::g_clocks;
  while (clock != nullptr && index-- > 0) clock = clock->next;
  if (clock == nullptr) return 0;
  *name = clock->name;
  *calls = clock->calls.load(std::memory_order_relaxed);
  *nanoseconds = clock->nanoseconds.load(std::memory_order_relaxed);
  return 1;
}

void pm_cpu_expert_counts(int64_t* calls, int64_t* experts_hit, int64_t* busiest_tokens) {
  *calls = pm::g_moe_calls.load(std::memory_order_relaxed);
  *experts_hit = pm::g_experts_hit.load(std::memory_order_relaxed);
  *busiest_tokens = pm::g_busiest_tokens.load(std::memory_order_relaxed);
}

}  // extern "C"
