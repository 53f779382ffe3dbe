"""The kernels' running totals: who ran, for how long, and which experts."""

import time

import numpy as np
import paddle

from ops import reference
from ops.counters import Counters
from ops.moe import fused_moe
from ops.norm import rms_norm


def test_a_call_adds_to_its_own_kernel():
    x = paddle.ones([2000, 64])
    before, started = Counters.read(), time.perf_counter()
    rms_norm(x, paddle.ones([64]), 1e-5, "float32")
    seconds = time.perf_counter() - started
    added = Counters.read().since(before)
    assert list(added.kernel_s) == ["rms_norm"]
    assert 0 < added.kernel_s["rms_norm"] < seconds
    assert (added.moe_calls, added.experts_hit, added.busiest_tokens) == (0, 0, 0)


def test_all_kernels_have_a_clock():
    expected = {
        "embedding",
        "append_attention",
        "linear",
        "fused_moe",
        "rms_norm",
        "sample",
        "all_reduce",
        "all_gather",
    }
    assert expected <= Counters.read().kernel_s.keys()


def test_experts_are_those_the_router_chose():
    random = np.random.default_rng(0)
    w13, w2 = paddle.zeros([6, 8, 16]), paddle.zeros([6, 16, 4])
    for tokens in (1, 2, 5, 40):
        x, gate = (random.standard_normal(shape, np.float32) for shape in ([tokens, 16], [6, 16]))
        chosen = (reference.route(x, gate, 2) > 0).sum(axis=0)  # tokens of each expert
        before = Counters.read()
        fused_moe(paddle.to_tensor(x), paddle.to_tensor(gate), w13, w2, 2)
        added = Counters.read().since(before)
        assert added.moe_calls == 1
        assert added.experts_hit == np.count_nonzero(chosen)
        assert added.busiest_tokens == chosen.max()
