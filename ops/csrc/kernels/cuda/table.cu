// The table of NVIDIA GPUs, and the text of a thread's last failed call.
#include <stdarg.h>
#include <stdio.h>

#include "launch.cuh"

namespace pm::cuda {
namespace {

thread_local char error_text[512] = "no call has failed";

const char* last_error() { return error_text; }

}  // namespace

int fail(pm_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_text, sizeof(error_text), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace pm::cuda

__attribute__((visibility("default"))) const pm_device_kernels* pm_cuda_kernels(void) {
  using namespace pm::cuda;
  static const pm_device_kernels table = {
      PM_OPS_ABI_VERSION,
      "cuda",
      last_error,
      rms_norm,
      embedding,
      linear_workspace,
      linear,
      fused_moe_workspace,
      fused_moe,
      append_attention_workspace,
      append_attention,
      sample_workspace,
      sample,
      all_reduce,
      all_gather,
      expert_counts,
  };
  return &table;
}

__attribute__((visibility("default"))) int pm_cuda_set_device(int device) {
  return pm::cuda::check(cudaSetDevice(device), "choosing the GPU");
}
