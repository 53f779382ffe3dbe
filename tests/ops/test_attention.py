"""ops.attention against the reference, against attention without pages, and against itself cut differently."""

import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import paddle
import pytest

from ops import reference
from ops.attention import append_attention
from ops.library import num_threads, set_num_threads
from tests.ops.instruction_sets import digests
from tests.ops.sizes import ATTENTION, WINDOWS, Heads

# float32 dot products and softmax sums in another order; results are averages of values of order one.
FLOAT32_TOLERANCE = 3e-6
# Inputs, roped keys and results are each rounded to 8 bits; the reference sees rounded inputs but unrounded keys.
BFLOAT16_TOLERANCE = 2.0**-6


MIXTRAL_LIKE = Heads(8, 2, 128, 1e6)


def random(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def as_tensor(x: np.ndarray, dtype: str) -> paddle.Tensor:
    return paddle.to_tensor(x).astype(dtype)


def values_of(x: paddle.Tensor) -> np.ndarray:
    return x.astype("float32").numpy()


class Cache:
    """A paged cache of one layer whose pages are dealt out in shuffled order, full of old values."""

    def __init__(self, heads: Heads, sequences: int, max_len: int, block_size: int, dtype="float32", seed=0):
        self.heads, self.dtype = heads, dtype
        pages = -(-max_len // block_size)
        shape = (sequences * pages + 3, heads.num_kv_heads, block_size, heads.head_dim)
        order = np.random.default_rng(seed).permutation(sequences * pages + 3)
        self.block_tables = order[: sequences * pages].reshape(sequences, pages).astype(np.int32)
        self.keys, self.values = (as_tensor(random(*shape, seed=seed + i), dtype) for i in (1, 2))

    def step(self, sequences: list[int], pieces: list[np.ndarray], contexts: list[int]) -> list[np.ndarray]:
        """Appends one piece [length, width] to each of ``sequences``; returns each piece's rows of the output."""
        cu_seqlens = np.cumsum([0, *map(len, pieces)])
        rows = np.concatenate([*pieces, np.zeros((0, self.heads.width), np.float32)])
        out = append_attention(
            as_tensor(rows, self.dtype),
            self.keys,
            self.values,
            paddle.to_tensor(cu_seqlens.astype(np.int32)),
            paddle.to_tensor(np.array(contexts, np.int32)),
            paddle.to_tensor(self.block_tables[sequences]),
            *self.heads.arguments(),
        )
        return np.split(values_of(out), cu_seqlens[1:-1])


def one_piece(heads: Heads, qkv: np.ndarray, block_size=16, dtype="float32") -> np.ndarray:
    return Cache(heads, 1, len(qkv), block_size, dtype).step([0], [qkv], [0])[0]


def textbook(heads: Heads, qkv: np.ndarray) -> np.ndarray:
    """One sequence in float64, no pages: rotation as complex numbers, one query head at a time."""
    length, half = len(qkv), heads.head_dim // 2
    x = qkv.astype(np.float64).reshape(length, -1, heads.head_dim)
    turn = np.exp(1j * np.outer(np.arange(length), heads.rope_theta ** (-2 * np.arange(half) / heads.head_dim)))
    out = []
    for h in range(heads.num_heads):
        kv = h * heads.num_kv_heads // heads.num_heads
        q, k = ((x[:, i, :half] + 1j * x[:, i, half:]) * turn for i in (h, heads.num_heads + kv))
        scores = (q @ k.conj().T).real / np.sqrt(heads.head_dim)
        distance = np.subtract.outer(np.arange(length), np.arange(length))
        scores[(distance < 0) | (distance >= (heads.window or length))] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out.append(weights / weights.sum(axis=1, keepdims=True) @ x[:, heads.num_heads + heads.num_kv_heads + kv])
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size"), ATTENTION)
def test_append_attention_is_the_reference(num_heads, num_kv_heads, head_dim, block_size, window, dtype):
    heads = Heads(num_heads, num_kv_heads, head_dim, 1e4, window)
    lengths, contexts = [5, 0, 1, 40, 1], [3, 20, 37, 33, 0]
    cache = Cache(heads, len(lengths), 80, block_size, dtype)
    keys, values = values_of(cache.keys), values_of(cache.values)
    pieces = [values_of(as_tensor(random(n, heads.width, seed=n), dtype)) for n in lengths]
    out = cache.step(list(range(len(lengths))), pieces, contexts)

    expected = reference.append_attention(
        np.concatenate(pieces),
        keys,
        values,
        np.cumsum([0, *lengths]),
        contexts,
        cache.block_tables,
        *heads.arguments(),
    )
    tolerance = FLOAT32_TOLERANCE if dtype == "float32" else BFLOAT16_TOLERANCE
    np.testing.assert_allclose(np.concatenate(out), expected, rtol=0, atol=tolerance)
    # Written rows are the reference's, rounded once; every other slot is untouched.
    np.testing.assert_array_equal(values_of(cache.keys), values_of(as_tensor(keys, dtype)))
    np.testing.assert_array_equal(values_of(cache.values), values)


@pytest.mark.parametrize("window", [0, 100, 256, 300])
@pytest.mark.parametrize("heads", [Heads(8, 2, 64), Heads(5, 1, 34)])
def test_many_chunks_of_positions_are_the_reference(heads, window):
    heads = replace(heads, window=window)
    lengths, contexts = [1, 1, 1, 3, 40, 1], [255, 256, 511, 254, 490, 700]
    cache = Cache(heads, len(lengths), 720, 16)
    keys, values = values_of(cache.keys), values_of(cache.values)
    pieces = [random(n, heads.width, seed=20 + i) for i, n in enumerate(lengths)]
    out = cache.step(list(range(len(lengths))), pieces, contexts)
    expected = reference.append_attention(
        np.concatenate(pieces),
        keys,
        values,
        np.cumsum([0, *lengths]),
        contexts,
        cache.block_tables,
        *heads.arguments(),
    )
    np.testing.assert_allclose(np.concatenate(out), expected, rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize(
    "heads", [Heads(8, 2, 64), Heads(8, 2, 64, 1e6, 20), Heads(3, 1, 26, 123.456789), Heads(4, 4, 16)]
)
def test_attention_is_the_textbook(heads):
    qkv = random(150, heads.width, seed=5)
    # The textbook's angles are float64, the operator's float32: at position 150 they differ by 150 * 2^-24 and more.
    np.testing.assert_allclose(one_piece(heads, qkv), textbook(heads, qkv), rtol=0, atol=5e-5)


@pytest.mark.parametrize("heads", [Heads(4, 2, 32), Heads(4, 2, 32, 1e4, 280)])
def test_attention_over_many_chunks_is_the_textbook(heads):
    qkv = random(600, heads.width, seed=15)
    # As above, at position 600.
    np.testing.assert_allclose(one_piece(heads, qkv), textbook(heads, qkv), rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [MIXTRAL_LIKE, Heads(8, 2, 128, 1e6, 45), Heads(6, 1, 40), Heads(3, 3, 18, 1e4, 7)])
def test_chunks_do_not_change_a_bit(heads, dtype):
    qkv = random(133, heads.width, seed=6)
    whole = one_piece(heads, qkv, 16, dtype)
    for chunk, block_size in [(1, 8), (7, 16), (32, 24), (50, 128), (100, 64)]:
        cache = Cache(heads, 1, len(qkv), block_size, dtype, seed=chunk)
        starts = range(0, len(qkv), chunk)
        pieces = [cache.step([0], [qkv[i : i + chunk]], [i])[0] for i in starts]
        np.testing.assert_array_equal(np.concatenate(pieces), whole, f"chunks of {chunk}, pages of {block_size}")


@pytest.fixture
def threads_as_before():
    before = num_threads()
    yield
    set_num_threads(before)


CHUNK = reference.ATTENTION_CHUNK


@pytest.mark.usefixtures("threads_as_before")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "block_size"),
    [(MIXTRAL_LIKE, 16), (MIXTRAL_LIKE, 24), (Heads(9, 1, 64), 64), (Heads(3, 3, 40), 16), (Heads(12, 2, 32), 256)],
)
@pytest.mark.parametrize("window", [0, 1, 100, CHUNK, CHUNK + 20])
def test_single_tokens_at_borders_of_chunks_are_those_of_the_prompt(heads, block_size, window, dtype):
    heads = replace(heads, window=window)
    prompt = random(2 * CHUNK + 40, heads.width, seed=31)
    set_num_threads(2)
    whole = one_piece(heads, prompt, 16, dtype)
    borders = [CHUNK, 2 * CHUNK, CHUNK + window, 2 * CHUNK + 32]
    positions = sorted({b + i for b in borders for i in (-2, -1, 0, 1) if b + i < len(prompt)})
    cache = Cache(heads, len(positions), len(prompt), block_size, dtype)
    cache.step(list(range(len(positions))), [prompt[:p] for p in positions], [0] * len(positions))
    for threads in (1, 2, 3):
        set_num_threads(threads)
        for together in (1, 3, len(positions)):  # chunks are divided among threads by what there is to do
            for i in range(0, len(positions), together):
                at = positions[i : i + together]
                out = cache.step(list(range(i, i + len(at))), [prompt[p : p + 1] for p in at], at)
                np.testing.assert_array_equal(np.concatenate(out), whole[at], f"{threads} threads, {together} together")


@pytest.mark.usefixtures("threads_as_before")
@pytest.mark.parametrize("window", [0, 60, CHUNK + 20])
def test_pieces_of_a_prompt_at_borders_of_chunks_do_not_change_a_bit(window):
    heads = Heads(8, 2, 64, 1e6, window)
    prompt = random(2 * CHUNK + 40, heads.width, seed=32)
    whole = one_piece(heads, prompt, 16)
    for threads, cuts in [(1, [CHUNK]), (2, [CHUNK - 1, 2 * CHUNK + 1]), (3, [40, CHUNK + 1, CHUNK + 3, 2 * CHUNK])]:
        set_num_threads(threads)
        cache = Cache(heads, 1, len(prompt), 32, seed=threads)
        pieces = [cache.step([0], [prompt[a:b]], [a])[0] for a, b in pairwise([0, *cuts, len(prompt)])]
        np.testing.assert_array_equal(np.concatenate(pieces), whole, f"cut at {cuts}")


@pytest.mark.usefixtures("threads_as_before")
def test_many_single_tokens_do_not_change_a_bit():
    heads = Heads(4, 2, 32)
    contexts = [0, 3, 700, 5, 255, 256, 30, 257, 1, 2, 400, 7, 8, 9, 10, 11]
    prompts = [random(n + 1, heads.width, seed=n) for n in contexts]
    cache = Cache(heads, len(contexts), 720, 16)
    alone = []
    for s, (prompt, context) in enumerate(zip(prompts, contexts, strict=True)):
        cache.step([s], [prompt[:-1]], [0])
        alone.append(cache.step([s], [prompt[-1:]], [context])[0])
    for threads in (1, 2, 3):
        set_num_threads(threads)
        together = cache.step(list(range(len(contexts))), [prompt[-1:] for prompt in prompts], contexts)
        np.testing.assert_array_equal(np.concatenate(together), np.concatenate(alone))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neighbours_and_threads_do_not_change_a_bit(dtype):
    heads = Heads(8, 2, 96, 1e6, 60)
    lengths = [70, 1, 130, 33, 0, 17]
    prompts = [random(n, heads.width, seed=n) for n in lengths]
    alone = [one_piece(heads, x, 32, dtype) for x in prompts]
    before = num_threads()
    try:
        for threads, order in [(1, [0, 1, 2, 3, 4, 5]), (3, [5, 2, 0, 4, 3, 1])]:
            set_num_threads(threads)
            cache = Cache(heads, len(lengths), max(lengths), 16, dtype)
            cut = [n // 2 for n in lengths]
            first = cache.step(order, [prompts[s][: cut[s]] for s in order], [0] * len(order))
            second = cache.step(order, [prompts[s][cut[s] :] for s in order], [cut[s] for s in order])
            for s, a, b in zip(order, first, second, strict=True):
                np.testing.assert_array_equal(np.concatenate([a, b]), alone[s])
    finally:
        set_num_threads(before)


def test_a_token_never_reads_the_future_or_beyond_its_window():
    heads = Heads(4, 2, 32, 1e4, 10)
    qkv = random(50, heads.width, seed=7)
    whole = one_piece(heads, qkv)
    spoiled = qkv.copy()
    spoiled[41:] = np.nan
    spoiled[:20] = np.nan
    np.testing.assert_array_equal(one_piece(heads, spoiled)[30:41], whole[30:41])


@pytest.mark.parametrize("block_size", [16, 24])
def test_chunks_out_of_the_window_are_not_read(block_size):
    heads = Heads(4, 2, 32, 1e4, CHUNK + 10)
    qkv = random(2 * CHUNK + 100, heads.width, seed=13)
    spoiled = qkv.copy()
    spoiled[:60] = np.nan  # the last of them is seen up to position 59 + CHUNK + 9
    clean, dirty = (one_piece(heads, x, block_size)[CHUNK + 69 :] for x in (qkv, spoiled))
    np.testing.assert_array_equal(dirty, clean)


def test_pages_out_of_the_window_may_be_gone():
    heads = Heads(4, 2, 32, 1e4, 20)
    qkv = random(70, heads.width, seed=8)
    cache = Cache(heads, 1, len(qkv), 16)
    cache.step([0], [qkv[:60]], [0])
    cache.block_tables[0, :2] = -1  # position 60 sees positions from 41 on
    np.testing.assert_array_equal(cache.step([0], [qkv[60:]], [60])[0], one_piece(heads, qkv)[60:])


def test_rope_theta_keeps_its_double_precision():
    heads = Heads(1, 1, 128, 10.1)
    qkv = random(300, heads.width, seed=9)

    def reference_keys(theta):
        keys, values = np.zeros((1, 1, 300, 128), np.float32), np.zeros((1, 1, 300, 128), np.float32)
        reference.append_attention(qkv, keys, values, [0, 300], [0], np.zeros((1, 1), np.int32), 1, 1, theta)
        return keys[0]

    cache = Cache(heads, 1, 300, 300)
    cache.step([0], [qkv], [0])
    written = values_of(cache.keys)[cache.block_tables[0, 0]]
    np.testing.assert_array_equal(written, reference_keys(10.1))
    assert (written != reference_keys(float(np.float32(10.1)))).any()


class Layer(paddle.nn.Layer):
    """append_attention as a program of its own, for paddle.jit.save."""

    def __init__(self, heads: Heads):
        super().__init__()
        self.heads = heads

    def forward(self, qkv, keys, values, cu_seqlens, context_lens, block_tables):
        return append_attention(qkv, keys, values, cu_seqlens, context_lens, block_tables, *self.heads.arguments())


def test_static_program_equals_dynamic(tmp_path):
    heads = Heads(4, 2, 16, 10.1, 7)
    cache = (None, heads.num_kv_heads, 8, heads.head_dim)
    shapes = [(None, heads.width), cache, cache, (None,), (None,), (None, None)]
    specs = [paddle.static.InputSpec(list(x), "float32" if i < 3 else "int32") for i, x in enumerate(shapes)]
    paddle.jit.save(paddle.jit.to_static(Layer(heads), input_spec=specs, full_graph=True), str(tmp_path / "layer"))
    config = paddle.inference.Config(str(tmp_path / "layer.json"), str(tmp_path / "layer.pdiparams"))
    config.disable_onednn()
    config.disable_glog_info()
    predictor = paddle.inference.create_predictor(config)

    dynamic, static = Cache(heads, 1, 40, 8), Cache(heads, 1, 40, 8)
    for context, length in [(0, 30), (30, 1), (31, 6)]:
        piece = random(length, heads.width, seed=length)
        expected = dynamic.step([0], [piece], [context])[0]
        inputs = [paddle.to_tensor(piece), static.keys, static.values]
        inputs += [paddle.to_tensor(np.array(x, np.int32)) for x in ([0, length], [context], static.block_tables)]
        for name, tensor in zip(predictor.get_input_names(), inputs, strict=True):
            predictor.get_input_handle(name).share_external_data(tensor)
        predictor.run()
        out = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
        np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(values_of(static.keys), values_of(dynamic.keys))
    np.testing.assert_array_equal(values_of(static.values), values_of(dynamic.values))


def test_no_tokens_give_no_rows():
    cache = Cache(MIXTRAL_LIKE, 2, 16, 16)
    keys = values_of(cache.keys)
    out = cache.step([0, 1], [np.zeros((0, MIXTRAL_LIKE.width), np.float32)] * 2, [3, 0])
    assert [x.shape for x in out] == [(0, 1024), (0, 1024)]
    np.testing.assert_array_equal(values_of(cache.keys), keys)


def digest() -> str:
    """SHA-256 of outputs over dtypes, head sizes and windows: compared between instruction sets."""
    total = hashlib.sha256()
    for dtype in ("float32", "bfloat16"):
        for heads in (MIXTRAL_LIKE, Heads(5, 1, 50, 1e4, 30)):
            total.update(one_piece(heads, random(75, heads.width, seed=11), 16, dtype).tobytes())
            cache = Cache(heads, 1, 40, 16, dtype)
            total.update(cache.step([0], [random(1, heads.width, seed=12)], [38])[0].tobytes())
            total.update(values_of(cache.keys).tobytes())
        for heads in (Heads(8, 2, 64), Heads(6, 1, 40, 1e4, CHUNK + 9)):  # more chunks than one
            cache = Cache(heads, 1, 620, 16, dtype)
            for length, context in [(600, 0), (1, 600), (5, 601)]:
                out = cache.step([0], [random(length, heads.width, seed=length)], [context])[0]
                total.update(out.tobytes())
    return total.hexdigest()


def test_instruction_sets_agree():
    found = digests("test_attention")
    assert set(found.values()) == {digest()}, found


REFUSALS = [
    ({"num_heads": 3}, "num_heads is 3, needs a positive multiple of num_kv_heads = 2"),
    ({"rope_theta": 0.0}, "rope_theta is 0, needs a positive number"),
    ({"rope_theta": float("inf")}, "rope_theta is inf, needs a positive number"),
    ({"sliding_window": -1}, "sliding_window is -1, needs a number of positions, or 0 for none"),
    ({"cache_shape": (4, 2, 8, 15)}, "head_dim is 15 .*, needs a positive even number"),
    ({"cache_shape": (4, 3, 8, 16)}, r"key_cache has shape \[4, 3, 8, 16\], needs \[-1, 2, -1, -1\]"),
    ({"cache_dtype": "bfloat16"}, "qkv is float32, needs bfloat16"),
    ({"width": 100}, r"qkv has shape \[5, 100\], needs \[-1, 128\]"),
    ({"cu_seqlens": [1, 2, 5]}, r"cu_seqlens\[0\] is 1, needs 0"),
    ({"cu_seqlens": [0, 2, 4]}, r"cu_seqlens\[2\] is 4, needs 5, the rows of qkv"),
    ({"cu_seqlens": [0, 6, 5]}, r"cu_seqlens\[2\] is 5, needs at least cu_seqlens\[1\] = 6"),
    ({"cu_seqlens": [0, 5]}, r"cu_seqlens has shape \[2\], needs \[3\]"),
    ({"context_lens": [0, -2]}, r"context_lens\[1\] is -2, needs 0 or more"),
    ({"context_lens": [0, 14]}, r"sequence 1 reaches 17 tokens \(context_lens 14 \+ 3 new\).* room for 16"),
    ({"block_tables": [[0, 1], [2, -1]]}, r"block_tables\[1, 1\] is -1, but sequence 1 needs a page \(0 to 3\)"),
    ({"block_tables": [[4, 1], [2, 3]]}, r"block_tables\[0, 0\] is 4, but sequence 0 needs a page \(0 to 3\)"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refusals_name_the_thing(change, message):
    made = {
        "num_heads": 4,
        "rope_theta": 1e4,
        "sliding_window": 0,
        "cache_shape": (4, 2, 8, 16),
        "cache_dtype": "float32",
        "width": 128,
        "cu_seqlens": [0, 2, 5],
        "context_lens": [0, 8],
        "block_tables": [[0, 1], [2, 3]],
        **change,
    }
    caches = [paddle.zeros(made["cache_shape"]).astype(made["cache_dtype"]) for _ in range(2)]
    indices = [paddle.to_tensor(np.array(made[n], np.int32)) for n in ("cu_seqlens", "context_lens", "block_tables")]
    with pytest.raises(ValueError, match=message):
        append_attention(
            paddle.zeros([5, made["width"]]),
            *caches,
            *indices,
            made["num_heads"],
            2,
            made["rope_theta"],
            made["sliding_window"],
        )
