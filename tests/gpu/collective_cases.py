"""all_reduce and all_gather between processes: by memory that they map of one another, and by NCCL.

NCCL wants a GPU for each rank, so with one GPU it is a single rank's.
"""

from functools import partial

import numpy as np

from ops import reference
from tests.gpu.case import Case, assert_same_bits, normal
from tests.gpu.devices import Device
from tests.gpu.ranks import in_ranks
from tests.gpu.table import STATUSES

WORLDS, MOST_NCCL_RANKS = (2, 3), 3
# The last is more than all blocks' slots hold, 64 of 16384 floats, and 3 ranks add it up in shares.
SHAPES = [(1, 1), (3, 4096), (5, 777), (1, 1_048_581)]


def ranks_agree(world: int, device: Device, nccl: str | None = None) -> None:
    """Every rank gets the sum in rank order, to the bit, and all columns in rank order; then a call that differs is
    noticed. ``nccl``: the library, where the numbers go by it."""
    in_ranks(world, device, _agree, nccl)


def ranks_agree_by_nccl(device: Device) -> None:
    """As ranks_agree, a rank on each GPU, up to 3."""
    ranks_agree(min(device.count(), MOST_NCCL_RANKS), device, device.nccl())


def _agree(device: Device, rank: int, world: int) -> None:
    library, kernels = device.kernels.library, device.kernels
    for index, shape in enumerate(SHAPES):
        xs = [normal(10 * index + r, *shape) for r in range(world)]
        x, y = device.array(xs[rank]), device.empty((shape[0], world * shape[1]), np.float32)
        kernels.all_gather(x.pointer, y.pointer, *shape, device.stream)
        assert_same_bits(y.numpy(), reference.all_gather(xs), f"all_gather of {shape}")
        kernels.all_reduce(x.pointer, x.pointer, xs[0].size, device.stream)
        assert_same_bits(x.numpy(), reference.all_reduce(xs), f"all_reduce of {shape}")
    assert library.pm_cuda_group_status() == 0, kernels.text()
    x = device.array(np.ones(2, np.float32))
    kernels.all_reduce(x.pointer, x.pointer, 1 + rank % 2, device.stream)
    x.numpy()  # it has run
    found = STATUSES[library.pm_cuda_group_status()]
    assert found == ("PM_RANKS_DISAGREE" if world > 1 else "PM_OK"), f"{found}: the ranks called different sizes"


def cases() -> list[Case]:
    """By number of ranks: from 3 on, long messages are added up in shares; and by NCCL."""
    mapped = [Case("collective", f"{world} ranks", partial(ranks_agree, world)) for world in WORLDS]
    return [*mapped, Case("collective", "by NCCL", ranks_agree_by_nccl)]
