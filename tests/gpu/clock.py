"""How long device work takes, on inputs that no cache still holds; and what the device does at best."""

import statistics
import time
from collections.abc import Callable

import numpy as np

from tests.gpu.devices import Array, EmulatedDevice, TorchDevice
from tests.gpu.floats import encode
from tests.gpu.table import BF16

Call = Callable[[int | None], None]  # enqueues one call of a kernel on a stream

# More than the last-level cache of any GPU so far (H200: 50 MB; B200: 126 MB): inputs are taken in turn from so much.
ROTATED_BYTES = 400e6
CALLS, REPLAYS = 20, 7
COPIED_BYTES, MATMUL_SIZE = 2**31, 8192


class GpuClock:
    """Times calls as a CUDA graph, so that neither Python nor launches are in the time."""

    rotated_bytes = ROTATED_BYTES

    def __init__(self, device: TorchDevice) -> None:
        self.device, self.torch = device, device.torch

    def random_weights(self, size: int, dtype: int) -> Array:
        """So many bytes of packed weights: any bytes for int8, small numbers for bfloat16."""
        made = self.device.empty((size,), np.uint8)
        if dtype == BF16:
            made.tensor.view(self.torch.bfloat16).normal_(std=0.02)
        else:
            made.tensor.random_(0, 256)
        return made

    def seconds(self, calls: list[Call]) -> float:
        """Of one call, all ``calls`` taken in turn: the median over replays."""
        for call in calls:
            call(self.device.stream)
        self.torch.cuda.synchronize()
        turns = -(-CALLS // len(calls))
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, capture_error_mode="thread_local"):
            stream = self.torch.cuda.current_stream().cuda_stream
            for call in calls * turns:
                call(stream)
        return self._median(graph.replay) / (turns * len(calls))

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by PyTorch's copy of 2 GiB."""
        source = self.torch.empty(COPIED_BYTES, dtype=self.torch.uint8, device="cuda")
        target = self.torch.empty_like(source)
        return 2 * COPIED_BYTES / self._median(lambda: target.copy_(source))

    def matmul_rate(self) -> float:
        """Operations per second of PyTorch's bfloat16 product of two square matrices."""
        n = MATMUL_SIZE
        a, b = (self.torch.randn(n, n, device="cuda", dtype=self.torch.bfloat16) for _ in range(2))
        return 2 * n**3 / self._median(lambda: self.torch.matmul(a, b))

    def _median(self, work: Callable[[], object]) -> float:
        times = []
        for _ in range(REPLAYS + 1):
            begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            self.torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times[1:])  # the first one warms up


class EmulatedClock:
    """The processor's time of one call: only that everything runs means something."""

    rotated_bytes = 0.0

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device

    def random_weights(self, size: int, dtype: int) -> Array:
        """As GpuClock's."""
        generator = np.random.default_rng(0)
        if dtype == BF16:
            return self.device.array(encode(generator.standard_normal(size // 2, np.float32) * np.float32(0.02), BF16))
        return self.device.array(generator.integers(0, 256, size, np.uint8))

    def seconds(self, calls: list[Call]) -> float:
        """Of one call."""
        began = time.perf_counter()
        for call in calls:
            call(None)
        return (time.perf_counter() - began) / len(calls)

    def copy_bandwidth(self) -> float:
        """Of 16 MB by NumPy."""
        source = np.ones(2**24, np.uint8)
        began = time.perf_counter()
        source.copy()
        return 2 * source.size / (time.perf_counter() - began)

    def matmul_rate(self) -> float:
        """Of a float32 product by NumPy."""
        a = np.ones((512, 512), np.float32)
        began = time.perf_counter()
        a @ a
        return 2 * 512**3 / (time.perf_counter() - began)
