"""Anthropic's Messages API as the `anthropic` client sees it."""

from __future__ import annotations

import json

import anthropic
import anthropic.types as types
import httpx
import pytest

from cupaged.engine.server.anthropic_request import MessagesRequest

from .conftest import MODEL
from .test_failed_steps import plant
from .test_translations import strict

QUESTION = [{"role": "user", "content": "Tell me about páging"}]
UNANSWERED = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
GREEDY = {"model": MODEL, "max_tokens": 12, "extra_body": {"temperature": 0}}


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as found:
        yield found


def post(server, path="messages", **body) -> httpx.Response:
    body = {"model": MODEL, "max_tokens": 3, "messages": QUESTION, **body}
    headers = {"x-api-key": "none", "anthropic-version": "2023-06-01"}
    return httpx.post(f"{server.url}/v1/{path}", json=body, headers=headers, timeout=60)


def chat_body(**body) -> dict:
    body = {"model": MODEL, "max_tokens": 3, "messages": QUESTION, **body}
    return MessagesRequest.model_validate(body).for_chat()


def test_a_message_is_what_the_chat_answers(claude, client):
    system = [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}]
    system.append({"type": "text", "text": "brief."})
    message = claude.messages.create(messages=QUESTION, system=system, **GREEDY)
    messages = [{"role": "system", "content": "Be\nbrief."}, *QUESTION]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    assert message.content[0].text == answer.choices[0].message.content
    assert message.stop_reason in ("max_tokens", "end_turn")
    tokens = message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert tokens == answer.usage.prompt_tokens
    assert message.usage.output_tokens == answer.usage.completion_tokens
    counted = claude.messages.count_tokens(model=MODEL, messages=QUESTION, system=system)
    assert counted.input_tokens == answer.usage.prompt_tokens


def test_the_answer_has_its_types(server):
    settings = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "metadata": {"user_id": "me"},
        "service_tier": "auto",
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "low"},
    }
    message = strict(types.Message, post(server, **settings).json())
    assert (message.model, message.role, message.type) == (MODEL, "assistant", "message")
    assert message.id.startswith("msg_")
    strict(types.MessageTokensCount, post(server, "messages/count_tokens").json())


def test_events_add_up_to_the_whole(claude, server):
    whole = claude.messages.create(messages=QUESTION, **GREEDY)
    with claude.messages.stream(messages=QUESTION, **GREEDY) as stream:
        texts = list(stream.text_stream)
        message = stream.get_final_message()
    assert "".join(texts) == whole.content[0].text
    same = {"content", "stop_reason", "stop_sequence", "role", "model"}
    assert message.model_dump(include=same) == whole.model_dump(include=same)
    assert message.usage.output_tokens == whole.usage.output_tokens
    lines = post(server, stream=True).text.split("\n\n")
    assert lines.pop() == ""
    kinds = []
    for line in lines:
        name, data = line.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        kinds.append(event["type"])
        if event["type"] != "ping":
            strict(types.RawMessageStreamEvent, event)
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_stop_sequences(claude):
    text = claude.messages.create(messages=QUESTION, **GREEDY).content[0].text
    message = claude.messages.create(messages=QUESTION, stop_sequences=["nowhere", text[4:6]], **GREEDY)
    assert message.content[0].text == text[: text.index(text[4:6])]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", text[4:6])
    with claude.messages.stream(messages=QUESTION, stop_sequences=[text[4:6]], **GREEDY) as stream:
        streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", text[4:6])
    assert streamed.content[0].text == message.content[0].text


def test_the_context_window_ends_an_answer(claude, server):
    messages = [{"role": "user", "content": "x" * (server.engine.max_model_len - 40)}]
    settings = {"messages": messages, "model": MODEL, "max_tokens": 1000, "extra_body": {"ignore_eos": True}}
    message = claude.messages.create(**settings)
    assert message.stop_reason in ("model_context_window_exceeded", "end_turn")


