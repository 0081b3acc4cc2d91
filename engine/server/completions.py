"""Answer the requests of the two completion endpoints, whole or as streams."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from transformers import PreTrainedTokenizerBase

from ..outputs import RequestOutput
from ..prompts import Prompt
from ..sampling_params import SamplingParams
from .answers import AnswerReader, ReadChoice
from .async_engine import AsyncEngine
from .choices import CHAT, Choice, Style
from .event_stream import ChunkWriter, Json, TranslatedWriter, Translation, encode
from .limits import BusyError
from .logprobs import for_prompt
from .metrics import Metrics, RequestTimer
from .middleware import unique_id
from .protocol import ChatCompletionRequest, CompletionRequest, Wanted
from .streams import Item

_Positioned = tuple[int, RequestOutput]  # position of a prompt in the request, and its output


class Completions:
    """Answer completion requests with an engine.

    Args:
        tokenizer: a tokenizer for the server's thread.
        model_name: name of the model in responses.
        max_waiting_requests: maximum number of prompts that wait for their first output.
        in_thread: runs slow work in another thread, with a tokenizer of its own.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        metrics: Metrics,
        tokenizer: PreTrainedTokenizerBase,
        model_name: str,
        max_waiting_requests: int,
        in_thread: Callable[[Callable[[PreTrainedTokenizerBase], bytes]], Awaitable[bytes]],
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._max_waiting = max_waiting_requests
        self._num_waiting = 0
        self._in_thread = in_thread

    def check_room(self, num_prompts: int) -> None:
        """Check that ``num_prompts`` more prompts may wait.

        Raises:
            BusyError: more than ``max_waiting_requests`` would wait.
        """
        if self._num_waiting + num_prompts > self._max_waiting:
            raise BusyError(
                f"{self._num_waiting} requests wait, and the server lets {self._max_waiting} wait "
                "(max_waiting_requests): send the request again later"
            )

    async def respond(
        self,
        request: Request,
        style: Style,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        body: ChatCompletionRequest | CompletionRequest,
        create_reader: Callable[[], AnswerReader] | None = None,
        translation: Translation | None = None,
    ) -> Response:
        """Run a request of one or more prompts, each with ``params.n`` choices.

        Args:
            create_reader: creates a reader of a choice's text; None: the text is the answer.
            translation: writes the answer in another API's format.

        Raises:
            ValueError: a prompt is malformed or can never run.
            BusyError: too many prompts would wait.
            StepFailedError: a prompt makes steps fail.
            EngineDeadError: the engine has failed or is being stopped.
        """
        wanted = body.wanted()
        if body.cache_salt is not None:
            prompts = [_salted(prompt, body.cache_salt) for prompt in prompts]
        head: Json = {
            "id": f"{(translation or style).id_prefix}{unique_id(request)}",
            "object": style.chunk_object if wanted.stream else style.object,
            "created": int(time.time()),
            "model": self._model_name,
        }
        outputs = self._run(head["id"], prompts, params, body.priority)

        def choices(tokenizer: PreTrainedTokenizerBase) -> list[Choice]:
            count = len(prompts) * params.n
            if create_reader is None:
                return [Choice(style, index, tokenizer, params, wanted) for index in range(count)]
            return [
                ReadChoice(style, index, tokenizer, params, wanted, create_reader()) for index in range(count)
            ]

        if not wanted.stream:
            latest = await unless_disconnected(request, _collect(outputs))
            if latest is None:
                return Response(status_code=499)

            def write(tokenizer: PreTrainedTokenizerBase) -> bytes:
                return _whole(head, style, choices(tokenizer), latest, params, wanted, translation)

            # Log probabilities can take megabytes.
            large = wanted.logprobs is not None or wanted.prompt_logprobs is not None
            content = await self._in_thread(write) if large else write(self._tokenizer)
            return Response(content, media_type="application/json")
        # Errors of the request come with its first output, before the status is sent.
        first = await unless_disconnected(request, anext(outputs))
        if first is None:
            return Response(status_code=499)
        writer = ChunkWriter(head) if translation is None else TranslatedWriter(translation.events(head))
        events = _events(writer, choices(self._tokenizer), first, outputs, params, wanted)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    async def _run(
        self, request_id: str, prompts: Sequence[Prompt], params: SamplingParams, priority: int
    ) -> AsyncGenerator[_Positioned, None]:
        """Yield the outputs of all prompts as they come, each with its prompt's position.

        Only the newest output of a prompt is kept until it is taken: it includes all earlier ones, which
        would pile up if the client does not read.
        """
        self.check_room(len(prompts))
        waiting = set(range(len(prompts)))  # positions without an output
        self._num_waiting += len(prompts)

        def stop_waiting(position: int) -> None:
            if position in waiting:
                waiting.remove(position)
                self._num_waiting -= 1

        newest: dict[int, RequestOutput] = {}  # by position
        errors: list[Exception] = []
        arrived = asyncio.Event()  # set if `newest` or `errors` is not empty

        def put(position: int, timer: RequestTimer, item: Item) -> None:
            stop_waiting(position)
            if isinstance(item, Exception):
                errors.append(item)
                if not isinstance(item, ValueError):  # otherwise the engine refused the request
                    timer.end("error")
            else:
                newest[position] = item
                timer.observe(item)
            arrived.set()

        running = []
        unfinished = len(prompts)
        try:
            for position, prompt in enumerate(prompts):
                timer = self._metrics.request(params)
                name, put_one = f"{request_id}-{position}", functools.partial(put, position, timer)
                running.append((self._engine.submit(name, prompt, params, put_one, priority), timer))
            if len(prompts) > 1:  # the refusal of one precedes all outputs, with which a stream begins
                await self._engine.call(lambda: None)  # runs when all are added or refused
            while unfinished:
                await arrived.wait()
                arrived.clear()
                if errors:
                    raise errors[0]
                while newest:
                    position = next(iter(newest))
                    output = newest.pop(position)
                    unfinished -= output.finished
                    yield position, output
        finally:  # after an error, or if the client disconnects
            for stream, timer in running:
                if not stream.closed:
                    timer.end("abort")
                    stream.close()
            for position in range(len(prompts)):
                stop_waiting(position)


