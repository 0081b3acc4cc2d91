"""What no client should send and some do."""

from __future__ import annotations

import httpx
import pytest

from cupaged.engine.server.protocol import UNSUPPORTED, ChatCompletionRequest, CompletionRequest

from .conftest import MODEL

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


@pytest.mark.parametrize("path", FIELDS)
def test_null_is_a_field_left_out(server, path):
    model, needed = FIELDS[path]
    nothing = dict.fromkeys([*model.model_fields, *UNSUPPORTED])
    response = httpx.post(f"{server.url}/v1/{path}", json={**nothing, **needed})
    assert response.status_code == 200, response.text
