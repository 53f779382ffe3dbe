// Products of packed bfloat16 weights with tokens in bfloat16 on the AMX tile unit: include/linear.h defines them,
// quantize.h the packing, matmul_tiles.h the walk.
//
// ORDER       of 32 columns the even ones are one chain from zero, the odd ones another, sum = fma(w[k], x[k], sum) in
//             increasing k; then total = total + (even + odd); zeros beyond K (tdpbf16ps, Intel's manual, volume 2). No
//             other instruction set would follow it cheaply. So where there is this unit, its order is that of any number of
//             tokens: a single one, too, goes through it, at 32 cycles for 2 KiB of weights, a tenth of what reading
//             them takes.
// DENORMALS   are zeros of their sign, as operands and as sums: the unit knows no others.
#ifndef PADDLE_MIXTRAL_MATMUL_BF16_TILES_H_
#define PADDLE_MIXTRAL_MATMUL_BF16_TILES_H_

#include "matmul_bf16.h"
#include "matmul_tiles.h"

#if defined(__AVX512F__)

namespace pm {
namespace PM_ISA {
namespace {

struct Bf16Products {
  PM_TILES_TARGET static void first() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  PM_TILES_TARGET static void second() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

// A block of tokens of K columns, rounded to bfloat16, zeros beyond K up to whole tiles: a panel is a token tile.
struct TileTokens {
  uint8_t* data;
  Panels panels;
  int64_t K;

  static int64_t tiles_of(int64_t K) { return equal_parts(K, kPairColumns); }
  TokenTiles token_tiles() const { return {data, panels.height(), tiles_of(K)}; }

  // row: the K elements of token t.
  template <class X>
  void pack(int64_t t, const X* row) const {
    const TokenTiles tiles = token_tiles();
    const int64_t p = panels.of(t), lane = t - panels.begin(p);
    for (int64_t column = 0; column < tiles.columns; ++column) {
      alignas(64) bf16 columns[kPairColumns];
      load_pairs(row, column * kPairColumns, K, columns);
      memcpy(tiles.at(p, column) + lane * kTileRowBytes, columns, kTileRowBytes);
    }
  }
};

// Memory for the blocks of up to `count` tokens of K columns.
struct TileScratch {
  Scratch<uint8_t> data;
  TileScratch(int64_t count, int64_t K) : data(token_tile_bytes(count, TileTokens::tiles_of(K), 1)) {}
  bool failed() const { return !data.data; }
  TileTokens block(int64_t count, int64_t K) const { return {data.data, {count, kTokenTile}, K}; }
};

// The product of a packed weight of any number of rows: w [tiles of rows][tiles of columns][kTileBytes].
struct TileProduct {
  using Tokens = TileTokens;
  const TileTokens& tokens;
  const uint8_t* w;

  static constexpr int kTaskSums = kTileTaskSums;
  int64_t task_tiles(int64_t tiles) const { return strips_of_task(tiles, tokens.token_tiles(), tokens.panels.number()); }
  int64_t task_panels() const { return kTaskTokenTiles; }

  void multiply(int64_t begin, int64_t end, int64_t first, int64_t last, float* sums) const {
    const uint8_t* from = w + begin * TileTokens::tiles_of(tokens.K) * kTileBytes;
    multiply_tiles<Bf16Products>(tokens.token_tiles(), first, last, from, end - begin, sums);
  }
};

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif

#endif  // PADDLE_MIXTRAL_MATMUL_BF16_TILES_H_
