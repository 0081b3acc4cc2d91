"""Sequences that share blocks: decode reads those once, and nobody's result changes by a bit."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

import cupaged
from benchmarks.cases import TABLE_POISON, Problem, check, draw
from cupaged import backends
from cupaged.backends.cuda import kernels, plans

from .test_attention import run

SPLIT = plans.SPLIT_TOKENS
Launch = tuple[str, dict[str, torch.Tensor]]  # the entry point, and its tensors by name


@pytest.fixture
def emulation(monkeypatch, seed):
    """The emulated kernels, with the tensors of all launches."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulation with")
    from tests.cuda_host import emulator

    launches: list[Launch] = []

    class Recorder(emulator.HostLauncher):
        def prepare(self, call, device):
            def launch(tensors):
                prepared(tensors)
                launches.append((call.spec.entry, dict(zip(call.arguments.pointers(), tensors))))

            prepared = super().prepare(call, device)
            return launch

    module = kernels.Kernels(Recorder(seed))
    monkeypatch.setattr(backends, "for_device", lambda device_type: module)
    return launches


def share(problem: Problem, pairs: list[tuple[int, int, int]]) -> Problem:
    """For each (from, to, tokens) give sequence ``to`` the whole blocks of ``from`` in its first tokens.

    The blocks it had become poison.
    """
    block_size = problem.kv_cache.shape[3]
    quantised = problem.kv_cache.dtype.itemsize == 1
    for source, target, tokens in pairs:
        for b in range(tokens // block_size):
            lost = int(problem.block_tables[target, b])
            problem.block_tables[target, b] = problem.block_tables[source, b]
            if lost != TABLE_POISON and not (problem.block_tables == lost).any():
                block = problem.kv_cache[lost]
                if quantised:
                    block.view(torch.uint8).fill_(0x80 if block.dtype == torch.int8 else 0x7F)
                else:
                    block.fill_(float("nan"))
    return problem


def draw_shared(seed: int, *, queries: str = "one", **options) -> Problem:
    """Two families of sequences with prefixes in common, of which one has branches, and some loners."""
    rng = random.Random(seed)
    prefix = SPLIT * rng.randrange(1, 3) + rng.choice([0, 1, 40])
    branch = prefix // SPLIT * SPLIT + SPLIT
    lengths = [
        *(prefix + rng.randrange(9, 600) for _ in range(3)),
        rng.randrange(1, 700),
        *(branch + rng.randrange(9, 80) for _ in range(4)),
        0,
        SPLIT + 9,
        SPLIT + 8,
    ]
    problem = draw(
        seed,
        block_size=rng.choice([8, 32, 128]),
        seq_lens=lengths,
        query_lens=None if queries == "one" else [min(n, rng.randrange(1, 9)) for n in lengths],
        padding_rows=0 if queries == "one" else rng.choice([0, 3]),
        block_stride_factor=rng.choice([1, 2]),
        **options,
    )
    pairs = [(0, 1, prefix), (0, 2, prefix)]
    pairs += [(4, 5, branch), (4, 6, prefix), (6, 7, branch), (9, 10, SPLIT)]
    return share(problem, pairs)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("queries", ["one", "few"])
@pytest.mark.parametrize("features", [(), ("cap", "alibi"), ("sinks",), ("full",), ("window",)], ids="+".join)
def test_shared_blocks_give_the_same_result(backend, seed, queries, features):
    rng = random.Random(seed)
    problem = draw_shared(
        seed,
        queries=queries,
        dtype=rng.choice([torch.float32, torch.float16, torch.bfloat16]),
        head_size=rng.choice([32, 64]),
        num_kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 2, 3, 8, 12]),
        features=() if "window" in features else features,
    )
    if "window" in features:
        problem.options["sliding_window"] = 700
    problem.options |= {"max_query_len": 8, "shared_prefix": True}
    out, lse = run(problem, backend[1])
    check(out, problem, lse)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("group", "queries", "batch_invariant"),
    [(2, "one", True), (1, "one", False), (4, "few", True), (12, "one", True), (3, "mixed", False)],
)
def test_sharing_changes_no_bit(backend, seed, group, queries, batch_invariant, cache_dtype):
    """Nor where some of the sequences are left to prefill; batch invariance is implied."""
    rng = random.Random(seed)
    problem = draw_shared(
        seed,
        queries=queries,
        dtype=rng.choice([torch.float16, torch.bfloat16]),
        cache_dtype=cache_dtype,
        head_size=64,
        num_kv_heads=rng.choice([1, 2]),
        group=group,
        features=rng.choice([(), ("alibi", "sinks"), ("cap",)]),
    )
    if queries != "mixed":
        problem.options["max_query_len"] = 8
    out, lse = run(problem, backend[1])
    problem.options |= {"shared_prefix": True, "batch_invariant": batch_invariant}
    shared_out, shared_lse = run(problem, backend[1])
    assert torch.equal(out, shared_out)
    assert torch.equal(lse, shared_lse)


