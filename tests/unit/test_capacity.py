"""The search for a configuration: the rate found is the highest within the limits, and bad input is named."""

from __future__ import annotations

import json
import random
import re

import pytest

from benchmarks import capacity, roofline
from benchmarks.capacity import CHOICES, Configuration, Hardware, Point, Question, Trace, parse_slo, search
from benchmarks.cost_model import Costs
from benchmarks.simulation import Request

A100 = roofline.DEVICES["a100-40gb"]
ARGUMENTS = ["--trace", "alpaca", "--model", "opt-13b", "--device", "a100-40gb", "--requests", "20"]


def question(slo: dict[str, float], trace: str = "alpaca", count: int = 30) -> Question:
    hardware = Hardware(roofline.MODELS["opt-13b"], A100)
    return Question(Trace(trace, None, count, 1.0, 0), slo, 0.9, hardware)


class Limited(Question):
    """Ask a question whose limits hold up to a rate that its configuration determines."""

    limits: dict[Configuration, float]

    def point(self, configuration: Configuration, rate: float) -> Point:
        return Point(rate, float(rate <= self.limits.get(configuration, 1.0)), {})


def test_the_rate_found_is_the_highest_that_holds(seed):
    rng = random.Random(seed)
    limit = 10 ** rng.uniform(-2.5, 3)
    asked = Limited(*(getattr(question({"ttft": 1.0}), name) for name in Question.__dataclass_fields__))
    object.__setattr__(asked, "limits", {Configuration(): limit})
    found, points = asked.capacity(Configuration())
    assert found <= limit < found * 4 ** (1 / 2**capacity.STEPS) * 1.001
    assert all((point.attained == 1) == (point.rate <= limit) for point in points)
    object.__setattr__(asked, "limits", {Configuration(): 0.0})
    assert asked.capacity(Configuration())[0] == 0


def test_the_best_value_of_every_setting_is_kept(seed):
    """Where settings are independent of each other the search finds the best of all."""
    rng = random.Random(seed)
    wanted = {name: rng.choice(values) for name, values in CHOICES.items()}

    class Additive(Question):
        def capacity(self, configuration: Configuration) -> tuple[float, list[Point]]:
            return 1.0 + sum(getattr(configuration, name) == value for name, value in wanted.items()), []

    asked = Additive(*(getattr(question({"ttft": 1.0}), name) for name in Question.__dataclass_fields__))
    rows = list(search(asked, Configuration()))
    assert rows[0][1] == Configuration()
    best = max(rows, key=lambda row: row[2])
    assert best[1] == Configuration(**wanted)
    assert len({row[1] for row in rows}) == len(rows), "nothing is tried twice"


def test_a_looser_limit_allows_a_higher_rate():
    tight, loose = (
        question({"tpot": limit}, count=150).capacity(Configuration())[0] for limit in (0.03, 0.04)
    )
    assert 0 < 1.2 * tight < loose
    with pytest.raises(ValueError, match="all requests at once are within the limits: take more --requests"):
        question({"tpot": 1.0}).capacity(Configuration())


def test_the_limits_are_those_of_the_requests():
    """One alone: a step for its prompt, and one for each token after it."""
    asked = question({"ttft": 1.0, "tpot": 1.0, "latency": 1.0}, count=1)
    (request,) = asked.trace.at(1.0)
    assert isinstance(request, Request)
    found = asked.point(Configuration(), 1.0).percentiles
    costs = asked.hardware.costs_of(Configuration())
    prompt = costs.step + costs.prompt_token * len(request.prompt)
    assert found["ttft"] == pytest.approx(prompt, rel=0.01)
    assert found["tpot"] == pytest.approx(costs.step, rel=0.1)
    whole = found["ttft"] + found["tpot"] * (request.num_tokens - 1)
    assert found["latency"] == pytest.approx(whole / request.num_tokens)


def test_an_8_bit_cache_holds_twice_the_tokens():
    model = roofline.MODELS["opt-13b"]
    eight = Configuration(kv_cache_dtype="fp8")
    for hardware in (Hardware(model, A100), Hardware(model, None, Costs(context_token=1e-6), 1000)):
        assert hardware.slots_of(eight) == pytest.approx(2 * hardware.slots_of(Configuration()), abs=2)
        one, other = hardware.costs_of(Configuration()), hardware.costs_of(eight)
        assert other.context_token == pytest.approx(one.context_token / 2)
    assert Hardware(model, A100).slots_of(Configuration()) == pytest.approx(15_700, rel=0.05)  # Table 1
    measured = Hardware(model, None, Costs(context_token=1e-6), 1000)
    assert measured.costs_of(Configuration()).context_token == 1e-6


def test_a_directory_has_the_sizes_of_its_configuration(tmp_path):
    """SmolLM2-135M's."""
    config = {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, known = roofline.shape(str(tmp_path)), roofline.MODELS["smollm2-135m"]
    assert found.parameters == pytest.approx(known.parameters, rel=0.01)
    assert (found.layers, found.heads, found.kv_heads, found.head_size) == (30, 9, 3, 64)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'hidden_size'"):
        roofline.shape(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=1s,tpot=50ms", {"ttft": 1.0, "tpot": 0.05}),
        (" latency = 0.25 s ", {"latency": 0.25}),
    ],
)
def test_limits_are_read(text, slo):
    assert parse_slo(text) == pytest.approx(slo)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=1", "ttft=-1s", "ttft=0s", "speed=1s", "ttft=1s;tpot=1s"])
def test_other_limits_are_refused(text):
    with pytest.raises(ValueError, match="is not a limit: write ttft or tpot or latency"):
        parse_slo(text)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--trace": "nowhere.csv"}, "--trace nowhere.csv: no such file, and no drawn trace: sharegpt"),
        ({"--model": "gpt-9"}, "--model gpt-9: no model of this name"),
        ({"--device": "abacus"}, "--device abacus: no device of this name"),
        ({"--device": "l4"}, "the weights have 24 GiB, and the device 24 GiB"),
        ({"--slo": "ttft=soon"}, "--slo 'ttft=soon' is not a limit"),
        ({"--device": __file__}, "--slots must say how many tokens the KV cache holds"),
        ({"--device": __file__, "--slots": "1000"}, "test_capacity.py has no step times"),
        ({"--trace": "mooncake-conversation"}, "a request has .* tokens, and the KV cache holds"),
        ({"--trace": __file__}, "is not a sharegpt trace"),
        ({"--attainment": "2"}, "--attainment in"),
    ],
)
def test_bad_input_is_named(changed, message, capsys):
    arguments = dict(zip(ARGUMENTS[::2], ARGUMENTS[1::2])) | changed
    with pytest.raises(SystemExit) as stopped:
        capacity.main([each for pair in arguments.items() for each in pair])
    assert stopped.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_the_command_writes_a_table_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(capacity, "CHOICES", {"max_num_seqs": (8, 256), "kv_cache_dtype": ("auto", "fp8")})
    assert capacity.main([*ARGUMENTS, "--slo", "ttft=1s,tpot=29ms", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "capacity-alpaca.json").read_text())["results"]
    assert len(results["rows"]) == 3
    assert results["best"]["rate"] == max(row["rate"] for row in results["rows"])
    assert (tmp_path / "capacity-alpaca.png").read_bytes().startswith(b"\x89PNG")
    assert "best:" in capsys.readouterr().out
    assert capacity.main([*ARGUMENTS, "--slo", "tpot=1ms"]) == 1
