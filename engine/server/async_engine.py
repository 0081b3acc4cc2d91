"""The engine for asyncio: one thread owns the `LLMEngine`, requests are async iterators."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from ..engine import LLMEngine, Prompt
from ..outputs import EngineStats, RequestOutput
from ..sampling_params import SamplingParams

_log = logging.getLogger("cupaged.server")


class EngineDeadError(RuntimeError):
    """The engine's thread has ended, by an error or because the server stops."""


@dataclass
class _Stream:
    """Where the outputs of one request go."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[RequestOutput | Exception]

    def put(self, item: RequestOutput | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, item)


class AsyncEngine:
    """Runs an engine in a thread of its own between `start` and `stop`.

    Nothing but that thread touches the engine: adding, aborting and stepping happen there, in turn.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.error: EngineDeadError | None = None  # why no request is taken any more
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # of the thread alone
        self._closed = threading.Lock()  # between looking whether the thread takes commands and giving one
        self._stopping = False
        self._stats = engine.stats()
        self._thread = threading.Thread(target=self._run, name="cupaged-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in; requests still running fail with `EngineDeadError`."""
        self.request_stop()
        self._thread.join()

    def request_stop(self) -> None:
        """As `stop`, without waiting for it."""

        def end() -> None:
            self._stopping = True

        self._commands.put(end)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and self.error is None

    def stats(self) -> EngineStats:
        """As of the end of the last step."""
        return self._stats

    async def generate(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run a request. Leaving the iterator early aborts it and frees its blocks.

        Yields:
            The request's outputs so far, once after every step that sampled for it.

        Raises:
            ValueError: the request is malformed or can never run.
            EngineDeadError: the engine has failed or stops.
        """
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())

        def add() -> None:
            try:
                self.engine.add_request(request_id, prompt, params, priority=priority)
            except Exception as error:
                stream.put(error)
                # Anything but a refusal is a fault of ours; it must not end the thread either.
                if not isinstance(error, ValueError):
                    _log.exception("adding request %s failed", request_id)
            else:
                self._streams[request_id] = stream

        self._submit(add)
        finished = False
        try:
            while not finished:
                item = await stream.outputs.get()
                if isinstance(item, Exception):
                    finished = True  # there is nothing to abort
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                with contextlib.suppress(EngineDeadError):
                    self._submit(lambda: self._abort(request_id))

    def _submit(self, command: Callable[[], None]) -> None:
        with self._closed:
            if self.error is not None:
                raise EngineDeadError(str(self.error))
            self._commands.put(command)

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self.engine.abort(request_id)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._run_commands(wait=not self.engine.has_unfinished())
                if self.engine.has_unfinished() and not self._stopping:
                    self._deliver(self.engine.step())
                self._stats = self.engine.stats()
            reason = EngineDeadError("the server is shutting down")
        except Exception as error:
            reason = EngineDeadError(f"the engine has failed: {error}")
            _log.exception("the engine has failed")
        self._fail_all(reason)

    def _run_commands(self, wait: bool) -> None:
        if wait:
            self._commands.get()()
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finished:
                del self._streams[output.request_id]
            stream.put(output)

    def _fail_all(self, reason: EngineDeadError) -> None:
        with self._closed:
            self.error = reason
        with contextlib.suppress(queue.Empty):
            while True:  # requests that were being added are told as well
                self._commands.get_nowait()()
        for stream in self._streams.values():
            stream.put(reason)
        self._streams.clear()