def test_blocks_are_messages():
    look = {"type": "tool_use", "id": "t1", "name": "look", "input": {"a": 1}}
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "one"},
        {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "two"}]},
        {"type": "tool_result", "tool_use_id": "t3"},
    ]
    body = chat_body(
        system="s",
        messages=[
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "thinking", "thinking": "so", "signature": ""},
                    {"type": "text", "text": "c"},
                    look,
                    {**look, "id": "t2", "name": "write"},
                    {**look, "id": "t3"},
                ],
            },
            {"role": "user", "content": [*results, {"type": "text", "text": "d"}]},
        ],
        tools=[
            {"name": "look", "description": "l", "input_schema": {"type": "object"}},
            {"type": "custom", "name": "write", "input_schema": {}, "cache_control": {"type": "ephemeral"}},
        ],
        tool_choice={"type": "tool", "name": "look", "disable_parallel_tool_use": True},
        output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}},
        thinking={"type": "disabled"},
    )

    def call(call_id, name):
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": {"a": 1}}}

    def text(value):
        return {"type": "text", "text": value}

    assert body["messages"] == [
        {"role": "system", "content": [text("s")]},
        {"role": "user", "content": [text("a"), text("b")]},
        {
            "role": "assistant",
            "reasoning_content": "hm\nso",
            "content": [text("c")],
            "tool_calls": [call("t1", "look"), call("t2", "write"), call("t3", "look")],
        },
        {"role": "tool", "tool_call_id": "t1", "name": "look", "content": "one"},
        {"role": "tool", "tool_call_id": "t2", "name": "write", "content": "two"},
        {"role": "tool", "tool_call_id": "t3", "name": "look", "content": ""},
        {"role": "user", "content": [text("d")]},
    ]
    assert body["tools"] == [
        {
            "type": "function",
            "function": {"name": "look", "description": "l", "parameters": {"type": "object"}},
        },
        {"type": "function", "function": {"name": "write", "parameters": {}}},
    ]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert body["parallel_tool_calls"] is False
    schema = {"name": "output", "schema": {"type": "object"}, "strict": True}
    assert body["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert body["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}


@pytest.mark.parametrize(("kind", "choice"), [("auto", "auto"), ("any", "required"), ("none", "none")])
def test_choices_of_tools(kind, choice):
    body = chat_body(tools=[{"name": "f", "input_schema": {}}], tool_choice={"type": kind})
    assert (body["tool_choice"], body["parallel_tool_calls"]) == (choice, True)


def test_an_answer_goes_on_from_the_assistants_last_message():
    body = chat_body(messages=[*QUESTION, {"role": "assistant", "content": "It is"}])
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert "continue_final_message" not in chat_body()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]: content"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "document"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].id"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
            "not for the role 'assistant'",
        ),
        ({"messages": [{"role": "assistant", "content": [UNANSWERED]}]}, "tool_result"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]: tools of type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice: name is missing"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"temperature": "hot"}, "temperature"),
        ({"container": "c"}, "container is not supported"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
    ],
)
def test_refusals_name_the_field(server, body, words):
    response = post(server, **body)
    assert response.status_code == 400
    error = response.json()
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert words in error["error"]["message"], error


def test_errors_are_anthropics(claude, server):
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(messages=QUESTION, **{**GREEDY, "model": "other"})
    assert unknown.value.body["error"]["type"] == "not_found_error"
    long = [{"role": "user", "content": "x" * 3_000_000}]
    with pytest.raises(anthropic.RequestTooLargeError) as large:
        claude.messages.create(messages=long, **GREEDY)
    assert large.value.body["error"]["type"] == "request_too_large"
    with pytest.raises(anthropic.BadRequestError, match="shorten"):
        claude.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "x" * 100_000}])


def test_an_error_during_a_stream_is_its_last_event(server, claude, monkeypatch):
    plant(monkeypatch, server.engine, lambda sequences: any(seq.num_output_tokens > 3 for seq in sequences))
    with pytest.raises(anthropic.APIStatusError, match="planted") as failed:
        list(claude.messages.create(messages=QUESTION, stream=True, **GREEDY))
    assert failed.value.body["error"]["type"] == "api_error"
    with pytest.raises(anthropic.InternalServerError, match="planted"):
        claude.messages.create(messages=QUESTION, **GREEDY)
