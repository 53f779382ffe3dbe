// Linear layers: include/linear.h, on tokens and weights as device.h says.
//
// FEW         up to 32 tokens: decode.cuh. One launch: tokens of 16 bits are read as they are, up to eight for int8 weights
//             are rounded by every block in its own shared memory while its first weights are on their way. More tokens, or
//             such as do not fit, are prepared by a launch before.
// MANY        grouped.cuh, of one group.
// BUDGET      (estimated, not measured) Mixtral-8x7B, one token, int8: qkv is 192 blocks of 128 KB, o 128, lm_head 1,000;
//             with 82 KB of shared memory two are on a processor, so that qkv and o are there at once. At 4.8 TB/s they take
//             5.2, 3.5 and 27 us. Each block also reads x twice from the second-level cache (8 KB) and rounds 32 elements a
//             thread, about 250 instructions, while its first 56 KB of weights are on their way. Eight tokens: 64 KB and
//             2,000 instructions, one block a processor.
// UNSUPPORTED activations or weights of other types than device.h names, K > 65,536 with int8.
#include "decode.cuh"
#include "formats.cuh"
#include "grouped.cuh"
#include "tokens.cuh"

namespace pm::cuda {
namespace {

constexpr int kResidentTokens = kGroupTokens;
constexpr int64_t kResidentBytes = 72 * 1024;  // eight tokens of 4,096 columns

// Bytes from a plane to the next of a block's own tokens: tokens are an odd number of half lines apart, so that eight
// lanes, two tokens, find all banks.
template <class Format>
__host__ __device__ constexpr int64_t resident_stride(int tiles) {
  return Format::kPlanes == 2 ? tiles * kTokenBytes + kTokenBytes / 2 : (tiles | 1) * kTokenBytes;
}

// tokens: prepared, or those that this block prepares from x (Resident).
template <class Format, int Groups, bool Resident>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks)
    linear_decode(Activations x, TokenRows tokens, const unsigned char* w, RowsOut out, int T, int tiles) {
  using Work = Stream<Format, Groups, Resident>;
  __shared__ float scale[kDecodeTokens];
  __shared__ int32_t total[kDecodeTokens];
  unsigned char* shared = dynamic_shared();
  Work work(shared, tiles, 1, Resident ? resident_stride<Format>(tiles) : tokens.stride);
  const int64_t strip = blockIdx.x;
  const auto locate = [&](int) {
    typename Work::Segment segment;
    segment.weights = w + (strip * tiles + work.first) * kTileBytes;
#pragma unroll
    for (int n = 0; n < Groups; ++n) {
      const int token = n * kGroupTokens + work.lane / 4;
      segment.token[n] = !Resident && token < T ? work.of_token(tokens, token) : nullptr;
    }
    return segment;
  };
  work.start(locate);
  const unsigned char* resident = nullptr;
  if constexpr (Resident) {
    __shared__ TokenScratch<kResidentTokens> scratch;
    const TokenRows own{shared + Work::kSharedBytes, resident_stride<Format>(tiles), scale, total};
    round_tokens<Format::kPlanes>(x, 0, T, tiles, own, scratch);
    resident = work.of_token(own, min(work.lane / 4, T - 1));  // a column of no token gets the sums of another one
  } else if (Format::kFixed && static_cast<int>(threadIdx.x) < T) {
    scale[threadIdx.x] = tokens.scale[threadIdx.x];
    total[threadIdx.x] = tokens.total[threadIdx.x];
  }
  typename Work::Sums sum;
  const int groups = (T + kGroupTokens - 1) / kGroupTokens;
  work.multiply_segment(sum, groups, resident, locate);
  work.share(sum, groups);
  const int64_t n = strip * kTileRows + work.lane;
  if (n < out.N)
    for (int token = work.warp; token < T; token += kQuarters) {
      const float sum =
          work.total(token, work.lane, Format::kFixed ? scale[token] : 1.0f, Format::kFixed ? total[token] : 0);
      store_element(out.y, out.dtype, token * out.N + n, out.scaled(0, n, sum));
    }
}

template <class Format, int Groups, bool Resident>
int launch_decode(const Activations& x, const TokenRows& tokens, const void* w, const RowsOut& out, int64_t T,
                  void* stream) {
  const int tiles = static_cast<int>(equal_parts(x.K, Format::kColumns));
  using Work = Stream<Format, Groups, Resident>;
  const size_t resident = Resident ? static_cast<size_t>(T * Format::kPlanes * resident_stride<Format>(tiles)) : 0;
  return launch(linear_decode<Format, Groups, Resident>, dim3(equal_parts(out.N, kTileRows)), dim3(kDecodeThreads),
                Work::kSharedBytes + resident, stream, x, tokens, static_cast<const unsigned char*>(w), out, T, tiles);
}

// How many launches, and what they need: linear_workspace and linear agree on it.
template <class Format>
struct Plan {
  int64_t T, K;
  int tiles;
  Plan(int64_t T_, int64_t K_) : T(T_), K(K_), tiles(static_cast<int>(equal_parts(K_, Format::kColumns))) {}
  bool few() const { return T <= kDecodeTokens; }
  bool resident() const {
    return Format::kFixed && T <= kResidentTokens && T * Format::kPlanes * resident_stride<Format>(tiles) <= kResidentBytes;
  }
  bool prepares() const { return !resident() && !taken_as_they_are<Format>(K); }
};

template <class Format>
int linear_of(const Activations& x, const void* w, const RowsOut& out, int64_t T, void* workspace, void* stream) {
  const Plan<Format> plan(T, x.K);
  TokenRows tokens{static_cast<unsigned char*>(const_cast<void*>(x.data)), plan.tiles * kTokenBytes, nullptr, nullptr};
  if (plan.prepares()) {
    Workspace room{static_cast<unsigned char*>(workspace)};
    tokens = take_tokens<Format>(room, T, x.K);
    if (int status = launch(prepare_kernel<Format>, dim3(T), dim3(kPrepareThreads), 0, stream, x, plan.tiles, tokens))
      return status;
  }
  if constexpr (Format::kFixed)
    if (plan.resident()) return launch_decode<Format, 1, true>(x, tokens, w, out, T, stream);
  if (T <= kGroupTokens) return launch_decode<Format, 1, false>(x, tokens, w, out, T, stream);
  if (plan.few()) return launch_decode<Format, kDecodeTokens / kGroupTokens, false>(x, tokens, w, out, T, stream);
  const int64_t strips = equal_parts(out.N, kTileRows);
  const WholeBatch batch{T};
  return T <= kFewRuns ? launch_grouped<Format, 64>(tokens, w, strips, plan.tiles, batch, out, stream)
                       : launch_grouped<Format, 128>(tokens, w, strips, plan.tiles, batch, out, stream);
}

}  // namespace

int64_t linear_workspace(pm_dtype w_dtype, int64_t T, int64_t, int64_t K) {
  Workspace room{nullptr};
  if (w_dtype == PM_I8)
    take_tokens<FixedPoint<2>>(room, T, K);
  else if (Plan<Floating<__half>>(T, K).prepares())
    take_tokens<Floating<__half>>(room, T, K);
  return room.used;
}

int linear(const void* x, pm_dtype x_dtype, const void* w, pm_dtype w_dtype, const float* scale, int activation_bits,
           void* y, pm_dtype y_dtype, int64_t T, int64_t N, int64_t K, void* workspace, void* stream) {
  return with_format("linear", x_dtype, w_dtype, activation_bits, K, [&](auto format) {
    using Format = decltype(format);
    if (y_dtype == PM_I8) return fail(PM_UNSUPPORTED, "linear: y is int8, needs float32, bfloat16 or float16");
    return linear_of<Format>({x, x_dtype, K}, w, {Format::kFixed ? scale : nullptr, y, y_dtype, N}, T, workspace, stream);
  });
}

}  // namespace pm::cuda
