"""The benchmark of the engine: what counts, what is refused, and what it says of contenders that fail."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import transformers as tf

from benchmarks import throughput
from benchmarks.contenders import environments, rates
from benchmarks.contenders.answers import AnswerCheck
from benchmarks.contenders.environments import Contender
from benchmarks.contenders.job import Job, cases
from benchmarks.contenders.names import FLOOR, OPENVINO, OURS, OURS_HTTP, VLLM_CPU, VLLM_CPU_HTTP
from benchmarks.contenders.processes import ContenderError

from .contender_jobs import small_job

# Reads the job as `offline.py` does, and answers every request with the tokens 1, 2, 3, ...
STAND_IN = """
import json, sys, pathlib
job = json.loads(pathlib.Path(sys.argv[-1]).read_text())
cases = {}
for case in job["cases"]:
    answers = [list(range(1, case["tokens"] + 1)) for _ in case["prompts"]]
    seconds = {"requests": 0.5, "prefill": 0.25, "decode": 0.75}[case["kind"]]
    cases[case["name"]] = {"seconds": [seconds] * job["repeats"], "answers": [answers] * job["repeats"]}
"""
REPORT = 'print("RESULT " + json.dumps({"load_s": 2.5, "cases": cases}))\n'
ONE_SHORT = 'cases["2 requests"]["answers"][-1][1].pop()\n' + REPORT
CRASH = 'print("the library is missing", file=sys.stderr)\nsys.exit(3)\n'


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def job(llama_dir) -> Job:
    return small_job(llama_dir)


def virtual_environment(folder: Path, code: str) -> Path:
    """Make what looks like a virtual environment, whose interpreter runs the code whatever it is told."""
    (folder / "bin").mkdir(parents=True)
    script = folder / "stand_in.py"
    script.write_text(code)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    return folder


def stand_in(folder: Path, code: str, job: Job, name: str = VLLM_CPU) -> Contender:
    path = virtual_environment(folder, STAND_IN + code)
    return environments.contenders(job, vllm_cpu=path, openvino=path, openvino_model=lambda: path)[name]


def accept(*_) -> None:
    """Check nothing."""


# -- answers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(llama_dir) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()


def right_result(model, job: Job) -> dict:
    """Return the answers of plain generation as a contender's."""
    results = {}
    for case in job.cases:
        answers = [
            model.generate(torch.tensor([p]), max_new_tokens=case.tokens, do_sample=False, eos_token_id=None)[
                0, len(p) :
            ].tolist()
            for p in case.prompts
        ]
        results[case.name] = {"seconds": [1.0, 1.0], "answers": [answers, [list(a) for a in answers]]}
    return {"load_s": 0.0, "cases": results}


def test_answers_that_the_model_would_not_give_are_refused(model, job):
    ours, other = Contender(OURS, ()), Contender(OPENVINO, (), own_weights=True)
    result = right_result(model, job)
    AnswerCheck(model)(ours, job, result)
    answer = result["cases"]["2 requests"]["answers"][1][1]
    answer[3] = (answer[3] + 1) % 300
    with pytest.raises(ContenderError, match=r"2 requests: a token's logit is .* below the largest"):
        AnswerCheck(model)(ours, job, result)
    AnswerCheck(model)(other, job, result)  # with other weights other tokens are right


@pytest.mark.parametrize(
    "change", [lambda answers: answers[0].pop(), lambda answers: answers.pop()], ids=["token", "answer"]
)
@pytest.mark.parametrize("repeat", [0, 1])
def test_a_wrong_number_of_tokens_or_answers_is_refused(model, job, change, repeat):
    """In each run that was timed, whoever's weights it has."""
    for contender in (Contender(OURS, ()), Contender(OPENVINO, (), own_weights=True)):
        result = right_result(model, job)
        change(result["cases"]["2 requests"]["answers"][repeat])
        with pytest.raises(ContenderError, match="instead of 2 of 4"):
            AnswerCheck(model)(contender, job, result)


