"""Requests that are almost right, many at a time: no error of ours, no hang, and nothing left behind."""

from __future__ import annotations

import copy
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cupaged.engine.server.limits import Limits
from cupaged.engine.server.protocol import UNSUPPORTED

from .conftest import MODEL, Running, wait_until

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
]
COMMON = {"model": MODEL, "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "seed": 1, "stop": ["a", "bc"]}
TOOL = {"name": "now", "description": "The time.", "strict": True}
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]},
    {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "3"},
]
BLOCKS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "now", "input": {}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "3"}]},
]
RESPONSE = {
    "model": MODEL,
    "input": "abc",
    "max_output_tokens": 3,
    "temperature": 0.7,
    "tool_choice": "none",
    "metadata": {"a": "b"},
    "user": "me",
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 2,
}
MESSAGE = {"model": MODEL, "max_tokens": 3, "messages": CHAT[1:], "stop_sequences": ["a"], "top_k": 5}
ENDS = (b"data: [DONE]\n\n", b'"type":"message_stop"}\n\n')
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {**COMMON, "prompt": "abc", "logprobs": 2, "n": 2, "echo": True}),
    ("/v1/completions", {**COMMON, "prompt": [[1, 2], [3]], "stream": True, "logit_bias": {"5": 1.5}}),
    ("/v1/completions", {**COMMON, "prompt": ["a", "b"], "use_beam_search": True, "best_of": 2}),
    ("/v1/chat/completions", {**COMMON, "messages": CHAT, "logprobs": True, "top_logprobs": 3}),
    (
        "/v1/chat/completions",
        {**COMMON, "messages": CHAT, "stream": True, "stream_options": {"include_usage": True}},
    ),
    ("/v1/responses", {"model": MODEL, "input": "abc", "max_output_tokens": 3, "temperature": 0.5}),
    (
        "/v1/responses",
        {"model": MODEL, "input": [{"role": "user", "content": "Hi"}], "instructions": "Be brief."},
    ),
    ("/v1/messages", {**COMMON, "stop": None, "seed": None, "messages": CHAT[1:], "system": "Be brief."}),
    ("/v1/messages/count_tokens", {"model": MODEL, "messages": CHAT[1:]}),
    ("/tokenize", {"model": MODEL, "prompt": "abc", "return_token_strs": True}),
    ("/tokenize", {"messages": CHAT, "add_generation_prompt": False}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/v1/responses", {**RESPONSE, "tools": [{"type": "function", **TOOL, "parameters": {}}]}),
    ("/v1/responses", {**RESPONSE, "stream": True, "input": ITEMS, "text": {"format": {"type": "text"}}}),
    ("/v1/messages", {**MESSAGE, "tools": [{**TOOL, "input_schema": {}}], "tool_choice": {"type": "none"}}),
    ("/v1/messages", {**MESSAGE, "stream": True, "system": "Be brief.", "thinking": {"type": "disabled"}}),
    ("/v1/messages/count_tokens", {**MESSAGE, "messages": BLOCKS}),
]
JUNK = [
    *(None, True, False, 0, 1, -1, 2, 3.5, 128, 129, 2**31, 2**63, 10**30, 1e308, -0.0, 1e-300),
    *("", "a", "\x00", "\ud800", "\u2028", "none", "auto", "x" * 5000, "\U0010ffff" * 9),
    *([], {}, [[]], [None], [0], [-1], [10**9], ["a"], [[1], ["a"]], {"a": {"b": []}}, {"1": "x"}, {"x": 1}),
]
FIELDS = [
    *("top_k", "min_p", "best_of", "ignore_eos", "min_tokens", "bad_words", "stop_token_ids", "priority"),
    *("repetition_penalty", "presence_penalty", "prompt_logprobs", "allowed_token_ids", "cache_salt", "user"),
    *("chat_template_kwargs", "length_penalty", "early_stopping", "max_completion_tokens", "suffix"),
    *UNSUPPORTED,
]


def mutated(draws: random.Random, body: dict[str, Any]) -> bytes:
    """Return a body with some of its values changed, and sometimes with some of its bytes."""
    body = copy.deepcopy(body)
    for _ in range(draws.choice([0, 1, 1, 1, 2, 4])):
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys or draws.random() < 0.2:
                key = draws.choice(FIELDS)
                break
            key = draws.choice(keys)
            if not isinstance(place[key], (dict, list)) or draws.random() < 0.3:
                break
            place = place[key]
        if isinstance(place, list) and not isinstance(key, int):
            place.append(copy.deepcopy(draws.choice(JUNK)))
        elif draws.random() < 0.2 and (isinstance(place, list) or key in place):
            del place[key]
        else:
            place[key] = copy.deepcopy(draws.choice(JUNK))
    for name in ("max_tokens", "max_output_tokens"):
        if isinstance(body.get(name), (int, float)) and body[name] > 3:
            body[name] = 3  # that long answers end is not to be tested so often
    content = json.dumps(body, ensure_ascii=draws.random() < 0.9).encode("utf-8", "surrogatepass")
    if draws.random() < 0.1:
        changed = bytearray(content)
        for _ in range(draws.randrange(1, 4)):
            at = draws.randrange(len(changed) + 1)
            changed[at : at + draws.randrange(3)] = draws.randbytes(draws.randrange(3))
        content = bytes(changed) or b"{"
    return content


