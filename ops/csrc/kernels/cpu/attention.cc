// Append attention: include/attention.h.
//
// Every token's rotary table, keys and values are written first. Then units of work (attention_plan.h) are computed
// independently: query tokens against the chunks of positions that they see, or some of them, merged once all are there. In
// a unit, the query heads of all its tokens that share a key/value head are rows against the same keys (attention_chunk.h).
// No sum depends on how tokens and chunks are divided into units.
#include "../include/attention.h"

#include <stdlib.h>

#include "attention_plan.h"
#include "dispatch.h"

namespace pm {
namespace PM_ISA {
namespace {

// The last b with starts[b] <= x, of starts[0] .. starts[n]: whose x it is, when starts[0] <= x < starts[n].
template <class Index>
inline int64_t owner(const Index* starts, int64_t n, int64_t x) {
  int64_t low = 0;
  for (int64_t high = n; high - low > 1;) {
    const int64_t middle = (low + high) / 2;
    (starts[middle] <= x ? low : high) = middle;
  }
  return low;
}

// NeoX rotation of one head.
template <class In, class Out>
void rotate(const In* x, const float* rotary, Out* y, int64_t D) {
  const int64_t half = D / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int n = static_cast<int>(smaller(16, half - i));
    const auto part = [n](const auto* p) { return n == 16 ? load(p) : load_partial(p, n); };
    const F32x16 c = part(rotary + i), s = part(rotary + half + i), a = part(x + i), b = part(x + half + i);
    const F32x16 first = sub(mul(a, c), mul(b, s)), second = add(mul(b, c), mul(a, s));
    n == 16 ? store(y + i, first) : store_partial(y + i, first, n);
    n == 16 ? store(y + half + i, second) : store_partial(y + half + i, second, n);
  }
}

template <class E>
void append(const Problem<E>& p, const float* inv_freq, int64_t t) {
  const int64_t b = owner(p.cu_seqlens, p.B, t), D = p.D;
  const int64_t position = p.context_lens[b] + t - p.cu_seqlens[b];
  float* rotary = p.rotary + t * D;
  for (int64_t i = 0; i < D / 2; ++i) {
    const double angle = static_cast<float>(position) * inv_freq[i];  // float32, as Hugging Face has it
    rotary[i] = static_cast<float>(cos(angle));
    rotary[D / 2 + i] = static_cast<float>(sin(angle));
  }
  const E* key = p.qkv_row(t) + p.Hq * D;
  const E* value = key + p.Hkv * D;
  for (int64_t h = 0; h < p.Hkv; ++h) {
    const int64_t offset = p.cache_offset(b, h, position);
    rotate(key + h * D, rotary, p.key_cache + offset, D);
    memcpy(p.value_cache + offset, value + h * D, static_cast<size_t>(D) * sizeof(E));
  }
}

// Where a thread keeps what it computes with.
template <class E>
struct Scratch {
  float *keys, *values, *scores, *here;
  float *q, *gathered;  // of each head of a unit
  E *key_rows, *value_rows;
  size_t bytes = 0;

  static int64_t q_floats(const Problem<E>& p, int64_t rows) { return round_up(rows, kRows) * p.width(); }
  // `memory` is null where only the bytes are asked for.
  Scratch(const Problem<E>& p, const Plan& plan, void* memory) {
    const int64_t width = p.width(), rows = plan.rows, copied = p.in_place() ? 0 : kChunk * width;
    const auto take = [&](auto*& part, int64_t n) {
      part = memory ? reinterpret_cast<decltype(part + 0)>(static_cast<char*>(memory) + bytes) : nullptr;
      bytes += static_cast<size_t>(round_up(n * static_cast<int64_t>(sizeof *part), kLine));
    };
    take(keys, kScored * kGroup * width);
    take(values, kAdded * kGroup * width);
    take(scores, rows * kSpan);
    take(here, Gathered::floats(rows, width));
    take(q, larger(q_floats(p, rows), plan.heads * q_floats(p, p.group())));
    take(gathered, larger(Gathered::floats(rows, width), plan.heads * Gathered::floats(p.group(), width)));
    take(key_rows, copied);
    take(value_rows, copied);
  }
};

// The groups of positions from .. to - 1 of sequence b, head h: `groups` gets the first row of each. Rows of other positions
// are readable, and what is made of them is never used.
template <class E>
int64_t find_groups(const Problem<E>& p, const E* cache, int64_t b, int64_t h, int64_t from, int64_t to, E* copies,
                    const E** groups) {
  const int64_t start = from / kGroup * kGroup, n = (round_up(to, kGroup) - start) / kGroup, width = p.width();
  if (p.in_place()) {
    for (int64_t g = 0; g < n; ++g) groups[g] = cache + p.cache_offset(b, h, start + g * kGroup);
    return n;
  }
  for (int64_t g = 0; g < n; ++g) groups[g] = copies + g * kGroup * width;
  for (int64_t j = from; j < to; ++j) {
    E* row = copies + (j - start) * width;
    memcpy(row, cache + p.cache_offset(b, h, j), static_cast<size_t>(p.D) * sizeof(E));
    memset(row + p.D, 0, static_cast<size_t>(width - p.D) * sizeof(E));
  }
  return n;
}

// The queries of a unit's tokens that look at head kv, rotated, in blocks of kRows: q[d * kRows + r].
template <class E>
void load_queries(const Problem<E>& p, const Unit& u, int64_t kv, float* q, float* row) {
  const int64_t group = p.group(), width = p.width(), rows = u.tokens * group, t = p.cu_seqlens[u.b] + u.begin;
  for (int64_t d = p.D; d < width; ++d) row[d] = 0.0f;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = t + r / group;
    rotate(p.qkv_row(token) + (kv * group + r % group) * p.D, p.rotary + token * p.D, row, p.D);
    float* block = q + r / kRows * kRows * width + r % kRows;
    for (int64_t d = 0; d < width; ++d) block[d * kRows] = row[d];
  }
}

// One chunk of a unit and one of its heads: what the rows first_row .. end_row - 1, which see some of it, gather there.
template <class E>
struct Chunk {
  const Problem<E>& p;
  const Scratch<E>& at;
  const float* q;
  int64_t width, rows, position, start;  // of the unit; of its first token; of the chunk
  int64_t first_row, end_row;
  int64_t first_group, groups;                     // of the chunk: those that any row sees
  const E* stream[2 * kGroups + kAhead + kAdded];  // groups in the order of their use: keys, values, what comes after

  // What comes after are the keys of head next_kv from next_chunk on, if there is such a head.
  Chunk(const Problem<E>& problem, const Unit& u, const Scratch<E>& scratch, const float* queries, int64_t kv, int64_t chunk,
        int64_t next_kv, int64_t next_chunk)
      : p(problem), at(scratch), q(queries), width(p.width()), rows(u.tokens * p.group()) {
    position = p.context_lens[u.b] + u.begin;
    start = chunk * kChunk;
    for (first_row = 0; from(first_row) >= to(first_row);) ++first_row;
    for (end_row = rows; from(end_row - 1) >= to(end_row - 1);) --end_row;
    const int64_t begin = start + from(first_row), end = start + to(end_row - 1);
    first_group = from(first_row) / kGroup;
    groups = find_groups(p, p.key_cache, u.b, kv, begin, end, at.key_rows, stream);
    int64_t n = groups + find_groups(p, p.value_cache, u.b, kv, begin, end, at.value_rows, stream + groups);
    const int64_t next = larger(next_chunk * kChunk, p.first_seen(position)), last = position + u.tokens;
    if (p.in_place() && next_kv < p.Hkv && next < last)
      n += find_groups(p, p.key_cache, u.b, next_kv, next, smaller((next / kGroup + kAhead) * kGroup, last), at.key_rows,
                       stream + n);
    for (const E* repeated = stream[n - 1]; n < 2 * kGroups + kAhead + kAdded; ++n) stream[n] = repeated;
  }

  // The positions that row r sees, counted from the chunk's first; none where from >= to.
  int64_t from(int64_t r) const { return larger(p.first_seen(position + r / p.group()) - start, 0); }
  int64_t to(int64_t r) const { return smaller(position + r / p.group() + 1 - start, kChunk); }

  // Of an odd number of groups, one too many is scored: it is readable, and its scores are never used.
  void score() const {
    for (int64_t g = 0; g < groups; g += kScored) {
      const E *const *keys = stream + g, *const *ahead = keys + kAhead;
      const int64_t j = (first_group + g) * kGroup;
      if (rows <= kRows) {
        with_rows<kRows>(rows, [&](auto block) {
          score_rows<decltype(block)::value, kScored>(q, keys, ahead, width, p.scale, at.scores + j);
        });
        continue;
      }
      pack_keys<kScored>(keys, ahead, width, at.keys);
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t n = smaller(kRows, rows - r);
        if (j >= to(r + n - 1) || j + kScored * kGroup <= from(r)) continue;
        with_rows<kRows>(n, [&](auto block) {
          score_packed<decltype(block)::value, kScored>(q + r * width, at.keys, width, p.scale, at.scores + r * kSpan + j);
        });
      }
    }
  }

