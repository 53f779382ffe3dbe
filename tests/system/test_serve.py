"""The serving command as a user starts, asks and ends it: alone and under the launcher."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from predict.engine.request import SamplingParams
from predict.llm import LLM
from predict.server import main

ROOT = Path(__file__).resolve().parents[2]
SERVE = [sys.executable, "-m", "predict.main", "serve"]
PATIENCE_S = 60
LONG = {"prompt": "The", "max_tokens": 500, "ignore_eos": True, "temperature": 0}
ENDLESS = LONG | {"max_tokens": 2000, "n": 64, "stream": True}


class Process:
    """A server started by a command, on a free port."""

    def __init__(self, command, environment=()):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), "--threads", "1"],
            env={**os.environ, "PYTHONPATH": str(ROOT), **dict(environment)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        end = time.monotonic() + PATIENCE_S
        while True:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < end, "not ready"
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.05)

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def post(self, request, **options):
        return httpx.post(f"{self.url}/v1/completions", json=request, timeout=PATIENCE_S, **options)

    def end(self, sig=signal.SIGTERM):
        """Exit status and what was said on stderr."""
        self.process.send_signal(sig)
        _, stderr = self.process.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in stderr
        return self.process.returncode, stderr


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def listening_addresses(port: int) -> set[str]:
    """Local addresses, as /proc/net/tcp writes them, on which a port is listened to."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {fields[1].split(":")[0] for fields in lines if fields[1].endswith(f":{port:04X}") and fields[3] == "0A"}


@pytest.fixture
def expected(demo):
    return LLM(demo).generate("The", SamplingParams(max_tokens=16))[0].text


def test_a_checkpoint_is_served_until_sigterm_and_requests_under_way_finish(demo, expected):
    with Process([*SERVE, str(demo)]) as server:
        assert server.post({"prompt": "The", "temperature": 0}).json()["choices"][0]["text"] == expected
        assert listening_addresses(server.port) == {"0100007F"}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while httpx.get(f"{server.url}/health").status_code == 200:
                time.sleep(0.01)
            refused = server.post(LONG)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(PATIENCE_S) == 0


def test_an_exported_folder_with_a_key_and_without_patience(exported, expected):
    """A key from the environment, another name, and what is cut off when the drain timeout is over."""
    command = [*SERVE, str(exported("bfloat16", None)), "--served_model_name", "small", "--drain_timeout", "0"]
    with Process(command, {"PADDLE_MIXTRAL_API_KEY": "secret"}.items()) as server:
        assert server.post({"prompt": "The"}).status_code == 401
        assert b"secret" not in Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        key = {"Authorization": "Bearer secret"}
        answer = server.post({"prompt": "The", "temperature": 0, "model": "small"}, headers=key).json()
        assert answer["choices"][0]["text"] == expected
        with httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, headers=key) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            *_, last = [line for line in lines if line]
        assert "the server was shut down before the answer was complete" in last
        _, stderr = server.process.communicate(timeout=PATIENCE_S)
        assert server.process.returncode == 1
        assert "error: 1 request(s) were cut off after 0 s" in stderr
        assert "Traceback" not in stderr


def test_a_second_ctrl_c_ends_it_at_once(demo):
    """Also for a client that does not read what it is sent."""
    with (
        Process([*SERVE, str(demo)]) as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, timeout=PATIENCE_S) as stream,
        httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, timeout=PATIENCE_S) as unread,
    ):
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        while httpx.get(f"{server.url}/health").status_code == 200:
            time.sleep(0.01)
        code, stderr = server.end(signal.SIGINT)
        assert code == 130, stderr
        assert "shut down before the answer was complete" in [line for line in lines if line][-1]
        assert unread.status_code == 200


def refusal(arguments, capsys, code=1) -> str:
    """What a command line that is refused says."""
    try:
        assert main(arguments) == code
    except SystemExit as end:
        assert end.code == code  # noqa: PT017
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    [message] = [line for line in err.splitlines() if "error: " in line]
    return message


def test_a_port_in_use_is_one_sentence_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = refusal(["/nope", "--port", port], capsys)
    assert f"--host 127.0.0.1 --port {port} cannot be served (Address already in use); give another --port" in message


REFUSED = {
    "--host nowhere.invalid": (1, "--host nowhere.invalid: no such address"),
    "--host 192.0.2.1": (1, "cannot be served (Cannot assign requested address)"),
    "--port 70000": (2, "'70000', needs a port, 0 to 65535"),
    "--port x": (2, "'x', needs a port, 0 to 65535"),
    "--api_key ": (2, "argument --api_key: '' is empty"),
    "--api_key schlüssel": (1, "the API key (--api_key or PADDLE_MIXTRAL_API_KEY) is empty or has characters no HTTP"),
    "--drain_timeout -1": (2, "'-1', needs a number of seconds, 0 or more"),
    "--drain_timeout nan": (2, "'nan', needs a number of seconds"),
    "--max_body_bytes 0": (2, "needs an integer of at least 1"),
    "--chat_template {{oops": (1, "the given chat template has a syntax error"),
    "--total_max_length 100000": (1, "is 100000, needs 2 to 2048"),
    "--temperature=1": (2, "unrecognized arguments: --temperature=1"),
    "/nope": (1, "/nope does not exist; needs a checkpoint folder"),
}


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_flags_are_one_sentence(flags, capsys):
    code, message = REFUSED[flags]
    arguments = flags.split(" ")
    assert message in refusal([*arguments, "--port", "0"] if "--port" not in arguments else arguments, capsys, code)


class Job(Process):
    """Two ranks under the launcher, which gets the signals; their output is in ``folder``."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        launch = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(folder)]
        clean = {k: "" for k in os.environ if k.startswith(("PADDLE_", "POD_"))}
        super().__init__([sys.executable, *launch, str(ROOT / "predict" / "server.py"), *arguments], clean)

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that live."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"--port\0{self.port}".encode() in command and b"launch" not in command:
                values = dict(v.split(b"=", 1) for v in environment if b"=" in v)
                found[int(values[b"PADDLE_TRAINER_ID"])] = int(entry.name)
        return found

    def log(self, rank: int) -> str:
        return (self.folder / f"workerlog.{rank}").read_text()

    def exit_code(self) -> int:
        """Of the launcher, once nothing of the job is left."""
        code = self.process.wait(PATIENCE_S)
        end = time.monotonic() + 10
        while self.ranks():
            assert time.monotonic() < end, "a rank outlived its launcher"
            time.sleep(0.05)
        return code


def test_two_ranks_serve_and_drain_together(demo, expected, tmp_path):
    with Job(tmp_path, str(demo), "--dtype", "float32") as job:
        first = job.post({"prompt": "The", "temperature": 0})
        assert first.json()["usage"]["completion_tokens"] == 16
        with httpx.stream("POST", f"{job.url}/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(job.ranks()[0], signal.SIGTERM)
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert job.exit_code() == 0, job.log(0) + job.log(1)


def test_a_rank_that_dies_is_told_to_clients_and_ends_the_job(demo, tmp_path):
    with Job(tmp_path, str(demo)) as job:
        ranks = job.ranks()
        assert ranks.keys() == {0, 1}
        with httpx.stream("POST", f"{job.url}/v1/completions", json=ENDLESS, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(ranks[1], signal.SIGKILL)
            killed = time.monotonic()
            *_, last = [line for line in lines if line]
        assert time.monotonic() - killed < 5
        assert "another rank of this job died" in last
        assert job.exit_code() != 0
        assert "Traceback" not in job.log(0)