def send(client: httpx.Client, draws: random.Random) -> str | None:
    """Send a request. Return what is wrong about the answer."""
    path, body = draws.choice(BODIES)
    content = mutated(draws, body)
    headers = {
        "content-type": draws.choice(["application/json"] * 20 + ["text/plain", "application/x+json", ""])
    }
    if draws.random() < 0.2:
        headers["x-request-id"] = draws.choice(["same", "a b", "\u00e9", "x" * 300])
    headers = {name: value.encode("latin-1") for name, value in headers.items()}  # type: ignore[misc]
    with client.stream("POST", path, content=content, headers=headers) as response:
        if draws.random() < 0.1:
            return None  # the client leaves
        answer = response.read()
    if response.status_code not in (200, 400, 404):
        return f"{path} {content!r}: {response.status_code} {answer!r}"
    if response.headers["content-type"].startswith("text/event-stream"):
        last = answer.rstrip().rpartition(b"\n\n")[2]
        ended = answer.endswith(ENDS) or last.startswith(
            (b"event: response.completed", b"event: response.in")
        )
        wrong = not ended or b'"error":{' in answer
    else:
        wrong = (json.loads(answer).get("error") is not None) == (response.status_code == 200)
    return f"{path} {content!r}: {response.status_code} {answer!r}" if wrong else None


@pytest.mark.parametrize("num_requests", [300, pytest.param(10_000, marks=pytest.mark.matrix)])
def test_mutated_requests_leave_nothing_behind(llama_dir, seed, num_requests):
    config = {
        "max_model_len": 48,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "num_gpu_blocks_override": 30,
    }
    threads, limits = 4, Limits(keep_alive_timeout=600)  # on a busy machine clients are slow
    with Running(llama_dir, limits=limits, **config) as server, ThreadPoolExecutor(threads) as pool:

        def work(number: int) -> list[str]:
            draws = random.Random(f"{seed} {number}")
            with httpx.Client(base_url=server.url, timeout=60) as client:
                faults = (send(client, draws) for _ in range(num_requests // threads))
                return [fault for fault in faults if fault is not None]

        faults = [fault for found in pool.map(work, range(threads)) for fault in found]
        assert not faults, "\n".join(faults[:5])
        wait_until(lambda: not server.engine.has_unfinished())
        wait_until(lambda: server.async_engine.stats().gpu_cache_usage == 0)
        assert server.async_engine.stats().num_failed_steps == 0
        assert httpx.get(f"{server.url}/health").status_code == 200
        answer = httpx.post(
            f"{server.url}/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 2}
        )
        assert answer.status_code == 200
    server.engine.check_integrity()


def test_a_drain_under_load_loses_no_accepted_request(llama_dir):
    """Each is answered as a whole or refused with 503, also those that arrive just then."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 12, "ignore_eos": True}
    stopped = threading.Event()
    answers: list[tuple[bool, bool, httpx.Response]] = []  # sent and answered before the end, and the answer

    def load(stream: bool) -> None:
        while True:
            before = not stopped.is_set()
            try:
                answer = httpx.post(
                    url, json={**body, "stream": stream}, headers={"connection": "close"}, timeout=60
                )
            except httpx.TransportError:
                assert not before, "it was sent while the server ran"
                return
            answers.append((before, not stopped.is_set(), answer))
            if answer.status_code != 200:
                return

    with ThreadPoolExecutor(8) as pool:
        with Running(llama_dir, max_num_seqs=4, life={"shutdown_timeout": 60.0}) as server:
            url, step = f"{server.url}/v1/completions", server.engine.step
            server.engine.step = lambda: (time.sleep(0.01), step())[1]
            clients = [pool.submit(load, bool(number % 2)) for number in range(8)]
            wait_until(lambda: len(answers) >= 8)
            stopped.set()
        for client in clients:
            client.result()
    assert any(not after and answer.status_code == 200 for _, after, answer in answers), "some ran at the end"
    assert {answer.status_code for *_, answer in answers} <= {200, 503}
    for *_, answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
        elif answer.headers["content-type"].startswith("text/event-stream"):
            *events, done, _ = answer.text.split("\n\n")
            assert done == "data: [DONE]"
            assert json.loads(events[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        else:
            assert answer.json()["usage"]["completion_tokens"] == 12
    server.engine.check_integrity()
