"""Run an `LLMEngine` in a thread of its own, with requests as async iterators."""

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
_COMMANDS_SECONDS = 0.01  # maximum time to add and abort requests between two steps


class EngineDeadError(RuntimeError):
    """Report that the engine's thread has ended, by an error or because the server stops."""


class StepFailedError(RuntimeError):
    """Report that a request makes steps fail; the engine continues without it."""


@dataclass
class _Stream:
    """Pass the outputs of one request from the engine's thread to its consumer."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[RequestOutput | Exception]
    closed: bool = False  # the consumer has left

    def put(self, item: RequestOutput | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the consumer
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, item)


class AsyncEngine:
    """Run an engine in a thread of its own between `start` and `stop`.

    Only that thread uses the engine: it adds requests, aborts them and runs steps.

    When a step fails, the requests that cause the failure end with `StepFailedError` and the others continue
    (`FailurePolicy`). The engine is dead if it does not work without them either, or if its state may be
    inconsistent.

    Attributes:
        error: why no more requests are accepted; None while they are.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.error: EngineDeadError | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # used by the thread only
        self._submit_lock = threading.Lock()  # held to check `error` and add a command, and to set `error`
        self._stopping = False
        self._policy = FailurePolicy()
        self._stats = engine.stats()
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="cupaged-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after its current step; unfinished requests fail with `EngineDeadError`.

        Args:
            timeout: maximum number of seconds to wait for the thread, which does not keep the process alive.
        """
        self.request_stop()
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("the engine is still in a step, which is not waited for")

    def request_stop(self) -> None:
        """End the thread as `stop` does, without waiting for it."""
        self._stopping = True
        self._commands.put(lambda: None)  # wakes the thread if it waits for a command

    @property
    def alive(self) -> bool:
        """Return whether requests are accepted."""
        return self._thread.is_alive() and self.error is None

    def stats(self) -> EngineStats:
        """Return the engine's statistics as of the end of the last step."""
        return self._stats

    @property
    def seconds_in_step(self) -> float:
        """Return the seconds that the thread has spent in the current step, or since it; 0 if it is idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    async def generate(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run a request. Closing the iterator early aborts the request and frees its blocks.

        Yields:
            The request's outputs so far, after every step that sampled for it.

        Raises:
            ValueError: the request is malformed or can never run.
            StepFailedError: the request makes steps fail.
            EngineDeadError: the engine has failed or is being stopped.
        """
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())

        def add() -> None:
            if stream.closed:  # before the command was run
                return
            try:
                self.engine.add_request(request_id, prompt, params, priority=priority)
            except Exception as error:
                stream.put(error)
                # Any other error is a bug of ours; it must not end the thread.
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
                    finished = True  # the engine no longer has the request
                    log.failed(item)
                    raise item
                finished = item.finished
                log.observe(item)
                yield item
        finally:
            log.close()
            stream.closed = True
            if not finished:
                with contextlib.suppress(EngineDeadError):
                    self._submit(lambda: self._abort(request_id))

    def _submit(self, command: Callable[[], None]) -> None:
        with self._submit_lock:
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
        except BaseException as error:  # consumers must be notified whatever ends this thread
            reason = EngineDeadError(f"the engine has failed: {_first_line(error)}; start the server again")
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
            # Log one traceback for a failure and all retries that follow it.
            _log.error(
                "a step has failed, with %d requests: %s",
                len(request_ids),
                _first_line(error),
                exc_info=not self._policy.failing,
            )
            reason = StepFailedError(
                f"the engine failed twice in a step with this request, the last time with "
                f"{_first_line(error)}: send it again, or a smaller one; the server's log has more"
            )
        else:
            self._policy.succeeded()
            self._deliver(outputs)
            return
        # Outside of the except clause, in which the error keeps the step's tensors alive. If the device is
        # lost this fails, and so will the next step.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()  # does nothing if CUDA is not in use
        match self._policy.failed(request_ids):
            case Action.END:
                for request_id in request_ids:
                    self._end(request_id, reason)
            case Action.PROBE:  # an error in here ends the thread: the engine itself does not work
                self.engine.probe()

    def _end(self, request_id: str, reason: StepFailedError) -> None:
        """End a request or remove a pinned prefix that makes steps fail."""
        _log.error("%s ends: it failed twice", request_id)
        stream = self._streams.pop(request_id, None)
        self.engine.abort(request_id)
        if stream is not None:
            stream.put(reason)
        else:
            with contextlib.suppress(ValueError):  # it is not a prefix either
                self.engine.remove_prefix(request_id)

    def _run_commands(self, wait: bool) -> None:
        if wait:
            self._busy_since = None
            command = self._commands.get()
            self._busy_since = time.monotonic()
            command()
        end = time.monotonic() + _COMMANDS_SECONDS
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
        with self._submit_lock:
            self.error = reason
        with contextlib.suppress(queue.Empty):
            while True:  # requests that are still to be added must be notified too
                command = self._commands.get_nowait()
                with contextlib.suppress(Exception):  # the engine's state may be inconsistent
                    command()
        for stream in self._streams.values():
            stream.put(reason)
        self._streams.clear()


def _first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message; CUDA appends lines of advice."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
