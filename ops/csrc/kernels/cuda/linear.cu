// Linear layers: include/linear.h, on tokens and weights as device.h says.
//
// FEW         up to 32 tokens: decode.cuh. One launch: tokens of 16 bits are read as they are, those for int8 weights are
//             rounded by every block in its own shared memory while its first weights are on their way, sixteen at a time
//             or as many as fit. More tokens are parts of the grid: blocks with the same strips and other tokens run side
//             by side, so that weights come from memory once and from the second level cache for each part. Blocks stay and
//             take strip after strip. Where not even eight fit (more than 6,976 columns on an A100), a launch before
//             prepares tokens.
// MANY        grouped.cuh, of one group.
// BUDGET      (counted, not measured; tests/gpu/PREDICTIONS.md)
// UNSUPPORTED activations or weights of other types than device.h names, K > 65,536 with int8.
#include "decode.cuh"
#include "formats.cuh"
#include "grouped.cuh"
#include "tokens.cuh"

namespace pm::cuda {
namespace {

// Tokens that a block rounds for itself, where they fit: 1 or 2 groups of them at once.
constexpr int64_t kAtOnce = 2 * kGroupTokens;
constexpr int64_t kFewResidentBytes = 72 * 1024;  // eight tokens of 4,096 columns: of any GPU
constexpr int kScratchBytes = 4 * 1024;           // static shared memory beside
static_assert(sizeof(TokenScratch<kAtOnce>) + kAtOnce * (sizeof(float) + sizeof(int32_t)) <= kScratchBytes, "too little");
constexpr int kShortStages = 5;  // of a ring that leaves more room for tokens: 32 KB under way
// Parts of a grid by eights of tokens are at most four; more would read weights so often that a launch had better prepare
// the tokens.
constexpr int64_t kManyParts = kDecodeTokens / kGroupTokens + 1;

// Bytes from a plane to the next of a block's own tokens: tokens are an odd number of half lines apart, so that eight
// lanes, two tokens, find all banks.
template <class Format>
__host__ __device__ constexpr int64_t resident_stride(int tiles) {
  return Format::kPlanes == 2 ? tiles * kTokenBytes + kTokenBytes / 2 : (tiles | 1) * kTokenBytes;
}

// tokens: prepared, or those that this block prepares from x (Resident). Strips blockIdx.x, + gridDim.x, ... are a block's,
// with the blockIdx.y-th `at_once` of T tokens.
template <class Format, int Groups, bool Resident, int Stages>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks)
    linear_decode(Activations x, TokenRows tokens, const unsigned char* w, RowsOut out, int T, int at_once, int tiles,
                  int strips) {
  using Work = Stream<Format, Groups, Resident, Stages>;
  __shared__ float scale[Work::kTokens];
  __shared__ int32_t total[Work::kTokens];
  unsigned char* shared = dynamic_shared();
  const TokenRows own{shared + Work::kSharedBytes, resident_stride<Format>(tiles), scale, total};
  const int begin = blockIdx.y * at_once, count = min(T - begin, at_once);
  const int groups = (count + kGroupTokens - 1) / kGroupTokens;
  Work work(shared, tiles, of_this_block(strips), Resident ? own.stride : tokens.stride);
  const auto locate = [&](int i) {
    const int64_t strip = blockIdx.x + static_cast<int64_t>(i) * gridDim.x;
    if (out.scale != nullptr && threadIdx.x == 0) prefetch(out.scale + strip * kTileRows);
    typename Work::Segment segment;
    segment.weights = w + (strip * tiles + work.first) * kTileBytes;
#pragma unroll
    for (int n = 0; n < Groups; ++n) {
      const int token = n * kGroupTokens + work.lane / 4;
      segment.token[n] = !Resident && token < count ? work.of_token(tokens, token) : nullptr;
    }
    return segment;
  };
  work.start(locate);
  const unsigned char* resident[Groups] = {};
  if constexpr (Resident) {
    __shared__ TokenScratch<Work::kTokens> scratch;
    round_tokens<Format::kPlanes>(x, begin, count, tiles, own, scratch);
#pragma unroll
    for (int n = 0; n < Groups; ++n)  // a column of no token gets the sums of another one
      resident[n] = work.of_token(own, min(n * kGroupTokens + work.lane / 4, count - 1));
  } else if (Format::kFixed && static_cast<int>(threadIdx.x) < count) {
    scale[threadIdx.x] = tokens.scale[threadIdx.x];
    total[threadIdx.x] = tokens.total[threadIdx.x];
  }
  for (int64_t strip = blockIdx.x; strip < strips; strip += gridDim.x) {
    typename Work::Sums sum;
    work.multiply_segment(sum, groups, resident, locate);
    const int64_t n = strip * kTileRows + work.lane;
    work.share(sum, groups, [&](int group) {
      for (int i = work.warp, token = group * kGroupTokens + i; i < kGroupTokens && token < count && n < out.N;
           i += kQuarters, token += kQuarters) {
        const float result =
            work.total(i, work.lane, Format::kFixed ? scale[token] : 1.0f, Format::kFixed ? total[token] : 0);
        store_element(out.y, out.dtype, (begin + token) * out.N + n, out.scaled(0, n, result));
      }
    });
  }
}

// How many launches, and what they need: linear_workspace and linear agree on it.
template <class Format>
struct Plan {
  int64_t T, K, N;
  int tiles;
  Plan(int64_t T_, int64_t N_, int64_t K_)
      : T(T_), K(K_), N(N_), tiles(static_cast<int>(equal_parts(K_, Format::kColumns))) {}
  int64_t strips() const { return equal_parts(N, kTileRows); }
  bool few() const { return T <= kDecodeTokens; }
  int64_t resident_bytes(int64_t tokens) const { return tokens * Format::kPlanes * resident_stride<Format>(tiles); }
  bool few_resident() const { return Format::kFixed && T <= kGroupTokens && resident_bytes(T) <= kFewResidentBytes; }
  // Parts of the grid that share a few tokens evenly, so that those of each fit beside a ring of so many stages on a GPU
  // whose blocks may have `room` bytes of shared memory.
  template <int Stages>
  int64_t parts(int room) const {
    const int64_t left = room - kScratchBytes - Stream<Format, 2, true, Stages>::kSharedBytes;
    const int64_t most = std::min(left / resident_bytes(1), kAtOnce);
    return most >= std::min<int64_t>(T, kGroupTokens) ? equal_parts(T, most) : kManyParts;
  }
};

template <class Format, int Groups, bool Resident, int Stages = kMostStages>
int launch_decode(const Activations& x, const TokenRows& tokens, const void* w, const RowsOut& out, const Plan<Format>& plan,
                  int64_t parts, void* stream) {
  using Work = Stream<Format, Groups, Resident, Stages>;
  const int64_t at_once = equal_parts(plan.T, parts);
  const size_t bytes = Work::kSharedBytes + (Resident ? static_cast<size_t>(plan.resident_bytes(at_once)) : 0);
  unsigned blocks;
  if (int status = decode_blocks(bytes, plan.strips() * parts, &blocks)) return status;
  const dim3 grid(std::max<int64_t>(blocks / parts, 1), parts);
  return launch(Overlap::previous, linear_decode<Format, Groups, Resident, Stages>, grid, dim3(kDecodeThreads), bytes,
                stream, x, tokens, static_cast<const unsigned char*>(w), out, plan.T, at_once, plan.tiles, plan.strips());
}

template <class Format>
int linear_of(const Activations& x, const void* w, const RowsOut& out, int64_t T, void* workspace, void* stream) {
  if (T == 0) return PM_OK;
  const Plan<Format> plan(T, out.N, x.K);
  TokenRows tokens{static_cast<unsigned char*>(const_cast<void*>(x.data)), plan.tiles * kTokenBytes, nullptr, nullptr};
  if constexpr (Format::kFixed) {
    if (plan.few_resident()) return launch_decode<Format, 1, true>(x, tokens, w, out, plan, 1, stream);
    if (plan.few()) {
      int room;
      if (int status = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &room)) return status;
      const int64_t parts = plan.template parts<kMostStages>(room), fewer = plan.template parts<kShortStages>(room);
      if (fewer < parts) return launch_decode<Format, 2, true, kShortStages>(x, tokens, w, out, plan, fewer, stream);
      if (parts < kManyParts) return launch_decode<Format, 2, true>(x, tokens, w, out, plan, parts, stream);
    }
  }
  if (!taken_as_they_are<Format>(x.K)) {
    Workspace memory{static_cast<unsigned char*>(workspace)};
    tokens = take_tokens<Format>(memory, T, x.K);
    if (int status = launch(Overlap::previous, prepare_kernel<Format>, dim3(T), dim3(kPrepareThreads), 0, stream, x,
                            plan.tiles, tokens))
      return status;
  }
  if (T <= kGroupTokens) return launch_decode<Format, 1, false>(x, tokens, w, out, plan, 1, stream);
  if (plan.few()) return launch_decode<Format, kDecodeTokens / kGroupTokens, false>(x, tokens, w, out, plan, 1, stream);
  const WholeBatch batch{T};
  return T <= kFewRuns ? launch_grouped<Format, 64>(tokens, w, plan.strips(), plan.tiles, batch, out, stream)
                       : launch_grouped<Format, 128>(tokens, w, plan.strips(), plan.tiles, batch, out, stream);
}

}  // namespace

int64_t linear_workspace(pm_dtype w_dtype, int64_t T, int64_t, int64_t K) {
  Workspace room{nullptr};
  if (w_dtype == PM_I8)
    take_tokens<FixedPoint<2>>(room, T, K);
  else if (!taken_as_they_are<Floating<__half>>(K))
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
