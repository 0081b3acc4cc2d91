"""What no client should send and some do."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import httpx
import pytest

from cupaged.engine import SamplingParams
from cupaged.engine.outputs import CompletionOutput, RequestOutput
from cupaged.engine.server.completions import Completions
from cupaged.engine.server.metrics import Metrics
from cupaged.engine.server.protocol import UNSUPPORTED, ChatCompletionRequest, CompletionRequest
from cupaged.engine.server.streams import Stream

from .conftest import MODEL, wait_until

CHAT = [{"role": "user", "content": "Hi"}]
FIELDS = {
    "completions": (CompletionRequest, {"model": MODEL, "prompt": "x", "max_tokens": 1}),
    "chat/completions": (ChatCompletionRequest, {"model": MODEL, "messages": CHAT, "max_tokens": 1}),
}


def post(server, path: str, content: str) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{server.url}/v1/{path}", content=content, headers=headers)


HALF_PAIRS = {
    '"temperature": "\\ud800"': "temperature",
    '"stop": {"a": "\\ud800"}': "stop",
    '"logit_bias": {"\\ud800": 1}': "logit_bias",
    '"bad_words": ["\\ud800"]': "bad_words",
}


@pytest.mark.parametrize("field", HALF_PAIRS)
def test_a_refusal_may_quote_what_is_not_unicode(server, field):
    """JSON can carry half of a surrogate pair."""
    response = post(server, "completions", f'{{"model": "{MODEL}", "prompt": "x", {field}}}')
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == HALF_PAIRS[field]
    assert error["param"] in error["message"]
    assert r"\ud800" in error["message"]


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "max_length", "continue_final_message", "self"]
)
def test_settings_of_a_template_are_its_variables(server, name):
    """A template of the client's own would run on the server for as long as it likes."""
    request = {**FIELDS["chat/completions"][1], "chat_template_kwargs": {name: "{{ 6 * 7 }}"}}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=request)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "chat_template_kwargs"
    assert repr(name) in response.json()["error"]["message"]
    request["chat_template_kwargs"] = {"enable_thinking": False}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=request).status_code == 200


UNSUPPORTED_VALUES = {
    "beam_width": 3,
    "extra_args": {"a": 1},
    "guided_decoding": {"regex": "a"},
    "logprob_token_ids": [5],
    "prompt_embeds": "AAAA",
    "prompt_logprob_token_ids": [5],
    "reasoning_effort": "low",
    "repetition_detection": {"max_pattern_size": 4, "min_count": 2},
    "return_prompt_text": True,
    "structural_tag": "{}",
    "thinking_token_budget": 0,
    "trace_decode_token_ids": [5],
    "truncate_prompt_tokens": 1,
    "verbosity": "low",
    "vllm_xargs": {"a": 1},
    "watermarking": True,
}


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("name", UNSUPPORTED_VALUES)
def test_what_would_change_the_answer_is_refused_by_name(server, path, name):
    request = {**FIELDS[path][1], name: UNSUPPORTED_VALUES[name]}
    response = httpx.post(f"{server.url}/v1/{path}", json=request)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == name
    assert error["message"].startswith(f"{name} is not supported")
    if name == "beam_width":
        assert "use_beam_search" in error["message"]


def test_a_text_has_the_older_name_of_its_length_only(server):
    request = {**FIELDS["completions"][1], "max_completion_tokens": 5}
    error = httpx.post(f"{server.url}/v1/completions", json=request).json()["error"]
    assert error["param"] == "max_completion_tokens"
    assert "set max_tokens" in error["message"]


@pytest.mark.parametrize("path", FIELDS)
def test_no_setting_of_the_engine_is_ignored(path):
    fields = {*FIELDS[path][0].model_fields, *UNSUPPORTED}
    assert [field.name for field in dataclasses.fields(SamplingParams) if field.name not in fields] == []


@pytest.mark.parametrize("path", FIELDS)
def test_null_is_a_field_left_out(server, path):
    model, needed = FIELDS[path]
    nothing = dict.fromkeys([*model.model_fields, *UNSUPPORTED])
    response = httpx.post(f"{server.url}/v1/{path}", json={**nothing, **needed})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("completions", "prompt", "x" * 1_500_000),
        ("chat/completions", "messages", [{"role": "user", "content": "x" * 1_500_000}]),
    ],
)
def test_a_text_of_megabytes_is_refused_before_it_is_tokenized(server, monkeypatch, path, field, value):
    """For as long as that takes nobody else is answered."""

    def tokenize(self, text, *args, **kwargs):
        assert len(text) < 1_000_000
        return original(self, text, *args, **kwargs)

    kind = type(server.engine.tokenizer)
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", tokenize)
    response = httpx.post(f"{server.url}/v1/{path}", json={**FIELDS[path][1], field: value})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field
    assert "characters" in response.json()["error"]["message"]


def test_a_client_that_does_not_read_piles_nothing_up(server):
    """Each output has all tokens so far: one for each of 8000 tokens takes hundreds of megabytes."""

    class Engine:
        async def call(self, function):
            return function()

        def submit(self, request_id, prompt, params, put, priority):
            stream = Stream(request_id, put, lambda: None)

            def put_next(count=1):
                done = CompletionOutput(0, "", list(range(count)), "length" if count == 100 else None)
                stream.receive(RequestOutput(request_id, None, [1], [done], count == 100))
                if count < 100:
                    stream.loop.call_soon(put_next, count + 1)

            stream.loop.call_soon(put_next)
            return stream

    async def read():
        metrics = Metrics(MODEL, server.engine.stats, server.engine.config, 256)
        completions = Completions(Engine(), metrics, server.engine.tokenizer, MODEL, 2, None)
        outputs = completions._run("r", ["x", "y"], SamplingParams(), 0)
        first = {position: output async for position, output in _take(outputs, 2)}
        assert sorted(first) == [0, 1]
        for _ in range(300):
            await asyncio.sleep(0)
        return [(position, len(output.outputs[0].token_ids)) async for position, output in outputs]

    async def _take(outputs, count):
        for _ in range(count):
            yield await anext(outputs)

    assert asyncio.run(read()) == [(0, 100), (1, 100)]


@pytest.mark.parametrize("stream", [False, True])
def test_one_wrong_prompt_of_several_refuses_the_request(server, monkeypatch, stream):
    """Before any output is sent, also where the engine runs steps between the prompts."""
    add_request = server.engine.add_request

    def slowly(*arguments, **settings):
        add_request(*arguments, **settings)
        time.sleep(0.05)

    monkeypatch.setattr(server.engine, "add_request", slowly)
    for wrong in ([], [10**9]):
        body = {"model": MODEL, "prompt": [[1], [2], wrong], "max_tokens": 3, "stream": stream}
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "prompt"
    wait_until(lambda: server.async_engine.stats().num_running == 0)
