"""Conversations on their way to the chat template, and what comes of a template that fails."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cupaged.engine import chat_template
from cupaged.engine.server.chat import Chat
from cupaged.engine.server.chat_settings import ChatSettings
from cupaged.engine.server.protocol import ChatCompletionRequest
from cupaged.engine.time_limit import run_within
from tests import tiny_models

from .conftest import MODEL, Running

# Writes all that it is given; as real ones do, it would write "None" for a content that is none.
TEMPLATE = """{%- for m in messages -%}
<start>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content }}
{%- if m.reasoning_content %} thinks {{ m.reasoning_content }}={{ m.reasoning }}{% endif %}
{%- for call in m.tool_calls or [] %} calls {{ call.type }} {{ call.id }} {{ call.function.name }}(
{%- for name, value in call.function.arguments.items() %}{{ name }}={{ value | tojson }};{% endfor %})
{%- endfor %}
{%- if m.tool_call_id %} answers {{ m.tool_call_id }}{% endif %}<end>
{%- endfor -%}"""
USER = {"role": "user", "content": "Weather?"}


def call(arguments, **more) -> dict:
    return {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}, **more}


def prompt_of(*messages, template: str = TEMPLATE, **settings) -> str:
    """The text that a model with this template is given for these messages."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = template
    body = {"model": MODEL, "messages": list(messages), "chat_template_kwargs": settings}
    request = ChatCompletionRequest.model_validate_json(json.dumps(body))
    return Chat(ChatSettings(), tokenizer, 10_000).render(request)


# Messages beside what the template makes of them.
CONVERSATIONS = {
    "tool calls without content": (
        [
            {"role": "assistant", "tool_calls": [call('{"city": "Ulm", "days": [1, null]}')]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ],
        '<start>assistant:  calls function c1 look(city="Ulm";days=[1, null];)<end>'
        "<start>tool: sunny answers c1<end>",
    ),
    "null": (
        [{"role": "assistant", "content": None, "tool_calls": [call("{}")], "refusal": None, "audio": None}],
        "<start>assistant:  calls function c1 look()<end>",
    ),
    "content and calls": (
        [{"role": "assistant", "content": "Let me see.", "tool_calls": [call('{"a": 1}'), call("")]}],
        "<start>assistant: Let me see. calls function c1 look(a=1;) calls function c1 look()<end>",
    ),
    "arguments that are an object already": (
        [{"role": "assistant", "tool_calls": [call({"a": {"b": None}})]}],
        '<start>assistant:  calls function c1 look(a={"b": null};)<end>',
    ),
    "arguments as models write them that are no object": (  # empty, as in vLLM
        [{"role": "assistant", "tool_calls": [call('{"a": '), call("[1]"), call("[" * 100_000)]}],
        "<start>assistant: " + " calls function c1 look()" * 3 + "<end>",
    ),
    "a call without a type": (
        [{"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "look"}}]}],
        "<start>assistant:  calls function c1 look()<end>",
    ),
    "reasoning": (
        [{"role": "assistant", "content": "Hi", "reasoning_content": "hmm"}],
        "<start>assistant: Hi thinks hmm=hmm<end>",
    ),
    "reasoning under vLLM's newer name, and nothing else": (
        [{"role": "assistant", "content": None, "reasoning": "hmm"}],
        "<start>assistant:  thinks hmm=hmm<end>",
    ),
    "names and roles": (
        [{"role": "developer", "content": "Be kind."}, {**USER, "name": "Ada"}],
        "<start>system: Be kind.<end><start>user Ada: Weather?<end>",
    ),
    "an answer that is sent back as the client has it": (
        [{"role": "assistant", "content": "Hi", "annotations": [], "tool_calls": [], "function_call": None}],
        "<start>assistant: Hi<end>",
    ),
    "a refusal": (
        [{"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}],
        "<start>assistant: I cannot.<end>",
    ),
    "a refusal among parts": (
        [
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "Well."}, {"type": "refusal", "refusal": "No."}],
            }
        ],
        "<start>assistant: Well.\nNo.<end>",
    ),
    "a refusal in its own field": (
        [{"role": "assistant", "content": None, "refusal": "I cannot."}],
        "<start>assistant: I cannot.<end>",
    ),
    "a tool's parts": (
        [{"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]}],
        "<start>tool: sunny answers c1<end>",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_field_of_a_message_reaches_the_template(name):
    messages, expected = CONVERSATIONS[name]
    assert prompt_of(USER, *messages) == "<start>user: Weather?<end>" + expected


def test_members_of_a_call_that_nobody_knows_reach_it_too():
    message = {"role": "assistant", "tool_calls": [call("{}", index=3)]}
    assert prompt_of(message, template="{{ messages[0].tool_calls[0].index }}") == "3"


def test_a_conversation_with_tool_calls_is_answered(server):
    """With the number of tokens that its text has."""
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call('{"city": "Ulm"}')]}]
    response = post(server, {"model": MODEL, "messages": messages, "max_tokens": 1})
    assert response.status_code == 200, response.text
    # One token a byte, and those of the template; it knows role and content alone, so the call is text.
    call_text = '<tool_call>\n{"name": "look", "arguments": {"city": "Ulm"}}\n</tool_call>'
    text = f"user: Weather?assistant: {call_text}assistant: "
    assert response.json()["usage"]["prompt_tokens"] == len(text) + 5


def post(server, body: dict) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body)


REFUSED = {
    "messages[1].colour": {"role": "user", "content": "x", "colour": "red"},
    "messages[1].function_call": {"role": "assistant", "content": "", "function_call": {"name": "f"}},
    "messages[1].audio": {"role": "assistant", "content": "x", "audio": {"id": "a"}},
    "messages[1].annotations": {"role": "assistant", "content": "x", "annotations": [{"type": "url"}]},
    "messages[1].tool_calls": {"role": "assistant", "tool_calls": {"id": "c1"}},
    "messages[1].tool_calls[0].type": {"role": "assistant", "tool_calls": [call("{}", type="custom")]},
    "messages[1].tool_calls[0].function": {"role": "assistant", "tool_calls": [{"id": "c1"}]},
    "messages[1].tool_calls[0].function.name": {"role": "assistant", "tool_calls": [{"function": {}}]},
    "messages[1].tool_calls[0].function.arguments": {"role": "assistant", "tool_calls": [call(5)]},
    "messages[1].tool_call_id": {"role": "tool", "content": "x", "tool_call_id": 5},
    "messages[1].reasoning_content": {"role": "assistant", "content": "x", "reasoning_content": ["a"]},
}
CONTENTS = {
    "a user's refusal": {"role": "user", "content": [{"type": "refusal", "refusal": "No."}]},
    "a refusal without its text": {"role": "assistant", "content": [{"type": "refusal", "text": "No."}]},
    "an unknown member": {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
    "a string among parts": {"role": "user", "content": ["x"]},
    "an empty answer": {"role": "assistant"},
    "an answer of no calls": {"role": "assistant", "content": None, "tool_calls": []},
    "a user's calls": {"role": "user", "tool_calls": [call("{}")]},
    "a tool that says nothing": {"role": "tool", "tool_call_id": "c1"},
}


@pytest.mark.parametrize(
    ("param", "message"),
    [*REFUSED.items(), *(("messages[1].content", message) for message in CONTENTS.values())],
    ids=[*REFUSED, *CONTENTS],
)
def test_a_field_that_is_not_handed_on_is_refused_by_name(server, param, message):
    response = post(server, {"model": MODEL, "messages": [USER, message], "max_tokens": 1})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]


FAILING = {
    "{{ 1 // (messages | length - 1) }}": "ZeroDivisionError",
    "{{ 1.5 ** 100_000_000 }}": "OverflowError",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "RecursionError",
    "{{ messages[0].content.nothing.at_all }}": "nothing",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ messages[0].content + 1 }}": "TypeError",
    "{{ 'x'.encode('no such') }}": "LookupError",
    "{{ '{:d}'.format('x') }}": "ValueError",
    "{% for i in range(times) %}{% endfor %}": "TypeError",
    "{% if %}": "expected",
}


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_no_fault_of_the_servers(template):
    with pytest.raises(ValueError, match=r"^messages: the model's chat template (failed|refuses)") as error:
        prompt_of(USER, template=template)
    assert FAILING[template].lower() in str(error.value).lower()


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    """No client writes it, but what it loops over, and whether, may be the client's."""
    monkeypatch.setattr(chat_template, "_SECONDS", 0.5)
    loops = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
    template = "{% if often %}" + loops + "{% endif %}{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"^messages: the model's chat template failed: .*0\.5 seconds"):
        prompt_of(USER, template=template, often=True)
    assert_no_thread_is_left()
    monkeypatch.undo()
    assert prompt_of(USER, template=template) == "Weather?"


