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


@pytest.mark.parametrize("path", FIELDS)
def test_null_is_a_field_left_out(server, path):
    model, needed = FIELDS[path]
    nothing = dict.fromkeys([*model.model_fields, *UNSUPPORTED])
    response = httpx.post(f"{server.url}/v1/{path}", json={**nothing, **needed})
    assert response.status_code == 200, response.text
