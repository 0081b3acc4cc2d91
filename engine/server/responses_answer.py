"""Translate answers of the chat endpoint to those of OpenAI's Responses API, whole and as events.

A whole answer is what the events of a stream with one chunk add up to, so both are the same.
"""

from __future__ import annotations

import copy
import time
import uuid
from typing import Any

from pydantic import BaseModel

from ..sampling_params import SamplingParams
from .event_stream import encode
from .responses_request import ResponsesRequest

Json = dict[str, Any]


class ResponsesTranslation:
    """Translate the answer of one request.

    Args:
        params: the settings with which it runs.

    Raises:
        ValueError: the response, which has the settings of the request, could not be sent.
    """

    id_prefix = "resp_"

    def __init__(self, request: ResponsesRequest, params: SamplingParams) -> None:
        self._request = request
        self._params = params
        try:
            encode(self._response({"id": "", "created": 0, "model": ""})).encode()
        except ValueError as error:  # half of a surrogate pair, or a number that JSON lacks
            raise ValueError(f"the response would have the settings of the request: {error}") from error

    def whole(self, answer: Json) -> Json:
        """Return the response of an answer that is not streamed."""
        events = self.events(answer)
        for choice in answer["choices"]:
            events.next({"choices": [{**choice, "delta": choice["message"]}]})
        events.next({"choices": [], "usage": answer["usage"]})
        return events.end()[-1]["response"]

    def events(self, head: Json) -> ResponsesEvents:
        """Return the translation of a stream."""
        return ResponsesEvents(self._response(head))

    def _response(self, head: Json) -> Json:
        """Return the response as it is at its start, with the settings of the request."""
        request = self._request
        return {
            "id": head["id"],
            "object": "response",
            "created_at": head["created"],
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata,
            "model": head["model"],
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": _members(request.reasoning),
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": False,  # answers are never kept
            "temperature": self._params.temperature,
            "text": {"format": _members(request.text.format), "verbosity": "medium"},
            "tool_choice": request.tool_choice.echo(),
            "tools": [{"parameters": None, "strict": None, **_members(tool)} for tool in request.tools],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": self._params.top_p,
            "truncation": request.truncation,
            "usage": None,
            "user": request.user,
        }


