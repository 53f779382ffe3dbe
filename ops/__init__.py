"""Operators of Mixtral: public functions by family (embedding, attention, moe, linear, norm, sampling, collective,
quantize).

Importing this package loads nothing but settles three things that must be settled before Paddle is imported; the first
family module imported loads the compiled operators (ops.library).
"""

import os
import warnings
from pathlib import Path

# Paddle says this at every import; it concerns people who compile operators over and over, not people who run them.
warnings.filterwarnings("ignore", message="No ccache found")

# Waiting threads spin briefly, then sleep. libgomp's own choice is to spin for milliseconds: beside other busy jobs on
# two cores, steps of the demo model then took up to 380 ms instead of 4. An idle machine pays 5 % of such a step for it
# (1.13 ms, not 1.07). libgomp reads this as it loads, with Paddle.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# The Paddle for CPUs drives a GPU through a plug-in, which it looks for once, in this folder, as it is imported. It is
# offered ours where there is a GPU, or another one (as tests do) by this variable; what the user chose stays.
RUNTIME_VARIABLE = "PADDLE_MIXTRAL_DEVICE_RUNTIME"
DEVICE_RUNTIME = Path(os.environ.get(RUNTIME_VARIABLE) or Path(__file__).resolve().parent / "plugins")
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # of NVIDIA's driver, on Linux and inside Windows


def _offer_runtime() -> None:
    if RUNTIME_VARIABLE not in os.environ and not any(map(os.path.exists, _GPU_FILES)):
        return
    # Paddle leaves an empty variable to its child processes; a Paddle for GPUs needs no plug-in.
    if os.environ.get("CUSTOM_DEVICE_ROOT") or not any(DEVICE_RUNTIME.glob("libpm_*.so")):
        return
    from importlib.metadata import distributions  # takes a while to import

    if next(iter(distributions(name="paddlepaddle-gpu")), None) is None:
        os.environ["CUSTOM_DEVICE_ROOT"] = str(DEVICE_RUNTIME)
        os.environ.setdefault("GLOG_minloglevel", "1")  # else Paddle tells in seven lines that it has loaded it


_offer_runtime()
