"""The Responses API as the `openai` client sees it."""

from __future__ import annotations

import json

import httpx
import openai
import openai.types.responses as types
import pytest

from cupaged.engine.server.responses_request import ResponsesRequest

from .conftest import MODEL
from .test_failed_steps import plant
from .test_translations import strict, strict_event

GREEDY = {"temperature": 0, "max_output_tokens": 12, "extra_body": {"ignore_eos": True}}
QUESTION = "Tell me about páging"


def chat(client, messages, **settings):
    settings = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}, **settings}
    return client.chat.completions.create(model=MODEL, messages=messages, **settings)


def post(server, **body) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/responses", json={"model": MODEL, "input": "x", **body}, timeout=60)


def test_a_response_is_what_the_chat_answers(client):
    response = client.responses.create(model=MODEL, input=QUESTION, instructions="Be brief.", **GREEDY)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    answer = chat(client, messages)
    assert response.output_text == answer.choices[0].message.content != ""
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == answer.usage.prompt_tokens
    assert (response.usage.output_tokens, response.usage.total_tokens) == (12, answer.usage.total_tokens)


def test_the_response_has_the_settings_and_its_types(server):
    settings = {
        "instructions": "Be brief.",
        "max_output_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "metadata": {"a": "b"},
        "user": "me",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "truncation": "auto",
        "parallel_tool_calls": False,
        "store": True,
        "max_tool_calls": 3,
        "text": {"format": {"type": "text"}},
        "reasoning": {"summary": "auto"},
        "service_tier": "auto",
        "include": ["reasoning.encrypted_content"],
        "background": False,
        "stream": False,
    }
    body = post(server, **settings).json()
    response = strict(types.Response, body)
    assert (response.object, response.model, body["store"]) == ("response", MODEL, False)
    assert response.id.startswith("resp_")
    echoed = ["instructions", "max_output_tokens", "temperature", "top_p", "metadata", "user", "truncation"]
    echoed += ["safety_identifier", "prompt_cache_key", "parallel_tool_calls", "max_tool_calls", "background"]
    assert {name: body[name] for name in echoed} == {name: settings[name] for name in echoed}
    assert body["reasoning"] == {"summary": "auto"}
    assert body["text"]["format"] == {"type": "text"}


def test_events_add_up_to_the_whole(server, client):
    whole = client.responses.create(model=MODEL, input=QUESTION, **GREEDY)
    with client.responses.stream(model=MODEL, input=QUESTION, **GREEDY) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    assert last.response.usage.total_tokens == whole.usage.total_tokens
    body = {"model": MODEL, "input": QUESTION, "stream": True, "max_output_tokens": 3}
    lines = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60).text.split("\n\n")
    assert lines.pop() == ""
    for line in lines:
        name, data = line.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        strict_event(event)


def test_a_stop_token_completes_the_response(client):
    text = client.responses.create(model=MODEL, input=QUESTION, **GREEDY).output_text
    settings = {**GREEDY, "extra_body": {"ignore_eos": True, "stop": text[4:6]}}
    with client.responses.stream(model=MODEL, input=QUESTION, **settings) as stream:
        response = stream.get_final_response()
    assert (response.status, response.incomplete_details) == ("completed", None)
    assert response.output_text == text[: text.index(text[4:6])]
    assert response.completed_at >= response.created_at


def test_items_are_the_messages_of_a_conversation(client):
    items = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "r"}],
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "c", "annotations": []}],
        },
        {"type": "message", "role": "user", "content": "d"},
    ]
    response = client.responses.create(model=MODEL, input=items, **GREEDY)
    messages = [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    assert response.output_text == chat(client, messages).choices[0].message.content
    # What a response puts out is input again.
    again = client.responses.create(
        model=MODEL, input=[*items, *response.output, {"role": "user", "content": "e"}], **GREEDY
    )
    messages += [
        {"role": "assistant", "content": response.output_text},
        {"role": "user", "content": "e"},
    ]
    assert again.output_text == chat(client, messages).choices[0].message.content


def test_calls_and_their_results_are_messages():
    call = {"type": "function_call", "id": "fc_1", "status": "completed"}
    request = ResponsesRequest.model_validate(
        {
            "model": MODEL,
            "instructions": "i",
            "input": [
                {"role": "developer", "content": "d"},
                {"role": "user", "content": "u"},
                {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}]},
                {"role": "assistant", "content": "t"},
                {**call, "call_id": "c1", "name": "look", "arguments": '{"a": 1}'},
                {**call, "call_id": "c2", "name": "write", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "one"},
                {
                    "type": "function_call_output",
                    "call_id": "c2",
                    "output": [{"type": "input_text", "text": "two"}],
                },
            ],
            "tools": [
                {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True},
                {"type": "function", "name": "write", "description": "w", "parameters": None},
            ],
            "tool_choice": {"type": "function", "name": "look"},
            "parallel_tool_calls": False,
        }
    )
    body = request.for_chat()

    def text(value):
        return [{"type": "text", "text": value}]

    assert body["messages"] == [
        {"role": "developer", "content": text("i") + text("d")},
        {"role": "user", "content": text("u")},
        {
            "role": "assistant",
            "reasoning_content": "s",
            "content": text("t"),
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}},
                {"id": "c2", "type": "function", "function": {"name": "write", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "name": "write", "content": "two"},
    ]
    assert body["tools"] == [
        {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}, "strict": True}},
        {"type": "function", "function": {"name": "write", "description": "w"}},
    ]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert body["parallel_tool_calls"] is False


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_the_only_ones(mode):
    tools = [{"type": "function", "name": name, "parameters": {}} for name in "abc"]
    allowed = [{"type": "function", "name": name} for name in "ac"]
    choice = {"type": "allowed_tools", "mode": mode, "tools": allowed}
    request = ResponsesRequest.model_validate(
        {"model": MODEL, "input": "x", "tools": tools, "tool_choice": choice}
    )
    body = request.for_chat()
    assert [tool["function"]["name"] for tool in body["tools"]] == ["a", "c"]
    assert body["tool_choice"] == mode


