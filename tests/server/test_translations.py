"""Answers of the chat endpoint as those of the Responses API and of Anthropic's, by chunks made by hand.

The clients' own types and accumulators say what is right.
"""

from __future__ import annotations

import json
import random
from typing import Any, get_args

import anthropic.types
import openai.types.responses
import pydantic
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState

from cupaged.engine import SamplingParams
from cupaged.engine.server.anthropic_answer import MessagesTranslation
from cupaged.engine.server.responses_answer import ResponsesTranslation
from cupaged.engine.server.responses_request import ResponsesRequest

HEAD = {"id": "x_1", "object": "chat.completion", "created": 7, "model": "tiny"}
USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 5,
    "total_tokens": 17,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
BEYOND_TYPES = {"store", "name"}  # the API has the one, earlier SDKs the other (in arguments.done)


def strict(kind: Any, data: Any) -> Any:
    """Validate without any conversion, and refuse members that the type does not have."""
    value = pydantic.TypeAdapter(kind).validate_python(data, strict=True)
    check_members(value)
    return value


def check_members(value: Any) -> None:
    if isinstance(value, pydantic.BaseModel):
        assert not set(value.model_extra or {}) - BEYOND_TYPES, (type(value), value.model_extra)
        for name in type(value).model_fields:
            check_members(getattr(value, name))
    elif isinstance(value, list):
        for each in value:
            check_members(each)


def strict_event(event: dict) -> Any:
    """Validate an event of the Responses API as the type that its name stands for."""
    kinds = get_args(get_args(openai.types.responses.ResponseStreamEvent)[0])
    kind = next(k for k in kinds if get_args(k.model_fields["type"].annotation) == (event["type"],))
    return strict(kind, json.loads(json.dumps(event)))


def entry(token: str) -> dict:
    """A token's log probabilities as the chat endpoint writes them."""
    likely = {"token": token, "logprob": -0.5, "bytes": list(token.encode())}
    return {**likely, "top_logprobs": [likely]}


class Drawn:
    """One answer of the chat endpoint, whole and as the chunks of a stream."""

    def __init__(self, seed: int, late_text: bool = False) -> None:
        draw = self._draw = random.Random(seed)
        self.reasoning = self._text() if draw.random() < 0.4 else ""
        self.text = self._text() if draw.random() < 0.7 else ""
        self.calls = [
            (f"call_{index}", draw.choice(["look", "write"]), self._arguments())
            for index in range(draw.choice([0, 0, 1, 1, 2, 3]))
        ]
        self.late_text = self._text() if late_text else ""
        self.logprobs = not (self.reasoning or self.calls) and draw.random() < 0.5
        self.finish_reason = draw.choice(["stop", "length"])
        if self.calls and self.finish_reason == "stop":
            self.finish_reason = draw.choice(["stop", "tool_calls"])
        if self.calls and self.finish_reason == "length" and not late_text:  # cut off
            call_id, name, arguments = self.calls[-1]
            self.calls[-1] = call_id, name, arguments[: draw.randint(0, len(arguments))]
        self.stop_reason = draw.choice([None, "###", 5]) if self.finish_reason == "stop" else None

    def _text(self) -> str:
        alphabet = ["a", "Ü", " ", "\n", "\u2028", "🙂", '"', "\\", "{"]
        return "".join(self._draw.choice(alphabet) for _ in range(self._draw.randint(1, 12)))

    def _arguments(self) -> str:
        return json.dumps(
            {self._text(): self._draw.choice([1, self._text(), [True, None], {"b": 2.5}]) for _ in range(2)},
            ensure_ascii=self._draw.random() < 0.5,
        )

    def _split(self, text: str) -> list[str]:
        cuts = sorted(self._draw.randint(0, len(text)) for _ in range(self._draw.randint(0, 4)))
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)]) if a < b]

    def whole(self) -> dict:
        message: dict[str, Any] = {"role": "assistant", "content": self.text + self.late_text or None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for call_id, name, arguments in self.calls
            ]
        return {**HEAD, "choices": [self._choice({"message": message}, self.text)], "usage": USAGE}

    def chunks(self) -> list[dict]:
        """The chunks of a stream, in which some deltas have several members."""
        deltas: list[dict] = [{"reasoning_content": part} for part in self._split(self.reasoning)]
        deltas += [{"content": part} for part in self._split(self.text)]
        for index, (call_id, name, arguments) in enumerate(self.calls):
            parts = self._split(arguments)
            first = parts.pop(0) if parts and self._draw.random() < 0.5 else ""
            opening = {"index": index, "id": call_id, "type": "function"}
            deltas.append({"tool_calls": [{**opening, "function": {"name": name, "arguments": first}}]})
            deltas += [{"tool_calls": [{"index": index, "function": {"arguments": p}}]} for p in parts]
        deltas += [{"content": part} for part in self._split(self.late_text)]
        joined: list[dict] = []
        for delta in deltas:
            if joined and self._draw.random() < 0.3 and self._follows(joined[-1], delta):
                joined[-1] = {
                    name: joined[-1].get(name, type(value)()) + value if name in delta else value
                    for name, value in {**joined[-1], **delta}.items()
                }
            else:
                joined.append(delta)
        joined.append({}) if not joined or self._draw.random() < 0.5 else None
        chunks = [
            {"choices": [self._choice({"delta": d}, d.get("content", ""), d is joined[-1])]} for d in joined
        ]
        opening = {"choices": [self._choice({"delta": {"role": "assistant", "content": ""}}, "", False)]}
        usage = {**USAGE, "completion_tokens": 0} if self._draw.random() < 0.5 else None
        return [{**opening, "usage": usage}, *chunks, {"choices": [], "usage": USAGE}]

    @staticmethod
    def _follows(before: dict, delta: dict) -> bool:
        """Whether both in one delta are read in their order: reasoning, text, calls."""
        order = ["reasoning_content", "content", "tool_calls"]
        return max(map(order.index, before)) <= min(map(order.index, delta))

    def _choice(self, content: dict, text: str, last: bool = True) -> dict:
        logprobs = {"content": [entry(c) for c in text], "refusal": None} if self.logprobs else None
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": None}
        if last:
            choice.update(finish_reason=self.finish_reason, stop_reason=self.stop_reason)
        return choice