def _salted(prompt: Prompt, salt: str) -> Prompt:
    return {**({"prompt": prompt} if isinstance(prompt, str) else prompt), "cache_salt": salt}


async def _collect(outputs: AsyncGenerator[_Positioned, None]) -> dict[int, RequestOutput]:
    async with contextlib.aclosing(outputs):
        return {position: output async for position, output in outputs}


async def unless_disconnected(request: Request, work: Any) -> Any:
    """Return the result of ``work``; if the client disconnects before, cancel it and return None."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        watcher.cancel()
        task.cancel()


def _whole(
    head: Json,
    style: Style,
    choices: Sequence[Choice],
    latest: dict[int, RequestOutput],
    params: SamplingParams,
    wanted: Wanted,
    translation: Translation | None,
) -> bytes:
    ordered = [latest[position] for position in sorted(latest)]
    whole = (
        choices[position * params.n + completion.index].whole(output, completion)
        for position, output in enumerate(ordered)
        for completion in output.outputs
    )
    more: Json = {"usage": _usage(ordered)}
    if wanted.prompt_logprobs is not None and style is CHAT:
        more["prompt_logprobs"] = for_prompt(ordered[0].prompt_logprobs or [], wanted.prompt_logprobs)
    if translation is not None:
        return encode(translation.whole({**head, "choices": list(whole), **more})).encode()
    written = map(encode, whole)  # separately, as `json.dumps` lets no other thread run
    return f'{encode(head)[:-1]},"choices":[{",".join(written)}],{encode(more)[1:]}'.encode()


async def _events(
    writer: ChunkWriter | TranslatedWriter,
    choices: Sequence[Choice],
    first: _Positioned,
    rest: AsyncGenerator[_Positioned, None],
    params: SamplingParams,
    wanted: Wanted,
) -> AsyncIterator[str]:
    """Yield the server-sent events of a stream."""
    position, output = first
    latest = {position: replace(output, outputs=[])}  # the outputs sent so far

    def event(choices: list[Json]) -> str:
        chunk: Json = {"choices": choices}
        if wanted.continuous_usage or not choices:
            chunk["usage"] = _usage(latest.values())
        elif wanted.include_usage:
            chunk["usage"] = None  # in all chunks but the last one, as OpenAI's clients expect
        return writer.chunk(chunk)

    async with contextlib.aclosing(rest):
        try:
            if openings := [event([opening]) for choice in choices if (opening := choice.opening())]:
                yield "".join(openings)
            async for position, output in _chain(first, rest):
                latest[position] = output
                events = []  # of one step, sent by one system call
                for completion in output.outputs:
                    if chunk := choices[position * params.n + completion.index].next(output, completion):
                        events.append(event([chunk]))
                if events:
                    yield "".join(events)
            if wanted.include_usage:
                yield event([])
        except Exception as error:  # the status is sent already, so report the error in the stream
            yield writer.failed(str(error))
        else:
            yield writer.end()


async def _chain(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for item in rest:
        yield item


def _usage(outputs: Iterable[RequestOutput]) -> Json:
    outputs = list(outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    sampled = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }
