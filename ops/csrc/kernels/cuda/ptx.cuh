// The library's inline PTX, one function an instruction: matrix products, matrix loads and asynchronous copies of sm_80.
//
// Fragments (PTX ISA, "Matrix fragments for mma"), lane = 4 * group + t, group 0..7, t 0..3:
//   A m16 x k16 of 16 bits   a[0] row group, columns 2t, 2t+1      a[1] row group + 8, the same columns
//                            a[2] row group, columns 2t+8, 2t+9    a[3] row group + 8, those
//   B k16 x n8 of 16 bits    b[0] column group, rows 2t, 2t+1      b[1] column group, rows 2t+8, 2t+9
//   A m16 x k32 of 8 bits    a[0] row group, columns 4t..4t+3      a[1] row group + 8, the same columns
//                            a[2] row group, columns 4t+16..4t+19  a[3] row group + 8, those
//   B k32 x n8 of 8 bits     b[0] column group, rows 4t..4t+3      b[1] column group, rows 4t+16..4t+19
//   C, D m16 x n8            d[0], d[1] row group, columns 2t, 2t+1   d[2], d[3] row group + 8, those
//   the element of the lower index is in the register's lower bits.
#ifndef PADDLE_MIXTRAL_CUDA_PTX_CUH_
#define PADDLE_MIXTRAL_CUDA_PTX_CUH_

#include <stdint.h>

#include "launch.cuh"

#ifdef PM_EMULATE
#include "ptx_emulation.h"
#else

namespace pm::cuda {

// d = a b + c, elements __nv_bfloat16 or __half, sums in float32. d may be c.
template <typename Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const float (&c)[4]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                            const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                     const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// d += a b, a unsigned and b signed bytes, exact in int32 (wrapping around).
__device__ __forceinline__ void mma_m16n8k32_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16 bits: lane 8 i + j brings the address of row j of matrix i (16-byte aligned, in shared memory)
// and gets in r[i] the elements 2t, 2t+1 of row `group` of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same of the transposed matrices: r[i] holds rows 2t, 2t+1 of column `group` of matrix i.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared memory, both 16-byte aligned; where not `valid`, zeros, and `global` is not read. They are
// there for this thread after its cp_async_wait, for the block after the barrier that follows it.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the group of this thread's copies since the last commit (perhaps of none).
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most the last N of this thread's groups are still under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// 16 bytes of global memory that nothing will write while the kernel runs and this block reads but once.
__device__ __forceinline__ uint4 load_streaming_16(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}

// Asks for the 128 bytes of global memory at an address to come to the second level cache.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global)); }

// In a kernel of Overlap::previous (launch.cuh): waits until the kernels before on the stream have ended and what they wrote
// is seen, and lets the next one begin once all blocks have come here. Without GPUs that have this, or without need,
// nothing.
__device__ __forceinline__ void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// A word that other GPUs, or the host, read and write: what was written before the store (by this thread, or by others of
// its block before a barrier) is seen after a load that sees the stored word.
__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* word) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];\n" : "=l"(v) : "l"(word) : "memory");
  return v;
}
__device__ __forceinline__ void store_release_system(uint64_t* word, uint64_t v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;\n" ::"l"(word), "l"(v) : "memory");
}

// A clock that counts nanoseconds, in steps of up to a microsecond.
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t v;
  asm volatile("mov.u64 %0, %%globaltimer;\n" : "=l"(v));
  return v;
}

}  // namespace pm::cuda

#endif  // PM_EMULATE
#endif  // PADDLE_MIXTRAL_CUDA_PTX_CUH_
