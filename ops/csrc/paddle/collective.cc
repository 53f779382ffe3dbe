// pm_all_reduce and pm_all_gather: checks and allocation around kernels/include/collective.h.
#include "../kernels/include/collective.h"

#include "target.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

void check_world(const char* op, int world_size) {
  if (const int joined = pm_cpu_group_world(); joined != world_size)
    pm::fail(op, "world_size is ", world_size, ", but this process's group has ", joined, joined == 1 ? " rank" : " ranks",
             "; start the job with python -m paddle.distributed.launch --nproc_per_node ", world_size);
}

std::vector<Tensor> all_reduce(const Tensor& x, int world_size) {
  check_world("all_reduce", world_size);
  const pm::Target at = pm::target("all_reduce", {{"x", x}});
  pm::check_tensor("all_reduce", "x", x, {DataType::FLOAT32}, Shape(x.shape().size(), -1));
  Tensor y = paddle::empty(x.shape(), DataType::FLOAT32, x.place());
  const auto reduce = at.device ? at.device->all_reduce : pm_cpu_all_reduce;
  pm::check_status("all_reduce", reduce(x.data<float>(), y.data<float>(), x.numel(), at.stream), at);
  return {y};
}
std::vector<Shape> all_reduce_shape(const Shape& x) { return {x}; }
std::vector<DataType> all_reduce_dtype(const DataType&) { return {DataType::FLOAT32}; }

std::vector<Tensor> all_gather(const Tensor& x, int world_size) {
  check_world("all_gather", world_size);
  const pm::Target at = pm::target("all_gather", {{"x", x}});
  pm::check_tensor("all_gather", "x", x, {DataType::FLOAT32}, {-1, -1});
  const int64_t rows = x.shape()[0], cols = x.shape()[1];
  Tensor y = paddle::empty({rows, world_size * cols}, DataType::FLOAT32, x.place());
  const auto gather = at.device ? at.device->all_gather : pm_cpu_all_gather;
  pm::check_status("all_gather", gather(x.data<float>(), y.data<float>(), rows, cols, at.stream), at);
  return {y};
}
std::vector<Shape> all_gather_shape(const Shape& x, int world_size) {
  if (x.size() != 2) pm::fail("all_gather", "x has shape ", pm::shape_text(x), ", needs [-1, -1] (-1: any size)");
  return {{x[0], x[1] < 0 ? -1 : world_size * x[1]}};
}
std::vector<DataType> all_gather_dtype(const DataType&) { return {DataType::FLOAT32}; }

}  // namespace

PD_BUILD_OP(pm_all_reduce)
    .Inputs({"X"})
    .Outputs({"Y"})
    .Attrs({"world_size: int"})
    .SetKernelFn(PD_KERNEL(all_reduce))
    .SetInferShapeFn(PD_INFER_SHAPE(all_reduce_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(all_reduce_dtype));

PD_BUILD_OP(pm_all_gather)
    .Inputs({"X"})
    .Outputs({"Y"})
    .Attrs({"world_size: int"})
    .SetKernelFn(PD_KERNEL(all_gather))
    .SetInferShapeFn(PD_INFER_SHAPE(all_gather_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(all_gather_dtype));
