"""Log probabilities of outputs and prompts, best_of, and what changes the logits, in the engine."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as tf

from cupaged.engine import LLM, RequestOutput, SamplingParams
from cupaged.engine.config import MEMORY_POLICIES
from cupaged.engine.scheduling.step_plan import Draft
from tests import tiny_models

from .harness import SMALL, finish, run, small_engine

PROMPT = {"prompt_token_ids": [17 * i % 256 for i in range(20)]}
EVERYTHING = {
    "seed": 5,
    "top_k": 60,
    "top_p": 0.95,
    "min_p": 0.001,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.1,
    "logit_bias": {7: 3.0, 300: -2.0},
    "bad_words": ["a", "bc"],
    "min_tokens": 4,
}


@pytest.fixture(scope="module")
def model(llama_dir):
    return tf.AutoModelForCausalLM.from_pretrained(llama_dir, attn_implementation="eager").double().eval()


def expected(model, token_ids: list[int]) -> torch.Tensor:
    """float64 ``[T - 1, vocabulary]``, of the second token and those after it."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)


NEAR = 1e-3  # float32 makes some 1e-4 of it; what lies this close may stand in either order


def check(positions: list, token_ids: list[int], rows: torch.Tensor, count: int, tokenizer) -> None:
    assert len(positions) == len(token_ids) == len(rows)
    for found, token, row in zip(positions, token_ids, rows):
        (own, first), *others = found.items()
        assert own == token
        ahead, level = (row > row[token] + NEAR).sum(), (row > row[token] - NEAR).sum()
        assert ahead + 1 <= first.rank <= level
        likely = torch.cat([row[:token], row[token + 1 :]]).sort(descending=True).values
        assert [one.rank for _, one in others] == [r for r in range(1, count + 1) if r != first.rank]
        for (other, _), value in zip(others, likely):
            assert other != token
            assert row[other].item() == pytest.approx(value.item(), abs=NEAR)
        for other, one in found.items():
            assert one.logprob == pytest.approx(row[other].item(), abs=NEAR)
            assert one.decoded_token == tokenizer.decode([other])


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_log_probabilities_are_the_models_under_preemption(llama_dir, model, mode, seed):
    """Prompts come in chunks, several at a time; requests that ask for nothing run beside them."""
    rng = random.Random(seed)
    settings = {"num_gpu_blocks_override": 18, "max_model_len": 112, "preemption_mode": mode}
    engine = small_engine(llama_dir, **settings)
    asked = {}
    for i in range(10):
        counts = {"logprobs": rng.choice([None, 0, 1, 4]), "prompt_logprobs": rng.choice([None, 0, 2, 3])}
        more = rng.choice([{}, {"temperature": 0}, {**EVERYTHING, "n": 2}, {"n": 2}])
        params = SamplingParams(**{"max_tokens": 20, "ignore_eos": True, "seed": i, **counts, **more})
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 2, 25, 45, 70]))]
        asked[str(i)] = ({"prompt_token_ids": prompt}, params)
    outputs = run(engine, asked)
    assert engine.stats().num_preemptions > 0
    for request_id, (prompt, params) in asked.items():
        request, ids = outputs[request_id], prompt["prompt_token_ids"]
        if params.prompt_logprobs is None:
            assert request.prompt_logprobs is None
        else:
            assert request.prompt_logprobs[0] is None
            rows = expected(model, ids) if len(ids) > 1 else torch.empty(0, 320)
            check(request.prompt_logprobs[1:], ids[1:], rows, params.prompt_logprobs, engine.tokenizer)
        for one in request.outputs:
            if params.logprobs is None:
                assert (one.logprobs, one.cumulative_logprob) == (None, None)
                continue
            rows = expected(model, [*ids, *one.token_ids])[len(ids) - 1 :]
            check(one.logprobs, one.token_ids, rows, params.logprobs, engine.tokenizer)
            own = sum(found[token].logprob for found, token in zip(one.logprobs, one.token_ids))
            assert one.cumulative_logprob == pytest.approx(own)