  // Adds the values of kAdded groups, from group g on.
  template <class V>
  void add(const V* const* values, const E* const* ahead, int64_t g, float* sums) const {
    const int64_t begin = (first_group + g) * kGroup;
    const auto first = [&](int64_t r) { return larger(from(r) - begin, 0); };
    const auto last = [&](int64_t r) { return smaller(to(r) - begin, kAdded * kGroup); };
    for (int64_t r = first_row, n; r < end_row; r += n) {
      for (n = 1; r + n < end_row && first(r + n) == first(r) && last(r + n) == last(r);) ++n;
      if (first(r) < last(r))
        add_values(at.scores + r * kSpan + begin, values, ahead, first(r), last(r), n, sums + r * width, width);
    }
  }

  void gather(const Gathered& here) const {
    score();
    for (int64_t r = first_row; r < end_row; ++r)
      exponentials(at.scores + r * kSpan, from(r), to(r), here.largest[r], here.total[r]);
    memset(here.sums, 0, static_cast<size_t>(rows * width) * sizeof(float));
    for (int64_t g = 0; g < groups; g += kAdded) {
      const E *const *values = stream + groups + g, *const *ahead = values + kAhead;
      if (rows <= kRows || sizeof(E) == sizeof(float)) {
        add(values, ahead, g, here.sums);
        continue;
      }
      const float* unpacked[kAdded];
      for (int k = 0; k < kAdded; ++k) {
        float* copy = at.values + k * kGroup * width;
        unpacked[k] = copy;
        for (int64_t i = 0; i < kGroup * width; i += 32) {
          F32x16 v[2];
          load_pair(values[k] + i, v);
          store_pair(copy + i, v);
        }
      }
      add(unpacked, ahead, g, here.sums);
    }
  }
};

// What a unit's rows gathered from head kv becomes their output.
template <class E>
void write(const Problem<E>& p, const Unit& u, int64_t kv, const Gathered& gathered) {
  const int64_t width = p.width(), group = p.group(), t = p.cu_seqlens[u.b] + u.begin;
  for (int64_t r = 0; r < u.tokens * group; ++r) {
    E* out = p.out + ((t + r / group) * p.Hq + kv * group + r % group) * p.D;
    const F32x16 total = set1(gathered.total[r]);
    for (int64_t d = 0; d < p.D; d += 32) {
      const float* sums = gathered.sums + r * width + d;
      const F32x16 y[2] = {div(load(sums), total), div(load(sums + 16), total)};
      if (d + 32 <= p.D) {
        store_pair(out + d, y);
        continue;
      }
      E last[32];
      store_pair(last, y);
      memcpy(out + d, last, static_cast<size_t>(p.D - d) * sizeof(E));
    }
  }
}

// A unit's chunks: merged and written, or, where `parts` is not null, each kept there for merge_parts.
template <class E>
void attend(const Problem<E>& p, const Unit& u, const Scratch<E>& at, float* parts) {
  const int64_t width = p.width(), rows = u.tokens * p.group(), floats = Gathered::floats(rows, width);
  const auto queries = [&](int64_t kv) { return at.q + (kv - u.kv) * Scratch<E>::q_floats(p, rows); };
  const auto gathered = [&](int64_t kv) { return Gathered(at.gathered + (kv - u.kv) * floats, rows); };
  for (int64_t kv = u.kv; kv < u.end_kv; ++kv) {
    load_queries(p, u, kv, queries(kv), at.values);
    if (!parts) gathered(kv).clear(rows, width);
  }
  for (int64_t run = u.first_chunk, end; run < u.end_chunk; run = end) {
    end = u.tokens == 1 ? smaller(run + kRun, u.end_chunk) : u.end_chunk;
    for (int64_t kv = u.kv; kv < u.end_kv; ++kv)
      for (int64_t c = run; c < end; ++c) {
        // Read next: this head's next chunk, the run's first for the next head, the next run.
        const bool same_head = c + 1 < end, next_run = !same_head && u.end_kv - u.kv > 1 && kv + 1 == u.end_kv;
        const int64_t next_kv = same_head ? kv : next_run ? u.kv : kv + 1, next = same_head ? c + 1 : next_run ? end : run;
        const Chunk<E> chunk(p, u, at, queries(kv), kv, c, next_kv, next);
        const Gathered here(parts ? parts + (c - u.first_chunk) * floats : at.here, rows);
        chunk.gather(here);
        if (!parts) merge(gathered(kv), here, chunk.first_row, chunk.end_row, width);
      }
  }
  for (int64_t kv = u.kv; !parts && kv < u.end_kv; ++kv) write(p, u, kv, gathered(kv));
}

