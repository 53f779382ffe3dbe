// The mock device's kernels: the CPU's, on the host's view of device memory; or, where the variable PM_MOCK_KERNELS names a
// library with pm_cuda_kernels() (of kernels/cuda, compiled to run on a CPU), those. A stream the runtime has not made, a
// pointer that is no device memory and a workspace that is not as device.h wants it fail the call; workspaces are
// overwritten.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "../kernels/include/attention.h"
#include "../kernels/include/collective.h"
#include "../kernels/include/counters.h"
#include "../kernels/include/embedding.h"
#include "../kernels/include/linear.h"
#include "../kernels/include/moe.h"
#include "../kernels/include/norm.h"
#include "../kernels/include/sampling.h"
#include "mock.h"
#include "plugin.h"

namespace pm::device {
namespace {

thread_local char g_error[256] = "no call has failed";

__attribute__((format(printf, 2, 3))) int refuse(pm_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(g_error, sizeof g_error, format, arguments);
  va_end(arguments);
  return status;
}

// The CPU's entry points, looked up in the operators' library.
struct Cpu {
  decltype(&pm_cpu_rms_norm) rms_norm;
  decltype(&pm_cpu_embedding) embedding;
  decltype(&pm_cpu_linear) linear;
  decltype(&pm_cpu_fused_moe) fused_moe;
  decltype(&pm_cpu_append_attention) append_attention;
  decltype(&pm_cpu_sample) sample;
  decltype(&pm_cpu_all_reduce) all_reduce;
  decltype(&pm_cpu_all_gather) all_gather;
  decltype(&pm_cpu_expert_counts) expert_counts;
} g_cpu;

const pm_device_kernels* g_emulated = nullptr;  // instead of the CPU's

template <class T>
T on_host(T argument) {
  if constexpr (std::is_pointer_v<T>)
    return argument ? static_cast<T>(mock_host(argument)) : nullptr;
  else
    return argument;
}

template <class T>
bool is_of_device(T argument) {
  if constexpr (std::is_pointer_v<T>) return !argument || mock_host(argument);
  if constexpr (std::is_same_v<T, pm_dtype>) return g_emulated || argument != PM_F16;  // the CPU's kernels have none
  return true;
}

template <class Kernel, class... Arguments>
int run(Kernel kernel, void* stream, Arguments... arguments) {
  if (!mock_is_stream(stream)) return refuse(PM_LAUNCH_FAILED, "%p is no stream of the device", stream);
  if (!(is_of_device(arguments) && ...))
    return refuse(PM_UNSUPPORTED, "an argument is float16, or points to what is no memory of the device");
  const pm_status status = static_cast<pm_status>(kernel(on_host(arguments)..., nullptr));
  if (status == PM_OK) return PM_OK;
  return refuse(status, "status %d: %s", status, g_emulated ? g_emulated->last_error() : "of the CPU's kernel");
}

// As large as a kernel on a device might ask for, in a size that nothing else has.
int64_t some_workspace(int64_t elements) { return 4 * elements + 1000; }

// Whoever counts on what a workspace holds, or gives one too small, finds this in it and beyond it.
int spoil(void* workspace, int64_t bytes) {
  if (bytes == 0) return PM_OK;
  constexpr int kAlignment = 256;
  void* view = mock_host(workspace, static_cast<size_t>(bytes));
  if (!view || reinterpret_cast<uintptr_t>(workspace) % kAlignment != 0)
    return refuse(PM_LAUNCH_FAILED, "workspace %p is no memory of the device, or not aligned to %d bytes", workspace,
                  kAlignment);
  std::memset(view, 0xa5, static_cast<size_t>(bytes));
  return PM_OK;
}

int rms_norm(const float* residual, const float* delta, const int32_t* rows, const float* weight, float* residual_out,
             void* y, pm_dtype y_dtype, int64_t S, int64_t H, float eps, void* stream) {
  return run(g_emulated ? g_emulated->rms_norm : g_cpu.rms_norm, stream, residual, delta, rows, weight, residual_out, y,
             y_dtype, S, H, eps);
}

int embedding(const int32_t* ids, const void* table, pm_dtype table_dtype, float* out, int64_t T, int64_t V, int64_t H,
              void* stream) {
  return run(g_emulated ? g_emulated->embedding : g_cpu.embedding, stream, ids, table, table_dtype, out, T, V, H);
}

int64_t linear_workspace(pm_dtype w_dtype, int64_t T, int64_t N, int64_t K) {
  return g_emulated ? g_emulated->linear_workspace(w_dtype, T, N, K) : some_workspace(T * K);
}
int linear(const void* x, pm_dtype x_dtype, const void* w, pm_dtype w_dtype, const float* scale, int activation_bits,
           void* y, pm_dtype y_dtype, int64_t T, int64_t N, int64_t K, void* workspace, void* stream) {
  if (const int status = spoil(workspace, linear_workspace(w_dtype, T, N, K))) return status;
  if (g_emulated)
    return run(g_emulated->linear, stream, x, x_dtype, w, w_dtype, scale, activation_bits, y, y_dtype, T, N, K, workspace);
  return run(g_cpu.linear, stream, x, x_dtype, w, w_dtype, scale, activation_bits, y, y_dtype, T, N, K);
}

int64_t fused_moe_workspace(pm_dtype w_dtype, int64_t T, int64_t H, int64_t I, int64_t E, int64_t top_k) {
  return g_emulated ? g_emulated->fused_moe_workspace(w_dtype, T, H, I, E, top_k) : some_workspace(T * top_k * I);
}
int fused_moe(const void* x, pm_dtype x_dtype, const float* gate, const void* w13, const void* w2, pm_dtype w_dtype,
              const float* w13_scale, const float* w2_scale, int activation_bits, float* y, int64_t T, int64_t H, int64_t I,
              int64_t E, int64_t top_k, void* workspace, void* stream) {
  if (const int status = spoil(workspace, fused_moe_workspace(w_dtype, T, H, I, E, top_k))) return status;
  if (g_emulated)
    return run(g_emulated->fused_moe, stream, x, x_dtype, gate, w13, w2, w_dtype, w13_scale, w2_scale, activation_bits, y, T,
               H, I, E, top_k, workspace);
  return run(g_cpu.fused_moe, stream, x, x_dtype, gate, w13, w2, w_dtype, w13_scale, w2_scale, activation_bits, y, T, H, I,
             E, top_k);
}

int64_t append_attention_workspace(int64_t T, int64_t B, int64_t M, int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size) {
  return g_emulated ? g_emulated->append_attention_workspace(T, B, M, Hq, Hkv, D, block_size) : some_workspace(T * Hq * D);
}
int append_attention(const void* qkv, pm_dtype dtype, void* key_cache, void* value_cache, const int32_t* cu_seqlens,
                     const int32_t* context_lens, const int32_t* block_tables, void* out, int64_t T, int64_t B, int64_t M,
                     int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size, double rope_theta, int64_t window, float scale,
                     void* workspace, void* stream) {
  if (const int status = spoil(workspace, append_attention_workspace(T, B, M, Hq, Hkv, D, block_size))) return status;
  if (g_emulated)
    return run(g_emulated->append_attention, stream, qkv, dtype, key_cache, value_cache, cu_seqlens, context_lens,
               block_tables, out, T, B, M, Hq, Hkv, D, block_size, rope_theta, window, scale, workspace);
  return run(g_cpu.append_attention, stream, qkv, dtype, key_cache, value_cache, cu_seqlens, context_lens, block_tables, out,
             T, B, M, Hq, Hkv, D, block_size, rope_theta, window, scale);
}

int64_t sample_workspace(int64_t S, int64_t V) {
  return g_emulated ? g_emulated->sample_workspace(S, V) : some_workspace(S * V);
}
int sample(const float* logits, const float* floats, const int64_t* ints, const int32_t* history_ids,
           const int32_t* history_offsets, const int32_t* bias_ids, const float* bias_values, const int32_t* bias_offsets,
           int32_t* next_tokens, float* logprobs, int32_t* top_ids, float* top_logprobs, int64_t S, int64_t V,
           void* workspace, void* stream) {
  if (const int status = spoil(workspace, sample_workspace(S, V))) return status;
  const int status = run(g_cpu.sample, stream, logits, floats, ints, history_ids, history_offsets, bias_ids, bias_values,
                         bias_offsets, next_tokens, logprobs, top_ids, top_logprobs, S, V);
  return status == PM_NOT_FINITE ? PM_OK : status;  // a device has no other word for it than the token -1
}

int all_reduce(const float* x, float* y, int64_t n, void* stream) { return run(g_cpu.all_reduce, stream, x, y, n); }
int all_gather(const float* x, float* y, int64_t rows, int64_t cols, void* stream) {
  return run(g_cpu.all_gather, stream, x, y, rows, cols);
}

int expert_counts(int64_t* calls, int64_t* experts_hit, int64_t* busiest_tokens) {
  if (g_emulated) return g_emulated->expert_counts(calls, experts_hit, busiest_tokens);
  g_cpu.expert_counts(calls, experts_hit, busiest_tokens);
  return PM_OK;
}

// NULL where the variable is unset or names no such library.
const pm_device_kernels* emulated_kernels() {
  const char* path = std::getenv("PM_MOCK_KERNELS");
  void* library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (path && !library) std::fprintf(stderr, "PM_MOCK_KERNELS: %s\n", dlerror());
  const auto kernels = reinterpret_cast<decltype(&pm_cuda_kernels)>(library ? dlsym(library, "pm_cuda_kernels") : nullptr);
  return kernels ? kernels() : nullptr;
}

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace
}  // namespace pm::device

const pm_device_kernels* pm_plugin_kernels(void* operators) {
  using namespace pm::device;
  static const pm_device_kernels table = {
      PM_OPS_ABI_VERSION,
      "mock",
      [] { return static_cast<const char*>(g_error); },
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
  g_emulated = emulated_kernels();
  const bool found =
      find(operators, "pm_cpu_rms_norm", g_cpu.rms_norm) && find(operators, "pm_cpu_embedding", g_cpu.embedding) &&
      find(operators, "pm_cpu_linear", g_cpu.linear) && find(operators, "pm_cpu_fused_moe", g_cpu.fused_moe) &&
      find(operators, "pm_cpu_append_attention", g_cpu.append_attention) && find(operators, "pm_cpu_sample", g_cpu.sample) &&
      find(operators, "pm_cpu_all_reduce", g_cpu.all_reduce) && find(operators, "pm_cpu_all_gather", g_cpu.all_gather) &&
      find(operators, "pm_cpu_expert_counts", g_cpu.expert_counts);
  return found && (g_emulated || !std::getenv("PM_MOCK_KERNELS")) ? &table : nullptr;
}
