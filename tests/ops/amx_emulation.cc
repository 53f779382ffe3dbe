// The kernels of the amx variant on a processor without it: the tile instructions they use, in plain C++ (Intel's manual,
// volume 2), and entry points for the test. Compiled with the flags of avx512.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace emulated {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "what the instruction reads");

struct Tile {
  uint8_t row[16][64];
};
thread_local Config config;
thread_local Tile tiles[8];

void load_config(const void* from) { memcpy(&config, from, sizeof config); }
void release() { memset(&config, 0, sizeof config); }
void zero(int t) { memset(&tiles[t], 0, sizeof(Tile)); }
void load(int t, const void* from, int64_t stride) {
  emulated::zero(t);
  for (int r = 0; r < config.rows[t]; ++r)
    memcpy(tiles[t].row[r], static_cast<const char*>(from) + r * stride, config.row_bytes[t]);
}
void store(int t, void* to, int64_t stride) {
  for (int r = 0; r < config.rows[t]; ++r) memcpy(static_cast<char*>(to) + r * stride, tiles[t].row[r], config.row_bytes[t]);
}
// Signed bytes of `a` by unsigned bytes of `b`.
void dot(int sum, int a, int b) {
  for (int m = 0; m < config.rows[sum]; ++m)
    for (int n = 0; n < config.row_bytes[sum] / 4; ++n) {
      int32_t total;
      memcpy(&total, tiles[sum].row[m] + 4 * n, 4);
      for (int k = 0; k < config.row_bytes[a] / 4; ++k)
        for (int i = 0; i < 4; ++i) total += static_cast<int8_t>(tiles[a].row[m][4 * k + i]) * tiles[b].row[k][4 * n + i];
      memcpy(tiles[sum].row[m] + 4 * n, &total, 4);
    }
}

float upper_half(uint32_t word) {
  word &= 0xffff0000u;
  float value;
  memcpy(&value, &word, 4);
  return value;
}
// bfloat16 by bfloat16: of each row a chain of the even elements and one of the odd, whose sum is added; no denormals.
void dot_bf16(int sum, int a, int b) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  for (int m = 0; m < config.rows[sum]; ++m) {
    float total[16], even[16] = {}, odd[16] = {};
    memcpy(total, tiles[sum].row[m], sizeof total);
    for (int k = 0; k < config.row_bytes[a] / 4; ++k) {
      uint32_t from_a, from_b[16];
      memcpy(&from_a, tiles[a].row[m] + 4 * k, 4);
      memcpy(from_b, tiles[b].row[k], sizeof from_b);
      for (int n = 0; n < 16; ++n) {
        even[n] = __builtin_fmaf(upper_half(from_a << 16), upper_half(from_b[n] << 16), even[n]);
        odd[n] = __builtin_fmaf(upper_half(from_a), upper_half(from_b[n]), odd[n]);
      }
    }
    for (int n = 0; n < 16; ++n) total[n] = total[n] + (even[n] + odd[n]);
    memcpy(tiles[sum].row[m], total, config.row_bytes[sum]);
  }
  _mm_setcsr(before);
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero(t) emulated::zero(t)
#define _tile_loadd(t, from, stride) emulated::load(t, from, stride)
#define _tile_stored(t, to, stride) emulated::store(t, to, stride)
#define _tile_dpbsud(sum, a, b) emulated::dot(sum, a, b)
#define _tile_dpbf16ps(sum, a, b) emulated::dot_bf16(sum, a, b)

#include "../../ops/csrc/kernels/cpu/linear.cc"
#include "../../ops/csrc/kernels/cpu/moe.cc"

namespace pm {
Isa isa() { return Isa::amx; }
bool has_bf16_tiles() { return true; }
bool has_bf16_unit() { return false; }
void count_experts(int64_t, int64_t) {}
}  // namespace pm

namespace {
int threads = 2;
}

extern "C" {

int pm_num_threads(void) { return threads; }
int emulated_set_num_threads(int64_t n) {
  threads = static_cast<int>(n);
  return PM_OK;
}

int emulated_linear(const float* x, const uint8_t* w, const float* scale, float* y, int64_t T, int64_t N, int64_t K,
                    int64_t activation_bits) {
  const int bits = static_cast<int>(activation_bits);
  return pm::avx512::linear(x, PM_F32, w, PM_I8, scale, bits, y, PM_F32, T, N, K, nullptr);
}

int emulated_linear_bf16(const uint16_t* x, const uint16_t* w, float* y, int64_t T, int64_t N, int64_t K) {
  return pm::avx512::linear(x, PM_BF16, w, PM_BF16, nullptr, 16, y, PM_F32, T, N, K, nullptr);
}

int emulated_moe(const float* x, const float* gate, const uint8_t* w13, const uint8_t* w2, const float* w13_scale,
                 const float* w2_scale, float* y, int64_t T, int64_t H, int64_t I, int64_t E, int64_t top_k,
                 int64_t activation_bits) {
  const int bits = static_cast<int>(activation_bits);
  return pm::avx512::fused_moe(x, PM_F32, gate, w13, w2, PM_I8, w13_scale, w2_scale, bits, y, T, H, I, E, top_k, nullptr);
}

int emulated_moe_bf16(const uint16_t* x, const float* gate, const uint16_t* w13, const uint16_t* w2, float* y, int64_t T,
                      int64_t H, int64_t I, int64_t E, int64_t top_k) {
  return pm::avx512::fused_moe(x, PM_BF16, gate, w13, w2, PM_BF16, nullptr, nullptr, 16, y, T, H, I, E, top_k, nullptr);
}

}  // extern "C"
