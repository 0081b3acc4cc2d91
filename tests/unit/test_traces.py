"""Traces: files of every format are read as they are meant, and drawn ones have the statistics they claim."""

from __future__ import annotations

import csv
import datetime
import json
import math
import random
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.simulation import Request, Spans
from benchmarks.trace_generators import GENERATORS, Sessions, cut, exponential, generate, ideal_hits
from benchmarks.traces import READERS, Arrivals, read, scaled, spread


def shared(one: Request, other: Request) -> int:
    """The number of first tokens that two prompts have in common."""
    pairs = list(zip(one.prompt, other.prompt))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def lengths(requests: list[Request]) -> list[tuple[int, int]]:
    return [(len(request.prompt), request.num_tokens) for request in requests]


def drawn_texts(rng: random.Random) -> list[tuple[str, str]]:
    """With empty ones among them, and lines, quotes and letters of other alphabets in them."""
    letters = 'ab "\\\n,é漢'
    return [
        tuple("".join(rng.choices(letters, k=rng.choice([0, 1, 5, 40]))) for _ in range(2))
        for _ in range(rng.randrange(1, 20))
    ]


def write_texts(path: Path, format: str, texts: list[tuple[str, str]]) -> None:
    if format == "sharegpt":
        entries = [
            {"id": str(i), "conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]}
            for i, (a, b) in enumerate(texts)
        ]
        entries.append({"id": "short", "conversations": [{"from": "human", "value": "nobody answers"}]})
    else:
        entries = [{"instruction": a, "input": "", "output": b} for a, b in texts]
    path.write_text(json.dumps(entries), encoding="utf-8")


@pytest.mark.parametrize("format", ["sharegpt", "alpaca"])
def test_texts_are_counted_and_share_nothing(format, tmp_path, seed):
    texts = drawn_texts(random.Random(seed))
    texts.append(("the last", "one"))
    path = tmp_path / "texts.json"
    write_texts(path, format, texts)
    wanted = [(len(a), len(b)) for a, b in texts if a and b]
    requests = read(path, count=len)
    assert lengths(requests) == wanted
    assert lengths(read(path)) == [(math.ceil(a / 4), math.ceil(b / 4)) for a, b in wanted]
    assert not any(shared(one, other) for one, other in pairwise(requests))
    assert all(request.time == 0 for request in requests)


def test_alpacas_input_belongs_to_the_prompt(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([{"instruction": "add", "input": "1 2", "output": "3"}]))
    assert lengths(read(path, count=len)) == [(len("add\n1 2"), 1)]


def drawn_lengths(rng: random.Random) -> list[tuple[float, int, int]]:
    """Times that need not ascend, and numbers of tokens, some of them 0."""
    rows = [
        (round(rng.uniform(0, 1e4), 6), rng.choice([0, 1, rng.randrange(5000)]), rng.choice([0, 1, 700]))
        for _ in range(rng.randrange(30))
    ]
    return [*rows, (5000.5, 7, 3)]


def wanted_of(rows: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    rows = [row for row in rows if row[1] and row[2]]
    first = min(row[0] for row in rows)
    return sorted(((time - first, a, b) for time, a, b in rows), key=lambda row: row[0])


def check(requests: list[Request], wanted: list[tuple[float, int, int]]) -> None:
    assert lengths(requests) == [(a, b) for _, a, b in wanted]
    assert [r.time for r in requests] == pytest.approx([time for time, _, _ in wanted], abs=2e-6)


@pytest.mark.parametrize("written", ["%Y-%m-%d %H:%M:%S.%f0", "%Y-%m-%d %H:%M:%S.%f+00:00"])
def test_azures_csv(written, tmp_path, seed):
    """Of 2023 with seven digits of a second, of 2024 with a zone."""
    rows = drawn_lengths(random.Random(seed))
    start = datetime.datetime(2023, 11, 16, 23, 59)
    path = tmp_path / "azure.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        for time, prompt, output in rows:
            writer.writerow([(start + datetime.timedelta(seconds=time)).strftime(written), prompt, output])
    check(read(path), wanted_of(rows))


def test_a_timestamp_without_a_fraction(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00+00:00,5,5\n2024-05-10 00:00:01.5,5,5\n"
    )
    assert [request.time for request in read(path)] == [0, 1.5]


def test_mooncakes_hash_ids_say_what_prompts_share(tmp_path, seed):
    rng = random.Random(seed)
    texts, ids, entries = [], {}, []
    for _ in range(rng.randrange(1, 12)):
        text = list(rng.choice(texts))[: rng.randrange(1, 1500)] if texts and rng.random() < 0.7 else []
        text += [rng.random() for _ in range(rng.randrange(1, 1500))]
        texts.append(text)
        # As Mooncake makes them: an ID of 512 tokens and all before them.
        blocks = [tuple(text[: start + 512]) for start in range(0, len(text), 512)]
        hash_ids = [ids.setdefault(block, len(ids)) for block in blocks]
        entries.append(
            {
                "timestamp": rng.randrange(10**6),
                "input_length": len(text),
                "output_length": rng.randrange(1, 99),
                "hash_ids": hash_ids,
            }
        )
    order = sorted(range(len(entries)), key=lambda i: entries[i]["timestamp"])
    path = tmp_path / "mooncake.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    requests = read(path)
    check(
        requests,
        wanted_of([(e["timestamp"] / 1e3, e["input_length"], e["output_length"]) for e in entries]),
    )
    for i, one in zip(order, requests):
        for j, other in zip(order, requests):
            same = [
                min(512, len(texts[i]) - 512 * k)
                for k, (a, b) in enumerate(zip(entries[i]["hash_ids"], entries[j]["hash_ids"]))
                if a == b
            ]
            assert shared(one, other) == sum(same)


def test_a_csv_of_ones_own(tmp_path, seed):
    rng = random.Random(seed)
    rows = drawn_lengths(rng)
    prefixes = [(rng.choice(["", "a", "b"]), rng.randrange(prompt + 1)) for _, prompt, _ in rows]
    path = tmp_path / "mine.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arrival", "prompt_tokens", "output_tokens", "prefix", "prefix_tokens"])
        writer.writerows((*row, *prefix) for row, prefix in zip(rows, prefixes))
    requests = read(path)
    check(requests, wanted_of(rows))
    kept = [(row, prefix) for row, prefix in zip(rows, prefixes) if row[1] and row[2]]
    kept.sort(key=lambda each: each[0][0])
    for (_, (name, count)), one in zip(kept, requests):
        for (_, (other_name, other_count)), other in zip(kept, requests):
            if one is not other:
                assert shared(one, other) == (min(count, other_count) if name and name == other_name else 0)