def test_others_are_answered_while_a_template_is_rendered(server, monkeypatch):
    begun, others_answered = threading.Event(), threading.Event()

    def slow(seconds, work):
        monkeypatch.setattr(chat_template, "run_within", run_within)
        begun.set()
        assert others_answered.wait(120)
        return work()

    monkeypatch.setattr(chat_template, "run_within", slow)
    body = {"model": MODEL, "messages": [USER], "max_tokens": 1}
    with ThreadPoolExecutor() as threads:
        first = threads.submit(httpx.post, f"{server.url}/v1/chat/completions", json=body, timeout=180)
        try:
            assert begun.wait(120)
            assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
            assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
            assert not first.done()
        finally:
            others_answered.set()
        assert first.result().status_code == 200


def assert_no_thread_is_left() -> None:
    end = time.monotonic() + 20
    while any(thread.name == "cupaged-time-limit" for thread in threading.enumerate()):
        assert time.monotonic() < end, "the template still runs"
        time.sleep(0.01)


def test_work_has_its_result_its_error_or_its_time():
    assert run_within(60, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        run_within(60, lambda: 1 // 0)

    def endless():
        while True:
            with contextlib.suppress(Exception):  # the end is none
                sum(range(100))

    with pytest.raises(TimeoutError, match=r"within 0\.2 seconds"):
        run_within(0.2, endless)
    assert_no_thread_is_left()


def test_a_model_without_a_template_says_so(tmp_path):
    directory = tiny_models.save("llama", tmp_path)
    (directory / "chat_template.jinja").unlink()
    with Running(str(directory)) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["has_chat_template"] is False
        error = post(server, {"model": MODEL, "messages": [USER]}).json()["error"]
        assert error["param"] == "messages"
        assert "/v1/completions" in error["message"]
