// The functions of ops/csrc/kernels/cuda/ptx.cuh, whose comments say what they do and where the fragments' elements are.
//
// mma of 16-bit elements: the sixteen exact products are added in increasing k in float64, c added last, and the total is
// rounded to float32 once. (A GPU's own order and rounding are not documented; its error is of the same size.)
#ifndef CUDA_EMULATION_PTX_EMULATION_H_
#define CUDA_EMULATION_PTX_EMULATION_H_

#include <sched.h>

#include <chrono>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace simt {

inline void check_16(const void* address, const char* what, bool in_shared_memory) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("%s at %p, which is not 16-byte aligned", what, address);
  if (is_shared(address, 16) != in_shared_memory) {
    fail("%s at %p, which is %s shared memory", what, address, in_shared_memory ? "not in" : "in");
  }
}

template <typename Element>
struct Mma16 {
  float* d;
  uint32_t a[4], b[2];
  float c[4];

  static float element(uint32_t word, int i) { return simt::bits<Element>(static_cast<uint16_t>(word >> 16 * i)); }

  static void complete(uint32_t, void* const* lanes) {
    float a[16][16], b[8][16];  // b by column
    for (int lane = 0; lane < 32; ++lane) {
      const Mma16& mine = *static_cast<Mma16*>(lanes[lane]);
      const int group = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < 2; ++i) a[group + r % 2 * 8][2 * t + r / 2 * 8 + i] = element(mine.a[r], i);
      }
      for (int r = 0; r < 2; ++r) {
        for (int i = 0; i < 2; ++i) b[group][2 * t + r * 8 + i] = element(mine.b[r], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Mma16& mine = *static_cast<Mma16*>(lanes[lane]);
      const int group = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[group + r / 2 * 8][k]) * b[2 * t + r % 2][k];
        mine.d[r] = static_cast<float>(sum + mine.c[r]);
      }
    }
  }
};

struct MmaU8S8 {
  int32_t* d;
  uint32_t a[4], b[2];

  static void complete(uint32_t, void* const* lanes) {
    int32_t a[16][32], b[8][32];  // b by column
    for (int lane = 0; lane < 32; ++lane) {
      const MmaU8S8& mine = *static_cast<MmaU8S8*>(lanes[lane]);
      const int group = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < 4; ++i) {
          a[group + r % 2 * 8][4 * t + r / 2 * 16 + i] = static_cast<uint8_t>(mine.a[r] >> 8 * i);
        }
      }
      for (int r = 0; r < 2; ++r) {
        for (int i = 0; i < 4; ++i) b[group][4 * t + r * 16 + i] = static_cast<int8_t>(mine.b[r] >> 8 * i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const MmaU8S8& mine = *static_cast<MmaU8S8*>(lanes[lane]);
      const int group = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        uint32_t sum = static_cast<uint32_t>(mine.d[r]);  // wraps around
        for (int k = 0; k < 32; ++k) {
          sum += static_cast<uint32_t>(a[group + r / 2 * 8][k] * b[2 * t + r % 2][k]);
        }
        mine.d[r] = static_cast<int32_t>(sum);
      }
    }
  }
};

struct LoadMatrix {
  const void* row;
  uint32_t* r;

  static void complete(uint32_t, void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const auto* row = static_cast<const char*>(static_cast<LoadMatrix*>(lanes[8 * i + lane / 4])->row);
        memcpy(&static_cast<LoadMatrix*>(lanes[lane])->r[i], row + lane % 4 * 4, 4);
      }
    }
  }

  static void complete_transposed(uint32_t, void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 2; ++j) {
          const auto* row = static_cast<const char*>(static_cast<LoadMatrix*>(lanes[8 * i + lane % 4 * 2 + j])->row);
          memcpy(reinterpret_cast<char*>(&static_cast<LoadMatrix*>(lanes[lane])->r[i]) + 2 * j, row + lane / 4 * 2, 2);
        }
      }
    }
  }
};

}  // namespace simt

namespace pm::cuda {

#define CUDA_EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <typename Element>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], CUDA_EMULATION_SITE) {
  simt::Mma16<Element> mine = {d, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  simt::rendezvous(~0u, &mine, simt::Mma16<Element>::complete, "mma_m16n8k16", {file, line});
}

inline void mma_m16n8k32_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_EMULATION_SITE) {
  simt::MmaU8S8 mine = {d, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  simt::rendezvous(~0u, &mine, simt::MmaU8S8::complete, "mma_m16n8k32_u8s8", {file, line});
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, CUDA_EMULATION_SITE) {
  simt::check_16(shared, "ldmatrix_x4", true);
  simt::LoadMatrix mine = {shared, r};
  simt::rendezvous(~0u, &mine, simt::LoadMatrix::complete, "ldmatrix_x4", {file, line});
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, CUDA_EMULATION_SITE) {
  simt::check_16(shared, "ldmatrix_x4_trans", true);
  simt::LoadMatrix mine = {shared, r};
  simt::rendezvous(~0u, &mine, simt::LoadMatrix::complete_transposed, "ldmatrix_x4_trans", {file, line});
}

#undef CUDA_EMULATION_SITE

inline void cp_async_16(void* shared, const void* global, bool valid) {
  simt::check_16(shared, "cp_async_16 to", true);
  if (valid) simt::check_16(global, "cp_async_16 from", false);
  simt::copy_async(shared, valid ? global : nullptr);
}

inline void cp_async_commit() { simt::commit_copies(); }

template <int N>
void cp_async_wait() {
  simt::wait_copies(N);
}

inline uint4 load_streaming_16(const void* global) {
  simt::check_16(global, "load_streaming_16", false);
  return *static_cast<const uint4*>(global);
}

inline void prefetch(const void*) {}
inline void await_previous() { simt::await_previous(); }  // a stream does everything at once

// Between processes, which are the ranks of the emulated collectives. There may be more of them than processors: whoever
// looks at the clock waits for another.
inline uint64_t load_acquire_system(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
inline void store_release_system(uint64_t* word, uint64_t v) { __atomic_store_n(word, v, __ATOMIC_RELEASE); }
inline uint64_t nanoseconds() {
  sched_yield();
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

}  // namespace pm::cuda
#endif  // CUDA_EMULATION_PTX_EMULATION_H_
