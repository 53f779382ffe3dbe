// NVIDIA GPUs as a CustomDevice, so that the Paddle for CPUs drives them. Streams are blocking ones: copies without a
// stream, which Paddle makes, then keep their place among the kernels.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>

#include "plugin.h"

namespace pm::device {
namespace {

// The call's result as Paddle wants it; a failure is told with the runtime's words. Paddle gives memory back until the very
// end of the process, when CUDA has gone, and all it held.
#define PM_CUDA(call)                                                             \
  do {                                                                            \
    const cudaError_t error = (call);                                             \
    if (error == cudaErrorCudartUnloading) return C_SUCCESS;                      \
    if (error != cudaSuccess) {                                                   \
      (void)cudaGetLastError(); /* or the next kernel's launch would report it */ \
      return fail("%s: %s", #call, cudaGetErrorString(error));                    \
    }                                                                             \
  } while (false)

cudaStream_t of(C_Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }
cudaEvent_t of(C_Event event) { return reinterpret_cast<cudaEvent_t>(event); }

C_Status succeed() { return C_SUCCESS; }
// Paddle begins every device as it is imported; a context, and the memory it takes, waits for the first use.
C_Status begin_or_end(const C_Device) { return C_SUCCESS; }
C_Status use(const C_Device device) {
  PM_CUDA(cudaSetDevice(device->id));
  return C_SUCCESS;
}
C_Status get_device(const C_Device device) {
  PM_CUDA(cudaGetDevice(&device->id));
  return C_SUCCESS;
}
C_Status synchronize(const C_Device device) {
  PM_CUDA(cudaSetDevice(device->id));
  PM_CUDA(cudaDeviceSynchronize());
  return C_SUCCESS;
}

C_Status create_stream(const C_Device device, C_Stream* stream) {
  PM_CUDA(cudaSetDevice(device->id));
  PM_CUDA(cudaStreamCreate(reinterpret_cast<cudaStream_t*>(stream)));
  return C_SUCCESS;
}
C_Status destroy_stream(const C_Device, C_Stream stream) {
  PM_CUDA(cudaStreamDestroy(of(stream)));
  return C_SUCCESS;
}
C_Status query_stream(const C_Device, C_Stream stream) {
  if (cudaStreamQuery(of(stream)) == cudaErrorNotReady) return C_WARNING;
  PM_CUDA(cudaStreamQuery(of(stream)));
  return C_SUCCESS;
}
C_Status synchronize_stream(const C_Device, C_Stream stream) {
  PM_CUDA(cudaStreamSynchronize(of(stream)));
  return C_SUCCESS;
}

struct Callback {
  C_Device_st device;
  C_Stream stream;
  C_Callback function;
  void* user_data;
};
C_Status add_callback(const C_Device device, C_Stream stream, C_Callback function, void* user_data) {
  const auto call = [](void* given) {
    Callback* callback = static_cast<Callback*>(given);
    C_Status status = C_SUCCESS;
    callback->function(&callback->device, callback->stream, callback->user_data, &status);
    delete callback;
  };
  Callback* callback = new Callback{*device, stream, function, user_data};
  if (const cudaError_t error = cudaLaunchHostFunc(of(stream), call, callback); error != cudaSuccess) {
    delete callback;
    return fail("cudaLaunchHostFunc: %s", cudaGetErrorString(error));
  }
  return C_SUCCESS;
}

C_Status create_event(const C_Device device, C_Event* event) {
  PM_CUDA(cudaSetDevice(device->id));
  PM_CUDA(cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event), cudaEventDisableTiming));
  return C_SUCCESS;
}
C_Status destroy_event(const C_Device, C_Event event) {
  PM_CUDA(cudaEventDestroy(of(event)));
  return C_SUCCESS;
}
C_Status record_event(const C_Device, C_Stream stream, C_Event event) {
  PM_CUDA(cudaEventRecord(of(event), of(stream)));
  return C_SUCCESS;
}
C_Status query_event(const C_Device, C_Event event) {
  if (cudaEventQuery(of(event)) == cudaErrorNotReady) return C_WARNING;
  PM_CUDA(cudaEventQuery(of(event)));
  return C_SUCCESS;
}
C_Status synchronize_event(const C_Device, C_Event event) {
  PM_CUDA(cudaEventSynchronize(of(event)));
  return C_SUCCESS;
}
C_Status wait_event(const C_Device, C_Stream stream, C_Event event) {
  PM_CUDA(cudaStreamWaitEvent(of(stream), of(event), 0));
  return C_SUCCESS;
}

C_Status allocate(const C_Device device, void** p, size_t size) {
  PM_CUDA(cudaSetDevice(device->id));
  if (cudaMalloc(p, size) == cudaSuccess) return C_SUCCESS;
  (void)cudaGetLastError();
  size_t free = 0, total = 0;
  PM_CUDA(cudaMemGetInfo(&free, &total));
  return fail("no %zu bytes left on device %d: %zu of %zu are free", size, device->id, free, total);
}
C_Status release(const C_Device device, void* p, size_t) {
  PM_CUDA(cudaSetDevice(device->id));
  PM_CUDA(cudaFree(p));
  return C_SUCCESS;
}
C_Status set(const C_Device device, void* p, unsigned char value, size_t size) {
  PM_CUDA(cudaSetDevice(device->id));
  PM_CUDA(cudaMemset(p, value, size));
  return C_SUCCESS;
}
C_Status host_allocate(const C_Device device, void** p, size_t size) {
  PM_CUDA(cudaSetDevice(device->id));
  PM_CUDA(cudaMallocHost(p, size));
  return C_SUCCESS;
}
C_Status host_release(const C_Device, void* p, size_t) {
  PM_CUDA(cudaFreeHost(p));
  return C_SUCCESS;
}
C_Status unified_allocate(const C_Device device, void** p, size_t size) {
  PM_CUDA(cudaSetDevice(device->id));
  PM_CUDA(cudaMallocManaged(p, size));
  return C_SUCCESS;
}

constexpr cudaMemcpyKind kKinds[kDirections] = {cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice};

template <Direction kDirection>
C_Status copy_now(const C_Device device, void* to, const void* from, size_t size) {
  count_copy(kDirection);
  PM_CUDA(cudaSetDevice(device->id));
  PM_CUDA(cudaMemcpy(to, from, size, kKinds[kDirection]));
  return C_SUCCESS;
}
template <Direction kDirection>
C_Status copy_async(const C_Device device, C_Stream stream, void* to, const void* from, size_t size) {
  count_copy(kDirection);
  PM_CUDA(cudaSetDevice(device->id));
  PM_CUDA(cudaMemcpyAsync(to, from, size, kKinds[kDirection], of(stream)));
  // Paddle reads what it has copied to the host without waiting for the stream.
  if (kDirection == kDeviceToHost) PM_CUDA(cudaStreamSynchronize(of(stream)));
  return C_SUCCESS;
}
C_Status copy_peer_now(const C_Device to_device, const C_Device from_device, void* to, const void* from, size_t size) {
  count_copy(kDeviceToDevice);
  PM_CUDA(cudaMemcpyPeer(to, to_device->id, from, from_device->id, size));
  return C_SUCCESS;
}
C_Status copy_peer_async(const C_Device to_device, const C_Device from_device, C_Stream stream, void* to, const void* from,
                         size_t size) {
  count_copy(kDeviceToDevice);
  PM_CUDA(cudaMemcpyPeerAsync(to, to_device->id, from, from_device->id, size, of(stream)));
  return C_SUCCESS;
}

// Without a driver or a GPU there are none, and Paddle goes on without.
C_Status device_count(size_t* count) {
  int found = 0;
  *count = cudaGetDeviceCount(&found) == cudaSuccess ? static_cast<size_t>(found) : 0;
  (void)cudaGetLastError();
  return C_SUCCESS;
}
C_Status device_list(size_t* devices) {
  size_t count = 0;
  device_count(&count);
  for (size_t i = 0; i < count; ++i) devices[i] = i;
  return C_SUCCESS;
}
C_Status memory_stats(const C_Device device, size_t* total, size_t* free) {
  PM_CUDA(cudaSetDevice(device->id));
  PM_CUDA(cudaMemGetInfo(free, total));
  return C_SUCCESS;
}
C_Status min_chunk_size(const C_Device, size_t* size) {
  *size = 512;
  return C_SUCCESS;
}
C_Status attribute(const C_Device device, cudaDeviceAttr wanted, size_t* found) {
  int value = 0;
  PM_CUDA(cudaDeviceGetAttribute(&value, wanted, device->id));
  *found = static_cast<size_t>(value);
  return C_SUCCESS;
}
C_Status capability(const C_Device device, size_t* found) {
  size_t major = 0, minor = 0;
  if (attribute(device, cudaDevAttrComputeCapabilityMajor, &major) != C_SUCCESS) return C_FAILED;
  if (attribute(device, cudaDevAttrComputeCapabilityMinor, &minor) != C_SUCCESS) return C_FAILED;
  *found = major * 10 + minor;
  return C_SUCCESS;
}
C_Status multi_processors(const C_Device device, size_t* found) {
  return attribute(device, cudaDevAttrMultiProcessorCount, found);
}
C_Status yes(const C_Device, bool* supported) {
  *supported = true;
  return C_SUCCESS;
}

}  // namespace

