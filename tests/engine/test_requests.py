"""Refusals and aborts: a bad request harms nobody, one that ends early leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cupaged.engine import LLM, SamplingParams
from cupaged.engine.scheduling.request import Status

from .harness import SMALL, assert_clean, finish, run, small_engine

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def prompt(length: int, first: int = 1) -> dict:
    return {"prompt_token_ids": [(first + 7 * i) % 256 for i in range(length)]}


BAD_REQUESTS = {
    "empty text": ("", GREEDY, "prompt"),
    "no tokens": ({"prompt_token_ids": []}, GREEDY, "prompt"),
    "no prompt": ({}, GREEDY, "prompt"),
    "none": (None, GREEDY, "prompt"),
    "a number": (5, GREEDY, "prompt"),
    "a list": ([1, 2], GREEDY, "prompt"),
    "ids are none": ({"prompt_token_ids": None}, GREEDY, "prompt"),
    "ids are a number": ({"prompt_token_ids": 7}, GREEDY, "prompt"),
    "ids are text": ({"prompt_token_ids": "abc"}, GREEDY, "prompt_token_ids"),
    "a negative id": ({"prompt_token_ids": [1, -1]}, GREEDY, "prompt_token_ids"),
    "an id beyond the vocabulary": ({"prompt_token_ids": [1, 320]}, GREEDY, "prompt_token_ids"),
    "a fraction": ({"prompt_token_ids": [1.0]}, GREEDY, "prompt_token_ids"),
    "too long a prompt": (prompt(128), GREEDY, "max_model_len"),
    "too many outputs": (prompt(4), SamplingParams(n=9), "max_num_seqs"),
    "outputs too long for the pool": (prompt(4), SamplingParams(n=8, max_tokens=100), "blocks"),
    "too many candidates": (prompt(4), SamplingParams(best_of=9), "best_of"),
    "a bias beyond the vocabulary": (prompt(4), SamplingParams(logit_bias={320: 1.0}), "logit_bias"),
    "allowed beyond the vocabulary": (
        prompt(4),
        SamplingParams(allowed_token_ids=[320]),
        "allowed_token_ids",
    ),
    "a stop token beyond the vocabulary": (prompt(4), SamplingParams(stop_token_ids=[320]), "stop_token_ids"),
    "nothing left to sample": (
        prompt(4),
        SamplingParams(min_tokens=2, allowed_token_ids=[257, 5], stop_token_ids=[5]),
        "allowed_token_ids",
    ),
    "nothing but stop tokens": (
        prompt(4),
        SamplingParams(min_tokens=2, stop_token_ids=range(320)),
        "stop_token_ids",
    ),
    "params of another type": (prompt(4), {"temperature": 0}, "sampling_params"),
    "an id in use": (prompt(4), GREEDY, "request_id"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_by_name_and_the_others_go_on(llama_dir, name):
    bad, params, word = BAD_REQUESTS[name]
    engine = small_engine(llama_dir)
    alone = run(engine, {"good": (prompt(20), GREEDY)})["good"]
    engine.add_request("good", prompt(20), GREEDY)
    engine.step()
    with pytest.raises(ValueError, match=word):
        engine.add_request("good" if name == "an id in use" else "bad", bad, params)
    assert finish(engine) == {"good": alone}


def test_a_prompt_of_millions_of_tokens_is_not_looked_at(llama_dir):
    """Nobody else gets a token meanwhile."""

    class Tokens(list):
        def __iter__(self):
            raise AssertionError("they are looked at one by one")

    engine = small_engine(llama_dir)
    with pytest.raises(ValueError, match=r"the prompt has 129 tokens.*128 \(max_model_len\)"):
        engine.add_request("x", {"prompt_token_ids": Tokens([1] * 129)})


def test_the_largest_request_that_fits_runs(llama_dir):
    """A prompt of one token less than the model's length; the whole pool for one request."""
    engine = small_engine(llama_dir, num_gpu_blocks_override=16)
    outputs = run(engine, {"a": (prompt(127), GREEDY), "b": (prompt(1), SamplingParams(max_tokens=None))})
    assert len(outputs["a"].outputs[0].token_ids) == 1
    assert outputs["a"].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("name", ["min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"])
def test_a_number_of_any_size_is_served(llama_dir, name):
    """No array that has 64 bits for it ends the step of everybody."""
    params = SamplingParams(**{"max_tokens": None, name: 10**30})
    engine = small_engine(llama_dir)
    good = run(engine, {"good": (prompt(20), GREEDY)})["good"]
    outputs = run(engine, {"good": (prompt(20), GREEDY), "x": (prompt(120), params)})
    assert outputs["good"].outputs == good.outputs
    assert len(outputs["x"].outputs[0].token_ids) == 8 or name != "min_tokens"


def test_a_warm_up_leaves_no_trace(llama_dir):
    """Not in the totals, not in the blocks, and not in what requests without a seed draw."""
    drawn = SamplingParams(temperature=1, max_tokens=8, ignore_eos=True)
    cold, warm = small_engine(llama_dir), small_engine(llama_dir)
    steps = []
    step, warm.step = warm.step, lambda: steps.append(1) or step()
    warm.warm_up()
    assert len(steps) == 3, "a prompt, a decode step that is recorded, and one that is replayed"
    assert_clean(warm)
    assert warm.stats() == cold.stats()
    assert run(warm, {"x": (prompt(5), drawn)}) == run(cold, {"x": (prompt(5), drawn)})


