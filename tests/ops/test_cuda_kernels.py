"""The CUDA kernels on the emulation of CUDA: the cases of `make test-gpu`, each in one of the orders of threads."""

import pytest

from tests.gpu.cases import all_cases
from tests.gpu.devices import EmulatedDevice
from tests.ops.cuda_emulation import MODES


@pytest.fixture(scope="module")
def device() -> EmulatedDevice:
    return EmulatedDevice()


@pytest.mark.parametrize(("index", "case"), list(enumerate(all_cases())), ids=str)
def test_every_case_holds(device, index, case):
    """Case by case forward, in reverse and shuffled, and with another number of multiprocessors."""
    device.emulation.configure(list(MODES.values())[index % 3], seed=index, multiprocessors=1 + index % 5)
    case.check(device)