class ResponsesEvents:
    """Write the events of one response.

    One item of the output is open at a time: reasoning, a message or a function call. What the model writes
    after a call is a message of its own.

    Args:
        response: the response at its start; its output and status are filled.
    """

    def __init__(self, response: Json) -> None:
        self._response = response
        self._output: list[Json] = response["output"]
        self._started = False
        self._is_open = False  # the last item
        self._call_index: int | None = None  # the open call's in the chat's stream
        self._new_logprobs: list[Json] = []  # not sent yet
        self._finish_reason: str | None = None
        self._number = 0

    def next(self, chunk: Json) -> list[Json]:
        """Return the events of the next chunk."""
        events = []
        if not self._started:
            self._started = True
            events += [
                self._event(f"response.{name}", response={**self._response, "output": []})
                for name in ("created", "in_progress")
            ]
        for choice in chunk["choices"]:
            delta = choice["delta"]
            self._new_logprobs += (choice.get("logprobs") or {}).get("content") or ()
            calls = list(delta.get("tool_calls") or ())
            while calls and self._goes_on(calls[0]):  # before the text of a call that turns out to be none
                events += self._call(calls.pop(0))
            if text := delta.get("reasoning_content"):
                events += self._reason(text)
            if text := delta.get("content"):
                events += self._say(text)
            for call in calls:
                events += self._call(call)
            self._finish_reason = choice["finish_reason"] or self._finish_reason
        if chunk.get("usage"):
            self._response["usage"] = _usage(chunk["usage"])
        return events

    def end(self) -> list[Json]:
        """Return the last events: of the open item, and of the response with the whole output."""
        complete = self._finish_reason != "length"
        status = "completed" if complete else "incomplete"
        events = [] if self._output else self._open_message()
        events += self._close(status)
        self._response["status"] = status
        if complete:
            self._response["completed_at"] = int(time.time())
        else:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, self._event(f"response.{status}", response=self._response)]

    def failed(self, message: str) -> list[Json]:
        """Return the event of a response that ends by an error."""
        if self._is_open:
            self._output[-1]["status"] = "incomplete"
        self._response.update(status="failed", error={"code": "server_error", "message": message})
        return [self._event("response.failed", response=self._response)]

    def _event(self, kind: str, **members: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **members}

    def _item_event(self, kind: str, *, content: bool = False, **members: Any) -> Json:
        """Return an event of the open item; ``content``: of its content."""
        if content:
            members = {"content_index": 0, **members}
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(f"response.{kind}", **place, **members)

    def _open(self, item: Json, part: Json | None = None) -> list[Json]:
        """Open an item whose content, if it has any, is one part."""
        events = self._close("completed")
        self._output.append(item)
        self._is_open = True
        shown = {**item, "content": []} if part is not None else item
        events.append(
            self._event("response.output_item.added", output_index=len(self._output) - 1, item={**shown})
        )
        if part is not None:
            item["content"] = [part]
            events.append(self._item_event("content_part.added", content=True, part=copy.deepcopy(part)))
        return events

    def _is(self, kind: str) -> bool:
        return self._is_open and self._output[-1]["type"] == kind

    def _reason(self, text: str) -> list[Json]:
        events = []
        if not self._is("reasoning"):
            item = {"id": _new_id("rs"), "type": "reasoning", "summary": [], "status": "in_progress"}
            events = self._open(item, {"type": "reasoning_text", "text": ""})
        self._output[-1]["content"][0]["text"] += text
        return [*events, self._item_event("reasoning_text.delta", content=True, delta=text)]

    def _open_message(self) -> list[Json]:
        item = {"id": _new_id("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
        return self._open(item, {"type": "output_text", "text": "", "annotations": [], "logprobs": []})

    def _say(self, text: str) -> list[Json]:
        events = [] if self._is("message") else self._open_message()
        part = self._output[-1]["content"][0]
        part["text"] += text
        return [
            *events,
            self._item_event(
                "output_text.delta", content=True, delta=text, logprobs=self._take_logprobs(part)
            ),
        ]

    def _take_logprobs(self, part: Json) -> list[Json]:
        """Move the log probabilities that were not sent yet to the part with their text."""
        new, self._new_logprobs = self._new_logprobs, []
        part["logprobs"] += new
        return [_without_bytes(entry) for entry in new]

    def _goes_on(self, call: Json) -> bool:
        """Return whether a call of a chunk is the open one."""
        return self._is("function_call") and call.get("index", call.get("id")) == self._call_index

    def _call(self, call: Json) -> list[Json]:
        function, events = call["function"], []
        if not self._goes_on(call):
            self._call_index = call.get("index", call.get("id"))
            item = {
                "id": _new_id("fc"),
                "type": "function_call",
                "call_id": call["id"],
                "name": function["name"],
                "arguments": "",
                "status": "in_progress",
            }
            events = self._open(item)
        if arguments := function.get("arguments"):
            self._output[-1]["arguments"] += arguments
            events.append(self._item_event("function_call_arguments.delta", delta=arguments))
        return events

    def _close(self, status: str) -> list[Json]:
        """Close the open item, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        item, events = self._output[-1], []
        item["status"] = status
        if item["type"] == "function_call":
            events.append(
                self._item_event(
                    "function_call_arguments.done", name=item["name"], arguments=item["arguments"]
                )
            )
        else:
            part = item["content"][0]
            done = {"text": part["text"]}
            if item["type"] == "message":
                self._take_logprobs(part)
                done["logprobs"] = [_without_bytes(entry) for entry in part["logprobs"]]
            kind = "output_text.done" if item["type"] == "message" else "reasoning_text.done"
            events.append(self._item_event(kind, content=True, **done))
            events.append(self._item_event("content_part.done", content=True, part={**part}))
        done_event = self._event(
            "response.output_item.done", output_index=len(self._output) - 1, item={**item}
        )
        return [*events, done_event]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _members(model: BaseModel) -> Json:
    return model.model_dump(by_alias=True, exclude_none=True)


def _without_bytes(entry: Json) -> Json:
    """Return a token's log probabilities as events have them."""
    top = [{"token": each["token"], "logprob": each["logprob"]} for each in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": top}


def _usage(usage: Json) -> Json:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": usage["total_tokens"],
    }
