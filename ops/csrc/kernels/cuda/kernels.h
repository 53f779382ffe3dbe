// The entry points of the CUDA table (include/device.h says what each does), family by family, and how they report failure.
#ifndef PADDLE_MIXTRAL_CUDA_KERNELS_H_
#define PADDLE_MIXTRAL_CUDA_KERNELS_H_

#include "../include/device.h"

namespace pm::cuda {

// Keeps the text for pm_device_kernels.last_error() and returns `status`: `return fail(PM_UNSUPPORTED, "D = %d", D);`
__attribute__((format(printf, 2, 3))) int fail(pm_status status, const char* format, ...);

// norm.cu
int rms_norm(const float* residual, const float* delta, const int32_t* rows, const float* weight, float* residual_out,
             void* y, pm_dtype y_dtype, int64_t S, int64_t H, float eps, void* stream);

// embedding.cu
int embedding(const int32_t* ids, const void* table, pm_dtype table_dtype, float* out, int64_t T, int64_t V, int64_t H,
              void* stream);

// linear.cu
int64_t linear_workspace(pm_dtype w_dtype, int64_t T, int64_t N, int64_t K);
int linear(const void* x, pm_dtype x_dtype, const void* w, pm_dtype w_dtype, const float* scale, int activation_bits,
           void* y, pm_dtype y_dtype, int64_t T, int64_t N, int64_t K, void* workspace, void* stream);

// moe.cu
int64_t fused_moe_workspace(pm_dtype w_dtype, int64_t T, int64_t H, int64_t I, int64_t E, int64_t top_k);
int fused_moe(const void* x, pm_dtype x_dtype, const float* gate, const void* w13, const void* w2, pm_dtype w_dtype,
              const float* w13_scale, const float* w2_scale, int activation_bits, float* y, int64_t T, int64_t H, int64_t I,
              int64_t E, int64_t top_k, void* workspace, void* stream);
int expert_counts(int64_t* calls, int64_t* experts_hit, int64_t* busiest_tokens);

// attention.cu
int64_t append_attention_workspace(int64_t T, int64_t B, int64_t M, int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size);
int append_attention(const void* qkv, pm_dtype dtype, void* key_cache, void* value_cache, const int32_t* cu_seqlens,
                     const int32_t* context_lens, const int32_t* block_tables, void* out, int64_t T, int64_t B, int64_t M,
                     int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size, double rope_theta, int64_t window, float scale,
                     void* workspace, void* stream);

// sampling.cu
int64_t sample_workspace(int64_t S, int64_t V);
int sample(const float* logits, const float* floats, const int64_t* ints, const int32_t* history_ids,
           const int32_t* history_offsets, const int32_t* bias_ids, const float* bias_values, const int32_t* bias_offsets,
           int32_t* next_tokens, float* logprobs, int32_t* top_ids, float* top_logprobs, int64_t S, int64_t V,
           void* workspace, void* stream);

// collective.cu
int all_reduce(const float* x, float* y, int64_t n, void* stream);
int all_gather(const float* x, float* y, int64_t rows, int64_t cols, void* stream);

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_KERNELS_H_
