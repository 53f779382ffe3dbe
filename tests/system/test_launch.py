"""Jobs under python -m paddle.distributed.launch: they end together, with the code they earned, and leave nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from predict.processors import processors

ROOT = str(Path(__file__).resolve().parents[2])
# The launcher looks at its ranks once a second and gives them three more to end.
PROMPT_S = 10

SCRIPT = """
import os, signal, sys, threading, time
import paddle
from predict import parallel

def main(ranks):
    total = parallel.all_reduce(paddle.full([3], 1.0 + ranks.rank), ranks.world_size)
    print(f"rank {ranks.rank} of {ranks.world_size}, {ranks.local_threads} threads, sum {total[0].item()}", flush=True)
    BODY

sys.exit(parallel.run(main))
"""


class Job:
    """A launcher with ``ranks`` ranks of SCRIPT, whose main goes on with ``body``."""

    def __init__(self, folder, body, ranks=2, options=(), environment=()):
        self.folder = folder
        (folder / "script.py").write_text(SCRIPT.replace("BODY", body))
        command = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(ranks), "--log_dir", str(folder / "log")]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PADDLE_", "POD_"))}
        self.launcher = subprocess.Popen(
            [sys.executable, *command, *options, str(folder / "script.py")],
            env={**clean, "PYTHONPATH": ROOT, **dict(environment)},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def log(self, rank):
        path = self.folder / "log" / f"workerlog.{rank}"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text, ranks=2):
        end = time.monotonic() + 120
        while True:
            over = time.monotonic() > end or self.launcher.poll() is not None
            logs = [self.log(rank) for rank in range(ranks)]
            if all(text in log for log in logs):
                return
            assert not over, logs
            time.sleep(0.05)

    def end(self, timeout=120):
        code = self.launcher.wait(timeout)
        self.assert_nothing_is_left()
        return code

    def processes(self):
        """Every process, zombies aside, that runs this job's script."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if str(self.folder / "script.py").encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (OSError, ValueError):
                continue
        return found

    def assert_nothing_is_left(self):
        end = time.monotonic() + PROMPT_S
        while self.processes():
            assert time.monotonic() < end, f"processes {self.processes()} outlived their launcher"
            time.sleep(0.05)


@pytest.mark.parametrize(
    "body", ["sys.exit(0)", "time.sleep(2 * ranks.rank)"], ids=["sys.exit", "one rank takes longer"]
)
def test_a_job_that_succeeds_exits_with_0(tmp_path, body):
    job = Job(tmp_path, body)
    assert job.end() == 0, job.log(0) + job.log(1)
    threads = max(1, processors() // 2)
    for rank in (0, 1):
        assert f"rank {rank} of 2, {threads} threads, sum 3.0" in job.log(rank)


@pytest.mark.parametrize(
    ("body", "last_words"),
    [
        ("if ranks.rank == 1: raise ValueError('rank 1 had enough')", "rank 1 had enough"),
        ("if ranks.rank == 1: sys.exit('rank 1 says why')", "rank 1 says why"),
        # A thread that would hold a normal exit for ever.
        ("threading.Thread(target=time.sleep, args=(600,)).start()\n    if ranks.rank == 1: return 3", "sum 3.0"),
        ("if ranks.rank == 1: os.kill(os.getpid(), signal.SIGKILL)", "sum 3.0"),
    ],
    ids=["raises", "sys.exit", "has a thread left", "is killed"],
)
def test_a_rank_that_fails_ends_the_job_at_once(tmp_path, body, last_words):
    job = Job(tmp_path, body)
    job.wait_for("sum 3.0")
    start = time.monotonic()
    assert job.end() != 0
    assert time.monotonic() - start < PROMPT_S
    assert last_words in job.log(1)


def test_ranks_end_without_the_launchers_help_when_one_fails(tmp_path):
    """Under the launcher, its SIGTERM and a rank's own end are a race; here nobody else ends rank 0."""
    (tmp_path / "script.py").write_text(
        SCRIPT.replace("BODY", "if ranks.rank == 1: os.kill(os.getpid(), signal.SIGKILL)")
    )
    environment = {"PYTHONPATH": ROOT, "PADDLE_TRAINERS_NUM": "2", "POD_NAME": f"test{os.getpid()}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")],
            env={**os.environ, **environment, "PADDLE_TRAINER_ID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    _, stderr = ranks[0].communicate(timeout=120)
    assert ranks[0].returncode == 1
    assert "all_reduce: another rank of this job died or did not answer in time" in stderr
    assert ranks[1].wait() == -signal.SIGKILL


def test_a_killed_launcher_takes_its_ranks_along(tmp_path):
    job = Job(tmp_path, "time.sleep(600)")
    job.wait_for("sum 3.0")
    job.launcher.kill()
    assert job.end() == -signal.SIGKILL


def test_a_rank_that_never_joins_ends_the_job(tmp_path):
    script_of_rank_1 = "if os.environ['PADDLE_TRAINER_ID'] == '1': time.sleep(600)\n"
    (tmp_path / "sitecustomize.py").write_text("import os, time\n" + script_of_rank_1)
    environment = {"PADDLE_MIXTRAL_GROUP_TIMEOUT": "1", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    job = Job(tmp_path, "pass", environment=environment.items())
    assert job.end() != 0
    assert "rank 0 of 2 waited up to 1 s for the other ranks, and they did not all join" in job.log(0)


def test_one_rank_needs_no_group(tmp_path):
    job = Job(tmp_path, "raise SystemExit(0)", ranks=1)
    assert job.end() == 0, job.log(0)
    assert "rank 0 of 1" in job.log(0)
