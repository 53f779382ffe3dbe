// pm_append_attention: checks and allocation around kernels/include/attention.h.
#include "../kernels/include/attention.h"

#include <charconv>
#include <cmath>

#include "operators.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

// A double travels as text: static programs have no attribute of that type, and a float would change the angles.
double to_double(const char* op, const char* name, const std::string& text) {
  double value = 0;
  const auto read = std::from_chars(text.data(), text.data() + text.size(), value);
  if (read.ec != std::errc() || read.ptr != text.data() + text.size())
    pm::fail(op, name, " is '", text, "', needs the text of a number, as 1000000.0");
  return value;
}

// Every row has one sequence, and every position the new rows write or read has a page of the cache.
void check_sequences(const char* op, const int32_t* cu_seqlens, const int32_t* context_lens, const int32_t* block_tables,
                     int64_t T, int64_t B, int64_t M, int64_t num_blocks, int64_t block_size, int64_t window) {
  if (cu_seqlens[0] != 0) pm::fail(op, "cu_seqlens[0] is ", cu_seqlens[0], ", needs 0");
  if (cu_seqlens[B] != T) pm::fail(op, "cu_seqlens[", B, "] is ", cu_seqlens[B], ", needs ", T, ", the rows of qkv");
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = int64_t{cu_seqlens[b + 1]} - cu_seqlens[b], context = context_lens[b];
    if (length < 0)
      pm::fail(op, "cu_seqlens[", b + 1, "] is ", cu_seqlens[b + 1], ", needs at least cu_seqlens[", b,
               "] = ", cu_seqlens[b]);
    if (context < 0) pm::fail(op, "context_lens[", b, "] is ", context, ", needs 0 or more");
    if (length == 0) continue;
    const int64_t end = context + length;
    if (end > M * block_size)
      pm::fail(op, "sequence ", b, " reaches ", end, " tokens (context_lens ", context, " + ", length,
               " new), but a row of block_tables has room for ", M * block_size, " (", M, " pages of ", block_size, ")");
    const int64_t first = window > 0 && context >= window ? context - window + 1 : 0;
    for (int64_t page = first / block_size; page * block_size < end; ++page)
      if (block_tables[b * M + page] < 0 || block_tables[b * M + page] >= num_blocks)
        pm::fail(op, "block_tables[", b, ", ", page, "] is ", block_tables[b * M + page], ", but sequence ", b,
                 " needs a page (0 to ", num_blocks - 1, ") for its positions from ", page * block_size, " on");
  }
}

}  // namespace

