"""Shared prefixes: what is in the cache is not computed again, and what comes out is the same."""

from __future__ import annotations

import random

import pytest

from cupaged.engine import SamplingParams
from tests import tiny_models

from .harness import Reference, assert_clean, finish, run, small_engine

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
BLOCK = 8


def drawn(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(tiny_models.PAD) for _ in range(length)]


def ids(tokens: list[int], **more) -> dict:
    return {"prompt_token_ids": tokens, **more}


class Counting:
    """Counts the tokens that an engine's model computes; what it samples from is transformers'."""

    def __init__(self, engine, reference: Reference) -> None:
        self.steps: list[list[int]] = []  # of each step the tokens of each sequence
        reference.replace_logits(engine)
        self._run, engine._runner.run = engine._runner.run, self._counting

    def _counting(self, scheduled, *args):
        self.steps.append([item.num_tokens for item in scheduled])
        return self._run(scheduled, *args)


@pytest.fixture(scope="module")
def reference(llama_dir) -> Reference:
    return Reference(llama_dir)


@pytest.mark.parametrize("length", [2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK - 1])
def test_one_step_computes_a_prompt_once_for_all_that_have_it(llama_dir, reference, seed, length):
    """The keys and values that one request writes in a layer are read by the others in that layer. A prompt
    of full blocks leaves one token to compute, which is not written: the block is another's."""
    tokens = drawn(random.Random(seed), length)
    engine = small_engine(llama_dir, max_num_batched_tokens=64)
    counting = Counting(engine, reference)
    outputs = run(engine, {name: (ids(tokens), GREEDY) for name in "abc"})
    rest = length % BLOCK or 1
    assert counting.steps[0] == [length, rest, rest]
    assert outputs["a"].outputs == outputs["b"].outputs == outputs["c"].outputs
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (3 * length, 2 * (length - rest))
    # And later it is all there, with what was sampled before the last full block's end.
    longer = tokens + outputs["a"].outputs[0].token_ids
    counting.steps.clear()
    again = run(engine, {"d": (ids(longer), GREEDY)})["d"]
    assert counting.steps[0] == [len(longer) - (len(longer) - 1) // BLOCK * BLOCK]
    cold_engine = small_engine(llama_dir, enable_prefix_caching=False)
    reference.replace_logits(cold_engine)
    cold = run(cold_engine, {"d": (ids(longer), GREEDY)})["d"]
    assert again.outputs[0].token_ids == cold.outputs[0].token_ids


def test_samples_of_a_cached_prompt_share_it_too(llama_dir, reference, seed):
    tokens = drawn(random.Random(seed), 2 * BLOCK)
    engine = small_engine(llama_dir, max_num_batched_tokens=64)
    counting = Counting(engine, reference)
    params = SamplingParams(n=3, temperature=1, seed=seed, max_tokens=10, ignore_eos=True)
    first = run(engine, {"a": (ids(tokens), params), "b": (ids(tokens), params)})
    assert first["a"].outputs == first["b"].outputs
    assert counting.steps[0] == [2 * BLOCK, 1]


def test_without_the_cache_nothing_is_found(llama_dir, reference, seed):
    tokens = drawn(random.Random(seed), 20)
    engine = small_engine(llama_dir, max_num_batched_tokens=64, enable_prefix_caching=False)
    counting = Counting(engine, reference)
    run(engine, {name: (ids(tokens), GREEDY) for name in "ab"})
    assert counting.steps[0] == [20, 20]
    stats = engine.stats()
    assert stats.prefix_cache_queries == stats.prefix_cache_hits == 0
    with pytest.raises(ValueError, match="enable_prefix_caching=True"):
        engine.add_prefix("p", ids(tokens))


def test_another_salt_finds_nothing(llama_dir, reference, seed):
    tokens = drawn(random.Random(seed), 20)
    engine = small_engine(llama_dir, max_num_batched_tokens=128)
    counting = Counting(engine, reference)
    salts = {"a": {}, "b": {"cache_salt": "x"}, "c": {"cache_salt": "y"}, "d": {"cache_salt": "x"}}
    outputs = run(engine, {name: (ids(tokens, **salt), GREEDY) for name, salt in salts.items()})
    assert counting.steps[0] == [20, 20, 20, 4]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs.values()}) == 1
    for salt in ("", 5):
        with pytest.raises(ValueError, match="cache_salt must be a string"):
            engine.add_request("e", ids(tokens, cache_salt=salt), GREEDY)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_preempted_request_finds_its_blocks(llama_dir, reference, seed, mode):
    """What nobody has overwritten meanwhile is neither computed nor copied again."""
    rng = random.Random(seed)
    engine = small_engine(llama_dir, num_gpu_blocks_override=11, max_model_len=88, preemption_mode=mode)
    moved = {"out": 0, "in": 0}
    move_blocks = engine._cache.move_blocks

    def counting_moves(plan):
        moved["out"] += len(plan.swap_out)
        moved["in"] += len(plan.swap_in)
        move_blocks(plan)

    engine._cache.move_blocks = counting_moves
    counting = Counting(engine, reference)
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    requests = {name: (ids(drawn(rng, 4 * BLOCK)), long) for name in "ab"}
    run(engine, requests)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    computed = sum(map(sum, counting.steps))
    needed = sum(4 * BLOCK + 39 for _ in requests)
    if mode == "swap":
        assert computed == needed
        assert 0 < moved["in"] < moved["out"]
    else:
        assert stats.prefix_cache_hits > 0
        assert needed < computed < needed + 5 * BLOCK  # the victim had more than that


