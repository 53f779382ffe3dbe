// CUDA's built-in device functions: barriers, warp instructions, atomics, arithmetic.
#ifndef CUDA_EMULATION_DEVICE_FUNCTIONS_H_
#define CUDA_EMULATION_DEVICE_FUNCTIONS_H_

#define CUDA_EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- barriers

inline void __syncthreads(CUDA_EMULATION_SITE) { simt::barrier(0, "__syncthreads", {file, line}); }
inline int __syncthreads_count(int p, CUDA_EMULATION_SITE) {
  return simt::barrier(p != 0, "__syncthreads_count", {file, line});
}
inline int __syncthreads_or(int p, CUDA_EMULATION_SITE) {
  return simt::barrier(p != 0, "__syncthreads_or", {file, line}) != 0;
}
inline int __syncthreads_and(int p, CUDA_EMULATION_SITE) {
  return simt::barrier(p == 0, "__syncthreads_and", {file, line}) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { simt::yield(); }
inline void __trap() { simt::fail("__trap()"); }

// ---- warp instructions

namespace simt {

template <typename T>
struct Shuffle {
  T value, result;
  int source;  // lane, or -1 for one's own value

  static void complete(uint32_t mask, void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      Shuffle& mine = *static_cast<Shuffle*>(lanes[i]);
      if (mine.source < 0) {
        mine.result = mine.value;
      } else if (mask >> mine.source & 1) {
        mine.result = static_cast<Shuffle*>(lanes[mine.source])->value;
      } else {  // no lane that takes part: undefined
        for (size_t byte = 0; byte < sizeof(T); ++byte) {
          reinterpret_cast<unsigned char*>(&mine.result)[byte] = reinterpret_cast<const unsigned char*>(&kPoison)[byte % 4];
        }
      }
    }
  }

  static T run(uint32_t mask, T value, int source, const char* what, Site site) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
    Shuffle mine;
    mine.value = value;
    mine.source = source;
    rendezvous(mask, &mine, complete, what, site);
    return mine.result;
  }
};

struct Vote {
  uint32_t ballot;

  static void complete(uint32_t mask, void* const* lanes) {
    uint32_t ballot = 0;
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1 && static_cast<Vote*>(lanes[i])->ballot) ballot |= 1u << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) static_cast<Vote*>(lanes[i])->ballot = ballot;
    }
  }

  static uint32_t run(uint32_t mask, bool predicate, const char* what, Site site) {
    Vote mine = {predicate};
    rendezvous(mask, &mine, complete, what, site);
    return mine.ballot;
  }
};

template <typename T>
struct Match {
  T value;
  uint32_t same;

  static void complete(uint32_t mask, void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      Match& mine = *static_cast<Match*>(lanes[i]);
      mine.same = 0;
      for (int j = 0; j < 32; ++j) {
        if (mask >> j & 1 && static_cast<Match*>(lanes[j])->value == mine.value) mine.same |= 1u << j;
      }
    }
  }
};

inline void meet(uint32_t, void* const*) {}

}  // namespace simt