def test_a_csv_without_prefixes_and_a_limit(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("arrival,prompt_tokens,output_tokens\n" + "".join(f"{i},{i + 1},2\n" for i in range(9)))
    assert lengths(read(path, limit=4)) == [(i + 1, 2) for i in range(4)]


BAD = {
    "sharegpt": ["{}", "[1]", '[{"id": 1}]', '[{"conversations": [{"value": 1}, {"value": "a"}]}]', "x"],
    "alpaca": ['[{"instruction": "a"}]', '[{"instruction": 1, "output": "b"}]', "[[]]"],
    "azure": [
        "TIMESTAMP,ContextTokens\n2023-01-01,5\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,1\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-01-01 00:00:00,-1,1\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-01-01 00:00:00,,1\n",
    ],
    "mooncake": [
        '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [-1]}',
        '{"timestamp": 0, "input_length": 5, "output_length": 1}',
        "[]",
        "x",
    ],
    "csv": [
        "arrival,prompt_tokens\n0,1\n",
        "arrival,prompt_tokens,output_tokens\nnan,1,1\n",
        "arrival,prompt_tokens,output_tokens,prefix,prefix_tokens\n0,1,1,a,2\n",
    ],
}


@pytest.mark.parametrize("format", READERS)
def test_a_file_that_is_not_of_the_format_is_refused_by_name(format, tmp_path):
    path = tmp_path / "broken"
    for text in BAD[format]:
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"broken is not a {format} trace"):
            read(path, format)
    empty = {"sharegpt": "[]", "alpaca": "[]", "mooncake": ""}.get(format, "arrival\n")
    path.write_text(empty)
    with pytest.raises(ValueError, match="broken has no requests"):
        read(path, format)


def test_unknown_formats_and_traces_are_refused(tmp_path):
    with pytest.raises(ValueError, match="format must be one of sharegpt, alpaca, azure, mooncake, csv"):
        read(tmp_path / "x.csv", "parquet")
    with pytest.raises(ValueError, match="there is no trace 'gpt'; there are sharegpt, "):
        generate("gpt", 1, Arrivals(1))
    for rate in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="rate must be a positive number"):
            Arrivals(rate)
    with pytest.raises(ValueError, match="burstiness must be"):
        Arrivals(1, -0.5)


