"""From a bound socket to the exit status: uvicorn, and how the server ends.

- SIGTERM or Ctrl-C: no new requests; those under way finish. Exit status 0, or 1 if some had to be cut off.
- Again: at once, 130.
- The engine fails: everybody who waits is told; exit status 1.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from types import FrameType
from typing import Any

import uvicorn

from predict.command import FAILED, INTERRUPTED
from predict.serving.gate import Gate
from predict.serving.service import Service

TELL_S = 2.0  # clients that are owed an error get it in that time, or not at all
AT_ONCE_S = 0.3
KEEP_ALIVE_S = 60  # clients keep idle connections for later requests


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet, so that a port in use is noticed before the model is loaded.

    Raises:
        ValueError: the address is not this machine's, or not free.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host {host}: no such address ({error}); use 127.0.0.1, or 0.0.0.0 for every one") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"--host {host} --port {port} cannot be served ({error.strerror}); give another --port, or end what uses it"
        ) from None
    return bound


class Server(uvicorn.Server):
    """uvicorn, ending as the top of this file says.

    Args:
        service: the model that answers.
        app: its routes.
        bound: where it listens.
        drain_timeout_s: how long requests under way may take to finish once the server is asked to end.

    Attributes:
        status: the exit status, once the server has ended.
    """

    def __init__(self, service: Service, app: Gate, bound: socket.socket, drain_timeout_s: float):
        config = uvicorn.Config(
            app,
            http="h11",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(TELL_S),
        )
        super().__init__(config)
        self.status = 0
        self._service, self._drain_timeout_s, self._bound = service, drain_timeout_s, bound
        self._ending: asyncio.Task | None = None
        service.on_failure = lambda: self._begin(self._fail())

    def serve_until_ended(self) -> int:
        """Serves until a signal or a failure ends it; returns the exit status."""
        asyncio.run(self.serve([self._bound]))
        if not self._service.worker.stop(TELL_S):
            print("error: the engine's last step does not end", file=sys.stderr)
            self.status = self.status or FAILED
        return self.status

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._service.worker.start()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._bound.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(
            f"serving {self._service.name} on http://{host}:{port} (process {os.getpid()}); open it to chat",
            file=sys.stderr,
            flush=True,
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal, on the main thread: first drain, then stop at once."""
        self._loop.call_soon_threadsafe(self._on_signal, sig)

    def _on_signal(self, sig: int) -> None:
        if self._ending is None:
            self._begin(self._drain())
        else:
            self.status = INTERRUPTED if sig == signal.SIGINT else FAILED
            self._begin(self._give_up(AT_ONCE_S))

    def _begin(self, ending: Coroutine[Any, Any, None]) -> None:
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.ensure_future(ending)

    async def _drain(self) -> None:
        waiting = len(self._service.in_flight)
        print(f"shutting down; {waiting} request(s) under way", file=sys.stderr, flush=True)
        if not await self._service.drain(self._drain_timeout_s):
            left = len(self._service.in_flight)
            print(f"error: {left} request(s) were cut off after {self._drain_timeout_s:g} s", file=sys.stderr)
            self.status = FAILED
            await self._give_up(TELL_S)
        self._end()

    async def _give_up(self, timeout_s: float) -> None:
        """Tells everybody who waits; whoever does not read it in time is cut off."""
        await self._service.give_up(timeout_s)
        self.force_exit = bool(self._service.in_flight)
        self._end()

    def _end(self) -> None:
        # From here on uvicorn has only tracebacks of clients that are cut off: they were counted, or have sent half a
        # request.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.should_exit = True

    async def _fail(self) -> None:
        self.status = FAILED
        await self._service.drain(TELL_S)
        await self._give_up(0)
