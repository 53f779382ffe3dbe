// What the flavours of plugin.h share.
#include "plugin.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace {
std::atomic<int64_t> g_copies[pm::device::kDirections];
}

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

PM_PLUGIN void InitPlugin(CustomRuntimeParams* params) {
  PADDLE_CUSTOM_RUNTIME_CHECK_VERSION(params);
  params->device_type = const_cast<char*>(pm_plugin_device_type());
  params->sub_device_type = const_cast<char*>("");
  pm::device::fill(params->interface);
}
