// Multiplying and adding as fast as it goes: include/matrix.h.
#include "../include/matrix.h"

#include <omp.h>

#include "tiles.h"

namespace pm {
namespace PM_ISA {
namespace {

// Chains are enough to hide a multiply-add's latency (4 to 5 cycles, two a cycle) and few enough to stay in registers.
#if defined(__AVX512F__)
constexpr int kChains = 12;
#else
constexpr int kChains = 5;  // of two registers each
#endif
constexpr int kVectorBytes = 64, kTileBytes = 1024;
constexpr int64_t kFloats = kVectorBytes / 4, kPairs = kVectorBytes / 2;
constexpr int64_t kTiles = 4, kTileSums = 16 * 16;

// Where chains begin and end: values the compiler does not know, so that it can neither merge chains nor drop them.
struct alignas(64) State {
  unsigned char bytes[kChains * kVectorBytes > 2 * kTileBytes ? kChains * kVectorBytes : 2 * kTileBytes];
};

template <class MultiplyAdd>
void run_chains(int64_t rounds, State& state, const MultiplyAdd& multiply_add) {
  float* lanes = reinterpret_cast<float*>(state.bytes);
  F32x16 sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = load(lanes + c * 16);
  const F32x16 a = sums[0], b = sums[1];
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sums[c] = multiply_add(a, b, sums[c]);
  for (int c = 0; c < kChains; ++c) store(lanes + c * 16, sums[c]);
}

void run_float32(int64_t rounds, State& state) {
  run_chains(rounds, state, [](F32x16 a, F32x16 b, F32x16 sum) { return fma(a, b, sum); });
}

#if defined(__AVX512F__)

// In assembler, because around the intrinsics of these two gcc 12 copies every sum twice a round. Bits are bits: it does not
// matter here that a register of pairs or bytes is called one of floats.
void run_avx512_bf16(int64_t rounds, State& state) {
  run_chains(rounds, state, [](F32x16 a, F32x16 b, F32x16 sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
    return sum;
  });
}

void run_avx512_vnni(int64_t rounds, State& state) {
  run_chains(rounds, state, [](F32x16 a, F32x16 b, F32x16 sum) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
    return sum;
  });
}

PM_TILES_TARGET void load_tiles(const State& state) {
  configure_tiles(16);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, state.bytes, 64);
  _tile_loadd(5, state.bytes + kTileBytes, 64);
  _tile_loadd(6, state.bytes, 64);
  _tile_loadd(7, state.bytes + kTileBytes, 64);
}

PM_TILES_TARGET void store_tiles(State& state) {
  _tile_stored(0, state.bytes, 64);
  _tile_stored(3, state.bytes + kTileBytes, 64);
  _tile_release();
}

PM_TILES_TARGET void run_amx_bf16(int64_t rounds, State& state) {
  load_tiles(state);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_tiles(state);
}

PM_TILES_TARGET void run_amx_int8(int64_t rounds, State& state) {
  load_tiles(state);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  store_tiles(state);
}

#endif  // __AVX512F__

struct Unit {
  void (*run)(int64_t rounds, State& state);
  int64_t products_a_round;
};

Unit find(int unit) {
  switch (unit) {
    case PM_UNIT_FLOAT32:
      return {run_float32, kChains * kFloats};
#if defined(__AVX512F__)
    case PM_UNIT_AVX512_BF16:
      return {run_avx512_bf16, kChains * kPairs};
    case PM_UNIT_AVX512_VNNI:
      return {run_avx512_vnni, kChains * int64_t{kVectorBytes}};
    case PM_UNIT_AMX_BF16:
      return {run_amx_bf16, kTiles * kTileSums * 32};
    case PM_UNIT_AMX_INT8:
      return {run_amx_int8, kTiles * kTileSums * 64};
#endif
    default:
      return {nullptr, 0};
  }
}

}  // namespace

int run_matrix_unit(int number, int64_t rounds, int64_t* operations, void*) {
  const Unit unit = find(number);
  int threads = 1;
#pragma omp parallel num_threads(pm_num_threads())
  {
    State state;
    for (unsigned i = 0; i < sizeof state.bytes / 4; ++i) {
      const float value = 1.0f + static_cast<float>(i % 7 + rounds % 2) / 8.0f;
      memcpy(state.bytes + 4 * i, &value, 4);
    }
    asm volatile("" ::"r"(&state) : "memory");
    unit.run(rounds, state);
    asm volatile("" ::"r"(&state) : "memory");
#pragma omp single
    threads = omp_get_num_threads();
  }
  *operations = 2 * unit.products_a_round * rounds * threads;
  return PM_OK;
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(run_matrix_unit, (int unit, int64_t rounds, int64_t* operations, void* stream), (unit, rounds, operations, stream))

#ifdef PM_ISA_IS_BASELINE
extern "C" int pm_cpu_has_matrix_unit(int unit) {
  const pm::Isa isa = pm::isa();
  switch (unit) {
    case PM_UNIT_FLOAT32:
      return 1;
    case PM_UNIT_AVX512_BF16:
      return pm::has_bf16_unit();
    case PM_UNIT_AVX512_VNNI:
      return isa >= pm::Isa::avx512_vnni;
    case PM_UNIT_AMX_BF16:
      return pm::has_bf16_tiles();
    case PM_UNIT_AMX_INT8:
      return isa == pm::Isa::amx;
    default:
      return 0;
  }
}
#endif
