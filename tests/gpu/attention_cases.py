"""append_attention: the reference within the types' rounding; chunks, neighbours and pages do not change a bit."""

from functools import partial

import numpy as np

from ops import reference
from tests.gpu.case import Case, assert_same_bits, assert_within, normal
from tests.gpu.devices import Device
from tests.gpu.floats import NAMES, ROUNDING, STORED, decode, encode
from tests.gpu.table import BF16, F16, KernelError
from tests.ops.sizes import ATTENTION, WINDOWS, Heads

MOST_HEAD_DIM = 128
# Inputs, roped keys, perhaps probabilities, and results are each rounded; results are averages of values of order one.
TOLERANCE = {BF16: 2.0**-6, F16: 2.0**-9}


class Cache:
    """A paged cache whose pages are dealt out in shuffled order, full of old values."""

    def __init__(self, device: Device, heads: Heads, sequences: int, max_len: int, block_size: int, dtype: int) -> None:
        self.device, self.heads, self.dtype = device, heads, dtype
        pages = -(-max_len // block_size)
        shape = (sequences * pages + 3, heads.num_kv_heads, block_size, heads.head_dim)
        order = np.random.default_rng(block_size).permutation(sequences * pages + 3)
        self.block_tables = order[: sequences * pages].reshape(sequences, pages).astype(np.int32)
        self.before = [encode(normal(i, *shape), dtype) for i in (1, 2)]
        self.caches = [device.array(cache) for cache in self.before]

    def step(self, sequences: list[int], pieces: list[np.ndarray], contexts: list[int]) -> list[np.ndarray]:
        """Appends one piece [length, width], as stored, to each of ``sequences``; each piece's rows of the output."""
        heads, device = self.heads, self.device
        cu_seqlens = np.cumsum([0, *map(len, pieces)]).astype(np.int32)
        qkv = np.concatenate(pieces)
        tables = self.block_tables[sequences]
        out = device.empty((len(qkv), heads.num_heads * heads.head_dim), STORED[self.dtype])
        sizes = len(qkv), *tables.shape, heads.num_heads, heads.num_kv_heads, heads.head_dim, self.before[0].shape[2]
        workspace = device.workspace(device.kernels.append_attention_workspace(*sizes))
        inputs = [device.array(x) for x in (qkv, cu_seqlens, np.array(contexts, np.int32), tables)]
        device.kernels.append_attention(
            *(inputs[0].pointer, self.dtype, *(cache.pointer for cache in self.caches)),
            *(x.pointer for x in inputs[1:]),
            *(out.pointer, *sizes, heads.rope_theta, heads.window, heads.head_dim**-0.5, workspace.pointer),
            device.stream,
        )
        return np.split(out.numpy(), cu_seqlens[1:-1])


def whole(device: Device, heads: Heads, qkv: np.ndarray, dtype: int, block_size: int = 16) -> np.ndarray:
    """One sequence in one step."""
    return Cache(device, heads, 1, len(qkv), block_size, dtype).step([0], [qkv], [0])[0]


def is_the_reference(
    device: Device, heads: Heads, block_size: int, dtype: int, lengths: tuple, contexts: tuple
) -> None:
    """Results, the keys and values written, and every other slot of the cache as it was."""
    longest = max(n + context for n, context in zip(lengths, contexts, strict=True))
    cache = Cache(device, heads, len(lengths), longest, block_size, dtype)
    pieces = [encode(normal(n, n, heads.width), dtype) for n in lengths]
    out = np.concatenate(cache.step(list(range(len(lengths))), pieces, list(contexts)))
    keys, values = (decode(x, dtype) for x in cache.before)
    expected = reference.append_attention(
        *(decode(np.concatenate(pieces), dtype), keys, values, np.cumsum([0, *lengths]), np.array(contexts)),
        *(cache.block_tables, heads.num_heads, heads.num_kv_heads, heads.rope_theta, heads.window),
    )
    assert_within(decode(out, dtype), expected, TOLERANCE[dtype])
    new_keys, new_values = (made.numpy() for made in cache.caches)
    untouched = keys == decode(cache.before[0], dtype)
    assert_same_bits(new_keys[untouched], cache.before[0][untouched], "keys of other rows")
    # Rounded once, of a rotation in float32 of numbers up to 6.
    assert_within(decode(new_keys, dtype), keys, ROUNDING[dtype] * np.abs(keys) + 12 * 2.0**-24)
    assert_same_bits(new_values, encode(values, dtype), "values")


def chunks_do_not_change_a_bit(device: Device, heads: Heads, dtype: int, length: int) -> None:
    """However a sequence is cut, and in pages of any size."""
    qkv = encode(normal(6, length, heads.width), dtype)
    expected = whole(device, heads, qkv, dtype)
    for chunk, block_size in [(1, 8), (7, 16), (32, 7), (50, 128), (100, 1)]:
        if chunk < 32 and length > 150:
            continue  # the emulation's time; shorter sequences are cut so
        cache = Cache(device, heads, 1, length, block_size, dtype)
        out = [cache.step([0], [qkv[i : i + chunk]], [i])[0] for i in range(0, length, chunk)]
        assert_same_bits(np.concatenate(out), expected, f"chunks of {chunk}, pages of {block_size}")


def neighbours_do_not_change_a_bit(device: Device, dtype: int) -> None:
    """A sequence alone and among others, in any order."""
    heads = Heads(8, 2, 96, 1e6, 60)
    lengths = [70, 1, 130, 33, 0, 17]
    prompts = [encode(normal(n, n, heads.width), dtype) for n in lengths]
    alone = [whole(device, heads, x, dtype, 32) if len(x) else x[:, :768] for x in prompts]
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 3, 1]):
        cache = Cache(device, heads, len(lengths), max(lengths), 16, dtype)
        cut = [n // 2 for n in lengths]
        first = cache.step(order, [prompts[s][: cut[s]] for s in order], [0] * len(order))
        second = cache.step(order, [prompts[s][cut[s] :] for s in order], [cut[s] for s in order])
        for s, a, b in zip(order, first, second, strict=True):
            assert_same_bits(np.concatenate([a, b]), alone[s], f"sequence {s} in {order}")


def suffixes_do_not_change_a_bit(device: Device, window: int) -> None:
    """Few new tokens after more than a chunk of keys: of one sequence, and of more than are split over their keys."""
    heads = Heads(8, 2, 32, 1e6, window)
    prompts = [encode(normal(n, n, heads.width), BF16) for n in (300, 530, 276, 280, 301)]
    new = [20, 9, 2, 24, 1]
    alone = [whole(device, heads, x, BF16, 32) for x in prompts]
    for chosen in ([0], [1], [4, 3, 0, 1, 2]):
        cache = Cache(device, heads, len(prompts), 530, 16, BF16)
        contexts = [len(prompts[s]) - new[s] for s in chosen]
        cache.step(chosen, [prompts[s][:n] for s, n in zip(chosen, contexts, strict=True)], [0] * len(chosen))
        out = cache.step(chosen, [prompts[s][n:] for s, n in zip(chosen, contexts, strict=True)], contexts)
        for s, context, rows in zip(chosen, contexts, out, strict=True):
            assert_same_bits(rows, alone[s][context:], f"the last {new[s]} of sequence {s} in {chosen}")


def later_tokens_of_a_suffix_are_not_seen(device: Device, dtype: int) -> None:
    """Rows of the same step, after a long context, that are no numbers."""
    heads = Heads(8, 2, 32)
    qkv = encode(normal(7, 300, heads.width), dtype)
    expected = whole(device, heads, qkv, dtype)
    cache = Cache(device, heads, 1, 300, 16, dtype)
    cache.step([0], [qkv[:280]], [0])
    qkv[290:] = encode(np.float32([np.nan]), dtype)
    assert_same_bits(cache.step([0], [qkv[280:]], [280])[0][:10], expected[280:290], "before them")


def neither_the_future_nor_beyond_the_window(device: Device, dtype: int) -> None:
    """Rows that a row does not see may be any numbers; pages that no row sees may be gone."""
    heads = Heads(4, 2, 32, 1e4, 10)
    qkv = encode(normal(7, 50, heads.width), dtype)
    expected = whole(device, heads, qkv, dtype)
    spoiled = qkv.copy()
    spoiled[41:] = spoiled[:20] = encode(np.float32([1e4]), dtype)
    assert_same_bits(whole(device, heads, spoiled, dtype)[30:41], expected[30:41], "among other rows")
    cache = Cache(device, heads, 1, 50, 16, dtype)
    cache.step([0], [qkv[:45]], [0])
    cache.block_tables[0, :2] = -1  # position 45 sees positions from 36 on
    assert_same_bits(cache.step([0], [qkv[45:]], [45])[0], expected[45:], "with pages out of the window gone")


def what_pages_held_before_does_not_matter(device: Device, dtype: int) -> None:
    """Slots that no row has written may hold anything, not a number as well."""
    for heads in (Heads(4, 2, 32), Heads(8, 2, 128, 1e6, 20)):
        qkv = encode(normal(8, 43, heads.width), dtype)
        expected = whole(device, heads, qkv, dtype, 32)
        for pieces in ([qkv], [qkv[:42], qkv[42:]]):
            cache = Cache(device, heads, 1, 43, 32, dtype)
            cache.caches = [device.array(np.full_like(x, encode(np.float32([np.nan]), dtype)[0])) for x in cache.before]
            starts = np.cumsum([0, *map(len, pieces)])
            out = [cache.step([0], [piece], [start])[0] for piece, start in zip(pieces, starts, strict=False)]
            assert_same_bits(np.concatenate(out), expected, f"{heads}, pieces of {[*map(len, pieces)]}")


def refused(device: Device, head_dim: int) -> None:
    """Head sizes without a kernel are refused by name."""
    message = ""
    try:
        whole(device, Heads(4, 1, head_dim), encode(normal(1, 3, 6 * head_dim), BF16), BF16)
    except KernelError as error:
        message = str(error)
    assert "PM_UNSUPPORTED" in message, f"head size {head_dim} was not refused: {message}"
    assert str(head_dim) in message, message


def cases() -> list[Case]:
    """Every case of append_attention."""
    made = []
    for num_heads, num_kv_heads, head_dim, block_size in ATTENTION:
        if head_dim % 8 or head_dim > MOST_HEAD_DIM:
            made.append(Case("append_attention", f"D = {head_dim} is refused", partial(refused, head_dim=head_dim)))
            continue
        for window in WINDOWS:
            for dtype in (BF16, F16):
                heads = Heads(num_heads, num_kv_heads, head_dim, 1e4, window)
                check = partial(
                    *(is_the_reference,),
                    **{"heads": heads, "block_size": block_size, "dtype": dtype},
                    **{"lengths": (5, 0, 1, 40, 1), "contexts": (3, 20, 37, 33, 0)},
                )
                name = f"{num_heads}/{num_kv_heads} heads of {head_dim}, window {window}, {NAMES[dtype]}"
                made.append(Case("append_attention", name, check))
    for name, lengths, contexts in (
        ("decode", (1, 1, 1), (0, 600, 77)),
        ("a chunk far on", (33,), (500,)),
    ):
        check = partial(
            *(is_the_reference,),
            **{"heads": Heads(8, 2, 128, 1e6), "block_size": 64, "dtype": BF16},
            **{"lengths": lengths, "contexts": contexts},
        )
        made.append(Case("append_attention", f"{name}, contexts {contexts}", check))
    for heads, length in (
        (Heads(8, 2, 128, 1e6), 133),
        (Heads(8, 2, 128, 1e6, 45), 133),
        (Heads(6, 1, 40), 133),
        (Heads(3, 3, 16, 1e4, 7), 70),
        (Heads(4, 1, 32), 700),
        (Heads(18, 1, 16), 70),  # more query heads of a key head than a tile's rows
        (Heads(4, 1, 16, 1e4, 300), 600),  # a window longer than a chunk of keys
    ):
        check = partial(chunks_do_not_change_a_bit, heads=heads, dtype=BF16, length=length)
        made.append(Case("append_attention", f"chunks do not change a bit, {heads}, {length} tokens", check))
    for window in (0, 260):
        check = partial(suffixes_do_not_change_a_bit, window=window)
        made.append(Case("append_attention", f"suffixes do not change a bit, window {window}", check))
    for dtype in (BF16, F16):
        check = partial(later_tokens_of_a_suffix_are_not_seen, dtype=dtype)
        made.append(Case("append_attention", f"later tokens of a suffix are not seen, {NAMES[dtype]}", check))
        check = partial(neighbours_do_not_change_a_bit, dtype=dtype)
        made.append(Case("append_attention", f"neighbours do not change a bit, {NAMES[dtype]}", check))
        check = partial(what_pages_held_before_does_not_matter, dtype=dtype)
        made.append(Case("append_attention", f"what pages held before does not matter, {NAMES[dtype]}", check))
        check = partial(neither_the_future_nor_beyond_the_window, dtype=dtype)
        made.append(Case("append_attention", f"neither the future nor beyond the window, {NAMES[dtype]}", check))
    return made
