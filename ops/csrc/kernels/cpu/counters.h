// How kernels count what include/counters.h reports.
#ifndef PADDLE_MIXTRAL_CPU_COUNTERS_H_
#define PADDLE_MIXTRAL_CPU_COUNTERS_H_

#include <stdint.h>

#include <atomic>

namespace pm {

// One entry point's share; a static object, which registers itself when the library is loaded.
struct KernelClock {
  explicit KernelClock(const char* entry_name);
  const char* const name;
  std::atomic<int64_t> calls{0}, nanoseconds{0};
  KernelClock* next;
};

// Adds the time from its construction to its destruction to a clock.
class TimedCall {
 public:
  explicit TimedCall(KernelClock& clock);
  ~TimedCall();
  TimedCall(const TimedCall&) = delete;
  TimedCall& operator=(const TimedCall&) = delete;

 private:
  KernelClock& clock_;
  const int64_t started_;
};

// For fused_moe, once a call: experts that had a token, tokens of the busiest.
void count_experts(int64_t hit, int64_t busiest_tokens);

}  // namespace pm
#endif  // PADDLE_MIXTRAL_CPU_COUNTERS_H_
