"""Run an `LLMEngine` in one thread, with requests as async iterators."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NoReturn, TypeVar

import torch

from ..llm_engine import LLMEngine
from ..outputs import EngineStats, RequestOutput
from ..prompts import Prompt
from ..sampling.grammar import Grammar
from ..sampling_params import SamplingParams
from ..structured_outputs import StructuredOutputsParams
from .failure_policy import Action, FailurePolicy
from .streams import Item, Stream, deliver

_log = logging.getLogger("cupaged.server")
_COMPILERS = 2  # number of grammars that are compiled at once
Result = TypeVar("Result")
_COMMANDS_SECONDS = 0.01  # maximum time to add and abort requests between two steps


class EngineDeadError(RuntimeError):
    """Report that the engine's thread has ended, by an error or because the server stops."""


class StepFailedError(RuntimeError):
    """Report that a request makes steps fail; the engine continues without it."""


class AsyncEngine:
    """Run the steps of an engine in one thread, and take requests from event loops in any other.

    That thread is the one that calls `run`, or a new one that `start` makes. Only it uses the engine: it adds
    requests, aborts them and runs steps.

    On a CPU let the thread that has loaded the model call `run`, as the server does with the main thread.
    After `start` it works as well, but steps may take twice as long: each thread that computes has OpenMP
    threads of its own, and where there are more of those than cores they sleep instead of waiting actively.

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
        self._streams: dict[str, Stream] = {}  # used by the engine's thread only
        self._submit_lock = threading.Lock()  # held to check `error` and add a command, and to set `error`
        self._stopping = False
        self._ended = threading.Event()  # not set while `run` runs
        self._ended.set()
        self._compiling = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="cupaged-grammars")
        self._policy = FailurePolicy()
        self._stats = engine.stats()
        self._busy_since: float | None = None
        if engine.ranks is not None:
            commands = self._commands  # not this object, which would keep the model alive
            engine.ranks.on_failure(lambda error: commands.put(partial(_raise, error)))

    def start(self) -> None:
        """Call `run` in a new thread, which does not keep the process alive."""
        self._ended.clear()
        threading.Thread(target=self.run, name="cupaged-engine", daemon=True).start()

    def stop(self, timeout: float | None = None) -> bool:
        """End `run` after the current step; unfinished requests fail with `EngineDeadError`.

        Args:
            timeout: maximum number of seconds to wait for the step.

        Returns:
            Whether `run` has ended.
        """
        self.request_stop()
        if not self._ended.wait(timeout):
            _log.warning("the engine is still in a step, which is not waited for")
        return self._ended.is_set()

    def request_stop(self) -> None:
        """End `run` as `stop` does, without waiting for it."""
        self._stopping = True
        self._commands.put(lambda: None)  # wakes the thread if it waits for a command

    def stats(self) -> EngineStats:
        """Return the engine's statistics as of the end of the last step."""
        return self._stats

    @property
    def seconds_in_step(self) -> float:
        """Return the seconds since the current step began, or since it ended; 0 if the engine is idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def end_if_stuck(self) -> None:
        """Fail all requests if a step waits for another rank for longer than the time limit.

        Called by another thread: that of the engine does not come back from such a step on a GPU.
        """
        ranks = self.engine.ranks
        if ranks is None or self.error is not None:
            return
        if (error := ranks.overdue(self.seconds_in_step)) is not None:
            _log.error("the engine has failed: %s", error)
            self._fail_all(_dead(error))

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
        items: asyncio.Queue[Item] = asyncio.Queue()
        stream = self.submit(request_id, prompt, params, items.put_nowait, priority)
        try:
            finished = False
            while not finished:
                item = await items.get()
                if isinstance(item, Exception):
                    raise item
                finished = item.finished
                yield item
        finally:
            stream.close()

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        put: Callable[[Item], None],
        priority: int = 0,
    ) -> Stream:
        """Run a request as `generate` does, but with a function to be called with its outputs.

        Args:
            put: called on the running event loop with each output, and with the error if one ends the
                request.

        Returns:
            The stream of the outputs, to be closed.
        """

        def abort() -> None:
            with contextlib.suppress(EngineDeadError):
                self._submit(lambda: self._abort(request_id))

        stream = Stream(request_id, put, abort)

        def add(grammar: Grammar | None = None) -> None:
            if stream.closed:  # before the command was run
                return
            try:
                self.engine.add_request(request_id, prompt, params, priority=priority, grammar=grammar)
            except Exception as error:
                deliver([(stream, error)])
                # Any other error is a bug of ours; it must not end the thread.
                if not isinstance(error, ValueError):
                    _log.exception("adding request %s failed", request_id)
            else:
                self._streams[request_id] = stream

        def compile_and_add(structure: StructuredOutputsParams) -> None:
            if stream.closed:
                return
            try:
                grammar = self.engine.grammars.compile(structure, trusted=False)
                self._submit(lambda: add(grammar))
            except Exception as error:
                deliver([(stream, error)])
                if not isinstance(error, (ValueError, EngineDeadError)):
                    _log.exception("compiling the grammar of request %s failed", request_id)

        try:
            if params.structured_outputs is None:
                self._submit(add)
            else:
                self._compiling.submit(compile_and_add, params.structured_outputs)
        except EngineDeadError as error:
            stream.receive(error)
        return stream

    async def call(self, function: Callable[[], Result]) -> Result:
        """Return the result of a function that the engine's thread calls between two steps.

        Raises:
            EngineDeadError: the engine has failed or is being stopped.
        """
        loop, future = asyncio.get_running_loop(), concurrent.futures.Future[Result]()

        def command() -> None:
            if not future.set_running_or_notify_cancel():  # its caller has left
                return
            try:
                future.set_result(function())
            except Exception as error:  # it must not end the thread
                future.set_exception(error)

        self._submit(command)
        return await asyncio.wrap_future(future, loop=loop)

    def _submit(self, command: Callable[[], None]) -> None:
        with self._submit_lock:
            if self.error is not None:
                raise EngineDeadError(str(self.error))
            self._commands.put(command)

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self.engine.abort(request_id)

    def run(self) -> None:
        """Add requests and run steps on the calling thread, until the engine is stopped or dead."""
        self._ended.clear()
        try:
            while not self._stopping:
                self._run_commands(wait=not self.engine.has_unfinished())
                self._busy_since = time.monotonic()
                if self.engine.has_unfinished() and not self._stopping:
                    self._step()
                self._stats = self.engine.stats()
            reason = EngineDeadError("the server is shutting down")
        except BaseException as error:  # consumers must be notified whatever ends this thread
            reason = _dead(error)
            _log.exception("the engine has failed")
        self._busy_since = None
        self._fail_all(reason)
        self._ended.set()

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
            deliver([(stream, reason)])
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
        items = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finished:
                del self._streams[output.request_id]
            items.append((stream, output))
        deliver(items)

    def _fail_all(self, reason: EngineDeadError) -> None:
        with self._submit_lock:
            self.error = reason
        with contextlib.suppress(queue.Empty):
            while True:  # requests that are still to be added must be notified too
                command = self._commands.get_nowait()
                with contextlib.suppress(Exception):  # the engine's state may be inconsistent
                    command()
        deliver([(stream, reason) for stream in list(self._streams.values())])
        self._streams.clear()


def _raise(error: Exception) -> NoReturn:
    raise error


def _dead(error: BaseException) -> EngineDeadError:
    return EngineDeadError(f"the engine has failed: {_first_line(error)}; start the server again")


def _first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message; CUDA appends lines of advice."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
