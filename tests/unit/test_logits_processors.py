"""What requests change in the logits, in mixed batches, against transformers' own processors in float64."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from cupaged.engine import SamplingParams
from cupaged.engine.sampling import bad_words
from cupaged.engine.sampling.logits_processors import Penalties, TokenTable, Users
from cupaged.engine.sampling.sampler import Sampler
from cupaged.engine.scheduling.request import Sequence, SequenceGroup
from cupaged.engine.scheduling.step_plan import ScheduledSequence
from tests.distribution import weights

from .test_step_inputs import META, Transfers

VOCABULARY = 400  # more than is looked at before tokens are sorted
EOS = 3
_ids = itertools.count()


class Recorder(Sampler):
    """A sampler that keeps the logits as they are when the processors are done."""

    logits: torch.Tensor

    def _choose(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        self.logits = logits.clone()
        return super()._choose(logits, batch)


def sequence(params: SamplingParams, words: list[list[int]], prompt: list[int], output: list[int]):
    seq = Sequence(next(_ids), 0, [*prompt, *output], len(prompt), next(_ids))
    group = SequenceGroup("r", None, prompt, params, 99, 0, [seq])
    group.bad_words = tuple(map(tuple, words))
    return ScheduledSequence(group, seq, len(seq.token_ids) - 1, 1, 1)


def draw_request(rng: random.Random) -> ScheduledSequence:
    """Some of everything, over few tokens, so that outputs have words and words have repeats."""

    def some(*values):
        return rng.choice(values)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(4) for _ in range(rng.randint(1, most))]

    bias = {rng.randrange(VOCABULARY): rng.uniform(-100, 100) for _ in range(rng.randrange(1, 9))}
    params = SamplingParams(
        temperature=some(0, 0.7, 1.0, 1.9),
        min_p=some(0, 0, 0.05, 0.3),
        top_k=some(0, -1, 1, 7, 300, VOCABULARY),
        top_p=some(1.0, 0.9, 0.5),
        presence_penalty=some(0, 0, 0.7, -1.5),
        frequency_penalty=some(0, 0, 0.4, -0.9),
        repetition_penalty=some(1, 1, 1.3, 0.8),
        logit_bias=some(None, bias),
        allowed_token_ids=some(None, None, rng.sample(range(VOCABULARY), 30), [EOS, 5, 6, 300]),
        min_tokens=some(0, 3, 6),
        stop_token_ids=some((), (7, 9)),
        ignore_eos=some(False, True),
        logprobs=some(None, None, 3),
    )
    words = [tokens(3) for _ in range(rng.randrange(1, 6))] if rng.random() < 0.6 else []
    return sequence(params, words, tokens(9), tokens(5) if rng.random() < 0.7 else [])


def expected_logits(logits: torch.Tensor, item: ScheduledSequence) -> torch.Tensor:
    """Of one sequence, float64, from transformers' processors in the documented order."""
    params, seq = item.group.params, item.seq
    everything = torch.tensor([seq.token_ids])
    output = torch.tensor([seq.output_token_ids], dtype=torch.int64).reshape(1, -1)
    scores = logits.double()[None].clone()
    if params.allowed_token_ids is not None:
        allowed = tf.PrefixConstrainedLogitsProcessor(lambda *_: list(params.allowed_token_ids), 1)
        scores = allowed(everything, scores)
    ending = [*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]
    if params.min_tokens and ending:
        shortest = tf.MinNewTokensLengthLogitsProcessor(seq.prompt_len, params.min_tokens, ending)
        scores = shortest(everything, scores)
    if item.group.bad_words:
        words = [list(word) for word in item.group.bad_words]
        without = tf.NoBadWordsLogitsProcessor(words)(output, scores.float()).double()
        ruled_out = without == -torch.inf
        if not ruled_out.all():
            scores = scores.masked_fill(ruled_out, -torch.inf)
    if params.logit_bias:
        sequence_bias = [[[token], float(bias)] for token, bias in params.logit_bias.items()]
        scores = tf.SequenceBiasLogitsProcessor(sequence_bias)(everything, scores)
    scores = tf.RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))(everything, scores)
    counts = torch.bincount(output[0], minlength=VOCABULARY)  # OpenAI's formula
    return (scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0))[0]


