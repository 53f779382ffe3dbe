"""rms_norm and sample on a GPU beside being right (test_cuda_kernels.py): the CPU's bits, tokens; what is refused."""

import numpy as np
import paddle
import pytest

from ops import norm, reference
from ops.sampling import sample
from tests.gpu.case import assert_same_bits, assert_within, normal
from tests.gpu.devices import EmulatedDevice
from tests.gpu.floats import decode
from tests.gpu.row_cases import EPS, normed, sampled
from tests.gpu.table import BF16, F32, KernelError
from tests.ops.sampling_rows import Rows
from tests.ops.sizes import RMS_NORM

# log_softmax is added up in float64, in another order than the CPU's, and rounded to float32 once: the next number.
LOGPROB_STEP = 2.0**-23


@pytest.fixture(scope="module")
def device() -> EmulatedDevice:
    return EmulatedDevice()


@pytest.mark.parametrize(("y_dtype", "name"), [(F32, "float32"), (BF16, "bfloat16")])
@pytest.mark.parametrize("size", RMS_NORM)
def test_norms_have_the_cpus_bits(device, size, y_dtype, name):
    x, delta, weight = normal(1, *size), normal(2, *size), normal(3, size[1])
    y, total = normed(device, x, delta, None, weight, y_dtype, in_place=False)
    cpu_y, cpu_total = norm.add_rms_norm(
        paddle.to_tensor(x), paddle.to_tensor(delta), paddle.to_tensor(weight), EPS, name
    )
    assert_same_bits(decode(y, y_dtype), cpu_y.astype("float32").numpy(), "y")
    assert_same_bits(total, cpu_total.numpy(), "the sum")


def test_rows_wider_than_shared_memory_are_refused(device):
    with pytest.raises(KernelError, match=r"PM_UNSUPPORTED: .* at most 40960 elements; hidden size is 40964"):
        normed(device, normal(1, 1, 40964), None, None, normal(2, 40964), F32, in_place=False)


@pytest.mark.parametrize(("count", "vocabulary"), [(30, 40), (30, 3000)])
def test_tokens_are_the_cpus(device, count, vocabulary):
    rows = Rows.random(count, vocabulary, seed=2 * vocabulary)
    tokens, logprobs, top_ids, top_logprobs = sampled(device, rows)
    cpu = [x.numpy() for x in sample(*map(paddle.to_tensor, rows.arrays()))]
    assert_same_bits(tokens, cpu[0], "tokens")
    assert_same_bits(top_ids, cpu[2], "top_ids")
    finite = np.isfinite(cpu[1])  # a forced token may be masked
    assert_same_bits(logprobs[~finite], cpu[1][~finite], "logprobs of masked tokens")
    assert_within(logprobs[finite], cpu[1][finite], LOGPROB_STEP * np.abs(cpu[1][finite]))
    assert_within(top_logprobs, cpu[3], LOGPROB_STEP * np.abs(cpu[3]))


def test_a_vocabulary_beyond_shared_memory(device):
    """Rows whose own copy is in the workspace: it does not fit the 163 KB of the GPU emulated."""
    rows = Rows.random(4, 40001, seed=9)
    tokens, _, top_ids, _ = sampled(device, rows)
    expected = reference.sample(*rows.arrays())
    assert_same_bits(tokens, expected[0], "tokens")
    assert_same_bits(top_ids, expected[2], "top_ids")


def test_more_tokens_than_a_sum_holds_are_refused(device):
    with pytest.raises(KernelError, match=r"PM_UNSUPPORTED: .* at most 1048576 tokens .* 1048577"):
        device.kernels.sample(*[None] * 12, 1, 2**20 + 1, None, None)