def translated(seed: int) -> ResponsesTranslation:
    functions = [
        {"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("look", "write")
    ]
    request = {"model": "tiny", "input": "x", "tools": functions, "include": ["message.output_text.logprobs"]}
    return ResponsesTranslation(ResponsesRequest.model_validate(request), SamplingParams())


def without_ids(response: dict) -> dict:
    """A response without what differs between two of the same content."""
    output = [{k: v for k, v in item.items() if k != "id"} for item in response["output"]]
    return {**response, "output": output, "completed_at": response["completed_at"] is not None}


def test_a_response_of_a_stream_is_that_of_the_whole_answer(seed):
    drawn = Drawn(seed)
    whole = translated(seed).whole(drawn.whole())
    events = translated(seed).events(HEAD)
    written = [event for chunk in drawn.chunks() for event in events.next(chunk)] + events.end()
    written = json.loads(json.dumps(written))
    strict(openai.types.responses.Response, json.loads(json.dumps(whole)))
    assert without_ids(written[-1]["response"]) == without_ids(whole)
    assert [event["sequence_number"] for event in written] == list(range(len(written)))
    assert [event["type"] for event in written[:2]] == ["response.created", "response.in_progress"]
    state = ResponseStreamState(input_tools=omit, text_format=omit)
    reasoning, done = "", []
    for event in written:
        state.handle_event(strict_event(event))
        if event["type"] == "response.reasoning_text.delta":
            reasoning += event["delta"]
        if event["type"] == "response.output_item.done":
            done.append(event["item"])
    assert done == written[-1]["response"]["output"]
    kept = [item["content"][0]["text"] for item in done if item["type"] == "reasoning"]
    assert reasoning == "".join(kept) == drawn.reasoning
    snapshot = state._ResponseStreamState__current_snapshot
    for item, rebuilt in zip(done, snapshot.output, strict=True):
        assert item["id"] == rebuilt.id
        if item["type"] == "message":
            assert item["content"][0]["text"] == rebuilt.content[0].text == drawn.text
        if item["type"] == "function_call":
            assert (item["name"], item["arguments"]) == (rebuilt.name, rebuilt.arguments)
    calls = [item for item in done if item["type"] == "function_call"]
    assert [(c["call_id"], c["name"], c["arguments"]) for c in calls] == drawn.calls
    incomplete = drawn.finish_reason == "length"
    assert done[-1]["status"] == whole["status"] == ("incomplete" if incomplete else "completed")
    assert all(item["status"] == "completed" for item in done[:-1])
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if incomplete else None)
    if drawn.logprobs:
        part = next(item for item in done if item["type"] == "message")["content"][0]
        assert "".join(each["token"] for each in part["logprobs"]) == drawn.text
        sent = [e["logprobs"] for e in written if e["type"] == "response.output_text.delta"]
        assert [each["token"] for part in sent for each in part] == list(drawn.text)


