"""Run requests from asyncio: outputs as they come, in one process, without a server."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncGenerator
from os import PathLike
from typing import Any

from .config import EngineConfig
from .llm import release_memory, summary
from .llm_engine import LLMEngine
from .outputs import EngineStats, RequestOutput
from .prompts import Prompt
from .sampling_params import SamplingParams
from .server.async_engine import AsyncEngine, EngineDeadError


class AsyncLLM:
    """Complete prompts of any number of tasks with one model: the engine of the server, without HTTP.

    >>> async with AsyncLLM() as llm:
    ...     async for output in llm.generate("The capital of France is"):
    ...         print(output.outputs[0].text)

    A thread loads the model and runs the steps. Event loops in any thread can call it.

    Args:
        model: a Hugging Face directory, a hub ID, a GGUF file, or None for the demo model.
        **config: settings of `EngineConfig`.

    Raises:
        ValueError: `EngineConfig` or `LLMEngine` refuse the settings or the model.
    """

    def __init__(self, model: str | PathLike[str] | None = None, **config: Any) -> None:
        settings = EngineConfig.from_kwargs(config)
        self._engine: AsyncEngine | None = None
        self._error: BaseException | None = None
        loaded = threading.Event()
        # One thread for both: that which has loaded the model runs its steps fastest on a CPU.
        self._thread = threading.Thread(
            target=self._run, args=[model, settings, loaded], name="cupaged-engine", daemon=True
        )
        self._thread.start()
        loaded.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error

    def _run(
        self, model: str | PathLike[str] | None, settings: EngineConfig, loaded: threading.Event
    ) -> None:
        try:
            engine = LLMEngine(model, settings)
            self._summary = summary(engine)
            self._engine = running = AsyncEngine(engine)
        except BaseException as error:
            self._error = error
            return
        finally:
            loaded.set()
        running.run()

    @property
    def engine(self) -> AsyncEngine:
        """Return the engine that runs in the thread.

        Raises:
            RuntimeError: `close` was called.
        """
        if self._engine is None:
            raise RuntimeError(f"{self!r} has given its memory back: create a new AsyncLLM")
        return self._engine

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt. To cancel the task, or to close the generator early, aborts the request.

        Args:
            prompt: text or ``{"prompt_token_ids": [...]}``; see `LLMEngine.add_request` for more.
            sampling_params: by default `LLMEngine.default_sampling_params`.
            request_id: an ID that no unfinished request has; by default a new one.
            priority: if the scheduling policy is "priority", lower ones run first.

        Yields:
            The request's outputs so far, after every step that sampled for it.

        Raises:
            ValueError: the request is malformed or can never run. No other request is affected.
            RuntimeError: `close` was called, also if it was during the request, or steps fail.
        """
        engine = self.engine
        params = engine.engine.default_sampling_params() if sampling_params is None else sampling_params
        outputs = engine.generate(request_id or uuid.uuid4().hex, prompt, params, priority)
        del engine  # or it would keep the memory after `close`
        try:
            async for output in outputs:
                yield output
        except EngineDeadError as error:
            if self._engine is None:
                raise RuntimeError(f"{self!r}: it was closed during the request") from error
            raise
        finally:
            await outputs.aclose()

    def stats(self) -> EngineStats:
        """Return the engine's statistics as of the end of the last step."""
        return self.engine.stats()

    def close(self) -> None:
        """End all requests, and give the memory of the model and of the KV cache back.

        It waits for the current step. Later calls raise RuntimeError.
        """
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.request_stop()
        del engine
        self._thread.join()
        release_memory()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        return f"AsyncLLM({self._summary}{', closed' if self._engine is None else ''})"
