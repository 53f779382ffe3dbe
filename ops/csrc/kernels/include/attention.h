// Append attention: rotary embedding, KV append and causal grouped-query attention on a paged cache, padding-free.
//
// SHAPES      qkv [T, (Hq + 2 Hkv) * D] in dtype (PM_F32, PM_BF16): Hq query heads, Hkv key heads, Hkv value heads
//             key_cache, value_cache [num_blocks, Hkv, block_size, D] in dtype, written in place
//             cu_seqlens [B + 1] int32, never decreasing, from 0 to T: sequence b owns rows cu_seqlens[b] up to the next
//             context_lens [B] int32: tokens of b already in the cache; its row i is at position context_lens[b] + i
//             block_tables [B, M] int32, padded with -1: position p of b lives in page block_tables[b, p / block_size];
//             pages that no new row writes or sees through its window are not looked at
//             out [T, Hq * D] in dtype
// DEFINITION  rope (NeoX rotation): inv_freq[i] = rope_theta^(-2i / D); angle = position * inv_freq[i];
//               (x[i], x[i + D/2]) -> (x[i] cos - x[i + D/2] sin, x[i + D/2] cos + x[i] sin), on every query and key head
//             roped keys and the values are rounded to dtype and written to the cache; then for query head h at position p,
//             over positions j in max(0, p - window + 1) .. p (window = 0: from 0), with key/value head h / (Hq / Hkv):
//               out = softmax_j(q . k_j * scale) v_j, scores, softmax and sums in float32
//             (queries are not rounded; angle in float32, its cosine and sine computed in float64 and rounded to float32)
// ORDER       q . k in increasing d, then times scale. Positions are cut into chunks at multiples of PM_ATTENTION_CHUNK. Of
// a
//             chunk: the largest score; the sum of exp(score - largest) in lane j % 16, lanes folded as reduce_add of vec.h
//             does; the values times these, added in increasing j. Chunks are merged in increasing order, from largest =
//             -inf and sums of 0: both sums become old * exp(old largest - new largest) + the chunk's * exp(its largest -
//             new largest). At the end the values' sum is divided by the other. Chunks of which a row sees nothing are left
//             out. out[t] never depends on how the sequence was cut into steps, on its neighbours, on block_size, on threads
//             or on the instruction set.
// SOURCE      RoPE: Su et al., arXiv:2104.09864; GQA: Ainslie et al., arXiv:2305.13245
//             paging: Kwon et al., arXiv:2309.06180
// REGULARITIES D = 128 (any even D works), Hq / Hkv = 4 or 6, contexts to 65,536; one-row decodes and long chunks mixed
// EXAMPLE     Mixtral-8x7B: Hq = 32, Hkv = 8, D = 128, rope_theta = 1e6
#ifndef PADDLE_MIXTRAL_ATTENTION_H_
#define PADDLE_MIXTRAL_ATTENTION_H_

#include "common.h"

// Positions of a chunk, the unit in which the keys of a row are summed up.
#define PM_ATTENTION_CHUNK 256

#ifdef __cplusplus
extern "C" {
#endif

int pm_cpu_append_attention(const void* qkv, pm_dtype dtype, void* key_cache, void* value_cache, const int32_t* cu_seqlens,
                            const int32_t* context_lens, const int32_t* block_tables, void* out, int64_t T, int64_t B,
                            int64_t M, int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size, double rope_theta,
                            int64_t window, float scale, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_ATTENTION_H_
