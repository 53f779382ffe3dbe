// What attention computes, and how it is divided into units that threads compute independently.
#ifndef PADDLE_MIXTRAL_ATTENTION_PLAN_H_
#define PADDLE_MIXTRAL_ATTENTION_PLAN_H_

#include "attention_chunk.h"

namespace pm {
namespace PM_ISA {
namespace {

// Rows of a tile of query tokens, so that a group of keys is turned into columns once for as many; half as many, again and
// again, as long as there would be too few units, down to the least.
constexpr int64_t kTileRows = 128, kLeastTileRows = 16;
// Units a thread should find, so that all threads end together.
constexpr int64_t kUnitsPerThread = 8;
// Chunks of a single token that are read before those of the next head: all heads of a page lie side by side, so they
// should be read soon after each other.
constexpr int64_t kRun = 4;

template <class E>
struct Problem {
  const E* qkv;
  E *key_cache, *value_cache;
  const int32_t *cu_seqlens, *context_lens, *block_tables;
  E* out;
  int64_t T, B, M, Hq, Hkv, D, block_size, window;
  float scale;
  float* rotary;  // [T, D]: the D / 2 cosines, then the D / 2 sines of each token's position

  int64_t group() const { return Hq / Hkv; }
  int64_t width() const { return round_up(D, 32); }
  const E* qkv_row(int64_t t) const { return qkv + t * (Hq + 2 * Hkv) * D; }
  int64_t length(int64_t b) const { return cu_seqlens[b + 1] - cu_seqlens[b]; }
  // The first position that a query at `position` sees.
  int64_t first_seen(int64_t position) const { return window > 0 ? larger(0, position - window + 1) : 0; }
  // Elements of a cache before position j of sequence b, key/value head h.
  int64_t cache_offset(int64_t b, int64_t h, int64_t j) const {
    return ((block_tables[b * M + j / block_size] * Hkv + h) * block_size + j % block_size) * D;
  }
  // Whether every group of sixteen rows lies in the caches as the arithmetic needs it; else they are copied.
  bool in_place() const { return block_size % kGroup == 0 && D % 32 == 0; }
  // The chunks that some of the tokens at `position` .. last see: the first, and the one after the last.
  int64_t first_chunk(int64_t position) const { return first_seen(position) / kChunk; }
  static int64_t end_chunk(int64_t last) { return last / kChunk + 1; }
};

// Query tokens begin .. begin + tokens - 1 of sequence b against key/value heads kv .. end_kv - 1, over some chunks.
struct Unit {
  int64_t b, kv, end_kv, begin, tokens, first_chunk, end_chunk;
  int64_t part;  // where its chunks' results go among all that are merged later, in floats; -1: it merges them itself
};

// Units of prompts come first, since they are the large ones, and a prompt's last tokens before its first. What a single
// token sees is one unit where it is little; else a unit is a run of chunks of one head, and what they give is merged later.
struct Plan {
  Unit *units = nullptr, *split = nullptr;  // null: counted only. split: a token and head whose chunks are several units
  int64_t num_units = 0, num_split = 0;
  int64_t parts = 0;            // floats that are merged later
  int64_t rows = 1, heads = 1;  // of the largest units

  void add(const Unit& unit) {
    if (units) units[num_units] = unit;
    ++num_units;
  }
  void add_split(const Unit& unit) {
    if (split) split[num_split] = unit;
    ++num_split;
  }
};

template <class E>
void divide_prompts(const Problem<E>& p, int64_t wanted, Plan& plan) {
  int64_t prompt_tokens = 0, tile_rows = kTileRows;
  for (int64_t b = 0; b < p.B; ++b)
    if (p.length(b) > 1) prompt_tokens += p.length(b);
  while (tile_rows > kLeastTileRows && prompt_tokens * p.Hq < wanted * tile_rows) tile_rows /= 2;
  const int64_t tile = larger(1, tile_rows / p.group());
  for (int64_t kv = 0; kv < p.Hkv; ++kv)
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t length = p.length(b);
      if (length < 2) continue;
      for (int64_t begin = (length - 1) / tile * tile; begin >= 0; begin -= tile) {
        const int64_t tokens = smaller(tile, length - begin), position = p.context_lens[b] + begin;
        plan.add({b, kv, kv + 1, begin, tokens, p.first_chunk(position), p.end_chunk(position + tokens - 1), -1});
        plan.rows = larger(plan.rows, tokens * p.group());
      }
    }
}

template <class E>
void divide_single_tokens(const Problem<E>& p, int64_t wanted, Plan& plan) {
  const int64_t floats = Gathered::floats(p.group(), p.width());
  const auto chunks = [&](int64_t b) {
    return p.length(b) == 1 ? p.end_chunk(p.context_lens[b]) - p.first_chunk(p.context_lens[b]) : 0;
  };
  int64_t all = 0;
  for (int64_t b = 0; b < p.B; ++b) all += chunks(b) * p.Hkv;
  const int64_t fair = larger(1, (all + wanted - 1) / wanted), run = smaller(kRun, fair);
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t n = chunks(b);
    if (n == 0) continue;
    const int64_t first = p.first_chunk(p.context_lens[b]), end = first + n;
    plan.rows = larger(plan.rows, p.group());
    if (n * p.Hkv <= fair) {
      plan.add({b, 0, p.Hkv, 0, 1, first, end, -1});
      plan.heads = p.Hkv;
      continue;
    }
    const bool split = n > run;
    const auto part = [&](int64_t kv, int64_t chunk) { return split ? plan.parts + (kv * n + chunk - first) * floats : -1; };
    for (int64_t chunk = first; chunk < end; chunk += run)
      for (int64_t kv = 0; kv < p.Hkv; ++kv)
        plan.add({b, kv, kv + 1, 0, 1, chunk, smaller(end, chunk + run), part(kv, chunk)});
    if (!split) continue;
    for (int64_t kv = 0; kv < p.Hkv; ++kv) plan.add_split({b, kv, kv + 1, 0, 1, first, end, part(kv, first)});
    plan.parts += p.Hkv * n * floats;
  }
}

// The number of units, or the units themselves where there is room for them.
template <class E>
Plan divide(const Problem<E>& p, int64_t threads, Unit* units, Unit* split) {
  Plan plan;
  plan.units = units;
  plan.split = split;
  divide_prompts(p, threads * kUnitsPerThread, plan);
  divide_single_tokens(p, threads * kUnitsPerThread, plan);
  return plan;
}

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_ATTENTION_PLAN_H_
