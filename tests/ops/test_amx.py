"""What the amx kernels alone must show: each tile instruction, and sizes at which the walk over tiles changes.

Where the processor has no AMX these run all the same, in a process of test_amx_emulation.py's.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import paddle
import pytest

from ops import library, reference
from ops.linear import linear, weight_only_linear
from predict.engine.request import SamplingParams
from predict.llm import LLM
from predict.model.weights import DEMO
from tests.ops import test_linear, test_moe
from tests.ops.amx_emulation import configuration

if library.cpu_isa() != "amx":
    pytest.skip("this process's kernels are not amx; test_amx_emulation.py runs these tests", allow_module_level=True)

SOURCE = Path(__file__).with_name("amx_emulation") / "instructions.S"


@pytest.fixture(autouse=True)
def all_threads():
    threads = library.num_threads()
    yield
    library.set_num_threads(threads)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to assemble the instructions with")
    assembled = tmp_path_factory.mktemp("amx") / "instructions.so"
    subprocess.run(["g++", "-shared", SOURCE, "-o", assembled], check=True)
    return ctypes.CDLL(str(assembled))


UNTOUCHED = 255  # what memory holds that an instruction must not write


def run(function, config, start, size):
    """function(config, from, to) with `start` in the middle of memory; returns what it returns, and `size` bytes."""
    memory, to = np.zeros(1 << 19, np.uint8), np.full(size, UNTOUCHED, np.uint8)
    middle = (-memory.ctypes.data) % 64 + (1 << 18)
    start = np.ascontiguousarray(start).view(np.uint8).reshape(-1)
    memory[middle : middle + len(start)] = start
    returned = function(*map(ctypes.c_void_p, (config.ctypes.data, memory.ctypes.data + middle, to.ctypes.data)))
    return returned, to


def test_tiles_are_loaded_and_stored_by_any_address(instructions):
    tile = np.random.default_rng(0).integers(0, 256, (16, 64), np.uint8)
    count, found = run(instructions.moves, configuration({1: (16, 64)}), tile, 1024 * 64)
    assert count == 16 + 15 + 4 * 7
    found = found.reshape(-1, 16, 64)
    np.testing.assert_array_equal(found[:count], np.broadcast_to(tile, (count, 16, 64)))
    np.testing.assert_array_equal(found[count], np.broadcast_to(tile[0], (16, 64)))
    np.testing.assert_array_equal(found[count + 1], tile[::-1])
    assert np.all(found[count + 2 :] == UNTOUCHED)


def test_only_the_rows_and_bytes_of_a_tile_are_stored(instructions):
    tile = np.random.default_rng(0).integers(1, 256, (16, 64), np.uint8)
    count, found = run(instructions.moves, configuration({1: (5, 28)}), tile, 1024 * 64)
    expected = np.full((16, 64), UNTOUCHED, np.uint8)
    expected[:5, :28] = tile[:5, :28]
    np.testing.assert_array_equal(found[: 1024 * count].reshape(-1, 16, 64), np.broadcast_to(expected, (count, 16, 64)))


def test_the_configuration_is_what_was_loaded(instructions):
    _, found = run(instructions.configurations, configuration({}), np.zeros(1), 128)
    assert not found[:64].any()
    np.testing.assert_array_equal(found[64:], configuration({0: (5, 28), 1: (7, 36), 2: (16, 64)}))


def in_rows_of_64_bytes(array):
    """Rows of fewer bytes, and fewer than 16: [16, 64]."""
    data = np.ascontiguousarray(array).view(np.uint8)
    padded = np.full((16, 64), 255, np.uint8)  # what the instruction must not read
    padded[: data.shape[0], : data.shape[1]] = data
    return padded


def product(function, sums, a, b):
    """What it leaves of sums [M, N] with a [M, elements of 4 K bytes] and b [K, elements of 4 N bytes]."""
    tiles = {3: sums, 5: a, 6: b}
    config = configuration({t: (len(x), x.shape[1] * x.itemsize) for t, x in tiles.items()})
    returned, found = run(function, config, np.stack([in_rows_of_64_bytes(x) for x in tiles.values()]), 1024)
    found = found.reshape(16, 64)
    left = found[: len(sums), : sums.shape[1] * 4].copy()
    found[: len(sums), : sums.shape[1] * 4] = UNTOUCHED
    assert np.all(found == UNTOUCHED)
    return returned, left.view(sums.dtype)


@pytest.mark.parametrize(("M", "N", "K"), [(16, 16, 16), (5, 9, 7), (1, 1, 1), (16, 3, 1)])
@pytest.mark.parametrize("signs", ["ss", "su", "us", "uu"])
def test_products_of_bytes(instructions, signs, M, N, K):
    generator = np.random.default_rng(M + N)
    types = [np.int8 if sign == "s" else np.uint8 for sign in signs]
    a, b = (generator.integers(0, 256, s, np.uint8) for s in ((M, K, 4), (K, N, 4)))
    a[0, 0], b[0, 0] = 128, 255  # the largest of either kind
    sums = generator.integers(-(2**31), 2**31, (M, N), np.int32)
    function = getattr(instructions, f"product_tdpb{signs}d")
    _, found = product(function, sums, a.reshape(M, -1), b.reshape(K, -1))
    a, b = (x.view(t).astype(np.int64) for x, t in zip((a, b), types, strict=True))
    expected = sums + np.einsum("mki,kni->mn", a, b)
    np.testing.assert_array_equal(found, expected.astype(np.int32))  # wraps around


# Biased exponents of both operands and of the sums.
EXPONENTS = {
    "usual": ((120, 135), (120, 135), (120, 135)),
    "products and sums around the smallest normal number": ((60, 68), (60, 68), (0, 6)),
    "denormal operands": ((0, 3), (120, 135), (0, 6)),
    "infinities and NaN": ((0, 256), (0, 256), (120, 135)),
}


def flushed(values):
    """Denormals as zeros of their sign."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


