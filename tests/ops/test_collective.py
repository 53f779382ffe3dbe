"""ops.collective between real processes: sums in rank order to the bit, and no hang however a rank ends."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import paddle
import pytest

from ops import reference
from ops.collective import all_gather, all_reduce, broadcast, check_group, group, join_group, leave_group

# A server that has imported the operators forks each rank: real processes without seconds of importing for every one.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["ops.collective", "ops.reference", "pytest"])
JOIN_TIMEOUT = 60


def rank_main(function, name, rank, world, results, arguments):
    try:
        results.put((rank, function(name, rank, world, *arguments)))
    except Exception as error:
        results.put((rank, str(error)))


def run_ranks(function, world, *arguments, silent=()):
    """What ``function(name, rank, world, *arguments)`` returned, or its error's text, on every rank not ``silent``."""
    results, name = RANKS.Queue(), f"test-{uuid.uuid4().hex}"
    processes = [
        RANKS.Process(target=rank_main, args=(function, name, rank, world, results, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in range(world - len(silent)))
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    assert not segments(name)
    return [found[rank] for rank in sorted(found)]


def segments(name):
    return [entry for entry in os.listdir("/dev/shm") if name in entry]


def inputs(call, world):
    """Which operator call number ``call`` is, and every rank's x: any rank can compute what the others hold."""
    random = np.random.default_rng([call, world])
    size = int(10 ** random.uniform(0, 6 if call % 97 == 0 else 3.3))
    gather = bool(random.integers(2))
    shape = [int(rows := random.integers(1, 20)), max(1, size // int(rows))] if gather else [size]
    # Values of very different magnitude, so that another order of adding gives other bits.
    return gather, [
        (random.standard_normal(shape) * 10.0 ** random.integers(-4, 5, shape)).astype(np.float32) for _ in range(world)
    ]


def mixed_calls(name, rank, world, calls):
    join_group(name, rank, world, JOIN_TIMEOUT)
    assert group() == (rank, world)
    digest, wrong = hashlib.sha256(), []
    for call in range(calls):
        gather, xs = inputs(call, world)
        y = (all_gather if gather else all_reduce)(paddle.to_tensor(xs[rank]), world).numpy()
        if not np.array_equal(y, (reference.all_gather if gather else reference.all_reduce)(xs)):
            wrong.append((call, y.shape))
        digest.update(y.tobytes())
    leave_group()
    return wrong, digest.hexdigest()


@pytest.mark.parametrize(("world", "calls"), [(2, 2000), (3, 200), (4, 200)])
def test_mixed_calls_are_the_reference_to_the_bit_on_every_rank(world, calls):
    found = run_ranks(mixed_calls, world, calls)
    assert [wrong for wrong, _ in found] == [[]] * world
    assert len({digest for _, digest in found}) == 1


def large_reduce(name, rank, world, n):
    join_group(name, rank, world, JOIN_TIMEOUT)
    xs = [np.random.default_rng([n, r]).standard_normal(n).astype(np.float32) for r in range(world)]
    x = paddle.to_tensor(xs[rank].reshape(1, n))
    y = all_reduce(x, world)
    return np.array_equal(y.numpy()[0], reference.all_reduce(xs)) and np.array_equal(x.numpy()[0], xs[rank])


@pytest.mark.parametrize(
    ("world", "n"),
    [(world, n) for world in (2, 4) for n in (1, 8192, 65535, 65536, 65537, 1_000_000)] + [(16, 100_001)],
)
def test_sums_of_any_size_are_added_in_rank_order_and_leave_x_alone(world, n):
    assert run_ranks(large_reduce, world, n) == [True] * world


def broadcasts(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT)
    right = []
    # Around the 2^18 bytes of a slot, in turns with other calls, and types that are no float32.
    for size in (0, 1, 3, 2**18 - 1, 2**18, 2**18 + 1, 10**6, 8, 8, 2**19):
        expected = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        array = expected.copy() if rank == 0 else np.zeros(size, np.uint8)
        broadcast(array)
        right.append(np.array_equal(array, expected) and all_reduce(paddle.ones([3]), world).tolist() == [world] * 3)
    array = np.full([2, 3], 2.0**60 + rank)
    broadcast(array)
    return all(right) and (array == 2.0**60).all()


@pytest.mark.parametrize("world", [2, 3])
def test_a_broadcast_carries_the_bytes_of_rank_0(world):
    assert run_ranks(broadcasts, world) == [True] * world


def waits_long(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT, step_timeout_s=np.inf)
    if rank == 0:
        time.sleep(3)
        broadcast(np.zeros(8))
        return 0.0
    before = time.process_time()
    broadcast(np.ones(8))
    return time.process_time() - before


def test_a_rank_that_waits_leaves_the_processor_alone():
    # It polls: often in the first second, when the next step may come, a thousand times a second afterwards.
    assert run_ranks(waits_long, 2)[1] < 0.6


def repeat(call, seconds=10.0):
    """Calls again and again until the call raises, or that time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        call()


def check_after_a_death(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT)
    check_group()
    all_reduce(paddle.ones([1]), world)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(ValueError, match="another rank of this job died"):
        repeat(check_group)
    with pytest.raises(ValueError, match="broadcast: another rank of this job died"):
        broadcast(np.zeros(3))
    return time.monotonic() - start


def test_a_death_can_be_noticed_without_a_call_to_the_others():
    assert run_ranks(check_after_a_death, 2, silent=[1])[0] < 3


def test_without_a_group_there_is_nobody_to_lose_or_tell():
    check_group()
    with pytest.raises(ValueError, match="broadcast: status 3: this process has joined no group"):
        broadcast(np.zeros(3))
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    for array in (np.zeros([4, 4])[:, 0], frozen):
        with pytest.raises(ValueError, match="broadcast: the array is not a contiguous one that can be written to"):
            broadcast(array)


def rejoin(name, rank, world):
    sums = []
    for turn in range(20):
        join_group(name, rank, world, JOIN_TIMEOUT)
        sums.append(all_reduce(paddle.full([1], float(turn + rank)), world).item())
        leave_group()
    return sums


def test_a_group_can_be_left_and_joined_again_under_the_same_name():
    assert run_ranks(rejoin, 2) == [[2.0 * turn + 1 for turn in range(20)]] * 2


def last_rank_dies(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT)
    x = paddle.ones([5000])
    for _ in range(50):
        all_reduce(x, world)
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"all_reduce: another rank of this job died or did not answer in time"):
        all_reduce(x, world)
    with pytest.raises(ValueError, match="another rank of this job died"):  # and the group stays unusable
        all_reduce(x, world)
    return time.monotonic() - start


@pytest.mark.parametrize("world", [2, 3])
def test_a_killed_rank_is_an_error_on_the_others_at_once(world):
    assert all(seconds < 3 for seconds in run_ranks(last_rank_dies, world, silent=[world - 1]))


def rank_1_leaves(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT)
    if rank == 1:
        leave_group()
        time.sleep(1)  # alive, as a process that winds down is
        return "left"
    return all_reduce(paddle.ones([1]), world).item()


def test_a_rank_that_left_is_an_error_on_the_others():
    message, left = run_ranks(rank_1_leaves, 2)
    assert "another rank of this job died" in message
    assert left == "left"


def rank_1_is_late(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT, step_timeout_s=0.3)
    if rank == 1:
        time.sleep(1)
        all_reduce(paddle.ones([1]), world)  # rank 0's part of this one had been there all the time
    return all_reduce(paddle.ones([1]), world).item()


def test_a_rank_that_does_not_arrive_in_time_is_an_error_on_both():
    assert all("did not answer in time" in message for message in run_ranks(rank_1_is_late, 2))


def ranks_disagree(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT)
    return all_reduce(paddle.ones([1 + rank]), world).sum().item()


def test_ranks_that_call_different_things_are_refused():
    messages = run_ranks(ranks_disagree, 3)
    assert all("called different operators or sizes" in message for message in messages)


def test_ranks_that_never_join_are_an_error_and_leave_nothing_behind():
    for rank in (0, 1):
        name = f"test-{uuid.uuid4().hex}"
        with pytest.raises(ValueError, match=rf"rank {rank} of 2 waited up to 0.3 s for the other ranks"):
            join_group(name, rank, 2, 0.3)
        assert not segments(name)
    assert group() == (0, 1)


def test_the_segment_of_a_killed_job_does_not_confuse_the_next():
    name = f"test-{uuid.uuid4().hex}"
    killed = RANKS.Process(target=join_group, args=(name, 0, 2, JOIN_TIMEOUT))
    killed.start()
    while not segments(name):
        time.sleep(0.01)
    time.sleep(0.1)
    killed.kill()
    killed.join()
    assert segments(name)
    results = RANKS.Queue()
    ranks = [RANKS.Process(target=rank_main, args=(rejoin, name, rank, 2, results, ())) for rank in (1, 0)]
    ranks[0].start()
    time.sleep(0.5)  # rank 1 meets the dead job's segment before rank 0 has made the new one
    ranks[1].start()
    sums = [2.0 * turn + 1 for turn in range(20)]
    assert sorted(results.get(timeout=60) for _ in ranks) == [(0, sums), (1, sums)]
    for process in ranks:
        process.join()
    assert not segments(name)


def test_a_joined_rank_that_dies_before_the_others_join_ends_the_wait():
    name = f"test-{uuid.uuid4().hex}"
    killed = RANKS.Process(target=join_group, args=(name, 1, 3, JOIN_TIMEOUT))
    killed.start()
    results = RANKS.Queue()
    rank_0 = RANKS.Process(target=rank_main, args=(rejoin, name, 0, 3, results, ()))
    rank_0.start()
    while not segments(name):
        time.sleep(0.01)
    time.sleep(0.5)
    killed.kill()
    killed.join()
    start = time.monotonic()
    _, message = results.get(timeout=60)
    assert time.monotonic() - start < 3
    assert "they did not all join" in message
    rank_0.join()
    assert not segments(name)


PROGRAM = """
import sys
import numpy as np, paddle
from ops.collective import all_gather, all_reduce, join_group
folder, name, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Layer(paddle.nn.Layer):
    def forward(self, x):
        return all_gather(all_reduce(x * 2.0, 2) + 1.0, 2)

prefix = f"{folder}/rank{rank}"
spec = paddle.static.InputSpec([None, 3], "float32", name="x")
paddle.jit.save(paddle.jit.to_static(Layer(), input_spec=[spec], full_graph=True), prefix)
config = paddle.inference.Config(prefix + ".json", prefix + ".pdiparams")
config.disable_onednn()
config.disable_glog_info()
predictor = paddle.inference.create_predictor(config)
join_group(name, rank, 2, 60)
for rows in (1, 5):
    x = paddle.to_tensor(np.arange(rows * 3, dtype=np.float32).reshape(rows, 3) + rank)
    (y,) = predictor.run([x])
    half = 4 * np.arange(rows * 3, dtype=np.float32).reshape(rows, 3) + 3
    np.testing.assert_array_equal(y.numpy(), np.concatenate([half, half], axis=1))
    np.testing.assert_array_equal(Layer()(x).numpy(), y.numpy())
"""


def test_saved_programs_still_sum_and_gather(tmp_path):
    name, root = f"test-{uuid.uuid4().hex}", str(Path(__file__).resolve().parents[2])
    script = tmp_path / "program.py"  # tracing reads the source, so it must be a file
    script.write_text(PROGRAM)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), name, str(rank)],
            env={**os.environ, "PYTHONPATH": root},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr


def test_one_rank_returns_x_itself():
    x = paddle.ones([2, 3])
    assert all_reduce(x, 1) is x
    assert all_gather(x, 1) is x


def test_another_world_than_the_joined_is_refused():
    sentence = r"world_size is 2, but this process's group has 1 rank; start the job with .* --nproc_per_node 2"
    with pytest.raises(ValueError, match="all_reduce: " + sentence):
        all_reduce(paddle.ones([3]), 2)
    with pytest.raises(ValueError, match="all_gather: " + sentence):
        all_gather(paddle.ones([3, 1]), 2)


def no_tokens(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT)
    empty = paddle.zeros([0, 3])
    return all_reduce(empty, world).shape, all_gather(empty, world).shape


def test_no_tokens_are_no_error():
    assert run_ranks(no_tokens, 2) == [([0, 3], [0, 6])] * 2


def wrong_tensors(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT)
    with pytest.raises(ValueError, match="all_reduce: x is int64, needs float32"):
        all_reduce(paddle.ones([3], dtype="int64"), world)
    with pytest.raises(ValueError, match=r"all_gather: x has shape \[3\], needs \[-1, -1\]"):
        all_gather(paddle.ones([3]), world)
    with pytest.raises(ValueError, match="cannot join its group: Device or resource busy"):
        join_group(name, rank, world, JOIN_TIMEOUT)
    return all_reduce(paddle.ones([1]), world).item()


def test_wrong_tensors_are_refused_by_name_and_the_group_lives_on():
    assert run_ranks(wrong_tensors, 2) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("a/b", 0, 2, 1.0), "group name is 'a/b'"),
        (("a", 0, 17, 1.0), "world_size is 17, needs 1 to 16"),
        (("a", 2, 2, 1.0), "rank is 2, needs 0 to 1"),
        (("a", 0, 2, 0.0), "time-outs are 0.0 s and 600.0 s"),
    ],
)
def test_join_refuses_by_name(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        join_group(*arguments)
