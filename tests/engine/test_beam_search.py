"""Beam search equals transformers', under preemption, with and without a prefix cache, in mixed batches."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from cupaged.engine import SamplingParams
from cupaged.engine.sampling.sampler import Sampler
from cupaged.engine.scheduling import beam_search
from cupaged.engine.scheduling.request import Sequence, SequenceGroup
from cupaged.engine.scheduling.step_plan import ScheduledSequence
from tests import tiny_models

from .harness import finish, run, small_engine

# beam_width, length_penalty, early_stopping, max_tokens, ends: 1 stop token or many, or none; or "eos" by the
# model's own.
SEARCHES = [
    (4, 0.0, False, 10, "eos"),
    (4, 1.0, False, 12, 40),
    (3, 0.0, "never", 10, 40),
    (4, 2.0, "never", 10, 40),
    (2, -1.0, True, 12, 40),
    (4, 1.0, True, 9, 1),
    (3, 1.0, False, 14, 0),
    (1, 1.0, False, 8, 40),
]

# Query heads that share keys, a window of 12 tokens, a KV head for each query head: for each how requests are
# preempted, whether blocks are found again, tokens of a block, blocks, most tokens of a step.
SETTINGS = {
    "llama": [("swap", True, 8, 24, 24), ("recompute", False, 16, 12, 64), ("auto", True, 64, 8, 256)],
    "mistral": [("swap", False, 16, 12, 32), ("recompute", True, 32, 9, 64)],
    "gpt2": [("swap", False, 64, 8, 64), ("recompute", True, 8, 24, 512), ("auto", False, 32, 9, 128)],
}


def load(directory):
    return tf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


class Margin(tf.LogitsProcessor):
    """Sees what transformers' search chooses from: how far it was at any point from doing something else."""

    def __init__(self, prompt_len, search, stops):
        self._prompt_len, self._search, self._stops = prompt_len, search, stops
        self._totals = {}  # log probabilities, by the tokens
        self._ended = []
        self._gaps = []

    def __call__(self, input_ids, scores):
        width, penalty, early, max_tokens, _ = self._search
        beams = input_ids.tolist() if self._totals else input_ids[:1].tolist()
        before = torch.tensor([self._totals.get(tuple(beam), 0.0) for beam in beams])
        totals = scores[: len(beams)].log_softmax(-1) + before[:, None]
        best = totals.flatten().topk(min((2 + len(self._stops)) * width, totals.numel()))
        found = [(total, *divmod(i, totals.shape[1])) for total, i in zip(*map(torch.Tensor.tolist, best))]
        self._totals = {(*beams[beam], token): total for total, beam, token in found}
        length = input_ids.shape[1] - self._prompt_len + 1
        going_on = [total for total, _, token in found if token not in self._stops]
        self._ended += [
            total / length**penalty
            for total, _, token in found[:width]
            if length == max_tokens or token in self._stops
        ]
        self._ended.sort(reverse=True)
        if len(self._ended) >= width:
            in_the_end = max_tokens if early == "never" and penalty > 0 else length
            self._gaps.append(going_on[0] / in_the_end**penalty - self._ended[width - 1])
        for ranked in ([total for total, _, _ in found], going_on):
            self._gaps += [ranked[width - 1] - total for total in ranked[width : width + 1]]
        return scores

    @property
    def clear(self):
        """Whether no rounding of float32 could have led it elsewhere."""
        width, penalty, _, max_tokens, _ = self._search
        ended = self._ended[: width + 1]
        gaps = [*self._gaps, *(a - b for a, b in itertools.pairwise(ended))]
        return min(map(abs, gaps)) > 3e-4 * max(1, max_tokens**-penalty)


