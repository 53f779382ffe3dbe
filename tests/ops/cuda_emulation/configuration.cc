// The emulation's face to tests.
#include "configuration.h"

#include "simt.h"

namespace simt {

Configuration configuration;
uint64_t launches;

namespace {
uint64_t waits;
}

int multiprocessors() { return configuration.multiprocessors; }
int capability() { return configuration.capability; }
size_t most_shared() { return (configuration.capability >= 9 ? 227 : 163) * 1024; }
void count_wait() { ++waits; }

}  // namespace simt

extern "C" {

__attribute__((visibility("default"))) void pm_emulation_configure(int order, int late, uint64_t seed, int multiprocessors,
                                                                   int capability) {
  simt::configuration.order = order;
  simt::configuration.late = late != 0;
  simt::configuration.multiprocessors = multiprocessors;
  simt::configuration.capability = capability;
  simt::configuration.random.seed(seed);
}

// 0: launches from now on are held to the GPU's limits and counted, but their kernels do not run; so pointers may be any.
__attribute__((visibility("default"))) void pm_emulation_run(int runs) { simt::configuration.runs = runs != 0; }

// Of the launches from now on the `which`-th, counted from 1, fails; 0: none.
__attribute__((visibility("default"))) void pm_emulation_fail(uint64_t which) {
  simt::configuration.launches_to_failure = which;
}

// So far: launches, and calls by which the host waits for the device or has it allocate.
__attribute__((visibility("default"))) uint64_t pm_emulation_launches() { return simt::launches; }
__attribute__((visibility("default"))) uint64_t pm_emulation_waits() { return simt::waits; }
}
