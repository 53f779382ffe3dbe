// The kernels of CustomDevices by their type: target.h.
#include <map>
#include <mutex>
#include <string>

#include "../kernels/include/device.h"

namespace {

std::mutex g_mutex;
std::map<std::string, const pm_device_kernels*>& registered() {
  static std::map<std::string, const pm_device_kernels*> devices;
  return devices;
}

}  // namespace

extern "C" {

void pm_register_device(const char* device_type, const pm_device_kernels* kernels) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  registered()[device_type] = kernels;
}

const pm_device_kernels* pm_registered_device(const char* device_type) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const auto found = registered().find(device_type);
  return found == registered().end() ? nullptr : found->second;
}

int pm_device_expert_counts(const char* device_type, int device, int64_t* calls, int64_t* experts_hit,
                            int64_t* busiest_tokens) {
  const pm_device_kernels* kernels = device_type[0] ? pm_registered_device(device_type) : pm_cuda_kernels();
  if (kernels == pm_cuda_kernels())
    if (const int status = pm_cuda_set_device(device)) return status;
  return kernels->expert_counts(calls, experts_hit, busiest_tokens);
}

// Of a build without CUDA; kernels/cuda/table.cu has the others.
__attribute__((weak)) const pm_device_kernels* pm_cuda_kernels(void) { return nullptr; }
__attribute__((weak)) int pm_cuda_set_device(int) { return PM_UNSUPPORTED; }

}  // extern "C"
