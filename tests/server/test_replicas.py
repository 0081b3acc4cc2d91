"""Replicas on a real Ray: routing, failures, one API. The command is what a user runs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cupaged.engine.server.access import Access
from cupaged.engine.server.limits import Limits
from tests import tiny_models

from .conftest import MODEL, Running, wait_until

pytestmark = [pytest.mark.matrix, pytest.mark.ray]

ROOT = Path(__file__).parents[2]
START_SECONDS = 300  # generous: Ray and two engines, on a machine that does other things as well
CONFIG = {"block_size": 8, "max_num_seqs": 16, "num_gpu_blocks_override": 6000}  # room for all conversations
# Processes of Ray that end after about a minute: before, they try to report that their parent has died.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
# While a file is there, the router takes whoever got a request least recently.
IN_TURNS = """
import os
from cupaged.engine.replicas.prefix_index import ReplicaChoice
choose = ReplicaChoice.choose
def choose_or_take_turns(self, hashes, candidates):
    if os.path.exists({path!r}):
        return min(candidates, key=list(self.loads).index)
    return choose(self, hashes, candidates)
ReplicaChoice.choose = choose_or_take_turns
"""
RUN = "import sys; from cupaged import serve; sys.exit(serve.main(sys.argv[1:]))"


class Command:
    """Run a command that starts a Ray, in a process group of its own, as a shell would.

    Args:
        arguments: of Python.
        ready: what it prints when it can be used.
        environment: variables that are set as well.
    """

    def __init__(
        self, *arguments: str, ready: str = "Ctrl-C ends it.", environment: dict[str, str] | None = None
    ):
        self._ready = ready
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    def __enter__(self) -> Command:
        try:
            wait_until(lambda: self._ready in self.log or self.process.poll() is not None, START_SECONDS)
            assert self.process.poll() is None
        except AssertionError:
            print(self.log)
            self.process.kill()
            raise
        self.url = (re.findall(r"http://localhost:\d+", self.log) or [""])[0]
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


def model_arguments(directory: str) -> list[str]:
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in CONFIG.items()]
    return ["--model", directory, "--served-model-name", MODEL, "--device", "cpu", *settings]


def replicas_of(directory: str, *arguments: str, script: str = "") -> Command:
    """Return the command with two replicas."""
    model = model_arguments(directory)
    return Command("-c", script + RUN, *model, "--port=0", "--replicas=2", *arguments)


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


LIMIT = 20_000  # bytes of a body
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def switch(tmp_path_factory) -> Path:
    """Return the path of the file with which the router takes turns."""
    return tmp_path_factory.mktemp("switch") / "in_turns"


@pytest.fixture(scope="module")
def running_replicas(directory, switch) -> Iterator[Callable[[], Command]]:
    """Return a function that returns the replicas of the test before, or new ones if those have ended."""
    with contextlib.ExitStack() as stack:
        started: list[Command] = []

        def get() -> Command:
            if not started or started[-1].process.poll() is not None:
                options = ["--api-key=secret", f"--max-body-size={LIMIT}", "--max-imbalance=1000"]
                new = replicas_of(directory, *options, script=IN_TURNS.format(path=str(switch)))
                started.append(stack.enter_context(new))
            return started[-1]

        yield get


@pytest.fixture
def replicas(running_replicas) -> Command:
    return running_replicas()


@pytest.fixture(scope="module")
def one(directory) -> Iterator[Running]:
    """Run one server, in this process."""
    access = Access(api_keys=("secret",))
    with Running(directory, limits=Limits(max_body_size=LIMIT), access=access, **CONFIG) as running:
        yield running


@dataclass
class Turn:
    """Hold what the answer to a turn of a conversation says."""

    answer: str
    num_prompt_tokens: int
    num_cached_tokens: int
    replica: str | None


def conversations(seed: int) -> list[list[str]]:
    """Draw twenty conversations of ten turns of the user, no two of which begin with the same one."""
    rng = random.Random(seed)
    all_turns = [
        ["".join(rng.choices("abcdefgh ", k=rng.randrange(5, 40))) for _ in range(10)] for _ in range(20)
    ]
    return [[f"{turns[0]}{number}", *turns[1:]] for number, turns in enumerate(all_turns)]


def hold(url: str, salt: str, texts: list[str]) -> list[Turn]:
    """Hold a conversation.

    Args:
        salt: what was cached with another salt is not used.
    """
    messages: list[dict[str, str]] = []
    turns: list[Turn] = []
    settings = {"model": MODEL, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "cache_salt": salt}
    with httpx.Client(timeout=120, headers=KEY) as client:
        for text in texts:
            messages.append({"role": "user", "content": text})
            response = client.post(f"{url}/v1/chat/completions", json={**settings, "messages": messages})
            assert response.status_code == 200, response.text
            answer = response.json()["choices"][0]["message"]["content"]
            usage = response.json()["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            turns.append(Turn(answer, usage["prompt_tokens"], cached, response.headers.get("x-replica")))
            messages.append({"role": "assistant", "content": answer})
    return turns


def hold_all(url: str, salt: str, all_texts: list[list[str]]) -> list[list[Turn]]:
    with ThreadPoolExecutor(6) as threads:
        return list(threads.map(lambda texts: hold(url, salt, texts), all_texts))


def hit_rate(held: list[list[Turn]]) -> float:
    """Return the share of prompt tokens that were cached."""
    turns = [turn for of_one in held for turn in of_one]
    return sum(turn.num_cached_tokens for turn in turns) / sum(turn.num_prompt_tokens for turn in turns)


def test_conversations_meet_their_caches(replicas, one, switch, seed):
    """Keep each with a replica that has as much of it as one server has. In turns it has not."""
    texts = conversations(seed)
    expected = hold_all(one.url, f"{seed}", texts)
    routed = hold_all(replicas.url, f"{seed} routed", texts)
    switch.touch()
    try:
        in_turns = hold_all(replicas.url, f"{seed} in turns", texts)
    finally:
        switch.unlink()
    replicas.assert_idle_and_empty()
    rates = f"{hit_rate(routed):.1%} with the router, {hit_rate(in_turns):.1%} in turns"
    print(f"prompt tokens from the cache: {hit_rate(expected):.1%} with one server, {rates}")

    chosen = [{turn.replica for turn in turns} for turns in routed]
    assert all(len(of_one) == 1 for of_one in chosen), "each with one replica"
    assert len(set().union(*chosen)) == 2, "not all with the same one"
    for at_one, at_two, turned in zip(expected, routed, in_turns):
        for turn, other, another in zip(at_one, at_two, turned):
            assert turn.answer == other.answer == another.answer
            assert turn.num_prompt_tokens == other.num_prompt_tokens == another.num_prompt_tokens
        # First turns find what they have in common with other conversations, which may be elsewhere.
        for turn, other, another in zip(at_one[1:], at_two[1:], turned[1:]):
            assert another.num_cached_tokens <= turn.num_cached_tokens == other.num_cached_tokens


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
    ("POST", "/v1/completions", {"prompt": "x" * (LIMIT + 1)}),
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


def test_the_api_is_that_of_one_server(replicas, one):
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


@pytest.fixture(scope="module")
def whole(one) -> list[str]:
    """Return the texts of long requests."""
    with ThreadPoolExecutor(24) as threads:
        return [text for _, text in threads.map(lambda number: run_one(one.url, number), range(24))]


@pytest.mark.parametrize("victim", ["server", "actor"])
def test_a_replica_that_dies_under_load(replicas, whole, victim):
    """What was not answered yet is tried again; the others finish; a new replica comes."""
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
    for (kind, text), expected in zip(ends, whole):
        assert expected.startswith(text) if kind == "lost" else text == expected
    replicas.assert_idle_and_empty()
    wait_until(lambda: len(replicas.metrics()) == 2 and set(replicas.metrics()) != names, START_SECONDS)
    assert len(set(replicas.metrics()) & names) == 1, "the other one is still there"
    assert run_one(replicas.url, 0) == ("whole", whole[0])
    wait_until(lambda: not is_alive(server), 60)


def test_a_signal_lets_requests_finish(replicas):
    """As a shell sends it, to all processes of the group."""
    logged_before = len(replicas.lines)
    with ThreadPoolExecutor() as threads:
        request = threads.submit(run_one, replicas.url, 1)
        wait_until(lambda: sum(map(sum, replicas.metrics("vllm:num_requests_running").values())) == 1)
        os.killpg(replicas.process.pid, signal.SIGINT)
        wait_until(lambda: httpx.get(f"{replicas.url}/health", timeout=30).status_code == 503)
        body = {**LONG, "prompt": "late"}
        late = httpx.post(f"{replicas.url}/v1/completions", json=body, headers=KEY, timeout=30)
        assert late.status_code == 503
        assert late.headers["retry-after"]
        assert request.result()[0] == "streamed"
    replicas.wait_for_the_end()
    assert replicas.process.returncode == 0
    assert "Traceback" not in "".join(replicas.lines[logged_before:])


# The servers' steps take a while as long as a file is there.
HELD = """
import os, sys, time
if "cupaged.engine.replicas.child" in sys.orig_argv:
    from cupaged.engine.model.model_runner import ModelRunner
    def run(*arguments, run=ModelRunner.run):
        if os.path.exists({hold!r}):
            time.sleep(0.2)
        return run(*arguments)
    ModelRunner.run = run
"""
SCALE = """
import asyncio, json, pathlib, signal, sys
from cupaged.engine.replicas.front import local_replicas
from cupaged.engine.replicas.ray_router import Route

hold = pathlib.Path(sys.argv[1])
scaling = {"min_replicas": 1, "initial_replicas": 2, "max_replicas": 2, "target_ongoing_requests": 2}
scaling |= {"upscale_delay_s": 0, "downscale_delay_s": 1, "look_back_period_s": 1, "metrics_interval_s": 0.5}
body = {"model": "tiny-llama", "prompt": "x", "n": 2, "max_tokens": 900, "ignore_eos": True, "stream": True}
request = "POST", "/v1/completions", b"", [(b"content-type", b"application/json")], json.dumps(body).encode()

async def read(stream):
    lines = b"".join([part async for part in stream]).decode().split(chr(10))
    *events, end = [line.removeprefix("data: ") for line in lines if line]
    choices = [json.loads(event)["choices"][0] for event in events]
    return end, [choice["finish_reason"] for choice in choices if choice["finish_reason"]]

async def ids(handle):
    return {name for name, _ in await handle.broadcast("metrics").results_async()}

async def run(handle):
    hold.touch()
    streams = []
    for _ in range(4):  # which are for two replicas, also where one has been scaled away before
        streams.append(handle.options(stream=True).forward.remote(*request, Route()))
    of_replica = {(await anext(stream))[0]: stream for stream in streams}
    while len(of_replica) == 1:
        while len(await ids(handle)) == 1:
            await asyncio.sleep(0.1)
        streams.append(handle.options(stream=True).forward.remote(*request, Route()))
        of_replica[(await anext(streams[-1]))[0]] = streams[-1]
    for stream in streams:  # the two that are left are for one
        if stream not in of_replica.values():
            stream.cancel()
    bodies = [asyncio.create_task(read(stream)) for stream in of_replica.values()]
    while len(left := await ids(handle)) > 1:
        await asyncio.sleep(0.1)
    running = [not body.done() for body in bodies]
    hold.unlink()
    print("SEEN", json.dumps([left <= set(of_replica), running, await asyncio.gather(*bodies)]), flush=True)
    print("Ctrl-C ends it.", flush=True)
    signal.pause()

settings = {"max_imbalance": 8, "max_ongoing_requests": 99, "shutdown_timeout": 300}
with local_replicas(sys.argv[2:], 2, num_gpus=0, autoscaling_config=scaling, **settings) as handle:
    asyncio.run(run(handle))
"""


def test_a_replica_that_is_scaled_away_finishes_first(directory, tmp_path):
    """Leave no process either when the one that has started all is killed, which it cannot catch."""
    hold = str(tmp_path / "hold")
    (tmp_path / "sitecustomize.py").write_text(HELD.format(hold=hold))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    arguments = [hold, *model_arguments(directory)]
    with Command("-c", SCALE, *arguments, environment={"PYTHONPATH": path}) as running:
        of_one_left, running_then, ends = json.loads(re.search("SEEN (.*)", running.log)[1])
        assert of_one_left
        assert running_then == [True, True], "both still answered when one of two was left"
        assert ends == [["[DONE]", ["length", "length"]]] * 2
        running.process.kill()
        running.wait_for_the_end(but=AGENTS)


def test_replicas_that_are_divided(directory, one):
    """Run two ranks in each of two replicas."""
    prompts = [
        {"prompt": f"{number} {'x' * number}", "model": MODEL, "max_tokens": 20} for number in range(8)
    ]

    def texts(url: str) -> list[str]:
        with ThreadPoolExecutor(8) as threads:
            posts = [
                threads.submit(
                    httpx.post,
                    f"{url}/v1/completions",
                    json={**body, "temperature": 0, "ignore_eos": True},
                    headers=KEY,
                    timeout=120,
                )
                for body in prompts
            ]
            return [post.result().json()["choices"][0]["text"] for post in posts]

    with replicas_of(directory, "--tensor-parallel-size=2", "--dtype=float32") as running:
        commands = list(running.others.values())
        assert sum("cupaged.engine.distributed.rank" in each for each in commands) == 2, "one for each leader"
        assert texts(running.url) == texts(one.url)
        assert all(load > 0 for (load,) in running.metrics("vllm:prompt_tokens_total").values())
        running.process.send_signal(signal.SIGTERM)
        running.wait_for_the_end()
        assert running.process.returncode == 0


# On a port that is free, and without the dashboard, which takes longer to start than all else. Ctrl-C is as
# in a shell: what runs in the background of a script ignores it, and so would its children.
SERVE_RUN = """
import functools, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import ray
from ray.serve import scripts
ray.init = functools.partial(ray.init, include_dashboard=False)
start = scripts._private_api.serve_start
options = {"host": "127.0.0.1", "port": int(sys.argv.pop())}
scripts._private_api.serve_start = lambda **given: start(**{**given, "http_options": options})
scripts.cli(sys.argv[1:])
"""


def test_the_command_for_a_cluster_runs_without_one(directory):
    """Run it as it stands in the README, but for the model and the port, on this machine's cores."""
    (command,) = re.findall(r"`serve run (cupaged\.ray_app:app .*?)`", (ROOT / "README.md").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*command.split(), f"model={directory}", f"served_model_name={MODEL}", "block_size=8"]
    start = ["-c", SERVE_RUN, "run", *arguments, "num_gpu_blocks_override=200", str(port)]
    environment = {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": "", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"  # 5 are too few on a busy machine
    with Command(*start, ready="is ready at", environment=environment) as running:
        url = f"http://127.0.0.1:{port}"
        body = {"model": MODEL, "prompt": "abc", "max_tokens": 5, "ignore_eos": True}
        for _ in range(2):
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
            assert answer.json()["usage"]["completion_tokens"] == 5
        running.url = url
        assert len(running.metrics()) == int(re.search(r"replicas=(\d)", command)[1])
        running.process.send_signal(signal.SIGINT)
        running.wait_for_the_end(but=AGENTS)
