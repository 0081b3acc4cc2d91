"""What a request asks of the sampler, as the `openai` client sends it and sees what comes back."""

from __future__ import annotations

import json
import math

import httpx
import openai
import pytest

from cupaged.engine import LLM, SamplingParams
from cupaged.engine.outputs import Logprob
from cupaged.engine.sampling.sampler import Sampler
from cupaged.engine.sampling.samples import LaunchedSamples, SamplerOutput
from cupaged.engine.server.logprobs import ChatLogprobs, TextLogprobs, for_prompt, token_bytes
from tests import tiny_models
from tests.unit.test_detokenizer import byte_fallback_tokenizer

from .conftest import MODEL

PROMPT = "The blöcks"
CHAT = [{"role": "user", "content": "Hi"}]
SETTINGS = {"model": MODEL, "temperature": 0, "max_tokens": 10, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def offline(llama_dir):
    llm = LLM(llama_dir, device="cpu", block_size=8, max_num_batched_tokens=256)

    def generate(prompt, **params):
        settings = {"temperature": 0, "max_tokens": 10, "ignore_eos": True, **params}
        return llm.generate([prompt], SamplingParams(**settings), use_tqdm=False)[0]

    return generate


def near(value):
    """Equal but for the last bits of floats: on some CPUs those of a product depend on how many tokens it
    is for, and for a prompt seen before fewer are computed."""
    if isinstance(value, dict):
        return {key: near(item) for key, item in value.items()}
    if isinstance(value, list):
        return [near(item) for item in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


def add_up(chunks) -> tuple[str, dict[str, list]]:
    """The text and the log probabilities of a streamed text."""
    text, lists = "", {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.text
            for name, values in lists.items():
                values += getattr(choice.logprobs, name)
    return text, lists


def named(position) -> dict[str, float]:
    """Logarithms by text; bytes by their value, and tokens with a text that is there by their id."""
    names: dict[str, float] = {}
    for token, one in position.items():
        text = one.decoded_token
        if text == "\ufffd":
            text = f"bytes:\\x{token_bytes(tiny_models.tokenizer(), token, text)[0]:02x}"
        names[f"token_id:{token}" if text in names else text] = near(one.logprob)
    return names


FIELDS = {
    "presence_penalty": {"presence_penalty": 2, "allowed_token_ids": [65, 66, 67, 68]},
    "frequency_penalty": {"frequency_penalty": 1.5, "allowed_token_ids": [65, 66, 67, 68]},
    "logit_bias": {"logit_bias": {"65": 60, "66": 60.0}},
    "seed": {"seed": 5, "temperature": 1},
    "min_p": {"min_p": 0.2, "seed": 5, "temperature": 2},
    "top_k": {"top_k": 2, "seed": 5, "temperature": 2},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "allowed_token_ids": {"allowed_token_ids": [65, 66, 67]},
    "min_tokens": {"min_tokens": 6, "ignore_eos": False, "logit_bias": {str(tiny_models.EOS): 100}},
    "stop_token_ids": {"stop_token_ids": [65], "allowed_token_ids": [65, 66], "min_tokens": 2},
    "best_of": {"best_of": 4, "n": 2, "seed": 5, "temperature": 1},
    "skip_special_tokens": {"skip_special_tokens": False, "allowed_token_ids": [tiny_models.START]},
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_does_what_it_does_in_the_engine(client, offline, name):
    fields = {"ignore_eos": True, **FIELDS[name]}
    params = {**fields, "logit_bias": {int(k): v for k, v in fields.get("logit_bias", {}).items()}}
    request = {"temperature": 0, **fields}
    expected = [one.text for one in offline(PROMPT, **params).outputs]
    plain = {key: value for key, value in params.items() if key != name}
    assert expected != [one.text for one in offline(PROMPT, **plain).outputs], "the field changes nothing"
    settings = {"model": MODEL, "max_tokens": 10, "extra_body": request}
    whole = client.completions.create(prompt=PROMPT, **settings)
    assert [choice.text for choice in whole.choices] == expected
    chat = offline("<start>user: Hi<end><start>assistant: ", **params)
    answer = client.chat.completions.create(messages=CHAT, **settings)
    assert [choice.message.content for choice in answer.choices] == [one.text for one in chat.outputs]


# The fields of a beam search and the same for the engine; each after the first differs from the one before.
ENDING = {"stop_token_ids": list(range(0, 256, 6)), "max_tokens": 12}
SEARCHES = [
    ({"n": 3}, {"n": 3, "beam_width": 3}),
    ({"n": 3, "best_of": 6}, {"n": 3, "beam_width": 6}),
    ({"n": 3, "length_penalty": -2.0}, {"n": 3, "beam_width": 3, "length_penalty": -2.0}),
    ({"n": 3, "early_stopping": True}, {"n": 3, "beam_width": 3, "early_stopping": True}),
    (
        {"n": 3, "length_penalty": 2, "early_stopping": "never"},
        {"n": 3, "beam_width": 3, "length_penalty": 2, "early_stopping": "never"},
    ),
]


def test_beam_search_is_the_engines(client, offline):
    """Both endpoints, several prompts at once; every field changes something."""
    seen = []
    for fields, params in SEARCHES:
        settings = {"model": MODEL, "extra_body": {"use_beam_search": True, **ENDING, **fields}}
        by_prompt = [offline(prompt, **ENDING, **params).outputs for prompt in (PROMPT, "Another")]
        expected = [(one.text, one.finish_reason) for outputs in by_prompt for one in outputs]
        whole = client.completions.create(prompt=[PROMPT, "Another"], **settings)
        assert [choice.index for choice in whole.choices] == list(range(6))
        assert [(choice.text, choice.finish_reason) for choice in whole.choices] == expected
        assert whole.usage.completion_tokens == sum(len(o.token_ids) for outs in by_prompt for o in outs)
        chat = offline("<start>user: Hi<end><start>assistant: ", **ENDING, **params)
        answer = client.chat.completions.create(messages=CHAT, **settings)
        assert [choice.message.content for choice in answer.choices] == [one.text for one in chat.outputs]
        assert expected not in seen, fields
        seen.append(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5),
        ("top_k", 2),
        ("top_p", 0.5),
        ("min_p", 0.1),
        ("stop", "x"),
        ("min_tokens", 1),
        ("presence_penalty", 1.0),
        ("frequency_penalty", 1.0),
        ("repetition_penalty", 2.0),
        ("logit_bias", {"5": 1.0}),
        ("allowed_token_ids", [5]),
        ("bad_words", ["x"]),
        ("prompt_logprobs", 1),
        ("logprobs", None),
    ],
)
def test_what_does_not_go_with_beam_search_is_refused_by_name(server, name, value):
    for path, body in (
        ("completions", {"prompt": "x", "logprobs": 1}),
        ("chat/completions", {"messages": CHAT, "logprobs": True}),
    ):
        if name != "logprobs":  # the one field that differs between the two
            body = {**body, "logprobs": None, name: value}
        body |= {"model": MODEL, "use_beam_search": True, "n": 2}
        response = httpx.post(f"{server.url}/v1/{path}", json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == name
        assert f"{name} does not go with beam search" in error["message"]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_is_in_the_text_if_asked_for(client, offline, include):
    text = offline(PROMPT).outputs[0].text
    stop = text[3:5]
    end = text.index(stop) + 2 * include
    extra = {"ignore_eos": True, "include_stop_str_in_output": include}
    settings = {**SETTINGS, "prompt": PROMPT, "stop": stop, "extra_body": extra}
    assert client.completions.create(**settings).choices[0].text == text[:end]
    streamed = client.completions.create(**settings, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text[:end]


def test_bad_words(client, offline):
    text = offline(PROMPT).outputs[0].text
    extra = {"ignore_eos": True, "bad_words": [text[2:4]]}
    answer = client.completions.create(**{**SETTINGS, "prompt": PROMPT, "extra_body": extra})
    assert answer.choices[0].text == offline(PROMPT, bad_words=[text[2:4]]).outputs[0].text != text


def test_log_probabilities_of_a_text(client, offline):
    expected = offline(PROMPT, logprobs=3).outputs[0]
    found = client.completions.create(**SETTINGS, prompt=PROMPT, logprobs=3).choices[0].logprobs
    assert len(found.tokens) == 10
    for token, position, logprob, likely in zip(
        expected.token_ids, expected.logprobs, found.token_logprobs, found.top_logprobs
    ):
        assert logprob == near(position[token].logprob)
        assert likely == named(position)
    assert client.completions.create(**SETTINGS, prompt=PROMPT).choices[0].logprobs is None
    none = client.completions.create(**SETTINGS, prompt=PROMPT, logprobs=0).choices[0].logprobs
    assert none.token_logprobs == near(found.token_logprobs)
    assert [list(likely.values()) for likely in none.top_logprobs] == [[x] for x in none.token_logprobs]
    # Whole or in pieces.
    streamed = client.completions.create(**SETTINGS, prompt=PROMPT, logprobs=3, stream=True)
    assert add_up(streamed)[1] == near({name: getattr(found, name) for name in add_up([])[1]})


def test_log_probabilities_of_an_answer(client, offline):
    expected = offline("<start>user: Hi<end><start>assistant: ", logprobs=2).outputs[0]
    settings = {**SETTINGS, "messages": CHAT, "logprobs": True}
    found = client.chat.completions.create(**settings, top_logprobs=2).choices[0].logprobs.content
    for token, position, entry in zip(expected.token_ids, expected.logprobs, found, strict=True):
        assert entry.token == position[token].decoded_token
        assert entry.logprob == near(position[token].logprob)
        assert [one.logprob for one in entry.top_logprobs] == near([o.logprob for o in position.values()])
        assert len(entry.bytes) == 1 or token >= 256  # one token a byte
    assert [
        e.top_logprobs for e in client.chat.completions.create(**settings).choices[0].logprobs.content
    ] == ([[]] * 10)
    pieces = []
    for chunk in client.chat.completions.create(**settings, top_logprobs=2, stream=True):
        if chunk.choices[0].logprobs is not None:
            pieces += chunk.choices[0].logprobs.content
    assert [piece.model_dump() for piece in pieces] == near([entry.model_dump() for entry in found])


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_echo(client, server, offline, as_tokens, logprobs):
    """The prompt comes first, with its log probabilities; whole, streamed, and alone."""
    ids = server.engine.tokenizer(PROMPT)["input_ids"]
    plain = offline(PROMPT, logprobs=logprobs, prompt_logprobs=logprobs)
    settings = {**SETTINGS, "prompt": ids if as_tokens else PROMPT, "echo": True, "logprobs": logprobs}
    whole = client.completions.create(**settings)
    assert whole.choices[0].text == PROMPT + plain.outputs[0].text
    assert whole.usage.completion_tokens == 10
    alone = client.completions.create(**{**settings, "max_tokens": 0})
    assert (alone.choices[0].text, alone.choices[0].finish_reason) == (PROMPT, "length")
    assert alone.usage.completion_tokens == 0
    chunks = list(client.completions.create(**settings, stream=True))
    assert chunks[0].choices[0].text.startswith(PROMPT)
    if logprobs is None:
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert whole.choices[0].logprobs is None
        return
    found = whole.choices[0].logprobs
    positions = [*plain.prompt_logprobs, *plain.outputs[0].logprobs]
    tokens = [*ids, *plain.outputs[0].token_ids]
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    for token, position, logprob, likely in zip(
        tokens[1:], positions[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True
    ):
        assert logprob == near(position[token].logprob)
        assert likely == named(position)
    assert add_up(chunks) == (whole.choices[0].text, near(found.model_dump()))
    in_prompt = {name: values[: len(ids)] for name, values in found.model_dump().items()}
    assert alone.choices[0].logprobs.model_dump() == near(in_prompt)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_alone_may_have_as_many_tokens_as_there_are(server, stream):
    """The likelihood of texts is asked for so: nothing is sampled, and needs no room."""
    body = {"model": MODEL, "max_tokens": 0, "echo": True, "stream": stream, "n": 2}
    most = server.engine.max_model_len
    for count in (1, most - 1, most):
        prompt = [(7 * i) % 256 for i in range(count)]
        for more in ({"logprobs": 1}, {}):
            response = httpx.post(f"{server.url}/v1/completions", json={**body, **more, "prompt": prompt})
            assert response.status_code == 200, response.text
            if stream:
                events = [json.loads(e.removeprefix("data: ")) for e in response.text.split("\n\n")[:-2]]
                choices = [choice for event in events for choice in event["choices"]]
            else:
                choices = response.json()["choices"]
                assert response.json()["usage"]["completion_tokens"] == 0
            assert [choice["finish_reason"] for choice in choices] == ["length", "length"]
            for choice in choices:
                assert len(choice["logprobs"]["tokens"] if more else prompt) == count
    for refused in ({"prompt": [5] * (most + 1)}, {"prompt": [5] * most, "max_tokens": 1}):
        error = httpx.post(f"{server.url}/v1/completions", json={**body, **refused}).json()["error"]
        assert error["param"] == "prompt"


def test_every_token_has_its_place_in_the_text(client, server, monkeypatch):
    """A character of several tokens: each is named by its bytes, at the place of the character."""
    said = "añ☃b"
    ids = server.engine.tokenizer(said)["input_ids"]
    ids = ids + ids  # for a request that is streamed and one that is not
    original = Sampler.launch

    def says(self, *arguments):
        output: SamplerOutput = original(self, *arguments).result()
        token = ids.pop(0)
        found = output.logprobs[0][0]
        output.logprobs[0][0] = found._replace(token_ids=[token, *found.token_ids[1:]])
        output.token_ids = [[token]]
        return LaunchedSamples(output)

    monkeypatch.setattr(Sampler, "launch", says)
    settings = {**SETTINGS, "prompt": "xy", "max_tokens": 7, "logprobs": 0}
    found = client.completions.create(**settings).choices[0]
    assert found.text == said
    assert found.logprobs.tokens == [
        *["a", "bytes:\\xc3", "bytes:\\xb1", "bytes:\\xe2", "bytes:\\x98", "bytes:\\x83", "b"]
    ]
    assert found.logprobs.text_offset == [0, 1, 1, 2, 2, 2, 3]
    assert add_up(client.completions.create(**settings, stream=True))[1] == near(found.logprobs.model_dump())


def test_log_probabilities_of_the_prompt_in_vllms_shape(client, offline):
    settings = {**SETTINGS, "max_tokens": 1, "extra_body": {"prompt_logprobs": 2}}
    expected = offline(PROMPT, prompt_logprobs=2).prompt_logprobs
    found = client.completions.create(**settings, prompt=PROMPT).choices[0].prompt_logprobs
    assert found[0] is None
    for position, entry in zip(expected[1:], found[1:], strict=True):
        assert {int(token): one["rank"] for token, one in entry.items()} == {
            token: one.rank for token, one in position.items()
        }
        assert [one["logprob"] for one in entry.values()] == near([o.logprob for o in position.values()])
    chat = client.chat.completions.create(**settings, messages=CHAT)
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_what_json_has_no_number_for(value):
    """The answer would be a 400, or in a stream no JSON."""
    position = {5: Logprob(value, 1, "a")}
    assert for_prompt([None, position], 1)[1]["5"]["logprob"] == -9999
    chat = ChatLogprobs(tiny_models.tokenizer(), 1).of([5], [position])["content"][0]
    assert chat["logprob"] == chat["top_logprobs"][0]["logprob"] == -9999
    assert TextLogprobs(tiny_models.tokenizer(), 1).of([5], [position])["token_logprobs"] == [-9999]


def test_the_bytes_of_a_token():
    byte_level, fallback = tiny_models.tokenizer(), byte_fallback_tokenizer()
    for tokenizer in (byte_level, fallback):
        ids = tokenizer("€é", add_special_tokens=False)["input_ids"][-5:]
        assert b"".join(token_bytes(tokenizer, i, tokenizer.decode([i])) for i in ids) == "€é".encode()
    assert token_bytes(byte_level, tiny_models.EOS, "<eos>") == b"<eos>"


def test_a_cache_salt_keeps_prompts_apart(server):
    """Seen by the counter of cached tokens, for text, token ids and chats."""
    client = server.client()
    settings = {"model": MODEL, "max_tokens": 1, "temperature": 0}

    def hits(call) -> int:
        before = server.engine.stats().prefix_cache_hits
        call()
        return server.engine.stats().prefix_cache_hits - before

    for prompt in ("a text that is long enough for a few blocks", list(range(65, 90))):

        def ask(salt=None, prompt=prompt):
            body = {} if salt is None else {"cache_salt": salt}
            return client.completions.create(prompt=prompt, extra_body=body, **settings)

        ask()
        assert hits(ask) >= 16
        assert hits(lambda: ask("pepper")) == 0
        assert hits(lambda: ask("pepper")) >= 16
    with pytest.raises(openai.BadRequestError, match="cache_salt"):
        client.chat.completions.create(messages=CHAT, extra_body={"cache_salt": ""}, **settings)


def test_the_priority_reaches_the_scheduler(server, monkeypatch):
    given = []
    add = server.engine.add_request

    def recorded(*arguments, priority, **others):
        given.append(priority)
        add(*arguments, **others)

    monkeypatch.setattr(server.engine, "add_request", recorded)
    client = server.client()
    client.completions.create(prompt="Hi", model=MODEL, max_tokens=1, extra_body={"priority": -3})
    client.chat.completions.create(messages=CHAT, model=MODEL, max_tokens=1)
    assert given == [-3, 0]
    monkeypatch.undo()
    with pytest.raises(openai.BadRequestError, match=r"priority is -3, .* scheduling_policy"):
        client.completions.create(prompt="Hi", model=MODEL, extra_body={"priority": -3})
    with pytest.raises(openai.BadRequestError, match="priority"):
        client.completions.create(prompt="Hi", model=MODEL, extra_body={"priority": "high"})
