"""From requests of the two completion endpoints to their responses, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from transformers import PreTrainedTokenizerBase

from ..outputs import RequestOutput
from ..prompts import Prompt
from ..sampling_params import SamplingParams
from .async_engine import AsyncEngine
from .choices import CHAT, Choice, Style
from .limits import BusyError
from .logprobs import for_prompt
from .metrics import Metrics
from .protocol import ChatCompletionRequest, CompletionRequest, Wanted, error_body

Json = dict[str, Any]
# Clients that split lines as `str.splitlines` does take these for ends; JSON escapes the others of its kind.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
_Positioned = tuple[int, RequestOutput]  # which prompt's output it is


class Completions:
    """Answers completion requests with an engine.

    Args:
        tokenizer: the engine's, or a copy for the thread of the server.
        model_name: what answers say the model is.
        max_waiting_requests: maximum number of prompts that wait for their first output.
        in_thread: runs what takes long beside the server, with a tokenizer of its own.
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
        """Raise BusyError where so many further prompts would be too many that wait."""
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
    ) -> Response:
        """Run one request of several prompts, each with ``params.n`` choices.

        Raises:
            ValueError: a prompt is malformed or can never run.
            BusyError: with them too many would wait.
            StepFailedError: the engine cannot run one of them.
            EngineDeadError: the engine has failed or stops.
        """
        wanted = body.wanted()
        if body.cache_salt is not None:
            prompts = [_salted(prompt, body.cache_salt) for prompt in prompts]
        head: Json = {
            "id": f"{style.id_prefix}{uuid.uuid4().hex}",
            "object": style.chunk_object if wanted.stream else style.object,
            "created": int(time.time()),
            "model": self._model_name,
        }
        outputs = self._run(head["id"], prompts, params, body.priority)

        def choices(tokenizer: PreTrainedTokenizerBase) -> list[Choice]:
            count = len(prompts) * params.n
            return [Choice(style, index, tokenizer, params, wanted) for index in range(count)]

        if not wanted.stream:
            latest = await _unless_disconnected(request, _collect(outputs))
            if latest is None:
                return Response(status_code=499)

            def write(tokenizer: PreTrainedTokenizerBase) -> bytes:
                return _whole(head, style, choices(tokenizer), latest, params, wanted)

            # Log probabilities can be megabytes.
            large = wanted.logprobs is not None or wanted.prompt_logprobs is not None
            written = await self._in_thread(write) if large else write(self._tokenizer)
            return Response(written, media_type="application/json")
        # A refusal comes with the first output, while the status can still say so.
        first = await _unless_disconnected(request, anext(outputs))
        if first is None:
            return Response(status_code=499)
        events = _events(head, choices(self._tokenizer), first, outputs, params, wanted)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    async def _run(
        self, request_id: str, prompts: Sequence[Prompt], params: SamplingParams, priority: int
    ) -> AsyncGenerator[_Positioned, None]:
        """The outputs of all prompts as they come, each with its prompt's position.

        Of outputs that come faster than they are taken only the newest is kept: it has all tokens of those
        before it, and a client that does not read would pile them up.
        """
        self.check_room(len(prompts))
        waiting = set(range(len(prompts)))  # positions without an output
        self._num_waiting += len(prompts)

        def waits_no_more(position: int, task: object = None) -> None:
            if position in waiting:
                waiting.remove(position)
                self._num_waiting -= 1

        newest: dict[int, RequestOutput] = {}  # by position
        arrived: asyncio.Queue[int | Exception] = asyncio.Queue()  # positions with a newest output

        async def run_one(position: int, prompt: Prompt) -> None:
            timer = self._metrics.request(params.n)
            try:
                stream = self._engine.generate(f"{request_id}-{position}", prompt, params, priority)
                async with contextlib.aclosing(stream):
                    async for output in stream:
                        waits_no_more(position)
                        timer.observe(output)
                        if position not in newest:
                            arrived.put_nowait(position)
                        newest[position] = output
            except Exception as error:
                if not isinstance(error, ValueError):  # a refusal, of what never was a request
                    timer.end("error")
                arrived.put_nowait(error)
            except asyncio.CancelledError:
                timer.end("abort")
                raise

        tasks = [asyncio.create_task(run_one(i, prompt)) for i, prompt in enumerate(prompts)]
        for position, task in enumerate(tasks):  # also of one that is cancelled before it runs
            task.add_done_callback(functools.partial(waits_no_more, position))
        unfinished = len(tasks)
        try:
            while unfinished:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                output = newest.pop(item)
                unfinished -= output.finished
                yield item, output
        finally:  # one that fails, or a client that leaves, ends them all
            for task in tasks:
                task.cancel()


def _salted(prompt: Prompt, salt: str) -> Prompt:
    return {**({"prompt": prompt} if isinstance(prompt, str) else prompt), "cache_salt": salt}


async def _collect(outputs: AsyncGenerator[_Positioned, None]) -> dict[int, RequestOutput]:
    async with contextlib.aclosing(outputs):
        return {position: output async for position, output in outputs}


async def _unless_disconnected(request: Request, work: Any) -> Any:
    """The result of ``work``, or None after cancelling it because the client has gone."""

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
) -> bytes:
    ordered = [latest[position] for position in sorted(latest)]
    found = [  # one by one, as no other thread runs while JSON is written
        _json(choices[position * params.n + one.index].whole(output, one))
        for position, output in enumerate(ordered)
        for one in output.outputs
    ]
    more: Json = {"usage": _usage(ordered)}
    if wanted.prompt_logprobs is not None and style is CHAT:
        more["prompt_logprobs"] = for_prompt(ordered[0].prompt_logprobs or [], wanted.prompt_logprobs)
    return f'{_json(head)[:-1]},"choices":[{",".join(found)}],{_json(more)[1:]}'.encode()


def _json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def _events(
    head: Json,
    choices: Sequence[Choice],
    first: _Positioned,
    rest: AsyncGenerator[_Positioned, None],
    params: SamplingParams,
    wanted: Wanted,
) -> AsyncIterator[str]:
    """The lines of a stream of server-sent events."""
    position, output = first
    latest = {position: replace(output, outputs=[])}  # as far as they are sent

    def event(choices: list[Json]) -> str:
        chunk = {**head, "choices": choices}
        if wanted.continuous_usage or not choices:
            chunk["usage"] = _usage(latest.values())
        elif wanted.include_usage:
            chunk["usage"] = None  # of all chunks but the last one, as OpenAI's clients expect
        return _event(chunk)

    async with contextlib.aclosing(rest):
        try:
            for choice in choices:
                if opening := choice.opening():
                    yield event([opening])
            async for position, output in _chain(first, rest):
                latest[position] = output
                for one in output.outputs:
                    if piece := choices[position * params.n + one.index].next(output, one):
                        yield event([piece])
            if wanted.include_usage:
                yield event([])
        except Exception as error:  # the status is sent: all that is left is to say it in the stream
            yield _event(error_body(str(error), "server_error"))
    yield "data: [DONE]\n\n"


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False).translate(_LINE_ENDS)}\n\n"


async def _chain(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for item in rest:
        yield item


def _usage(outputs: Iterable[RequestOutput]) -> Json:
    outputs = list(outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    sampled = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}