void fill(C_DeviceInterface* interface) {
  interface->initialize = interface->finalize = succeed;
  interface->init_device = interface->deinit_device = begin_or_end;
  interface->set_device = use;
  interface->get_device = get_device;
  interface->synchronize_device = synchronize;
  interface->create_stream = create_stream;
  interface->destroy_stream = destroy_stream;
  interface->query_stream = query_stream;
  interface->synchronize_stream = synchronize_stream;
  interface->stream_add_callback = add_callback;
  interface->create_event = create_event;
  interface->destroy_event = destroy_event;
  interface->record_event = record_event;
  interface->query_event = query_event;
  interface->synchronize_event = synchronize_event;
  interface->stream_wait_event = wait_event;
  interface->device_memory_allocate = allocate;
  interface->device_memory_deallocate = release;
  interface->device_memory_set = set;
  interface->host_memory_allocate = host_allocate;
  interface->host_memory_deallocate = host_release;
  interface->unified_memory_allocate = unified_allocate;
  interface->unified_memory_deallocate = release;
  interface->memory_copy_h2d = copy_now<kHostToDevice>;
  interface->memory_copy_d2h = copy_now<kDeviceToHost>;
  interface->memory_copy_d2d = copy_now<kDeviceToDevice>;
  interface->async_memory_copy_h2d = copy_async<kHostToDevice>;
  interface->async_memory_copy_d2h = copy_async<kDeviceToHost>;
  interface->async_memory_copy_d2d = copy_async<kDeviceToDevice>;
  interface->memory_copy_p2p = copy_peer_now;
  interface->async_memory_copy_p2p = copy_peer_async;
  interface->get_device_count = device_count;
  interface->get_device_list = device_list;
  interface->device_memory_stats = memory_stats;
  interface->device_min_chunk_size = min_chunk_size;
  interface->get_compute_capability = capability;
  interface->get_multi_process = multi_processors;
  interface->is_float16_supported = interface->is_bfloat16_supported = yes;
}

}  // namespace pm::device

const char* pm_plugin_device_type(void) { return "pm_cuda"; }

const pm_device_kernels* pm_plugin_kernels(void* operators) {
  const auto kernels = reinterpret_cast<decltype(&pm_cuda_kernels)>(dlsym(operators, "pm_cuda_kernels"));
  return kernels ? kernels() : nullptr;
}

int pm_plugin_name(int device, char* name, int size) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    pm::device::fail("cudaGetDeviceProperties: %s", cudaGetErrorString(error));
    return -1;
  }
  std::snprintf(name, static_cast<size_t>(size), "%s", properties.name);
  return 0;
}
