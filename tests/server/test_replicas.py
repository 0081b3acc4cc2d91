"""Replicas on a real Ray: routing, failures, one API. The command is what a user runs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cupaged.engine.server.access import Access
from cupaged.engine.server.limits import Limits
from tests import tiny_models

from .conftest import MODEL, Running, wait_until

pytestmark = [pytest.mark.matrix, pytest.mark.ray]

START_SECONDS = 300  # generous: Ray and two engines, on a machine that does other things as well
CONFIG = {"block_size": 8, "max_num_seqs": 16, "num_gpu_blocks_override": 800}
# Processes of Ray that end after about a minute: before, they try to report that their parent has died.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
# The router takes whoever got a request least recently.
ROUND_ROBIN = """
from cupaged.engine.replicas.prefix_index import ReplicaChoice
ReplicaChoice.choose = lambda self, hashes, candidates: min(candidates, key=list(self.loads).index)
"""
RUN = "import sys; from cupaged import serve; sys.exit(serve.main(sys.argv[1:]))"


class Replicas:
    """Run the command with two replicas, in a process group of its own, as a shell would start it."""

    def __init__(self, directory: str, *arguments: str, script: str = "") -> None:
        settings = [f"--{name.replace('_', '-')}={value}" for name, value in CONFIG.items()]
        model = ["--model", directory, "--served-model-name", MODEL, "--device", "cpu"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", script + RUN, *model, "--port=0", "--replicas=2", *settings, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    def __enter__(self) -> Replicas:
        wait_until(
            lambda: "Ctrl-C ends it.\n" in self.lines or self.process.poll() is not None, START_SECONDS
        )
        assert self.process.poll() is None, self.log
        self.url = re.search(r"http://localhost:\d+", self.log)[0]
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.others = {each: " ".join(command_of(each)).strip() for each in children}
        return self

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        self._reader.join(60)
        if error[0] is not None:
            print(self.log)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def servers(self) -> list[psutil.Process]:
        """Return the processes that run the engines."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in children if "cupaged.engine.replicas.child" in " ".join(command_of(each))]

    def metrics(self, *names: str) -> dict[str, list[float]]:
        """Return the values of metrics by replica."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        found: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.labels["replica"], {})[sample.name] = sample.value
        return {replica: [values[name] for name in names] for replica, values in found.items()}

    def assert_idle_and_empty(self) -> None:
        """Assert that no replica has a request, or holds a block for one."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        wait_until(lambda: set(map(tuple, self.metrics(*names).values())) == {(0, 0, 0)}, 60)

    def wait_for_the_end(self, but: tuple[str, ...] = ()) -> None:
        """Wait until no process of it is left."""
        self.process.wait(120)
        others = [each for each, name in self.others.items() if name not in but]
        assert len(others) > 4
        wait_until(lambda: not [each for each in others if is_alive(each)], 60)


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    """Write a model with room for conversations."""
    return str(tiny_models.save("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=1024))


def conversations(seed: int) -> list[list[str]]:
    """Draw twenty conversations of ten turns of the user."""
    rng = random.Random(seed)
    return [["".join(rng.choices("abcdefgh ", k=rng.randrange(5, 40))) for _ in range(10)] for _ in range(20)]


def hold(url: str, turns: list[str]) -> list[str]:
    """Return the answers of a conversation."""
    messages, answers = [], []
    with httpx.Client(timeout=120) as client:
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            body = {
                "model": MODEL,
                "messages": messages,
                "max_tokens": 8,
                "temperature": 0,
                "ignore_eos": True,
            }
            response = client.post(f"{url}/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            answers.append(response.json()["choices"][0]["message"]["content"])
            messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def hold_all(url: str, all_turns: list[list[str]]) -> list[list[str]]:
    with ThreadPoolExecutor(6) as threads:
        return list(threads.map(lambda turns: hold(url, turns), all_turns))


def hit_rate(running: Replicas) -> tuple[float, list[float]]:
    """Return the share of prompt tokens that were cached, and how many prompt tokens each replica got."""
    totals = running.metrics("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    queries, hits = (sum(column) for column in zip(*totals.values()))
    return hits / queries, [values[0] for values in totals.values()]


def test_conversations_meet_their_caches(directory, seed):
    """More often than in turns, and every answer is that of one server."""
    held = conversations(seed)
    with Running(directory, **CONFIG) as one:
        expected = hold_all(one.url, held)
    with Replicas(directory) as running:
        assert hold_all(running.url, held) == expected
        rate, loads = hit_rate(running)
        running.assert_idle_and_empty()
        running.process.kill()  # which it cannot catch
        running.wait_for_the_end(but=AGENTS)
    with Replicas(directory, script=ROUND_ROBIN) as running:
        assert hold_all(running.url, held) == expected
        rate_in_turns, loads_in_turns = hit_rate(running)
        running.assert_idle_and_empty()
    print(f"prompt tokens from the cache: {rate:.1%} with the router, {rate_in_turns:.1%} in turns")
    print(f"prompt tokens by replica: {loads} with the router, {loads_in_turns} in turns")
    assert len(loads) == len(loads_in_turns) == 2
    assert min(loads) > 0.2 * sum(loads)
    assert rate > rate_in_turns + 0.1


REQUESTS = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/other", None),
    ("GET", "/nothing", None),
    ("POST", "/nothing", None),
    ("PUT", "/v1/completions", None),
    ("HEAD", "/version", None),
    ("GET", "/openapi.json", None),
    ("GET", "/page/chat.js", None),
    ("POST", "/v1/completions", {"prompt": "abc", "max_tokens": 5, "temperature": 0, "logprobs": 1}),
    ("POST", "/v1/completions", {"prompt": ["a", "bc"], "max_tokens": 5, "seed": 1, "n": 2}),
    ("POST", "/v1/completions", {"prompt": "abc", "max_tokens": 5, "temperature": 0, "stream": True}),
    ("POST", "/v1/completions", {"prompt": "abc", "max_tokens": -1}),
    ("POST", "/v1/completions", {"prompt": "x" * 6000}),
    ("POST", "/v1/completions", {"prompt": [[[]]]}),
    ("POST", "/v1/completions", "not JSON"),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "é"}], "temperature": 0}),
    ("POST", "/v1/responses", {"input": "abc", "temperature": 0, "stream": True, "max_output_tokens": 9}),
    ("POST", "/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "top_k": 1}),
    ("POST", "/v1/messages", {"messages": []}),
    ("POST", "/tokenize", {"prompt": "abc"}),
]
# What differs from request to request, or by what is cached where.
CHANGING = (
    r'"(?:id|item_id|request_id|created|created_at|completed_at|cached_tokens|input_tokens'
    r'|cache_read_input_tokens)": ?(?:"[^"]*"|[\d.]+)'
)
LIMIT = 5000  # bytes of a body


