"""What operators and clients ask beside completions: names, request IDs, tokens, metrics, the dashboard."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import cupaged
from cupaged import serve
from cupaged.engine import EngineConfig, SamplingParams
from cupaged.engine.outputs import CompletionOutput, RequestOutput
from cupaged.engine.server.app import create_app
from cupaged.engine.server.metrics import Metrics

from .conftest import MODEL, Running
from .test_logs import stats
from .test_metrics_and_life import read

BODY = {"model": MODEL, "prompt": "x", "max_tokens": 2, "ignore_eos": True}
ROOT = Path(__file__).resolve().parents[2]


# -- names -------------------------------------------------------------------------------------------


def test_a_model_has_several_names(server):
    """All are listed and taken; answers and metrics have the first."""
    transport = httpx.ASGITransport(app=create_app(server.async_engine, ["first", "org/second"]))

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            client = openai.AsyncOpenAI(base_url="http://x/v1", api_key="none", http_client=http)
            listed = (await client.models.list()).data
            retrieved = [await client.models.retrieve(model.id) for model in listed]
            answers = [
                await client.completions.create(model=model.id, prompt="x", max_tokens=1) for model in listed
            ]
            with pytest.raises(openai.NotFoundError, match="'first', 'org/second'"):
                await client.completions.create(model=MODEL, prompt="x", max_tokens=1)
            return listed, retrieved, answers, (await http.get("/metrics")).text

    listed, retrieved, answers, metrics = asyncio.run(ask())
    assert [model.id for model in listed] == ["first", "org/second"]
    assert retrieved == listed
    assert [answer.model for answer in answers] == ["first", "first"]
    assert set(re.findall(r'model_name="([^"]*)"', metrics)) == {"first"}


def test_names_on_the_command_line():
    assert serve.parser().parse_args([]).served_model_name is None
    given = serve.parser().parse_args(["--served-model-name", "a", "b/c", "--port", "1"])
    assert (given.served_model_name, given.port) == (["a", "b/c"], 1)


# -- IDs of requests ---------------------------------------------------------------------------------


def test_a_clients_request_id_is_in_the_answer_and_in_the_log(server, client, caplog):
    caplog.set_level(logging.INFO, "cupaged")
    response = httpx.post(f"{server.url}/v1/completions", json=BODY, headers={"X-Request-Id": "trace/1:a=b"})
    assert response.headers["x-request-id"] == "trace/1:a=b"
    assert response.json()["id"].startswith("cmpl-trace/1:a=b-")
    assert any("request cmpl-trace/1:a=b-" in record.message for record in caplog.records)
    answer = client.completions.create(
        model=MODEL, prompt="x", max_tokens=1, extra_headers={"X-Request-Id": "mine"}
    )
    assert answer._request_id == "mine"


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, "caf\u00e9", "a\tb"])
def test_an_unusable_request_id_is_replaced(server, given):
    headers = {} if given is None else {"X-Request-Id": given.encode("latin-1")}
    response = httpx.post(f"{server.url}/v1/completions", json=BODY, headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    assert response.json()["id"] == f"cmpl-{response.headers['x-request-id']}"


def test_requests_of_the_same_id_run_at_the_same_time(server):
    headers = {"X-Request-Id": "same"}
    body = {**BODY, "max_tokens": 60}

    def send(_):
        return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(send, range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 8


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", "/nowhere"), ("PUT", "/v1/completions"), ("POST", "/v1/completions")],
)
def test_every_answer_has_a_request_id(server, method, path):
    response = httpx.request(method, server.url + path, headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"


# -- version and health ------------------------------------------------------------------------------


def test_version_and_ping(server):
    assert httpx.get(f"{server.url}/version").json() == {"version": cupaged.__version__}
    for method in ("GET", "POST", "HEAD"):
        response = httpx.request(method, f"{server.url}/ping")
        assert (response.status_code, response.content) == (200, b"")


def test_ping_follows_health(server):
    healthy = [True]
    app = create_app(server.async_engine, MODEL, healthy=lambda: healthy[0])

    async def statuses():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            asked = [http.get("/health"), http.get("/ping"), http.post("/ping")]
            return [(await response).status_code for response in asked]

    assert asyncio.run(statuses()) == [200] * 3
    healthy[0] = False
    assert asyncio.run(statuses()) == [503] * 3


# -- tokens ------------------------------------------------------------------------------------------


def post(server, path: str, **body) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60)


@pytest.mark.parametrize("model", [{}, {"model": MODEL}])
@pytest.mark.parametrize("text", ["abc", "p\u00e1ging \u2603", "", "x" * 1000])
def test_a_prompt_becomes_tokens_and_text_again(server, text, model):
    answer = post(server, "/tokenize", prompt=text, **model).json()
    expected = server.engine.tokenizer(text)["input_ids"]
    assert answer == {
        "count": len(expected),
        "max_model_len": server.engine.max_model_len,
        "tokens": expected,
        "token_strs": None,
    }
    assert post(server, "/detokenize", tokens=answer["tokens"], **model).json() == {"prompt": text}


def test_the_strings_of_tokens(server):
    answer = post(server, "/tokenize", prompt="ab c", return_token_strs=True).json()
    assert answer["token_strs"] == server.engine.tokenizer.convert_ids_to_tokens(answer["tokens"])
    assert len(answer["token_strs"]) == answer["count"] == 4


def test_special_tokens_are_added_unless_they_are_not_wanted(server, monkeypatch):
    """The tiny model's tokenizer adds none by itself."""
    app = create_app(server.async_engine, MODEL)

    def tokenizer(self, text, add_special_tokens=True, **_):
        return {"input_ids": [1] * add_special_tokens + [5]}

    monkeypatch.setattr(type(server.engine.tokenizer), "__call__", tokenizer)

    async def tokens(**fields):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return (await http.post("/tokenize", json={"prompt": "x", **fields})).json()["tokens"]

    assert asyncio.run(tokens()) == [1, 5]
    assert asyncio.run(tokens(add_special_tokens=False)) == [5]


def test_a_conversation_has_the_tokens_that_its_completion_counts(server, client):
    """The same body does for both."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    body = {"model": MODEL, "messages": messages, "max_tokens": 1, "temperature": 0.5}
    answer = post(server, "/tokenize", **body, return_token_strs=True, add_special_tokens=False).json()
    usage = client.chat.completions.create(**body).usage
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == usage.prompt_tokens
    text = post(server, "/detokenize", tokens=answer["tokens"]).json()["prompt"]
    assert text == "<start>system: Be brief.<end><start>user: Hi<end><start>assistant: "
    shorter = post(server, "/tokenize", messages=messages, add_generation_prompt=False).json()
    assert answer["tokens"][: shorter["count"]] == shorter["tokens"]
    assert shorter["count"] < answer["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"messages": []}, "messages"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True},
            "add_special_tokens",
        ),
        ("/tokenize", {"prompt": "x" * 1_000_000}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
    ],
)
def test_what_cannot_be_tokenized_is_a_400(server, path, body, param):
    response = httpx.post(
        server.url + path, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_another_models_tokens_are_a_404(server):
    for path, body in (
        ("/tokenize", {"prompt": "x"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}),
        ("/detokenize", {"tokens": [1]}),
    ):
        response = post(server, path, model="gpt-5", **body)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


# -- cached tokens -----------------------------------------------------------------------------------


def test_usage_says_how_much_of_a_prompt_was_cached(llama_dir):
    def cached(usage) -> int:
        return usage.prompt_tokens_details.cached_tokens

    with Running(llama_dir) as server, server.client() as client:
        prompt = "".join(random.Random(0).choices("abcdefgh", k=20))  # two full blocks and a half
        for expected in (0, 16, 16):
            assert (
                cached(client.completions.create(model=MODEL, prompt=prompt, max_tokens=1).usage) == expected
            )
        both = client.completions.create(
            model=MODEL, prompt=[prompt, prompt[:8] + "y" * 9], max_tokens=1, n=2
        )
        assert cached(both.usage) == 16 + 8
        *_, last = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
        assert cached(last.usage) == 16
        messages = [{"role": "user", "content": "What is paging?"}]
        chats = [
            client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1) for _ in range(2)
        ]
        assert [cached(chat.usage) for chat in chats] == [0, (chats[0].usage.prompt_tokens - 1) // 8 * 8]
        salted = [
            client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=1, extra_body={"cache_salt": "s"}
            )
            for _ in range(2)
        ]
        assert [cached(answer.usage) for answer in salted] == [0, 16]


# -- metrics -----------------------------------------------------------------------------------------


def test_the_times_of_a_request_add_up(llama_dir):
    with Running(llama_dir) as server, server.client() as client:
        for _ in range(2):
            client.completions.create(
                model=MODEL, prompt="12345", max_tokens=7, extra_body={"ignore_eos": True}
            )
        client.completions.create(
            model=MODEL, prompt="12", n=3, max_tokens=1, temperature=1, extra_body={"ignore_eos": True}
        )
        metrics = read(server.url)

    def total(name: str) -> float:
        assert metrics[f"vllm:{name}_count"] == 3
        return metrics[f"vllm:{name}_sum"]

    queue, prefill = total("request_queue_time_seconds"), total("request_prefill_time_seconds")
    decode, inference = total("request_decode_time_seconds"), total("request_inference_time_seconds")
    assert min(queue, prefill, decode) > 0
    assert inference == pytest.approx(prefill + decode)
    assert total("time_to_first_token_seconds") == pytest.approx(queue + prefill)
    assert total("e2e_request_latency_seconds") == pytest.approx(queue + inference, rel=0.01)
    assert total("request_prompt_tokens") == 2 * 5 + 2
    assert total("request_generation_tokens") == 2 * 7 + 3
    assert total("request_params_max_tokens") == 2 * 7 + 1
    assert total("request_params_n") == 1 + 1 + 3
    assert metrics["vllm:request_time_per_output_token_seconds_count"] == 2, "those of one token have none"
    between = metrics["vllm:inter_token_latency_seconds_sum"]
    assert between == pytest.approx(decode)
    assert metrics["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(between / 6)


def test_requests_that_wait_are_in_the_queue_time(llama_dir):
    """Not in the time to compute their prompts."""
    with Running(llama_dir, max_num_seqs=1) as server:
        step = server.engine.step
        server.engine.step = lambda: (time.sleep(0.01), step())[1]
        body = {**BODY, "max_tokens": 15}
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda _: httpx.post(f"{server.url}/v1/completions", json=body), range(3)))
        metrics = read(server.url)
    assert metrics["vllm:request_queue_time_seconds_sum"] >= 2 * 0.15
    assert metrics["vllm:request_prefill_time_seconds_sum"] < metrics["vllm:request_queue_time_seconds_sum"]


def output(num_tokens: int, finished: bool) -> RequestOutput:
    completion = CompletionOutput(0, "", [0] * num_tokens, "length" if finished else None)
    return RequestOutput("r", "", [0] * 3, [completion], finished)


def test_times_between_tokens_are_counted_as_prometheus_counts_them(seed, monkeypatch):
    """Over its own text format, in cumulative buckets; of an output with several new tokens their mean."""
    draws = random.Random(seed)
    metrics = Metrics(MODEL, stats, EngineConfig(), 2048)
    now, gaps, tokens = 0.0, [], 1
    monkeypatch.setattr("cupaged.engine.server.metrics.time.monotonic", lambda: now)
    timer = metrics.request(SamplingParams(max_tokens=100))
    timer.observe(output(1, False))
    for _ in range(draws.randrange(1, 50)):
        new = draws.choice([1, 1, 3])
        gap = draws.choice([0.0, 0.001, 0.0025, 2.5, 2.6, draws.random()])
        now, tokens = now + gap * new, tokens + new
        gaps.append(gap)
        timer.observe(output(tokens, False))
    timer.observe(output(tokens, True))  # the end without a new token
    text = serialised(metrics)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["vllm:inter_token_latency_seconds"].samples
    assert families["vllm:inter_token_latency_seconds"].type == "histogram"
    for sample in samples:
        assert sample.labels["model_name"] == MODEL
        if sample.name.endswith("_bucket"):
            below = sum(gap <= float(sample.labels["le"]) + 1e-9 for gap in gaps)
            assert sample.value == pytest.approx(
                below, abs=sum(near(gap, sample.labels["le"]) for gap in gaps)
            )
        elif sample.name.endswith("_count"):
            assert sample.value == len(gaps)
        else:
            assert sample.value == pytest.approx(sum(gaps))
    assert {sample.labels["le"] for sample in samples if "le" in sample.labels} >= {"0.001", "2.5", "+Inf"}


def near(gap: float, bound: str) -> bool:
    """Return whether a gap, the difference of two times, may fall on either side of a bound."""
    return abs(gap - float(bound)) < 1e-9


def serialised(metrics: Metrics) -> str:
    from prometheus_client import generate_latest

    return generate_latest(metrics.registry).decode()


def test_the_cache_is_described(llama_dir):
    with Running(llama_dir, num_gpu_blocks_override=77, swap_space=0.0) as server:
        text = httpx.get(f"{server.url}/metrics").text
    (family,) = (f for f in text_string_to_metric_families(text) if f.name == "vllm:cache_config_info")
    (sample,) = family.samples
    assert sample.value == 1
    expected = {
        "block_size": "8",
        "num_gpu_blocks": "77",
        "num_cpu_blocks": "0",
        "enable_prefix_caching": "True",
    }
    assert expected.items() <= sample.labels.items()


def test_buckets_of_lengths_end_at_the_longest_sequence():
    metrics = Metrics(MODEL, stats, EngineConfig(), 300)
    bounds = re.findall(r'vllm:request_prompt_tokens_bucket\{le="([^"]+)"', serialised(metrics))
    assert [float(bound) for bound in bounds] == [1, 2, 5, 10, 20, 50, 100, 200, 300, float("inf")]


def test_the_dashboard_asks_for_metrics_that_there_are(server):
    """Each series it names, with the labels that it selects and groups by."""
    exported: dict[str, set[str]] = {}
    httpx.post(f"{server.url}/v1/completions", json=BODY)
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            exported.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["name"] == "model_name"
    ]
    named = set()
    for query in queries:
        names = re.findall(r"(?:vllm|cupaged):\w+", query)
        assert names
        labels = set(re.findall(r"(\w+)=~", query))
        for group in re.findall(r"by \(([^)]*)\)", query):
            labels.update(group.replace(" ", "").split(","))
        for name in names:
            assert labels <= exported[name], query
        named.update(names)
    engine = {name for name in exported if name.startswith(("vllm:num_", "vllm:kv_", "cupaged:"))}
    assert engine - named <= {f"{name}_created" for name in named}, "all gauges are on it"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_endpoint_and_option_of_access_is_in_the_documentation(server):
    text = (ROOT / "docs" / "server.md").read_text()
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert len(paths) >= 10
    assert not [path for path in paths if f"{path}`" not in text]
    (access,) = (group for group in serve.parser()._action_groups if group.title == "access")
    options = [action.option_strings[0] for action in access._group_actions]
    assert not [option for option in options if f"`{option}`" not in text]


def test_one_name_for_the_lines_of_requests():
    for option, expected in (
        ("--no-access-log", False),
        ("--access-log", True),
        ("--no-log-requests", False),
    ):
        assert serve.parser().parse_args([option]).log_requests is expected
