"""The figures of the paper's evaluation: all of them run, and are in the order that their causes demand."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest

from benchmarks import paper, simulator
from benchmarks.cost_model import opt_13b_on_a100
from benchmarks.evaluation import block_sizes, memory, plots, policies, preemption, rates, tables

TABLES = {
    "paper-memory": tables.memory_tables,
    "paper-rates": tables.rates_table,
    "paper-block-size": tables.block_size_table,
    "paper-preemption": tables.preemption_table,
    "paper-policies": tables.policies_tables,
}


LONG = ("memory", "rates", "policies")  # to run


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.matrix) if part in LONG else part for part in paper.PARTS]
)
def test_every_part_becomes_a_json_a_plot_and_a_table(part, tmp_path, monkeypatch):
    """In a smaller form than the quick one; every row is printed and is in the table."""
    module = paper.PARTS[part]
    monkeypatch.setattr(module, "QUICK", {"memory": 110, "rates": 120, "policies": 6}.get(part, 20))
    rows = [module.run(job) for job in module.jobs(quick=True)]
    results = json.loads(json.dumps(module.results(rows)))
    assert "A simulation: no model ran" in results["note"]
    target = plots.draw(results, tmp_path / f"{module.NAME}.png")
    assert target.read_bytes().startswith(b"\x89PNG")
    text = "\n".join(TABLES[module.NAME]({"results": results}, "[link](link)"))
    assert "[link](link)" in text
    for row in rows:
        name = row.get("policy") or row.get("system") or row.get("mode") or row["load"]
        if name == "lru":
            name = "defaults"
        assert name in text
        assert str(row.get("load") or row.get("policy", name)) in module.line(row)


@pytest.mark.matrix
def test_the_command_writes_every_part(tmp_path):
    assert paper.main(["--quick", "--out", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(f"{part.NAME}.{end}" for part in paper.PARTS.values() for end in ("json", "png"))


def test_the_simulator_is_measured(tmp_path):
    assert simulator.main(["--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "simulator-cpu.json").read_text())["results"]["rows"]
    assert [row["load"] for row in rows] == list(memory.LOADS)
    for row in rows:
        assert row["times_real_time"] == pytest.approx(row["simulated_s"] / row["cpu_s"])
        assert row["simulated_s"] > 0.5 * row["requests"] / row["rate"]


def test_the_jobs_are_those_of_the_papers_figures():
    figures = {rates.CASES[job["case"]].figure for job in rates.jobs(quick=False)}
    assert figures == {"12", "14", "16", "17"}
    widths = {
        (job["load"], kind, job[kind])
        for job in memory.jobs(quick=False)
        for kind in ("n", "beam_width")
        if kind in job
    }
    wanted = {
        (load, kind, width) for load in memory.LOADS for kind in ("n", "beam_width") for width in (2, 4, 6)
    }
    assert widths == wanted
    wanted = {
        (trace, name) for trace in policies.TRACES for kind in policies.KINDS.values() for name in kind.names
    }
    tried = {(job["trace"], job["policy"]) for job in policies.jobs(quick=False)}
    assert {name for _, name in wanted - tried} == {"fcfs", "watermark", "recompute", "priority"}  # defaults
    for module in (block_sizes, preemption):
        assert {job["block_size"] for job in module.jobs(quick=False)} == {2**i for i in range(9)}


def test_small_blocks_cost_time_and_contiguous_memory_none(seed):
    """Of the kernels: each block costs the same whatever its size. Of the link: two copies in each layer."""
    context = [opt_13b_on_a100(2**i).context_token for i in range(9)]
    contiguous = opt_13b_on_a100(None)
    assert all(less < more for more, less in pairwise(context))
    assert all(cost > contiguous.context_token for cost in context)
    size = random.Random(seed).randrange(1, 300)
    one, other = opt_13b_on_a100(size), opt_13b_on_a100(2 * size)
    per_block = size * (one.context_token - contiguous.context_token)
    assert 2 * size * (other.context_token - contiguous.context_token) == pytest.approx(per_block)
    assert one.moved_block < other.moved_block < 2 * one.moved_block
    assert contiguous.moved_block == 0
    # The paper's 20 to 26 % (section 7.1).
    assert 1.2 <= opt_13b_on_a100(16).context_token / contiguous.context_token <= 1.26


def test_recomputing_wins_with_small_blocks_and_swapping_with_large_ones():
    """And recomputing is the same for all (Figure 19a)."""
    rows = {
        (row["mode"], row["block_size"]): row["overhead_s"]
        for row in map(preemption.run, [{**job, "requests": 1} for job in preemption.jobs(quick=False)])
    }
    recompute = {rows["recompute", size] for size in preemption.SIZES}
    assert len(recompute) == 1
    (same,) = recompute
    assert rows["swap", 1] > 3 * same
    assert rows["swap", 256] < same


def test_a_load_is_the_same_at_every_rate(seed):
    rng = random.Random(seed)
    load = rng.choice(list(memory.LOADS.values()))
    slow, fast = (memory.requests(load, 20, rate) for rate in (1.0, 8.0))
    for one, other in zip(slow, fast, strict=True):
        assert (len(one.prompt), one.num_tokens) == (len(other.prompt), other.num_tokens)
        assert one.time == pytest.approx(8 * other.time)
