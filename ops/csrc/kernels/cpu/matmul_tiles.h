// Products on the AMX tile unit (tiles.h), whatever type it multiplies.
//
// REGISTERS   Four tiles of sums, 16 tokens by 16 rows of the weight each, of two tiles of tokens and the two halves of a
//             packed tile: 4 KiB loaded, 65,536 operations of bfloat16 done. Intel's optimization manual has 16 cycles for
//             a product, 8 for a load from the first-level cache, 16 for a store and 204 to configure the unit.
// BLOCKS      of kBlockTiles tiles of columns; sums are kept in memory from one to the next. A block of a strip's weights,
//             16 KiB, stays in the first-level cache (48 KiB) while all tokens of the task pass by from the second-level
//             one. Of that the 512 cycles of a block's products with a pair of token tiles take 16 KiB of tokens, 4 KiB of
//             sums and, with 128 tokens, 4 KiB of weights: 48 bytes a cycle, as much as it is said to sustain. Without
//             blocks it were 64, with blocks twice as long, which the first-level cache cannot keep, 72 (so says a model
//             of both caches, fed by the emulation).
// STRIPS      A task has several, up to kTaskStrips, if all tokens and a strip do not fit into the second-level cache (2
//             MiB): a block of tokens is then read from the third for four strips, 8 bytes a cycle, and not for each, 32.
// MEMORY      A weight is read once for all tokens of a task, up to 256. With 128, what an expert has of 512 tokens, 128
//             operations a byte of bfloat16: 3.6 TFLOP/s at 28 GB/s. So the next block is asked for while this one is used,
//             a share of it beside each pair of token tiles.
// ORDER       one product of tiles for every tile of columns, in increasing order, whatever the blocks, strips and tokens.
#ifndef PADDLE_MIXTRAL_MATMUL_TILES_H_
#define PADDLE_MIXTRAL_MATMUL_TILES_H_

#include "matmul.h"
#include "tiles.h"

#if defined(__AVX512F__)

namespace pm {
namespace PM_ISA {
namespace {

constexpr int kTokenTile = 16;       // tokens of a tile, at most
constexpr int kTaskTokenTiles = 16;  // of one task, at most
constexpr int kTaskStrips = 4;       // the same
constexpr int kTileTaskSums = kTaskStrips * kTaskTokenTiles * kTokenTile * kTile;
constexpr int kBlockTiles = 8;
constexpr int64_t kCachedBytes = 7 << 18;  // in the second-level cache, from one strip to the next
constexpr int kWeightLines = kTileBytes / kTileRowBytes;

// Tokens as the unit takes them: [token tile][tile of columns][height][64 bytes].
struct TokenTiles {
  uint8_t* data;
  int height;       // tokens of the largest token tile; a smaller one has a row of no meaning, whose sums have none either
  int64_t columns;  // tiles of them

  int64_t column_bytes() const { return height * kTileRowBytes; }
  // A block more than there are: with 4,096 columns all tiles would begin in the same sets of the second-level cache.
  int64_t tile_bytes() const { return (columns + kBlockTiles) * column_bytes(); }
  uint8_t* at(int64_t tile, int64_t column) const { return data + tile * tile_bytes() + column * column_bytes(); }
};
// Of `count` tokens and so many token tiles each; of fewer it is never more.
inline int64_t token_tile_bytes(int64_t count, int64_t columns, int each) {
  const Panels tiles{count, kTokenTile};
  return tiles.number() * each * TokenTiles{nullptr, tiles.height(), columns}.tile_bytes();
}

// Strips of a task, of `strips` in all, for `number` token tiles.
inline int64_t strips_of_task(int64_t strips, const TokenTiles& tokens, int64_t number) {
  if (number * tokens.tile_bytes() + tokens.columns * kTileBytes <= kCachedBytes) return 1;
  const int64_t share = strips / (pm_num_threads() * 4);  // or some threads would have nothing to do
  return share < 1 ? 1 : share < kTaskStrips ? share : kTaskStrips;
}

// What one or two token tiles add to their sums by `columns` tiles of a strip. w: the first of them; ahead: weights that
// will be needed soon, `lines` lines of 64 bytes a tile.
template <class Products, bool Two>
PM_TILES_TARGET void tile_block(const uint8_t* w, int64_t columns, const TokenTiles& tokens, const uint8_t* token,
                                bool fresh, const uint8_t* ahead, int lines, uint8_t* sums) {
  constexpr int kHalf = kHalfTile * 4, kSumsOfToken = kTile * 4;  // bytes
  uint8_t* const second_sums = sums + tokens.height * kSumsOfToken;
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kSumsOfToken);
    _tile_loadd(1, sums + kHalf, kSumsOfToken);
    if (Two) {
      _tile_loadd(2, second_sums, kSumsOfToken);
      _tile_loadd(3, second_sums + kHalf, kSumsOfToken);
    }
  }
  for (int64_t column = 0; column < columns; ++column) {
    _tile_loadd(6, w, 2 * kTileRowBytes);
    _tile_loadd(7, w + kTileRowBytes, 2 * kTileRowBytes);
    _tile_loadd(4, token, kTileRowBytes);
    Products::first();
    if (Two) {
      _tile_loadd(5, token + tokens.tile_bytes(), kTileRowBytes);
      Products::second();
    }
    for (int line = 0; line < lines; ++line) __builtin_prefetch(ahead + line * kTileRowBytes, 0, 2);
    w += kTileBytes;
    ahead += kTileBytes;
    token += tokens.column_bytes();
  }
  _tile_stored(0, sums, kSumsOfToken);
  _tile_stored(1, sums + kHalf, kSumsOfToken);
  if (Two) {
    _tile_stored(2, second_sums, kSumsOfToken);
    _tile_stored(3, second_sums + kHalf, kSumsOfToken);
  }
}

// Sums of `strips` strips from w on with token tiles first..last-1: words [strip][token tile][height][kTile].
template <class Products>
PM_TILES_TARGET void multiply_tiles(const TokenTiles& tokens, int64_t first, int64_t last, const uint8_t* w, int64_t strips,
                                    void* sums) {
  const auto weights = [&](int64_t strip, int64_t column) { return w + (strip * tokens.columns + column) * kTileBytes; };
  const int64_t pairs = equal_parts(last - first, 2);
  configure_tiles(tokens.height);
  for (int64_t column = 0; column < tokens.columns; column += kBlockTiles) {
    const int64_t left = tokens.columns - column, columns = left < kBlockTiles ? left : kBlockTiles;
    for (int64_t strip = 0; strip < strips; ++strip) {
      const uint8_t* next = strip + 1 < strips ? weights(strip + 1, column)
                            : left > columns   ? weights(0, column + columns)
                                               : weights(strips, 0);  // which the next task begins with
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t tile = first + 2 * pair, line = pair * kWeightLines / pairs;
        const int lines = static_cast<int>((pair + 1) * kWeightLines / pairs - line);
        uint8_t* to =
            static_cast<uint8_t*>(sums) + (strip * (last - first) + tile - first) * tokens.height * kTile * sizeof(float);
        const auto block = tile + 1 < last ? tile_block<Products, true> : tile_block<Products, false>;
        block(weights(strip, column), columns, tokens, tokens.at(tile, column), column == 0, next + line * kTileRowBytes,
              lines, to);
      }
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif

#endif  // PADDLE_MIXTRAL_MATMUL_TILES_H_
