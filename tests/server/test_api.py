"""The API as the `openai` client sees it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time

import httpx
import openai
import pytest

from cupaged.engine import LLM, SamplingParams
from cupaged.engine.sampling.sampler import Sampler
from cupaged.engine.sampling.samples import LaunchedSamples, SamplerOutput
from cupaged.engine.server.app import create_app
from tests import tiny_models

from .conftest import MODEL, wait_until

CHAT = [{"role": "user", "content": "Tell me about páging"}]
GREEDY = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def offline(llama_dir):
    """Texts as the engine gives them without a server."""
    llm = LLM(llama_dir, device="cpu", block_size=8, max_num_batched_tokens=256)

    def generate(prompts, **params):
        settings = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params}
        outputs = llm.generate(prompts, SamplingParams(**settings), use_tqdm=False)
        return [out.outputs[0].text for out in outputs]

    return generate


def test_completion(client, offline):
    prompt = "The blocks of a sequence"
    response = client.completions.create(model=MODEL, prompt=prompt, **GREEDY)
    assert response.choices[0].text == offline([prompt])[0]
    assert response.choices[0].finish_reason == "length"
    usage = response.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (24, 12, 36)
    assert (response.object, response.model) == ("text_completion", MODEL)


def test_chat_uses_the_models_template(client, offline):
    response = client.chat.completions.create(model=MODEL, messages=CHAT, **GREEDY)
    prompt = "<start>user: Tell me about páging<end><start>assistant: "
    assert response.choices[0].message.content == offline([prompt])[0]
    assert response.choices[0].message.role == "assistant"
    # one token a byte, and three special tokens
    assert response.usage.prompt_tokens == len("user: Tell me about páging".encode()) + len("assistant: ") + 3


def test_streams_add_up_to_the_whole(client):
    whole = client.chat.completions.create(model=MODEL, messages=CHAT, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=CHAT, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    counts = {"prompt_tokens", "completion_tokens", "total_tokens"}  # the second finds the first's prefix
    assert chunks[-1].usage.model_dump(include=counts) == whole.usage.model_dump(include=counts)
    assert all("usage" in c.model_fields_set and c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1
    text_chunks = list(client.completions.create(model=MODEL, prompt="abc", stream=True, **GREEDY))
    whole_text = client.completions.create(model=MODEL, prompt="abc", **GREEDY)
    assert "".join(c.choices[0].text for c in text_chunks) == whole_text.choices[0].text


def test_text_is_sent_as_it_is_sampled(server, client, monkeypatch):
    """Each step waits until the client has the text of the one before."""
    received, step = threading.Semaphore(1), server.engine.step

    def step_when_received():
        received.acquire(timeout=60)
        return step()

    monkeypatch.setattr(server.engine, "step", step_when_received)
    stream = client.completions.create(
        model=MODEL,
        prompt="abc",
        stream=True,
        extra_body={"structured_outputs": {"choice": ["a byte a token"]}},
    )
    pieces = []
    for chunk in stream:
        if chunk.choices[0].text:
            pieces.append(chunk.choices[0].text)
            received.release()
    assert pieces == list("a byte a token")


@pytest.mark.parametrize("include_usage", [False, True])
def test_usage_in_every_chunk(client, include_usage):
    options = {"continuous_usage_stats": True, "include_usage": include_usage, "include_obfuscation": False}
    settings = {"model": MODEL, "stream": True, "stream_options": options, **GREEDY}
    streams = [
        list(client.chat.completions.create(messages=CHAT, **settings)),
        list(client.completions.create(prompt="abc", **settings)),
        list(client.completions.create(prompt=["abc", "de"], n=2, **settings)),
    ]
    for chunks, (prompt, sampled) in zip(streams, [(41, 12), (3, 12), (5, 48)]):
        usages = [chunk.usage for chunk in chunks]
        counts = [usage.completion_tokens for usage in usages]
        assert counts == sorted(counts)
        assert (counts[-1], usages[-1].prompt_tokens) == (sampled, prompt)
        assert all(u.total_tokens == u.prompt_tokens + u.completion_tokens for u in usages)
        assert sum(not chunk.choices for chunk in chunks) == include_usage
    assert streams[0][0].usage.completion_tokens == 0  # the role
    assert {usage.usage.prompt_tokens for usage in streams[0]} == {41}


def test_several_prompts_and_choices_keep_their_places(client, offline):
    prompts = ["first", "the second one"]
    response = client.completions.create(model=MODEL, prompt=prompts, n=2, **GREEDY)
    first, second = offline(prompts)
    assert [c.index for c in response.choices] == [0, 1, 2, 3]
    assert [c.text for c in response.choices] == [first, first, second, second]
    assert response.usage.prompt_tokens == len("first") + len("the second one")
    texts = [""] * 4
    for chunk in client.completions.create(model=MODEL, prompt=prompts, n=2, stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [first, first, second, second]


def test_samples_differ_and_a_seed_repeats_them(client):
    def sample(seed):
        response = client.completions.create(
            model=MODEL, prompt="x", n=3, temperature=1.0, max_tokens=16, seed=seed
        )
        return [c.text for c in response.choices]

    first = sample(7)
    assert sample(7) == first
    assert sample(8) != first
    assert len(set(first)) == 3


def test_token_ids_are_a_prompt(client, offline):
    response = client.completions.create(model=MODEL, prompt=[5, 6, 7], **GREEDY)
    assert response.choices[0].text == offline([{"prompt_token_ids": [5, 6, 7]}])[0]
    both = client.completions.create(model=MODEL, prompt=[[5, 6, 7], [8]], **GREEDY)
    assert both.choices[0].text == response.choices[0].text


def test_stop_strings_and_stop_tokens(client, offline):
    text = offline(["stop here"], max_tokens=12)[0]
    stop = text[4:6]
    response = client.completions.create(model=MODEL, prompt="stop here", stop=[stop], **GREEDY)
    assert response.choices[0].text == text[: text.index(stop)]
    assert response.choices[0].finish_reason == "stop"
    streamed = client.completions.create(model=MODEL, prompt="stop here", stop=stop, stream=True, **GREEDY)
    assert "".join(c.choices[0].text for c in streamed) == text[: text.index(stop)]


def test_text_parts_are_joined(client):
    parts = [{"type": "text", "text": "Tell me about páging"}]
    by_parts = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}], **GREEDY
    )
    by_string = client.chat.completions.create(model=MODEL, messages=CHAT, **GREEDY)
    assert by_parts.choices[0].message.content == by_string.choices[0].message.content


def test_many_clients_at_once_get_what_each_gets_alone(server, offline):
    """Conversations and texts, streamed and whole, among requests that are refused and clients that leave.

    The expected texts come from the engine without a server, one prompt at a time.
    """
    contents = [f"páging №{i} " * (i % 5 + 1) for i in range(24)]
    templated = [f"<start>user: {content}<end><start>assistant: " for content in contents]
    expected = [offline([text])[0] for text in (*templated, *contents)]

    async def chat(client, content, stream):
        messages = [{"role": "user", "content": content}]
        answer = await client.chat.completions.create(model=MODEL, messages=messages, stream=stream, **GREEDY)
        if not stream:
            return answer.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

    async def text(client, prompt, stream):
        answer = await client.completions.create(model=MODEL, prompt=prompt, stream=stream, **GREEDY)
        if not stream:
            return answer.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in answer])

    async def refused(client, **change):
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(**{"model": MODEL, "prompt": "x", **change})

    async def leaves(client):
        stream = await client.completions.create(
            model=MODEL, prompt="x", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        await stream.close()

    async def all_of_them():
        async with server.async_client() as client:
            wanted = [chat(client, content, i % 2 == 0) for i, content in enumerate(contents)]
            wanted += [text(client, content, i % 2 == 0) for i, content in enumerate(contents)]
            others = [leaves(client) for _ in range(4)]
            others += [refused(client, prompt="x" * 5000), refused(client, prompt=["x", ""], stream=True)]
            others += [refused(client, temperature=-1), refused(client, n=100, max_tokens=200)]
            answers = await asyncio.gather(*wanted, *others)
            return answers[: len(wanted)]

    assert asyncio.run(all_of_them()) == expected
    wait_until(lambda: server.async_engine.stats().num_running == 0)
    assert server.async_engine.stats().gpu_cache_usage == 0.0
    server.engine.check_integrity()


def test_several_choices_of_a_conversation(client):
    settings = {"model": MODEL, "messages": CHAT, "n": 3, "seed": 5, "temperature": 1.0, "max_tokens": 12}
    whole = client.chat.completions.create(**settings)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    streamed, reasons = [""] * 3, [None] * 3
    for chunk in client.chat.completions.create(**settings, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert streamed == texts
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_a_character_is_never_cut_between_chunks(client, server, monkeypatch):
    """The engine is made to say text whose characters take 1 to 4 tokens each."""
    said = "añ☃😀é" * 4
    tokens = iter([*server.engine.tokenizer(said)["input_ids"], tiny_models.EOS])
    wait_until(lambda: not server.engine.has_unfinished())  # requests of clients that have left
    monkeypatch.setattr(Sampler, "launch", lambda *_: LaunchedSamples(SamplerOutput([[next(tokens)]])))
    chunks = client.completions.create(model=MODEL, prompt="x", max_tokens=200, stream=True)
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert "".join(pieces) == said
    assert "\ufffd" not in "".join(pieces)
    assert 1 < len([piece for piece in pieces if piece]) <= len(said)  # a slow client gets several at once


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": [""]}, "stop"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"extra_body": {"guided_json": 1}}, "guided_json"),
        ({"extra_body": {"use_beam_search": 1}}, "use_beam_search"),
        ({"extra_body": {"use_beam_search": True, "stream": True}}, "use_beam_search"),
        ({"extra_body": {"use_beam_search": True, "n": 17}}, "n"),
        ({"extra_body": {"use_beam_search": True, "best_of": 0}}, "best_of"),
        ({"extra_body": {"use_beam_search": True, "length_penalty": 101}}, "length_penalty"),
        ({"extra_body": {"use_beam_search": True, "early_stopping": "often"}}, "early_stopping"),
        ({"extra_body": {"length_penalty": 2.0}}, "length_penalty"),
        ({"extra_body": {"early_stopping": True}}, "early_stopping"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"extra_body": {"top_logprobs": 2}}, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1000": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
        ({"extra_body": {"prompt_logprobs": 1, "stream": True}}, "prompt_logprobs"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"extra_body": {"min_tokens": 9}}, "min_tokens"),
        ({"extra_body": {"allowed_token_ids": []}}, "allowed_token_ids"),
        ({"extra_body": {"allowed_token_ids": [1000]}}, "allowed_token_ids"),
        ({"extra_body": {"bad_words": [" "]}}, "bad_words"),
        ({"extra_body": {"include_stop_str_in_output": 1}}, "include_stop_str_in_output"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"n": True}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["fine", ""]}, "prompt"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"verbose": 1}}, "stream_options.verbose"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"extra_body": {"stop_token_ids": ["a"]}}, "stop_token_ids[0]"),
        ({"extra_body": {"ignore_eos": "yes"}}, "ignore_eos"),
        ({"extra_body": {"stream": 1}}, "stream"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_requests_are_refused_in_openais_shape(client, change, param):
    request = {"model": MODEL, "prompt": "x", "max_tokens": 4, **change}
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**request)
    body = error.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    assert body["param"] == param
    assert param in body["message"]
    assert "Value error" not in body["message"]


TOOL = {"type": "function", "function": {"name": "f"}}
CHAT_FIELDS = [
    ({"messages": "hello"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"content": "hello"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [TOOL["function"]], "function_call": {"name": "f"}}, "functions"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"structured_outputs": {"regex": "a", "structural_tag": "b"}}, "structured_outputs.structural_tag"),
    ({"guided_regex": 5, "guided_decoding_backend": "auto"}, "guided_regex"),
    ({"max_completion_tokens": "9"}, "max_completion_tokens"),
    ({"response_format": {"type": "json"}}, "response_format.type"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
]


@pytest.mark.parametrize(("change", "param"), CHAT_FIELDS, ids=lambda v: v if isinstance(v, str) else None)
def test_bad_conversations_are_refused_by_name(server, change, param):
    body = {"model": MODEL, "messages": CHAT, **change}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]


def test_a_conversation_that_is_too_long_is_refused_as_messages(server):
    """A conversation has no field `prompt`, whatever the engine calls it."""
    messages = [{"role": "user", "content": "x" * 300}]
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert "max_model_len" in response.json()["error"]["message"]


INTEGERS = {
    "max_tokens": 2.0,
    "n": 1.0,
    "top_k": 3.0,
    "seed": -7.0,
    "best_of": 2.0,
    "stop_token_ids": [300.0],
    "allowed_token_ids": [65.0, 66],
    "min_tokens": 1.0,
    "prompt_logprobs": 1.0,
    "priority": 0.0,
    "logit_bias": {"5": 1},
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": [5.0, 6], "logprobs": 2.0}),
        ("completions", {"prompt": [[5, 6.0], [7.0]], "logprobs": 2.0}),
        ("chat/completions", {"messages": CHAT, "logprobs": True, "top_logprobs": 2.0}),
        ("chat/completions", {"messages": CHAT, "max_tokens": None, "max_completion_tokens": 2.0}),
    ],
)
def test_a_number_without_a_fraction_is_an_integer(server, path, body):
    """Some writers of JSON give every number one."""
    request = {"model": MODEL, "temperature": 1, **INTEGERS, **body}
    response = httpx.post(f"{server.url}/v1/{path}", json=request)
    assert response.status_code == 200, response.text

    def whole(value):
        if isinstance(value, list):
            return [whole(item) for item in value]
        return int(value) if isinstance(value, float) else value

    same = httpx.post(f"{server.url}/v1/{path}", json={name: whole(value) for name, value in request.items()})
    assert response.json()["usage"] == same.json()["usage"]
    assert response.json()["usage"]["completion_tokens"] == 2 * len(same.json()["choices"])


INTEGER_FIELDS = [name for name in INTEGERS if name != "logit_bias"]


@pytest.mark.parametrize("wrong", [2.5, "2", True, 1e400], ids=repr)
@pytest.mark.parametrize("name", [*INTEGER_FIELDS, "logprobs", "prompt"])
def test_what_only_looks_like_an_integer_is_refused(server, name, wrong):
    value = [wrong] if name in ("stop_token_ids", "allowed_token_ids") or name == "prompt" else wrong
    if name == "prompt" and wrong == "2":
        return  # a text
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1, name: value})
    response = httpx.post(
        f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(name)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b'"x"', b"5", b"{", b"\xff\xfe", b'{"model": "a" "b"}']
)
@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded"])
def test_a_body_that_is_no_json_object(server, body, kind):
    """curl without a header sends the second kind."""
    for path in ("completions", "chat/completions"):
        response = httpx.post(f"{server.url}/v1/{path}", content=body, headers={"Content-Type": kind})
        assert response.status_code == 400
        assert "JSON" in response.json()["error"]["message"]


def test_max_completion_tokens_is_the_newer_name(client):
    response = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=3, extra_body={"ignore_eos": True}
    )
    assert response.usage.completion_tokens == 3


def test_what_asks_for_nothing_is_accepted(client):
    client.completions.create(
        model=MODEL,
        prompt="x",
        max_tokens=1,
        presence_penalty=0,
        frequency_penalty=0,
        echo=False,
        logit_bias={},
        best_of=1,
        user="someone",
        extra_body={
            "repetition_penalty": 1.0,
            "use_beam_search": False,
            "length_penalty": 1,
            "early_stopping": False,
            "unknown_field": 1,
        },
    )


def test_a_streamed_request_is_refused_with_a_status_too(client):
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.completions.create(model=MODEL, prompt="x" * 5000, max_tokens=4, stream=True)


def test_messages_that_cannot_be_read(client):
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(openai.BadRequestError, match="text"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": image}])
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model=MODEL, messages=[])


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="tiny-llama"):
        client.completions.create(model="gpt-5", prompt="x")


def test_other_errors_have_the_same_shape(server):
    for response in (
        httpx.get(f"{server.url}/v1/nothing"),
        httpx.post(f"{server.url}/v1/completions", content=b'{"model":'),
        httpx.get(f"{server.url}/v1/completions"),
    ):
        assert response.status_code in (400, 404, 405)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


PATHS = {
    "/health": "GET, HEAD, OPTIONS",
    "/metrics": "GET, HEAD, OPTIONS",
    "/v1/models": "GET, HEAD, OPTIONS",
    f"/v1/models/{MODEL}": "GET, HEAD, OPTIONS",
    "/": "GET, HEAD, OPTIONS",
    "/openapi.json": "GET, HEAD, OPTIONS",
    "/v1/completions": "OPTIONS, POST",
    "/v1/chat/completions": "OPTIONS, POST",
}


@pytest.mark.parametrize("path", PATHS)
def test_methods(server, path):
    url, allowed = server.url + path, PATHS[path]
    refused = httpx.put(url)
    assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
    assert allowed in refused.json()["error"]["message"]
    asked = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for headers in ({}, asked):  # the second is a browser's, which wants to know whether a page may
        options = httpx.options(url, headers=headers)
        assert (options.status_code, options.headers["allow"], options.content) == (204, allowed, b"")
        assert "access-control-allow-origin" not in options.headers
    head = httpx.head(url)
    if "HEAD" not in allowed:
        assert (head.status_code, head.headers["allow"]) == (405, allowed)
        return
    get = httpx.get(url)
    assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
    assert head.headers.get("content-type") == get.headers.get("content-type")


@pytest.mark.parametrize("path", ["/v1/completions/", "/health/", "/v1/nothing", "/metrics/", "/v1//models"])
def test_a_path_that_is_none_is_not_found(server, path):
    """A redirect would lead to whatever host the client has named."""
    for method in ("GET", "POST", "HEAD", "OPTIONS"):
        response = httpx.request(method, server.url + path, headers={"Host": "evil.example"})
        assert response.status_code == 404, method
        assert "evil" not in str(response.headers)
    assert httpx.post(server.url + path).json()["error"]["message"] == f"{path} does not exist"


def test_the_document_says_what_is_served(server):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    for path in ("/v1/completions", "/v1/chat/completions"):
        answers = paths[path]["post"]["responses"]
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {status for status, answer in answers.items() if answer.get("content") == error} >= {
            *("400", "404", "500", "503", "default")
        }
    assert set(paths["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    assert paths["/v1/models/{name}"]["get"]["responses"]["404"]["content"] == error
    assert "content" not in paths["/health"]["get"]["responses"]["200"]
    assert "503" in paths["/health"]["get"]["responses"]
    statuses = {status for path in paths.values() for one in path.values() for status in one["responses"]}
    assert "422" not in statuses


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_text_that_is_not_unicode_is_refused(server, path):
    """JSON can carry half of a surrogate pair."""
    half = (
        '"prompt": "\\ud800"'
        if path == "completions"
        else ('"messages": [{"role": "user", "content": "\\ud800"}]')
    )
    response = httpx.post(
        f"{server.url}/v1/{path}",
        content=f'{{"model": "{MODEL}", {half}}}',
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] in ("prompt", "messages")


def test_models_health_and_page(client, server):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert httpx.get(f"{server.url}/health").status_code == 200
    page = httpx.get(server.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in page.text.replace("<!--", ""), "the page loads something from elsewhere"


def test_a_model_is_retrieved_by_its_name(client, server):
    assert client.models.retrieve(MODEL) == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="tiny-llama") as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"
    response = httpx.get(f"{server.url}/v1/models/gpt-5")
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("name", ["org/name", "/models/a name?", "C:\\models\\50%#"])
def test_a_model_whose_name_is_a_path_is_retrieved(server, name):
    transport = httpx.ASGITransport(app=create_app(server.async_engine, name))

    async def retrieve():
        async with httpx.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(base_url="http://x/v1", api_key="none", http_client=http)
            return (await client.models.retrieve(name)).id, (await http.get(f"http://x/v1/models/{name}/x"))

    found, other = asyncio.run(retrieve())
    assert found == name
    assert other.status_code == 404


def test_events_are_as_the_format_wants(server):
    body = {"model": MODEL, "prompt": "x", "max_tokens": 3, "stream": True, "ignore_eos": True}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)


def test_events_are_lines_for_every_client(client, server, monkeypatch):
    """Some split at whatever `str.splitlines` does: none of it stands in an event as it is."""
    ends = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r\n"
    said = "".join(f"{end}é☃" for end in ends)
    ids = server.engine.tokenizer(said)["input_ids"]
    body = {"model": MODEL, "max_tokens": 200, "stream": True}
    for path, more in (
        ("completions", {"prompt": ends, "echo": True, "logprobs": 0}),
        ("chat/completions", {"messages": CHAT, "logprobs": True, "top_logprobs": 0}),
    ):
        tokens = iter([*ids, tiny_models.EOS])
        original = Sampler.launch

        def says(self, *arguments, tokens=tokens, original=original):
            output = original(self, *arguments).result()
            output.token_ids = [[next(tokens)]]
            found = output.logprobs[0][0]
            output.logprobs[0][0] = found._replace(token_ids=[output.token_ids[0][0], *found.token_ids[1:]])
            return LaunchedSamples(output)

        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "launch", says)
            content = httpx.post(f"{server.url}/v1/{path}", json={**body, **more}).content
        lines = content.decode().splitlines()
        assert lines == content.decode().split("\n")[:-1]
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events.pop() == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        texts = [one["text"] if "text" in one else one["delta"].get("content", "") for one in choices]
        assert "".join(texts) == ("" if path.startswith("chat") else ends) + said
        assert "☃" in content.decode(), "what needs no escape has none"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server, monkeypatch, stream):
    step = server.engine.step

    def slow_step():
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(server.engine, "step", slow_step)  # 230 tokens would take five seconds
    before = server.async_engine.stats().generation_tokens
    url, body = f"{server.url}/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 230}
    body |= {"ignore_eos": True, "temperature": 0, "stream": stream}
    if stream:
        with httpx.stream("POST", url, json=body) as response:
            next(response.iter_text())
            assert server.async_engine.stats().num_running == 1
            assert server.async_engine.stats().gpu_cache_usage > 0
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.3)
    wait_until(lambda: server.async_engine.stats().num_running == 0)
    stats = server.async_engine.stats()
    assert stats.gpu_cache_usage == 0.0
    assert 0 < stats.generation_tokens - before < 100, "it ran to its end"
    with server.client() as client:
        assert client.completions.create(model=MODEL, prompt="x", **GREEDY).usage.completion_tokens == 12


def test_the_schema_of_the_api_has_the_fields_and_what_it_refers_to(server):
    schema = httpx.get(f"{server.url}/openapi.json").json()
    for path, field in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"model", "stop", field} <= set(body["properties"])
    references = set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(schema)))
    assert len(references) >= 3
    for reference in references:
        place = schema
        for name in reference.split("/"):
            place = place[int(name) if isinstance(place, list) else name.replace("~1", "/")]
        assert place["properties"]
