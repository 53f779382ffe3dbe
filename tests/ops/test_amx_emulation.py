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
from ops.quantize import pack_gate_up, pack_int8
from setup import ISA_FLAGS, KERNEL_FLAGS
from tests.ops.instruction_sets import NEEDED

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
        (17, 520, 60000),
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
