// What every binding uses: checks that explain themselves, and Paddle's types as the kernels' ABI names them.
#ifndef PADDLE_MIXTRAL_BINDING_H_
#define PADDLE_MIXTRAL_BINDING_H_

#include <algorithm>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include "../kernels/include/common.h"
#include "../kernels/include/quantize.h"
#include "paddle/extension.h"

namespace pm {

// A predictor shows a C++ error as a bare "std::exception", so the sentence is also printed where it happens.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  std::fprintf(stderr, "%s\n", message.str().c_str());
  PD_THROW(message.str());
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline const char* dtype_name(paddle::DataType dtype) {
  switch (dtype) {
    case paddle::DataType::FLOAT32:
      return "float32";
    case paddle::DataType::BFLOAT16:
      return "bfloat16";
    case paddle::DataType::FLOAT16:
      return "float16";
    case paddle::DataType::INT8:
      return "int8";
    case paddle::DataType::UINT8:
      return "uint8";
    case paddle::DataType::INT32:
      return "int32";
    case paddle::DataType::INT64:
      return "int64";
    default:
      return "another type";
  }
}

inline bool contains(const std::vector<paddle::DataType>& dtypes, paddle::DataType dtype) {
  return std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
}

// "float32 or bfloat16"
inline std::string dtype_names(const std::vector<paddle::DataType>& dtypes) {
  std::string names;
  for (auto dtype : dtypes) names += std::string(names.empty() ? "" : " or ") + dtype_name(dtype);
  return names;
}

inline pm_dtype abi_dtype(paddle::DataType dtype) {
  switch (dtype) {
    case paddle::DataType::BFLOAT16:
      return PM_BF16;
    case paddle::DataType::FLOAT16:
      return PM_F16;
    case paddle::DataType::UINT8:  // packed int8 weights
      return PM_I8;
    default:
      return PM_F32;
  }
}

// Refuses a tensor that is not of one of `dtypes`, or not of `shape` (-1: any size).
inline void check_tensor(const char* op, const char* name, const paddle::Tensor& x,
                         const std::vector<paddle::DataType>& dtypes, const std::vector<int64_t>& shape) {
  if (!contains(dtypes, x.dtype())) fail(op, name, " is ", dtype_name(x.dtype()), ", needs ", dtype_names(dtypes));
  const std::vector<int64_t> found = x.shape();
  bool fits = found.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || shape[i] == found[i];
  if (!fits) fail(op, name, " has shape ", shape_text(found), ", needs ", shape_text(shape), " (-1: any size)");
}

// Refuses an int32 tensor on the CPU with an element outside 0 .. size - 1; `what` says what it counts.
inline void check_indices(const char* op, const char* name, const paddle::Tensor& x, int64_t size, const char* what) {
  const int32_t* index = x.data<int32_t>();
  for (int64_t i = 0; i < x.numel(); ++i)
    if (index[i] < 0 || index[i] >= size) fail(op, name, "[", i, "] is ", index[i], ", needs 0 to ", size - 1, ", ", what);
}

// The shape of N rows of K weights of int8 (as uint8) or 16 bits in the layout of kernels/include/quantize.h.
inline std::vector<int64_t> packed_shape(paddle::DataType dtype, int64_t N, int64_t K) {
  constexpr int64_t kRows = PM_TILE_ROWS;
  const int64_t columns = dtype == paddle::DataType::UINT8 ? PM_INT8_TILE_COLUMNS : PM_BF16_TILE_COLUMNS;
  return {(N + kRows - 1) / kRows, (K + columns - 1) / columns, kRows * columns};
}
// Products of weights of 16 bits take both sides in their type.
inline bool is_16_bits(paddle::DataType dtype) {
  return dtype == paddle::DataType::BFLOAT16 || dtype == paddle::DataType::FLOAT16;
}
inline void check_activations(const char* op, paddle::DataType x, paddle::DataType weight) {
  const char* name = dtype_name(weight);
  if (is_16_bits(weight) && x != weight)
    fail(op, "x is ", dtype_name(x), ", weights of ", name, " need ", name, "; cast x, or give weights of float32");
}
inline void check_packed_columns(const char* op, int64_t K) {
  if (K > PM_INT8_LARGEST_K)
    fail(op, "weights of int8 have ", K, " columns, needs at most ", PM_INT8_LARGEST_K, ": their sums are held in 32 bits");
}

// Bits of the fixed point that tokens are rounded to for weights of int8; others take them as they are.
inline void check_activation_bits(const char* op, int bits, bool int8_weights) {
  if (bits == 16 || (bits == 8 && int8_weights)) return;
  fail(op, "activation_bits is ", bits, int8_weights ? ", needs 16 or 8" : ", needs 16: only int8 weights have others");
}

inline void check_status(const char* op, int status) {
  switch (status) {
    case PM_OK:
      return;
    case PM_OUT_OF_MEMORY:
      fail(op, "not enough memory for the kernel's workspace; use a smaller batch or shorter prefill chunks");
    case PM_PEER_LOST:
      fail(op, "another rank of this job died or did not answer in time; see its log (log/workerlog.*)");
    case PM_NOT_CONNECTED:
      fail(op, "this process has joined no group of ranks; start the job with python -m paddle.distributed.launch");
    case PM_NOT_FINITE:
      fail(op, "the logits hold NaN or +inf, or a row of nothing but -inf");
    case PM_RANKS_DISAGREE:
      fail(op, "the ranks of this job called different operators or sizes; give every rank the same command and artefact");
    default:
      fail(op, "kernel returned status ", status);
  }
}

// The element type that the attribute out_dtype names.
inline paddle::DataType float_dtype(const char* op, const std::string& name) {
  if (name == "float32") return paddle::DataType::FLOAT32;
  if (name == "bfloat16") return paddle::DataType::BFLOAT16;
  if (name == "float16") return paddle::DataType::FLOAT16;
  fail(op, "out_dtype is '", name, "', needs float32 or bfloat16 or float16");
}

}  // namespace pm
#endif  // PADDLE_MIXTRAL_BINDING_H_
