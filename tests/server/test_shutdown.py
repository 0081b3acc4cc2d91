"""How the command ends: what runs may finish, what is new is refused, a second signal does not wait."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from .conftest import MODEL, Running, wait_until
from .test_failed_steps import BODY, ask, text
from .test_metrics_and_life import read

SLOWLY = """
import sys, time
from cupaged import serve
from cupaged.engine.model.model_runner import ModelRunner

def slowly(*arguments, run=ModelRunner.run):
    time.sleep(0.02)
    return run(*arguments)

ModelRunner.run = slowly
sys.exit(serve.main(sys.argv[1:]))
"""


class Command:
    """The server in a process of its own, whose steps take a while."""

    def __init__(self, directory: str, *arguments: str, script: str = SLOWLY) -> None:
        command = [sys.executable, "-c", script, "--model", directory, "--port", "0", "--device", "cpu"]
        self.process = subprocess.Popen(
            [*command, "--served-model-name", MODEL, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Command:
        lines: list[str] = []
        while not lines or not lines[-1].startswith("Ctrl-C"):
            lines.append(self.process.stdout.readline())
            assert lines[-1], self.process.stderr.read()
        self.url = re.search(r"http://localhost:\d+", "".join(lines))[0]
        self.port = int(self.url.rpartition(":")[2])
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> str:
        """Wait for it. Return the log."""
        return self.process.communicate(timeout=60)[1]


@contextlib.contextmanager
def streaming(url: str, **fields):
    """A stream that has begun."""
    body = {**BODY, "stream": True, **fields}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        chunks = response.iter_text()
        yield response, chunks, next(chunks)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.matrix)])
def test_a_signal_lets_requests_finish_and_refuses_new_ones(llama_dir, number):
    head = "POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"
    half_sent = "\r\n".join([*head, "Content-Length: 900", "", "{"]).encode()
    with Command(llama_dir) as server, ThreadPoolExecutor() as threads:
        idle = httpx.Client()
        assert idle.get(f"{server.url}/health").status_code == 200
        half = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        half[0].sendall(half_sent)
        half[1].sendall(half_sent[:40])
        with streaming(server.url, max_tokens=100, n=8) as (_, chunks, first):
            whole = threads.submit(httpx.post, f"{server.url}/v1/completions", json=BODY, timeout=60)
            wait_until(lambda: read(server.url)["vllm:num_requests_running"] == 2)
            server.process.send_signal(number)
            refused = half[0].recv(4096).decode()  # as soon as it has begun to stop
            response = httpx.post(f"{server.url}/v1/completions", json=BODY)
            assert response.status_code == 503
            assert 1 <= int(response.headers["retry-after"]) <= 25
            assert response.json()["error"]["message"] == "the server is shutting down"
            assert response.json()["error"]["type"] == "server_error"
            assert idle.get(f"{server.url}/health").status_code == 503
            rest = first + "".join(chunks)
        assert "503" in refused.splitlines()[0]
        assert "retry-after" in refused
        *pieces, done, _ = rest.split("\n\n")
        assert done == "data: [DONE]"
        ends = [json.loads(piece.removeprefix("data: "))["choices"][0]["finish_reason"] for piece in pieces]
        assert ends.count("length") == 8
        assert len(text(whole.result())) > 0
        log = server.end()
        for one in half:
            one.close()
        idle.close()
    assert server.process.returncode == 0
    assert "Traceback" not in log
    assert f"{number.name}: 3 requests may finish" in log


@pytest.mark.matrix
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(llama_dir, first, second):
    """With the status that a shell gives for who was ended by it."""
    with Command(llama_dir) as server:
        with contextlib.suppress(httpx.RemoteProtocolError), streaming(server.url, max_tokens=2000, n=8):
            server.process.send_signal(first)
            wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
            server.process.send_signal(second)
            log = server.end()
        assert server.process.returncode == 128 + second
    assert "Traceback" not in log


@pytest.mark.matrix
def test_who_does_not_finish_in_time_is_told(llama_dir):
    with Command(llama_dir, "--shutdown-timeout", "0.5") as server:
        with streaming(server.url, max_tokens=2000, n=2) as (_, chunks, first):
            server.process.send_signal(signal.SIGTERM)
            *_, last, done, _ = (first + "".join(chunks)).split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is shutting down"
        assert done == "data: [DONE]"
        log = server.end()
    assert server.process.returncode == 0
    assert "Traceback" not in log


def test_a_step_that_hangs_is_noticed_and_said_once(llama_dir, monkeypatch, caplog):
    """And that it has ended after all."""
    with Running(llama_dir, life={"step_timeout": 0.5}) as server, ThreadPoolExecutor() as threads:
        run, goes_on, hanging = server.engine._runner.run, threading.Event(), threading.Event()

        def hang(*arguments):
            hanging.set()
            goes_on.wait(60)
            return run(*arguments)

        def health() -> int:
            return httpx.get(f"{server.url}/health").status_code

        assert health() == 200
        monkeypatch.setattr(server.engine._runner, "run", hang)
        answer = threads.submit(ask, server)
        assert hanging.wait(20)
        wait_until(lambda: health() == 503)
        for _ in range(5):
            assert health() == 503
        time.sleep(0.3)
        goes_on.set()
        assert len(text(answer.result())) > 0
        wait_until(lambda: health() == 200)
        time.sleep(0.7)  # idle for longer than that is well
        assert health() == 200
    said = [record.message for record in caplog.records if "step" in record.message]
    assert [("--step-timeout" in message, "has ended" in message) for message in said] == [
        (True, False),
        (False, True),
    ]
