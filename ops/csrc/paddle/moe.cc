// pm_fused_moe: checks and allocation around kernels/include/moe.h.
#include "../kernels/include/moe.h"

#include "operators.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

constexpr int64_t kHalfTile = PM_TILE_ROWS / 2;

// Of an expert's rows of w1 above those of w3.
int64_t half_of(const char* op, const char* name, int64_t rows) {
  if (rows % 2 != 0) pm::fail(op, name, " has ", rows, " rows an expert, needs an even number (w1 above w3)");
  return rows / 2;
}
Shape experts(int64_t E, Shape one) {
  one.insert(one.begin(), E);
  return one;
}

}  // namespace

Tensor pm::fused_moe(const char* op, const Target& at, const Tensor& x, const Tensor& gate, const Tensor& w13,
                     const Tensor& w2, const paddle::optional<Tensor>& w13_scale, const paddle::optional<Tensor>& w2_scale,
                     int top_k, int activation_bits) {
  pm::check_tensor(op, "x", x, at.activations(), {-1, -1});
  const int64_t T = x.shape()[0], H = x.shape()[1];
  pm::check_tensor(op, "gate", gate, {DataType::FLOAT32}, {-1, H});
  const int64_t E = gate.shape()[0];
  const bool quantised = w13.dtype() == DataType::UINT8;
  if (quantised != static_cast<bool>(w13_scale) || quantised != static_cast<bool>(w2_scale))
    pm::fail(op, "w13 and w2 are ", pm::dtype_name(w13.dtype()), ", w13_scale is ", w13_scale ? "given" : "None",
             " and w2_scale is ", w2_scale ? "given" : "None",
             ": both are needed for packed int8 weights (uint8), neither for others");
  pm::check_activation_bits(op, activation_bits, quantised);
  int64_t I;
  if (quantised) {
    pm::check_tensor(op, "w13_scale", *w13_scale, {DataType::FLOAT32}, {E, -1});
    I = half_of(op, "w13_scale", w13_scale->shape()[1]);
    pm::check_tensor(op, "w2_scale", *w2_scale, {DataType::FLOAT32}, {E, H});
    // Half a tile of gate rows and half a tile of up rows.
    pm::check_tensor(op, "w13", w13, {DataType::UINT8},
                     experts(E, pm::packed_shape(DataType::UINT8, (I + kHalfTile - 1) / kHalfTile * PM_TILE_ROWS, H)));
    pm::check_tensor(op, "w2", w2, {DataType::UINT8}, experts(E, pm::packed_shape(DataType::UINT8, H, I)));
    pm::check_packed_columns(op, H > I ? H : I);
  } else if (pm::is_16_bits(w13.dtype())) {
    pm::check_activations(op, x.dtype(), w13.dtype());
    Shape w13_shape = experts(E, pm::packed_shape(x.dtype(), 1, H));
    w13_shape[1] = -1;
    pm::check_tensor(op, "w13", w13, {x.dtype()}, w13_shape);
    // As many as the tiles hold: rows beyond the true size are zeros, of which come zeros, and w2 has as many tiles.
    I = w13.shape()[1] * kHalfTile;
    pm::check_tensor(op, "w2", w2, {x.dtype()}, experts(E, pm::packed_shape(x.dtype(), H, I)));
  } else {
    pm::check_tensor(op, "w13", w13, at.unpacked_weights(x.dtype()), {E, -1, H});
    I = half_of(op, "w13", w13.shape()[1]);
    pm::check_tensor(op, "w2", w2, {w13.dtype()}, {E, H, I});
  }
  if (T < 1 || H < 1 || I < 1 || E < 1)
    pm::fail(op, "needs T, H, I and E >= 1, found T = ", T, ", H = ", H, ", I = ", I, ", E = ", E);
  if (top_k < 1 || top_k > E) pm::fail(op, "top_k is ", top_k, ", needs 1 to the number of experts, ", E);
  Tensor y = paddle::empty({T, H}, DataType::FLOAT32, x.place());
  const pm_dtype x_dtype = pm::abi_dtype(x.dtype()), w_dtype = pm::abi_dtype(w13.dtype());
  const float* w13_scales = quantised ? w13_scale->data<float>() : nullptr;
  const float* w2_scales = quantised ? w2_scale->data<float>() : nullptr;
  if (at.device) {
    Tensor workspace = pm::workspace(at.device->fused_moe_workspace(w_dtype, T, H, I, E, top_k), x.place());
    pm::check_status(
        op,
        at.device->fused_moe(x.data(), x_dtype, gate.data<float>(), w13.data(), w2.data(), w_dtype, w13_scales, w2_scales,
                             activation_bits, y.data<float>(), T, H, I, E, top_k, workspace.data(), at.stream),
        at);
  } else {
    pm::check_status(op, pm_cpu_fused_moe(x.data(), x_dtype, gate.data<float>(), w13.data(), w2.data(), w_dtype, w13_scales,
                                          w2_scales, activation_bits, y.data<float>(), T, H, I, E, top_k, nullptr));
  }
  return y;
}

namespace {

std::vector<Tensor> fused_moe(const Tensor& x, const Tensor& gate, const Tensor& w13, const Tensor& w2,
                              const paddle::optional<Tensor>& w13_scale, const paddle::optional<Tensor>& w2_scale, int top_k,
                              int activation_bits) {
  const char* op = "fused_moe";
  const pm::Target at =
      pm::target(op, {{"x", x}, {"gate", gate}, {"w13", w13}, {"w2", w2}, {"w13_scale", w13_scale}, {"w2_scale", w2_scale}});
  return {pm::fused_moe(op, at, x, gate, w13, w2, w13_scale, w2_scale, top_k, activation_bits)};
}
std::vector<Shape> fused_moe_shape(const Shape& x, const Shape&, const Shape&, const Shape&, const paddle::optional<Shape>&,
                                   const paddle::optional<Shape>&) {
  return {x};
}
std::vector<DataType> fused_moe_dtype(const DataType&, const DataType&, const DataType&, const DataType&,
                                      const paddle::optional<DataType>&, const paddle::optional<DataType>&) {
  return {DataType::FLOAT32};
}

}  // namespace

PD_BUILD_OP(pm_fused_moe)
    .Inputs({"X", "Gate", "W13", "W2", paddle::Optional("W13Scale"), paddle::Optional("W2Scale")})
    .Outputs({"Y"})
    .Attrs({"top_k: int", "activation_bits: int"})
    .SetKernelFn(PD_KERNEL(fused_moe))
    .SetInferShapeFn(PD_INFER_SHAPE(fused_moe_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(fused_moe_dtype));
