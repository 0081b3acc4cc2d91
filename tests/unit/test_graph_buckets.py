"""The sizes that decode steps are padded to."""

from __future__ import annotations

import random

import pytest

from cupaged.engine.model.decode_graphs import measured_bytes
from cupaged.engine.model.graph_buckets import LONG_PREFIX, MAX_SEQS, Bucket, Buckets


def test_buckets_of_an_eight_thousand_token_model():
    buckets = Buckets(256, 8192, 16, with_prefixes=True)
    assert buckets.numbers_of_seqs == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]
    assert buckets.widths == [32, 64, 128, 256, 512]
    assert len(buckets.all()) == 10 * 5 + 9 * 3
    assert buckets.all()[0] == Bucket(256, 512, True)
    assert Buckets(100, 3000, 16, True).widths == [32, 64, 128, 188]
    assert Buckets(100, 3000, 16, True).numbers_of_seqs[-3:] == [32, 64, 100]
    assert Buckets(2, 100, 256, True).all() == [Bucket(n, 1, False) for n in (2, 1)]


def test_a_step_finds_the_smallest_bucket_that_it_fits_into(seed):
    rng = random.Random(seed)
    for _ in range(100):
        most, length, size = rng.randint(1, 2000), rng.randint(2, 20000), rng.choice([8, 16, 64, 256])
        buckets = Buckets(most, length, size, with_prefixes=rng.random() < 0.5)
        every = buckets.all()
        assert len(set(every)) == len(every)
        num_seqs = rng.choice([rng.randint(1, 2 * most), *buckets.numbers_of_seqs])
        width = rng.choice([rng.randint(1, 2 * (length // size + 1)), *buckets.widths])
        step = num_seqs, width, rng.random() < 0.5
        fitting = [b for b in every if b.num_seqs >= step[0] and b.width >= step[1]]
        found = buckets.find(*step)
        if not fitting:
            assert found is None
            assert step[0] > min(most, MAX_SEQS) or step[1] > -(-length // size)
            continue
        assert found in fitting
        assert (found.num_seqs, found.width) == (
            min(b.num_seqs for b in fitting),
            min(b.width for b in fitting),
        )
        shared = step[2] and found._replace(shared_prefix=True) in every
        assert found.shared_prefix == shared
        assert not found.shared_prefix or found.width * size > LONG_PREFIX
        # Never padded to more than twice, nor by more than 64 sequences.
        assert found.num_seqs < min(2 * step[0], step[0] + 64)


@pytest.mark.parametrize("num_seqs", [1, 3, 64, 65, 500])
def test_no_bucket_is_larger_than_a_step_can_be(num_seqs):
    assert max(b.num_seqs for b in Buckets(num_seqs, 100, 16, True).all()) == num_seqs


class Measured:
    """Graphs of which the largest takes 1000 bytes, and each other one 30."""

    num_bytes = 7

    def __init__(self, num_seqs: int, fails: bool = False) -> None:
        self.buckets, self._fails = Buckets(num_seqs, 4000, 16, True), fails
        self.free = 10**6

    def capture(self, buckets: list[Bucket]) -> None:
        if self._fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.free -= sum(1000 if bucket == self.buckets.all()[0] else 30 for bucket in buckets)


@pytest.mark.parametrize("num_seqs", [1, 100])
def test_memory_is_that_of_the_largest_graph_and_of_as_many_others(num_seqs):
    graphs = Measured(num_seqs)
    others = len(graphs.buckets.all()) - 1
    assert measured_bytes(graphs, lambda: graphs.free) == 7 + 1000 + 30 * others
    assert 10**6 - graphs.free <= 1000 + 8 * 30  # few are captured for that
    failing = Measured(num_seqs, fails=True)
    assert measured_bytes(failing, lambda: failing.free) == 0
