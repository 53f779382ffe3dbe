// What a test has asked of the emulation, and what it may ask of it: configuration.cc.
#ifndef CUDA_EMULATION_CONFIGURATION_H_
#define CUDA_EMULATION_CONFIGURATION_H_

#include <stdint.h>

#include <random>

namespace simt {

struct Configuration {
  int order = 0;
  bool late = false;
  int multiprocessors = 4;
  int capability = 8;
  bool runs = true;
  uint64_t launches_to_failure = 0;  // 0: none fails
  std::mt19937_64 random;
};

extern Configuration configuration;
extern uint64_t launches;

}  // namespace simt
#endif  // CUDA_EMULATION_CONFIGURATION_H_
