// What the mock device's kernels need of its runtime.
#ifndef PADDLE_MIXTRAL_DEVICE_MOCK_H_
#define PADDLE_MIXTRAL_DEVICE_MOCK_H_

#include <cstddef>

namespace pm::device {

// Where the CPU reaches `size` bytes at a device address; NULL where that is no allocated memory of the device.
void* mock_host(const void* p, size_t size = 1);
bool mock_is_stream(void* stream);

}  // namespace pm::device
#endif  // PADDLE_MIXTRAL_DEVICE_MOCK_H_