def draw_wide(seed: int, *, group: int, queries: str, **options) -> Problem:
    """Of two prefixes, one for rows of more than a wide tile, the other for a few rows more than two narrow
    ones; a loner in between is wide if its own heads are enough."""
    rng = random.Random(seed)
    tokens = 1 if queries == "one" else 4
    many, few = (-(-rows // (group * tokens)) for rows in (65, 33))
    lengths = [SPLIT + rng.randrange(tokens, 40) for _ in range(many + 1 + few)]
    problem = draw(
        seed,
        dtype=rng.choice([torch.float16, torch.bfloat16]),
        block_size=rng.choice([1, 8, 16, 128]),
        group=group,
        seq_lens=lengths,
        query_lens=None if queries == "one" else [4, *(rng.choice([2, 3, 4, 4]) for _ in lengths[1:])],
        padding_rows=0 if queries == "one" else rng.choice([0, 3]),
        **options,
    )
    share(problem, [(0, s, SPLIT) for s in range(1, many)])
    share(problem, [(many + 1, s, SPLIT) for s in range(many + 2, len(lengths))])
    problem.options["max_query_len"] = 4
    return problem


@pytest.mark.cuda_kernels
@pytest.mark.parametrize(
    ("group", "queries", "head_size", "cache_dtype"),
    [
        (1, "few", 32, None),
        (3, "few", 80, None),
        (8, "one", 64, torch.float8_e5m2),
        (16, "few", 32, None),
        (40, "one", 128, torch.int8),
        (8, "one", 256, None),
    ],
    ids=str,
)
def test_wide_tiles_change_no_bit(backend, seed, group, queries, head_size, cache_dtype):
    problem = draw_wide(
        seed,
        group=group,
        queries=queries,
        cache_dtype=cache_dtype,
        head_size=head_size,
        num_kv_heads=2 if head_size == 32 else 1,
        features=random.Random(seed).choice([(), ("alibi", "sinks"), ("alibi", "cap")]),
    )
    out, lse = run(problem, backend[1])
    problem.options["shared_prefix"] = True
    shared_out, shared_lse = run(problem, backend[1])
    assert torch.equal(out, shared_out)
    assert torch.equal(lse, shared_lse)
    check(out, problem, lse)


@pytest.mark.parametrize("emulated_arch", ["86"], indirect=True)
@pytest.mark.parametrize(
    ("head_size", "cache_dtype"),
    [(256, torch.int8), *(pytest.param(size, None, marks=pytest.mark.matrix) for size in (112, 256))],
    ids=str,
)
def test_wide_tiles_of_less_shared_memory(emulated_arch, seed, head_size, cache_dtype):
    """They have 32 rows at the largest head sizes; at 112 two stages, and copy a chunk at a time."""
    problem = draw_wide(
        seed, group=12, queries="one", cache_dtype=cache_dtype, head_size=head_size, num_kv_heads=1
    )
    out, lse = run(problem, "cpu")
    problem.options["shared_prefix"] = True
    shared_out, shared_lse = run(problem, "cpu")
    assert torch.equal(out, shared_out)
    assert torch.equal(lse, shared_lse)
    check(out, problem, lse)


@pytest.mark.parametrize("emulated_arch", ["90a"], indirect=True)
def test_wide_tiles_of_more_blocks_than_shared_memory_has_ids_for(emulated_arch, seed, monkeypatch):
    """All warps of a block go through the runs of a KV split together."""
    monkeypatch.setattr(plans, "MAX_SPLITS", 2)
    rng = random.Random(seed)
    problem = draw(
        seed,
        dtype=torch.float16,
        head_size=32,
        block_size=8,
        num_kv_heads=1,
        group=17,
        seq_lens=[16 * SPLIT + rng.randrange(1, SPLIT) for _ in range(2)],
    )
    share(problem, [(0, 1, 9 * SPLIT)])
    problem.options["shared_prefix"] = True
    out, lse = run(problem, "cpu")
    check(out, problem, lse)


def test_every_backend_takes_the_flag(backend, seed):
    problem = draw(
        seed,
        dtype=torch.float32,
        head_size=64,
        block_size=16,
        num_kv_heads=1,
        group=2,
        seq_lens=[SPLIT + 20, SPLIT + 50],
    )
    share(problem, [(0, 1, SPLIT)])
    problem.options["shared_prefix"] = True
    out, lse = run(problem, backend[1])
    check(out, problem, lse)


Tiles = list[tuple[int, int]]  # (first query row of a KV head, rows)


def tiles_of(launches: list[Launch]) -> list[tuple[Tiles, Tiles]]:
    """The tiles of every KV split: those of 16 rows, and the wide ones."""
    (tensors,) = [tensors for entry, tensors in launches if entry == "find_shared_splits"]
    lists = [
        [
            [(int(tile) // 64, int(tile) % 64 + 1) for tile in tiles[:count]]
            for count, tiles in zip(counts, splits)
        ]
        for counts, splits in zip(tensors["counts"].tolist(), tensors["tiles"])
    ]
    return list(zip(lists[0], lists[1] if len(lists) == 2 else [[]] * len(lists[0])))


def expected_tiles(problem: Problem, max_splits: int) -> list[tuple[Tiles, Tiles]]:
    """The same from the rules, one sequence after the other."""
    block_size = problem.kv_cache.shape[3]
    group = problem.query.shape[1] // problem.kv_cache.shape[2]
    lengths = problem.seq_lens.tolist()
    starts = problem.query_start_loc
    starts = list(range(len(lengths) + 1)) if starts is None else starts.tolist()
    num_tokens = problem.query.shape[0]
    if problem.query_start_loc is not None:
        lengths, starts = [*lengths, 0], [*starts, num_tokens]
    found: list[tuple[Tiles, Tiles]] = []
    sizes = [max(1, -(-n // (SPLIT * max_splits))) * SPLIT for n in lengths]
    first_positions = [n - max(1, b - a) for n, a, b in zip(lengths, starts, starts[1:])]

    def is_whole(s: int, end: int) -> bool:
        return sizes[s] < lengths[s] and end <= first_positions[s] + 1

    for split in range(max_splits):
        runs: list[tuple[list[int], bool]] = []  # of sequences, and whether they see all of the KV split
        for s, length in enumerate(lengths):
            begin, end = split * sizes[s], (split + 1) * sizes[s]
            if begin >= length and (split or length):
                continue
            blocks = slice(begin // block_size, end // block_size)
            joins = (
                s % 128 > 0
                and runs
                and runs[-1][0][-1] == s - 1
                and sizes[s] == sizes[s - 1]
                and all(is_whole(t, end) for t in (s - 1, s))
                and torch.equal(problem.block_tables[s, blocks], problem.block_tables[s - 1, blocks])
            )
            if joins:
                runs[-1][0].append(s)
            else:
                runs.append(([s], is_whole(s, end)))
        narrow, wide = [], []
        for run_, whole in runs:
            first, end = starts[run_[0]] * group, starts[run_[-1] + 1] * group
            rows, tiles = (64, wide) if whole and end - first > 32 else (16, narrow)
            tiles += [(row, min(rows, end - row)) for row in range(first, end, rows)]
        found.append((narrow, wide))
    return found


@pytest.mark.parametrize("queries", ["one", "few"])
@pytest.mark.parametrize("max_splits", [64, 2])
def test_what_is_found(emulation, monkeypatch, seed, queries, max_splits):
    """Runs of any length over borders of 32 sequences and of 128, in the middle of other ones."""
    monkeypatch.setattr(plans, "MAX_SPLITS", max_splits)
    rng = random.Random(seed)
    count = rng.randrange(130, 150)
    lengths = [rng.choice([0, 1, SPLIT, SPLIT + 1, 2 * SPLIT + 30, 3 * SPLIT + 2]) for _ in range(count)]
    query_lens = [min(n, rng.randrange(5)) for n in lengths]
    # Neither one KV split alone is searched, nor a batch without query tokens; there are runs at the borders.
    for some in (rng.randrange(count), *(s for s in range(count) if (s + 1) % 32 < 2)):
        lengths[some], query_lens[some] = 2 * SPLIT + 30, rng.randrange(1, 5)
    problem = draw(
        seed,
        dtype=torch.bfloat16,
        head_size=32,
        block_size=128,
        num_kv_heads=1,
        group=rng.choice([1, 2, 3, 9]),
        seq_lens=lengths,
        query_lens=None if queries == "one" else query_lens,
        padding_rows=0 if queries == "one" else rng.choice([0, 3]),
    )
    for s in range(1, count):  # any blocks of the sequence before, not only the first ones
        if rng.random() < 0.7:
            splits = range(min(lengths[s - 1], lengths[s]) // SPLIT)
            for split in (p for p in splits if rng.random() < 0.8):
                blocks = slice(split * SPLIT // 128, (split + 1) * SPLIT // 128 - (rng.random() < 0.1))
                problem.block_tables[s, blocks] = problem.block_tables[s - 1, blocks]
                if rng.random() < 0.1:  # the same blocks in another order are others
                    problem.block_tables[s, blocks] = problem.block_tables[s, blocks].flip(0)
    problem.options |= {"max_query_len": 8, "shared_prefix": True}
    out, lse = run(problem, "cpu")
    assert tiles_of(emulation) == expected_tiles(problem, len(tiles_of(emulation)))
    check(out, problem, lse)


@pytest.mark.parametrize(
    ("group", "count", "expected"),
    [
        (1, 16, [(1, 0), (1, 0), (16, 0)]),
        (2, 16, [(2, 0), (2, 0), (16, 0)]),
        (3, 11, [(0, 1), (0, 1), (11, 0)]),
        (10, 13, [(0, 3), (0, 3), (13, 0)]),  # 130 rows
        (40, 2, [(0, 2), (0, 2), (6, 0)]),
    ],
)
def test_a_prefix_is_read_once(emulation, seed, group, count, expected):
    """For each 16 rows of all sequences, or each 64 where they are more than 32."""
    prefix = 2 * SPLIT
    problem = draw(
        seed,
        dtype=torch.float16,
        head_size=32,
        block_size=16,
        num_kv_heads=1,
        group=group,
        seq_lens=[prefix + 10 + s for s in range(count)],
    )
    share(problem, [(0, s, prefix) for s in range(1, count)])
    problem.options["shared_prefix"] = True
    out, lse = run(problem, "cpu")
    assert [tuple(map(len, tiles)) for tiles in tiles_of(emulation)] == expected
    check(out, problem, lse)


def test_no_search_where_it_cannot_help(emulation, seed):
    """One KV split, a window, float32."""
    for options, feature in (
        ({"seq_lens": [SPLIT - 40] * 3}, {}),
        ({}, {"sliding_window": 600}),
        ({"dtype": torch.float32}, {}),
    ):
        common = {
            "dtype": torch.float16,
            "head_size": 32,
            "block_size": 64,
            "num_kv_heads": 1,
            "group": 2,
            "seq_lens": [2 * SPLIT + 8] * 3,
        }
        problem = draw(seed, **(common | options))
        problem.block_tables = problem.block_tables[:, : -(-int(problem.seq_lens[0]) // 64)]
        cupaged.paged_attention(
            problem.query,
            problem.kv_cache,
            problem.block_tables,
            problem.seq_lens,
            shared_prefix=True,
            **feature,
        )
    assert emulation
    assert not [entry for entry, _ in emulation if entry == "find_shared_splits"]
