"""Token embedding: rows of a table as the residual stream begins."""

import paddle

from ops.library import run


def embedding(ids: paddle.Tensor, table: paddle.Tensor) -> paddle.Tensor:
    """``table[ids]`` in float32.

    Args:
        ids: [T] int32, 0 to V - 1.
        table: [V, H] float32, bfloat16 or, on a GPU, float16.

    Returns:
        [T, H] float32.

    Raises:
        ValueError: a shape, dtype, device or id other than the above.
    """
    return run("pm_embedding", ids, table)[0]
