// pm_sample: checks and allocation around kernels/include/sampling.h.
#include "../kernels/include/sampling.h"

#include <cmath>

#include "target.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

constexpr const char* kOp = "sample";

void check_row(int64_t s, const float* floats, const int64_t* ints, int64_t V, int64_t seen) {
  const auto need = [s](bool fits, const char* name, auto value, auto... wanted) {
    if (!fits) pm::fail(kOp, "row ", s, ": ", name, " is ", value, ", needs ", wanted...);
  };
  const float temperature = floats[PM_TEMPERATURE], top_p = floats[PM_TOP_P], min_p = floats[PM_MIN_P];
  const float repetition = floats[PM_REPETITION_PENALTY];
  need(temperature >= 0 && std::isfinite(temperature), "temperature", temperature, "a finite number, 0 or more (0: greedy)");
  need(top_p > 0 && top_p <= 1, "top_p", top_p, "a number above 0, at most 1 (1: off)");
  need(min_p >= 0 && min_p <= 1, "min_p", min_p, "a number from 0 (off) to 1");
  need(repetition > 0 && std::isfinite(repetition), "repetition_penalty", repetition, "a finite number above 0 (1: off)");
  need(std::isfinite(floats[PM_PRESENCE_PENALTY]), "presence_penalty", floats[PM_PRESENCE_PENALTY],
       "a finite number (0: off)");
  need(std::isfinite(floats[PM_FREQUENCY_PENALTY]), "frequency_penalty", floats[PM_FREQUENCY_PENALTY],
       "a finite number (0: off)");
  need(ints[PM_TOP_K] >= 0, "top_k", ints[PM_TOP_K], "0 (off) or more");
  need(ints[PM_FORCED_TOKEN] < V, "forced_token", ints[PM_FORCED_TOKEN], "a token below ", V, ", or -1 for none");
  need(ints[PM_TOP_LOGPROBS] >= 0 && ints[PM_TOP_LOGPROBS] <= PM_MAX_TOP_LOGPROBS, "top_logprobs", ints[PM_TOP_LOGPROBS],
       "0 (none) to ", static_cast<int>(PM_MAX_TOP_LOGPROBS));
  need(ints[PM_PROMPT_LEN] >= 0 && ints[PM_PROMPT_LEN] <= seen, "prompt_len", ints[PM_PROMPT_LEN], "0 to ", seen,
       ", the length of its history");
}

// Refuses ragged rows of tokens that do not lie within `ids`, or tokens outside the vocabulary.
void check_ragged(const char* name, const Tensor& ids, const Tensor& row_offsets, int64_t S, int64_t V) {
  const int32_t *tokens = ids.data<int32_t>(), *offsets = row_offsets.data<int32_t>();
  if (offsets[0] != 0) pm::fail(kOp, name, "_offsets[0] is ", offsets[0], ", needs 0");
  for (int64_t s = 0; s < S; ++s) {
    if (offsets[s + 1] < offsets[s] || offsets[s + 1] > ids.numel())
      pm::fail(kOp, name, "_offsets[", s + 1, "] is ", offsets[s + 1], ", needs ", name, "_offsets[", s, "] = ", offsets[s],
               " to ", ids.numel(), ", the size of ", name, "_ids");
    for (int64_t i = offsets[s]; i < offsets[s + 1]; ++i)
      if (tokens[i] < 0 || tokens[i] >= V)
        pm::fail(kOp, "row ", s, ": ", name, "_ids[", i, "] is ", tokens[i], ", needs a token, 0 to ", V - 1);
  }
}

// Refuses values the kernel has no meaning for.
void check_values(const Tensor& floats, const Tensor& ints, const Tensor& history_ids, const Tensor& history_offsets,
                  const Tensor& bias_ids, const Tensor& bias_values, const Tensor& bias_offsets, int64_t S, int64_t V) {
  check_ragged("history", history_ids, history_offsets, S, V);
  check_ragged("bias", bias_ids, bias_offsets, S, V);
  const int32_t* seen = history_offsets.data<int32_t>();
  for (int64_t s = 0; s < S; ++s)
    check_row(s, floats.data<float>() + s * PM_SAMPLING_FLOATS, ints.data<int64_t>() + s * PM_SAMPLING_INTS, V,
              seen[s + 1] - seen[s]);
  for (int64_t i = 0; i < bias_offsets.data<int32_t>()[S]; ++i)
    if (const float value = bias_values.data<float>()[i]; !(value < INFINITY))
      pm::fail(kOp, "bias_values[", i, "] is ", value, ", needs a finite number, or -inf to mask the token");
}

