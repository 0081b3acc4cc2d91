"""What the server counts, and how it ends: by Ctrl-C, or by an engine that fails."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from .conftest import MODEL, Running, wait_until


def read(url: str) -> dict[str, float]:
    """The metrics by name with their labels, but for the model's name."""
    found = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[re.sub(r'model_name="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")] = float(
                value
            )
    return found


def test_metrics_count_exactly(llama_dir):
    with Running(llama_dir) as server, server.client() as client:
        extra = {"ignore_eos": True}
        for _ in range(3):
            client.completions.create(model=MODEL, prompt="12345", max_tokens=7, extra_body=extra)
        client.completions.create(
            model=MODEL, prompt="12", n=2, max_tokens=5, temperature=1, extra_body=extra
        )
        for _ in range(2):  # of two full blocks and a half, which the second finds
            client.completions.create(model=MODEL, prompt="abcdefghijklmnopqrst", max_tokens=1)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt="x" * 5000)
        metrics = read(server.url)
    assert metrics["vllm:prompt_tokens_total"] == 3 * 5 + 2 + 2 * 20
    assert metrics["vllm:prefix_cache_queries_total"] == 3 * 5 + 2 + 2 * 20
    assert metrics["vllm:prefix_cache_hits_total"] == 16
    assert metrics["vllm:generation_tokens_total"] == 3 * 7 + 2 * 5 + 2
    assert sum(v for k, v in metrics.items() if k.startswith("vllm:request_success_total")) == 7
    assert metrics["vllm:e2e_request_latency_seconds_count"] == 6
    assert metrics["vllm:time_to_first_token_seconds_count"] == 6
    assert metrics["vllm:inter_token_latency_seconds_count"] == 3 * 6 + 4
    assert metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0
    assert metrics["vllm:kv_cache_usage_perc"] == metrics["vllm:num_preemptions_total"] == 0


REASONS = ("stop", "length", "abort", "error")


def ended(server) -> dict[str, float]:
    """Return how many outputs ended for each reason."""
    name, found = "vllm:request_success_total", read(server.url)
    series = [key for key in found if key.startswith(name)]
    assert sorted(series) == sorted(f'{name}{{finished_reason="{reason}"}}' for reason in REASONS)
    return {reason: found[f'{name}{{finished_reason="{reason}"}}'] for reason in REASONS}


def test_every_end_is_counted_by_its_reason(llama_dir, monkeypatch):
    expected = dict.fromkeys(REASONS, 0)
    body = {"model": MODEL, "prompt": "x", "ignore_eos": True}
    with Running(llama_dir) as server, server.client() as client:
        url = f"{server.url}/v1/completions"
        assert ended(server) == expected  # a rate can be taken of the first one too
        client.completions.create(model=MODEL, prompt="x", n=2, max_tokens=3, temperature=1, seed=1)
        everything = {"stop_token_ids": list(range(320))}
        client.completions.create(model=MODEL, prompt="x", max_tokens=9, extra_body=everything)
        expected |= {"stop": ended(server)["stop"], "length": 3 - ended(server)["stop"]}
        assert ended(server) == expected
        assert expected["stop"] >= 1
        for refused in ({"prompt": "x" * 5000}, {"temperature": -1}):
            assert httpx.post(url, json={**body, **refused}).status_code == 400
        assert ended(server) == expected, "what is refused never was a request"
        step = server.engine.step

        def slow_step():
            time.sleep(0.05)
            return step()

        monkeypatch.setattr(server.engine, "step", slow_step)
        with httpx.stream("POST", url, json={**body, "max_tokens": 200, "stream": True, "n": 2}) as response:
            next(response.iter_text())
        expected["abort"] += 2
        wait_until(lambda: ended(server) == expected)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json={**body, "max_tokens": 200}, timeout=0.3)
        expected["abort"] += 1
        wait_until(lambda: ended(server) == expected)

        def broken_step():
            raise RuntimeError("planted")

        monkeypatch.setattr(server.engine, "step", broken_step)
        assert httpx.post(url, json={**body, "max_tokens": 5}).status_code == 503
        expected["error"] += 1
        assert ended(server) == expected


def test_two_servers_in_one_process_count_apart(llama_dir):
    with Running(llama_dir) as one, Running(llama_dir) as two, one.client() as client:
        client.completions.create(model=MODEL, prompt="12345", max_tokens=2)
        assert read(one.url)["vllm:prompt_tokens_total"] == 5
        assert read(two.url)["vllm:prompt_tokens_total"] == 0


def test_an_engine_that_fails_tells_everyone(llama_dir, monkeypatch):
    with Running(llama_dir, grace=30) as server, server.client() as client:
        client.completions.create(model=MODEL, prompt="x", max_tokens=1)

        def broken_step():
            time.sleep(0.1)
            raise RuntimeError("planted")

        monkeypatch.setattr(server.engine, "step", broken_step)
        with pytest.raises(openai.InternalServerError, match="planted") as caught:
            client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        assert caught.value.status_code == 503
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="planted") as caught:  # and it does not hang
            client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        assert caught.value.status_code == 503
        assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_an_engine_that_fails_in_a_stream_says_so_in_the_stream(llama_dir, monkeypatch):
    with Running(llama_dir) as server, server.client() as client:
        stream = client.completions.create(model=MODEL, prompt="x", max_tokens=200, stream=True)
        next(iter(stream))

        def broken_step():
            raise RuntimeError("planted")

        monkeypatch.setattr(server.engine, "step", broken_step)
        with pytest.raises(openai.APIError, match="planted"):
            list(stream)


def test_a_server_that_stops_ends_its_streams(llama_dir):
    with Running(llama_dir) as server, server.client() as client:
        stream = client.completions.create(model=MODEL, prompt="x", max_tokens=240, stream=True)
        next(iter(stream))
    # __exit__ has checked that the thread ended


def test_a_server_that_stops_answers_every_request(llama_dir, monkeypatch):
    """Also those that would not end in time by themselves."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 240, "ignore_eos": True}
    with ThreadPoolExecutor() as threads, Running(llama_dir) as server:
        step = server.engine.step

        def slow_step():
            time.sleep(0.05)
            return step()

        monkeypatch.setattr(server.engine, "step", slow_step)
        url = f"{server.url}/v1/completions"
        whole = threads.submit(httpx.post, url, json=body, timeout=60)
        stream = threads.submit(httpx.post, url, json={**body, "stream": True}, timeout=60)
        wait_until(lambda: server.async_engine.stats().num_running == 2)
    assert whole.result().status_code == 503
    error = whole.result().json()["error"]
    assert error == {
        "message": "the server is shutting down",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    *pieces, last, done, _ = stream.result().text.split("\n\n")
    assert pieces
    assert json.loads(last.removeprefix("data: ")) == {"error": error}
    assert done == "data: [DONE]"


@pytest.mark.matrix
@pytest.mark.parametrize("busy", [False, True])
def test_ctrl_c_ends_the_command_cleanly(llama_dir, busy):
    command = [sys.executable, "-m", "cupaged.serve", "--model", llama_dir, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--served-model-name", MODEL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = []
        while not lines or not lines[-1].startswith("Ctrl-C"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        assert "cpu backend" in lines[0]
        url = re.search(r"http://localhost:\d+", "".join(lines))[0]
        if busy:
            body = {"model": MODEL, "prompt": "x", "max_tokens": 240, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
                next(response.iter_text())
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=20)
        else:
            assert httpx.get(f"{url}/health").status_code == 200
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
