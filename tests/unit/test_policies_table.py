"""The table of policies: of drawn traces, and of a file of each format in one command."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks import policies

DEFAULTS = [kind.names[0] for kind in policies.KINDS.values()]
ALL = [name for kind in policies.KINDS.values() for name in kind.names if name != "priority"]

# Three requests each, of 40 tokens in and 5 out.
FILES = {
    "sharegpt.json": json.dumps(
        3 * [{"conversations": [{"from": "human", "value": "x" * 160}, {"from": "gpt", "value": "y" * 20}]}]
    ),
    "alpaca.json": json.dumps(3 * [{"instruction": "x" * 160, "input": "", "output": "y" * 20}]),
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    + "".join(f"2023-11-16 18:17:0{i}.9799600,40,5\n" for i in range(3)),
    "mooncake.jsonl": "\n".join(
        json.dumps({"timestamp": 1000 * i, "input_length": 40, "output_length": 5, "hash_ids": [i]})
        for i in range(3)
    ),
    "mine.csv": "arrival,prompt_tokens,output_tokens\n" + "".join(f"{i},40,5\n" for i in range(3)),
}


def table(arguments, tmp_path, name):
    assert policies.main([*arguments, "--out", str(tmp_path)]) == 0
    return json.loads((tmp_path / f"policies-{name}.json").read_text())["results"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_format_becomes_a_table(name, tmp_path, capsys):
    """Nothing but the file is given; every policy serves its requests."""
    path = tmp_path / name
    path.write_text(FILES[name])
    results = table([str(path)], tmp_path, path.stem)
    assert results["fitting"] == 3
    assert [row["policy"] for row in results["rows"]] == ALL
    for row in results["rows"]:
        assert row["hit_rate"] == row["preemptions"] == 0
        assert row["computed_tokens"] == 3 * (40 + 4)
    shown = capsys.readouterr().out
    assert "no model ran" in shown
    assert all(policy in shown for policy in ALL)


@pytest.mark.parametrize(
    ("trace", "count"), [("chat", 40), pytest.param("mooncake-toolagent", 20, marks=pytest.mark.matrix)]
)
def test_a_table_of_a_drawn_trace(trace, count, tmp_path, seed):
    """Every policy serves the same requests; knowing the future is better than not, but for a little."""
    arguments = [trace, "--requests", str(count), "--blocks", "1000", "--seed", str(seed % 1000)]
    rows = {row["policy"]: row for row in table(arguments, tmp_path, trace)["rows"]}
    assert list(rows) == ALL
    best = max(rows[policy]["hit_rate"] for policy in ("lru", "lfu", "cost"))
    assert rows["clairvoyant"]["hit_rate"] >= best - 0.1
    assert (
        len({tuple(v for k, v in rows[name].items() if k not in ("kind", "policy")) for name in DEFAULTS})
        == 1
    )
    assert rows["conservative"]["preemptions"] == 0


def test_a_policy_of_ones_own_and_priorities_stand_beside_the_others(tmp_path, capsys, seed):
    """Read a CSV with a request that is too large; refuse what cannot be read."""
    rng = random.Random(seed)
    path, own = tmp_path / "mine.csv", tmp_path / "own.py"
    path.write_text(
        "arrival,prompt_tokens,output_tokens,prefix,prefix_tokens,priority\n"
        + "".join(f"{i},100,10,{'ab'[i % 2]},64,{rng.randrange(2)}\n" for i in range(20))
        + "21,1000,10,,0,0\n"
    )
    own.write_text(
        "from cupaged.engine.scheduling.order import SchedulingPolicy\n\n\n"
        "class LastComeFirstServed(SchedulingPolicy):\n"
        "    def rank(self, group, num_cached):\n"
        "        return -group.arrival\n"
    )
    arguments = [str(path), "--blocks", "50", "--max-num-seqs", "1", "--kinds", "scheduling"]
    results = table([*arguments, "--own", f"{own}:LastComeFirstServed"], tmp_path, "mine")
    names = [row["policy"] for row in results["rows"]]
    assert names == ["fcfs", "priority", "shortest-prompt", "longest-prefix", "LastComeFirstServed"]
    hits = {row["policy"]: row["hit_rate"] for row in results["rows"]}
    assert hits["fcfs"] == pytest.approx(18 * 64 / 2000)
    shown = capsys.readouterr().out
    assert "20 requests of" in shown
    assert "1 do not fit" in shown
    for text in (f"{own}:Nothing", f"{tmp_path / 'none.py'}:A", str(own)):
        assert policies.main([str(path), "--own", text]) == 2
        assert text in capsys.readouterr().err
    assert policies.main([str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err