// The parts of all the chunks that a single token sees, merged and written.
template <class E>
void merge_parts(const Problem<E>& p, const Unit& u, const Scratch<E>& at, float* parts) {
  const int64_t width = p.width(), rows = p.group();
  const Gathered all(at.gathered, rows);
  all.clear(rows, width);
  for (int64_t c = u.first_chunk; c < u.end_chunk; ++c, parts += Gathered::floats(rows, width))
    merge(all, Gathered(parts, rows), 0, rows, width);
  write(p, u, u.kv, all);
}

template <class E>
int run(Problem<E> p, double rope_theta) {
  const int threads = pm_num_threads();
  const Plan count = divide(p, threads, nullptr, nullptr);
  const auto room = [](int64_t n, size_t size) { return malloc(larger(1, n) * size); };
  float* inv_freq = static_cast<float*>(room(p.D / 2, sizeof(float)));
  p.rotary = static_cast<float*>(room(p.T * p.D, sizeof(float)));
  Unit* units = static_cast<Unit*>(room(count.num_units, sizeof(Unit)));
  Unit* split = static_cast<Unit*>(room(count.num_split, sizeof(Unit)));
  float* parts = static_cast<float*>(room(count.parts, sizeof(float)));
  int status = inv_freq && p.rotary && units && split && parts ? PM_OK : PM_OUT_OF_MEMORY;
  if (status == PM_OK) {
    for (int64_t i = 0; i < p.D / 2; ++i)
      inv_freq[i] = static_cast<float>(pow(rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(p.D)));
    const Plan plan = divide(p, threads, units, split);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < p.T; ++t) append(p, inv_freq, t);
      void* memory = aligned_alloc(64, Scratch<E>(p, plan, nullptr).bytes);
      if (!memory) {
#pragma omp atomic write
        status = PM_OUT_OF_MEMORY;
      }
      const Scratch<E> at(p, plan, memory);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < plan.num_units; ++i)
        if (memory) attend(p, plan.units[i], at, plan.units[i].part < 0 ? nullptr : parts + plan.units[i].part);
      if (plan.num_split > 0) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < plan.num_split; ++i)
          if (memory) merge_parts(p, plan.split[i], at, parts + plan.split[i].part);
      }
      free(memory);
    }
  }
  free(inv_freq);
  free(p.rotary);
  free(units);
  free(split);
  free(parts);
  return status;
}

template <class E>
int append_attention_of(const void* qkv, void* key_cache, void* value_cache, const int32_t* cu_seqlens,
                        const int32_t* context_lens, const int32_t* block_tables, void* out, int64_t T, int64_t B, int64_t M,
                        int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size, double rope_theta, int64_t window,
                        float scale) {
  return run(
      Problem<E>{static_cast<const E*>(qkv), static_cast<E*>(key_cache), static_cast<E*>(value_cache), cu_seqlens,
                 context_lens, block_tables, static_cast<E*>(out), T, B, M, Hq, Hkv, D, block_size, window, scale, nullptr},
      rope_theta);
}

}  // namespace

int append_attention(const void* qkv, pm_dtype dtype, void* key_cache, void* value_cache, const int32_t* cu_seqlens,
                     const int32_t* context_lens, const int32_t* block_tables, void* out, int64_t T, int64_t B, int64_t M,
                     int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size, double rope_theta, int64_t window, float scale,
                     void*) {
  if (T == 0) return PM_OK;
  const auto of = dtype == PM_BF16 ? append_attention_of<bf16> : append_attention_of<float>;
  return of(qkv, key_cache, value_cache, cu_seqlens, context_lens, block_tables, out, T, B, M, Hq, Hkv, D, block_size,
            rope_theta, window, scale);
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(append_attention,
          (const void* qkv, pm_dtype dtype, void* key_cache, void* value_cache, const int32_t* cu_seqlens,
           const int32_t* context_lens, const int32_t* block_tables, void* out, int64_t T, int64_t B, int64_t M, int64_t Hq,
           int64_t Hkv, int64_t D, int64_t block_size, double rope_theta, int64_t window, float scale, void* stream),
          (qkv, dtype, key_cache, value_cache, cu_seqlens, context_lens, block_tables, out, T, B, M, Hq, Hkv, D, block_size,
           rope_theta, window, scale, stream))