Tensor pm::append_attention(const char* op, const Target& at, const Tensor& qkv, Tensor& key_cache, Tensor& value_cache,
                            const Tensor& cu_seqlens, const Tensor& context_lens, const Tensor& block_tables,
                            const Heads& heads) {
  const int64_t num_heads = heads.queries, num_kv_heads = heads.key_values, sliding_window = heads.sliding_window;
  if (num_kv_heads < 1 || num_heads < 1 || num_heads % num_kv_heads != 0)
    pm::fail(op, "num_heads is ", num_heads, ", needs a positive multiple of num_kv_heads = ", num_kv_heads);
  const double rope_theta = to_double(op, "rope_theta", heads.rope_theta);
  if (!(rope_theta > 0) || !std::isfinite(rope_theta))
    pm::fail(op, "rope_theta is ", rope_theta, ", needs a positive number");
  if (sliding_window < 0) pm::fail(op, "sliding_window is ", sliding_window, ", needs a number of positions, or 0 for none");
  pm::check_tensor(op, "key_cache", key_cache, at.activations(), {-1, num_kv_heads, -1, -1});
  const Shape cache = key_cache.shape();
  const int64_t num_blocks = cache[0], block_size = cache[2], D = cache[3];
  pm::check_tensor(op, "value_cache", value_cache, {key_cache.dtype()}, cache);
  if (D < 2 || D % 2 != 0) pm::fail(op, "head_dim is ", D, " (the last size of key_cache), needs a positive even number");
  if (block_size < 1) pm::fail(op, "block_size is ", block_size, " (the third size of key_cache), needs 1 or more");
  pm::check_tensor(op, "qkv", qkv, {key_cache.dtype()}, {-1, (num_heads + 2 * num_kv_heads) * D});
  pm::check_tensor(op, "context_lens", context_lens, {DataType::INT32}, {-1});
  const int64_t T = qkv.shape()[0], B = context_lens.shape()[0];
  pm::check_tensor(op, "cu_seqlens", cu_seqlens, {DataType::INT32}, {B + 1});
  pm::check_tensor(op, "block_tables", block_tables, {DataType::INT32}, {B, -1});
  const int64_t M = block_tables.shape()[1];
  const int32_t *seqlens = cu_seqlens.data<int32_t>(), *contexts = context_lens.data<int32_t>();
  const int32_t* tables = block_tables.data<int32_t>();
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(D)));
  Tensor out = paddle::empty({T, num_heads * D}, qkv.dtype(), qkv.place());
  const pm_dtype dtype = pm::abi_dtype(qkv.dtype());
  if (at.device) {
    Tensor workspace =
        pm::workspace(at.device->append_attention_workspace(T, B, M, num_heads, num_kv_heads, D, block_size), qkv.place());
    pm::check_status(op,
                     at.device->append_attention(qkv.data(), dtype, key_cache.data(), value_cache.data(), seqlens, contexts,
                                                 tables, out.data(), T, B, M, num_heads, num_kv_heads, D, block_size,
                                                 rope_theta, sliding_window, scale, workspace.data(), at.stream),
                     at);
  } else {
    check_sequences(op, seqlens, contexts, tables, T, B, M, num_blocks, block_size, sliding_window);
    pm::check_status(op, pm_cpu_append_attention(qkv.data(), dtype, key_cache.data(), value_cache.data(), seqlens, contexts,
                                                 tables, out.data(), T, B, M, num_heads, num_kv_heads, D, block_size,
                                                 rope_theta, sliding_window, scale, nullptr));
  }
  return out;
}

namespace {

std::vector<Tensor> append_attention(const Tensor& qkv, Tensor& key_cache, Tensor& value_cache, const Tensor& cu_seqlens,
                                     const Tensor& context_lens, const Tensor& block_tables, int num_heads, int num_kv_heads,
                                     const std::string& rope_theta, int64_t sliding_window) {
  const char* op = "append_attention";
  const pm::Target at = pm::target(op, {{"qkv", qkv},
                                        {"key_cache", key_cache},
                                        {"value_cache", value_cache},
                                        {"cu_seqlens", cu_seqlens},
                                        {"context_lens", context_lens},
                                        {"block_tables", block_tables}});
  return {pm::append_attention(op, at, qkv, key_cache, value_cache, cu_seqlens, context_lens, block_tables,
                               {num_heads, num_kv_heads, rope_theta, sliding_window})};
}

// The caches keep their own shape and dtype: Paddle copies those of a pair in place.
std::vector<Shape> append_attention_shape(const Shape& qkv, const Shape& key_cache, const Shape&, const Shape&, const Shape&,
                                          const Shape&, int num_heads, int, const std::string&, int64_t) {
  return {{qkv[0], num_heads * key_cache[3]}};
}
std::vector<DataType> append_attention_dtype(const DataType& qkv, const DataType&, const DataType&, const DataType&,
                                             const DataType&, const DataType&) {
  return {qkv};
}

}  // namespace

PD_BUILD_OP(pm_append_attention)
    .Inputs({"Qkv", "KeyCache", "ValueCache", "CuSeqlens", "ContextLens", "BlockTables"})
    .Outputs({"Out", "KeyCacheOut", "ValueCacheOut"})
    .Attrs({"num_heads: int", "num_kv_heads: int", "rope_theta: std::string", "sliding_window: int64_t"})
    .SetInplaceMap({{"KeyCache", "KeyCacheOut"}, {"ValueCache", "ValueCacheOut"}})
    .SetKernelFn(PD_KERNEL(append_attention))
    .SetInferShapeFn(PD_INFER_SHAPE(append_attention_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(append_attention_dtype));
