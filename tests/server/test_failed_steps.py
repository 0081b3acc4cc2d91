"""Steps that fail: once, always with one request, and always."""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from cupaged import serve
from cupaged.engine.model.model_runner import ModelRunner
from tests import tiny_models

from .conftest import MODEL, Running, wait_until
from .test_metrics_and_life import read

POISON = tiny_models.tokenizer()("~")["input_ids"][0]
BODY = {"model": MODEL, "prompt": "x", "max_tokens": 60, "ignore_eos": True, "temperature": 0}


def plant(monkeypatch, engine, fails) -> list[int]:
    """Let those forwards fail for whose sequences ``fails`` says so; gives the size of each that did."""
    run, failed = engine._runner.run, []

    def planted(scheduled, *rest):
        time.sleep(0.002)  # requests that are sent together run together
        if fails([item.seq for item in scheduled]):
            failed.append(len(scheduled))
            raise torch.OutOfMemoryError("planted\non two lines")
        return run(scheduled, *rest)

    monkeypatch.setattr(engine._runner, "run", planted)
    return failed


def poisoned(sequences) -> bool:
    return any(POISON in seq.token_ids[: seq.prompt_len] for seq in sequences)


def ask(server, **fields) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json={**BODY, **fields}, timeout=60)


def text(response: httpx.Response) -> str:
    """Of a whole answer or of a stream, which has to have ended well."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.json()["choices"][0]["text"]
    *pieces, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    return "".join(json.loads(piece.removeprefix("data: "))["choices"][0]["text"] for piece in pieces)


def assert_well(server) -> None:
    """The server takes requests, and nothing is left of those before."""
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert len(text(ask(server, max_tokens=5))) > 0
    wait_until(lambda: not server.engine.has_unfinished())
    server.engine.check_integrity()
    stats = server.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.gpu_cache_usage) == (0, 0, 0)
    assert not server.engine._groups
    assert not server.async_engine._streams


def assert_server_error(response: httpx.Response, status: int = 500) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert {**error, "message": ""} == {"message": "", "type": "server_error", "param": None, "code": None}
    assert "OutOfMemoryError: planted" in error["message"]
    assert "two lines" not in error["message"]


def test_failures_that_pass_change_no_answer(llama_dir, monkeypatch, caplog):
    requests = [
        {
            "prompt": f"{i} of them, and a prompt of some blocks",
            "stream": True,
            "seed": i,
            "temperature": i % 2,
        }
        for i in range(5)
    ]
    with Running(llama_dir) as server, ThreadPoolExecutor() as threads:
        expected = [text(ask(server, max_tokens=120, **request)) for request in requests]
        together = itertools.count()  # steps with all of them
        failed = plant(
            monkeypatch,
            server.engine,
            lambda seqs: len(seqs) == 5 and next(together) % 4 == 3,
        )
        answers = list(threads.map(lambda request: text(ask(server, max_tokens=120, **request)), requests))
        assert len(failed) > 6  # more than an engine may have one after the other
        assert answers == expected
        assert_well(server)
        metrics = read(server.url)
    assert metrics["cupaged:failed_steps_total"] == len(failed)
    assert metrics['vllm:request_success_total{finished_reason="length"}'] == 11
    logged = [record.name for record in caplog.records if record.exc_info]
    assert logged == ["cupaged.server"] * len(failed)


def test_a_request_that_always_fails_ends_alone(llama_dir, monkeypatch):
    """What ran before it came goes on, and has the answer that it would have had."""
    with Running(llama_dir) as server, ThreadPoolExecutor() as threads:
        expected = text(ask(server, max_tokens=200))

        def fails(sequences) -> bool:
            """Slowly: the next ones come meanwhile."""
            end = time.monotonic() + 0.1
            while poisoned(sequences) and server.async_engine._commands.empty() and time.monotonic() < end:
                time.sleep(0.001)
            return poisoned(sequences)

        failed = plant(monkeypatch, server.engine, fails)
        other = threads.submit(ask, server, max_tokens=200, stream=True)
        wait_until(lambda: server.async_engine.stats().num_running)
        kinds = [{}, {"stream": True}, {"n": 2}, {"use_beam_search": True, "n": 2, "temperature": 1}]
        with ThreadPoolExecutor(3) as others:  # the next one is there when one ends
            for response in others.map(lambda fields: ask(server, prompt="po~ison", **fields), 3 * kinds):
                assert_server_error(response)
        assert max(failed) > 1, "they did not run together"
        assert text(other.result()) == expected
        assert_well(server)


def test_a_failure_in_a_stream_is_said_there_and_who_waits_goes_on(llama_dir, monkeypatch):
    with Running(llama_dir, max_num_seqs=1) as server, ThreadPoolExecutor() as threads:
        expected = text(ask(server))
        plant(
            monkeypatch,
            server.engine,
            lambda sequences: poisoned(sequences) and any(seq.num_output_tokens > 20 for seq in sequences),
        )
        stream = threads.submit(ask, server, prompt="~", stream=True)
        wait_until(lambda: server.async_engine.stats().num_running)
        assert text(ask(server)) == expected
        assert_well(server)
    assert stream.result().status_code == 200
    *pieces, last, done, _ = stream.result().text.split("\n\n")
    assert len(pieces) > 5
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert done == "data: [DONE]"


def test_a_client_that_tries_again_and_again_does_not_end_the_server(llama_dir, monkeypatch):
    """Nobody else succeeds in between: that the engine works is found out by a request of its own."""
    with Running(llama_dir) as server:
        plant(monkeypatch, server.engine, poisoned)
        for _ in range(7):
            assert_server_error(ask(server, prompt="po~ison"))
        assert_well(server)


def test_a_long_prompt_beside_one_that_fails_does_not_begin_again(llama_dir, monkeypatch):
    """It is held back, with what it has computed, while the one that fails is found."""
    config = {"max_num_batched_tokens": 16, "enable_prefix_caching": False}
    with Running(llama_dir, **config) as server:
        failed = plant(monkeypatch, server.engine, poisoned)
        assert_server_error(ask(server, prompt=["x" * 150, "~" * 30]))
        assert failed == [2, 1, 1]
        assert_well(server)


def test_memory_is_freed_before_a_step_is_tried_again(llama_dir, monkeypatch):
    """First of all that of the failed step itself, which its error holds."""
    log = logging.getLogger("cupaged.server")
    monkeypatch.setattr(log, "propagate", False)  # pytest keeps errors that are logged
    monkeypatch.setattr(log, "handlers", [logging.NullHandler()])
    tensors, alive = [], []
    run = ModelRunner.run

    def planted(self, *arguments):
        if not tensors:
            tensor = torch.empty(8)
            tensors.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("planted")
        assert alive, "tried again before"
        return run(self, *arguments)

    with Running(llama_dir) as server:
        monkeypatch.setattr(ModelRunner, "run", planted)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(tensors[0]() is not None))
        text(ask(server))
    assert alive == [False]


def test_an_engine_that_always_fails_is_dead_and_ends_the_server(llama_dir, monkeypatch):
    with Running(llama_dir, grace=2.0) as server:
        failed = plant(monkeypatch, server.engine, lambda sequences: True)
        assert_server_error(ask(server))
        assert_server_error(ask(server, stream=True))
        assert_server_error(ask(server), status=503)
        assert len(failed) == 7  # three times two, and a last one to find out
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert_server_error(ask(server), status=503)
        server._thread.join(timeout=20)
        assert not server._thread.is_alive()
        assert server._server.failure is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_programs_is_not_tried_again(llama_dir, monkeypatch, error):
    calls = []

    def end(*arguments):
        calls.append(arguments)
        raise error("planted")

    with Running(llama_dir, grace=30) as server:
        monkeypatch.setattr(server.engine._runner, "run", end)
        assert ask(server).status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503
    assert len(calls) == 1


@pytest.mark.parametrize(
    "method", ["_scheduler.schedule", "_scheduler.advance", "_scheduler.resolve", "check_integrity"]
)
def test_an_engine_that_may_be_wrong_about_itself_is_dead_at_once(llama_dir, monkeypatch, method):
    calls = []

    def wrong(*arguments):
        calls.append(arguments)
        raise RuntimeError("planted")

    with Running(llama_dir, grace=30) as server:
        *path, name = method.split(".")
        monkeypatch.setattr(getattr(server.engine, path[0]) if path else server.engine, name, wrong)
        response = ask(server)
        assert response.status_code == 503
        assert "planted" in response.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").status_code == 503
    assert len(calls) == 1


def test_the_command_ends_with_an_error_when_the_engine_is_dead(llama_dir, monkeypatch, capsys):
    """So that whoever watches over it starts it again."""
    sockets, listen, run = [], serve.listen, ModelRunner.run

    def remembered(host, port):
        sockets.append(listen(host, port))
        return sockets[-1]

    def planted(self, scheduled, *rest):
        if poisoned([item.seq for item in scheduled]):
            raise SystemExit("planted")
        return run(self, scheduled, *rest)

    monkeypatch.setattr(serve, "listen", remembered)
    monkeypatch.setattr(ModelRunner, "run", planted)
    command = ["--model", llama_dir, "--port", "0", "--device", "cpu", "--served-model-name", MODEL]
    with ThreadPoolExecutor() as threads:
        ended = threads.submit(serve.main, command)
        wait_until(lambda: sockets or ended.done())
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        response = httpx.post(f"{url}/v1/completions", json={**BODY, "prompt": "~"}, timeout=60)
        assert response.status_code == 503
        assert ended.result(timeout=20) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: the engine has failed: SystemExit: planted; start the server again$", last)