std::vector<Tensor> sample(const Tensor& logits, const Tensor& floats, const Tensor& ints, const Tensor& history_ids,
                           const Tensor& history_offsets, const Tensor& bias_ids, const Tensor& bias_values,
                           const Tensor& bias_offsets) {
  const pm::Target at = pm::target(kOp, {{"logits", logits},
                                         {"floats", floats},
                                         {"ints", ints},
                                         {"history_ids", history_ids},
                                         {"history_offsets", history_offsets},
                                         {"bias_ids", bias_ids},
                                         {"bias_values", bias_values},
                                         {"bias_offsets", bias_offsets}});
  pm::check_tensor(kOp, "logits", logits, {DataType::FLOAT32}, {-1, -1});
  const int64_t S = logits.shape()[0], V = logits.shape()[1];
  if (V < 1 || V > INT32_MAX)
    pm::fail(kOp, "logits has ", V, " columns, needs one a token of the vocabulary, 1 to ", INT32_MAX);
  pm::check_tensor(kOp, "floats", floats, {DataType::FLOAT32}, {S, PM_SAMPLING_FLOATS});
  pm::check_tensor(kOp, "ints", ints, {DataType::INT64}, {S, PM_SAMPLING_INTS});
  pm::check_tensor(kOp, "history_ids", history_ids, {DataType::INT32}, {-1});
  pm::check_tensor(kOp, "history_offsets", history_offsets, {DataType::INT32}, {S + 1});
  pm::check_tensor(kOp, "bias_ids", bias_ids, {DataType::INT32}, {-1});
  pm::check_tensor(kOp, "bias_offsets", bias_offsets, {DataType::INT32}, {S + 1});
  pm::check_tensor(kOp, "bias_values", bias_values, {DataType::FLOAT32}, {bias_ids.numel()});

  Tensor next_tokens = paddle::empty({S}, DataType::INT32, logits.place());
  Tensor logprobs = paddle::empty({S}, DataType::FLOAT32, logits.place());
  Tensor top_ids = paddle::empty({S, PM_MAX_TOP_LOGPROBS}, DataType::INT32, logits.place());
  Tensor top_logprobs = paddle::empty({S, PM_MAX_TOP_LOGPROBS}, DataType::FLOAT32, logits.place());
  const auto call = [&](auto kernel, auto... last) {
    return kernel(logits.data<float>(), floats.data<float>(), ints.data<int64_t>(), history_ids.data<int32_t>(),
                  history_offsets.data<int32_t>(), bias_ids.data<int32_t>(), bias_values.data<float>(),
                  bias_offsets.data<int32_t>(), next_tokens.data<int32_t>(), logprobs.data<float>(), top_ids.data<int32_t>(),
                  top_logprobs.data<float>(), S, V, last...);
  };
  if (at.device) {
    // A row without an answer has the token -1, which whoever copies it back must look for.
    Tensor workspace = pm::workspace(at.device->sample_workspace(S, V), logits.place());
    pm::check_status(kOp, call(at.device->sample, workspace.data(), at.stream), at);
    return {next_tokens, logprobs, top_ids, top_logprobs};
  }
  check_values(floats, ints, history_ids, history_offsets, bias_ids, bias_values, bias_offsets, S, V);
  const int status = call(pm_cpu_sample, static_cast<void*>(nullptr));
  for (int64_t s = 0; status == PM_NOT_FINITE && s < S; ++s)
    if (next_tokens.data<int32_t>()[s] < 0)
      pm::fail(kOp, "row ", s, " of logits holds NaN or +inf, or nothing but -inf (its bias added); needs finite numbers ",
               "(-inf: masked)");
  pm::check_status(kOp, status);
  return {next_tokens, logprobs, top_ids, top_logprobs};
}
std::vector<Shape> sample_shape(const Shape& logits, const Shape&, const Shape&, const Shape&, const Shape&, const Shape&,
                                const Shape&, const Shape&) {
  return {{logits[0]}, {logits[0]}, {logits[0], PM_MAX_TOP_LOGPROBS}, {logits[0], PM_MAX_TOP_LOGPROBS}};
}
std::vector<DataType> sample_dtype(const DataType&, const DataType&, const DataType&, const DataType&, const DataType&,
                                   const DataType&, const DataType&, const DataType&) {
  return {DataType::INT32, DataType::FLOAT32, DataType::INT32, DataType::FLOAT32};
}

}  // namespace

PD_BUILD_OP(pm_sample)
    .Inputs({"Logits", "Floats", "Ints", "HistoryIds", "HistoryOffsets", "BiasIds", "BiasValues", "BiasOffsets"})
    .Outputs({"NextTokens", "Logprobs", "TopIds", "TopLogprobs"})
    .SetKernelFn(PD_KERNEL(sample))
    .SetInferShapeFn(PD_INFER_SHAPE(sample_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(sample_dtype));
