"""uvicorn around the application: how it ends, and what it looks after while it runs."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from .app import create_app
from .async_engine import AsyncEngine, EngineDeadError
from .connections import Connection, Connections
from .drain import Drain
from .hosts import HostCheck
from .limits import Limits
from .load_log import LoadLog
from .watchdog import Watchdog

_log = logging.getLogger("cupaged.server")
_BACKLOG = 2048  # connections that the system keeps until they are accepted
_LAST_SECONDS = 5  # in which those are told who did not finish in time; then uvicorn cancels them


class Server(uvicorn.Server):
    """Serves an engine over HTTP.

    The first SIGTERM or SIGINT lets running requests finish and refuses new ones; a second one ends the
    process at once, with exit status 128 + its number, as a shell says of who was ended by a signal. (The
    signal's own default action would not do: the first process of a container has none.)

    Args:
        model_name: what requests must call the model.
        grace: seconds after the death of the engine in which everybody is told before the server stops.
        on_start: called when the server takes requests.
        limits: what one client may ask for.
        allowed_hosts: names that the Host header of a request may have; None is any.
        shutdown_timeout: maximum number of seconds that running requests have to finish when the server
            stops. Then the engine stops, and those left are told so.
        step_timeout: seconds after which a step is taken to hang, and ``/health`` says 503; 0: never.
        log_stats: say every ten seconds how much load there is, while there is some.

    Attributes:
        failure: the death of the engine, if that is why the server stops.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        model_name: str,
        grace: float = 2.0,
        on_start: Callable[[], None] = lambda: None,
        *,
        limits: Limits | None = None,
        allowed_hosts: frozenset[str] | None = None,
        shutdown_timeout: float = 25.0,
        step_timeout: float = 300.0,
        log_stats: bool = True,
    ) -> None:
        limits = limits or Limits()
        self._connections = Connections(limits)
        self._watchdog = Watchdog(lambda: engine.seconds_in_step, step_timeout)
        self._drain = Drain(create_app(engine, model_name, limits, self._healthy))
        super().__init__(
            uvicorn.Config(
                HostCheck(self._drain, allowed_hosts),
                http=functools.partial(Connection, self._connections),  # type: ignore[arg-type]
                ws="none",
                loop="asyncio",  # how it reads and accepts is part of the limits
                log_config=None,
                access_log=False,
                # So many are accepted in a row, and asyncio goes on where descriptors have run out: one by
                # one, it waits a second then.
                backlog=1,
                timeout_keep_alive=limits.keep_alive_timeout,  # type: ignore[arg-type]
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        self._engine = engine
        self._load_log = LoadLog(engine.stats) if log_stats else None
        self._grace = grace
        self._shutdown_timeout = shutdown_timeout
        self._on_start = on_start
        self._signal: signal.Signals | None = None  # the first one
        self.failure: EngineDeadError | None = None

    def _healthy(self) -> bool:
        return self._engine.alive and not self._watchdog.hangs() and not self._drain.begun

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)
        if self.started:
            self._connections.start()
            self._on_start()

    async def on_tick(self, counter: int) -> bool:
        self._watchdog.hangs()
        if self._load_log is not None:
            self._load_log.tick()
        if self.failure is None and self._engine.error is not None:
            self.failure = self._engine.error
            asyncio.get_running_loop().call_later(self._grace, self._exit)
        return await super().on_tick(counter)

    def _exit(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + sig)
        self._signal, self.should_exit = signal.Signals(sig), True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._signal is not None:
            _log.info(
                "%s: %d requests may finish within %g s (--shutdown-timeout); another signal ends at once",
                self._signal.name,
                self._drain.num_active,
                self._shutdown_timeout,
            )
        await self._drain.run(self._shutdown_timeout)
        self._engine.request_stop()
        await super().shutdown(sockets)
