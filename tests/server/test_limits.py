"""Requests that ask for more than one client may: they are refused before there is work for them, and a
stream and /health beside them wait for nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from cupaged.engine.server import app, completions, connections
from cupaged.engine.server.bodies import Bodies
from cupaged.engine.server.limits import Limits

from .beside import PATIENCE, Beside, connect, head, held, read_to_end
from .conftest import MODEL, Running, wait_until

TEXT = {"model": MODEL, "prompt": "x", "max_tokens": 1}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


def path_of(body: dict) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def post(server, body: dict) -> httpx.Response:
    return send(server, path_of(body), json.dumps(body))


def send(server, path: str, content: str) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=120)


def assert_refused(response: httpx.Response, param: str | None, status: int = 400) -> dict:
    assert response.status_code == status, response.text[:1000]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert len(response.content) < 5000
    return error


def too_much(size: int) -> dict[str, tuple[dict, str]]:
    """Bodies with lists of so many entries, and the setting that each is beyond."""
    words, ids = [f"word{i}" for i in range(size)], [5] * size
    return {
        "prompts of tokens": ({**TEXT, "prompt": [[5]] * size}, "prompt", "max_choices"),
        "prompts": ({**TEXT, "prompt": ["a"] * size}, "prompt", "max_choices"),
        "messages": ({**CHAT, "messages": CHAT["messages"] * size}, "messages", "max_messages"),
        "bad_words": ({**TEXT, "bad_words": words}, "bad_words", "max_bad_words"),
        "stop": ({**TEXT, "stop": words, "max_tokens": 100}, "stop", "max_stop_strings"),
        "logit_bias": ({**TEXT, "logit_bias": dict.fromkeys(range(size), 1)}, "logit_bias", "max_token_ids"),
        "stop_token_ids": ({**TEXT, "stop_token_ids": ids}, "stop_token_ids", "max_token_ids"),
        "allowed_token_ids": (
            {**CHAT, "allowed_token_ids": ids},
            "allowed_token_ids",
            "max_token_ids",
        ),
    }


LISTS = tuple(too_much(0))


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_tens_of_thousands_are_refused(server, name):
    body, param, setting = too_much(30_000)[name]
    content = json.dumps(body)  # the client's work is not to be measured
    with Beside(server):
        start = time.monotonic()
        error = assert_refused(send(server, path_of(body), content), param)
        assert time.monotonic() - start < PATIENCE
    assert setting in error["message"]
    assert "30000" in error["message"]


@pytest.mark.matrix
@pytest.mark.parametrize("name", LISTS)
def test_lists_of_a_million_are_refused(server, name):
    body = too_much(1_000_000)[name][0]
    content = json.dumps(body)
    with Beside(server):
        start = time.monotonic()
        assert_refused(send(server, path_of(body), content), None, 413)
        assert time.monotonic() - start < PATIENCE


@pytest.mark.parametrize("name", LISTS)
def test_as_much_as_a_limit_is_answered(llama_dir, name):
    """And one more is not."""
    small = Limits(max_choices=3, max_messages=3, max_stop_strings=3, max_bad_words=3, max_token_ids=3)
    with Running(llama_dir, limits=small) as server:
        assert post(server, too_much(3)[name][0]).status_code == 200
        body, param, setting = too_much(4)[name]
        assert setting in assert_refused(post(server, body), param)["message"]


@pytest.mark.parametrize("body", [TEXT, CHAT])
@pytest.mark.parametrize("fields", [{"n": 4}, {"best_of": 4}, {"n": 4, "use_beam_search": True}])
def test_choices_are_prompts_times_outputs(llama_dir, body, fields):
    with Running(llama_dir, limits=Limits(max_choices=3)) as server:
        error = assert_refused(post(server, {**body, **fields}), "n")
        assert "max_choices" in error["message"]
        if "prompt" in body:
            assert post(server, {**body, "prompt": ["x"] * 3}).status_code == 200
            assert_refused(post(server, {**body, "prompt": ["x"] * 2, "n": 2}), "n")


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_strings_that_are_looked_for_have_a_length(server, name):
    most = Limits().max_string_length
    for value in ("x" * most, ["y", "x" * most]):
        if isinstance(value, list) or name == "stop":
            assert post(server, {**TEXT, name: value}).status_code == 200
    error = assert_refused(post(server, {**TEXT, name: ["y", "x" * (most + 1)]}), name)
    assert "max_string_length" in error["message"]
    if name == "stop":
        assert_refused(post(server, {**TEXT, name: "x" * (most + 1)}), name)


LONG = "z" * 1_300_000
ECHOES = {
    "a model": {**TEXT, "model": LONG},
    "a wrong type": {**TEXT, "temperature": LONG},
    "a list": {**TEXT, "temperature": [[]] * 400_000},
    "a key": {**TEXT, "logit_bias": {LONG: 1}},
    "a value under a key": {**TEXT, "logit_bias": {LONG: "x"}},
    "a prompt": {**TEXT, "prompt": {"x": LONG}},
    "half a pair": {**TEXT, "prompt": "\ud800" + LONG[:5000]},
    "an unsupported field": {**TEXT, "tools": LONG},
    "a setting of the template": {**CHAT, "chat_template_kwargs": {"tokenize": LONG}},
    "a role": {**CHAT, "messages": [{"role": [LONG], "content": "x"}]},
    "a salt": {**TEXT, "cache_salt": [LONG]},
    "a word": {**TEXT, "max_tokens": 100, "bad_words": ["\ud800" * 100] * 128},
}


@pytest.mark.parametrize("name", ECHOES)
def test_no_error_echoes_megabytes(server, name):
    content = json.dumps(ECHOES[name])
    with Beside(server):
        response = send(server, path_of(ECHOES[name]), content)
        assert response.status_code == (404 if name == "a model" else 400)
        assert len(response.content) < 5000
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("size", [2_100_000, pytest.param(50_000_000, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("body", [TEXT, CHAT])
def test_a_body_that_is_too_large_is_refused_while_it_comes(server, size, chunked, body):
    content = json.dumps({**body, "model": "z" * size}).encode()
    pieces = (content[i : i + 100_000] for i in range(0, len(content), 100_000))
    headers = {"Content-Type": "application/json"}
    with Beside(server), httpx.Client() as client:
        for _ in range(2):  # and the client knows that it has to connect again
            response = client.post(
                f"{server.url}{path_of(body)}", content=pieces if chunked else content, headers=headers
            )
            error = assert_refused(response, None, 413)
            assert "max_body_size" in error["message"]
            assert response.headers["connection"] == "close"
            pieces = (b"z" * 100_000 for _ in range(30))


def test_the_size_of_a_body_is_a_setting(llama_dir):
    content = json.dumps(TEXT)
    for spare, status in ((0, 200), (-1, 413)):
        with Running(llama_dir, limits=Limits(max_body_size=len(content) + spare)) as server:
            assert send(server, "/v1/completions", content).status_code == status


def test_a_body_without_an_end_is_left(server, monkeypatch):
    """The client gets its answer, and the connection ends although it never stops sending."""
    monkeypatch.setattr(connections, "_LINGER", 1.0)
    with Beside(server), connect(server, head("/v1/completions", "Transfer-Encoding: chunked")) as connection:
        piece, end = b"186a0\r\n" + b"z" * 100_000 + b"\r\n", time.monotonic() + 30
        with pytest.raises(OSError):  # noqa: PT012
            for _ in range(10_000):
                connection.sendall(piece)
                time.sleep(0.005)
        assert time.monotonic() < end
    with connect(server, head("/v1/completions", "Content-Length: 100000000")) as connection:
        answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"max_body_size" in answer


def test_many_small_chunks_are_read_between_other_things(server, monkeypatch):
    """Each costs the parser as much as a large one: a few kilobytes of them are parsed at once."""
    receive, sizes = H11Protocol.data_received, []

    def noted(self, data):
        sizes.append(len(data))
        receive(self, data)

    monkeypatch.setattr(H11Protocol, "data_received", noted)
    with Beside(server), connect(server, head("/v1/completions", "Transfer-Encoding: chunked")) as connection:
        connection.sendall(b"1\r\n5\r\n" * 50_000 + b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert 1000 < max(sizes) < 10_000


def test_bodies_have_a_size_together(llama_dir, monkeypatch):
    """Those that have been coming for the longest time make way."""
    made = []
    monkeypatch.setattr(app, "Bodies", lambda *arguments: made.append(Bodies(*arguments)) or made[-1])
    limits = Limits(max_bodies_size=100_000)
    part = head("/v1/completions", "Content-Length: 100000") + b" " * 30_000
    with Running(llama_dir, limits=limits) as server, contextlib.ExitStack() as stack, Beside(server):
        slow = [stack.enter_context(connect(server, part)) for _ in range(3)]
        wait_until(lambda: made[0]._size == 90_000)
        slow.append(stack.enter_context(connect(server, part)))
        answer = read_to_end(slow[0])
        assert answer.startswith(b"HTTP/1.1 429")
        assert b"max_bodies_size" in answer
        assert b"retry-after: 1" in answer.lower()
        content = json.dumps(TEXT)
        assert send(server, "/v1/completions", content + " " * 90_000).status_code == 200
        for connection in slow[1:]:
            assert read_to_end(connection).startswith(b"HTTP/1.1 429")
        wait_until(lambda: made[0]._size == 0)
        one = stack.enter_context(connect(server, part))
        wait_until(lambda: made[0]._size == 30_000)
        one.sendall(b" " * 30_000)
        wait_until(lambda: made[0]._size == 60_000)
        answer = send(server, "/v1/completions", content + " " * 90_000)
        assert answer.status_code == 200  # again instead of the older one
        assert read_to_end(one).startswith(b"HTTP/1.1 429")


@pytest.mark.parametrize("deep", [64, 65, 900, 300_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_lists_and_objects_in_each_other(server, deep, opening):
    """The body is the first, chat_template_kwargs the second."""
    inner = opening * (deep - 2) + "1" + ("]" if opening == "[" else "}") * (deep - 2)
    content = json.dumps({**CHAT, "chat_template_kwargs": {"x": 0}}).replace('"x": 0', f'"x": {inner}')
    with Beside(server):
        response = send(server, "/v1/chat/completions", content)
    if deep == 64:
        assert response.status_code == 200, response.text
    elif deep == 65:
        assert "max_json_depth" in assert_refused(response, None)["message"]
    else:
        assert_refused(response, None)


def test_lists_and_objects_beside_each_other(llama_dir):
    """Those in strings are none."""
    with Running(llama_dir, limits=Limits(max_json_lists=9)) as server:
        text = '\\[{"[{' * 9
        for count, status in ((7, 200), (8, 400)):  # and the body, and the list that they are in
            for field, lists in (("x", [{}] * count), ("user", [[]] * count)):
                response = post(server, {**TEXT, "first": text, field: lists, "last": f"]{text}"})
                assert response.status_code == status, response.text
                if status == 400:
                    assert "max_json_lists" in assert_refused(response, None)["message"]


UNFINISHED = ['"', '"\\', '\\"', '""', "[", "{", '"[', '\\"[', '"x', "]", "\\", '["']


@pytest.mark.parametrize("piece", UNFINISHED)
def test_to_count_takes_as_long_as_the_body_is(piece):
    start = time.process_time()
    for beginning in ("", '"', "{"):
        with contextlib.suppress(ValueError):
            Limits().check_json(("[" * 60_000 + beginning + piece * (1_900_000 // len(piece))).encode())
    assert time.process_time() - start < PATIENCE


PARTS = [{"type": "text", "text": "x"}] * 20
LARGE = {
    "a list of lists": {**TEXT, "x": [[]] * 40_000},
    "keys": {**TEXT, "x": {f"{i}": i for i in range(100_000)}},
    "a wrong list": {**TEXT, "prompt": [5] * 300_000 + ["x"]},
    "lists of tokens": {**TEXT, "prompt": [[5] * 1000] * 300},
    "texts": {
        **CHAT,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 20} for _ in range(2000)],
    },
    "no messages": {**CHAT, "messages": [{}] * 2000},
    "words": {**TEXT, "prompt": "the block " * 190_000},
    "names": {**TEXT, **{f"x{i}": None for i in range(100_000)}},
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_and_allowed_is_read_beside_other_things(server, name):
    content = json.dumps(LARGE[name])
    with Beside(server):
        for _ in range(2):
            response = send(server, path_of(LARGE[name]), content)
            assert response.status_code in (200, 400), response.text[:1000]


@pytest.mark.parametrize("body", [TEXT, CHAT])
def test_answers_with_log_probabilities_are_written_beside_other_things(server, monkeypatch, body):
    """They can be megabytes."""
    whole, threads = completions._whole, []

    def noted(*arguments):
        threads.append(threading.current_thread().name)
        return whole(*arguments)

    monkeypatch.setattr(completions, "_whole", noted)
    for fields in ({}, {"prompt_logprobs": 1}, {"logprobs": "messages" in body or 1}):
        assert post(server, {**body, **fields}).status_code == 200
    assert not threads[0].startswith("cupaged-bodies")
    assert all(name.startswith("cupaged-bodies") for name in threads[1:])
    assert len(threads) == 3


def test_a_queue_has_an_end(llama_dir, monkeypatch):
    """Of prompts that wait for their first token. Those in it are answered."""
    with (
        Running(llama_dir, limits=Limits(max_waiting_requests=3)) as server,
        ThreadPoolExecutor(8) as threads,
        held(server, monkeypatch) as engine,
    ):
        assert_refused(post(server, {**TEXT, "prompt": ["x"] * 4}), None, 429)  # more than ever fit
        waiting = [threads.submit(post, server, {**TEXT, "prompt": ["x"] * 2})]
        wait_until(lambda: server.async_engine.stats().num_waiting == 2)
        assert_refused(post(server, {**TEXT, "prompt": ["x"] * 2}), None, 429)
        waiting.append(threads.submit(post, server, CHAT))
        wait_until(lambda: server.async_engine.stats().num_waiting == 3)
        for body in (TEXT, CHAT, {**TEXT, "stream": True}, {**TEXT, "prompt": 5}):
            start = time.monotonic()
            response = post(server, body)
            assert time.monotonic() - start < 2
            error = assert_refused(response, None, 429)
            assert "max_waiting_requests" in error["message"]
            assert response.headers["retry-after"] == "1"
        with server.client() as client, pytest.raises(openai.RateLimitError):
            client.completions.create(**TEXT)
        assert not any(one.done() for one in waiting)
        engine.set()
        assert [one.result().status_code for one in waiting] == [200] * 2
        assert post(server, {**TEXT, "prompt": ["x"] * 3}).status_code == 200  # the queue is empty again


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_the_queue_makes_room(llama_dir, monkeypatch, stream):
    with Running(llama_dir, limits=Limits(max_waiting_requests=3)) as server:
        with held(server, monkeypatch):
            for _ in range(3):
                body = {**TEXT, "prompt": ["x"] * 3, "stream": stream}
                with pytest.raises(httpx.TimeoutException):
                    httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.2)
                wait_until(lambda: post(server, {**TEXT, "prompt": 5}).status_code == 400)  # no 429
        assert post(server, {**TEXT, "prompt": ["x"] * 3}).status_code == 200
        wait_until(lambda: not server.engine.has_unfinished())


def test_requests_are_added_between_steps_a_few_at_a_time(llama_dir, monkeypatch):
    """However many prompts one has, a step comes after a hundredth of a second."""
    events = []
    with Running(llama_dir) as server, Beside(server):
        add, step = server.engine.add_request, server.engine.step

        def slow_add(*args, **settings):
            time.sleep(0.003)
            events.append("add")
            return add(*args, **settings)

        def noted_step():
            events.append("step")
            return step()

        monkeypatch.setattr(server.engine, "add_request", slow_add)
        monkeypatch.setattr(server.engine, "step", noted_step)
        assert post(server, {**TEXT, "prompt": ["x"] * 200}).status_code == 200
    runs = " ".join(events).split("step")
    assert events.count("add") >= 200
    assert max(run.count("add") for run in runs) <= 5


def test_a_limit_is_a_positive_number():
    for field in dataclasses.fields(Limits):
        for value in (0, -1, math.nan):
            with pytest.raises(ValueError, match=f"{field.name} must be positive"):
                Limits(**{field.name: value})
