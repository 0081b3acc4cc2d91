"""The engine for asyncio: one thread owns the `LLMEngine`, requests are async iterators."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

import torch

from ..engine import LLMEngine, Prompt
from ..outputs import EngineStats, RequestOutput
from ..sampling_params import SamplingParams

_log = logging.getLogger("cupaged.server")
_MOST_FAILURES = 6  # steps one after the other: three, each tried twice
_BETWEEN_STEPS = 0.01  # seconds in which requests are added and ended; those left are, after the next step


class EngineDeadError(RuntimeError):
    """The engine's thread has ended, by an error or because the server stops."""


class StepFailedError(RuntimeError):
    """Steps with the request have failed, or many before it. The engine goes on without it."""


@dataclass
class _Stream:
    """Where the outputs of one request go."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[RequestOutput | Exception]
    started: bool = False  # there has been an output
    failed: bool = False  # it was in a step that failed, and there has been no output since
    left: bool = False  # nobody waits for it any more

    def put(self, item: RequestOutput | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, item)


class AsyncEngine:
    """Runs an engine in a thread of its own between `start` and `stop`.

    Nothing but that thread touches the engine: adding, aborting and stepping happen there, in turn.

    A step that fails is tried again, once. Then requests that were in it end with `StepFailedError`, and the
    others go on. An engine that does not work without them either is dead, as is one that may be wrong about
    itself.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.error: EngineDeadError | None = None  # why no request is taken any more
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # of the thread alone
        self._closed = threading.Lock()  # between looking whether the thread takes commands and giving one
        self._stopping = False
        self._failures = 0  # steps that failed, since one did not
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

        self._stopping = True
        self._commands.put(lambda: None)  # the thread may wait for one

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
            StepFailedError: the engine cannot run it.
            EngineDeadError: the engine has failed or stops.
        """
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())

        def add() -> None:
            if stream.left:  # while it waited for its turn
                return
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
            stream.left = True
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
                busy = self.engine.has_unfinished()
                if not (busy and self._failures):  # a step is tried again without those that have come since
                    self._run_commands(wait=not busy)
                if self.engine.has_unfinished() and not self._stopping:
                    self._step()
                self._stats = self.engine.stats()
            reason = EngineDeadError("the server is shutting down")
        except BaseException as error:  # who waits has to be told, whatever ends this thread
            reason = EngineDeadError(f"the engine has failed: {_in_a_line(error)}; start the server again")
            _log.exception("the engine has failed")
        self._fail_all(reason)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            request_ids = self.engine.failed_requests
            if request_ids is None:
                raise
            _log.exception("a step has failed, with %d requests", len(request_ids))
            reason = StepFailedError(
                f"steps have failed, the last one with {_in_a_line(error)}: send the request again, or a "
                "smaller one; the server's log has more"
            )
        else:
            self._failures = 0
            self._deliver(outputs)
            return
        # Not in the clause above, where the error holds on to the tensors of the step. Where the device is
        # lost this fails, and so will the next step.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()  # nothing where CUDA is not in use
        self._failures += 1
        if self._failures < _MOST_FAILURES:
            self._end_suspects(request_ids, reason)
        else:
            self._probe(reason)

    def _end_suspects(self, request_ids: Sequence[str], reason: StepFailedError) -> None:
        """After a step that failed, end those of its requests that were in another one before.

        Those that have had an output since are no suspects: a request that always fails comes to its end,
        whatever succeeds without it in between. Nor are those that have ever had one while others have not.
        """
        streams = {name: self._streams[name] for name in request_ids if name in self._streams}
        newcomers = not all(stream.started for stream in streams.values())
        for name, stream in streams.items():
            if stream.failed and not (newcomers and stream.started):
                del self._streams[name]
                self.engine.abort(name)
                stream.put(reason)
            stream.failed = True

    def _probe(self, reason: StepFailedError) -> None:
        """End all requests, and see whether the engine can run one of its own.

        It may have been the requests that failed, with nothing to run between them, as when a client sends
        the same again and again. An error from here means that the engine itself does not work.
        """
        for name in self._streams:
            self.engine.abort(name)
        self.engine.warm_up()
        self._failures = 0
        for stream in self._streams.values():
            stream.put(reason)
        self._streams.clear()

    def _run_commands(self, wait: bool) -> None:
        if wait:
            self._commands.get()()
        end = time.monotonic() + _BETWEEN_STEPS
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < end:
                self._commands.get_nowait()()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            stream.started, stream.failed = True, False
            if output.finished:
                del self._streams[output.request_id]
            stream.put(output)

    def _fail_all(self, reason: EngineDeadError) -> None:
        with self._closed:
            self.error = reason
        with contextlib.suppress(queue.Empty):
            while True:  # requests that were being added are told as well
                command = self._commands.get_nowait()
                with contextlib.suppress(Exception):  # of an engine that is wrong about itself
                    command()
        for stream in self._streams.values():
            stream.put(reason)
        self._streams.clear()


def _in_a_line(error: BaseException) -> str:
    lines = str(error).splitlines()  # those of CUDA are followed by advice
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