@pytest.mark.parametrize(("M", "N", "K"), [(16, 16, 16), (5, 9, 7), (1, 1, 1), (16, 3, 1)])
@pytest.mark.parametrize("exponents", EXPONENTS)
def test_products_of_bfloat16(instructions, exponents, M, N, K):
    of_a, of_b, of_sums = EXPONENTS[exponents]
    a, b = test_linear.extremes(0, M, 2 * K, of_a), test_linear.extremes(1, N, 2 * K, of_b)
    sums = (test_linear.extremes(2, M, N, of_sums).astype(np.uint32) << 16).view(np.float32)
    pairs = np.ascontiguousarray(b.reshape(N, K, 2).swapaxes(0, 1)).reshape(K, -1)
    _, found = product(instructions.product_tdpbf16ps, sums, a, pairs)
    values = [(x.astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
    with np.errstate(invalid="ignore"):
        test_linear.assert_same_bits(found, flushed(flushed(sums) + reference.linear_bf16_tiles(*values)))
    asked = 0x5F80  # of MXCSR: to round up
    returned, rounded = product(instructions.product_rounding_up, sums, a, pairs)
    assert returned == asked
    test_linear.assert_same_bits(rounded, found)


def test_other_registers_stay(instructions):
    data = np.random.default_rng(0).integers(0, 256, 64, np.uint8)
    _, found = run(instructions.interrupted, configuration({1: (16, 64)}), data, 272)
    np.testing.assert_array_equal(found[:256].reshape(4, 64), np.broadcast_to(data, (4, 64)))
    np.testing.assert_array_equal(found[264:], data[:8])
    assert found[256] == 1


# Tokens around 8, from which tiles are used, around a tile's 16 and a task's 256 (128 of two planes); rows and columns
# around a tile's 32 and 64.
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [
        (1, 32, 64),
        (8, 1, 1),
        (15, 33, 65),
        (16, 70, 200),
        (17, 31, 63),
        (32, 64, 129),
        (33, 9, 40),
        (100, 96, 1100),
        (300, 40, 70),
    ],
)
def test_sizes_of_int8(tokens, rows, columns, bits):
    test_linear.test_weight_only_linear_is_the_reference(tokens, rows, columns, "float32", "float32", bits)


def test_int8_is_multiplied_on_tiles_from_eight_tokens_on():
    if not hasattr(ctypes.CDLL(None), "amx_emulated_instructions"):
        pytest.skip("only emulated instructions are counted")
    count = ctypes.CDLL(None).amx_emulated_instructions
    count.restype = ctypes.c_int64
    packed, scale, _ = test_linear.int8(test_linear.random(64, 128, seed=0))
    found = {}
    for tokens, bits in [(7, 16), (8, 16), (8, 8), (17, 8)]:
        before = count()
        weight_only_linear(paddle.ones([tokens, 128]), packed, scale, "float32", bits)
        found[tokens, bits] = count() - before
    # For each of two tiles of rows the configuration, its release, four zeros and the sums' stores; for each of two
    # tiles of columns the weights' two loads, the tokens' one or two (as many as planes, or tiles), their products.
    pair, single = 2 * (2 + 4 + 4 + 2 * (2 + 2 + 4)), 2 * (2 + 4 + 2 + 2 * (2 + 1 + 2))
    assert found == {(7, 16): 0, (8, 16): pair, (8, 8): single, (17, 8): pair}


@pytest.mark.parametrize("bits", [16, 8])
def test_the_longest_and_largest_sums_are_exact(bits):
    x, q = np.full([16, 65536], 3.0, np.float32), np.full([32, 65536], 127, np.int8)
    x[1], q[1:20] = -3.0, -127
    scale = np.ones(32, np.float32)
    packed = paddle.to_tensor(test_linear.pack_int8(q))
    y = weight_only_linear(paddle.to_tensor(x), packed, paddle.to_tensor(scale), "float32", bits)
    np.testing.assert_array_equal(y.numpy(), reference.weight_only_linear(x, q, scale, bits))


# Tokens around a tile's 16, a pair of tiles' 32 and a task's 256; rows and columns around a tile's 32 and 32, columns
# around a block's 256.
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [
        (1, 70, 600),
        (15, 31, 33),
        (16, 32, 32),
        (17, 33, 255),
        (33, 40, 257),
        (49, 64, 511),
        (100, 96, 1100),
        (300, 40, 70),
    ],
)
def test_sizes_of_bf16(tokens, rows, columns):
    test_linear.test_linear_bf16_is_the_reference(tokens, rows, columns, "float32")


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 70, 600), (17, 33, 255), (49, 64, 511), (3, 5, 100)])
def test_bf16_is_within_the_roundings_of_its_order(tokens, rows, columns):
    x = reference.round_bf16(test_linear.random(tokens, columns, seed=tokens))
    packed, weight = test_linear.bf16(test_linear.random(rows, columns, seed=rows))
    y = linear(test_linear.tensor(x, "bfloat16"), packed, rows, "float32").numpy()
    # A product's share is rounded up to 15 times in its chain, once with the other chain, and once a tile; each time to
    # within 2^-24 of at most the sum of the magnitudes. In the other instruction sets' order it is up to K times.
    roundings = min(columns, 16 + -(-columns // 32))
    magnitudes = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    assert np.all(np.abs(y - x.astype(np.float64) @ weight.astype(np.float64).T) <= roundings * 2.0**-24 * magnitudes)
    others = reference.linear_bf16(x, weight)
    assert np.all(np.abs(y - others) <= (roundings + columns) * 2.0**-24 * magnitudes)


# So many columns that 17 tokens and a strip of weights are too much for the cache, and so many strips that each of the
# threads has several tasks of several strips.
@pytest.mark.parametrize("bits", [16, 8])
def test_int8_where_a_task_has_several_strips(bits):
    library.set_num_threads(1)
    test_linear.test_weight_only_linear_is_the_reference(17, 260, 40000, "float32", "float32", bits)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_bf16_do_not_depend_on_the_strips_of_a_task(threads):
    rows = 260 * threads
    x = test_linear.tensor(test_linear.random(17, 20000, seed=4), "bfloat16")
    packed, _ = test_linear.bf16(test_linear.random(rows, 20000, seed=5))
    library.set_num_threads(threads)
    together = linear(x, packed, rows, "float32").numpy()
    for t in (0, 8, 16):
        np.testing.assert_array_equal(linear(x[t : t + 1], packed, rows, "float32").numpy(), together[t : t + 1])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "a8w8"])
@pytest.mark.parametrize("tokens", [1, 20, 130])
def test_experts_of_several_tiles_of_tokens(tokens, dtype):
    layer = test_moe.Layer(150, 70, 5, dtype)
    test_moe.assert_is_the_reference(layer, test_moe.tokens_of(tokens, 150, "bfloat16"), 2)


def test_the_demo_model_says_the_same_alone_and_in_a_batch():
    llm, prompts = LLM(DEMO, dtype="bfloat16"), ["This module provides", "The quick brown fox jumps over"]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    together = [(c.token_ids, c.logprobs) for c in llm.generate(prompts, params)]
    alone = [(c.token_ids, c.logprobs) for prompt in prompts for c in llm.generate(prompt, params)]
    assert alone == together