def assert_equal(sampler: Recorder, logits: torch.Tensor, items: list[ScheduledSequence]) -> None:
    sampler.sample(logits.clone(), items)
    for row, before, item in zip(sampler.logits, logits, items):
        expected = expected_logits(before, item)
        finite = expected.isfinite()
        assert torch.equal(row.isfinite(), finite), item.group
        torch.testing.assert_close(row[finite].double(), expected[finite], rtol=1e-5, atol=1e-4)


def test_drawn_mixes_over_many_steps(seed):
    """Sequences come, grow a token a step, pause, fork and go; every row is right in every step."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sampler = Recorder(frozenset([EOS]))
    items = [draw_request(rng) for _ in range(30)]
    batch: list[ScheduledSequence] = []
    for step in range(16):
        if step % 4 == 0 or any(item not in items for item in batch):
            batch = rng.sample(items, rng.randint(1, len(items)))
        elif step % 4 == 2:  # the same ones in another order
            rng.shuffle(batch)
        assert_equal(sampler, 5 * torch.randn(len(batch), VOCABULARY), batch)
        for item in batch:
            item.seq.token_ids.append(rng.randrange(4))
        for item in rng.sample(items, 3) if step % 4 == 3 else ():
            items.remove(item)
            if rng.random() < 0.5:
                sampler.release(item.group)
            words = [list(word) for word in item.group.bad_words]
            child = sequence(item.group.params, words, item.group.prompt_token_ids, item.seq.output_token_ids)
            items += [child, draw_request(rng)]


def test_half_precision_logits_are_changed_in_float32(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    items = [draw_request(rng) for _ in range(40)]
    assert_equal(Recorder(frozenset([EOS])), 5 * torch.randn(40, VOCABULARY).bfloat16(), items)


def test_a_row_is_the_same_whatever_its_neighbours_ask_for(seed):
    """Tokens and log probabilities, bit for bit; the rows in another order too."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    items = [draw_request(rng) for _ in range(40)]
    logits = 5 * torch.randn(len(items), VOCABULARY)
    order = rng.sample(range(len(items)), len(items))
    together = Sampler(frozenset([EOS])).sample(logits[order], [items[i] for i in order])
    for place, i in enumerate(order):
        alone = Sampler(frozenset([EOS])).sample(logits[i : i + 1].clone(), [items[i]])
        assert alone.token_ids[0] == together.token_ids[place]
        assert alone.logprobs.get(0) == together.logprobs.get(place)


def test_who_asks_for_nothing_pays_nothing(monkeypatch):
    """Plain requests read no processor's state, even beside requests of earlier steps that do."""
    sampler = Sampler(frozenset())
    heavy = SamplingParams(presence_penalty=1, logit_bias={1: 2.0}, min_tokens=5, stop_token_ids=[2])
    sampler.sample(torch.randn(1, VOCABULARY), [sequence(heavy, [[1, 2]], [1], [])])
    monkeypatch.setattr(Sampler, "_change", lambda *_: pytest.fail("the logits are changed"))
    monkeypatch.setattr("cupaged.engine.sampling.sampler.LogprobTensors", lambda *_: pytest.fail("looked up"))
    plain = [sequence(SamplingParams(temperature=t), [], [1], []) for t in (0, 0.5, 0, 1)]
    sampler.sample(torch.randn(4, VOCABULARY), plain)


