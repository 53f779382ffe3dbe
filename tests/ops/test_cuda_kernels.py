"""The CUDA kernels on the emulation of CUDA: the cases of `make test-gpu`, each in one of the orders of threads."""

import pytest

from tests.gpu.cases import all_cases
from tests.gpu.devices import EmulatedDevice
from tests.ops.cuda_emulation import GPUS, MODES


@pytest.fixture(scope="module")
def device() -> EmulatedDevice:
    return EmulatedDevice()


@pytest.mark.parametrize(("index", "case"), list(enumerate(all_cases())), ids=str)
def test_every_case_holds(device, index, case):
    """Case by case forward, in reverse and shuffled, on one GPU or another, with as many multiprocessors or others."""
    gpu, multiprocessors = list(GPUS)[index % 2], 1 + index % 5
    device.emulation.configure(list(MODES.values())[index % 3], index, multiprocessors, gpu)
    case.check(device)
