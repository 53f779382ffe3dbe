"""The ranks of a job: how `python -m paddle.distributed.launch` starts them, and how they end together.

Nothing else knows Paddle's launcher. The ranks are processes of one machine and talk through ops.collective, by which
those on GPUs find each other (ops.gpu_group); paddle.distributed itself is not initialised.

How a job ends:
  - every rank that has done its work waits for the others (barrier) and exits with 0, and then the launcher does too;
  - a rank that fails prints its error and exits non-zero at once; the others learn it from their next collective
    (ValueError: another rank of this job died), or from the launcher's SIGTERM, and the launcher reports failure;
  - ranks whose launcher is killed are killed with it.
"""

import ctypes
import hashlib
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle

from ops.collective import all_gather, all_reduce, group, join_group, leave_group
from ops.library import set_num_threads
from predict.processors import processors

JOIN_TIMEOUT_VARIABLE = "PADDLE_MIXTRAL_GROUP_TIMEOUT"
JOIN_TIMEOUT_S = 120.0  # ranks import at different speed
STEP_TIMEOUT_S = 600.0  # a rank may compute for long; one that died is noticed within a second anyway
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ranks:
    """Which of the job's ranks this process is.

    Attributes:
        rank: 0 .. world_size - 1; rank 0 prints, serves and writes files.
        world_size: ranks of the job.
        local_threads: threads this rank's kernels use: its share of the processors (predict.processors).
    """

    rank: int
    world_size: int
    local_threads: int


def alone() -> Ranks:
    """This process as the only rank, with all processors it may use."""
    return Ranks(0, 1, processors())


def join(step_timeout_s: float = STEP_TIMEOUT_S) -> Ranks:
    """Joins the other ranks of this job, if the launcher started several; without a launcher, rank 0 of 1.

    Sets the kernels' number of threads to this rank's share of the processors. Waits for the others for 120 s, or as
    many as the environment variable PADDLE_MIXTRAL_GROUP_TIMEOUT says.

    Args:
        step_timeout_s: seconds a collective waits for a rank that lives but does not come (math.inf: for ever).

    Raises:
        ValueError: ranks on several machines, an environment the launcher does not make, or ranks that did not join.
    """
    world_size, rank = _number("PADDLE_TRAINERS_NUM", 1), _number("PADDLE_TRAINER_ID", 0)
    threads = max(1, processors() // world_size)
    if world_size > 1:
        _refuse_several_machines(world_size)
        _die_with_launcher()
        join_group(_job_name(), rank, world_size, _join_timeout(), step_timeout_s)
        set_num_threads(threads)
    return Ranks(rank, world_size, threads)


def barrier() -> None:
    """Returns when every rank has called it.

    Raises:
        ValueError: another rank died or did not come in time.
    """
    all_reduce(paddle.to_tensor([0.0], place=paddle.CPUPlace()), group()[1])


def least(number: int) -> int:
    """The least of the ranks' numbers (int64); every rank calls it with its own.

    Raises:
        ValueError: as :func:`barrier` does.
    """
    bits = np.array([[number]], np.int64).view(np.float32)  # a gather only copies
    return int(all_gather(paddle.to_tensor(bits, place=paddle.CPUPlace()), group()[1]).numpy().view(np.int64).min())


def run(main: Callable[[Ranks], int | None], step_timeout_s: float = STEP_TIMEOUT_S) -> int:
    """Joins the ranks and runs ``main``: what a command line passes to sys.exit.

    Alone, it is main(join()) and nothing more. With several ranks, a rank whose main raises or returns another code
    than 0 or None ends its process right here, whatever threads it has left, so that nobody waits for it.

    Returns:
        0 when main has succeeded on every rank; alone, what main returns.
    """
    if os.environ.get("PADDLE_TRAINERS_NUM", "1") == "1":
        return main(join()) or 0
    code = _outcome(main, step_timeout_s)
    leave_group()
    if code != 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return 0


def _outcome(main: Callable[[Ranks], int | None], step_timeout_s: float) -> int:
    """The exit code of this rank of several, 0 only after the others have succeeded too. Errors are printed."""
    try:
        ranks = join(step_timeout_s)
    except ValueError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    try:
        try:
            code = main(ranks) or 0
        except SystemExit as end:  # argparse
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == 0:
            barrier()
        return code if 0 <= code < 256 else 1
    except BaseException:
        print(f"rank {ranks.rank} of {ranks.world_size} failed:", file=sys.stderr)
        traceback.print_exc()
        return 1


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or (variable == "PADDLE_TRAINERS_NUM" and int(text) < 1):
        raise ValueError(
            f"{variable} is '{text}', needs the number that paddle.distributed.launch sets; unset it to run alone"
        )
    return int(text)


def _join_timeout() -> float:
    text = os.environ.get(JOIN_TIMEOUT_VARIABLE, str(JOIN_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ValueError(f"{JOIN_TIMEOUT_VARIABLE} is '{text}', needs a positive number of seconds")
    return seconds


def _refuse_several_machines(world_size: int) -> None:
    """Each launcher starts the ranks of one machine, so they must be all of the job's."""
    local = _number("PADDLE_LOCAL_SIZE", world_size)
    hosts = {endpoint.rpartition(":")[0] for endpoint in os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")}
    if local != world_size or len(hosts) > 1:
        raise ValueError(
            f"the job has {world_size} ranks, {local} of them from this machine's launcher (hosts "
            f"{', '.join(sorted(hosts))}), but the ranks of a job share one machine's memory: start all on one with "
            "--nproc_per_node and without --nnodes or --ips"
        )


def _die_with_launcher() -> None:
    """Has Linux kill this process when the launcher dies without having stopped it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _job_name() -> str:
    """The same on every rank of this job and on no other: the launcher draws POD_NAME and picks free ports."""
    parts = [os.environ.get(v, "") for v in ("PADDLE_MASTER", "PADDLE_TRAINER_ENDPOINTS", "PADDLE_JOB_ID", "POD_NAME")]
    return hashlib.sha256("|".join([*parts, str(os.getuid())]).encode()).hexdigest()[:32]