def answer(url: str, method: str, path: str, body) -> tuple:
    content = {"content": body} if isinstance(body, str) else {"json": body and {"model": MODEL, **body}}
    head = {"Content-Type": "application/json"} if body else {}
    headers = {"Authorization": "Bearer secret", "X-Request-Id": "me", **head}
    response = httpx.request(method, url + path, headers=headers, timeout=60, **content)
    names = sorted({*response.headers} - {"x-replica", "transfer-encoding", "content-length", "connection"})
    text = re.sub(CHANGING, "", response.text)
    if "event-stream" in response.headers.get("content-type", ""):  # how tokens are grouped depends on load
        text = "".join(re.findall(r'"(?:text|delta)":"((?:[^"\\]|\\.)*)"', text)) + text[-20:]
    return response.status_code, names, text


@pytest.fixture(scope="module")
def replicas(directory) -> Iterator[Replicas]:
    with Replicas(directory, "--api-key=secret", f"--max-body-size={LIMIT}") as running:
        yield running
        running.process.send_signal(signal.SIGTERM)
        running.wait_for_the_end()
        assert running.process.returncode == 0


KEY = {"Authorization": "Bearer secret"}


def test_the_api_is_that_of_one_server(replicas, directory):
    access = Access(api_keys=("secret",))
    with Running(directory, limits=Limits(max_body_size=LIMIT), access=access, **CONFIG) as one:
        for request in REQUESTS:
            assert answer(replicas.url, *request) == answer(one.url, *request), request
    for path, status in (("/v1/models", 401), ("/health", 200), ("/metrics", 200), ("/ping", 200)):
        assert httpx.get(replicas.url + path, timeout=30).status_code == status
    assert httpx.get(replicas.url, headers={"Host": "evil.example"}).status_code == 403


LONG = {"model": MODEL, "max_tokens": 900, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_aborted(replicas, stream):
    """After the first event, or before there is an answer."""

    def aborted() -> float:
        text = httpx.get(f"{replicas.url}/metrics", timeout=30).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if 'finished_reason="abort"' in line)

    before = aborted()
    body = {**LONG, "prompt": "leave", "stream": stream, "n": 4}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream(
            "POST", f"{replicas.url}/v1/completions", json=body, headers=KEY, timeout=0.5
        ) as response,
    ):
        next(response.iter_lines())
    wait_until(lambda: aborted() > before, 60)
    replicas.assert_idle_and_empty()


