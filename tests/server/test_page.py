"""The page, as far as it can be judged without a browser: from the script that is served."""

from __future__ import annotations

import re

import httpx
import pytest


@pytest.fixture(scope="module")
def script(server) -> str:
    page = httpx.get(server.url).text
    return re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]


def function(script: str, name: str) -> str:
    """The text of a function of the script."""
    return re.search(rf"^(async )?function\*? {name}\(.*?^}}", script, re.DOTALL | re.MULTILINE)[0]


def test_every_failure_of_the_network_says_that_the_server_is_away(script):
    """What can fail with the browser's own words goes through `away`: one fetch, and reading its body."""
    assert re.findall(r"\bfetch\([^;]*;", script) == ["fetch(path, options).catch(away);"]
    assert re.findall(r"\.read\(\)[^;]*;", script) == [".read().catch(away);"]
    assert "The server is away" in function(script, "away")


def test_an_answer_that_is_no_json_is_said_too(script):
    """That of a proxy."""
    assert "response.json().catch(() => null)" in function(script, "request")


def test_the_model_is_asked_for_until_it_is_known(script):
    """Before every message, and again after one that failed: by a server that was away, or is another now."""
    assert 'request("v1/models"' in function(script, "findModel")
    ask = function(script, "ask")
    assert ask.index("await findModel(mine.signal)") < ask.index('request("v1/chat/completions"')
    assert "model = null" in ask[ask.index("catch (error)") :]
    assert re.findall(r"^findModel\(.*", script, re.MULTILINE) == [
        'findModel().catch((error) => show("error", error.message));'
    ]


def test_a_model_without_a_template_is_explained(script, server):
    assert "no chat template" in function(script, "findModel")
    assert re.findall(r"card\.(\w+)", function(script, "findModel")) == [
        *("id", "has_chat_template", "default_sampling_params", "id")
    ], "what it reads of the model"
    card = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert card["has_chat_template"] is True