def test_formats_of_the_text():
    def chat_format(**kind):
        body = {"model": MODEL, "input": "x", "text": {"format": kind}}
        return ResponsesRequest.model_validate(body).for_chat().get("response_format")

    assert chat_format(type="text") is None
    assert chat_format(type="json_object") == {"type": "json_object"}
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert chat_format(type="json_schema", **schema) == {"type": "json_schema", "json_schema": schema}


def test_log_probabilities(client):
    include = ["message.output_text.logprobs"]
    settings = {"model": MODEL, "input": QUESTION, "include": include, "top_logprobs": 2, **GREEDY}
    response = client.responses.create(**settings)
    answer = chat(client, [{"role": "user", "content": QUESTION}], logprobs=True, top_logprobs=2)
    given = response.output[0].content[0].logprobs
    assert [each.to_dict() for each in given] == [
        each.to_dict() for each in answer.choices[0].logprobs.content
    ]
    events = list(client.responses.create(stream=True, **settings))
    sent = [e.logprobs for e in events if e.type == "response.output_text.delta"]
    assert [entry.token for part in sent for entry in part] == [each.token for each in given]


@pytest.mark.parametrize("stream", [False, True])
def test_settings_that_cannot_be_sent_back_are_refused(server, stream):
    tool = '{"type": "function", "name": "f", "parameters": {"a": Infinity}}'
    for member in (
        '"user": "\\ud800"',
        '"metadata": {"a": "\\udfff"}',
        f'"tools": [{tool}], "tool_choice": "none"',
    ):
        content = f'{{"model": "{MODEL}", "input": "x", "stream": {json.dumps(stream)}, {member}}}'
        headers = {"content-type": "application/json"}
        response = httpx.post(f"{server.url}/v1/responses", content=content, headers=headers, timeout=60)
        assert response.status_code == 400, response.text
        assert "settings of the request" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send all items"),
        ({"conversation": "conv_1"}, "conversation", "send all items"),
        ({"background": True}, "background", "leave it out"),
        ({"prompt": {"id": "p"}}, "prompt", "leave it out"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "web_search"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tool_choice": "some"}, "tool_choice", "some"),
        ({"input": []}, "input", "at least 1"),
        ({"input": None}, "input", "required"),
        ({"input": 3}, "input", "must be a string or a list of items"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "item_reference"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0]", "computer_call_output"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content", "image"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content", "string"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "tool"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name", "required"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"temperature": -1}, "temperature", "0 (greedy)"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "xml"),
        ({"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options", "False"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"seed": "x"}, "seed", "integer"),
        ({"model": "other"}, "model", "does not exist"),
    ],
)
def test_refusals_name_the_field(server, body, param, words):
    response = post(server, **body)
    assert response.status_code == (404 if "model" in body else 400)
    error = response.json()["error"]
    assert param in error["param"], error
    assert words in error["message"], error


def test_an_error_during_a_stream_is_its_last_event(server, client, monkeypatch):
    plant(monkeypatch, server.engine, lambda sequences: any(seq.num_output_tokens > 3 for seq in sequences))
    events = list(client.responses.create(model=MODEL, input="x", stream=True, **GREEDY))
    assert events[-1].type == "response.failed"
    assert "planted" in events[-1].response.error.message
    with pytest.raises(openai.InternalServerError, match="planted"):
        client.responses.create(model=MODEL, input="x", **GREEDY)