def test_a_preempted_prompt_keeps_what_it_has_and_completes_it(llama_dir, model):
    """Preempted between two chunks of the prompt, and computed from its start again."""
    engine = small_engine(
        llama_dir, num_gpu_blocks_override=14, max_model_len=112, preemption_mode="recompute"
    )
    prompt = [3 * i % 256 for i in range(60)]
    engine.add_request("first", PROMPT, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    engine.step()
    engine.add_request("x", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=2, prompt_logprobs=1))
    group = engine._groups["x"]
    while group.seqs[0].num_computed == 0:
        engine.step()
    assert group.seqs[0].num_computed < len(prompt)
    engine._scheduler.running.remove(group)
    engine._scheduler._preempt(group, Draft(0))
    assert group.seqs[0].num_computed == 0
    output = finish(engine)["x"]
    check(output.prompt_logprobs[1:], prompt[1:], expected(model, prompt), 1, engine.tokenizer)


def test_a_cached_prompt_is_computed_again_for_its_log_probabilities(llama_dir, model):
    engine = small_engine(llama_dir)
    prompt = [3 * i % 256 for i in range(40)]
    for _ in range(2):
        params = SamplingParams(max_tokens=2, prompt_logprobs=1)
        output = run(engine, {"x": ({"prompt_token_ids": prompt}, params)})["x"]
        check(output.prompt_logprobs[1:], prompt[1:], expected(model, prompt), 1, engine.tokenizer)


def test_all_of_the_vocabulary(llama_dir):
    engine = small_engine(llama_dir)
    params = SamplingParams(max_tokens=2, logprobs=-1, prompt_logprobs=-1)
    output = run(engine, {"x": (PROMPT, params)})["x"]
    for position in (*output.outputs[0].logprobs, *output.prompt_logprobs[1:]):
        assert len(position) == tiny_models.VOCAB
        assert sum(2.718281828**one.logprob for one in position.values()) == pytest.approx(1, abs=1e-4)


def test_best_of_gives_the_likeliest_first(llama_dir):
    settings = {"seed": 3, "max_tokens": 6, "temperature": 1.5, "ignore_eos": True}

    def generate(**more) -> RequestOutput:
        return run(small_engine(llama_dir), {"x": (PROMPT, SamplingParams(**settings, **more))})["x"]

    every = sorted(generate(n=6, logprobs=0).outputs, key=lambda one: -one.cumulative_logprob)
    best = generate(n=2, best_of=6).outputs
    assert [one.token_ids for one in best] == [one.token_ids for one in every[:2]]
    assert [one.cumulative_logprob for one in best] == [one.cumulative_logprob for one in every[:2]]
    assert [(one.index, one.logprobs) for one in best] == [(0, None), (1, None)]
    assert best[0].cumulative_logprob > best[1].cumulative_logprob > every[-1].cumulative_logprob


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_a_seed_repeats_with_everything_on_alone_in_a_batch_and_preempted(llama_dir, mode):
    """Counts, tails and rows survive the company of others and the loss of the cache."""
    params = SamplingParams(**EVERYTHING, n=2, max_tokens=24, ignore_eos=True, logprobs=2)
    (alone,) = run(small_engine(llama_dir), {"x": (PROMPT, params)}).values()
    settings = {"num_gpu_blocks_override": 16, "max_model_len": 96, "preemption_mode": mode}
    crowded = small_engine(llama_dir, **settings)
    others = [
        SamplingParams(max_tokens=30, ignore_eos=True, presence_penalty=1),
        SamplingParams(temperature=0),
    ]
    requests = {str(i): ({"prompt_token_ids": [i] * 20}, others[i % 2]) for i in range(4)}
    together = run(crowded, {**requests, "x": (PROMPT, params), "y": (PROMPT, params)})
    assert crowded.stats().num_preemptions > 0
    for name in "xy":
        assert [one.token_ids for one in together[name].outputs] == [one.token_ids for one in alone.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids


def test_nothing_ends_an_output_before_min_tokens(llama_dir):
    llm = LLM(llama_dir, **SMALL)

    def generate(**more):
        bias = {tiny_models.EOS: 100, 65: 50}
        params = SamplingParams(temperature=0, logit_bias=bias, max_tokens=9, **more)
        return llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]

    assert generate().token_ids == [tiny_models.EOS]
    output = generate(min_tokens=4)
    assert output.token_ids == [65] * 4 + [tiny_models.EOS]
    assert generate(min_tokens=4, stop_token_ids=[65]).token_ids[:4].count(65) == 0
    assert generate(min_tokens=9).finish_reason == "length"


