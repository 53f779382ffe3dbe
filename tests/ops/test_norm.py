"""ops.norm against the float32 reference, over odd sizes."""

import numpy as np
import paddle
import pytest

from ops import reference
from ops.norm import add_rms_norm, rms_norm
from tests.ops.sizes import RMS_NORM

# float32 sums in another order: a few units in the last place of values of order one.
FLOAT32_TOLERANCE = 2e-6
# Half a unit in the last place of bfloat16 (8 bits), relative.
BFLOAT16_TOLERANCE = 2.0**-8


def random(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("tokens", "hidden"), RMS_NORM)
def test_rms_norm_is_the_reference(tokens, hidden):
    x, weight = random(tokens, hidden, seed=hidden), random(hidden, seed=1)
    y = rms_norm(paddle.to_tensor(x), paddle.to_tensor(weight), 1e-5, "float32")
    np.testing.assert_allclose(y.numpy(), reference.rms_norm(x, weight, 1e-5), rtol=FLOAT32_TOLERANCE, atol=1e-6)


@pytest.mark.parametrize(("tokens", "hidden"), RMS_NORM)
def test_add_rms_norm_is_the_reference(tokens, hidden):
    x, delta, weight = random(tokens, hidden, seed=2), random(tokens, hidden, seed=3), random(hidden, seed=4)
    y, total = add_rms_norm(paddle.to_tensor(x), paddle.to_tensor(delta), paddle.to_tensor(weight), 1e-5, "bfloat16")
    expected, expected_total = reference.add_rms_norm(x, delta, weight, 1e-5)
    np.testing.assert_array_equal(total.numpy(), expected_total)
    np.testing.assert_allclose(y.astype("float32").numpy(), expected, rtol=BFLOAT16_TOLERANCE, atol=1e-6)


def test_rows_are_those_of_the_whole_bit_for_bit():
    x, delta, weight = (paddle.to_tensor(random(*shape, seed=5)) for shape in ([9, 130], [9, 130], [130]))
    rows = [8, 0, 3, 3]
    whole = add_rms_norm(x, delta, weight, 1e-5, "float32")
    some = add_rms_norm(x, delta, weight, 1e-5, "float32", rows=paddle.to_tensor(rows, "int32"))
    for of_all, of_some in zip(whole, some, strict=True):
        np.testing.assert_array_equal(of_some.numpy(), of_all.numpy()[rows])


@pytest.mark.parametrize("row", [-1, 2])
def test_row_outside_is_refused_by_name(row):
    x, weight = paddle.zeros([2, 16]), paddle.ones([16])
    with pytest.raises(ValueError, match=rf"rows\[1\] is {row}, needs 0 to 1, the rows of residual"):
        add_rms_norm(x, x, weight, 1e-5, "float32", rows=paddle.to_tensor([0, row], "int32"))


def test_wrong_weight_is_refused_by_name():
    with pytest.raises(ValueError, match=r"weight has shape \[17\], needs \[16\]"):
        rms_norm(paddle.zeros([2, 16]), paddle.ones([17]), 1e-5, "float32")


def test_unknown_dtype_is_refused_by_name():
    with pytest.raises(ValueError, match="out_dtype is 'float16', needs float32 or bfloat16"):
        rms_norm(paddle.zeros([2, 16]), paddle.ones([16]), 1e-5, "float16")