def test_a_pinned_prefix_stays_and_is_used(llama_dir, reference, seed):
    rng = random.Random(seed)
    prefix = drawn(rng, 3 * BLOCK + 2)
    engine = small_engine(llama_dir, num_gpu_blocks_override=12, max_model_len=96)
    engine.add_prefix("system", ids(prefix))
    with pytest.raises(ValueError, match="'system' is taken"):
        engine.add_prefix("system", ids(prefix))
    while engine.has_unfinished():
        assert engine.step() == []
    assert engine.stats().gpu_cache_usage == 3 / 12
    counting = Counting(engine, reference)
    for name in "abcd":  # each of them fills all the rest of the memory
        other = drawn(rng, 60)
        run_beside(engine, {name: (ids(other), GREEDY)})
        tokens = prefix[: 3 * BLOCK] + other[:5]
        counting.steps.clear()
        run_beside(engine, {name: (ids(tokens), GREEDY)})
        assert counting.steps[0] == [5]
    engine.remove_prefix("system")
    assert_clean(engine)
    with pytest.raises(ValueError, match="'system': there is no such prefix"):
        engine.remove_prefix("system")
    run(engine, {"e": (ids(drawn(rng, 88)), GREEDY)})  # takes all blocks
    counting.steps.clear()
    run(engine, {"e": (ids(prefix), GREEDY)})
    assert sum(map(sum, counting.steps)) == len(prefix) + 7


def run_beside(engine, requests) -> None:
    """As `run`, while a prefix holds blocks."""
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
    while engine.has_unfinished():
        engine.step()
    engine.check_integrity()


def test_a_pinned_prefix_that_does_not_fit_is_refused(llama_dir, seed):
    rng = random.Random(seed)
    prefix = drawn(rng, 5 * BLOCK)
    engine = small_engine(llama_dir, num_gpu_blocks_override=8, max_model_len=64)
    with pytest.raises(ValueError, match="only full blocks of 8 tokens are kept"):
        engine.add_prefix("short", ids(prefix[:7]))
    with pytest.raises(ValueError, match="prefixes would take 9 blocks; the KV cache has 8"):
        engine.add_prefix("long", ids(drawn(rng, 72)))
    engine.add_request("r", ids(drawn(rng, 25)), GREEDY)
    with pytest.raises(ValueError, match="a request may need 4 more"):
        engine.add_prefix("p", ids(prefix))
    engine.add_prefix("p", ids(prefix[: 4 * BLOCK]))
    # What a request shares with the prefix is not counted twice.
    engine.add_request("same", ids(prefix), GREEDY)
    with pytest.raises(ValueError, match=r"may need 6 blocks .* 4 of them taken by pinned prefixes"):
        engine.add_request("other", ids(drawn(rng, 41)), GREEDY)
    while engine.has_unfinished():
        engine.step()
    engine.remove_prefix("p")
    assert_clean(engine)


def test_a_pinned_prefix_that_no_prompt_can_begin_with_is_refused(tmp_path, seed):
    """gpt2 has no positions beyond its length: every step would fail, as long as the prefix waits."""
    rng = random.Random(seed)
    directory = str(tiny_models.save("gpt2", tmp_path))
    engine = small_engine(directory, num_gpu_blocks_override=64, max_model_len=256)
    for length in (256, 320):
        with pytest.raises(ValueError, match=r"prefix has \d+ tokens .* fewer than 256 \(max_model_len\)"):
            engine.add_prefix("p", ids(drawn(rng, length)))
    engine.add_prefix("p", ids(drawn(rng, 255)))
    while engine.has_unfinished():
        engine.step()
    engine.remove_prefix("p")
    assert_clean(engine)


def test_after_a_failed_step_the_engine_goes_on(llama_dir, reference, seed, monkeypatch):
    """What the step was to write is not found, and everything is computed again."""
    rng = random.Random(seed)
    shared = drawn(rng, 2 * BLOCK)
    requests = {name: (ids(shared + drawn(rng, 9)), GREEDY) for name in "abc"}
    undisturbed, engine = small_engine(llama_dir), small_engine(llama_dir)
    for one in (undisturbed, engine):
        reference.replace_logits(one)
    expected = run(undisturbed, requests)
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "run", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        engine.step()
    assert finish(engine) == expected


def test_priorities_order_the_requests(llama_dir, seed):
    rng = random.Random(seed)
    order = []
    engine = small_engine(llama_dir, max_num_seqs=1, scheduling_policy="priority")
    for name, priority in {"a": 1, "b": 0, "c": -3, "d": 0}.items():
        engine.add_request(name, ids(drawn(rng, 12)), GREEDY, priority=priority)
    while engine.has_unfinished():
        order += [output.request_id for output in engine.step() if output.finished]
    assert order == ["c", "b", "d", "a"]
    with pytest.raises(ValueError, match="priority must be an integer"):
        engine.add_request("e", ids([1]), GREEDY, priority="high")
