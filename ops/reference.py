"""Every operator again in plain float32 NumPy: the definition the kernels are tested against.

Nothing here is fast, fused or in place (except where the operator's meaning is to write its cache). Arguments and
results are NumPy arrays; bfloat16 tensors come in as the float32 they stand for.
"""

import itertools
from collections.abc import Callable

import numpy as np

# Positions whose keys and values are summed up by themselves: PM_ATTENTION_CHUNK of csrc/kernels/include/attention.h.
ATTENTION_CHUNK = 256


def embedding(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """ops.embedding.embedding: ids [T], table [V, H] -> [T, H]."""
    return table[ids]


def rms_norm(residual: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """ops.norm.rms_norm: residual [T, H], weight [H] -> [T, H]."""
    mean_square = np.mean(residual.astype(np.float32) ** 2, axis=-1, keepdims=True)
    return residual / np.sqrt(mean_square + eps) * weight


def add_rms_norm(
    residual: np.ndarray, delta: np.ndarray, weight: np.ndarray, eps: float, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """ops.norm.add_rms_norm: residual, delta [T, H], weight [H], rows [S] or None -> (normalised, sum) [S, H]."""
    total = residual + delta if rows is None else residual[rows] + delta[rows]
    return rms_norm(total, weight, eps), total


def rotary(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """NeoX rotary embedding of heads x [T, heads, D] at positions [T], angles in float32."""
    half = x.shape[-1] // 2
    inv_freq = (float(theta) ** (-np.arange(half) / half)).astype(np.float32)
    angles = positions.astype(np.float32)[:, None, None] * inv_freq
    cos, sin = (
        np.cos(angles.astype(np.float64)).astype(np.float32),
        np.sin(angles.astype(np.float64)).astype(np.float32),
    )
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def append_attention(
    qkv: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    cu_seqlens: np.ndarray,
    context_lens: np.ndarray,
    block_tables: np.ndarray,
    num_heads: int,
    num_kv_heads: int,
    rope_theta: float,
    sliding_window: int = 0,
) -> np.ndarray:
    """ops.attention.append_attention: qkv [T, (Hq + 2 Hkv) * D], caches written in place -> [T, Hq * D].

    For bfloat16, pass the float32 values and round the caches afterwards: keys are not rounded here.
    """
    block_size, head_dim = key_cache.shape[2:]
    heads = qkv.reshape(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
    out = np.zeros((len(qkv), num_heads, head_dim), np.float32)
    for b, context in enumerate(context_lens):
        rows = slice(cu_seqlens[b], cu_seqlens[b + 1])
        length = rows.stop - rows.start
        positions = context + np.arange(length)
        q = rotary(heads[rows, :num_heads], positions, rope_theta)
        pages, slots = block_tables[b, positions // block_size], positions % block_size
        key_cache[pages, :, slots] = rotary(heads[rows, num_heads:-num_kv_heads], positions, rope_theta)
        value_cache[pages, :, slots] = heads[rows, -num_kv_heads:]

        past = np.arange(context + length)
        pages, slots = block_tables[b, past // block_size], past % block_size
        groups = num_heads // num_kv_heads
        keys = np.repeat(key_cache[pages, :, slots], groups, axis=1)  # [context + length, Hq, D]
        values = np.repeat(value_cache[pages, :, slots], groups, axis=1)
        seen = past[None, :] <= positions[:, None]
        if sliding_window:
            seen &= past[None, :] > positions[:, None] - sliding_window
        largest = np.full((num_heads, length, 1), -np.inf, np.float32)
        total, sums = np.zeros_like(largest), np.zeros((num_heads, length, head_dim), np.float32)
        for start in range(0, context + length, ATTENTION_CHUNK):
            chunk = slice(start, start + ATTENTION_CHUNK)
            at = np.flatnonzero(seen[:, chunk].any(axis=1))  # rows that see any of it
            scores = np.einsum("qhd,khd->hqk", q[at], keys[chunk]) / np.sqrt(np.float32(head_dim))
            scores = np.where(seen[at, chunk], scores, -np.inf)
            here = scores.max(axis=-1, keepdims=True, initial=-np.inf)
            weights = np.exp(scores - here)
            most = np.maximum(largest[:, at], here)
            keep, take = np.exp(largest[:, at] - most), np.exp(here - most)
            total[:, at] = total[:, at] * keep + weights.sum(axis=-1, keepdims=True) * take
            sums[:, at] = sums[:, at] * keep + np.einsum("hqk,khd->hqd", weights, values[chunk]) * take
            largest[:, at] = most
        out[rows] = (sums / total).transpose(1, 0, 2)
    return out.reshape(len(qkv), -1)


def linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """ops.linear.linear: x [T, K], weight [N, K] -> [T, N]."""
    return x @ weight.T


def linear_bf16(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """ops.linear.linear with a bfloat16 weight: x [T, K], weight [N, K] (not packed) -> [T, N], the same bits.

    Both hold the values of bfloat16 as float32. The bits of a NaN are not defined.
    """
    padding = ((0, 0), (0, -x.shape[1] % 32))
    x, weight = (_without_denormals(np.pad(a, padding)) for a in (x, weight))
    total = np.zeros((len(x), len(weight)), np.float32)
    for k in range(0, x.shape[1], 2):
        for column in (k + 1, k):
            total = _fused_multiply_add(x[:, column, None], weight[:, column], total)
    return total


def linear_bf16_tiles(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """:func:`linear_bf16` in the order of the AMX tile unit, whose bits are its own."""
    padding = ((0, 0), (0, -x.shape[1] % 32))
    x, weight = (_without_denormals(np.pad(a, padding)) for a in (x, weight))
    total = np.zeros((len(x), len(weight)), np.float32)
    for tile in range(0, x.shape[1], 32):
        even, odd = np.zeros_like(total), np.zeros_like(total)
        for k in range(tile, tile + 32, 2):
            even = _fused_multiply_add(x[:, k, None], weight[:, k], even)
            odd = _fused_multiply_add(x[:, k + 1, None], weight[:, k + 1], odd)
        with np.errstate(over="ignore", invalid="ignore"):
            total = _without_denormals(total + _without_denormals(even + odd))
    return total


def round_bf16(x: np.ndarray) -> np.ndarray:
    """x float32 to the nearest bfloat16, halves to even; a NaN stays one. As float32."""
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), x, rounded)


def _without_denormals(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _fused_multiply_add(x: np.ndarray, w: np.ndarray, total: np.ndarray) -> np.ndarray:
    """x * w + total of bfloat16 x and w and float32 total, rounded once; a denormal result is a zero of its sign."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = x.astype(np.float64) * w  # exact
        near = product + total
        # What the sum lacks (Knuth's TwoSum) goes into its last bit (Boldo and Melquiond's rounding to odd): then the
        # result is as if it were rounded once, to float32.
        rest = near - product
        lack = (product - (near - rest)) + (total - rest)
        bits = near.view(np.int64)
        inexact = np.isfinite(near) & (lack != 0) & (bits & 1 == 0)
        odd = np.where(inexact, np.where((lack > 0) == (near > 0), bits + 1, bits - 1), bits).view(np.float64)
        result = odd.astype(np.float32)
    # Denormal after rounding to 24 bits, whatever the exponent: 2^-126 less half a unit would become 2^-126.
    return np.where(np.abs(odd) < 2.0**-126 * (1 - 2.0**-25), np.copysign(np.float32(0), result), result)


def fixed_point(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """x [T, K] float32 in fixed point of 16 or 8 bits: q [T, K] int64 and scale [T] float32, x nearly q * scale."""
    largest = {16: np.float32(32639), 8: np.float32(127)}[bits]
    most = np.abs(x).max(axis=-1)
    small = most < np.float32(2.0**-100)
    most = np.where(small, np.float32(1), most)
    q = np.rint(x * (largest / most)[:, None]).astype(np.int64)
    return np.where(small[:, None], 0, q), np.where(small, np.float32(0), most / largest)


def weight_only_linear(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, activation_bits: int = 16) -> np.ndarray:
    """ops.linear.weight_only_linear: x [T, K], weight [N, K] int8 (not packed), scale [N] -> [T, N], the same bits."""
    q, token_scale = fixed_point(x, activation_bits)
    return (q @ weight.astype(np.int64).T).astype(np.float32) * token_scale[:, None] * scale


def quantize_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ops.quantize.quantize_int8: weight [N, K] -> (q [N, K] int8, scale [N])."""
    weight = weight.astype(np.float32)
    scale = np.abs(weight).max(axis=-1) / np.float32(127)
    scale[scale == 0] = 1
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8), scale


def pack(weight: np.ndarray, columns_of_tile: int) -> np.ndarray:
    """weight [N, K] in tiles [tiles of 32 rows, tiles of columns, elements]: 16 words of a row, 32 rows, a word."""
    rows, columns = -(-weight.shape[0] // 32), -(-weight.shape[1] // columns_of_tile)
    padded = np.zeros((rows * 32, columns * columns_of_tile), weight.dtype)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    tiles = padded.reshape(rows, 32, columns, 16, columns_of_tile // 16).transpose(0, 2, 3, 1, 4)
    return tiles.reshape(rows, columns, 32 * columns_of_tile)


def pack_int8(q: np.ndarray) -> np.ndarray:
    """ops.quantize.pack_int8: q [N, K] int8 -> uint8 [tiles of 32 rows, tiles of 64 columns, 2048]."""
    return (pack(q.astype(np.int16), 64) + 128).astype(np.uint8)


def pack_bf16(weight: np.ndarray) -> np.ndarray:
    """ops.quantize.pack_bf16: weight [N, K] of 16-bit elements -> [tiles of 32 rows, tiles of 32 columns, 1024]."""
    return pack(weight, 32)


def pack_gate_up(weight: np.ndarray) -> np.ndarray:
    """ops.quantize.pack_gate_up: weight [2I, K], gate above up -> tiles of 16 gate and 16 up rows."""
    gate, up = np.split(weight, 2)
    rows = -(-len(gate) // 16) * 16
    halves = [np.pad(half, ((0, rows - len(half)), (0, 0))).reshape(-1, 16, weight.shape[1]) for half in (gate, up)]
    merged = np.stack(halves, axis=1).reshape(-1, weight.shape[1])
    return pack_int8(merged) if weight.dtype == np.int8 else pack_bf16(merged)


def unpack(packed: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The weight [rows, columns] of pack_int8 (uint8 -> int8) or pack_bf16."""
    tiles = packed.reshape(*packed.shape[:2], 16, 32, -1).transpose(0, 3, 1, 2, 4)
    weight = tiles.reshape(packed.shape[0] * 32, -1)[:rows, :columns]
    return (weight.astype(np.int16) - 128).astype(np.int8) if packed.dtype == np.uint8 else weight


def unpack_gate_up(packed: np.ndarray, intermediate: int, columns: int) -> np.ndarray:
    """The weight [2 * intermediate, columns] of pack_gate_up."""
    halves = unpack(packed, len(packed) * 32, columns).reshape(-1, 2, 16, columns)
    return np.concatenate([halves[:, i].reshape(-1, columns)[:intermediate] for i in range(2)])


def dequantize_int8(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weight that q [..., N, K] and scale [..., N] stand for."""
    return q.astype(np.float32) * scale[..., None]


def route(x: np.ndarray, gate: np.ndarray, top_k: int) -> np.ndarray:
    """The share [T, E] of each expert in each token of x [T, H] that ops.moe.fused_moe computes; gate [E, H]."""
    logits = x @ gate.T
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    chosen = np.argsort(-p, axis=-1, kind="stable")[:, :top_k]  # stable: ties go to the lower index
    share = np.zeros_like(p)
    np.put_along_axis(share, chosen, np.take_along_axis(p, chosen, axis=-1), axis=-1)
    return share / share.sum(axis=-1, keepdims=True)


def fused_moe(
    x: np.ndarray,
    gate: np.ndarray,
    w13: np.ndarray,
    w2: np.ndarray,
    top_k: int,
    w13_scale: np.ndarray | None = None,
    w2_scale: np.ndarray | None = None,
    activation_bits: int = 16,
    bf16_product: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """ops.moe.fused_moe: x [T, H], gate [E, H], w13 [E, 2I, H], w2 [E, H, I] -> [T, H]; none of them packed.

    ``bf16_product``: linear_bf16 or linear_bf16_tiles, if x, w13 and w2 are bfloat16, their values as float32.
    """

    def product(x: np.ndarray, weight: np.ndarray, scale: np.ndarray | None, e: int) -> np.ndarray:
        if scale is not None:
            return weight_only_linear(x, weight[e], scale[e], activation_bits)
        return bf16_product(round_bf16(x), weight[e]) if bf16_product else linear(x, weight[e])

    share = route(x, gate, top_k)
    y = np.zeros_like(x)
    for e in range(gate.shape[0]):
        hidden, up = np.split(product(x, w13, w13_scale, e), 2, axis=-1)
        y += share[:, e : e + 1] * product(hidden / (1 + np.exp(-hidden)) * up, w2, w2_scale, e)
    return y


def philox4x32_10(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox 4x32 on 32-bit words (Salmon et al., doi:10.1145/2063384.2063405)."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def sample(
    logits: np.ndarray,
    floats: np.ndarray,
    ints: np.ndarray,
    history_ids: np.ndarray,
    history_offsets: np.ndarray,
    bias_ids: np.ndarray,
    bias_values: np.ndarray,
    bias_offsets: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ops.sampling.sample: logits [S, V], floats [S, 6], ints [S, 6], histories, biases.

    Returns:
        next_tokens [S], logprobs [S], top_ids [S, 20], top_logprobs [S, 20].
    """
    biased = logits.copy()
    for row, (a, b) in zip(biased, itertools.pairwise(bias_offsets), strict=True):
        for token, value in zip(bias_ids[a:b], bias_values[a:b], strict=True):
            row[token] += value
    histories = [history_ids[a:b] for a, b in itertools.pairwise(history_offsets)]
    tokens = [_sample_row(*row) for row in zip(biased, floats, ints.tolist(), histories, strict=True)]
    exact = logits.astype(np.float64)
    most = exact.max(axis=1, keepdims=True)
    log_softmax = exact - most - np.log(np.exp(exact - most).sum(axis=1, keepdims=True))
    top_ids = np.full((len(tokens), 20), -1, np.int32)
    top_logprobs = np.zeros((len(tokens), 20), np.float32)
    for s, wanted in enumerate(ints[:, 5]):
        order = np.argsort(-exact[s], kind="stable")[:wanted]  # stable: ties go to the lower index
        order = order[exact[s, order] > -np.inf]
        top_ids[s, : len(order)], top_logprobs[s, : len(order)] = order, log_softmax[s, order]
    logprobs = log_softmax[np.arange(len(tokens)), tokens].astype(np.float32)
    return np.array(tokens, np.int32), logprobs, top_ids, top_logprobs


def _sample_row(logits: np.ndarray, floats: np.ndarray, ints: list[int], history: np.ndarray) -> int:
    temperature, top_p, min_p, repetition, presence, frequency = floats  # float32
    seed, position, top_k, forced_token, prompt_len, _ = ints
    if forced_token >= 0:
        return forced_token

    penalised = logits.copy()
    counts = np.bincount(history[prompt_len:], minlength=len(logits))
    for token in set(history.tolist()):
        x = logits[token]
        x = x / repetition if x > 0 else x * repetition
        if counts[token]:
            x = x - presence - np.float32(counts[token]) * frequency
        penalised[token] = x
    if temperature == 0:
        return int(np.argmax(penalised))

    scaled = (penalised - penalised.max()) / temperature
    weights = np.exp(scaled.astype(np.float64))
    if 0 < top_k < len(logits):
        weights[scaled < np.sort(scaled)[-top_k]] = 0
    if top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        reached = np.cumsum(weights[order]) >= float(top_p) * weights.sum()
        weights[order[np.argmax(reached) + 1 :]] = 0
    weights[weights < min_p] = 0

    words = [int(w) & 0xFFFFFFFF for w in (seed, seed >> 32, position, position >> 32)]
    low, high, *_ = philox4x32_10((words[0], words[1]), (words[2], words[3], 0, 0))
    u = ((high << 32 | low) >> 11) * 2.0**-53
    running = np.cumsum(weights)
    return int(np.argmax(running > u * running[-1]))


def all_reduce(xs: list[np.ndarray]) -> np.ndarray:
    """ops.collective.all_reduce: x of every rank -> their sum, added in rank order."""
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total


def all_gather(xs: list[np.ndarray]) -> np.ndarray:
    """ops.collective.all_gather: x [rows, cols] of every rank -> [rows, ranks * cols]."""
    return np.concatenate(xs, axis=1)
