"""uvicorn around the application, with an end at which every request gets its answer, also when the engine
ends before it."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable

import uvicorn

from .app import create_app
from .async_engine import AsyncEngine, EngineDeadError
from .connections import Connection, Connections
from .hosts import HostCheck
from .limits import Limits

_BACKLOG = 2048  # connections that the system keeps until they are accepted


class Server(uvicorn.Server):
    """Serves an engine over HTTP.

    Args:
        model_name: what requests must call the model.
        grace: seconds that requests have to end by themselves when the server stops. Then the engine stops,
            and those left are told so. After the death of the engine, seconds in which everybody is told
            before the server stops.
        on_start: called when the server takes requests.
        limits: what one client may ask for.
        allowed_hosts: names that the Host header of a request may have; None is any.

    Attributes:
        failure: the death of the engine, if that is why the server stops.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        model_name: str,
        grace: float = 2.0,
        on_start: Callable[[], None] = lambda: None,
        limits: Limits | None = None,
        allowed_hosts: frozenset[str] | None = None,
    ) -> None:
        # uvicorn would cancel what runs after its own time, and answer it with 500. That is for clients who
        # do not read, and an engine in a long step.
        last = round(grace) + 3
        limits = limits or Limits()
        self._connections = Connections(limits)
        super().__init__(
            uvicorn.Config(
                HostCheck(create_app(engine, model_name, limits), allowed_hosts),
                http=functools.partial(Connection, self._connections),  # type: ignore[arg-type]
                ws="none",
                loop="asyncio",  # how it reads and accepts is part of the limits
                log_level="warning",
                # So many are accepted in a row, and asyncio goes on where descriptors have run out: one by
                # one, it waits a second then.
                backlog=1,
                timeout_keep_alive=limits.keep_alive_timeout,  # type: ignore[arg-type]
                timeout_graceful_shutdown=last,
            )
        )
        self._engine = engine
        self._grace = grace
        self._on_start = on_start
        self.failure: EngineDeadError | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)
        if self.started:
            self._connections.start()
            self._on_start()

    async def on_tick(self, counter: int) -> bool:
        if self.failure is None and self._engine.error is not None:
            self.failure = self._engine.error
            asyncio.get_running_loop().call_later(self._grace, self._exit)
        return await super().on_tick(counter)

    def _exit(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = asyncio.get_running_loop().call_later(self._grace, self._engine.request_stop)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()
