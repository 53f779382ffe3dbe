// pm_embedding: checks and allocation around kernels/include/embedding.h.
#include "../kernels/include/embedding.h"

#include "target.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

std::vector<Tensor> embedding(const Tensor& ids, const Tensor& table) {
  const char* op = "embedding";
  const pm::Target at = pm::target(op, {{"ids", ids}, {"table", table}});
  pm::check_tensor(op, "ids", ids, {DataType::INT32}, {-1});
  pm::check_tensor(op, "table", table, at.activations(), {-1, -1});
  const int64_t T = ids.shape()[0], V = table.shape()[0], H = table.shape()[1];
  if (!at.device) pm::check_indices(op, "ids", ids, V, "the rows of table");
  Tensor out = paddle::empty({T, H}, DataType::FLOAT32, ids.place());
  const auto embed = at.device ? at.device->embedding : pm_cpu_embedding;
  pm::check_status(
      op, embed(ids.data<int32_t>(), table.data(), pm::abi_dtype(table.dtype()), out.data<float>(), T, V, H, at.stream), at);
  return {out};
}
std::vector<Shape> embedding_shape(const Shape& ids, const Shape& table) { return {{ids[0], table[1]}}; }
std::vector<DataType> embedding_dtype(const DataType&, const DataType&) { return {DataType::FLOAT32}; }

}  // namespace

PD_BUILD_OP(pm_embedding)
    .Inputs({"Ids", "Table"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(embedding))
    .SetInferShapeFn(PD_INFER_SHAPE(embedding_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(embedding_dtype));
