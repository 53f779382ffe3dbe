// The operators on a device: what stands behind every place that is not the CPU.
//
// A table of entry points with the meaning of pm_cpu_NAME (each family's own header: shapes, definition, order), on pointers
// of one device and its stream. pm_cuda_kernels() is the table of NVIDIA GPUs; a device made of host memory has its own.
//
// TYPES       activations PM_BF16 or PM_F16; weights of that type or PM_I8, both packed in tiles as quantize.h says
//             (PM_I8 [4 columns a word], 16 bits [2 columns a word]); the same bytes as on the CPU. Float32 weights of the
//             router and the norms as they are.
// STREAM      a call only enqueues: it never waits for the device and never allocates. What it needs beside its arguments is
//             `workspace`, at least NAME_workspace(...) bytes, 256-byte aligned, with any contents, free again for the
//             stream's next call. Values in device memory (ids, lengths, pages) are not checked: whoever copies
//             them there answers for them, as the engine does, which refuses foreign tokens and deals the pages itself.
// STATUS      PM_OK, PM_UNSUPPORTED (the message says what), PM_LAUNCH_FAILED: pm_device_kernels.last_error() has the text.
//             sample reports a row without an answer by its token -1 alone.
// ROUNDING    append_attention rounds rotated queries and softmax weights to the activations' type, too, as operands of
//             matrix instructions; sample adds up in another order than the CPU (cuda/attention_tile.cuh, sampling.cu).
// LAW         a row of the result never depends on the other rows, on T, on the launch's shape or on the workspace. Integer
//             products equal the CPU's bit for bit.
#ifndef PADDLE_MIXTRAL_DEVICE_H_
#define PADDLE_MIXTRAL_DEVICE_H_

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pm_device_kernels {
  int abi_version;   // PM_OPS_ABI_VERSION
  const char* name;  // "cuda", "mock"

  // Text of this thread's last failed call.
  const char* (*last_error)(void);

  // norm.h. rows [S] int32 or NULL: row s is of residual[rows[s]] + delta[rows[s]], and S rows are written.
  int (*rms_norm)(const float* residual, const float* delta, const int32_t* rows, const float* weight, float* residual_out,
                  void* y, pm_dtype y_dtype, int64_t S, int64_t H, float eps, void* stream);

  // embedding.h
  int (*embedding)(const int32_t* ids, const void* table, pm_dtype table_dtype, float* out, int64_t T, int64_t V, int64_t H,
                   void* stream);

  // linear.h
  int64_t (*linear_workspace)(pm_dtype w_dtype, int64_t T, int64_t N, int64_t K);
  int (*linear)(const void* x, pm_dtype x_dtype, const void* w, pm_dtype w_dtype, const float* scale, int activation_bits,
                void* y, pm_dtype y_dtype, int64_t T, int64_t N, int64_t K, void* workspace, void* stream);

  // moe.h
  int64_t (*fused_moe_workspace)(pm_dtype w_dtype, int64_t T, int64_t H, int64_t I, int64_t E, int64_t top_k);
  int (*fused_moe)(const void* x, pm_dtype x_dtype, const float* gate, const void* w13, const void* w2, pm_dtype w_dtype,
                   const float* w13_scale, const float* w2_scale, int activation_bits, float* y, int64_t T, int64_t H,
                   int64_t I, int64_t E, int64_t top_k, void* workspace, void* stream);

  // attention.h
  int64_t (*append_attention_workspace)(int64_t T, int64_t B, int64_t M, int64_t Hq, int64_t Hkv, int64_t D,
                                        int64_t block_size);
  int (*append_attention)(const void* qkv, pm_dtype dtype, void* key_cache, void* value_cache, const int32_t* cu_seqlens,
                          const int32_t* context_lens, const int32_t* block_tables, void* out, int64_t T, int64_t B,
                          int64_t M, int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size, double rope_theta,
                          int64_t window, float scale, void* workspace, void* stream);

  // sampling.h
  int64_t (*sample_workspace)(int64_t S, int64_t V);
  int (*sample)(const float* logits, const float* floats, const int64_t* ints, const int32_t* history_ids,
                const int32_t* history_offsets, const int32_t* bias_ids, const float* bias_values,
                const int32_t* bias_offsets, int32_t* next_tokens, float* logprobs, int32_t* top_ids, float* top_logprobs,
                int64_t S, int64_t V, void* workspace, void* stream);

  // collective.h, between the ranks of a group that has been opened there
  int (*all_reduce)(const float* x, float* y, int64_t n, void* stream);
  int (*all_gather)(const float* x, float* y, int64_t rows, int64_t cols, void* stream);

  // counters.h: pm_cpu_expert_counts of the calling thread's device, where tokens that fused_moe takes in
  // turns count as so many calls. Unlike all others it waits, for all work there.
  int (*expert_counts)(int64_t* calls, int64_t* experts_hit, int64_t* busiest_tokens);
} pm_device_kernels;

// NULL where the library was built without CUDA.
const pm_device_kernels* pm_cuda_kernels(void);
// Makes a GPU the calling thread's, which its launches and pm_cuda_group_create (collective.h) then use.
int pm_cuda_set_device(int device);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_DEVICE_H_