def test_ids_may_be_used_again(llama_dir):
    engine = small_engine(llama_dir)
    first = run(engine, {"x": (prompt(5), GREEDY)})
    assert run(engine, {"x": (prompt(5), GREEDY)}) == first


def test_generate_loses_no_outputs_of_other_requests(llama_dir):
    """But a prefix that is still to be computed is none."""
    llm = LLM(llama_dir, **SMALL)
    llm.engine.add_prefix("p", prompt(40))
    llm.engine.add_request("mine", prompt(9), GREEDY)
    with pytest.raises(ValueError, match=r"the engine has other requests \(mine\)"):
        llm.generate(prompt(30), GREEDY, use_tqdm=False)
    while not (outputs := llm.engine.step()) or not outputs[0].finished:
        pass
    assert outputs[0].request_id == "mine"
    assert len(llm.generate(prompt(30), GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8


@pytest.mark.parametrize("longest", [2, 3])
def test_the_shortest_sequences(llama_dir, longest):
    engine = small_engine(llama_dir, max_model_len=longest)
    engine.warm_up()
    assert_clean(engine)
    assert len(run(engine, {"a": (prompt(longest - 1), GREEDY)})["a"].outputs[0].token_ids) == 1


def test_a_model_may_be_a_path(llama_dir, tmp_path):
    assert LLM(Path(llama_dir), **SMALL).engine.model_name == llama_dir
    with pytest.raises(ValueError, match="does not exist"):
        LLM(tmp_path / "none", **SMALL)


def test_generate_with_one_bad_prompt_leaves_the_engine_clean(llama_dir):
    llm = LLM(llama_dir, **SMALL)
    good = [prompt(9), prompt(30)]
    before = [out.outputs for out in llm.generate(good, GREEDY, use_tqdm=False)]
    with pytest.raises(ValueError, match=r"prompts\[1\]: .*max_model_len"):
        llm.generate([good[0], prompt(500), good[1]], GREEDY, use_tqdm=False)
    assert_clean(llm.engine)
    with pytest.raises(ValueError, match="sampling_params"):
        llm.generate(good, [GREEDY], use_tqdm=False)
    with pytest.raises(ValueError, match=r"priority must be one for each of the 2 prompts, got \[1\]"):
        llm.generate(good, GREEDY, use_tqdm=False, priority=[1])
    with pytest.raises(ValueError, match="priority must be one for each of the 2 prompts, got 1"):
        llm.generate(good, GREEDY, use_tqdm=False, priority=1)
    with pytest.raises(ValueError, match=r"prompts\[1\]: priority is 2, .* set scheduling_policy='priority'"):
        llm.generate(good, GREEDY, use_tqdm=False, priority=[0, 2])
    for params in ({"temperature": 0}, 5, "x"):
        with pytest.raises(ValueError, match="sampling_params"):
            llm.generate(good[:1], params, use_tqdm=False)
    for prompts in (None, 5, iter(good)):
        with pytest.raises(ValueError, match="prompts must be a prompt or a sequence"):
            llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [out.outputs for out in llm.generate(good, GREEDY, use_tqdm=False)] == before
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_an_error_in_a_step_leaves_the_engine_clean(llama_dir, monkeypatch):
    llm = LLM(llama_dir, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine._runner, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate([prompt(9)], GREEDY, use_tqdm=False)
    assert_clean(llm.engine)
    assert len(llm.generate([prompt(9)], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8


LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def status_of(engine, request_id: str) -> Status:
    return engine._groups[request_id].status


@pytest.mark.thinned
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("state", ["waiting", "mid-prefill", "running", "preempted", "swapped"])
def test_abort_in_every_state(llama_dir, state, n):
    """The other request's tokens are those it gets alone, and in the end everything is free."""
    mode = "swap" if state == "swapped" else "recompute"
    engine = small_engine(llama_dir, num_gpu_blocks_override=14, max_model_len=112, preemption_mode=mode)
    alone = run(engine, {"other": (prompt(20), LONG)})
    params = SamplingParams(n=n, temperature=0.8, seed=1, max_tokens=60 if n == 1 else 20, ignore_eos=True)
    engine.add_request("other", prompt(20), LONG)
    engine.add_request("x", prompt(42, first=3), params)  # begins like no other
    group = engine._groups["x"]

    def reached() -> bool:
        status, computed = group.status, group.seqs[0].num_computed
        return {
            "waiting": status is Status.WAITING,
            "mid-prefill": status is Status.RUNNING and 0 < computed < 42,
            "running": status is Status.RUNNING and computed > 42,
            "preempted": status is Status.PREEMPTED,
            "swapped": status is Status.SWAPPED,
        }[state]

    while not reached():
        assert not group.finished, "the load was meant to get there"
        engine.step()
    engine.abort("x")
    engine.abort("x")  # again, or one that never was: no error
    engine.abort("nobody")
    assert group.finished
    assert [seq.finish_reason for seq in group.seqs] == ["abort"] * len(group.seqs)
    assert not any(engine._blocks.holds(seq.seq_id) for seq in group.seqs)
    engine.check_integrity()
    assert finish(engine) == alone
