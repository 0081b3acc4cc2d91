"""What the log says: a line for each request, and every ten seconds one about load and cache."""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cupaged import options, serve
from cupaged.engine.outputs import EngineStats
from cupaged.engine.server.load_log import LoadLog

from .conftest import Running, wait_until
from .test_failed_steps import BODY, ask, assert_server_error, plant, poisoned

LINE = re.compile(
    r"request (?P<id>\S+): (?P<prompt>\d+|\?) prompt tokens, (?P<output>\d+) output tokens, "
    r"finish reason (?P<reason>\S+), first token after (?P<first>\S+)( s)?, (?P<whole>[\d.]+) s"
)


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "cupaged")

    def found() -> list[re.Match]:
        messages = [record.message for record in caplog.records if record.name == "cupaged.requests"]
        return [LINE.fullmatch(message) for message in messages]

    return found


def test_each_request_has_a_line(llama_dir, monkeypatch, lines):
    """Count it once, whether it finishes, is refused, fails, or its client leaves."""
    with Running(llama_dir) as server:
        answer = ask(server, prompt="12345", max_tokens=7).json()
        ask(server, prompt="123", n=3, max_tokens=5)
        assert ask(server, prompt=[[1] * 5000]).status_code == 400
        body = {**BODY, "stream": True, "max_tokens": 240}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            next(response.iter_text())
        wait_until(lambda: len(lines()) == 4)
        plant(monkeypatch, server.engine, poisoned)
        assert_server_error(ask(server, prompt="~"))
        wait_until(lambda: len(lines()) == 5)
    finished, three, refused, left, failed = lines()
    assert finished["id"] == f"{answer['id']}-0"
    assert (finished["prompt"], finished["output"], finished["reason"]) == ("5", "7", "length")
    assert 0 < float(finished["first"]) <= float(finished["whole"])
    assert (three["prompt"], three["output"]) == ("3", "15")
    assert (refused["reason"], refused["output"], refused["first"]) == ("refused", "0", "-")
    assert left["reason"] == "abort"
    assert 0 < int(left["output"]) < 240
    assert failed["reason"] == "error"


def stats(**more) -> EngineStats:
    values = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
    return EngineStats(**{**values, **more})


def test_there_is_a_line_every_ten_seconds_while_there_is_load(caplog):
    caplog.set_level(logging.INFO, "cupaged")
    now, state = [100.0], [stats()]
    log = LoadLog(lambda: state[0], clock=lambda: now[0])

    def at(time: float, **more) -> list[str]:
        caplog.clear()
        now[0], state[0] = time, stats(**more)
        log.tick()
        return [record.message for record in caplog.records]

    assert at(110) == [], "idle"
    load = {"num_running": 3, "num_waiting": 2, "num_swapped": 1, "gpu_cache_usage": 0.5}
    totals = {"prompt_tokens": 200, "generation_tokens": 50, "num_preemptions": 4}
    cache = {"prefix_cache_queries": 200, "prefix_cache_hits": 50}
    assert at(119, **load, **totals, **cache) == []
    assert at(120, **load, **totals, **cache) == [
        "running 3, waiting 2, swapped 1 requests; prompts 20.0 tokens/s, generation 5.0 tokens/s; "
        "KV cache 50.0% in use, swap space 0.0%, prefix cache hits 25.0%; 4 preemptions"
    ]
    (stalled,) = at(130, **load, **totals, **cache)
    assert "prompts 0.0 tokens/s" in stalled
    assert "prefix cache hits -; 0 preemptions" in stalled
    assert at(140, **totals, **cache) == [], "nothing has happened since"


def test_the_running_server_says_its_load(llama_dir, caplog):
    caplog.set_level(logging.INFO, "cupaged")
    with Running(llama_dir) as server, ThreadPoolExecutor() as threads:
        server._server._load_log._interval = 0.2
        threads.submit(ask, server, max_tokens=240)
        wait_until(lambda: any(record.name == "cupaged.load" for record in caplog.records))


@pytest.mark.parametrize("requests", [True, False])
@pytest.mark.parametrize("level", options.LOG_LEVELS)
def test_levels_and_lines_can_be_chosen(level, requests):
    names = ["cupaged", "cupaged.requests"]
    before = [(logging.getLogger(name).level, logging.getLogger(name).disabled) for name in names]
    try:
        option = "--log-requests" if requests else "--no-log-requests"
        serve._set_up_logs(serve.parser().parse_args(["--log-level", level, option]))
        shown = options.LOG_LEVELS.index(level) <= options.LOG_LEVELS.index("info")
        assert logging.getLogger("cupaged.load").isEnabledFor(logging.INFO) == shown
        assert logging.getLogger("cupaged.requests").isEnabledFor(logging.INFO) == (shown and requests)
        assert logging.getLogger("cupaged.server").isEnabledFor(logging.ERROR)
    finally:
        for name, (number, disabled) in zip(names, before):
            logging.getLogger(name).setLevel(number)
            logging.getLogger(name).disabled = disabled
