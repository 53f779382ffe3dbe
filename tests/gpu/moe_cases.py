"""fused_moe: within the rounding of its types, and a token never depends on the others."""

import ctypes
from functools import partial

import numpy as np

from ops import reference
from tests.gpu.case import Case, assert_same_bits, assert_within, normal
from tests.gpu.devices import Device
from tests.gpu.floats import NAMES, ROUNDING, decode, encode
from tests.gpu.linear_cases import WEIGHTS, Weight
from tests.gpu.table import BF16, F16, I8
from tests.ops.sizes import FUSED_MOE

# Sizes of tiles beside the CPU's; (200, ...) gives an expert more tokens than one block of many has, (300, ...) needs
# blocks of 128 tokens, the last one not full.
GPU_SIZES = [(8, 128, 96, 8), (33, 64, 64, 8), (64, 96, 32, 4), (200, 64, 48, 2), (300, 96, 40, 1)]
# Elements of a token's h whose last bit differs, so that they may be rounded to the next of its row's 32,639 (127)
# steps.
NEXT_STEPS = 2


class Layer:
    """A random layer on a device; `exact` holds what its weights stand for: gate, w13, w2 and for int8 the scales."""

    def __init__(self, device: Device, size: tuple[int, int, int], kind: Weight, dtype: int, gate=None) -> None:
        self.device, self.kind, self.dtype = device, kind, dtype
        self.hidden, self.intermediate, self.experts = hidden, intermediate, experts = size
        gate = normal(7, experts, hidden) if gate is None else gate
        w13 = normal(8, experts, 2 * intermediate, hidden) / np.float32(hidden**0.5)
        w2 = normal(9, experts, hidden, intermediate) / np.float32(intermediate**0.5)
        self.gate = device.array(gate)
        self.scales = []
        if kind.bits:
            quantised = [[reference.quantize_int8(expert) for expert in w] for w in (w13, w2)]
            (w13, s13), (w2, s2) = [[np.stack(part) for part in zip(*w, strict=True)] for w in quantised]
            self.scales = [device.array(s13), device.array(s2)]
            pack, self.exact = reference.pack_int8, [gate, w13, w2, s13, s2]
        else:
            w13, w2 = encode(w13, dtype), encode(w2, dtype)
            pack, self.exact = reference.pack_bf16, [gate, decode(w13, dtype), decode(w2, dtype)]
        packed = [reference.pack_gate_up(w) for w in w13], [pack(w) for w in w2]
        self.packed = [np.stack(w) for w in packed]
        self.weights = [device.array(w) for w in self.packed]

    def __call__(self, x: np.ndarray, top_k: int) -> np.ndarray:
        """y [T, H] of x [T, H] as stored."""
        w_dtype = I8 if self.kind.bits else self.dtype
        sizes = len(x), self.hidden, self.intermediate, self.experts, top_k
        device_x, y = self.device.array(x), self.device.empty((len(x), self.hidden), np.float32)
        workspace = self.device.workspace(self.device.kernels.fused_moe_workspace(w_dtype, *sizes))
        scales = [scale.pointer for scale in self.scales] or [None, None]
        self.device.kernels.fused_moe(
            *(device_x.pointer, self.dtype, self.gate.pointer, *(w.pointer for w in self.weights), w_dtype, *scales),
            *(self.kind.bits or 0, y.pointer, *sizes, workspace.pointer, self.device.stream),
        )
        return y.numpy()

    def assert_is_the_reference(self, x: np.ndarray, y: np.ndarray, top_k: int) -> None:
        values = decode(x, self.dtype)
        share = reference.route(values, self.exact[0], top_k)
        if self.kind.bits:  # rounds x and h to fixed point: in float32, as the operator does
            expected = reference.fused_moe(values, *self.exact[:3], top_k, *self.exact[3:], self.kind.bits)
        else:
            values = values.astype(np.float64)
            expected = reference.fused_moe(values, *(w.astype(np.float64) for w in self.exact), top_k)
        # h is rounded; and the sums in float32, which are far closer.
        rounding = np.zeros(expected.shape)
        for e in range(self.experts):
            w13, w2 = (
                w[e] * (scale[e][:, None] if scale is not None else 1)
                for w, scale in zip(self.exact[1:3], self.exact[3:] or [None, None], strict=True)
            )
            gate, up = np.split(values @ w13.T, 2, axis=1)
            h = np.abs(gate / (1 + np.exp(-gate)) * up)
            if self.kind.bits:
                step = h.max(axis=1) / (32639 if self.kind.bits == 16 else 127)
                of_expert = NEXT_STEPS * np.outer(step, np.abs(w2).max(axis=1))
            else:
                of_expert = 1.25 * ROUNDING[self.dtype] * (h @ np.abs(w2).T)
            rounding += share[:, e : e + 1] * of_expert
        bound = rounding + 1e-5 * np.abs(expected).max()
        return assert_within(y, expected, bound)


