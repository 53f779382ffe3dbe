// One tile of packed weights with eight tokens on the tensor cores: what every product of this library is made of.
//
// WEIGHTS     are the CPU's bytes (include/quantize.h): a tile is 2048 bytes, [16 words][32 rows] of 32 bits, a
//             word four columns of int8 (u = w + 128) or two of 16 bits; the tiles of 32 rows (a strip) follow each other
//             over K.
// FRAGMENTS   in shared memory a tile's chunks of 16 bytes (four rows of a word) lie at place(): lane = 4 group + t takes
// rows
//             16 m + 2 group and the next one of words 4 t .. 4 t + 3, 8 bytes each, and half a warp finds all banks. Two
//             such words are the four A registers of rows `group` and `group + 8` of a product in their order, so that
//             nothing is moved between registers: row 16 m + 2 group + h of the tile is row group + 8 h of product m.
// TOKENS      of a tile are 64 bytes a plane in increasing k, and lane (group, t) takes 16 of token `group`: its words 4 t
//             .. 4 t + 3. Step s of a tile multiplies words 4 t + 2 s and 4 t + 2 s + 1: columns in another order than they
//             lie, the same order wherever a tile is multiplied.
// SUMS        sum [m][2 h + i]: row 16 m + 2 group + h of the tile with token 2 t + i. So gate and up rows of the same
//             columns are one thread's.
// INT8        tokens are fixed point as include/linear.h says, q = lo + 256 hi in planes [lo, hi] or [lo]; sums of u lo and
//             of u hi are exact in int32 for K <= 65,536, and one conversion of lo + 256 hi - 128 sum q, exact in int64, is
//             rounded: the CPU's bits whatever the order.
// 16 BITS     K is cut into four quarters of equally many tiles (the last ones fewer). A quarter's sum is accumulated by the
//             tensor cores in increasing k, and quarters are added in their order from zero: the same bits for few and for
//             many tokens.
#ifndef PADDLE_MIXTRAL_CUDA_TILE_CUH_
#define PADDLE_MIXTRAL_CUDA_TILE_CUH_

#include "ptx.cuh"
#include "scalar.cuh"

namespace pm::cuda {

constexpr int kTileRows = 32, kTileBytes = 2048;
constexpr int kTokenBytes = 64;  // of a token's plane, a tile
constexpr int kChunks = kTileBytes / 16;
constexpr int kGroupTokens = 8;  // the n of an mma
constexpr int kQuarters = 4;

// int8 weights and tokens in 8 * Planes bits.
template <int Planes>
struct FixedPoint {
  static constexpr int kPlanes = Planes, kColumns = 64;
  static constexpr bool kFixed = true;
  using Sum = int32_t;
  static __device__ __forceinline__ void mma(Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k32_u8s8(sum, a, b);
  }
};

// Weights and tokens of 16 bits.
template <class Element>
struct Floating {
  static constexpr int kPlanes = 1, kColumns = 32;
  static constexpr bool kFixed = false;
  using Sum = float;
  static __device__ __forceinline__ void mma(Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16<Element>(sum, a, b, sum);
  }
};

// Of a K in tiles: those of the first quarters; the last ones have what is left, perhaps none.
__host__ __device__ inline int quarter_tiles(int tiles) { return (tiles + kQuarters - 1) / kQuarters; }

// Where a tile's chunk, 0 .. kChunks - 1 in the order of global memory, lies in shared memory.
__device__ __forceinline__ int place(int chunk) { return (chunk ^ chunk / 32 * 2) * 16; }

struct TileFragment {
  uint32_t a[2][2][4];  // [m][s]
};

// shared: a tile's chunks, each at its place().
__device__ __forceinline__ TileFragment load_tile(const unsigned char* shared, int lane) {
  const int group = lane / 4, t = lane % 4;
  TileFragment w;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const unsigned char* const from = shared + place(32 * t + 4 * m + group / 2) + group % 2 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 rows = *reinterpret_cast<const uint2*>(from + i * (kTileRows * 4));
      w.a[m][i / 2][i % 2 * 2] = rows.x, w.a[m][i / 2][i % 2 * 2 + 1] = rows.y;
    }
  }
  return w;
}

// sum += the tile with eight tokens.
template <class Format>
__device__ __forceinline__ void multiply(typename Format::Sum (&sum)[2][4], const TileFragment& w, uint4 tokens) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const uint32_t b[2] = {s ? tokens.z : tokens.x, s ? tokens.w : tokens.y};
#pragma unroll
    for (int m = 0; m < 2; ++m) Format::mma(sum[m], w.a[m][s], b);
  }
}

// Tokens as products take them, in global or shared memory: [token][plane][tiles of K][64 bytes], zeros beyond K.
struct TokenRows {
  unsigned char* data;
  int64_t stride;  // bytes from a plane to the next one, of this token or of the next
  float* scale;    // [tokens] of fixed point: s,
  int32_t* total;  // [tokens] sum of q
};

// The product of a row of weights with a token, from the sums of its planes.
template <class Format>
__device__ __forceinline__ float product(const typename Format::Sum (&sum)[Format::kPlanes], float scale, int32_t total) {
  if constexpr (Format::kFixed) {
    int64_t exact = sum[0];
    if constexpr (Format::kPlanes == 2) exact += 256 * static_cast<int64_t>(sum[1]);
    return __fmul_rn(__ll2float_rn(exact - 128 * static_cast<int64_t>(total)), scale);
  } else {
    return sum[0];
  }
}

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_TILE_CUH_