inline void __syncwarp(unsigned mask = ~0u, CUDA_EMULATION_SITE) {
  simt::rendezvous(mask, nullptr, simt::meet, "__syncwarp", {file, line});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_EMULATION_SITE) {
  const int base = static_cast<int>(simt::lane()) & ~(width - 1);
  return simt::Shuffle<T>::run(mask, value, base + (source & (width - 1)), "__shfl_sync", {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_EMULATION_SITE) {
  const int lane = static_cast<int>(simt::lane()), source = lane ^ bits;
  const bool outside = source >= (lane & ~(width - 1)) + width;  // an earlier group may be read, a later one not
  return simt::Shuffle<T>::run(mask, value, outside ? -1 : source, "__shfl_xor_sync", {file, line});
}
inline int __reduce_add_sync(unsigned mask, int value, CUDA_EMULATION_SITE) {
  unsigned sum = static_cast<unsigned>(value);  // wraps around
  for (int bits = 16; bits > 0; bits /= 2)
    sum += simt::Shuffle<unsigned>::run(mask, sum, simt::lane() ^ bits, "__reduce_add_sync", {file, line});
  return static_cast<int>(sum);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, CUDA_EMULATION_SITE) {
  for (int bits = 16; bits > 0; bits /= 2)
    value =
        std::max(value, simt::Shuffle<unsigned>::run(mask, value, simt::lane() ^ bits, "__reduce_max_sync", {file, line}));
  return value;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATION_SITE) {
  const int lane = static_cast<int>(simt::lane()), source = lane - static_cast<int>(delta);
  const bool outside = source < (lane & ~(width - 1));
  return simt::Shuffle<T>::run(mask, value, outside ? -1 : source, "__shfl_up_sync", {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATION_SITE) {
  const int lane = static_cast<int>(simt::lane()), source = lane + static_cast<int>(delta);
  const bool outside = source >= (lane & ~(width - 1)) + width;
  return simt::Shuffle<T>::run(mask, value, outside ? -1 : source, "__shfl_down_sync", {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATION_SITE) {
  return simt::Vote::run(mask, predicate != 0, "__ballot_sync", {file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_EMULATION_SITE) {
  return simt::Vote::run(mask, predicate != 0, "__any_sync", {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_EMULATION_SITE) {
  return simt::Vote::run(mask, predicate != 0, "__all_sync", {file, line}) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_EMULATION_SITE) {
  simt::Match<T> mine = {value, 0};
  simt::rendezvous(mask, &mine, simt::Match<T>::complete, "__match_any_sync", {file, line});
  return mine.same;
}

#undef CUDA_EMULATION_SITE

// ---- memory

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}

// Threads change over at barriers alone, so plain code is atomic. Other processes are not emulated.
template <typename T>
T atomicExch(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}
template <typename T>
T atomicAdd(T* p, std::common_type_t<T> value) {
  return atomicExch(p, static_cast<T>(*p + value));
}
template <typename T>
T atomicSub(T* p, std::common_type_t<T> value) {
  return atomicExch(p, static_cast<T>(*p - value));
}
template <typename T>
T atomicMax(T* p, std::common_type_t<T> value) {
  return atomicExch(p, *p < value ? value : *p);
}
template <typename T>
T atomicMin(T* p, std::common_type_t<T> value) {
  return atomicExch(p, value < *p ? value : *p);
}
template <typename T>
T atomicOr(T* p, std::common_type_t<T> value) {
  return atomicExch(p, static_cast<T>(*p | value));
}
template <typename T>
T atomicAnd(T* p, std::common_type_t<T> value) {
  return atomicExch(p, static_cast<T>(*p & value));
}
template <typename T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return *p == expected ? atomicExch(p, static_cast<T>(value)) : *p;
}
inline unsigned atomicInc(unsigned* p, unsigned last) { return atomicExch(p, *p >= last ? 0u : *p + 1); }

// ---- arithmetic: as IEEE 754 has it, compiled with -ffp-contract=off

inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / __builtin_sqrt(a)); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float rsqrtf(float a) { return static_cast<float>(1.0 / __builtin_sqrt(a)); }
inline double rsqrt(double a) { return 1.0 / __builtin_sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return __builtin_expf(x); }
inline float __exp10f(float x) { return __builtin_exp10f(x); }
inline float __logf(float x) { return __builtin_logf(x); }
inline float __log2f(float x) { return __builtin_log2f(x); }
inline float __powf(float x, float y) { return __builtin_powf(x, y); }
inline float __sinf(float x) { return __builtin_sinf(x); }
inline float __cosf(float x) { return __builtin_cosf(x); }
inline float __saturatef(float x) { return x > 1 ? 1.0f : x > 0 ? x : 0.0f; }

// Conversions to integers saturate, and of not a number give 0.
namespace simt {
template <typename Integer>
Integer to_integer(double rounded) {
  constexpr double kBound = sizeof(Integer) == 4 ? 2147483648.0 : 9223372036854775808.0;
  constexpr Integer kMost = sizeof(Integer) == 4 ? INT32_MAX : static_cast<Integer>(INT64_MAX);
  if (rounded != rounded) return 0;
  if (rounded >= kBound) return kMost;
  return rounded < -kBound ? static_cast<Integer>(-kMost - 1) : static_cast<Integer>(rounded);
}
}  // namespace simt
inline int __float2int_rn(float x) { return simt::to_integer<int>(__builtin_nearbyintf(x)); }
inline int __float2int_rz(float x) { return simt::to_integer<int>(__builtin_truncf(x)); }
inline int __float2int_rd(float x) { return simt::to_integer<int>(__builtin_floorf(x)); }
inline int __float2int_ru(float x) { return simt::to_integer<int>(__builtin_ceilf(x)); }
inline int __double2int_rn(double x) { return simt::to_integer<int>(__builtin_nearbyint(x)); }
inline long long __float2ll_rn(float x) { return simt::to_integer<long long>(__builtin_nearbyintf(x)); }
inline long long __double2ll_rn(double x) { return simt::to_integer<long long>(__builtin_nearbyint(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

namespace simt {
template <typename To, typename From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &x, sizeof(to));
  return to;
}
}  // namespace simt
inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
// Each of the four selectors (4 bits a piece) picks one of the eight bytes of y:x; its top bit spreads that byte's sign.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selectors) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (selector & 7)) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
  return c;
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
using std::isfinite;
using std::isinf;
using std::isnan;

#endif  // CUDA_EMULATION_DEVICE_FUNCTIONS_H_
