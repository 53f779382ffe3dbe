// The functions of NCCL that move bytes, of a library found at run time: nothing of NCCL is needed to build, or to run where
// GPUs map one another's memory. Declared after NCCL's documentation (API of version 2), with its enumerations as int.
#ifndef PADDLE_MIXTRAL_CUDA_NCCL_H_
#define PADDLE_MIXTRAL_CUDA_NCCL_H_

#include <cuda_runtime.h>
#include <stddef.h>

#include "../include/collective.h"

namespace pm::cuda {

struct NcclCommunicator;
struct NcclId {
  char bytes[PM_CUDA_NCCL_ID_BYTES];
};
constexpr int kNcclSuccess = 0;  // of ncclResult_t
constexpr int kNcclFloat32 = 7;  // of ncclDataType_t

struct Nccl {
  int (*GetVersion)(int* version);
  int (*GetUniqueId)(NcclId* id);
  int (*CommInitRank)(NcclCommunicator** communicator, int world, NcclId id, int rank);
  int (*CommGetAsyncError)(NcclCommunicator* communicator, int* result);
  int (*CommAbort)(NcclCommunicator* communicator);
  const char* (*GetErrorString)(int result);
  int (*GroupStart)();
  int (*GroupEnd)();
  int (*Send)(const void* from, size_t count, int dtype, int peer, NcclCommunicator* communicator, cudaStream_t stream);
  int (*Recv)(void* to, size_t count, int dtype, int peer, NcclCommunicator* communicator, cudaStream_t stream);
  int (*AllGather)(const void* from, void* to, size_t count_of_each, int dtype, NcclCommunicator* communicator,
                   cudaStream_t stream);
};

// Opens the library, once; PM_UNSUPPORTED where it cannot be used.
int load_nccl(const char* library, int* version);
// Null until load_nccl has returned PM_OK.
const Nccl* loaded_nccl();

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_NCCL_H_
