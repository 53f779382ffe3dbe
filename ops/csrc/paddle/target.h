// Where one call of an operator runs: every binding dispatches by the place of its tensors.
#ifndef PADDLE_MIXTRAL_TARGET_H_
#define PADDLE_MIXTRAL_TARGET_H_

#include <initializer_list>

#include "../kernels/include/device.h"
#include "binding.h"

// The kernels of a CustomDevice's memory, registered once for its type before the first call there; they must stay.
extern "C" void pm_register_device(const char* device_type, const pm_device_kernels* kernels);
// NULL where none are registered.
extern "C" const pm_device_kernels* pm_registered_device(const char* device_type);

namespace pm {

struct Target {
  const pm_device_kernels* device = nullptr;  // NULL: the CPU
  void* stream = nullptr;

  // What enters matrix products.
  std::vector<paddle::DataType> activations() const {
    using paddle::DataType;
    if (device) return {DataType::BFLOAT16, DataType::FLOAT16};
    return {DataType::FLOAT32, DataType::BFLOAT16};
  }
  // Weights that are taken as they are, with x of this type: a device's are packed (so this names what it needs instead).
  std::vector<paddle::DataType> unpacked_weights(paddle::DataType x) const {
    using paddle::DataType;
    if (device) return {DataType::UINT8, x};
    return {DataType::FLOAT32, DataType::BFLOAT16};
  }
  // What comes out of them.
  std::vector<paddle::DataType> results() const {
    using paddle::DataType;
    if (device) return {DataType::FLOAT32, DataType::BFLOAT16, DataType::FLOAT16};
    return activations();
  }
};

struct Named {
  const char* name;
  const paddle::Tensor* tensor;  // NULL: an optional one that was not given

  Named(const char* n, const paddle::Tensor& x) : name(n), tensor(&x) {}
  Named(const char* n, const paddle::Tensor* x) : name(n), tensor(x) {}
  Named(const char* n, const paddle::optional<paddle::Tensor>& x) : name(n), tensor(x.get_ptr()) {}
};

inline const pm_device_kernels* device_of(const paddle::Place& place) {
  switch (place.GetType()) {
    case phi::AllocationType::GPU:
      return pm_cuda_kernels();
    case phi::AllocationType::CUSTOM:
      return pm_registered_device(place.GetDeviceType().c_str());
    default:
      return nullptr;
  }
}

// The target of a call with these tensors. Refuses tensors on several devices, or on one without kernels.
inline Target target(const char* op, std::initializer_list<Named> tensors) {
  const Named& first = *tensors.begin();
  const paddle::Place place = first.tensor->place();
  for (const Named& other : tensors)
    if (other.tensor && other.tensor->place() != place)
      fail(op, other.name, " is on ", other.tensor->place().DebugString(), ", but ", first.name, " is on ",
           place.DebugString(), "; move all tensors of a call to one device");
  if (place.GetType() == phi::AllocationType::CPU) return {};
  const pm_device_kernels* device = device_of(place);
  if (!device)
    fail(op, first.name, " is on ", place.DebugString(), ", for which this build has no kernels; move it with .cpu(), or ",
         "build the operators with nvcc for an NVIDIA GPU");
  // Paddle makes a GPU the thread's as it allocates there, not before every call.
  if (device == pm_cuda_kernels() && pm_cuda_set_device(place.GetDeviceId()) != PM_OK)
    fail(op, device->name, " device: ", device->last_error());
#if defined(PADDLE_WITH_CUDA) || defined(PADDLE_WITH_CUSTOM_DEVICE)
  return {device, reinterpret_cast<void*>(first.tensor->stream())};
#else
#error "the bindings need to know which Paddle they are built for: PADDLE_WITH_CUDA or PADDLE_WITH_CUSTOM_DEVICE"
#endif
}

// Scratch of a device's kernel. When it goes, Paddle's allocator gives it to later calls on the same stream.
inline paddle::Tensor workspace(int64_t bytes, const paddle::Place& place) {
  return paddle::empty({bytes > 0 ? bytes : 1}, paddle::DataType::UINT8, place);
}

inline void check_status(const char* op, int status, const Target& at) {
  if (at.device && status != PM_OK) fail(op, at.device->name, " device: ", at.device->last_error());
  check_status(op, status);
}

// A result's element type, as the attribute out_dtype names it, if it is one of `dtypes`.
inline paddle::DataType out_dtype(const char* op, const std::string& name, const std::vector<paddle::DataType>& dtypes) {
  for (auto dtype : dtypes)
    if (name == dtype_name(dtype)) return dtype;
  fail(op, "out_dtype is '", name, "', needs ", dtype_names(dtypes));
}

}  // namespace pm
#endif  // PADDLE_MIXTRAL_TARGET_H_
