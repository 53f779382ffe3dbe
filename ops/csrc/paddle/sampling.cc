// pm_sample: checks and allocation around kernels/include/sampling.h.
#include "../kernels/include/sampling.h"

#include <cmath>

#include "binding.h"

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
  need(ints[PM_PROMPT_LEN] >= 0 && ints[PM_PROMPT_LEN] <= seen, "prompt_len", ints[PM_PROMPT_LEN], "0 to ", seen,
       ", the length of its history");
}

void check_rows(const float* floats, const int64_t* ints, const int32_t* history_ids, const int32_t* history_offsets,
                int64_t S, int64_t V, int64_t history_size) {
  if (history_offsets[0] != 0) pm::fail(kOp, "history_offsets[0] is ", history_offsets[0], ", needs 0");
  for (int64_t s = 0; s < S; ++s) {
    const int64_t begin = history_offsets[s], end = history_offsets[s + 1];
    if (end < begin || end > history_size)
      pm::fail(kOp, "history_offsets[", s + 1, "] is ", end, ", needs history_offsets[", s, "] = ", begin, " to ",
               history_size, ", the size of history_ids");
    for (int64_t i = begin; i < end; ++i)
      if (history_ids[i] < 0 || history_ids[i] >= V)
        pm::fail(kOp, "row ", s, ": history_ids[", i, "] is ", history_ids[i], ", needs a token, 0 to ", V - 1);
    check_row(s, floats + s * PM_SAMPLING_FLOATS, ints + s * PM_SAMPLING_INTS, V, end - begin);
  }
}

std::vector<Tensor> sample(const Tensor& logits, const Tensor& floats, const Tensor& ints, const Tensor& history_ids,
                           const Tensor& history_offsets) {
  pm::check_tensor(kOp, "logits", logits, {DataType::FLOAT32}, {-1, -1});
  const int64_t S = logits.shape()[0], V = logits.shape()[1];
  if (V < 1 || V > INT32_MAX)
    pm::fail(kOp, "logits has ", V, " columns, needs one a token of the vocabulary, 1 to ", INT32_MAX);
  pm::check_tensor(kOp, "floats", floats, {DataType::FLOAT32}, {S, PM_SAMPLING_FLOATS});
  pm::check_tensor(kOp, "ints", ints, {DataType::INT64}, {S, PM_SAMPLING_INTS});
  pm::check_tensor(kOp, "history_ids", history_ids, {DataType::INT32}, {-1});
  pm::check_tensor(kOp, "history_offsets", history_offsets, {DataType::INT32}, {S + 1});
  check_rows(floats.data<float>(), ints.data<int64_t>(), history_ids.data<int32_t>(), history_offsets.data<int32_t>(), S, V,
             history_ids.numel());

  Tensor next_tokens = paddle::empty({S}, DataType::INT32, logits.place());
  Tensor logprobs = paddle::empty({S}, DataType::FLOAT32, logits.place());
  const int status =
      pm_cpu_sample(logits.data<float>(), floats.data<float>(), ints.data<int64_t>(), history_ids.data<int32_t>(),
                    history_offsets.data<int32_t>(), next_tokens.data<int32_t>(), logprobs.data<float>(), S, V, nullptr);
  for (int64_t s = 0; status == PM_NOT_FINITE && s < S; ++s)
    if (next_tokens.data<int32_t>()[s] < 0)
      pm::fail(kOp, "row ", s, " of logits holds NaN or +inf, or nothing but -inf; needs finite numbers (-inf: masked)");
  pm::check_status(kOp, status);
  return {next_tokens, logprobs};
}
std::vector<Shape> sample_shape(const Shape& logits, const Shape&, const Shape&, const Shape&, const Shape&) {
  return {{logits[0]}, {logits[0]}};
}
std::vector<DataType> sample_dtype(const DataType&, const DataType&, const DataType&, const DataType&, const DataType&) {
  return {DataType::INT32, DataType::FLOAT32};
}

}  // namespace

PD_BUILD_OP(pm_sample)
    .Inputs({"Logits", "Floats", "Ints", "HistoryIds", "HistoryOffsets"})
    .Outputs({"NextTokens", "Logprobs"})
    .SetKernelFn(PD_KERNEL(sample))
    .SetInferShapeFn(PD_INFER_SHAPE(sample_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(sample_dtype));
