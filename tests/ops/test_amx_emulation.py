"""The kernels of the amx variant where the processor has none: their tile instructions emulated, the same bits."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import paddle
import pytest

from ops import reference
from ops.moe import fused_moe
from ops.quantize import pack_bf16, pack_gate_up, pack_int8
from setup import ISA_FLAGS, KERNEL_FLAGS
from tests.ops.instruction_sets import NEEDED
from tests.ops.test_linear import assert_same_bits, extremes
from tests.ops.test_moe import TOLERANCE

SOURCE = Path(__file__).with_name("amx_emulation.cc")


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    if NEEDED["avx512"] not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512, which the amx kernels use beside the tiles")
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulation with")
    library = tmp_path_factory.mktemp("amx") / "amx_emulation.so"
    subprocess.run(["g++", *KERNEL_FLAGS, *ISA_FLAGS["avx512"], "-shared", SOURCE, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def call(function, *arguments):
    """Arrays by their address, numbers as int64."""
    status = function(
        *(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in arguments)
    )
    assert status == 0


# Tokens around 8, from which tiles are used, around a tile's 16 and a task's 256 (128 of two planes); rows and columns
# around a tile's 32 and 64; so many columns of 17 tokens that a task takes several strips of weights.
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
        (17, 520, 40000),
        (300, 40, 70),
    ],
)
def test_linear_is_the_reference(emulation, tokens, rows, columns, bits):
    generator = np.random.default_rng(tokens)
    x = generator.standard_normal((tokens, columns), np.float32)
    q, scale = reference.quantize_int8(generator.standard_normal((rows, columns), np.float32))
    y = np.empty((tokens, rows), np.float32)
    call(emulation.emulated_linear, x, pack_int8(q), scale, y, tokens, rows, columns, bits)
    np.testing.assert_array_equal(y, reference.weight_only_linear(x, q, scale, bits))


@pytest.mark.parametrize("bits", [16, 8])
def test_the_longest_and_largest_sums_are_exact(emulation, bits):
    x, q = np.full([16, 65536], 3.0, np.float32), np.full([32, 65536], 127, np.int8)
    x[1], q[1:20] = -3.0, -127
    scale, y = np.ones(32, np.float32), np.empty((16, 32), np.float32)
    call(emulation.emulated_linear, x, pack_int8(q), scale, y, *y.shape, 65536, bits)
    np.testing.assert_array_equal(y, reference.weight_only_linear(x, q, scale, bits))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("tokens", [1, 20, 130])
def test_fused_moe_is_what_this_processor_computes(emulation, tokens, bits):
    hidden, intermediate, experts = 150, 70, 5
    generator = np.random.default_rng(tokens)
    x, gate = (generator.standard_normal((n, hidden), np.float32) for n in (tokens, experts))
    w13, w2 = (generator.integers(-127, 128, (experts, *s)).astype(np.int8) for s in ((140, hidden), (hidden, 70)))
    scales = [generator.random((experts, n), np.float32) / 100 for n in (140, hidden)]
    packed = np.stack([pack_gate_up(w) for w in w13]), np.stack([pack_int8(w) for w in w2])
    y = np.empty((tokens, hidden), np.float32)
    call(emulation.emulated_moe, x, gate, *packed, *scales, y, tokens, hidden, intermediate, experts, 2, bits)
    tensors = [paddle.to_tensor(a) for a in (x, gate, *packed)]
    np.testing.assert_array_equal(y, fused_moe(*tensors, 2, *map(paddle.to_tensor, scales), bits).numpy())


def bits_of(values):
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def random_bf16(generator, *shape):
    return reference.round_bf16(generator.standard_normal(shape, np.float32))


def linear_bf16(emulation, x, packed, rows):
    """x: the bits [T, K]."""
    y = np.empty((len(x), rows), np.float32)
    call(emulation.emulated_linear_bf16, x, packed, y, *y.shape, x.shape[1])
    return y


# Tokens around a tile's 16, a pair of tiles' 32 and a task's 256; rows and columns around a tile's 32 and 32, columns
# around a block's 256.
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [
        (1, 1, 1),
        (1, 70, 600),
        (2, 17, 15),
        (3, 5, 100),
        (15, 31, 33),
        (16, 32, 32),
        (17, 33, 255),
        (33, 40, 257),
        (49, 64, 511),
        (100, 96, 1100),
        (300, 40, 70),
    ],
)
def test_linear_bf16_is_the_reference(emulation, tokens, rows, columns):
    generator = np.random.default_rng(tokens)
    x, weight = random_bf16(generator, tokens, columns), random_bf16(generator, rows, columns)
    y = linear_bf16(emulation, bits_of(x), pack_bf16(bits_of(weight)), rows)
    assert_same_bits(y, reference.linear_bf16_tiles(x, weight))
    # A product's share is rounded up to 15 times in its chain, once with the other chain, and once a tile; each time to
    # within 2^-24 of at most the sum of the magnitudes. In the other instruction sets' order it is up to K times.
    roundings = min(columns, 16 + -(-columns // 32))
    magnitudes = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    assert np.all(np.abs(y - x.astype(np.float64) @ weight.astype(np.float64).T) <= roundings * 2.0**-24 * magnitudes)
    others = reference.linear_bf16(x, weight)
    assert np.all(np.abs(y - others) <= (roundings + columns) * 2.0**-24 * magnitudes)


# Sums around the smallest normal number; denormal operands and products by large ones; overflow; infinities and NaN.
@pytest.mark.parametrize("exponents", [(60, 68), (0, 3), (0, 255), (180, 200), (0, 256)])
@pytest.mark.parametrize("tokens", [1, 17])
def test_denormals_and_what_is_not_finite_in_bf16(emulation, tokens, exponents):
    x, weight = extremes(tokens, tokens, 70, exponents), extremes(20, 40, 70, exponents)
    weight[:, 1::2] = weight[:, ::2] ^ (weight[:, 1::2] & 0x8001)  # sums that cancel, nearly or wholly
    x[:, 1::2] = x[:, ::2]
    values = [(a.astype(np.uint32) << 16).view(np.float32) for a in (x, weight)]
    assert_same_bits(linear_bf16(emulation, x, pack_bf16(weight), 40), reference.linear_bf16_tiles(*values))


@pytest.fixture
def threads(emulation):
    yield lambda n: call(emulation.emulated_set_num_threads, n)
    call(emulation.emulated_set_num_threads, 2)


def test_rows_of_bf16_do_not_depend_on_their_batch_or_the_threads(emulation, threads):
    generator = np.random.default_rng(3)
    x, weight = bits_of(random_bf16(generator, 70, 523)), pack_bf16(bits_of(random_bf16(generator, 300, 523)))
    alone = np.concatenate([linear_bf16(emulation, x[t : t + 1], weight, 300) for t in range(70)])
    for n in (1, 2, 3):
        threads(n)
        for tokens in range(1, 71):
            np.testing.assert_array_equal(linear_bf16(emulation, x[70 - tokens :], weight, 300), alone[70 - tokens :])


@pytest.mark.parametrize("n", [1, 2])
def test_nor_on_the_strips_of_a_task(emulation, threads, n):
    """17 tokens of 20,000 columns and a strip of weights are too much for the cache: so a task takes several strips."""
    generator = np.random.default_rng(4)
    x, weight = bits_of(random_bf16(generator, 17, 20000)), pack_bf16(bits_of(random_bf16(generator, 600, 20000)))
    threads(n)
    together = linear_bf16(emulation, x, weight, 600)
    for t in (0, 8, 16):
        np.testing.assert_array_equal(linear_bf16(emulation, x[t : t + 1], weight, 600), together[t : t + 1])


class Experts:
    """Random experts of bfloat16, and their emulated product."""

    def __init__(self, emulation, hidden, intermediate, experts):
        generator = np.random.default_rng(hidden)
        self.function, self.sizes = emulation.emulated_moe_bf16, (hidden, intermediate, experts)
        self.gate = generator.standard_normal((experts, hidden), np.float32)
        self.w13 = random_bf16(generator, experts, 2 * intermediate, hidden) / 8  # exact
        self.w2 = random_bf16(generator, experts, hidden, intermediate) / 8
        self.packed = [
            np.stack([pack(bits_of(w)) for w in ws]) for pack, ws in ((pack_gate_up, self.w13), (pack_bf16, self.w2))
        ]

    def __call__(self, x):
        y = np.empty(x.shape, np.float32)
        call(self.function, bits_of(x), self.gate, *self.packed, y, len(x), *self.sizes, 2)
        return y


@pytest.mark.parametrize("tokens", [1, 20, 130])
def test_fused_moe_bf16_is_the_reference(emulation, tokens):
    layer = Experts(emulation, 150, 70, 5)
    x = random_bf16(np.random.default_rng(tokens), tokens, 150)
    expected = reference.fused_moe(x, layer.gate, layer.w13, layer.w2, 2, bf16_product=reference.linear_bf16_tiles)
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=TOLERANCE["bfloat16"] * np.abs(expected).max())


def test_tokens_of_experts_do_not_depend_on_their_batch_or_the_threads(emulation, threads):
    layer, x = Experts(emulation, 150, 70, 5), random_bf16(np.random.default_rng(5), 70, 150)
    alone = np.concatenate([layer(x[t : t + 1]) for t in range(70)])
    for n in (1, 2, 3):
        threads(n)
        for tokens in range(1, 71):
            np.testing.assert_array_equal(layer(x[70 - tokens :]), alone[70 - tokens :])
