"""Greedy output equals transformers' `generate`, token for token, while requests are preempted.

The proof of the whole engine: a block table, a slot, a position or a copy that is wrong changes a token.
"""

from __future__ import annotations

import random

import pytest
import torch
import transformers as tf

from cupaged.engine import LLM, SamplingParams
from tests import tiny_models

NUM_REQUESTS = 32


def reference(directory: str, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """One prompt at a time, without a paged cache: transformers alone."""
    model = tf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    outputs = []
    for prompt, length in zip(prompts, lengths):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=tiny_models.PAD,
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


# How requests are preempted, whether blocks are found again, tokens of a block, most tokens of a step. Each
# architecture takes two of them in turn.
SETTINGS = [
    ("swap", True, 8, 40),
    ("recompute", False, 16, 32),
    ("recompute", True, 8, 512),
    ("swap", False, 32, 40),
    ("auto", True, 16, 24),
]


@pytest.mark.parametrize("architecture", list(tiny_models.CONFIGS))
def test_greedy_equals_generate_under_preemption(architecture, tmp_path, seed):
    """Half of the prompts begin alike."""
    rng = random.Random(seed)
    directory = str(tiny_models.save(architecture, tmp_path / architecture, seed % 1000))
    common = [rng.randrange(tiny_models.PAD) for _ in range(32)]
    prompts = [
        common[: 32 * (i % 2)] + [rng.randrange(tiny_models.PAD) for _ in range(rng.randrange(1, 28))]
        for i in range(NUM_REQUESTS)
    ]
    lengths = [rng.randrange(1, 32) for _ in prompts]
    expected = reference(directory, prompts, lengths)
    first = 2 * list(tiny_models.CONFIGS).index(architecture)
    for mode, caching, block_size, budget in (SETTINGS[first % 5], SETTINGS[(first + 1) % 5]):
        llm = LLM(
            directory,
            device="cpu",
            dtype="float32",
            block_size=block_size,
            num_gpu_blocks_override=192 // block_size,  # about three of the 32 requests
            max_num_seqs=16,
            max_num_batched_tokens=budget,  # prompts come in chunks
            max_model_len=128,
            swap_space=0.25,
            preemption_mode=mode,
            enable_prefix_caching=caching,
            check_integrity=True,
        )
        assert _layers_read_the_paged_cache(llm)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths],
            use_tqdm=False,
        )
        stats = llm.engine.stats()
        assert stats.num_preemptions > 0 or block_size > 16, "the pool was meant to be too small"
        assert (stats.prefix_cache_hits > 0) == caching
        wrong = [i for i, out in enumerate(outputs) if out.outputs[0].token_ids != expected[i]]
        assert not wrong, f"{mode}, {caching=}: requests {wrong} differ, first {prompts[wrong[0]]}"
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
    from cupaged.engine import kv_cache

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
    assert rates.prefill_tokens_per_s > 0