def test_a_run_that_is_missing_is_refused(model, job):
    result = right_result(model, job)
    result["cases"]["decode"]["answers"].pop()
    with pytest.raises(ContenderError, match="ran 1 times instead of 2"):
        AnswerCheck(model)(Contender(OURS, ()), job, result)


# -- rates --------------------------------------------------------------------------------------------


def test_rates_are_of_the_fastest_run(job):
    seconds = {"2 requests": [4.0, 2.0], "prefill": [0.5, 1.0], "decode": [2.0, 1.0]}
    result = {"cases": {name: {"seconds": values} for name, values in seconds.items()}}
    assert rates.rates(job, result) == {"2 requests": 4.0, "prefill": 16.0, "decode": 8.0}


def test_a_decode_that_is_lost_in_noise_has_no_rate(job):
    seconds = {"2 requests": [4.0], "prefill": [2.0], "decode": [1.9]}
    result = {"cases": {name: {"seconds": values} for name, values in seconds.items()}}
    assert "decode" not in rates.rates(job, result)


def test_ratios_are_of_ours_in_the_same_way():
    values = {OURS: 100.0, VLLM_CPU: 80.0, OURS_HTTP: 60.0, VLLM_CPU_HTTP: 40.0, FLOOR: 200.0}
    runs = [
        {"name": name, "http": name.endswith("-http"), "rates": {"a": [value, value, 1e6 * value]}}
        for name, value in values.items()
    ]
    found = {run["name"]: rates.ratio(runs, run, "a") for run in runs}
    assert found == {OURS: None, VLLM_CPU: 1.25, OURS_HTTP: 0.6, VLLM_CPU_HTTP: 1.5, FLOOR: 0.5}
    text = "\n".join(rates.lines(["a"], runs))
    for part in ("cupaged is 1.25x", "0.60x of cupaged", "cupaged-http is 1.50x", "cupaged is 0.50x"):
        assert part in text
    assert rates.ratio(runs[1:], runs[1], "a") is None, "ours has failed"


# -- turns --------------------------------------------------------------------------------------------


def test_a_stand_in_is_measured_in_turns_and_the_floor_beside_it(job, tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "linear_floor", lambda *_: {"2 requests": 64.0})
    peers = [
        stand_in(tmp_path / "a", REPORT, job, VLLM_CPU),
        stand_in(tmp_path / "b", REPORT, job, OPENVINO),
    ]
    seen = []
    runs, failed = throughput.measure(peers, job, lambda *given: seen.append(given[0].name), 2, 60)
    assert seen == [VLLM_CPU, OPENVINO] * 2
    assert not failed
    assert [run["name"] for run in runs] == [VLLM_CPU, OPENVINO, FLOOR]
    assert runs[0]["rates"] == {"2 requests": [16.0] * 2, "prefill": [32.0] * 2, "decode": [8.0] * 2}
    assert runs[0]["load_s"] == [2.5, 2.5]
    assert runs[2]["rates"] == {"2 requests": [64.0, 64.0]}


@pytest.mark.parametrize(
    ("code", "why"),
    [(ONE_SHORT, "instead of 2 of 4"), (CRASH, "exit status 3.*\nthe library is missing"), ("", "0 results")],
    ids=["one short", "crash", "no result"],
)
def test_a_contender_that_fails_is_named_and_the_others_go_on(job, tmp_path, monkeypatch, model, code, why):
    monkeypatch.setattr(environments, "linear_floor", lambda *_: {})
    peers = [
        stand_in(tmp_path / "a", code, job, OPENVINO),
        stand_in(tmp_path / "b", REPORT, job, VLLM_CPU),
    ]
    check = AnswerCheck(model)
    counted = lambda contender, *rest: contender.own_weights and check(contender, *rest)  # noqa: E731
    runs, failed = throughput.measure(peers, job, counted, 2, 60)
    assert [run["name"] for run in runs] == [VLLM_CPU, FLOOR]
    assert list(failed) == [OPENVINO]
    assert re.search(why, failed[OPENVINO])


