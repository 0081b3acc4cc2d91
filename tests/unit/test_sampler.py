"""The sampler against its definition in float64."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from cupaged.engine import SamplingParams
from cupaged.engine.sampling.sampler import Sampler
from cupaged.engine.scheduling.request import Sequence, SequenceGroup
from cupaged.engine.scheduling.step_plan import ScheduledSequence
from tests.distribution import uniform, weights

VOCABULARY = 50
_ids = itertools.count()
CLOSE = 1e-5  # a draw nearer than this to the border of two tokens may fall on either side


def expected_probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Of one row, token by token from the definition, in float64, normalised."""
    scaled = (logits - logits.max()) / params.temperature
    probs = np.exp(scaled) / np.exp(scaled).sum()
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    if params.top_k > 0:
        order = order[: params.top_k]
    total = sum(probs[token] for token in order)
    kept, reached = np.zeros_like(probs), 0.0
    for token in order:
        kept[token] = probs[token]
        reached += probs[token] / total
        if reached >= params.top_p:
            break
    return kept / kept.sum()


def sample(logits: torch.Tensor, items: list[ScheduledSequence]) -> list[list[int]]:
    """The tokens that a new sampler draws."""
    return Sampler(frozenset()).sample(logits.clone(), items).token_ids


def probabilities(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    names = ("temperature", "min_p", "top_k", "top_p")
    return weights(
        logits,
        *(np.array([float(getattr(p, name)) for p in params]) for name in names[:2]),
        np.array([min(p.top_k, 2**62) for p in params]),
        np.array([p.top_p for p in params]),
    )


def scheduled(
    params: SamplingParams, seed: int, *, index: int = 0, position: int = 7, num_samples: int = 1
) -> ScheduledSequence:
    seq = Sequence(next(_ids), index, [0] * position, position, seed)
    group = SequenceGroup("r", None, [0] * position, params, 10, 0, [seq])
    return ScheduledSequence(group, seq, 0, position, num_samples)


def draw_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.3, 1.0, 1.7, rng.uniform(0.1, 3)]),
        top_k=rng.choice([0, -1, 1, 2, 5, VOCABULARY, 10 * VOCABULARY, 2**80]),
        top_p=rng.choice([1.0, 0.9, 0.5, 0.1, 1e-9, rng.uniform(0.01, 1)]),
    )


def test_probabilities_follow_their_definition(seed):
    rng = random.Random(seed)
    params = [draw_params(rng) for _ in range(200)]
    logits = 3 * torch.randn(len(params), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    found = probabilities(logits, params).double()
    found /= found.sum(-1, keepdim=True)
    for row, settings, probs in zip(logits.double().numpy(), params, found.numpy()):
        expected = expected_probabilities(row, settings)
        # A sum within rounding of top_p may end one token earlier or later.
        shifted = expected_probabilities(row, SamplingParams(**{**_settings(settings), "top_p": 1.0}))
        border = np.abs(np.sort(shifted)[::-1].cumsum() - settings.top_p).min() < CLOSE
        if settings.top_p == 1 or not border:
            np.testing.assert_allclose(probs, expected, atol=1e-6, err_msg=str(settings))


def _settings(params: SamplingParams) -> dict:
    return {"temperature": params.temperature, "top_k": params.top_k}


def test_a_draw_is_the_inverse_of_the_cumulative_distribution(seed):
    """Exactly the token that the definition gives for the number drawn, in mixed batches."""
    rng = random.Random(seed)
    params = [draw_params(rng) for _ in range(300)]
    logits = 3 * torch.randn(len(params), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    items = [
        scheduled(p, rng.getrandbits(64), index=rng.randrange(5), position=rng.randrange(1, 99))
        for p in params
    ]
    compared = 0
    for row, item, tokens in zip(logits.double().numpy(), items, sample(logits, items)):
        probs = expected_probabilities(row, item.group.params)
        cumulative = probs.cumsum()
        number = uniform(
            *(np.array([x], np.uint64) for x in (item.seq.seed, item.seq.index, len(item.seq.token_ids)))
        )[0]
        if np.abs(cumulative - number).min() < CLOSE or probs[tokens[0]] < CLOSE:
            continue
        assert tokens == [int(np.searchsorted(cumulative, number, side="right"))], item.group.params
        compared += 1
    assert compared > 250


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5, top_k=6),
        SamplingParams(temperature=2.0, top_p=0.7),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.8),
    ],
    ids=["temperature", "top_k", "top_p", "both"],
)
def test_frequencies(params, seed):
    """Of 20000 draws with consecutive seeds, and of as many samples of one request."""
    draws = 20000
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    probs = expected_probabilities(logits[0].double().numpy(), params)
    items = [scheduled(params, seed + i) for i in range(draws)]
    by_seed = [tokens[0] for tokens in sample(logits.expand(draws, -1), items)]
    by_index = sample(logits, [scheduled(params, seed, num_samples=draws)])[0]
    items = [scheduled(params, seed, position=i) for i in range(1, 1001)]
    by_position = [tokens[0] for tokens in sample(logits.expand(1000, -1), items)]
    for tokens in (by_seed, by_index, by_position):
        counts = np.bincount(tokens, minlength=VOCABULARY)
        assert not counts[probs == 0].any()
        assert chance_of(counts[probs > 0], probs[probs > 0] * len(tokens)) > 1e-9


