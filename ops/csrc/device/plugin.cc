// What the flavours of plugin.h share.
#include "plugin.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace {

std::atomic<int64_t> g_copies[pm::device::kDirections];

// Filled apart from Paddle's, which may be one for GPUs and never ask for it.
const C_DeviceInterface& interface() {
  static const C_DeviceInterface filled = [] {
    C_DeviceInterface empty = {};
    pm::device::fill(&empty);
    return empty;
  }();
  return filled;
}

int result(C_Status status) { return status == C_SUCCESS ? 0 : -1; }

}  // namespace

namespace pm::device {

void count_copy(Direction direction) { g_copies[direction].fetch_add(1, std::memory_order_relaxed); }

C_Status fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "%s: %s\n", pm_plugin_device_type(), text);
  return C_FAILED;
}

}  // namespace pm::device

void pm_plugin_copies(int64_t* h2d, int64_t* d2h, int64_t* d2d) {
  *h2d = g_copies[pm::device::kHostToDevice];
  *d2h = g_copies[pm::device::kDeviceToHost];
  *d2d = g_copies[pm::device::kDeviceToDevice];
}

int pm_plugin_memory(int device, int64_t* total, int64_t* free) {
  size_t all = 0, unused = 0;
  C_Device_st id = {device};
  const int status = result(interface().device_memory_stats(&id, &all, &unused));
  *total = static_cast<int64_t>(all);
  *free = static_cast<int64_t>(unused);
  return status;
}

int pm_plugin_copy(int device, void* to, const void* from, int64_t size) {
  C_Device_st id = {device};
  return result(interface().memory_copy_d2d(&id, to, from, static_cast<size_t>(size)));
}

int pm_plugin_synchronize(int device) {
  C_Device_st id = {device};
  return result(interface().synchronize_device(&id));
}

PM_PLUGIN void InitPlugin(CustomRuntimeParams* params) {
  PADDLE_CUSTOM_RUNTIME_CHECK_VERSION(params);
  params->device_type = const_cast<char*>(pm_plugin_device_type());
  params->sub_device_type = const_cast<char*>("");
  pm::device::fill(params->interface);
}
