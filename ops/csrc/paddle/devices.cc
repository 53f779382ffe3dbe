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

// Of a build without CUDA; kernels/cuda/table.cu has the others.
__attribute__((weak)) const pm_device_kernels* pm_cuda_kernels(void) { return nullptr; }
__attribute__((weak)) int pm_cuda_set_device(int) { return PM_UNSUPPORTED; }

}  // extern "C"