@pytest.mark.parametrize("burstiness", [0.0, 0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness, seed):
    rng = random.Random(seed)
    rate, count = 10 ** rng.uniform(-1, 2), 20_000
    times = [0.0, *(time for _, time in zip(range(count), Arrivals(rate, burstiness).times(rng)))]
    gaps = [b - a for a, b in pairwise(times)]
    mean = statistics.fmean(gaps)
    # Six standard errors of the mean; of the variance about as much.
    assert mean * rate == pytest.approx(1, abs=6 * (burstiness / count) ** 0.5 + 1e-9)
    variation = statistics.pvariance(gaps) / mean**2
    assert variation == pytest.approx(burstiness, rel=0.35, abs=1e-9)


def test_a_trace_at_another_rate(seed):
    rng = random.Random(seed)
    requests = generate("alpaca", 50, Arrivals(rng.uniform(0.1, 10)), seed)
    rate = rng.uniform(0.1, 10)
    faster = scaled(requests, rate)
    assert len(faster) / max(r.time for r in faster) == pytest.approx(rate)
    assert lengths(faster) == lengths(requests)
    ratios = [after.time / before.time for before, after in zip(requests, faster)]
    assert ratios == pytest.approx([ratios[0]] * 50)
    other = spread(requests, Arrivals(rate), seed)
    assert lengths(other) == lengths(requests)
    assert [r.time for r in other] == sorted(r.time for r in other)
    with pytest.raises(ValueError, match="all requests of the trace arrive at once"):
        scaled([Request(0, Spans((1, 1)), 1)], 1)
    with pytest.raises(ValueError, match="turns arrive after each other"):
        scaled(generate("chat", 50, Arrivals(1), seed), 1)


# What the sources publish: mean or median of prompts and outputs, and the share that an earlier prompt had.
PUBLISHED = {
    "sharegpt": (statistics.fmean, 161.31, 337.99, 0.0),
    "alpaca": (statistics.fmean, 19.31, 58.45, 0.0),
    "azure-conv": (statistics.median, 1020, 129, 0.0),
    "azure-code": (statistics.median, 1500, 13, 0.0),
    "mooncake-conversation": (statistics.fmean, 12035, 343, 0.40),
    "mooncake-toolagent": (statistics.fmean, 8596, 182, 0.59),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_drawn_traces_have_the_published_statistics(name, seed):
    """Within what 2000 requests scatter, and what the first requests with a prefix do not find."""
    average, prompt, output, hits = PUBLISHED[name]
    requests = generate(name, 2000, Arrivals(1), seed)
    assert average(len(r.prompt) for r in requests) == pytest.approx(prompt, rel=0.2)
    assert average(r.num_tokens for r in requests) == pytest.approx(output, rel=0.2)
    assert ideal_hits(requests) == pytest.approx(hits, abs=0.1)


def test_every_drawn_trace_is_the_same_for_a_seed(seed):
    for name in GENERATORS:
        first, second = (generate(name, 30, Arrivals(3, 2), seed) for _ in range(2))
        assert [list(r.prompt)[-5:] for r in first] == [list(r.prompt)[-5:] for r in second]
        assert [r.time for r in first] == [r.time for r in second]


def test_the_turns_of_a_session_begin_with_the_ones_before(seed):
    draw = Sessions(exponential(50), exponential(20), exponential(30), another=0.7, system=40).draw
    requests = draw(60, Arrivals(1), seed)
    assert any(request.follows for request in requests)
    for request in requests:
        prompt = list(request.prompt)
        assert prompt[:40] == [0] * 40
        if (before := request.follows) is not None:
            said = [*before.prompt, *[before.output_token] * before.num_tokens]
            assert prompt[: len(said)] == said
            assert len(prompt) > len(said)
    strangers = [request for request in requests if request.follows is None]
    assert all(shared(one, other) == 40 for one, other in pairwise(strangers))


def test_cut_keeps_the_end(seed):
    rng = random.Random(seed)
    spans = [(i, rng.randrange(5)) for i in range(6)]
    tokens = list(Spans(*spans))
    for length in range(len(tokens) + 2):
        assert list(Spans(*cut(spans, length))) == tokens[max(0, len(tokens) - length) :]
