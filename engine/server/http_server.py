"""Run the application with uvicorn, and the engine beside it: graceful shutdown, watchdog, load log."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from .access import Access
from .app import LAST_STEP_SECONDS, create_app
from .async_engine import AsyncEngine, EngineDeadError
from .chat_settings import ChatSettings
from .connections import Connection, Connections
from .drain import Drain
from .limits import Limits
from .load_log import LoadLog
from .middleware import guarded
from .signals import handled_signals
from .watchdog import Watchdog

_log = logging.getLogger("cupaged.server")
_BACKLOG = 2048  # maximum number of connections that wait to be accepted
_LAST_SECONDS = 5  # time to answer requests that did not finish before the shutdown timeout


class HttpServer(uvicorn.Server):
    """Serve an application over HTTP, with limits of connections.

    At the first SIGTERM or SIGINT running requests may finish and new ones are refused. A second signal ends
    the process at once with exit status 128 + signal number, as shells report it. (The default action of the
    signal would not do: it does not apply to the first process of a container.)

    Args:
        drain: the application.
        on_start: called when the server accepts requests.
        limits: limits of connections.
        access: which requests are let through.
        shutdown_timeout: maximum number of seconds for running requests to finish when the server stops.
        tls: files with the certificate chain and the private key, to serve HTTPS; None: HTTP.
    """

    def __init__(
        self,
        drain: Drain,
        on_start: Callable[[], None],
        limits: Limits,
        access: Access,
        shutdown_timeout: float,
        tls: tuple[Path, Path] | None,
    ) -> None:
        self._connections = Connections(limits)
        self._drain = drain
        super().__init__(
            uvicorn.Config(
                guarded(drain, access),
                http=functools.partial(Connection, self._connections),  # type: ignore[arg-type]
                ws="none",
                loop="asyncio",  # `Connections` depends on how it reads and accepts
                log_config=None,
                access_log=False,
                # asyncio tries to accept this many connections in a row, even while descriptors have run out;
                # with 1 it waits a second between attempts. `startup` sets the real backlog.
                backlog=1,
                timeout_keep_alive=limits.keep_alive_timeout,  # type: ignore[arg-type]
                timeout_graceful_shutdown=_LAST_SECONDS,
                ssl_certfile=tls[0] if tls else None,
                ssl_keyfile=tls[1] if tls else None,
            )
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        self._shutdown_timeout = shutdown_timeout
        self._on_start = on_start
        self._signal: signal.Signals | None = None  # the first one

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)
        if self.started:
            self._connections.start()
            self._on_start()

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
        self._drained()
        await super().shutdown(sockets)

    def _drained(self) -> None:
        """Stop what answers the requests that have not finished in time."""


class Server(HttpServer):
    """Serve an engine over HTTP.

    The engine runs on the thread that calls `run`, the event loop on another one.

    Args:
        model_names: names of the model in requests; the first is that in answers.
        grace: seconds between the failure of the engine and the end of the server, for sending errors.
        on_start: called when the server accepts requests.
        limits: limits of requests and connections.
        access: which requests are let through.
        shutdown_timeout: maximum number of seconds for running requests to finish when the server stops.
            Then the engine stops, and the remaining requests get an error.
        step_timeout: seconds after which a step is reported as hanging and ``/health`` answers 503; 0: never.
        log_stats: log the load every ten seconds, while there is any.
        tls: files with the certificate chain and the private key, to serve HTTPS; None: HTTP.
        chat_settings: settings of chats.

    Attributes:
        failure: the error of the engine, if that is why the server stops.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        model_names: str | Sequence[str],
        grace: float = 2.0,
        on_start: Callable[[], None] = lambda: None,
        *,
        limits: Limits | None = None,
        access: Access | None = None,
        shutdown_timeout: float = 25.0,
        step_timeout: float = 300.0,
        log_stats: bool = True,
        tls: tuple[Path, Path] | None = None,
        chat_settings: ChatSettings | None = None,
    ) -> None:
        limits = limits or Limits()
        self._watchdog = Watchdog(lambda: engine.seconds_in_step, step_timeout)
        drain = Drain(create_app(engine, model_names, limits, self._healthy, False, chat_settings))
        super().__init__(drain, on_start, limits, access or Access(), shutdown_timeout, tls)
        self._engine = engine
        self._load_log = LoadLog(engine.stats) if log_stats else None
        self._grace = grace
        self._error: BaseException | None = None  # that ended the event loop's thread
        self.failure: EngineDeadError | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, a failure of the engine, or ``should_exit``; run the engine on this thread.

        If its last step hangs, and this is the main thread, the process ends without it.
        """
        may_exit = threading.current_thread() is threading.main_thread()
        thread = threading.Thread(
            target=self._run_loop, args=[sockets, may_exit], name="cupaged-http", daemon=True
        )
        with handled_signals(lambda number: self.handle_exit(number, None)):
            thread.start()
            self._engine.run()
            thread.join()
        if self._error is not None:
            raise self._error

    def _run_loop(self, sockets: list[socket.socket] | None, may_exit: bool) -> None:
        try:
            super().run(sockets)
        except BaseException as error:  # raised again by the thread that waits for this one
            self._error = error
        if not self._engine.stop(LAST_STEP_SECONDS) and may_exit:
            logging.shutdown()
            sys.stdout.flush()
            os._exit(0 if self._error is None and self.failure is None else 1)

    def _healthy(self) -> bool:
        return self._engine.error is None and not self._watchdog.hangs() and not self._drain.begun

    async def on_tick(self, counter: int) -> bool:
        self._watchdog.hangs()
        self._engine.end_if_stuck()
        if self._load_log is not None:
            self._load_log.tick()
        if self.failure is None and self._engine.error is not None:
            self.failure = self._engine.error
            asyncio.get_running_loop().call_later(self._grace, self._exit)
        return await super().on_tick(counter)

    def _exit(self) -> None:
        self.should_exit = True

    def _drained(self) -> None:
        self._engine.request_stop()