def is_the_reference(device: Device, size: tuple, dtype: int, kind: Weight, top_k: int) -> None:
    """Also: a part of the tokens gives the same bits."""
    tokens, *layer_size = size
    layer = Layer(device, tuple(layer_size), kind, dtype)
    x = encode(normal(tokens, tokens, layer_size[0]), dtype)
    y = layer(x, top_k)
    layer.assert_is_the_reference(x, y, top_k)
    for part in (slice(0, 1), slice(3, 4), slice(1, 9), slice(0, 33)):
        if len(x[part]) and len(x[part]) < tokens:
            assert_same_bits(layer(x[part], top_k), y[part], f"tokens {part.start}..{part.stop - 1} alone")


def experts_are_counted(device: Device, tokens: int, kind: Weight) -> None:
    """The running totals grow by one call, the experts with a token, and the tokens of the busiest."""
    layer = Layer(device, (64, 32, 6), kind, BF16)
    x = encode(normal(tokens, tokens, 64), BF16)
    of_expert = np.count_nonzero(reference.route(decode(x, BF16), layer.exact[0], 2), axis=0)
    before = _counts(device)
    layer(x, 2)
    added = [after - b for after, b in zip(_counts(device), before, strict=True)]
    assert added == [1, np.count_nonzero(of_expert), of_expert.max()], added


def _counts(device: Device) -> list[int]:
    counts = [ctypes.c_int64() for _ in range(3)]
    device.kernels.expert_counts(*map(ctypes.byref, counts))
    return [c.value for c in counts]


def idle_experts_are_not_read(device: Device, tokens: int, kind: Weight) -> None:
    """Weights of experts without tokens may be anything."""
    gate = np.array([[1], [-1], [2], [-2]], np.float32) * np.ones([1, 64], np.float32)
    layer = Layer(device, (64, 32, 4), kind, BF16, gate)
    x = encode(np.abs(normal(2, tokens, 64)), BF16)
    y = layer(x, 2)
    for packed in layer.packed:
        packed[[1, 3]] = 0xFF if kind.bits else 0x7FFF
    layer.weights = [device.array(w) for w in layer.packed]
    assert_same_bits(layer(x, 2), y, "with other weights in experts 1 and 3")


def ties_go_to_the_lower_index(device: Device, tokens: int) -> None:
    """Equal probabilities: expert 0 and 2 of 0, 2, 3, 4."""
    gate = np.zeros([5, 32], np.float32)
    gate[1] = -1
    layer = Layer(device, (32, 16, 5), Weight(16), BF16, gate)
    x = encode(np.abs(normal(6, tokens, 32)) + np.float32(0.1), BF16)
    share = reference.route(decode(x, BF16), gate, 2)
    assert np.all(share == [0.5, 0, 0.5, 0, 0])
    layer.assert_is_the_reference(x, layer(x, 2), 2)


def cases() -> list[Case]:
    """Every case of fused_moe."""
    made = []
    for size in [*FUSED_MOE, *GPU_SIZES]:
        for kind in WEIGHTS:
            for dtype in (BF16, F16):
                check = partial(is_the_reference, size=size, dtype=dtype, kind=kind, top_k=min(2, size[3]))
                made.append(Case("fused_moe", f"{size} {NAMES[dtype]}, {kind}", check))
    check = partial(is_the_reference, size=(2100, 32, 16, 3), dtype=BF16, kind=Weight(16), top_k=2)
    made.append(Case("fused_moe", "more tokens than are multiplied at a time", check))
    for top_k in (1, 3, 4, 5):
        check = partial(is_the_reference, size=(20, 48, 32, 5), dtype=BF16, kind=Weight(16), top_k=top_k)
        made.append(Case("fused_moe", f"top {top_k} of 5", check))
    for tokens in (1, 3, 9, 40, 400):
        for kind in WEIGHTS[:2]:
            check = partial(experts_are_counted, tokens=tokens, kind=kind)
            made.append(Case("fused_moe", f"experts are counted, {tokens} tokens, {kind}", check))
    for tokens in (3, 40):
        for kind in WEIGHTS:
            check = partial(idle_experts_are_not_read, tokens=tokens, kind=kind)
            made.append(Case("fused_moe", f"idle experts are not read, {tokens} tokens, {kind}", check))
        check = partial(ties_go_to_the_lower_index, tokens=tokens)
        made.append(Case("fused_moe", f"ties go to the lower index, {tokens} tokens", check))
    return made
