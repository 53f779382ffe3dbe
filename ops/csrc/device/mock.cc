// A device of host memory, for tests on machines without one. Its memory is mapped twice: at the addresses Paddle sees
// nothing may be read or written (PROT_NONE), so an access by the CPU ends the process; the runtime's copies and the
// kernels, which are the CPU's, use the second mapping. All work is done when a call returns.
#include "mock.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <set>

#include "plugin.h"

namespace pm::device {
namespace {

constexpr size_t kCapacity = size_t{1} << 30;  // of addresses; memory is taken as it is written
constexpr size_t kAlignment = 512;

// The blocks in use and the gaps between them, by offset.
class Arena {
 public:
  bool open() {
    const int file = memfd_create("pm_mock", 0);
    if (file < 0 || ftruncate(file, kCapacity) != 0) return false;
    device_ = static_cast<char*>(mmap(nullptr, kCapacity, PROT_NONE, MAP_SHARED, file, 0));
    host_ = static_cast<char*>(mmap(nullptr, kCapacity, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    close(file);
    gaps_[0] = kCapacity;
    return device_ != MAP_FAILED && host_ != MAP_FAILED;
  }

  // First fit; NULL where no gap is large enough.
  void* allocate(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size = (size + kAlignment - 1) / kAlignment * kAlignment;
    for (auto gap = gaps_.begin(); gap != gaps_.end(); ++gap) {
      if (gap->second < size) continue;
      const auto [offset, room] = *gap;
      gaps_.erase(gap);
      if (room > size) gaps_[offset + size] = room - size;
      blocks_[offset] = size;
      return device_ + offset;
    }
    return nullptr;
  }

  // False where no block begins there.
  bool release(const void* p) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto block = blocks_.find(static_cast<const char*>(p) - device_);
    if (block == blocks_.end()) return false;
    auto gap = gaps_.emplace(*block).first;
    blocks_.erase(block);
    if (const auto next = std::next(gap); next != gaps_.end() && gap->first + gap->second == next->first) {
      gap->second += next->second;
      gaps_.erase(next);
    }
    if (gap != gaps_.begin()) {
      const auto before = std::prev(gap);
      if (before->first + before->second == gap->first) {
        before->second += gap->second;
        gaps_.erase(gap);
      }
    }
    return true;
  }

  // Where the runtime reaches `size` bytes at p; NULL unless they lie in one block.
  char* host(const void* p, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const char* address = static_cast<const char*>(p);
    if (address < device_ || address >= device_ + kCapacity) return nullptr;
    const size_t offset = address - device_;
    auto block = blocks_.upper_bound(offset);
    if (block == blocks_.begin()) return nullptr;
    --block;
    return offset + size <= block->first + block->second ? host_ + offset : nullptr;
  }

  size_t free_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t bytes = 0;
    for (const auto& gap : gaps_) bytes += gap.second;
    return bytes;
  }

 private:
  std::mutex mutex_;
  char *device_ = nullptr, *host_ = nullptr;
  std::map<size_t, size_t> blocks_, gaps_;
};

// Streams and events exist, and nothing else: work on them is done at once.
class Handles {
 public:
  void* make() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return *known_.insert(new char).first;
  }
  bool drop(void* handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (known_.erase(static_cast<char*>(handle)) == 0) return false;
    delete static_cast<char*>(handle);
    return true;
  }
  bool knows(void* handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return known_.count(static_cast<char*>(handle)) != 0;
  }

 private:
  std::mutex mutex_;
  std::set<char*> known_;
};

// Never destroyed: Paddle gives back what it holds until the very end of the process.
Arena& g_arena = *new Arena;
Handles &g_streams = *new Handles, &g_events = *new Handles;

C_Status initialize() { return g_arena.open() ? C_SUCCESS : fail("no memory for the arena"); }
C_Status succeed() { return C_SUCCESS; }
C_Status on_device(const C_Device device) {
  return device->id == 0 ? C_SUCCESS : fail("device %d of one device", device->id);
}
C_Status get_device(const C_Device device) {
  device->id = 0;
  return C_SUCCESS;
}

C_Status known_stream(C_Stream stream) {
  return g_streams.knows(stream) ? C_SUCCESS : fail("%p is no stream", static_cast<void*>(stream));
}
C_Status known_event(C_Event event) {
  return g_events.knows(event) ? C_SUCCESS : fail("%p is no event", static_cast<void*>(event));
}
C_Status both(C_Status a, C_Status b) { return a == C_SUCCESS ? b : a; }

C_Status create_stream(const C_Device, C_Stream* stream) {
  *stream = static_cast<C_Stream>(g_streams.make());
  return C_SUCCESS;
}
C_Status destroy_stream(const C_Device, C_Stream stream) {
  return g_streams.drop(stream) ? C_SUCCESS : known_stream(stream);
}
C_Status on_stream(const C_Device, C_Stream stream) { return known_stream(stream); }
C_Status add_callback(const C_Device device, C_Stream stream, C_Callback callback, void* user_data) {
  C_Status status = known_stream(stream);
  if (status == C_SUCCESS) callback(device, stream, user_data, &status);
  return status;
}
C_Status create_event(const C_Device, C_Event* event) {
  *event = static_cast<C_Event>(g_events.make());
  return C_SUCCESS;
}
C_Status destroy_event(const C_Device, C_Event event) { return g_events.drop(event) ? C_SUCCESS : known_event(event); }
C_Status on_event(const C_Device, C_Event event) { return known_event(event); }
C_Status on_both(const C_Device, C_Stream stream, C_Event event) { return both(known_stream(stream), known_event(event)); }

C_Status allocate(const C_Device, void** p, size_t size) {
  *p = g_arena.allocate(size);
  return *p ? C_SUCCESS : fail("no %zu bytes left of %zu", size, kCapacity);
}
C_Status release(const C_Device, void* p, size_t) {
  return g_arena.release(p) ? C_SUCCESS : fail("%p was not allocated", p);
}
C_Status set(const C_Device, void* p, unsigned char value, size_t size) {
  char* to = g_arena.host(p, size);
  if (!to) return fail("set of %zu bytes at %p, which is no memory of the device", size, p);
  std::memset(to, value, size);
  return C_SUCCESS;
}
C_Status host_allocate(const C_Device, void** p, size_t size) {
  *p = std::malloc(size);
  return *p ? C_SUCCESS : fail("no %zu bytes of host memory", size);
}
C_Status host_release(const C_Device, void* p, size_t) {
  std::free(p);
  return C_SUCCESS;
}

C_Status copy(Direction direction, void* to, const void* from, size_t size) {
  if (direction != kDeviceToHost) to = g_arena.host(to, size);
  if (direction != kHostToDevice) from = g_arena.host(from, size);
  if (!to || !from) return fail("copy of %zu bytes to or from what is no memory of the device", size);
  count_copy(direction);
  std::memmove(to, from, size);
  return C_SUCCESS;
}
template <Direction kDirection>
C_Status copy_now(const C_Device, void* to, const void* from, size_t size) {
  return copy(kDirection, to, from, size);
}
template <Direction kDirection>
C_Status copy_async(const C_Device, C_Stream stream, void* to, const void* from, size_t size) {
  const C_Status status = known_stream(stream);
  return status == C_SUCCESS ? copy(kDirection, to, from, size) : status;
}

C_Status device_count(size_t* count) {
  *count = 1;
  return C_SUCCESS;
}
C_Status device_list(size_t* devices) {
  devices[0] = 0;
  return C_SUCCESS;
}
C_Status memory_stats(const C_Device device, size_t* total, size_t* free) {
  *total = kCapacity;
  *free = g_arena.free_bytes();
  return on_device(device);
}
C_Status min_chunk_size(const C_Device, size_t* size) {
  *size = kAlignment;
  return C_SUCCESS;
}
C_Status capability(const C_Device, size_t* found) {
  *found = 0;
  return C_SUCCESS;
}
C_Status no(const C_Device, bool* supported) {
  *supported = false;
  return C_SUCCESS;
}
C_Status yes(const C_Device, bool* supported) {
  *supported = true;
  return C_SUCCESS;
}

}  // namespace

void* mock_host(const void* p, size_t size) { return g_arena.host(p, size); }
bool mock_is_stream(void* stream) { return g_streams.knows(stream); }

void fill(C_DeviceInterface* interface) {
  interface->initialize = initialize;
  interface->finalize = succeed;
  interface->init_device = interface->set_device = interface->deinit_device = on_device;
  interface->synchronize_device = on_device;
  interface->get_device = get_device;
  interface->create_stream = create_stream;
  interface->destroy_stream = destroy_stream;
  interface->query_stream = interface->synchronize_stream = on_stream;
  interface->stream_add_callback = add_callback;
  interface->create_event = create_event;
  interface->destroy_event = destroy_event;
  interface->query_event = interface->synchronize_event = on_event;
  interface->record_event = interface->stream_wait_event = on_both;
  interface->device_memory_allocate = allocate;
  interface->device_memory_deallocate = release;
  interface->device_memory_set = set;
  interface->host_memory_allocate = interface->unified_memory_allocate = host_allocate;
  interface->host_memory_deallocate = interface->unified_memory_deallocate = host_release;
  interface->memory_copy_h2d = copy_now<kHostToDevice>;
  interface->memory_copy_d2h = copy_now<kDeviceToHost>;
  interface->memory_copy_d2d = copy_now<kDeviceToDevice>;
  interface->async_memory_copy_h2d = copy_async<kHostToDevice>;
  interface->async_memory_copy_d2h = copy_async<kDeviceToHost>;
  interface->async_memory_copy_d2d = copy_async<kDeviceToDevice>;
  interface->get_device_count = device_count;
  interface->get_device_list = device_list;
  interface->device_memory_stats = memory_stats;
  interface->device_min_chunk_size = min_chunk_size;
  interface->get_compute_capability = capability;
  interface->is_float16_supported = no;
  interface->is_bfloat16_supported = yes;
}

}  // namespace pm::device

const char* pm_plugin_device_type(void) { return "pm_mock"; }

int pm_plugin_name(int device, char* name, int size) {
  C_Device_st id = {device};
  if (pm::device::on_device(&id) != C_SUCCESS) return -1;
  std::snprintf(name, static_cast<size_t>(size), "host memory");
  return 0;
}
