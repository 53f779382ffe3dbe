"""python -m tests.gpu: builds the kernels for this machine's GPU and holds every case against it; a table at the end.

Needs Python, NumPy, PyTorch and nvcc; neither Paddle nor pytest. --emulate: on the emulation of CUDA, without a GPU.
"""

import argparse
import secrets
import sys
import time

from tests.gpu import cases
from tests.gpu.case import seed_run
from tests.gpu.devices import EmulatedDevice, gpu

MOST_FAILURES_SHOWN = 20


def main() -> int:
    """0 where every case holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--emulate", action="store_true", help="run on the emulation of CUDA instead of a GPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument(
        "--seed", type=int, default=secrets.randbits(31), help="of all inputs; default: another every time"
    )
    arguments = parser.parse_args()
    seed_run(arguments.seed)
    started = time.perf_counter()
    device = EmulatedDevice() if arguments.emulate else gpu()
    print(f"built for {device.name} in {time.perf_counter() - started:.0f} s; --seed {arguments.seed}", flush=True)

    totals: dict[str, list] = {}
    failures = []
    for case in cases.all_cases():
        if arguments.only not in str(case):
            continue
        began = time.perf_counter()
        total = totals.setdefault(case.family, [0, 0, 0.0])
        total[0] += 1
        try:
            case.check(device)
        except Exception as error:  # a kernel's failure of any kind is that case's alone, and is counted
            total[1] += 1
            failures.append(f"{case}: {type(error).__name__}: {error}")
        total[2] += time.perf_counter() - began
    for failure in failures[:MOST_FAILURES_SHOWN]:
        print(f"FAILED {failure}")
    if len(failures) > MOST_FAILURES_SHOWN:
        print(f"... and {len(failures) - MOST_FAILURES_SHOWN} more")
    print(f"{'operator':<18} {'cases':>5} {'failed':>6} {'seconds':>8}")
    for family, (count, failed, seconds) in totals.items():
        print(f"{family:<18} {count:>5} {failed:>6} {seconds:>8.1f}")
    return 1 if failures or not totals else 0


if __name__ == "__main__":
    sys.exit(main())
