// The tile unit of a processor with AMX as Intel's manual (volume 2) has it: its registers and what each instruction does.
//
// Every function returns nullptr, or what the processor would raise and why; then nothing has changed. The rows and bytes
// of a tile that its configuration does not have cannot be seen: the unit keeps zeros there, this one whatever comes.
#ifndef PADDLE_MIXTRAL_TESTS_TILE_UNIT_H_
#define PADDLE_MIXTRAL_TESTS_TILE_UNIT_H_

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <initializer_list>

namespace amx {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;  // of palette 1, the only one there is

// What ldtilecfg reads.
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

class TileUnit {
 public:
  const char* load_config(const void* from) {
    Config found;
    memcpy(&found, from, sizeof found);
    if (found.palette == 0) return release();
    if (found.palette != 1) return "#GP: the palette is neither 0 nor 1";
    for (uint8_t byte : found.reserved)
      if (byte) return "#GP: a reserved byte of the configuration, 2 to 15, is not zero";
    for (int t = 0; t < 16; ++t) {
      const int rows = found.rows[t], bytes = found.row_bytes[t];
      if (t >= kTiles && (rows || bytes)) return "#GP: the configuration has a tile above 7";
      if (rows > kRows) return "#GP: a tile has more than 16 rows";
      if (bytes > kRowBytes) return "#GP: a tile has rows of more than 64 bytes";
      if (!rows != !bytes) return "#GP: a tile has rows without bytes, or bytes without rows";
    }
    // The processor's own, where a load or store was interrupted.
    if (found.start_row) return "not emulated: a configuration whose start_row is not zero";
    release();
    config_ = found;
    return nullptr;
  }

  const char* store_config(void* to) const {
    memcpy(to, &config_, sizeof config_);
    return nullptr;
  }

  const char* release() {
    memset(&config_, 0, sizeof config_);
    memset(tiles_, 0, sizeof tiles_);
    return nullptr;
  }

  const char* zero(int t) {
    if (const char* why = refused(t)) return why;
    memset(tiles_[t], 0, sizeof tiles_[t]);
    return nullptr;
  }

  const char* load(int t, const char* from, uint64_t stride) {
    if (const char* why = refused_words(t)) return why;
    for (int r = 0; r < config_.rows[t]; ++r) memcpy(tiles_[t][r], from + r * stride, config_.row_bytes[t]);
    return nullptr;
  }

  const char* store(int t, char* to, uint64_t stride) const {
    if (const char* why = refused_words(t)) return why;
    for (int r = 0; r < config_.rows[t]; ++r) memcpy(to + r * stride, tiles_[t][r], config_.row_bytes[t]);
    return nullptr;
  }

  // sum[m][n] += the four products of bytes of a[m][k] and b[k][n], over k; int32 that wrap around.
  const char* multiply_bytes(int sum, int a, int b, bool a_signed, bool b_signed) {
    if (const char* why = refused_product(sum, a, b)) return why;
    const int words = words_of(a);
    __m512i even_b[kRows], odd_b[kRows];
    for (int k = 0; k < words; ++k) {
      const __m512i row = _mm512_load_si512(tiles_[b][k]);
      even_b[k] = even_bytes(row, b_signed);
      odd_b[k] = odd_bytes(row, b_signed);
    }
    for (int m = 0; m < config_.rows[sum]; ++m) {
      __m512i total = _mm512_load_si512(tiles_[sum][m]);
      for (int k = 0; k < words; ++k) {
        const __m512i word = word_of(a, m, k);
        total = _mm512_add_epi32(total, _mm512_madd_epi16(even_bytes(word, a_signed), even_b[k]));
        total = _mm512_add_epi32(total, _mm512_madd_epi16(odd_bytes(word, a_signed), odd_b[k]));
      }
      _mm512_store_si512(tiles_[sum][m], total);
    }
    return nullptr;
  }

  // sum[m][n] += (a chain of fused multiply-adds over the even bfloat16 of a[m] and b[k][n]) + (one over the odd ones);
  // rounded to nearest even, denormals are zeros: the unit does not ask MXCSR. The caller's is overwritten.
  __attribute__((noinline)) const char* multiply_bf16(int sum, int a, int b) {
    if (const char* why = refused_product(sum, a, b)) return why;
    _mm_setcsr(_MM_MASK_MASK | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON | _MM_ROUND_NEAREST);
    asm volatile("" : : : "memory");  // so that no operand is loaded, and nothing computed, before
    const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int m = 0; m < config_.rows[sum]; ++m) {
      __m512 even_sum = _mm512_setzero_ps(), odd_sum = _mm512_setzero_ps();
      for (int k = 0; k < words_of(a); ++k) {
        const __m512i from_a = word_of(a, m, k), from_b = _mm512_load_si512(tiles_[b][k]);
        even_sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(from_a, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(from_b, 16)), even_sum);
        odd_sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(from_a, odd)),
                                  _mm512_castsi512_ps(_mm512_and_si512(from_b, odd)), odd_sum);
      }
      const __m512 before = _mm512_load_ps(tiles_[sum][m]);
      _mm512_store_ps(tiles_[sum][m], _mm512_add_ps(before, _mm512_add_ps(even_sum, odd_sum)));
    }
    return nullptr;
  }

 private:
  int words_of(int t) const { return config_.row_bytes[t] / 4; }
  __m512i word_of(int t, int row, int word) const {
    int32_t value;
    memcpy(&value, tiles_[t][row] + 4 * word, 4);
    return _mm512_set1_epi32(value);
  }
  // Of each pair of bytes, widened.
  static __m512i even_bytes(__m512i v, bool is_signed) { return odd_bytes(_mm512_slli_epi16(v, 8), is_signed); }
  static __m512i odd_bytes(__m512i v, bool is_signed) {
    return is_signed ? _mm512_srai_epi16(v, 8) : _mm512_srli_epi16(v, 8);
  }

  const char* refused(int t) const {
    if (config_.palette == 0) return "#UD: no configuration of tiles is loaded";
    if (t >= kTiles) return "#UD: there is no tile above 7";
    return config_.rows[t] == 0 ? "#UD: the configuration does not have this tile" : nullptr;
  }

  const char* refused_words(int t) const {
    if (const char* why = refused(t)) return why;
    return config_.row_bytes[t] % 4 ? "#UD: a row of the tile is not a number of words" : nullptr;
  }

  const char* refused_product(int sum, int a, int b) const {
    if (sum == a || a == b || sum == b) return "#UD: the three tiles of a product are not distinct";
    for (int t : {sum, a, b})
      if (const char* why = refused_words(t)) return why;
    if (config_.rows[sum] != config_.rows[a]) return "#UD: the sums have not as many rows as the first operand";
    if (words_of(a) != config_.rows[b])
      return "#UD: a row of the first operand has not as many words as the second has rows";
    if (words_of(sum) != words_of(b)) return "#UD: the sums have not as many columns as the second operand";
    return nullptr;
  }

  Config config_;  // all zeros: none
  alignas(64) uint8_t tiles_[kTiles][kRows][kRowBytes];
};

}  // namespace amx

#endif  // PADDLE_MIXTRAL_TESTS_TILE_UNIT_H_