def test_numbers_of_neighbours_are_independent(seed):
    """Of consecutive seeds, outputs and positions: pairs fill the unit square evenly."""
    n = 40000
    base = np.full(n, seed, np.uint64)
    count = np.arange(n, dtype=np.uint64)
    zero = np.zeros(n, np.uint64)
    for numbers in (
        uniform(base + count, zero, zero),
        uniform(base, count, zero),
        uniform(base, zero, count),
    ):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        for lag in (1, 2, 7):
            cells = (numbers[:-lag] * 16).astype(int) * 16 + (numbers[lag:] * 16).astype(int)
            counts = np.bincount(cells, minlength=256)
            assert chance_of(counts, np.full(256, (n - lag) / 256)) > 1e-9


def test_numbers_of_seeds_outputs_and_positions_are_not_one_stream_shifted(seed):
    base, count, zero = np.full(99, seed, np.uint64), np.arange(99, dtype=np.uint64), np.zeros(99, np.uint64)
    streams = [uniform(base + count, zero, zero), uniform(base, count, zero), uniform(base, zero, count)]
    common = set(streams[0]) & set(streams[1]) | set(streams[1]) & set(streams[2])
    assert common == {streams[0][0]}  # all three at zero


def chance_of(counts: np.ndarray, expected: np.ndarray) -> float:
    """Probability of a chi-square statistic at least this large. Rare classes are put together."""
    rare = expected < 8
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    statistic = ((counts - expected) ** 2 / expected).sum()
    if len(counts) == 1:
        return 1.0
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def test_a_seed_gives_its_token_whatever_else_is_in_the_batch(seed):
    rng = random.Random(seed)
    params = [draw_params(rng) for _ in range(30)] + [SamplingParams(), SamplingParams(temperature=0)]
    logits = torch.randn(len(params), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    items = [scheduled(p, rng.getrandbits(64), num_samples=rng.choice([1, 1, 3])) for p in params]
    together = sample(logits, items)
    alone = [sample(logits[i : i + 1], [item])[0] for i, item in enumerate(items)]
    assert together == alone
    order = list(range(len(items)))
    rng.shuffle(order)
    shuffled = sample(logits[order], [items[i] for i in order])
    assert shuffled == [alone[i] for i in order]


def test_greedy_is_the_largest_logit_alone_and_among_others(seed):
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    greedy = [
        scheduled(SamplingParams(temperature=0, top_k=3, top_p=0.1), i, num_samples=2) for i in range(3)
    ]
    best = [[token] * 2 for token in logits.argmax(-1).tolist()]
    assert sample(logits[:3], greedy) == best[:3]
    assert sample(logits, [*greedy, scheduled(SamplingParams(), 5)])[:3] == best[:3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_equal_logits_in_a_large_vocabulary(dtype, seed):
    """Its size is not a multiple of anything, and few values make many ties; a NaN is not the largest."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(700, 9000, (), generator=generator))
    logits = torch.randint(-2, 3, (6, size), generator=generator).to(dtype)
    for row in range(1, 5):  # the largest stands once, or in both of two places; anywhere
        places = torch.randint(size, (row % 2 + 1,), generator=generator)
        logits[row, places] = 9.0
    logits[5, int(torch.randint(size, (), generator=generator))] = torch.nan
    best = [[int(np.nanargmax(row.float().numpy()))] for row in logits]  # numpy's is the first
    items = [scheduled(SamplingParams(temperature=0), i) for i in range(6)]
    assert sample(logits, items) == best


def test_sequences_that_do_not_sample_take_no_row(seed):
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    chunk = scheduled(SamplingParams(temperature=0), 0, num_samples=0)
    ready = scheduled(SamplingParams(temperature=0), 0)
    best = logits.argmax(-1).tolist()
    assert sample(logits, [chunk, ready, chunk, ready]) == [[], [best[0]], [], [best[1]]]
    assert sample(logits[:0], [chunk]) == [[]]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-10, 1e-4])
def test_a_very_low_temperature_is_greedy(temperature):
    logits = torch.tensor([[-50.0, 80.0, 79.0, -torch.inf]])
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}):
        item = scheduled(SamplingParams(temperature=temperature, **settings), 3, num_samples=50)
        assert set(sample(logits, [item])[0]) == {1}


@pytest.mark.parametrize(
    "params", [{"top_p": 0.9}, {"top_k": 3}, {"top_k": 3, "top_p": 0.5}, {"min_p": 0.1}, {}]
)
def test_logits_that_are_no_numbers_harm_nobody_else(params, seed):
    """A model whose activations overflow for one prompt; an index out of range would end everybody's step."""
    torch.manual_seed(seed)
    logits = torch.randn(3, VOCABULARY)
    logits[1] = torch.nan
    items = [scheduled(SamplingParams(**params), seed + i) for i in range(3)]
    tokens = sample(logits, items)
    assert 0 <= tokens[1][0] < VOCABULARY
    assert tokens[::2] == sample(logits[::2], items[::2])


def test_a_very_high_temperature_is_even_and_keeps_what_is_ruled_out():
    logits = torch.tensor([[5.0, -5.0, -torch.inf, 100.0]])
    tokens = sample(logits, [scheduled(SamplingParams(temperature=1e300), 3, num_samples=3000)])[0]
    counts = np.bincount(tokens, minlength=4)
    assert counts[2] == 0
    assert counts[[0, 1, 3]].min() > 800


def test_a_batch_that_stays_the_same_has_its_tokens(seed):
    """Sequences come, go, grow by a token or by several, are computed again, and take rows of others."""
    rng = random.Random(seed)
    kept = Sampler(frozenset())
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(seed))
    live: list[ScheduledSequence] = []
    for step in range(40):
        if rng.random() < 0.3 and live:
            kept.release(live.pop(rng.randrange(len(live))).group)
        if len(live) < 2 or rng.random() < 0.3:
            params, tokens = draw_params(rng), [1] * rng.randint(1, 9)
            seq = Sequence(step, 0, tokens, len(tokens), rng.getrandbits(60))
            group = SequenceGroup(str(step), None, list(tokens), params, 100, step, [seq])
            live.append(ScheduledSequence(group, seq, 0, 1, 1))
        if rng.random() < 0.2:
            rng.shuffle(live)
        chosen = live if rng.random() < 0.8 else live[1:]
        for item in chosen:
            item.num_samples = rng.choice([1, 1, 1, 2])
        fresh = Sampler(frozenset()).sample(logits[: len(chosen)].clone(), chosen)
        assert kept.sample(logits[: len(chosen)].clone(), chosen).token_ids == fresh.token_ids
        for item in live if rng.random() < 0.8 else live[:1]:
            item.seq.token_ids.append(1)
        if rng.random() < 0.1:
            live[0].seq.token_ids.pop()


def test_a_row_that_another_sequence_takes_has_its_settings(seed):
    """Its place in the batch and its length are those that the other one would have had."""
    rng, kept = random.Random(seed), Sampler(frozenset())
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(seed))

    def added(length: int) -> ScheduledSequence:
        seq = Sequence(rng.getrandbits(40), 0, [1] * length, 1, rng.getrandbits(60))
        group = SequenceGroup("r", None, [1], draw_params(rng), 100, 0, [seq])
        return ScheduledSequence(group, seq, length - 1, 1, 1)

    items = [added(3), added(4)]
    for length in range(4, 30):
        fresh = Sampler(frozenset()).sample(logits.clone(), items)
        assert kept.sample(logits.clone(), items).token_ids == fresh.token_ids
        items[0].seq.token_ids.append(1)
        kept.release(items[1].group)
        items[1] = added(length + 1)
