"""The emulation that CUDA kernels are tested on: right kernels are right in every mode, wrong ones do not pass."""

import ctypes

import numpy as np
import pytest

from tests.ops.cuda_emulation import FORWARD, HERE, MODES, Emulation, build

RNG = np.random.default_rng(5)
LAUNCH_FAILED = 7


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    made = Emulation(build("kernels_of_its_tests", [HERE / "kernels_of_its_tests.cu"]))
    made.library.last_error.restype = ctypes.c_char_p
    return made


@pytest.fixture(params=MODES)
def kernels(request, emulation):
    emulation.configure(MODES[request.param], seed=3)
    return emulation.library


def at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def bf16(x: np.ndarray) -> np.ndarray:
    """The bits of x, rounded to nearest even."""
    u = x.astype(np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_reduction_through_shuffles_and_shared_memory(kernels):
    x = RNG.integers(-100, 100, 1000).astype(np.float32)  # sums of integers are exact in any order
    out = np.zeros(3, np.float32)
    assert kernels.sums(at(x), at(out), len(x), 3) == 0
    index = np.arange(1000) // 96 % 3
    np.testing.assert_array_equal(out, [x[index == b].sum() for b in range(3)])


def test_warp_instructions(kernels):
    x = RNG.integers(0, 1000, 32).astype(np.int32)
    out = np.zeros((9, 32), np.int32)
    assert kernels.warp(at(x), at(out)) == 0
    lane = np.arange(32)
    down = np.where(lane % 16 + 5 < 16, np.minimum(lane + 5, 31), lane)
    expected = [x[3 * lane % 32], x[np.where(lane < 3, lane, lane - 3)], x[down], x[lane ^ 9]]
    np.testing.assert_array_equal(out[:4], expected)
    ballot = sum(1 << i for i in range(32) if x[i] & 1)
    np.testing.assert_array_equal(out[4].view(np.uint32), np.full(32, ballot, np.uint32))
    np.testing.assert_array_equal(out[5:7], [np.ones(32), np.zeros(32)])
    np.testing.assert_array_equal(out[7], np.where(lane < 16, x[1], x[17] + 1))
    same = [sum(1 << j for j in range(32) if x[j] & 3 == x[i] & 3) for i in range(32)]
    np.testing.assert_array_equal(out[8].view(np.uint32), np.array(same, np.uint32))


def test_indices_and_barriers_that_count(kernels):
    out = np.zeros((12, 4), np.int32)
    assert kernels.block(at(out)) == 0
    np.testing.assert_array_equal(out, [[14, 1, 0, 40]] * 12)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_mma_of_16_bits_is_the_product(kernels, name):
    a, b = (RNG.standard_normal((rows, 48)).astype(np.float32) for rows in (16, 8))
    if name == "bf16":
        bits = [bf16(a), bf16(b)]
        values = [from_bf16(x).astype(np.float64) for x in bits]
    else:
        bits = [a.astype(np.float16), b.astype(np.float16)]
        values = [x.astype(np.float64) for x in bits]
    c = np.zeros((16, 8), np.float32)
    assert getattr(kernels, f"mma_{name}")(at(bits[0]), at(bits[1]), at(c), 48) == 0
    # Three roundings to float32 of sums below 32.
    np.testing.assert_allclose(c, values[0] @ values[1].T, rtol=0, atol=3 * 32 * 2.0**-24)


def test_mma_of_8_bits_is_exact(kernels):
    a = RNG.integers(0, 256, (16, 96)).astype(np.uint8)
    b = RNG.integers(-128, 128, (8, 96)).astype(np.int8)
    c = np.zeros((16, 8), np.int32)
    assert kernels.mma_u8s8(at(a), at(b), at(c), 96) == 0
    np.testing.assert_array_equal(c, a.astype(np.int32) @ b.astype(np.int32).T)


def test_conversions_of_float16_are_numpys(kernels):
    every = np.arange(2**16).astype(np.uint16).view(np.float16)
    with np.errstate(all="ignore"):
        near = np.nextafter(every.astype(np.float32), np.float32(np.inf))
        between = (every.astype(np.float32) + np.roll(every, 1).astype(np.float32)) / 2  # ties, most of them
    for x in (every.astype(np.float32), near, between, RNG.standard_normal(2**16).astype(np.float32)):
        half, wide = np.empty_like(every), np.empty_like(x)
        assert kernels.halves(at(x), at(half), at(every), at(wide), len(x)) == 0
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(half, x.astype(np.float16))
        np.testing.assert_array_equal(wide, every.astype(np.float32))


def pipelined(kernels, wrong: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = RNG.integers(-8, 8, (16, 160)), RNG.integers(-8, 8, (160, 16))  # exact in bfloat16, as are the sums
    bits = [bf16(a), bf16(b)]
    c = np.zeros((16, 16), np.float32)
    assert kernels.pipeline(wrong, at(bits[0]), at(bits[1]), at(c), 160) == 0
    return c, a @ b


def test_copies_and_matrix_loads_in_two_stages(kernels):
    c, expected = pipelined(kernels, 0)
    np.testing.assert_array_equal(c, expected)


@pytest.mark.parametrize("wrong", [1, 2, 3], ids=["waits for too little", "no barrier after", "no barrier before"])
def test_a_pipeline_that_does_not_wait_is_wrong_in_some_mode(emulation, wrong):
    right = []
    for mode in MODES.values():
        emulation.configure(mode, seed=3)
        c, expected = pipelined(emulation.library, wrong)
        right.append(np.array_equal(c, expected))
    assert not all(right)


@pytest.mark.parametrize("name", ["turn_round", "turn_round_warp"])
def test_a_missing_barrier_is_wrong_in_some_mode(emulation, name):
    n = {"turn_round": 128, "turn_round_warp": 32}[name]
    x = np.arange(n, dtype=np.float32)
    right = {False: [], True: []}
    for barrier, seen in right.items():
        for mode in MODES.values():
            emulation.configure(mode, seed=3)
            y = np.zeros_like(x)
            assert getattr(emulation.library, name)(int(barrier), at(x), at(y)) == 0
            seen.append(np.array_equal(y, x[::-1]))
    assert all(right[True])
    assert not any(right[False])


def test_shared_memory_nobody_wrote_is_not_a_number(kernels):
    y = np.zeros(128, np.float32)
    assert kernels.unwritten(at(y), 256) == 0
    np.testing.assert_array_equal(y[:32], 1)
    assert np.isnan(y[32:]).all()


FAULTS = {
    "a thread that has ended": (0, "waits at __syncthreads", "thread (5, 0, 0) has ended"),
    "two barriers": (1, "waits at __syncthreads", "at __syncthreads (kernels_of_its_tests.cu"),
    "a lane that does not come": (2, "waits at __shfl_sync", "thread (7, 0, 0)"),
    "two instructions in a warp": (3, "waits at __shfl", "at __shfl"),
    "a mask without the lane": (4, "without its own lane"),
    "past shared memory": (5, "outside of any memory"),
    "past global memory": (6, "outside of any memory"),
    "a copy not aligned": (7, "cp_async_16 to", "not 16-byte aligned"),
    "a copy to global memory": (8, "cp_async_16 to", "not in shared memory"),
    "a matrix not aligned": (9, "ldmatrix_x4", "not 16-byte aligned"),
    "a trap": (10, "__trap()"),
    "a thread that awaits nothing": (11, "thread (9, 0, 0)", "ended without await_previous()"),
    "an access not aligned": (12, "an alignment"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_an_error(kernels, fault):
    which, *words = FAULTS[fault]
    memory = kernels.pm_emulation_allocate(256)
    assert kernels.faulty(which, ctypes.c_void_p(memory)) == LAUNCH_FAILED
    message = kernels.last_error().decode()
    kernels.pm_emulation_free(memory, 256)
    assert all(word in message for word in words), message


def test_a_launch_of_no_threads_is_refused(kernels):
    assert kernels.no_threads() == LAUNCH_FAILED
    assert "invalid argument" in kernels.last_error().decode()


@pytest.mark.parametrize(("gpu", "most"), [("sm_80", 163 * 1024), ("sm_90a", 227 * 1024)])
def test_a_block_has_as_much_shared_memory_as_on_the_gpu(emulation, gpu, most):
    emulation.configure(FORWARD, gpu=gpu)
    y = np.zeros(128, np.float32)
    assert emulation.library.unwritten(at(y), most) == 0
    assert np.isnan(y[32:]).all()
    assert emulation.library.unwritten(at(y), most + 1) == LAUNCH_FAILED
    assert f"{most + 1} bytes of shared memory: invalid argument" in emulation.library.last_error().decode()


def test_launches_that_only_count_are_held_to_the_limits_and_do_not_run(emulation):
    emulation.configure(FORWARD)
    before = emulation.launches()
    with emulation.only_counting():
        assert emulation.library.unwritten(None, 256) == 0
        assert emulation.library.unwritten(None, 163 * 1024 + 1) == LAUNCH_FAILED
    assert emulation.launches() == before + 1


def test_the_launch_that_is_to_fail_fails_alone(emulation):
    emulation.configure(FORWARD)
    y = np.zeros(128, np.float32)
    emulation.fail(2)
    assert [emulation.library.unwritten(at(y), 256) for _ in range(3)] == [0, LAUNCH_FAILED, 0]


def test_atomics_and_the_order_of_blocks(emulation):
    orders = []
    for mode in MODES.values():
        emulation.configure(mode, seed=3)
        out = np.zeros(2 + 6 + 1, np.int32)
        assert emulation.library.atomics(at(out), 6) == 0
        np.testing.assert_array_equal(out[[0, 1, 8]], [6 * 64, 5, 6])
        orders.append(out[2:8].tolist())
    assert orders[:2] == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    assert sorted(orders[2]) == orders[0] != orders[2]