def test_a_message_of_a_stream_is_that_of_the_whole_answer(seed):
    drawn = Drawn(seed)
    max_tokens = random.Random(seed).choice([5, 6])
    whole = MessagesTranslation(max_tokens).whole(drawn.whole())
    events = MessagesTranslation(max_tokens).events(HEAD)
    written = [event for chunk in drawn.chunks() for event in events.next(chunk)] + events.end()
    written = json.loads(json.dumps(written))
    message, buffers = None, {}
    for event in written:
        if event["type"] == "ping":
            continue
        value = strict(anthropic.types.RawMessageStreamEvent, event)
        message = accumulate_event(event=value, current_snapshot=message, json_bufs=buffers)
    expected = strict(anthropic.types.Message, json.loads(json.dumps(whole)))
    assert message.to_dict(exclude_none=True) == expected.to_dict(exclude_none=True)
    blocks = [event for event in written if event["type"].startswith("content_block")]
    for index in range(len(whole["content"])):  # one after the other
        first, *deltas, last = [event["type"] for event in blocks if event["index"] == index]
        assert (first, last) == ("content_block_start", "content_block_stop")
        assert set(deltas) <= {"content_block_delta"}
    assert [event["index"] for event in blocks] == sorted(event["index"] for event in blocks)
    assert [block["type"] for block in whole["content"]] == (
        ["thinking"] * bool(drawn.reasoning) + ["text"] * bool(drawn.text) + ["tool_use"] * len(drawn.calls)
    )
    uses = [block for block in whole["content"] if block["type"] == "tool_use"]
    if drawn.finish_reason == "length":
        assert whole["stop_reason"] == ("max_tokens" if max_tokens == 5 else "model_context_window_exceeded")
    else:
        assert [block["input"] for block in uses] == [json.loads(call[2]) for call in drawn.calls]
        if drawn.calls:
            assert whole["stop_reason"] == "tool_use"
        elif drawn.stop_reason == "###":
            assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "###")
        else:
            assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)
    usage = {"input_tokens": 8, "cache_read_input_tokens": 4, "output_tokens": 5}
    assert whole["usage"] == {**usage, "cache_creation_input_tokens": 0}


def test_text_after_a_call_is_a_part_of_its_own(seed):
    drawn = Drawn(seed, late_text=True)
    events, blocks = translated(seed).events(HEAD), MessagesTranslation(9).events(HEAD)
    for chunk in drawn.chunks():
        for event in events.next(chunk):
            strict_event(event)
        blocks.next(chunk)
    blocks.end()
    output = [strict_event(event) for event in events.end()][-1].response.output
    texts = [item.content[0].text for item in output if item.type == "message"]
    assert "".join(texts) == drawn.text + drawn.late_text
    assert output[-1].type == "message"
    assert [item.arguments for item in output if item.type == "function_call"] == [c[2] for c in drawn.calls]
    written = [block["text"] for block in blocks.message["content"] if block["type"] == "text"]
    assert "".join(written) == drawn.text + drawn.late_text


@pytest.mark.parametrize("api", ["responses", "messages"])
def test_the_last_chunk_of_a_cut_call_has_arguments_and_its_text(api):
    """As the chat endpoint sends it: the call goes on, then its text as content."""
    start = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": '{"a": '}}
    rest = {"index": 0, "function": {"arguments": '"b'}}
    deltas = [{"tool_calls": [start]}, {"tool_calls": [rest], "content": 'f {"a": "b'}]
    if api == "responses":
        request = ResponsesRequest.model_validate({"model": "tiny", "input": "Hi"})
        events = ResponsesTranslation(request, SamplingParams()).events(HEAD)
    else:
        events = MessagesTranslation(9).events(HEAD)
    for delta in deltas:
        events.next({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    end = events.end()
    if api == "responses":
        call, message = end[-1]["response"]["output"]
        assert call["arguments"] == '{"a": "b'
        assert message["content"][0]["text"] == 'f {"a": "b'
    else:
        call, text = events.message["content"]
        assert call["input"] == {}  # without what is incomplete
        assert text["text"] == 'f {"a": "b'


def test_a_response_that_fails_keeps_what_there_is(seed):
    drawn = Drawn(seed)
    events = translated(seed).events(HEAD)
    chunks = drawn.chunks()
    written = [event for chunk in chunks[: len(chunks) // 2] for event in events.next(chunk)]
    last = strict_event(events.failed("the engine has failed")[0])
    assert (last.type, last.sequence_number) == ("response.failed", len(written))
    assert (last.response.status, last.response.error.message) == ("failed", "the engine has failed")
    sent = "".join(event["delta"] for event in written if event["type"] == "response.output_text.delta")
    assert last.response.output_text == sent


def test_an_answer_without_content():
    """The Responses API has a message without text, Anthropic's no block."""
    answer = {"index": 0, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    whole = {**HEAD, "choices": [{**answer, "message": {"role": "assistant", "content": ""}}], "usage": USAGE}
    response = strict(openai.types.responses.Response, translated(0).whole(whole))
    assert (response.output_text, len(response.output), response.status) == ("", 1, "completed")
    assert strict(anthropic.types.Message, MessagesTranslation(9).whole(whole)).content == []
    chunks = [
        {"choices": [{**answer, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{**answer, "delta": {}}]},
        {"choices": [], "usage": USAGE},
    ]
    events = translated(0).events(HEAD)
    kinds = [event["type"] for chunk in chunks for event in events.next(chunk)]
    kinds += [event["type"] for event in events.end()]
    assert kinds == [
        f"response.{name}"
        for name in (
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed",
        )
    ]


@pytest.mark.parametrize("arguments", ["", "{", '{"a": "x', "[1]", "no JSON"])
def test_arguments_that_are_no_object_are_read_as_far_as_they_go(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    choice = {"index": 0, "message": {"content": None, "tool_calls": [call]}, "finish_reason": "length"}
    message = MessagesTranslation(5).whole({**HEAD, "choices": [choice], "usage": USAGE})
    assert strict(anthropic.types.Message, message).content[0].input == {}
