"""What the text of an answer has to be, as OpenAI's client and vLLM's users ask for it."""

from __future__ import annotations

import json
import re
import threading

import httpx
import jsonschema
import openai
import pydantic
import pytest

from cupaged.engine.sampling import grammar
from cupaged.engine.server.limits import Limits

from .conftest import MODEL, Running

CHAT = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
    },
    "required": ["kind", "age"],
    "additionalProperties": False,
}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
TIGHT = {"json": SCHEMA, "disable_any_whitespace": True}

# Fields of a request, and a check of the answer's text.
FIELDS = {
    "response_format": (
        {"response_format": JSON_FORMAT},
        lambda t: jsonschema.validate(json.loads(t), SCHEMA),
    ),
    "any object": ({"response_format": {"type": "json_object"}, "seed": 3}, lambda t: dict(json.loads(t))),
    "text": (
        {"response_format": {"type": "text"}, "guided_regex": "ab+"},
        lambda t: re.fullmatch("ab+", t)[0],
    ),
    "schema": ({"structured_outputs": TIGHT}, lambda t: jsonschema.validate(json.loads(t), SCHEMA)),
    "regex": ({"structured_outputs": {"regex": "[a-c]{4}"}}, lambda t: re.fullmatch("[a-c]{4}", t)[0]),
    "choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes": 1, "no": 1}.__getitem__),
    "lark": ({"structured_outputs": {"grammar": 'start: "a" "b"?'}}, {"a": 1, "ab": 1}.__getitem__),
    "json_object": ({"structured_outputs": {"json_object": True}}, lambda t: dict(json.loads(t))),
    "guided_json": (
        {"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": " "},
        lambda t: jsonschema.validate(json.loads(t), SCHEMA),
    ),
    "guided_json_object": ({"guided_json_object": True}, lambda t: dict(json.loads(t))),
    "guided_regex": ({"guided_regex": "[a-c]{4}"}, lambda t: re.fullmatch("[a-c]{4}", t)[0]),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, {"yes": 1, "no": 1}.__getitem__),
    "guided_grammar": ({"guided_grammar": 'root ::= "a" "b"?'}, {"a": 1, "ab": 1}.__getitem__),
}


@pytest.mark.parametrize("name", FIELDS)
def test_answers_are_what_they_have_to_be(client, name):
    fields, check = FIELDS[name]
    limit = 40 if "object" in name else 150
    settings = {"model": MODEL, "max_tokens": limit, "n": 2, "extra_body": {"seed": 1, **fields}}
    chat = client.chat.completions.create(messages=CHAT, **settings)
    text = client.completions.create(prompt=["Hi", "Ho"], **settings)
    answers = [(choice.message.content, choice.finish_reason) for choice in chat.choices]
    answers += [(choice.text, choice.finish_reason) for choice in text.choices]
    assert len(answers) == 6
    for answer, reason in answers:
        if reason == "stop" or "object" not in name:  # any object may be long
            assert reason == "stop"
            check(answer)
    parts: list[str] = [""] * 2
    for chunk in client.chat.completions.create(messages=CHAT, stream=True, **settings):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == [choice.message.content for choice in chat.choices]


def test_a_pydantic_model_is_parsed(client):
    class Pet(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=5)
        legs: int = pydantic.Field(ge=0, le=100)
        likes: list[bool] = pydantic.Field(max_length=2)

    answer = client.chat.completions.parse(
        model=MODEL, messages=CHAT, response_format=Pet, max_tokens=150, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Pet)


BAD = [
    ({"structured_outputs": {"regex": "(a"}}, "unclosed group"),
    ({"structured_outputs": {"json": {"type": "strnig"}}}, "Invalid type: strnig"),
    ({"response_format": {**JSON_FORMAT, "json_schema": {"schema": {"type": 5}}}}, "type must be a string"),
    ({"guided_grammar": "start: b"}, 'unknown name: "b"'),
    ({"guided_json": "{"}, "json is not a JSON schema"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "exactly one of"),
    ({"guided_regex": "a", "response_format": JSON_FORMAT}, "response_format and guided_*"),
    ({"structured_outputs": {"disable_any_whitespace": True}}, "exactly one of"),
    ({"structured_outputs": {"choice": []}}, "choice must be one or more strings"),
    ({"guided_choice": ["a"], "use_beam_search": True, "n": 2}, "beam search"),
    ({"guided_regex": "a" * 100_001}, "max_grammar_size"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "reason"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_is_refused_with_the_reason(server, fields, reason, stream):
    if stream and "use_beam_search" in fields:
        return
    for path, prompt in (("chat/completions", {"messages": CHAT}), ("completions", {"prompt": ["x", "y"]})):
        body = {"model": MODEL, **prompt, **fields, "stream": stream}
        response = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert reason in error["message"]
        assert error["param"]


def test_grammars_are_tried_in_another_process(client, monkeypatch, tmp_path):
    """It may be killed, by its limits or by the system; and nobody waits for it but its request."""
    trial = tmp_path / "trial.py"
    trial.write_text("import os, time; time.sleep(1); os.kill(os.getpid(), 9)")
    monkeypatch.setattr(grammar, "_TRIAL", trial)
    errors = []

    def ask() -> None:
        with pytest.raises(openai.BadRequestError, match="it takes too long, or too much memory") as caught:
            client.completions.create(model=MODEL, prompt="x", extra_body={"guided_regex": "a[0-9]b"})
        errors.append(caught.value)

    asking = threading.Thread(target=ask)
    asking.start()
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=2).choices[0].finish_reason
    assert asking.is_alive()
    asking.join()
    assert len(errors) == 1


@pytest.mark.matrix
@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "string", "pattern": f"a{{0,{i}}}b"} for i in range(1, 60)]},
        {"type": "integer", "multipleOf": 999_983},
    ],
)
def test_a_few_lines_that_take_hours_are_refused(client, schema):
    with pytest.raises(openai.BadRequestError, match="it takes too long, or too much memory"):
        client.completions.create(model=MODEL, prompt="x", extra_body={"guided_json": schema})


def test_a_client_that_leaves_while_its_grammar_is_compiled(server, monkeypatch, tmp_path):
    trial = tmp_path / "trial.py"
    trial.write_text("import time; time.sleep(2)")
    monkeypatch.setattr(grammar, "_TRIAL", trial)
    body = {"model": MODEL, "prompt": "x", "guided_regex": "q[0-9]r", "stream": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.5)
    added = []
    monkeypatch.setattr(server.engine, "add_request", lambda *a, **k: added.append(a))
    server.async_engine._compiling.submit(lambda: None).result(timeout=30)
    server.async_engine._compiling.submit(lambda: None).result(timeout=30)
    assert not added


def test_the_limit_is_a_setting(llama_dir):
    with Running(llama_dir, limits=Limits(max_grammar_size=5)) as server, server.client() as client:
        settings = {"model": MODEL, "prompt": "x"}
        fits = client.completions.create(**settings, extra_body={"guided_choice": ["abc", "de"]})
        assert fits.choices[0].text in ("abc", "de")
        with pytest.raises(openai.BadRequestError, match="max_grammar_size"):
            client.completions.create(**settings, extra_body={"guided_choice": ["abc", "def"]})
