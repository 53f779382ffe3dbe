"""linear and fused_moe on a GPU beside being right (test_cuda_kernels.py): the CPU's bits, what they refuse."""

import numpy as np
import paddle
import pytest

from ops import reference
from ops.moe import fused_moe
from tests.gpu.case import assert_same_bits, normal
from tests.gpu.devices import EmulatedDevice
from tests.gpu.floats import decode, encode
from tests.gpu.linear_cases import Weight
from tests.gpu.moe_cases import Layer
from tests.gpu.table import BF16, F16, F32, I8, KernelError


@pytest.fixture(scope="module")
def device() -> EmulatedDevice:
    return EmulatedDevice()


def on_cpu(layer: Layer, x: np.ndarray, top_k: int) -> np.ndarray:
    """The CPU kernel's y of the same layer."""
    arrays = [decode(x, layer.dtype), layer.exact[0], *layer.packed]
    scales = [paddle.to_tensor(scale) for scale in layer.exact[3:]]
    return fused_moe(*(paddle.to_tensor(a) for a in arrays), top_k, *scales, layer.kind.bits).numpy()


# Few tokens in one group and in several, and many in blocks of 64 and of 128.
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "experts", "top_k"),
    [(1, 77, 33, 5, 2), (9, 64, 130, 8, 8), (32, 150, 70, 3, 1), (40, 150, 70, 17, 3), (300, 40, 48, 1, 1)],
)
def test_int8_experts_have_the_cpus_bits(device, tokens, hidden, intermediate, experts, top_k, bits):
    layer = Layer(device, (hidden, intermediate, experts), Weight(bits), BF16)
    x = encode(normal(tokens, tokens, hidden), BF16)
    assert_same_bits(layer(x, top_k), on_cpu(layer, x, top_k), "the CPU's")


def test_unevenly_loaded_experts_have_the_cpus_bits(device):
    """Of 200 tokens expert 2 has all, expert 0 one, expert 1 none, expert 3 the others."""
    gate = np.zeros([4, 64], np.float32)
    gate[0, 0] = gate[3, 1] = 1
    gate[2, 2] = 2
    layer = Layer(device, (64, 48, 4), Weight(16), BF16, gate)
    x = np.abs(normal(3, 200, 64)) + np.float32(1)
    x[:, :3] = [0, 4, 4]
    x[77, :2] = [4, 0]
    x = encode(x, BF16)
    chosen = reference.route(decode(x, BF16), gate, 2) > 0
    np.testing.assert_array_equal(chosen.sum(axis=0), [1, 0, 200, 199])
    assert_same_bits(layer(x, 2), on_cpu(layer, x, 2), "the CPU's")


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "bits", "message"),
    [
        (F32, I8, 16, "activations are float32, a GPU needs bfloat16 or float16"),
        (BF16, F16, 16, "weights are float16, needs int8 or the activations' bfloat16"),
        (BF16, I8, 4, "activation_bits is 4, needs 16 or 8"),
    ],
)
def test_refusals(device, x_dtype, w_dtype, bits, message):
    any_pointer = device.workspace(256).pointer
    with pytest.raises(KernelError, match=f"linear: PM_UNSUPPORTED: linear: {message}"):
        device.kernels.linear(
            *(any_pointer, x_dtype, any_pointer, w_dtype, any_pointer, bits, any_pointer, F32),
            *(1, 32, 64, any_pointer, None),
        )
    with pytest.raises(KernelError, match=f"fused_moe: PM_UNSUPPORTED: fused_moe: {message}"):
        device.kernels.fused_moe(
            *(any_pointer, x_dtype, any_pointer, any_pointer, any_pointer, w_dtype, any_pointer, any_pointer),
            *(bits, any_pointer, 1, 64, 32, 2, 1, any_pointer, None),
        )


def test_what_is_too_large_is_refused(device):
    any_pointer = device.workspace(256).pointer
    with pytest.raises(KernelError, match="linear: int8 rows of 65537 columns, needs at most 65536"):
        device.kernels.linear(
            *(any_pointer, BF16, any_pointer, I8, any_pointer, 16, any_pointer, F32),
            *(1, 32, 65537, any_pointer, None),
        )
    with pytest.raises(KernelError, match="fused_moe: 65 experts, a GPU takes at most 64"):
        device.kernels.fused_moe(
            *(any_pointer, BF16, any_pointer, any_pointer, any_pointer, I8, any_pointer, any_pointer),
            *(16, any_pointer, 1, 64, 32, 65, 1, any_pointer, None),
        )
