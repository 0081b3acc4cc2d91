"""Greedy output equals transformers' token for token, while requests are preempted.

The proof of the whole engine: a block table, a slot, a position or a copy that is wrong changes a token.
"""

from __future__ import annotations

import random

import pytest
import torch
import transformers as tf

from cupaged.engine import LLM, SamplingParams
from tests import tiny_models

NUM_REQUESTS = 24


# How requests are preempted, whether blocks are found again, tokens of a block, blocks, most tokens of a
# step. Each architecture takes three of them in turn.
SETTINGS = [
    ("swap", True, 8, 40, 40),
    ("recompute", False, 16, 26, 128),
    ("auto", True, 64, 8, 512),
    ("swap", False, 32, 16, 64),
    ("recompute", True, 16, 20, 64),
    ("auto", False, 8, 40, 24),
    ("swap", False, 64, 9, 256),
    ("recompute", True, 32, 12, 16),
]


def is_greedy(model: tf.PreTrainedModel, prompt: list[int], output: list[int]) -> bool:
    """Whether greedy decoding gives this output: every token of it is the one that transformers' model holds
    for the best after the prompt and the output up to there, all seen in one forward without any cache.

    By induction that is equality with `generate`, which takes the best token after its own output so far; but
    it takes a tenth of the time, and where two tokens are equal but for the rounding of float32, whose errors
    are up to 1e-4 here, either is right: one position in some thousand has such a second token.
    """
    logits = model(torch.tensor([prompt + output[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(-1, torch.tensor(output)[:, None])[:, 0]
    return bool((chosen > logits.max(-1).values - 5e-4).all())


@pytest.mark.parametrize("architecture", list(tiny_models.CONFIGS))
@torch.inference_mode()
def test_greedy_equals_transformers_under_preemption(architecture, tmp_path, seed):
    """Half of the prompts begin alike."""
    rng = random.Random(seed)
    directory = str(tiny_models.save(architecture, tmp_path / architecture, seed % 1000))
    model = tf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    fixed = random.Random(0)  # of lengths: they decide who is preempted
    lengths = [fixed.randrange(*((1, 28), (50, 64))[i % 4 // 2]) for i in range(NUM_REQUESTS)]
    common = [rng.randrange(tiny_models.PAD) for _ in range(64)]
    prompts = [
        common[: 64 * (i % 2)] + [rng.randrange(tiny_models.PAD) for _ in range(length)]
        for i, length in enumerate(lengths)
    ]
    max_tokens = [fixed.randrange(1, 40) for _ in prompts]
    expected: dict[int, list[int]] = {}  # what is known to be right
    first = 3 * list(tiny_models.CONFIGS).index(architecture)
    for turn in range(3):
        mode, caching, block_size, blocks, budget = SETTINGS[(first + turn) % len(SETTINGS)]
        llm = LLM(
            directory,
            device="cpu",
            dtype="float32",
            block_size=block_size,
            num_gpu_blocks_override=blocks,  # of some of the requests
            max_num_seqs=16,
            max_num_batched_tokens=budget,  # prompts come in chunks
            max_model_len=168,
            swap_space=0.25,
            preemption_mode=mode,
            enable_prefix_caching=caching,
            check_integrity=True,
        )
        assert _layers_read_the_paged_cache(llm)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in max_tokens],
            use_tqdm=False,
        )
        stats = llm.engine.stats()
        if llm.engine._runner.window is None:  # else memory does not grow: test_window_memory.py
            assert stats.num_preemptions > 0, "the pool was meant to be too small"
        assert (stats.prefix_cache_hits > 0) == caching
        assert [len(out.outputs[0].token_ids) for out in outputs] == max_tokens
        for i, out in enumerate(outputs):
            found = out.outputs[0].token_ids
            if expected.get(i) != found:
                assert is_greedy(model, prompts[i], found), f"{mode}, {caching=}: request {i}: {prompts[i]}"
                expected[i] = found
        assert [out.outputs[0].finish_reason for out in outputs] == ["length"] * NUM_REQUESTS
        assert stats.gpu_cache_usage == stats.cpu_cache_usage == 0.0


def _layers_read_the_paged_cache(llm: LLM) -> bool:
    return llm.engine._runner.config._attn_implementation == "cupaged"


@pytest.mark.parametrize(
    ("mode", "block_seconds", "moves"),
    [("swap", None, True), ("recompute", None, False), ("auto", 1e-9, True), ("auto", 1e3, False)],
)
def test_swap_moves_blocks_and_recompute_does_not(llama_dir, monkeypatch, mode, block_seconds, moves):
    """The two ways of preempting are two: what they give is equal, so look at what they do. "auto" follows
    the rates: here the engine is told what moving a block has taken so far."""
    from cupaged.engine.model import kv_cache

    moved = 0
    original = kv_cache.cupaged.swap_blocks

    def counting(src, dst, mapping):
        nonlocal moved
        moved += len(mapping)
        original(src, dst, mapping)

    llm = LLM(
        llama_dir,
        device="cpu",
        block_size=8,
        num_gpu_blocks_override=10,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=72,
        swap_space=0.25,
        preemption_mode=mode,
        check_integrity=True,
    )
    rates = llm.engine._rates
    assert (rates.link_bytes_per_s is not None) == (mode == "auto"), "measured at the start"
    if block_seconds is not None:
        for _ in range(20):
            rates.moved(1, block_seconds)
    monkeypatch.setattr(kv_cache.cupaged, "swap_blocks", counting)
    llm.generate(
        [{"prompt_token_ids": [i] * 20} for i in range(6)],
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
        use_tqdm=False,
    )
    assert llm.engine.stats().num_preemptions > 0
    assert (moved > 0) == moves
    assert (rates.prefill_tokens_per_s is not None) == (mode == "auto"), "nobody else asks"
