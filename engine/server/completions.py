"""From requests of the two completion endpoints to their responses, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ..engine import Prompt
from ..outputs import RequestOutput
from ..sampling_params import SamplingParams
from .async_engine import AsyncEngine
from .metrics import Metrics
from .protocol import StreamOptions, error_body

Json = dict[str, Any]
_Positioned = tuple[int, RequestOutput]  # which prompt's output it is


@dataclass(frozen=True)
class Style:
    """How one of the endpoints writes its answers."""

    id_prefix: str
    object: str
    chunk_object: str
    choice: Callable[[int, str, str | None], Json]  # index, text, finish reason
    delta: Callable[[int, str, str | None], Json]
    opening: Callable[[int], Json] | None = None  # a first chunk of every choice


def _text_choice(index: int, text: str, finish_reason: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _chat_choice(index: int, text: str, finish_reason: str | None) -> Json:
    message = {"role": "assistant", "content": text}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}


def _chat_delta(index: int, text: str, finish_reason: str | None) -> Json:
    delta = {"content": text} if text else {}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _chat_opening(index: int) -> Json:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


TEXT = Style("cmpl-", "text_completion", "text_completion", _text_choice, _text_choice)
CHAT = Style(
    "chatcmpl-", "chat.completion", "chat.completion.chunk", _chat_choice, _chat_delta, _chat_opening
)


class Completions:
    """Answers completion requests with an engine.

    Args:
        model_name: what answers say the model is.
    """

    def __init__(self, engine: AsyncEngine, metrics: Metrics, model_name: str) -> None:
        self._engine = engine
        self._metrics = metrics
        self._model_name = model_name

    async def respond(
        self,
        request: Request,
        style: Style,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        stream: bool,
        options: StreamOptions | None,
    ) -> Response:
        """Run one request of several prompts, each with ``params.n`` choices.

        Raises:
            ValueError: a prompt is malformed or can never run.
            EngineDeadError: the engine has failed or stops.
        """
        head: Json = {
            "id": f"{style.id_prefix}{uuid.uuid4().hex}",
            "object": style.chunk_object if stream else style.object,
            "created": int(time.time()),
            "model": self._model_name,
        }
        outputs = self._run(head["id"], prompts, params)
        if not stream:
            latest = await _unless_disconnected(request, _collect(outputs))
            return (
                Response(status_code=499)
                if latest is None
                else JSONResponse(_whole(head, style, latest, params))
            )
        # A refusal comes with the first output, while the status can still say so.
        first = await _unless_disconnected(request, anext(outputs))
        if first is None:
            return Response(status_code=499)
        events = _events(head, style, first, outputs, params, options or StreamOptions(), len(prompts))
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    async def _run(
        self, request_id: str, prompts: Sequence[Prompt], params: SamplingParams
    ) -> AsyncGenerator[_Positioned, None]:
        """The outputs of all prompts as they come, each with its prompt's position."""
        arrived: asyncio.Queue[_Positioned | Exception] = asyncio.Queue()

        async def run_one(position: int, prompt: Prompt) -> None:
            timer = self._metrics.request()
            try:
                stream = self._engine.generate(f"{request_id}-{position}", prompt, params)
                async with contextlib.aclosing(stream):
                    async for output in stream:
                        timer.observe(output)
                        arrived.put_nowait((position, output))
            except Exception as error:
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(run_one(i, prompt)) for i, prompt in enumerate(prompts)]
        unfinished = len(tasks)
        try:
            while unfinished:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= item[1].finished
                yield item
        finally:  # one that fails, or a client that leaves, ends them all
            for task in tasks:
                task.cancel()


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


def _whole(head: Json, style: Style, latest: dict[int, RequestOutput], params: SamplingParams) -> Json:
    ordered = [latest[position] for position in sorted(latest)]
    choices = [
        style.choice(position * params.n + one.index, one.text, one.finish_reason)
        for position, output in enumerate(ordered)
        for one in output.outputs
    ]
    return {**head, "choices": choices, "usage": _usage(ordered)}


async def _events(
    head: Json,
    style: Style,
    first: _Positioned,
    rest: AsyncGenerator[_Positioned, None],
    params: SamplingParams,
    options: StreamOptions,
    num_prompts: int,
) -> AsyncIterator[str]:
    """The lines of a stream of server-sent events."""
    num_choices = num_prompts * params.n
    shown = [0] * num_choices
    ended = [False] * num_choices
    latest: dict[int, RequestOutput] = {}

    def event(choices: list[Json], **more: Any) -> str:
        return f"data: {json.dumps({**head, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    async with contextlib.aclosing(rest):
        try:
            if style.opening is not None:
                for index in range(num_choices):
                    yield event([style.opening(index)])
            async for position, output in _chain(first, rest):
                latest[position] = output
                for one in output.outputs:
                    index = position * params.n + one.index
                    text = one.text[shown[index] :]
                    if ended[index] or not (text or one.finish_reason):
                        continue
                    shown[index], ended[index] = len(one.text), one.finish_reason is not None
                    yield event([style.delta(index, text, one.finish_reason)])
            if options.include_usage:
                yield event([], usage=_usage(list(latest.values())))
        except Exception as error:  # the status is sent: all that is left is to say it in the stream
            yield f"data: {json.dumps(error_body(str(error), 'server_error'))}\n\n"
    yield "data: [DONE]\n\n"


async def _chain(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for item in rest:
        yield item


def _usage(outputs: Sequence[RequestOutput]) -> Json:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    sampled = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}