def reference(model, prompt, search, stops):
    """transformers' sequences, without the padding after their end, their scores, and whether those are
    clear."""
    width, penalty, early, length, _ = search
    margin = Margin(len(prompt), search, stops)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=width,
        num_return_sequences=width,
        length_penalty=penalty,
        early_stopping=early,
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=tiny_models.PAD,
        return_dict_in_generate=True,
        output_scores=True,
        logits_processor=[margin],
    )
    found = []
    for row in out.sequences[:, len(prompt) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        found.append(row[:end])
    scores = getattr(out, "sequences_scores", None)
    return found, None if scores is None else scores.tolist(), margin.clear


def own_end(model, prompt, search):
    """A token that the best beam has on its way becomes one that ends an answer of this model."""
    (best, *_), *_ = reference(model, prompt, search, [])
    model.generation_config.eos_token_id = [tiny_models.EOS, best[len(best) // 2]]
    return model.generation_config.eos_token_id


def draw_searches(model, rng):
    """A prompt, stop tokens and transformers' sequences and scores for each of `SEARCHES`."""

    def draw(count):
        return [rng.randrange(tiny_models.PAD) for _ in range(count)]

    common, searches = draw(40), []
    for i, search in enumerate(SEARCHES):
        clear = False
        while not clear:
            prompt = common[: 40 * (i % 2)] + draw(rng.randrange(1, 30))
            if search[4] == "eos":
                stops = own_end(model, prompt, search)
            else:
                stops = rng.sample(range(tiny_models.PAD), search[4])
            sequences, scores, clear = reference(model, prompt, search, stops)
            if search[4] == "eos":
                clear &= any(tokens[-1] in stops for tokens in sequences)
        searches.append((prompt, stops, sequences, scores))
    return searches


@pytest.mark.parametrize("architecture", list(SETTINGS))
def test_beams_equal_transformers(architecture, tmp_path, monkeypatch, seed):
    """Among requests that are no searches; half of the prompts begin alike."""
    directory = str(tiny_models.save(architecture, tmp_path, seed % 1000))
    model = load(directory)
    searches = draw_searches(model, random.Random(seed))
    model.generation_config.save_pretrained(directory)
    for setting in SETTINGS[architecture]:
        outputs, preempted = run_searches(directory, setting, searches, monkeypatch)
        assert preempted > 0, "the pool was meant to be too small"
        for i, name in itertools.product(range(len(searches)), ("beam", "again")):
            sequences, scores = searches[i][2:]
            found = outputs[f"{name}-{i}"].outputs
            assert [list(one.token_ids) for one in found] == sequences, (setting, i)
            if scores is not None:
                # A score can be some hundred: a sum of float32 is right to five digits.
                of_beams = [one.beam_score for one in found]
                assert of_beams == pytest.approx(scores, abs=1e-4, rel=1e-5), (setting, i)
            if SEARCHES[i][4] == "eos":
                assert "stop" in [one.finish_reason for one in found]


def run_searches(directory, setting, searches, monkeypatch):
    """The last outputs of all requests, and how often a group with several beams lost its blocks."""
    mode, caching, block_size, blocks, budget = setting
    engine = small_engine(
        directory,
        preemption_mode=mode,
        enable_prefix_caching=caching,
        block_size=block_size,
        num_gpu_blocks_override=blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=16,
    )
    preempted = []
    preempt = engine._scheduler._preempt

    def counting(group, draft):
        preempted.append(group.params.beam_width is not None and len(group.live) > 1)
        preempt(group, draft)

    monkeypatch.setattr(engine._scheduler, "_preempt", counting)
    for i, (search, (prompt, stops, *_)) in enumerate(zip(SEARCHES, searches)):
        params = SamplingParams(
            n=search[0],
            beam_width=search[0],
            length_penalty=search[1],
            early_stopping=search[2],
            max_tokens=search[3],
            stop_token_ids=() if search[4] == "eos" else stops,
            ignore_eos=search[4] != "eos",
        )
        for name in ("beam", "again"):
            engine.add_request(f"{name}-{i}", {"prompt_token_ids": prompt}, params)
        if i % 3 == 2:
            others = SamplingParams(temperature=float(i % 2), n=1 + i % 2, seed=i, max_tokens=12)
            engine.add_request(f"other-{i}", {"prompt_token_ids": prompt}, others)
    outputs = finish(engine)
    assert len(outputs) == 2 * len(SEARCHES) + len(SEARCHES) // 3
    return outputs, sum(preempted)


@pytest.mark.parametrize(
    ("early_stopping", "penalty", "done"),
    # -10 is worse than -1 at 3 tokens, and better at the 10 there may be; the hypotheses are full.
    [
        ("never", 2.0, False),
        (False, 2.0, True),
        (True, 2.0, True),
        ("never", -1.0, True),
        ("never", 0.0, True),
    ],
)
def test_when_no_beam_can_become_one_of_the_best(early_stopping, penalty, done):
    params = SamplingParams(beam_width=2, early_stopping=early_stopping, length_penalty=penalty)
    group = SimpleNamespace(params=params, width=2, max_tokens=10)
    one = beam_search.Hypothesis([1], -1.0, -1.0, "stop", None)
    assert beam_search._is_done(group, beam_search.Beams(hypotheses=[one, one]), 3, -10.0) is done
    assert not beam_search._is_done(group, beam_search.Beams(hypotheses=[one]), 3, -10.0)


def test_candidates_are_the_same_whatever_other_searches_ask_for(seed):
    """Of bfloat16 logits many are equal."""
    torch.manual_seed(seed)
    logits = (torch.randn(8, 5000) * 2).bfloat16()
    params = SamplingParams(beam_width=4, temperature=0)

    def beam(number: int, num_stops: int) -> ScheduledSequence:
        seq = Sequence(number, 0, [1, 2], 2, 0)
        group = SequenceGroup("r", None, [1, 2], params, 9, 0, [seq], stop_ids=frozenset(range(num_stops)))
        return ScheduledSequence(group, seq, 0, 2, 4)

    few = [beam(number, 4) for number in range(7)]
    alone = Sampler(frozenset()).sample(logits[:7].clone(), few).candidates
    together = Sampler(frozenset()).sample(logits.clone(), [*few, beam(7, 99)]).candidates
    assert len(together.pop(7).token_ids) == 400
    assert together == alone


@pytest.mark.parametrize("penalty", [-16, -16.0, 16, 16.0])
def test_the_largest_penalties_leave_the_scores_of_long_outputs_in_order(penalty):
    """A power that is no float would end the step of everybody."""
    params = SamplingParams(beam_width=1, early_stopping="never", length_penalty=penalty)
    group = SimpleNamespace(params=params, width=1, max_tokens=10**7, stop_ids=())
    for length in (1, 10**6):
        parent = SimpleNamespace(output_token_ids=[5] * length)
        one, two = (beam_search._hypothesis(group, parent, 5, total) for total in (-1e3, -1e7))
        assert -math.inf < two.score < one.score < 0
        assert beam_search._is_done(group, beam_search.Beams(hypotheses=[one]), length + 1, -math.inf)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 3),
        ("temperature", 0.5),
        ("top_k", 4),
        ("best_of", 4),
        ("logprobs", 1),
        ("stop", "x"),
        ("min_tokens", 1),
    ],
)
def test_what_does_not_go_with_beams_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} .*(beam_width|beam search).*(leave it out|lower it)"):
        SamplingParams(beam_width=2, **{field: value})


@pytest.mark.parametrize("field", [{"length_penalty": 2.0}, {"early_stopping": True}])
def test_settings_of_beams_need_them(field):
    with pytest.raises(ValueError, match=f"^{next(iter(field))} is for beam search"):
        SamplingParams(**field)


def test_as_many_beams_as_the_vocabulary_has_tokens(tmp_path):
    """Fewer than transformers looks at in a step. Beyond that there would be fewer outputs than ``n``."""
    directory = str(tiny_models.save("llama", tmp_path, 1, vocab_size=6, eos_token_id=3, pad_token_id=0))
    model, engine = load(directory), small_engine(directory)
    prompt = {"prompt_token_ids": [1, 2, 4]}
    for length in (1, 2, 6):
        search = (5, 0.5, False, length, "eos")
        sequences, scores, clear = reference(model, prompt["prompt_token_ids"], search, [3])
        assert clear
        params = SamplingParams(n=5, beam_width=5, length_penalty=0.5, max_tokens=length)
        found = run(engine, {"beams": (prompt, params)})["beams"].outputs
        assert [list(one.token_ids) for one in found] == sequences
        assert [one.beam_score for one in found] == pytest.approx(scores, abs=1e-4)
    for width, settings, left in (
        (6, {}, 5),
        (4, {"stop_token_ids": [0, 3, 5]}, 3),
        (7, {"ignore_eos": True}, 6),
    ):
        with pytest.raises(ValueError, match=f"beam_width is {width}, .* 6 tokens {left} .*lower it"):
            engine.add_request("beams", prompt, SamplingParams(beam_width=width, **settings))
    assert not engine.has_unfinished()


def test_capacity_counts_every_beam(llama_dir):
    engine = small_engine(llama_dir)
    for width, message in ((9, "beam_width is 9"), (8, "blocks")):
        params = SamplingParams(beam_width=width, max_tokens=60)
        with pytest.raises(ValueError, match=message):
            engine.add_request("wide", {"prompt_token_ids": [1]}, params)
