"""Beam search equals transformers', under preemption, with and without a prefix cache, in mixed batches."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from cupaged.engine import SamplingParams, beam_search
from tests import tiny_models

from .harness import finish, run, small_engine

# beam_width, length_penalty, early_stopping, max_tokens, ends: 1 stop token or many, or none
SEARCHES = [
    (4, 1.0, False, 12, 40),
    (3, 0.0, "never", 10, 40),
    (4, 2.0, "never", 10, 40),
    (2, -1.0, True, 12, 40),
    (4, 1.0, True, 9, 1),
    (3, 1.0, False, 14, 0),
    (1, 1.0, False, 8, 40),
]


def load(directory):
    return tf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def model(llama_dir):
    return load(llama_dir)


def reference(model, prompt, search, stops):
    width, penalty, early, length, _ = search
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
    )
    found = []
    for row in out.sequences[:, len(prompt) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        found.append(row[:end])
    scores = getattr(out, "sequences_scores", None)
    return found, None if scores is None else scores.tolist()


@pytest.mark.parametrize(
    ("mode", "caching", "blocks", "budget"),
    [
        ("swap", True, 24, 32),
        ("recompute", False, 24, 16),
        ("recompute", True, 24, 64),
        ("swap", False, 200, 32),
    ],
)
def test_beams_equal_transformers(model, llama_dir, mode, caching, blocks, budget, seed):
    rng = random.Random(seed)
    engine = small_engine(
        llama_dir,
        preemption_mode=mode,
        enable_prefix_caching=caching,
        num_gpu_blocks_override=blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=16,
    )
    expected = {}
    common = [rng.randrange(tiny_models.PAD) for _ in range(20)]
    for i, search in enumerate(SEARCHES):
        prompt = common[: 20 * (i % 2)] + [
            rng.randrange(tiny_models.PAD) for _ in range(rng.randrange(1, 30))
        ]
        stops = rng.sample(range(tiny_models.PAD), search[4])
        expected[f"beam-{i}"] = reference(model, prompt, search, stops)
        params = SamplingParams(
            n=search[0],
            beam_width=search[0],
            length_penalty=search[1],
            early_stopping=search[2],
            max_tokens=search[3],
            stop_token_ids=stops,
            ignore_eos=True,
        )
        engine.add_request(f"beam-{i}", {"prompt_token_ids": prompt}, params)
        others = SamplingParams(temperature=float(i % 2), n=1 + i % 2, seed=i, max_tokens=12)
        engine.add_request(f"other-{i}", {"prompt_token_ids": prompt}, others)
    outputs = finish(engine)
    assert len(outputs) == 2 * len(SEARCHES)
    assert blocks > 100 or engine.stats().num_preemptions > 0
    for name, (sequences, scores) in expected.items():
        assert [list(o.token_ids) for o in outputs[name].outputs] == sequences, name
        if scores is not None:
            # A score can be some hundred, where float32 has no fourth digit behind the point.
            found = [o.beam_score for o in outputs[name].outputs]
            assert found == pytest.approx(scores, abs=1e-4, rel=3e-6), name


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
        search, stops = (5, 0.5, False, length, 0), [3]
        sequences, scores = reference(model, prompt["prompt_token_ids"], search, stops)
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
