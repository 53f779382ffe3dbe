"""What `make bench-gpu` times: every operator at a model's sizes, the bytes it must read and the operations it does."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from ops import reference
from tests.gpu.case import normal
from tests.gpu.clock import EmulatedClock, GpuClock
from tests.gpu.floats import decode, encode
from tests.gpu.table import BF16, F32, I8
from tests.ops.sampling_rows import Rows

BLOCK_SIZE = 64
FORMATS = {"bf16": BF16, "int8": I8}
ELEMENT_BYTES = {BF16: 2, I8: 1}


@dataclass(frozen=True)
class Model:
    """Sizes of a model, and how much of it is asked for at once."""

    hidden: int = 4096
    intermediate: int = 14336
    experts: int = 8
    top_k: int = 2
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    layers: int = 32
    vocabulary: int = 32000
    few: tuple[int, ...] = (1, 8, 32)
    many: tuple[int, ...] = (512, 2048)
    contexts: tuple[int, ...] = (512, 4096, 32768)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """N and K of each."""
        heads = self.num_heads * self.head_dim
        qkv = heads + 2 * self.num_kv_heads * self.head_dim
        return {
            "qkv": (qkv, self.hidden),
            "o": (self.hidden, heads),
            "lm_head": (self.vocabulary, self.hidden),
        }


MIXTRAL_8X7B = Model()
# For a dry run on the emulation.
TINY = Model(64, 96, 4, 2, 4, 2, 32, 2, 160, few=(1, 8), many=(40,), contexts=(70,))


@dataclass(frozen=True)
class Timed:
    """One operator at one size. `read_bytes`: the least it can read; `operations`: multiplications and additions."""

    operator: str
    weights: str  # "bf16", "int8", or "" where there are none
    tokens: int
    context: int
    seconds: float
    read_bytes: float
    operations: float


Clock = GpuClock | EmulatedClock


def copies(clock: Clock, size: float) -> int:
    """So many inputs of `size` bytes are more than a cache holds."""
    return max(1, min(64, round(clock.rotated_bytes / size)))


def linears(clock: Clock, model: Model) -> Iterator[Timed]:
    """Every linear layer, in both weight formats."""
    for weights in FORMATS:
        for name, shape in model.linears.items():
            yield from _linear(clock, name, weights, shape, (*model.few, *model.many))


def _linear(clock: Clock, name: str, weights: str, shape: tuple[int, int], counts: tuple[int, ...]) -> Iterator[Timed]:
    device, w_dtype, (rows, columns) = clock.device, FORMATS[weights], shape
    size = -(-rows // 32) * 32 * -(-columns // 64) * 64 * ELEMENT_BYTES[w_dtype]
    packed = [clock.random_weights(size, w_dtype) for _ in range(copies(clock, size))]
    scale = device.array(np.full(rows, 1e-3, np.float32)) if w_dtype == I8 else None
    y_dtype = F32 if name == "lm_head" else BF16

    def call(stream, w, x, y, tokens, workspace):
        device.kernels.linear(
            *(x.pointer, BF16, w.pointer, w_dtype, scale and scale.pointer, 16, y.pointer, y_dtype),
            *(tokens, rows, columns, workspace.pointer, stream),
        )

    for tokens in counts:
        arguments = {
            "x": device.array(encode(normal(tokens, tokens, columns), BF16)),
            "y": device.empty((tokens, rows), np.float32),
            "tokens": tokens,
            "workspace": device.workspace(device.kernels.linear_workspace(w_dtype, tokens, rows, columns)),
        }
        seconds = clock.seconds([partial(call, w=w, **arguments) for w in packed])
        yield Timed(name, weights, tokens, 0, seconds, size, 2.0 * tokens * rows * columns)


def moe(clock: Clock, model: Model) -> Iterator[Timed]:
    """The expert layer, in both weight formats; it must read the experts that its tokens hit."""
    for weights in FORMATS:
        yield from _moe(clock, model, weights)


def _moe(clock: Clock, model: Model, weights: str) -> Iterator[Timed]:
    device, w_dtype = clock.device, FORMATS[weights]
    hidden, intermediate, experts = model.hidden, model.intermediate, model.experts
    gate = normal(1, experts, hidden)
    device_gate = device.array(gate)
    one = 3 * (-(-hidden // 64) * 64) * (-(-intermediate // 64) * 64) * ELEMENT_BYTES[w_dtype]
    w13, w2 = (clock.random_weights(experts * one * part // 3, w_dtype) for part in (2, 1))
    scales = [device.array(np.full((experts, n), 1e-3, np.float32)) for n in (2 * intermediate, hidden)]
    scale_pointers = [scale.pointer if w_dtype == I8 else None for scale in scales]

    def call(stream, x, y, tokens, workspace):
        device.kernels.fused_moe(
            *(x.pointer, BF16, device_gate.pointer, w13.pointer, w2.pointer, w_dtype, *scale_pointers, 16),
            *(y.pointer, tokens, hidden, intermediate, experts, model.top_k, workspace.pointer, stream),
        )

    for tokens in (*model.few, *model.many):
        stored = encode(normal(tokens, tokens, hidden), BF16)
        hit = np.count_nonzero(reference.route(decode(stored, BF16), gate, model.top_k).any(axis=0))
        needed = device.kernels.fused_moe_workspace(w_dtype, tokens, hidden, intermediate, experts, model.top_k)
        arguments = {
            "x": device.array(stored),
            "y": device.empty((tokens, hidden), np.float32),
            "tokens": tokens,
            "workspace": device.workspace(needed),
        }
        operations = 6.0 * tokens * model.top_k * hidden * intermediate
        seconds = clock.seconds([partial(call, **arguments)])
        yield Timed("fused_moe", weights, tokens, 0, seconds, float(hit * one), operations)


def attention(clock: Clock, model: Model) -> Iterator[Timed]:
    """Decodes (one new token a sequence after `context` tokens) and prompts (context 0)."""
    heads = model.num_heads, model.num_kv_heads, model.head_dim
    page_bytes = 2 * 2 * model.num_kv_heads * BLOCK_SIZE * model.head_dim
    for context in model.contexts:
        for sequences in model.few:
            yield _attention(clock, heads, page_bytes, sequences, 1, context)
    for tokens in model.many:
        yield _attention(clock, heads, page_bytes, 1, tokens, 0)


def _attention(clock: Clock, heads: tuple, page_bytes: int, sequences: int, new: int, context: int) -> Timed:
    device = clock.device
    num_heads, num_kv_heads, head_dim = heads
    tokens, pages = sequences * new, -(-(context + new) // BLOCK_SIZE)
    turns = copies(clock, sequences * pages * page_bytes)
    shape = turns * sequences * pages, num_kv_heads, BLOCK_SIZE, head_dim
    caches = [clock.random_weights(int(np.prod(shape)) * 2, BF16) for _ in range(2)]
    order = np.random.default_rng(0).permutation(shape[0]).astype(np.int32).reshape(turns, sequences, pages)
    tables = [device.array(table) for table in order]
    qkv = device.array(encode(normal(1, tokens, (num_heads + 2 * num_kv_heads) * head_dim), BF16))
    cu_seqlens = device.array(np.arange(0, tokens + 1, new, dtype=np.int32))
    context_lens = device.array(np.full(sequences, context, np.int32))
    out = device.empty((tokens, num_heads * head_dim), np.uint16)
    sizes = tokens, sequences, pages, *heads, BLOCK_SIZE
    workspace = device.workspace(device.kernels.append_attention_workspace(*sizes))

    def call(stream, table):
        device.kernels.append_attention(
            *(qkv.pointer, BF16, caches[0].pointer, caches[1].pointer, cu_seqlens.pointer, context_lens.pointer),
            *(table.pointer, out.pointer, *sizes, 1e6, 0, head_dim**-0.5, workspace.pointer, stream),
        )

    seen = sequences * (new * context + new * (new + 1) / 2)
    read = sequences * (context + new) * page_bytes / BLOCK_SIZE
    name = "decode" if new == 1 else "prefill"
    seconds = clock.seconds([partial(call, table=table) for table in tables])
    return Timed(name, "", tokens, context, seconds, read, 4 * seen * num_heads * head_dim)


def rows(clock: Clock, model: Model) -> Iterator[Timed]:
    """Norm, embedding and sampling."""
    device, hidden, vocabulary = clock.device, model.hidden, model.vocabulary
    weight = device.array(np.ones(hidden, np.float32))
    table = clock.random_weights(2 * vocabulary * hidden, BF16)
    for tokens in (*model.few, model.many[-1]):
        x, delta, total = (device.array(normal(i, tokens, hidden)) for i in range(3))
        y = device.empty((tokens, hidden), np.uint16)
        ids = device.array(np.random.default_rng(0).integers(0, vocabulary, tokens).astype(np.int32))

        def norm(stream, x=x, delta=delta, total=total, y=y, tokens=tokens):
            pointers = x.pointer, delta.pointer, None, weight.pointer, total.pointer, y.pointer
            device.kernels.rms_norm(*pointers, BF16, tokens, hidden, 1e-5, stream)

        def embed(stream, ids=ids, total=total, tokens=tokens):
            device.kernels.embedding(
                ids.pointer, table.pointer, BF16, total.pointer, tokens, vocabulary, hidden, stream
            )

        yield Timed("rms_norm", "", tokens, 0, clock.seconds([norm]), 8.0 * tokens * hidden, 0)
        yield Timed("embedding", "", tokens, 0, clock.seconds([embed]), 2.0 * tokens * hidden, 0)
    for name, parameters in (("greedy", {}), ("top-p", {"temperature": 0.8, "top_p": 0.9})):
        for count in model.few:
            drawn = Rows(normal(count, count, vocabulary), [parameters] * count)
            inputs = [device.array(a) for a in drawn.arrays()]
            outputs = [device.empty((count, 20), np.int32) for _ in range(4)]
            workspace = device.workspace(device.kernels.sample_workspace(count, vocabulary))

            def draw(stream, arrays=(*inputs, *outputs), count=count, workspace=workspace):
                device.kernels.sample(*(a.pointer for a in arrays), count, vocabulary, workspace.pointer, stream)

            yield Timed(f"sample {name}", "", count, 0, clock.seconds([draw]), 4.0 * count * vocabulary, 0)


def all_timed(clock: Clock, model: Model) -> Iterator[Timed]:
    """Every operator of the table at the model's sizes."""
    for family in (rows, attention, linears, moe):
        yield from family(clock, model)