def run_one(url: str, number: int) -> tuple[str, str]:
    """Return how a long request ended, and its text."""
    stream = bool(number % 2)
    body = {**LONG, "max_tokens": 300, "prompt": f"{number} counts", "stream": stream}
    if not stream:
        response = httpx.post(f"{url}/v1/completions", json=body, headers=KEY, timeout=300)
        assert response.status_code == 200, response.text
        return "whole", response.json()["choices"][0]["text"]
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=KEY, timeout=300) as response:
        *events, end = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert end == "[DONE]"
    events = [json.loads(event) for event in events]
    if "error" in events[-1]:
        assert "replica that ran the request has ended" in events[-1]["error"]["message"]
        return "lost", "".join(event["choices"][0]["text"] for event in events[:-1])
    return "streamed", "".join(event["choices"][0]["text"] for event in events)


@pytest.mark.parametrize("victim", ["server", "actor"])
def test_a_replica_that_dies_under_load(replicas, victim):
    """What was not answered yet is tried again; the others finish; a new replica comes."""
    expected = [run_one(replicas.url, number) for number in range(24)]
    assert {kind for kind, _ in expected} == {"whole", "streamed"}
    names = set(replicas.metrics())
    with ThreadPoolExecutor(24) as threads:
        running = [threads.submit(run_one, replicas.url, number) for number in range(24)]
        wait_until(
            lambda: all(load[0] > 2 for load in replicas.metrics("vllm:num_requests_running").values())
        )
        server = replicas.servers()[0]
        process = server if victim == "server" else server.parent()
        process.kill()
        ends = [each.result() for each in running]
    kinds = [kind for kind, _ in ends]
    assert kinds.count("whole") == 12, "none of those of which nothing was sent is lost"
    assert 0 < kinds.count("lost") < 12
    for (kind, text), (_, whole) in zip(ends, expected):
        assert whole.startswith(text) if kind == "lost" else text == whole
    replicas.assert_idle_and_empty()
    wait_until(lambda: len(replicas.metrics()) == 2 and set(replicas.metrics()) != names, START_SECONDS)
    assert len(set(replicas.metrics()) & names) == 1, "the other one is still there"
    assert run_one(replicas.url, 0) == expected[0]
    wait_until(lambda: not is_alive(server), 60)


def test_a_signal_lets_requests_finish(directory):
    """As a shell sends it, to all processes of the group."""
    with Replicas(directory) as running, ThreadPoolExecutor() as threads:
        request = threads.submit(run_one, running.url, 1)
        wait_until(lambda: sum(map(sum, running.metrics("vllm:num_requests_running").values())) == 1)
        os.killpg(running.process.pid, signal.SIGINT)
        wait_until(lambda: httpx.get(f"{running.url}/health", timeout=30).status_code == 503)
        late = httpx.post(f"{running.url}/v1/completions", json={**LONG, "prompt": "late"}, timeout=30)
        assert late.status_code == 503
        assert late.headers["retry-after"]
        assert request.result()[0] == "streamed"
        running.wait_for_the_end()
        assert running.process.returncode == 0
        assert "Traceback" not in running.log


SCALE = """
import asyncio, json, sys
from cupaged.engine.replicas.front import local_replicas
from cupaged.engine.replicas.ray_router import Route

scaling = {"min_replicas": 1, "initial_replicas": 2, "max_replicas": 2, "target_ongoing_requests": 50}
scaling |= {"downscale_delay_s": 1, "look_back_period_s": 1, "metrics_interval_s": 0.5}
body = {"model": "tiny-llama", "prompt": "x", "n": 16, "max_tokens": 900, "ignore_eos": True, "stream": True}
request = "POST", "/v1/completions", b"", [(b"content-type", b"application/json")], json.dumps(body).encode()

async def read(stream):
    return b"".join([part async for part in stream]).decode()

async def run(handle):
    streams = [handle.options(stream=True).forward.remote(*request, Route()) for _ in range(2)]
    replicas = {(await anext(stream))[0] for stream in streams}
    bodies = [asyncio.create_task(read(stream)) for stream in streams]
    while len(left := await handle.broadcast("metrics").results_async()) > 1:
        await asyncio.sleep(0.1)
    running = [not body.done() for body in bodies]
    print(json.dumps([len(replicas), left[0][0] in replicas, running, await asyncio.gather(*bodies)]))

settings = {"max_imbalance": 8, "max_ongoing_requests": 99, "shutdown_timeout": 300}
with local_replicas(sys.argv[1:], 2, num_gpus=0, autoscaling_config=scaling, **settings) as handle:
    asyncio.run(run(handle))
"""


def test_a_replica_that_is_scaled_away_finishes_first(directory):
    model = ["--model", directory, "--served-model-name", MODEL, "--device", "cpu"]
    command = [sys.executable, "-c", SCALE, *model, "--num-gpu-blocks-override=2000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * START_SECONDS)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("[2"))
    *seen, bodies = json.loads(line)
    assert seen == [2, True, [True, True]], "two replicas, one is left, and both still answered then"
    for body in bodies:
        *events, end, _ = body.split("\n\n")
        assert end == "data: [DONE]"
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"] * 16
