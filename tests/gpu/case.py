"""A case: one promise of one operator, kept or not by the kernels of a device."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.gpu.devices import Device


@dataclass(frozen=True)
class Case:
    """`check(device)` raises AssertionError where the operator of `family` breaks the promise `name`."""

    family: str
    name: str
    check: Callable[[Device], None]

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 numbers: others for another seed, and for another of the run's (`seed_run`)."""
    return np.random.default_rng([_run[0], seed]).standard_normal(shape, np.float32)


_run = [0]


def seed_run(seed: int) -> None:
    """Draws other inputs for every case from now on."""
    _run[0] = seed


def assert_within(y: np.ndarray, expected: np.ndarray, bound: np.ndarray | float) -> None:
    """Every |y - expected| is at most its bound, or both are the same infinity; says where the worst is."""
    with np.errstate(invalid="ignore"):
        excess = np.where(y == expected, 0, np.abs(y.astype(np.float64) - expected) - bound)
    if not np.all(excess <= 0):  # NaN is not
        at = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        allowed = np.broadcast_to(bound, excess.shape)[at]
        wrong = np.count_nonzero(~(excess <= 0))
        raise AssertionError(
            f"{wrong} of {excess.size} are off; at {tuple(map(int, at))}: {y[at]}, needed {expected[at]} +- {allowed}"
        )


def assert_same_bits(y: np.ndarray, expected: np.ndarray, what: str) -> None:
    """The same bytes."""
    same = y == expected if y.dtype.kind in "ui" else y.view(f"u{y.itemsize}") == expected.view(f"u{y.itemsize}")
    if not np.all(same):
        at = tuple(map(int, np.argwhere(~same)[0]))
        wrong = np.count_nonzero(~same)
        raise AssertionError(f"{what}: {wrong} of {same.size} differ, the first at {at}: {y[at]}, not {expected[at]}")