def test_bad_words_are_not_in_the_text(llama_dir):
    """Of one token and of several; what comes instead is the best of the rest."""
    llm = LLM(llama_dir, **SMALL)
    settings = {"max_tokens": 40, "temperature": 1.0, "seed": 1, "allowed_token_ids": range(65, 70)}
    free = llm.generate(PROMPT, SamplingParams(**settings), use_tqdm=False)[0].outputs[0].text
    words = [free[5:7], free[10:13], free[0]]
    params = SamplingParams(**settings, bad_words=words)
    text = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text
    assert len(text) == 40
    assert not [word for word in words if word in text]
    with pytest.raises(ValueError, match="bad_words"):
        SamplingParams(bad_words=[""])


def test_bad_words_that_no_output_can_have_cost_nothing(llama_dir):
    """Of 100,000 tokens each: minutes before the request ran, and memory that stayed when it had ended."""
    words = [letter + 100_000 * "a" for letter in "bc"]
    engine = small_engine(llama_dir)
    run(engine, {"x": ("a prompt", SamplingParams(max_tokens=4, bad_words=[*words, "baaaa"]))})
    assert engine._sampler._bad_words._tails.size == 0


def test_frequencies_with_everything_on(llama_dir, model, seed):
    """A chi-square test of the engine's own draws of a first token against float64."""
    llm = LLM(
        llama_dir,
        **{**SMALL, "max_num_seqs": 2048, "max_num_batched_tokens": 2048, "num_gpu_blocks_override": 4096},
    )
    bias, penalty = {3: 4.0, 200: -1.0}, 1.3
    params = SamplingParams(
        n=2000,
        seed=seed,
        temperature=0.8,
        logit_bias=bias,
        repetition_penalty=penalty,
        min_p=0.05,
        max_tokens=1,
    )
    outputs = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs
    ids = PROMPT["prompt_token_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[:, -1]
    for token, value in bias.items():
        logits[:, token] += value
    logits = tf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits) / 0.8
    probs = tf.MinPLogitsWarper(0.05)(None, logits).softmax(-1)[0]
    counts = torch.bincount(torch.tensor([one.token_ids[0] for one in outputs]), minlength=len(probs))
    assert not counts[probs == 0].any()
    common = probs * 2000 > 5
    assert common.sum() > 2, "the test would say nothing"
    statistic = ((counts - 2000 * probs)[common] ** 2 / (2000 * probs)[common]).sum()
    half = torch.stack([(common.sum().double() - 1) / 2, statistic / 2])
    assert torch.special.gammaincc(half[0], half[1]) > 1e-9


@pytest.mark.parametrize("policy", MEMORY_POLICIES)
def test_a_prompt_alone_may_fill_the_whole_length(llama_dir, model, policy, seed):
    """max_tokens=0 with other requests beside it; the end-of-sequence token that is drawn is not seen."""
    rng = random.Random(seed)
    engine = small_engine(llama_dir, max_model_len=64, memory_policy=policy)
    asked = {}
    for i in range(6):
        more = rng.choice([{}, {"n": 2}, {"n": 2, "best_of": 3}, {"logprobs": 1}, {"stop": "a", "top_k": 9}])
        if policy == "paged" and rng.random() < 0.3:
            more = {"n": 2, "beam_width": 3}
        else:
            more = {**more, "prompt_logprobs": 1, "logit_bias": {tiny_models.EOS: 100}}
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 17, 63, 64, 64]))]
        asked[str(i)] = ({"prompt_token_ids": prompt}, SamplingParams(**more, max_tokens=0))
    asked["other"] = (PROMPT, SamplingParams(max_tokens=9, ignore_eos=True))
    outputs = run(engine, asked)
    assert len(outputs.pop("other").outputs[0].token_ids) == 9
    for request_id, output in outputs.items():
        ids, params = asked[request_id][0]["prompt_token_ids"], asked[request_id][1]
        nothing = ("", [], "length", None, None if params.logprobs is None else [])
        found = [(o.text, o.token_ids, o.finish_reason, o.stop_reason, o.logprobs) for o in output.outputs]
        assert (output.finished, found) == (True, [nothing] * params.n)
        if params.prompt_logprobs is not None and len(ids) > 1:
            check(output.prompt_logprobs[1:], ids[1:], expected(model, ids), 1, engine.tokenizer)
    engine.check_integrity()
    with pytest.raises(ValueError, match=r"prompt has 65 tokens, .* \(max_model_len\): shorten"):
        engine.add_request("long", {"prompt_token_ids": [1] * 65}, SamplingParams(max_tokens=0))
    with pytest.raises(ValueError, match="at least one of them sampled"):
        engine.add_request("long", {"prompt_token_ids": [1] * 64}, SamplingParams(max_tokens=1))