@pytest.mark.parametrize(
    ("settings", "warper"),
    [
        ({"temperature": 0.6}, tf.TemperatureLogitsWarper(0.6)),
        ({"min_p": 0.1}, tf.MinPLogitsWarper(0.1)),
        ({"top_k": 5}, tf.TopKLogitsWarper(5)),
        ({"top_k": 290}, tf.TopKLogitsWarper(290)),
        ({"top_p": 0.8}, tf.TopPLogitsWarper(0.8)),
        ({"top_p": 0.9999}, tf.TopPLogitsWarper(0.9999)),
    ],
    ids=["temperature", "min_p", "top_k", "larger top_k", "top_p", "larger top_p"],
)
def test_the_distribution_is_that_of_transformers_warpers(settings, warper, seed):
    logits = torch.randn(20, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    found = distribution(logits, [SamplingParams(**settings)] * 20)
    expected = warper(None, logits.double()).softmax(-1)
    # float32 may put a token at the border on the other side
    same = (found > 0) == (expected > 0)
    assert (~same).sum() <= 2
    torch.testing.assert_close(found[same], expected[same], rtol=1e-2, atol=1e-4)


def test_drawn_mixes_of_warpers(seed):
    """min-p, then top-k, then top-p, each of what the one before leaves."""
    rng = random.Random(seed)
    params = [draw_request(rng).group.params for _ in range(300)]
    params = [p for p in params if not p.greedy]
    logits = 3 * torch.randn(len(params), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    off = 0
    for row, one, found in zip(logits.double(), params, distribution(logits, params)):
        scores = tf.TemperatureLogitsWarper(float(one.temperature))(None, row[None])
        if one.min_p:
            scores = tf.MinPLogitsWarper(one.min_p)(None, scores)
        if 0 < one.top_k < VOCABULARY:
            scores = tf.TopKLogitsWarper(one.top_k)(None, scores)
        if one.top_p < 1:
            scores = tf.TopPLogitsWarper(one.top_p)(None, scores)
        expected = scores.softmax(-1)[0]
        if not torch.equal(found > 0, expected > 0):
            off += 1
            assert ((found > 0) != (expected > 0)).sum() == 1
            continue
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert off <= 3


def distribution(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    settings = (np.array([getattr(p, n) for p in params]) for n in ("temperature", "min_p", "top_k", "top_p"))
    found = weights(logits, *settings).double()
    return found / found.sum(-1, keepdim=True)


@pytest.mark.parametrize("top", [1, 5, 256, 257, 390])
def test_of_equal_tokens_the_first_stay(top, seed):
    """Half precision has many equals; exactly k of them stay, whichever way they were found."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (6, VOCABULARY), generator=generator).bfloat16()
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :top]
    kept = distribution(logits, [SamplingParams(top_k=top)] * 6) > 0
    assert torch.equal(kept, torch.zeros_like(kept).scatter_(-1, order, True))


def test_bad_words_give_way_when_nothing_else_is_left():
    params = SamplingParams(temperature=0, allowed_token_ids=[5, 6])
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 6] = 1
    stuck = sequence(params, [[5], [4, 6]], [1], [4])
    free = sequence(params, [[6]], [1], [4])
    assert Sampler(frozenset()).sample(logits, [stuck, free]).token_ids == [[6], [5]]


class Words:
    """A tokenizer of pieces, the longest first."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = sorted(pieces, key=len, reverse=True)

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [self._ids_of(text) for text in texts]}

    def _ids_of(self, text: str) -> list[int]:
        found = []
        while text:
            piece = next(piece for piece in self.pieces if text.startswith(piece))
            found.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return found

    def ids(self, *pieces: str) -> tuple[int, ...]:
        return tuple(self.pieces.index(piece) for piece in pieces)


def test_bad_words_have_the_tokens_of_both_their_places():
    words = Words(" sun", "sun", "suns", "hine", " sunshine", " ", "e")
    # One token after a space and two at the start of a text, which transformers' rule would miss.
    assert bad_words.tokenize(words, ["sunshine"], 9) == (words.ids("suns", "hine"), words.ids(" sunshine"))
    assert bad_words.tokenize(words, [" sun"], 9) == (words.ids("sun"), words.ids(" sun"))
    # A space of its own adds nothing: the word is complete without it.
    assert bad_words.tokenize(words, ["e", "hine"], 9) == (words.ids("e"), words.ids("hine"))
    assert bad_words.tokenize(words, [], 9) == ()
    with pytest.raises(ValueError, match=r"bad_words.*'x'"):
        bad_words.tokenize(lambda texts, **_: {"input_ids": [[] for _ in texts]}, ["x"], 9)


def test_bad_words_that_end_in_another_or_are_too_long_are_left_out():
    words = Words("a", "b", "c", " ")
    baa, caa, cca = (words.ids(*word) for word in ("baa", "caa", "cca"))
    assert bad_words.tokenize(words, ["caa", "cbaa", "baa", "cca", "aaacca"], 9) == (caa, baa, cca)
    assert bad_words.tokenize(words, ["caa", "cbba", "b" + 100_000 * "a"], 3) == (caa,)


def test_what_a_device_has_is_not_copied_again():
    """Of the same sequences, a token longer in each step, only the new tokens."""
    items = [sequence(SamplingParams(), [], [1, 2], [3]) for _ in range(3)]
    seqs = [item.seq for item in items]
    rows = np.array([4, 0, 2])

    def users() -> Users:
        lengths = np.array([len(seq.token_ids) for seq in seqs])
        return Users(np.array([0, 1, 3]), rows, lengths, seqs)

    table, penalties = TokenTable(), Penalties()
    for row in rows.tolist():
        table.add(row, [5, 6], [1.0, -1.0])
        penalties.add(row, 1.5, 0.5, 0.1)
    penalties.apply(torch.zeros(4, VOCABULARY), users())  # counts prompts on a device that can be read
    penalties._counts, penalties._in_prompt = penalties._counts.to(META), penalties._in_prompt.to(META)
    penalties._selected = None
    counts = []
    for _ in range(3):
        for seq in seqs:
            seq.token_ids.append(7)
        logits = torch.zeros(4, VOCABULARY, device=META)
        with Transfers() as transfers:
            for change in (table.add_to, table.rule_out, table.rule_out_others):
                change(logits, users())
            of_table = transfers.count
            penalties.apply(logits, users())
        counts.append((of_table, transfers.count - of_table))
    assert counts == [(1, 2), (0, 1), (0, 1)]


def test_a_row_that_another_sequence_takes_has_its_settings(seed):
    """In the same place of the batch, so that only the numbers differ."""
    rng, kept = random.Random(seed), Recorder(frozenset([EOS]))
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    for _ in range(5):
        params = SamplingParams(
            repetition_penalty=rng.uniform(0.5, 2),
            frequency_penalty=rng.uniform(-2, 2),
            presence_penalty=rng.uniform(-2, 2),
            logit_bias={rng.randrange(VOCABULARY): rng.uniform(-9, 9)},
            allowed_token_ids=rng.sample(range(VOCABULARY), 50),
        )
        item = sequence(params, [], [1, 2], [3, 3, 4])
        found = []
        for sampler in (kept, Recorder(frozenset([EOS]))):
            sampler.sample(logits.clone(), [item])
            found.append(sampler.logits)
        assert found[0].equal(found[1])
        kept.release(item.group)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_token_that_only_the_device_knows_is_counted(steps):
    """At a sequence's first step, as after a fork, and at a later one."""
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5)
    found = []
    for sampled in (None, torch.tensor([9, 7])):
        sampler = Recorder(frozenset())
        item = sequence(params, [], [1, 2], [3] * steps)
        for _ in range(steps):
            sampler.launch(torch.ones(1, VOCABULARY), [item])
        item.seq.token_ids.append(7 if sampled is None else -2)
        sampler.launch(torch.ones(1, VOCABULARY), [item], sampled)
        found.append(sampler.logits)
    assert found[0].equal(found[1])
    assert found[0][0, 7] == pytest.approx(1 / 1.5 - 0.5)
