"""A GPU's rate of multiplying matrices of bfloat16, as PyTorch or a Paddle for GPUs reaches it.

Neither is needed for anything else here, and a Paddle for CPUs has no such product: where both are missing the rate is
not measured. In a process of its own, because two frameworks in one may not get on: as a script, matmul.py DEVICE
answers every line it reads with a rate.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

SIZE = 8192
PRODUCTS = 4


class MatmulRate:
    """Measures on demand; ``missing`` says why it cannot, and is None where it can.

    Args:
        device: the number of the GPU, as this process counts them.
    """

    def __init__(self, device: int):
        command = [sys.executable, __file__, str(device)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        said = self._line()
        self.missing = None if said == "ready" else said or "the process that was to measure it has died"

    def rate(self) -> float:
        """Operations per second (a multiply-add is two) of products of square matrices.

        Raises:
            ValueError: the process has died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            return float(self._line())
        except (BrokenPipeError, ValueError) as error:
            raise ValueError("the process that measures the matrix rate has died; what it said is above") from error

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _torch(device: int) -> tuple[Callable[[], object], Callable[[], object]]:
    import torch

    torch.cuda.set_device(device)
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return lambda: torch.matmul(a, b), torch.cuda.synchronize


def _paddle(device: int) -> tuple[Callable[[], object], Callable[[], object]]:
    import paddle

    if not paddle.is_compiled_with_cuda():
        raise ValueError("what is installed is one for CPUs")
    paddle.device.set_device(f"gpu:{device}")
    a, b = (paddle.randn([SIZE, SIZE]).astype("bfloat16") for _ in range(2))
    return lambda: paddle.matmul(a, b), paddle.device.synchronize


def _serve(device: int) -> int:
    reasons = []
    for name, make in {"PyTorch": _torch, "Paddle for GPUs": _paddle}.items():
        try:
            multiply, synchronize = make(device)
            multiply()
            synchronize()
        except Exception as error:  # of whatever kind: that library cannot
            reasons.append(f"{name}: " + (str(error).strip().splitlines() or [type(error).__name__])[0])
            continue
        print("ready", flush=True)
        for _ in sys.stdin:
            started = perf_counter()
            for _ in range(PRODUCTS):
                multiply()
            synchronize()
            print(PRODUCTS * 2 * SIZE**3 / (perf_counter() - started), flush=True)
        return 0
    print("; ".join(reasons), flush=True)
    return 1


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # or what lies beside this file might be taken for a library
    sys.exit(_serve(int(sys.argv[1])))
