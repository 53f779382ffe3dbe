"""The one thread that owns the engine, and what the event loop sees of it."""

import asyncio
import contextlib
import functools
import queue
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from predict.engine.engine import Delta, EngineStats
from predict.engine.request import SamplingParams
from predict.serving.errors import ApiError

IDLE_CHECK_S = 1.0


class Engine(Protocol):
    """What the worker asks of an engine: predict.engine.engine's, or one that tells other ranks, too."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, chat: bool) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[Delta]: ...
    def stats(self) -> EngineStats: ...


@dataclass(eq=False)
class Job:
    """The engine requests one HTTP request makes: one for each prompt. Belongs to the event loop.

    Attributes:
        name: of this job and no other.
        prompts: token ids of each.
        params: how each is continued.
        chat: whether the answers are texts of their own.
        events: (number of the prompt, delta), then None, or the error that ended the job.
        unfinished: how many answers are still to end, by number of the prompt.
        started: when it was made, in seconds of time.monotonic().
        last_token: when an answer, by (number of the prompt, index), last grew.
    """

    name: str
    prompts: list[list[int]]
    params: SamplingParams
    chat: bool = False
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    unfinished: dict[int, int] = field(init=False)
    started: float = field(default_factory=time.monotonic)
    last_token: dict[tuple[int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unfinished = dict.fromkeys(range(len(self.prompts)), self.params.n)

    def request_id(self, prompt: int) -> str:
        return f"{self.name}-{prompt}"

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """What the engine says, as (number of the prompt, delta), until every answer has ended.

        Raises:
            ApiError: the engine failed, or is shut down.
        """
        while (event := await self.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event


class Worker:
    """Runs the engine in a thread of its own: commands go in by a queue, deltas come out on the event loop.

    Args:
        engine: from :meth:`start` on, nobody else's.
        observe: called on the event loop with every (job, number of the prompt, delta).
        on_failure: called on the event loop once, when the engine has failed; every job has its error by then.
        check: called once a second while there is nothing to compute; raises if the engine could not go on.
    """

    def __init__(
        self,
        engine: Engine,
        observe: Callable[[Job, int, Delta], None],
        on_failure: Callable[[], None],
        check: Callable[[], None] = lambda: None,
    ):
        self._engine, self._observe, self._on_failure, self._check = engine, observe, on_failure, check
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[str, tuple[Job, int]] = {}  # by request id; on the event loop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._failure: ApiError | None = None
        self._broken = False
        self.stats = engine.stats()

    def start(self) -> None:
        """Begins; to be called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Adds a job's requests, which the engine has checked, to the engine.

        Raises:
            ApiError: there is no engine any more.
        """
        if self._failure is not None:
            raise self._failure
        for prompt, ids in enumerate(job.prompts):
            name = job.request_id(prompt)
            self._jobs[name] = job, prompt
            self._commands.put(functools.partial(self._engine.add, name, ids, job.params, chat=job.chat))

    def abort(self, job: Job) -> None:
        """Ends what is left of a job; the engine frees its memory before its next step."""
        for prompt in job.unfinished:
            if self._jobs.pop(job.request_id(prompt), None) is not None:
                self._commands.put(functools.partial(self._engine.abort, job.request_id(prompt)))

    def fail(self, error: ApiError) -> None:
        """Ends every job with ``error``, and those that come."""
        self._failure = self._failure or error
        for job in {job for job, _ in self._jobs.values()}:
            job.events.put_nowait(error)
            self.abort(job)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the engine raised an error."""
        return self._broken

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after the step it is in; False if that takes longer."""
        self._commands.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # On the engine's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                deltas = self._engine.step() if self._engine.has_work else []
                self.stats = self._engine.stats()
                if deltas:
                    self._tell(self._deliver, deltas)
        except BaseException as error:  # whatever it is, clients wait
            if isinstance(error, (ValueError, MemoryError)):  # what a user can mend
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            self._broken = True
            self._tell(self._report, f"{type(error).__name__}: {error}")

    def _obey(self) -> bool:
        """Carries out the commands that wait; False: to stop. With nothing to compute, waits for one."""
        while True:
            try:
                command = self._commands.get(not self._engine.has_work, IDLE_CHECK_S)
            except queue.Empty:
                if self._engine.has_work:
                    return True
                self._check()
                continue
            if command is None:
                return False
            command()
            if not self._engine.has_work and self._commands.empty():
                return True  # so that the stats are those after the last command

    def _tell(self, function: Callable, *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended while this thread was in a step: nobody waits
            self._loop.call_soon_threadsafe(function, *arguments)

    # On the event loop again.

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.request_id not in self._jobs:  # aborted meanwhile
                continue
            job, prompt = self._jobs[delta.request_id]
            self._observe(job, prompt, delta)
            job.events.put_nowait((prompt, delta))
            if delta.finish_reason is not None:
                self._finish(job, prompt)

    def _finish(self, job: Job, prompt: int) -> None:
        """Notes that one more answer to a prompt has ended."""
        job.unfinished[prompt] -= 1
        if not job.unfinished[prompt]:
            del job.unfinished[prompt]
            del self._jobs[job.request_id(prompt)]
        if not job.unfinished:
            job.events.put_nowait(None)

    def _report(self, what: str) -> None:
        self.fail(ApiError(500, f"the engine failed ({what}); the server ends"))
        self._on_failure()
