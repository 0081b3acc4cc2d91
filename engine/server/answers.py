"""Read answers that may have reasoning and tool calls, and write them as choices of a response."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..outputs import CompletionOutput, RequestOutput
from ..sampling_params import SamplingParams
from .choices import Choice, Style
from .protocol import Wanted
from .reasoning import ReasoningParser
from .tools.base import ToolParser
from .tools.events import Arguments, BrokenCall, CallStart, Event, Reasoning, Text, merged

Json = dict[str, Any]


class AnswerReader:
    """Read the text of one answer as it comes.

    Every call has an ID, and calls that are not wanted are left out.

    Args:
        reasoning: splits off the reasoning; None: there is none.
        tools: finds calls; None: there are none.
        call_id: creates an ID for a call.
        one_call: leave out all calls but the first.
        named: the request names the function that must be called.
        include_reasoning: False: leave out the reasoning.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tools: ToolParser | None,
        *,
        call_id: Callable[[], str] = ToolParser.call_id,
        one_call: bool = False,
        named: bool = False,
        include_reasoning: bool = True,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._call_id = call_id
        self._one_call = one_call
        self._named = named
        self._include_reasoning = include_reasoning
        self._num_calls = 0
        self._skipping = False  # whether the current call is left out

    def feed(self, text: str) -> list[Event]:
        """Return what the next piece of the text adds."""
        events: Iterable[Event] = self._reasoning.feed(text) if self._reasoning else [Text(text)]
        return self._read(events)

    def finish(self) -> list[Event]:
        """Return what the end of the text adds."""
        events = self._read(self._reasoning.finish() if self._reasoning else ())
        return merged([*events, *self._wanted(self._tools.finish() if self._tools else ())])

    def finish_reason(self, reason: str | None) -> str | None:
        """Return OpenAI's reason why the answer ended: calls, if the model chose to make some."""
        # With a named function it is "stop", in OpenAI's API as in vLLM.
        return "tool_calls" if reason == "stop" and self._num_calls and not self._named else reason

    def _read(self, events: Iterable[Event]) -> list[Event]:
        read: list[Event] = []
        for event in events:
            if isinstance(event, Reasoning):
                if self._include_reasoning:
                    read.append(event)
            elif isinstance(event, Text) and self._tools:
                read += self._wanted(self._tools.feed(event.text))
            else:
                read.append(event)
        return merged(read)

    def _wanted(self, events: Iterable[Event]) -> Iterable[Event]:
        """Yield the events of the calls that are wanted, with IDs."""
        for event in events:
            if isinstance(event, CallStart):
                self._skipping = self._one_call and self._num_calls > 0
                if not self._skipping:
                    self._num_calls += 1
                    yield CallStart(event.name, event.id or self._call_id())
            elif isinstance(event, BrokenCall):
                if self._skipping:
                    yield Text(event.text)
                else:
                    self._num_calls -= 1
                    yield event
            elif not (isinstance(event, Arguments) and self._skipping):
                yield event


class ReadChoice(Choice):
    """Write one output of a chat, with what a reader finds in its text."""

    def __init__(
        self,
        style: Style,
        index: int,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        wanted: Wanted,
        reader: AnswerReader,
    ) -> None:
        super().__init__(style, index, tokenizer, params, wanted)
        self._reader = reader
        self._num_read = 0  # characters read so far
        self._num_begun = 0  # calls sent so far

    def next(self, output: RequestOutput, completion: CompletionOutput) -> Json | None:
        """Return what is new as a chunk of a stream; None if there is nothing to send."""
        if self._ended:
            return None
        delta = self._delta(self._read(completion))
        if not delta and completion.finish_reason is None:
            return None
        return self._part({"delta": delta}, output, completion)

    def whole(self, output: RequestOutput, completion: CompletionOutput) -> Json:
        """Return the choice of a response that is not streamed."""
        return self._part({"message": _message(self._read(completion))}, output, completion)

    def _read(self, completion: CompletionOutput) -> list[Event]:
        events = self._reader.feed(completion.text[self._num_read :])
        self._num_read = len(completion.text)
        if completion.finish_reason is not None:
            events = merged([*events, *self._reader.finish()])
        return events

    def _part(self, content: Json, output: RequestOutput, completion: CompletionOutput) -> Json:
        part = self._new_part(lambda _: content, output, completion)
        return {**part, "finish_reason": self._reader.finish_reason(completion.finish_reason)}

    def _delta(self, events: Sequence[Event]) -> Json:
        delta: Json = {}
        calls: dict[int, Json] = {}  # by index
        for event in events:
            match event:
                case Reasoning():
                    _add_reasoning(delta, event.text)
                case Text() | BrokenCall():
                    # A call that was sent cannot be taken back; its text is sent too.
                    delta["content"] = delta.get("content", "") + event.text
                case CallStart():
                    calls[self._num_begun] = _call(event, self._num_begun)
                    self._num_begun += 1
                case Arguments():
                    index = self._num_begun - 1
                    call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                    call["function"]["arguments"] += event.text
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta


def _message(events: Iterable[Event]) -> Json:
    """Return an answer as a message."""
    message: Json = {"role": "assistant", "content": ""}
    calls: list[Json] = []
    for event in events:
        match event:
            case Reasoning():
                _add_reasoning(message, event.text)
            case Text():
                message["content"] += event.text
            case BrokenCall():
                calls.pop()
                message["content"] += event.text
            case CallStart():
                calls.append(_call(event))
            case Arguments():
                calls[-1]["function"]["arguments"] += event.text
    if calls:
        message["tool_calls"] = calls
    if not message["content"] and len(message) > 2:
        message["content"] = None
    return message


def _call(event: CallStart, index: int | None = None) -> Json:
    call: Json = {
        "id": event.id,
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }
    return call if index is None else {"index": index, **call}


def _add_reasoning(part: Json, text: str) -> None:
    for name in ("reasoning_content", "reasoning"):  # clients know either of vLLM's names
        part[name] = part.get(name, "") + text