def test_a_contender_that_fails_later_does_not_count_at_all(job, tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "linear_floor", lambda *_: {})
    once = f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\nif mark.exists(): sys.exit(9)\nmark.touch()\n"
    runs, failed = throughput.measure([stand_in(tmp_path / "a", once + REPORT, job)], job, accept, 2, 60)
    assert [run["name"] for run in runs] == [FLOOR]
    assert "exit status 9" in failed[VLLM_CPU]


# -- the command --------------------------------------------------------------------------------------


def test_the_work_is_the_same_in_every_run(llama_dir):
    tokenizer = tf.AutoTokenizer.from_pretrained(llama_dir)
    work = cases(tokenizer, [1, 8], 10, 50)
    assert work == cases(tokenizer, [1, 8], 10, 50)
    assert [(c.kind, len(c.prompts), c.tokens) for c in work] == [
        ("requests", 1, 10),
        ("requests", 8, 10),
        ("prefill", 1, 1),
        ("decode", 1, 11),
    ]
    assert work[2].prompts == work[3].prompts
    assert len(work[2].prompts[0]) == 50
    assert not set(work[2].prompts[0]) & set(tokenizer.all_special_ids)
    assert len({len(prompt) for prompt in work[1].prompts}) > 3


@pytest.mark.matrix
def test_ours_over_http_and_offline_beside_a_contender_that_fails(llama_dir, tmp_path, monkeypatch, capsys):
    """The whole command: ours on a tiny model, and a peer that crashes."""
    peer = virtual_environment(tmp_path / "venv", STAND_IN + CRASH)
    monkeypatch.setenv("CUPAGED_VLLM_CPU", str(peer))
    monkeypatch.delenv("CUPAGED_OPENVINO_GENAI", raising=False)
    monkeypatch.chdir(Path(llama_dir).parent)  # a relative path is found from the processes' folders too
    small = "--requests 1 3 --tokens 6 --long-prompt 40 --rounds 1 --repeats 1 --threads 1 --device cpu"
    status = throughput.main(
        [
            *("--model", Path(llama_dir).name, *small.split(), "--out", str(tmp_path / "out")),
            *("--contenders", OURS, OURS_HTTP, VLLM_CPU, VLLM_CPU_HTTP),
        ]
    )
    assert status == 1
    printed = capsys.readouterr()
    assert f"{VLLM_CPU}: FAILED, exit status 3" in printed.err
    assert f"{VLLM_CPU_HTTP}: FAILED, the server ended with status" in printed.err
    assert "the library is missing" in printed.err
    assert f"x of {OURS}" in printed.out
    assert FLOOR in printed.out
    written = json.loads((tmp_path / "out" / "throughput-cpu.json").read_text())
    assert written["environment"]["commit"]
    assert written["environment"]["threads"] == 1
    results = written["results"]
    assert results["dtype"] == "float32"
    assert [run["name"] for run in results["runs"]] == [OURS, OURS_HTTP, FLOOR]
    for run in results["runs"][:2]:
        assert {"1 request", "3 requests", "prefill of 40 tokens"} <= run["rates"].keys()
        assert run["versions"]["torch"] == torch.__version__
    assert results["failed"].keys() == {VLLM_CPU, VLLM_CPU_HTTP}
    chart = ElementTree.parse(tmp_path / "out" / "throughput-cpu.svg")
    words = [text.text for text in chart.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count(OURS_HTTP) == len(results["runs"][1]["rates"])
    assert {"1 request", FLOOR} <= set(words)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--vllm-cpu", "nowhere"], "nowhere is not a virtual environment"),
        (["--contenders", VLLM_CPU_HTTP], "virtual environment of vllm-cpu with --vllm-cpu"),
        (["--contenders", OPENVINO], "virtual environment of openvino-genai with --openvino-genai"),
        (["--contenders", "sglang"], "invalid choice"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--requests", "4", "0"], "--requests must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_loaded(given, why, monkeypatch, capsys):
    for variable in ("CUPAGED_VLLM_CPU", "CUPAGED_OPENVINO_GENAI"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit):
        throughput.main(given)
    assert why in capsys.readouterr().err
