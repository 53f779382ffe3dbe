// The AMX tile unit: eight registers of up to 16 rows of 64 bytes.
#ifndef PADDLE_MIXTRAL_TILES_H_
#define PADDLE_MIXTRAL_TILES_H_

#include "dispatch.h"

#if defined(__AVX512F__)
#define PM_TILES_TARGET __attribute__((target("amx-tile,amx-int8,amx-bf16")))

namespace pm {
namespace PM_ISA {
namespace {

constexpr int kTileRowBytes = 64;

// Tiles 0 to 5 of so many rows, 6 and 7 of sixteen; every row is 64 bytes. This thread's until _tile_release().
PM_TILES_TARGET inline void configure_tiles(int rows) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = kTileRowBytes;
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : 16);
  }
  // gcc 12 tells the optimiser of 8 of the 64 bytes only.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif

#endif  // PADDLE_MIXTRAL_TILES_H_
