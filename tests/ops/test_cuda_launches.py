"""How many kernels an operator launches on a GPU, counted on the emulation: at most ten for a layer that decodes."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.gpu import linear_cases
from tests.gpu.attention_cases import Cache
from tests.gpu.case import normal
from tests.gpu.devices import EmulatedDevice
from tests.gpu.floats import encode
from tests.gpu.linear_cases import WEIGHTS
from tests.gpu.moe_cases import Layer
from tests.gpu.table import BF16
from tests.ops.sizes import Heads

HIDDEN = 2048  # sixteen tokens of 4,096, as on an H100, are more than the shared memory that is emulated, an A100's
HEADS = Heads(16, 4, 128, 1e6)


@pytest.fixture(scope="module")
def device() -> EmulatedDevice:
    return EmulatedDevice()


def launches(device, call) -> int:
    before = device.emulation.launches()
    call()
    return device.emulation.launches() - before


def of_linear(device, tokens: int, kind) -> int:
    shape = (tokens, 32, HIDDEN)
    weight, _, _ = linear_cases.make(device, BF16, kind, *shape[1:])
    x = encode(normal(1, tokens, HIDDEN), BF16)
    return launches(device, lambda: linear_cases.call(device, x, BF16, weight, BF16, shape))


def of_fused_moe(device, tokens: int, kind) -> int:
    layer = Layer(device, (64, 32, 8), kind, BF16)
    x = encode(normal(1, tokens, 64), BF16)
    return launches(device, lambda: layer(x, 2))


def of_attention(device, tokens: int) -> int:
    """A decode of as many sequences."""
    cache = Cache(device, HEADS, tokens, 9, 16, BF16)
    pieces = [encode(normal(i, 1, HEADS.width), BF16) for i in range(tokens)]
    return launches(device, lambda: cache.step(list(range(tokens)), pieces, [8] * tokens))


def of_rms_norm(device, tokens: int) -> int:
    x, weight = device.array(normal(1, tokens, 64)), device.array(np.ones(64, np.float32))
    y = device.empty((tokens, 64), np.uint16)
    pointers = x.pointer, None, None, weight.pointer, None, y.pointer
    return launches(device, lambda: device.kernels.rms_norm(*pointers, BF16, tokens, 64, 1e-5, device.stream))


@pytest.mark.parametrize("kind", WEIGHTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32])
def test_a_layer_that_decodes_is_at_most_ten_launches(device, tokens, kind):
    parts = {
        "norms": 2 * of_rms_norm(device, tokens),
        "qkv and o": 2 * of_linear(device, tokens, kind),
        "attention": of_attention(device, tokens),
        "experts": of_fused_moe(device, tokens, kind),
    }
    # 16-bit weights take h as it is: no launch rounds it.
    assert parts == {"norms": 2, "qkv and o": 2, "attention": 2, "experts": 4 if kind.bits else 3}
    assert sum(parts.values()) <= 10


def test_a_wrong_word_for_overlap_is_refused():
    """Read at a process's first launch."""
    code = (
        "from tests.gpu.devices import EmulatedDevice; from tests.ops.test_cuda_launches import of_rms_norm;"
        "of_rms_norm(EmulatedDevice(), 1)"
    )
    environment = {**os.environ, "PADDLE_MIXTRAL_CUDA_OVERLAP": "yes"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PADDLE_MIXTRAL_CUDA_OVERLAP is 'yes', needs 0 or 1" in done.stderr


@pytest.mark.parametrize("kind", WEIGHTS, ids=str)
def test_experts_of_many_tokens_are_few_launches(device, kind):
    assert of_fused_moe(device, 33, kind) == (6 if kind.bits else 5)
