"""What a call launches on a GPU: at most ten kernels for a layer that decodes, and none whose failure nobody hears of.

Counted on the emulation at the models' own sizes: launches are held to the limits of the GPU, but do not run.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from predict.model.config import MixtralConfig
from tests.gpu.devices import EmulatedDevice
from tests.gpu.linear_cases import WEIGHTS, Weight
from tests.gpu.ranks import HANDLE_BYTES
from tests.gpu.table import BF16, F16, I8, KernelError
from tests.ops.cuda_emulation import FORWARD, GPUS, ROOT

MOST_LAUNCHES = 10  # of a layer
DECODED = range(1, 33)  # tokens at a time
RANKS = 1, 2, 4, 8
MODELS = {path.stem: MixtralConfig.read(path) for path in (ROOT / "configs").glob("mixtral-*.json")}
PROCESSORS = {"sm_80": 108, "sm_90a": 132}
CONTEXT, BLOCK_SIZE = 4096, 64

ANY = 256  # a pointer that is not followed


@pytest.fixture(scope="module")
def counting() -> Iterator[EmulatedDevice]:
    device = EmulatedDevice()
    with device.emulation.only_counting():
        yield device


@pytest.fixture(params=GPUS)
def device(request, counting) -> EmulatedDevice:
    counting.emulation.configure(FORWARD, multiprocessors=PROCESSORS[request.param], gpu=request.param)
    return counting


@pytest.fixture(scope="module")
def group_of_one(counting) -> Iterator[None]:
    """A rank alone launches what one of several does."""
    library, handle = counting.kernels.library, ctypes.create_string_buffer(HANDLE_BYTES)
    assert library.pm_cuda_group_create(0, 1, ctypes.c_double(1), handle) == 0, counting.kernels.text()
    assert library.pm_cuda_group_open(handle) == 0, counting.kernels.text()
    yield
    library.pm_cuda_group_leave()


def launches(device, call: Callable[[EmulatedDevice], None]) -> int:
    before = device.emulation.launches()
    call(device)
    return device.emulation.launches() - before


def linear(device, dtype: int, kind: Weight, tokens: int, rows: int, columns: int) -> None:
    w_dtype = I8 if kind.bits else dtype
    device.kernels.linear(
        ANY, dtype, ANY, w_dtype, ANY, kind.bits or 0, ANY, dtype, tokens, rows, columns, ANY, device.stream
    )


def fused_moe(device, dtype: int, kind: Weight, *sizes: int) -> None:
    """sizes: T, H, I, E, top_k."""
    w_dtype = I8 if kind.bits else dtype
    device.kernels.fused_moe(
        *(ANY, dtype, ANY, ANY, ANY, w_dtype, ANY, ANY, kind.bits or 0, ANY, *sizes, ANY, device.stream)
    )


def attention(device, dtype: int, tokens: int, *heads: int) -> None:
    """A decode of as many sequences. heads: Hq, Hkv, D."""
    pages = CONTEXT // BLOCK_SIZE
    sizes = tokens, tokens, pages, *heads, BLOCK_SIZE
    device.kernels.append_attention(
        *(ANY, dtype, ANY, ANY, ANY, ANY, ANY, ANY, *sizes, 1e6, 0, heads[-1] ** -0.5, ANY, device.stream)
    )


def rms_norm(device, dtype: int, tokens: int, hidden: int) -> None:
    device.kernels.rms_norm(ANY, ANY, None, ANY, ANY, ANY, dtype, tokens, hidden, 1e-5, device.stream)


def of_a_layer(device, config: MixtralConfig, ranks: int, dtype: int, kind: Weight, tokens: int) -> dict[str, int]:
    """Of one of `ranks` ranks, by operator."""
    heads, kv_heads = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
    hidden, width = config.hidden_size, config.head_dim
    intermediate, top_k = config.intermediate_size // ranks, config.num_experts_per_tok
    experts = hidden, intermediate, config.num_local_experts, top_k
    calls = {
        "norm before attention": partial(rms_norm, dtype=dtype, tokens=tokens, hidden=hidden),
        "qkv": lambda device: linear(device, dtype, kind, tokens, (heads + 2 * kv_heads) * width, hidden),
        "attention": lambda device: attention(device, dtype, tokens, heads, kv_heads, width),
        "o": lambda device: linear(device, dtype, kind, tokens, hidden, heads * width),
        "norm before experts": partial(rms_norm, dtype=dtype, tokens=tokens, hidden=hidden),
        "experts": lambda device: fused_moe(device, dtype, kind, tokens, *experts),
    }
    return {name: launches(device, call) for name, call in calls.items()}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("model", MODELS)
def test_a_layer_that_decodes_is_at_most_ten_launches(device, model, dtype, kind, ranks):
    """One less with 16-bit weights, which take h as it is: no launch rounds it."""
    most = MOST_LAUNCHES if kind.bits else MOST_LAUNCHES - 1
    counted = {t: of_a_layer(device, MODELS[model], ranks, dtype, kind, t) for t in DECODED}
    assert {t: parts for t, parts in counted.items() if sum(parts.values()) > most} == {}


def test_a_sum_over_ranks_is_one_launch(device, group_of_one):
    """A layer of several ranks has two, beside its ten."""
    for config in MODELS.values():
        for tokens in DECODED:
            n = tokens * config.hidden_size
            assert launches(device, lambda device, n=n: device.kernels.all_reduce(ANY, ANY, n, None)) == 1


@pytest.mark.parametrize("kind", WEIGHTS, ids=str)
def test_experts_of_many_tokens_are_few_launches(device, kind):
    assert launches(device, lambda device: fused_moe(device, BF16, kind, 33, 64, 32, 8, 2)) == (6 if kind.bits else 5)


INT8, PLAIN = Weight(16), Weight(None)
CALLS: dict[str, Callable[[EmulatedDevice], None]] = {
    "rms_norm": lambda device: rms_norm(device, BF16, 3, 64),
    "embedding": lambda device: device.kernels.embedding(ANY, ANY, BF16, ANY, 3, 100, 64, device.stream),
    "linear, tokens rounded by its blocks": lambda device: linear(device, BF16, INT8, 20, 64, 64),
    "linear, tokens rounded before": lambda device: linear(device, BF16, INT8, 20, 64, 65536),
    "linear, many tokens": lambda device: linear(device, BF16, INT8, 400, 64, 64),
    "fused_moe, few tokens": lambda device: fused_moe(device, BF16, INT8, 20, 64, 32, 8, 2),
    "fused_moe, tokens in two turns": lambda device: fused_moe(device, BF16, INT8, 3000, 64, 32, 8, 2),
    "append_attention": lambda device: attention(device, BF16, 3, 8, 2, 128),
    "sample": lambda device: device.kernels.sample(*[ANY] * 12, 3, 1000, ANY, device.stream),
    "all_reduce": lambda device: device.kernels.all_reduce(ANY, ANY, 1000, device.stream),
    "all_gather": lambda device: device.kernels.all_gather(ANY, ANY, 10, 100, device.stream),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_launch_that_fails_is_the_calls_status_and_its_last(device, group_of_one, name):
    call = CALLS[name]
    number = launches(device, call)
    assert number > 0
    for which in range(1, number + 1):
        before = device.emulation.launches()
        device.emulation.fail(which)
        with pytest.raises(KernelError, match=f"{name.split(',')[0]}: PM_LAUNCH_FAILED: launch: it was to fail"):
            call(device)
        assert device.emulation.launches() - before == which


@pytest.mark.parametrize("name", CALLS)
def test_a_call_neither_waits_for_the_device_nor_allocates(device, group_of_one, name):
    before = device.emulation.waits()
    CALLS[name](device)
    assert device.emulation.waits() == before


@pytest.mark.parametrize(
    ("model", "w_dtype", "megabytes"),
    [("mixtral-8x7b", I8, 369), ("mixtral-8x7b", BF16, 185), ("mixtral-8x22b", I8, 428), ("mixtral-8x22b", BF16, 235)],
)
def test_experts_workspace_is_bounded_as_stated(counting, model, w_dtype, megabytes):
    """In cuda/moe.cu."""
    config = MODELS[model]
    sizes = config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok
    needed = {t: counting.kernels.fused_moe_workspace(w_dtype, t, *sizes) for t in (*range(1, 6200, 7), 2048)}
    assert max(needed.values()) == needed[2048]
    assert round(needed[2048] / 1e6) == megabytes


def test_a_wrong_word_for_overlap_is_refused():
    """Read at a process's first launch."""
    code = (
        "from tests.gpu.devices import EmulatedDevice; from tests.ops.test_cuda_launches import CALLS;"
        "CALLS['rms_norm'](EmulatedDevice())"
    )
    environment = {**os.environ, "PADDLE_MIXTRAL_CUDA_OVERLAP": "yes"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PADDLE_MIXTRAL_CUDA_OVERLAP is 'yes', needs 0 or 1" in done.stderr
