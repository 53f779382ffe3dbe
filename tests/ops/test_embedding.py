"""ops.embedding against the reference: rows are copied, so every bit is known."""

import numpy as np
import paddle
import pytest

from ops import reference
from ops.embedding import embedding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "vocab", "hidden"), [(1, 1, 1), (5, 3, 15), (33, 100, 16), (2, 7, 4096), (0, 4, 8)])
def test_rows_are_the_tables(dtype, tokens, vocab, hidden):
    random = np.random.default_rng(hidden)
    table = paddle.to_tensor(random.standard_normal((vocab, hidden), np.float32)).astype(dtype)
    ids = random.integers(0, vocab, tokens).astype(np.int32)
    found = embedding(paddle.to_tensor(ids), table)
    assert found.dtype == paddle.float32
    np.testing.assert_array_equal(found.numpy(), reference.embedding(ids, table.astype("float32").numpy()))


@pytest.mark.parametrize("token", [-1, 4])
def test_token_outside_the_table_is_refused_by_name(token):
    with pytest.raises(ValueError, match=rf"embedding: ids\[2\] is {token}, needs 0 to 3, the rows of table"):
        embedding(paddle.to_tensor([0, 3, token], "int32"), paddle.zeros([4, 8]))


def test_other_types_are_refused_by_name():
    ids = paddle.to_tensor([0], "int32")
    with pytest.raises(ValueError, match="table is float16, needs float32 or bfloat16"):
        embedding(ids, paddle.zeros([4, 8], "float16"))
    with pytest.raises(ValueError, match="ids is int64, needs int32"):
        embedding(ids.astype("int64"), paddle.zeros([4, 8]))
