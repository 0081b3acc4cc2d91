"""The engine for asyncio: one thread owns the `LLMEngine`, requests are async iterators."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import torch

from ..llm_engine import LLMEngine
from ..outputs import EngineStats, RequestOutput
from ..prompts import Prompt
from ..sampling_params import SamplingParams
from .failure_policy import Action, FailurePolicy
from .request_log import RequestLog

_log = logging.getLogger("cupaged.server")
_BETWEEN_STEPS = 0.01  # seconds in which requests are added and ended; those left are, after the next step


class EngineDeadError(RuntimeError):
    """The engine's thread has ended, by an error or because the server stops."""


class StepFailedError(RuntimeError):
    """The request makes steps fail. The engine goes on without it."""


@dataclass
class _Stream:
    """Where the outputs of one request go."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[RequestOutput | Exception]
    left: bool = False  # nobody waits for it any more

    def put(self, item: RequestOutput | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, item)


class AsyncEngine:
    """Runs an engine in a thread of its own between `start` and `stop`.

    Nothing but that thread touches the engine: adding, aborting and stepping happen there, in turn.

    After a step that fails, the requests that make it fail end with `StepFailedError`, and the others go on
    (`FailurePolicy`). An engine that does not work without them either is dead, as is one that may be wrong
    about itself.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.error: EngineDeadError | None = None  # why no request is taken any more
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # of the thread alone
        self._closed = threading.Lock()  # between looking whether the thread takes commands and giving one
        self._stopping = False
        self._policy = FailurePolicy()
        self._stats = engine.stats()
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="cupaged-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after the step it is in; requests still running fail with `EngineDeadError`.

        Args:
            timeout: maximum number of seconds to wait for it. The thread does not keep the process alive.
        """
        self.request_stop()
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("the engine is still in a step, which is not waited for")

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

    @property
    def seconds_in_step(self) -> float:
        """Seconds that the thread has been in the same step, or between two; 0 if it waits."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

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

        log = RequestLog(request_id)
        self._submit(add)
        finished = False
        try:
            while not finished:
                item = await stream.outputs.get()
                if isinstance(item, Exception):
                    finished = True  # there is nothing to abort
                    log.failed(item)
                    raise item
                finished = item.finished
                log.observe(item)
                yield item
        finally:
            log.close()
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
                self._run_commands(wait=not self.engine.has_unfinished())
                self._busy_since = time.monotonic()
                if self.engine.has_unfinished() and not self._stopping:
                    self._step()
                self._stats = self.engine.stats()
            reason = EngineDeadError("the server is shutting down")
        except BaseException as error:  # who waits has to be told, whatever ends this thread
            reason = EngineDeadError(f"the engine has failed: {_in_a_line(error)}; start the server again")
            _log.exception("the engine has failed")
        self._busy_since = None
        self._fail_all(reason)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            request_ids = self.engine.failed_requests
            if request_ids is None:
                raise
            # One traceback for all that is tried because of it.
            _log.error(
                "a step has failed, with %d requests: %s",
                len(request_ids),
                _in_a_line(error),
                exc_info=not self._policy.failing,
            )
            reason = StepFailedError(
                f"the engine failed twice in a step with this request, the last time with "
                f"{_in_a_line(error)}: send it again, or a smaller one; the server's log has more"
            )
        else:
            self._policy.succeeded()
            self._deliver(outputs)
            return
        # Not in the clause above, where the error holds on to the tensors of the step. Where the device is
        # lost this fails, and so will the next step.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()  # nothing where CUDA is not in use
        match self._policy.failed(request_ids):
            case Action.END:
                for request_id in request_ids:
                    self._end(request_id, reason)
            case Action.PROBE:  # an error from here means that the engine itself does not work
                self.engine.probe()

    def _end(self, request_id: str, reason: StepFailedError) -> None:
        """End a request, or a prefix, that the engine cannot run."""
        _log.error("%s ends: it failed twice", request_id)
        stream = self._streams.pop(request_id, None)
        self.engine.abort(request_id)
        if stream is not None:
            stream.put(reason)
        else:
            with contextlib.suppress(ValueError):  # it is no prefix either
                self.engine.remove_prefix(request_id)

    def _run_commands(self, wait: bool) -> None:
        if wait:
            self._busy_since = None
            command = self._commands.get()
            self._busy_since = time.monotonic()
            command()
        end = time.monotonic() + _BETWEEN_STEPS
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < end:
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
                command = self._commands.get_nowait()
                with contextlib.suppress(Exception):  # of an engine that is wrong about itself
                    command()
        for stream in self._streams.values():
            stream.put(reason)
        self._streams.clear()


def _in_a_line(error: BaseException) -> str:
    lines = str(error).splitlines()  # those of CUDA are followed by advice
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
