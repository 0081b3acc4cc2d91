"""The order in which prefill goes through a batch: plan_prefill and the tiles that blocks take from it."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from cupaged.backends.cuda import kernel_choice, plans
from cupaged.backends.cuda import specs as kernel_specs
from cupaged.backends.cuda.arguments import PlanPrefillArguments
from cupaged.backends.cuda.specs import KernelCall, KernelSpec
from cupaged.params import AttentionParams

KERNELS = Path(__file__).parent.parent / "cuda_host" / "kernels"
CPU = torch.device("cpu")
Tile = tuple[int, ...]  # the fields of a PrefillTile


@dataclass
class Batch:
    query_lens: list[int]
    seq_lens: list[int]
    padding: int = 0
    tile_tokens: int = 16
    num_kv_heads: int = 1
    group: int = 1
    tile_heads: int = 1
    l2_tokens: int = 1000
    window: int = 0
    max_splits: int = 1
    blocks: int = 1

    @property
    def starts(self) -> list[int]:
        return [0, *np.cumsum(self.query_lens, dtype=int).tolist()]

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens) + self.padding

    def seen(self, s: int) -> range:
        """The keys that some token of a sequence sees."""
        before = self.seq_lens[s] - self.query_lens[s] - self.window + 1
        return range(max(0, before) if self.window else 0, self.seq_lens[s])

    @property
    def split_tokens(self) -> int:
        """Of a KV split: an equal share of what the blocks read, in units of 64."""
        if self.max_splits == 1:
            return 1 << 30
        units = sum(
            -(-len(self.seen(s)) // 64) * -(-n // self.tile_tokens)
            for s, n in enumerate(self.query_lens)
            if n > 1
        )
        head_tiles = self.num_kv_heads * -(-self.group // self.tile_heads)
        return max(512, -(-units * head_tiles // self.blocks) * 64)

    def splits(self, s: int) -> list[range]:
        if s == len(self.query_lens) or not self.seq_lens[s]:
            return [range(0)]
        units = -(-len(self.seen(s)) // self.split_tokens)
        return _chunks(self.seen(s), -(-units // self.max_splits) * self.split_tokens)

    def tiles(self) -> Iterator[Tile]:
        """All of them in their order, from the rules."""
        count = len(self.query_lens)
        query_lens, seq_lens = [*self.query_lens, self.padding], [*self.seq_lens, 0]
        picked = [s for s in range(count) if query_lens[s] > 1]
        for s in [*sorted(picked, key=lambda s: -seq_lens[s]), count]:
            section = max(1, self.l2_tokens // max(1, seq_lens[s]))
            splits = self.splits(s)
            for kv_heads in _chunks(range(self.num_kv_heads), section):
                for (split, keys), tokens, kv_head, heads in itertools.product(
                    enumerate(splits),
                    reversed(_chunks(range(query_lens[s]), self.tile_tokens)),
                    kv_heads,
                    _chunks(range(self.group), self.tile_heads),
                ):
                    yield (
                        s,
                        self.starts[s] + tokens[0],
                        len(tokens),
                        kv_head,
                        kv_head * self.group + heads[0],
                        len(heads),
                        seq_lens[s] - query_lens[s] + tokens[0],
                        split,
                        len(splits),
                        keys.start,
                        keys.stop,
                    )


def _chunks(whole: range, size: int) -> list[range]:
    return [whole[i : i + size] for i in range(0, len(whole), size)]


class Schedule:
    """Plans batches of the same number of sequences in one workspace, as a CUDA graph does."""

    def __init__(self, seed: int, num_seqs: int) -> None:
        if shutil.which("g++") is None:
            pytest.skip("no g++ to build the emulation with")
        from tests.cuda_host.emulator import HostLauncher

        self._launcher = HostLauncher(seed)
        self._list = HostLauncher(seed, KERNELS).launch
        generator = torch.Generator().manual_seed(seed)
        self._workspace = torch.randint(
            -(2**31), 2**31, (2 * num_seqs + 6,), dtype=torch.int32, generator=generator
        )

    def tiles(self, batch: Batch, blocks: int) -> list[Tile]:
        """The tiles that so many blocks take, and a few more that there are not."""
        lengths = torch.tensor(batch.seq_lens, dtype=torch.int32)
        starts = torch.tensor(batch.starts, dtype=torch.int32)
        sizes = np.int32(batch.num_tokens), np.int32(len(batch.seq_lens)), np.int32(batch.tile_tokens)
        heads = batch.num_kv_heads, batch.tile_heads
        splits = batch.window, batch.max_splits
        arguments = PlanPrefillArguments(
            num_tokens=batch.num_tokens,
            num_seqs=len(batch.seq_lens),
            tile_tokens=batch.tile_tokens,
            group=batch.group,
            num_kv_heads=batch.num_kv_heads,
            tile_heads=batch.tile_heads,
            window=batch.window,
            max_splits=batch.max_splits,
            blocks=batch.blocks,
        )
        plan = self._launcher.prepare(KernelCall(kernel_specs.plan_prefill(), (1, 1), arguments), CPU)
        plan((lengths, starts, self._workspace))
        assert self._workspace[0] == batch.split_tokens
        share = len(list(batch.tiles())) // blocks + 2
        found = torch.zeros(share * blocks, 11, dtype=torch.int32)
        num_heads = batch.num_kv_heads * batch.group
        numbers = (*sizes, *map(np.int32, (num_heads, *heads, batch.l2_tokens, *splits, share)))
        count = torch.zeros(1, dtype=torch.int32)
        parameters = (lengths, starts, self._workspace, found, count, *numbers)
        self._list(KernelSpec("list_tiles.cu", "list_tiles"), (blocks, 1, 1), (1, 1, 1), 0, parameters)
        assert count.item() == share * blocks
        rows = [tuple(row) for row in found.tolist()]
        end = next(i for i, row in enumerate(rows) if row[2] == 0)
        assert not any(any(row) for row in rows[end:])
        return rows[:end]


def draw_lengths(rng: random.Random, kind: str, count: int) -> tuple[list[int], list[int]]:
    """Query lengths and sequence lengths."""
    if kind == "singles":
        query_lens = [1] * count
    elif kind == "no tokens":
        query_lens = [0] * count
    else:
        query_lens = [rng.choice([0, 1, 2, 15, 16, 17, rng.randrange(2, 100)]) for _ in range(count)]
    prefixes = [0 if q == 0 else rng.choice([0, 7, rng.randrange(300)]) for q in query_lens]
    seq_lens = [q + p for q, p in zip(query_lens, prefixes)]
    if kind == "ties":
        seq_lens = [q and 100 + q % 2 for q in query_lens]
    return query_lens, seq_lens


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("drawn", 1),
        ("drawn", 9),
        pytest.param("drawn", 1600, marks=pytest.mark.matrix),
        ("ties", 9),
        ("ties", 600),
        ("singles", 300),
        ("no tokens", 5),
        ("no sequences", 0),
    ],
)
def test_the_tiles_come_by_the_rules(seed, kind, count):
    """In one workspace for batch after batch: nothing of the one before is left."""
    rng = random.Random(seed)
    schedule = Schedule(seed, count)
    many = count > 100
    for _ in range(2 if many else 5):
        group = 1 if many else rng.choice([1, 3, 8])
        max_splits = rng.choice([1, 2, 5])
        query_lens, seq_lens = draw_lengths(rng, kind, count)
        if max_splits > 1 and kind == "drawn":
            seq_lens = [n and n + rng.choice([0, rng.randrange(4000)]) for n in seq_lens]
        batch = Batch(
            query_lens,
            seq_lens,
            padding=rng.choice([0, 1, 40]),
            tile_tokens=rng.choice([16, 128] if many else [1, 16, 128]),
            num_kv_heads=1 if many else rng.choice([1, 2, 5]),
            group=group,
            tile_heads=rng.choice([1, 2, group]),
            l2_tokens=rng.choice([0, 200, 1000, 10**6]),
            window=rng.choice([0, 0, 1, 700]),
            max_splits=max_splits,
            blocks=rng.choice([1, 8, 300]),
        )
        tiles = schedule.tiles(batch, rng.choice([1, 4]))
        assert tiles == list(batch.tiles())
        assert_rows_are_covered_once(batch, tiles)


def assert_rows_are_covered_once(batch: Batch, tiles: list[Tile]) -> None:
    """Those of sequences of several tokens, and the padding."""
    covered = np.zeros((batch.num_tokens, batch.num_kv_heads * batch.group), dtype=int)
    for _, token, num_tokens, kv_head, head, num_heads, _, split, *_ in tiles:
        if split > 0:
            continue
        assert head // batch.group == (head + num_heads - 1) // batch.group == kv_head
        covered[token : token + num_tokens, head : head + num_heads] += 1
    query_lens = np.array([*batch.query_lens, 2], dtype=int)  # the padding, however long
    expected = np.repeat(query_lens > 1, [*batch.query_lens, batch.padding])
    assert (covered == expected[:, None]).all()


def test_a_batch_by_hand(seed):
    """The longest first and of these the first one; the last tokens of all heads that the cache holds."""
    batch = Batch([3, 1, 5, 0, 4], [30, 500, 90, 0, 90], 1, 4, num_kv_heads=3, l2_tokens=200)
    order = [(s, token, kv_head) for s, token, _, kv_head, *_ in Schedule(seed, 5).tiles(batch, 1)]
    assert order == [
        *((2, 8, 0), (2, 8, 1), (2, 4, 0), (2, 4, 1), (2, 8, 2), (2, 4, 2)),
        *((4, 9, 0), (4, 9, 1), (4, 9, 2)),
        *((0, 0, 0), (0, 0, 1), (0, 0, 2)),
        *((5, 13, 0), (5, 13, 1), (5, 13, 2)),
    ]


@pytest.mark.parametrize("arch", ["75", "90a"])
def test_the_grid_is_no_larger_than_the_items_or_what_fits(arch):
    """Two heads of a KV head share a tile of 128 rows of tensor cores, or 64 rows."""
    cache = torch.zeros(2, 2, 3, 16, 64, dtype=torch.float16)
    tables = torch.zeros(5, 2, dtype=torch.int32)
    tokens = 64 if arch == "90a" else 32
    for num_tokens, sm_count in ((tokens - 1, 100), (tokens, 100), (50 * tokens, 7)):
        query = torch.zeros(num_tokens, 6, 64, dtype=torch.float16)
        plan = plans.prefill(query, cache, tables, query, AttentionParams(scale=1.0), arch, sm_count)
        blocks = kernel_choice.prefill_kernel("fp16", "fp16", 64, 2, arch).blocks_per_sm * sm_count
        assert plan.prefill.grid == (min(3 * (num_tokens // tokens + 6), blocks), 1)
        assert plan.schedule.grid == (1, 1)
        assert plan.schedule.arguments.tile_tokens == tokens
        assert plan.schedule_size == 16
