"""Translate answers of the chat endpoint to those of Anthropic's Messages API, whole and as events.

A whole answer is what the events of a stream with one chunk add up to, so both are the same.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from .errors import error_json

Json = dict[str, Any]


class MessagesTranslation:
    """Translate the answer of one request."""

    id_prefix = "msg_"

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def whole(self, answer: Json) -> Json:
        """Return the message of an answer that is not streamed."""
        events = self.events(answer)
        for choice in answer["choices"]:
            events.next({"choices": [{**choice, "delta": choice["message"]}], "usage": answer["usage"]})
        events.end()
        return events.message

    def events(self, head: Json) -> MessagesEvents:
        """Return the translation of a stream."""
        return MessagesEvents(head, self._max_tokens)


class MessagesEvents:
    """Write the events of one message.

    One content block is open at a time: reasoning, a text or a tool call. What the model writes after a call
    is a block of its own.

    Attributes:
        message: the message so far.
    """

    def __init__(self, head: Json, max_tokens: int) -> None:
        self.message: Json = {
            "id": head["id"],
            "type": "message",
            "role": "assistant",
            "model": head["model"],
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage({"prompt_tokens": 0, "completion_tokens": 0}),
        }
        self._max_tokens = max_tokens
        self._blocks: list[Json] = self.message["content"]
        self._started = False
        self._is_open = False  # the last block
        self._call_index: int | None = None  # the open call's in the chat's stream
        self._arguments = ""  # of the open call
        self._finish_reason: str | None = None
        self._stop: str | int | None = None  # string or token

    def next(self, chunk: Json) -> list[Json]:
        """Return the events of the next chunk."""
        events: list[Json] = []
        if chunk.get("usage"):
            self.message["usage"] = _usage(chunk["usage"])
        if not self._started:
            self._started = True
            usage = {**self.message["usage"], "output_tokens": 0}
            message = {**self.message, "content": [], "usage": usage}
            events += [{"type": "message_start", "message": message}, {"type": "ping"}]
        for choice in chunk["choices"]:
            delta = choice["delta"]
            calls = list(delta.get("tool_calls") or ())
            while calls and self._goes_on(calls[0]):  # before the text of a call that turns out to be none
                events += self._call(calls.pop(0))
            if text := delta.get("reasoning_content"):
                events += self._think(text)
            if text := delta.get("content"):
                events += self._say(text)
            for call in calls:
                events += self._call(call)
            self._finish_reason = choice["finish_reason"] or self._finish_reason
            self._stop = choice.get("stop_reason")
        return events

    def end(self) -> list[Json]:
        """Return the last events, which say why the message ends."""
        reason, sequence = self._stop_reason()
        self.message.update(stop_reason=reason, stop_sequence=sequence)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return [
            *self._close(),
            {"type": "message_delta", "delta": delta, "usage": self.message["usage"]},
            {"type": "message_stop"},
        ]

    def failed(self, message: str) -> list[Json]:
        """Return the event of an error."""
        return [error_json("/v1/messages", 500, message)]

    def _stop_reason(self) -> tuple[str, str | None]:
        if self._finish_reason == "length":
            full = self.message["usage"]["output_tokens"] >= self._max_tokens
            return "max_tokens" if full else "model_context_window_exceeded", None
        if any(block["type"] == "tool_use" for block in self._blocks):
            return "tool_use", None
        if isinstance(self._stop, str):
            return "stop_sequence", self._stop
        return "end_turn", None

    def _open(self, block: Json) -> list[Json]:
        events = self._close()
        self._blocks.append(block)
        self._is_open = True
        return [
            *events,
            {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": {**block}},
        ]

    def _is(self, kind: str) -> bool:
        return self._is_open and self._blocks[-1]["type"] == kind

    def _delta(self, kind: str, name: str, value: str) -> Json:
        delta = {"type": kind, name: value}
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _think(self, text: str) -> list[Json]:
        block = {"type": "thinking", "thinking": "", "signature": ""}
        events = [] if self._is("thinking") else self._open(block)
        self._blocks[-1]["thinking"] += text
        return [*events, self._delta("thinking_delta", "thinking", text)]

    def _say(self, text: str) -> list[Json]:
        events = [] if self._is("text") else self._open({"type": "text", "text": "", "citations": None})
        self._blocks[-1]["text"] += text
        return [*events, self._delta("text_delta", "text", text)]

    def _goes_on(self, call: Json) -> bool:
        """Return whether a call of a chunk is the open one."""
        return self._is("tool_use") and call.get("index", call.get("id")) == self._call_index

    def _call(self, call: Json) -> list[Json]:
        function, events = call["function"], []
        if not self._goes_on(call):
            self._call_index = call.get("index", call.get("id"))
            block = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}
            events = self._open(block)
            self._arguments = ""
        if arguments := function.get("arguments"):
            self._arguments += arguments
            events.append(self._delta("input_json_delta", "partial_json", arguments))
        return events

    def _close(self) -> list[Json]:
        if not self._is_open:
            return []
        self._is_open = False
        if self._blocks[-1]["type"] == "tool_use":
            self._blocks[-1]["input"] = _object_of(self._arguments)
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]


def _object_of(arguments: str) -> Json:
    """Return a call's arguments, without what is incomplete, as the SDK reads those of a stream."""
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(usage: Json) -> Json:
    """Return the numbers of tokens; those of the prompt that were cached are counted apart."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }
