// A Paddle CustomDevice runtime: device memory, streams and events behind Paddle's C interface, with our kernels' table.
//
// One plug-in is plugin.cc and one flavour: cuda.cc drives NVIDIA GPUs from the Paddle for CPUs; mock.cc has a "device" of
// host memory that the CPU cannot touch at the address Paddle sees, so that tests find every access that should not be.
// Paddle loads the libraries of the folder CUSTOM_DEVICE_ROOT as it is imported; ops/device.py says which and talks to the
// functions below.
#ifndef PADDLE_MIXTRAL_DEVICE_PLUGIN_H_
#define PADDLE_MIXTRAL_DEVICE_PLUGIN_H_

#include <cstddef>
#include <cstdint>

#include "../kernels/include/device.h"
#include "paddle/phi/backends/device_ext.h"

#define PM_PLUGIN extern "C" __attribute__((visibility("default")))

// The type's name at Paddle.
PM_PLUGIN const char* pm_plugin_device_type(void);
// The kernels for this memory; `operators` is dlopen's handle of libpaddle_mixtral.so. NULL where it lacks them.
PM_PLUGIN const pm_device_kernels* pm_plugin_kernels(void* operators);
// For whoever has no other way to a device's memory, through Paddle or beside it. They return 0, or -1 where the device
// refuses (it says why on stderr).
// Bytes of a device: all, and those nobody holds.
PM_PLUGIN int pm_plugin_memory(int device, int64_t* total, int64_t* free);
// Enqueues a copy within a device's memory. Whoever has work under way elsewhere waits for it first.
PM_PLUGIN int pm_plugin_copy(int device, void* to, const void* from, int64_t size);
// Waits for all work of a device.
PM_PLUGIN int pm_plugin_synchronize(int device);
// What the device is called, cut to `size` bytes with the 0 at its end.
PM_PLUGIN int pm_plugin_name(int device, char* name, int size);
// Copies since the process began: host to device, device to host, device to device.
PM_PLUGIN void pm_plugin_copies(int64_t* h2d, int64_t* d2h, int64_t* d2d);

namespace pm::device {

// Each flavour's.
void fill(C_DeviceInterface* interface);

enum Direction { kHostToDevice, kDeviceToHost, kDeviceToDevice, kDirections };
void count_copy(Direction direction);

// Paddle reports a failure by its code alone, so the text goes to stderr. Returns C_FAILED.
__attribute__((format(printf, 1, 2))) C_Status fail(const char* format, ...);

}  // namespace pm::device
#endif  // PADDLE_MIXTRAL_DEVICE_PLUGIN_H_
