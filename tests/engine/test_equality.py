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


@pytest.mark.parametrize("architecture", list(tiny_models.CONFIGS))
def test_greedy_equals_generate_under_preemption(architecture, tmp_path, seed):
    rng = random.Random(seed)
    directory = str(tiny_models.save(architecture, tmp_path / architecture, seed % 1000))
    prompts = [
        [rng.randrange(tiny_models.PAD) for _ in range(rng.randrange(1, 60))] for _ in range(NUM_REQUESTS)
    ]
    lengths = [rng.randrange(1, 32) for _ in prompts]
    expected = reference(directory, prompts, lengths)
    for mode in ("swap", "recompute"):
        llm = LLM(
            directory,
            device="cpu",
            dtype="float32",
            block_size=8,
            num_gpu_blocks_override=28,  # about three of the 32 requests
            max_num_seqs=16,
            max_num_batched_tokens=40,  # prompts come in chunks
            max_model_len=128,
            swap_space=0.25,
            preemption_mode=mode,
            check_integrity=True,
        )
        assert _layers_read_the_paged_cache(llm)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths],
            use_tqdm=False,
        )
        stats = llm.engine.stats()
        assert stats.num_preemptions > 0, "the pool was meant to be too small"
        wrong = [i for i, out in enumerate(outputs) if out.outputs[0].token_ids != expected[i]]
        assert not wrong, f"{mode}: requests {wrong} differ, first {prompts[wrong[0]]}"
        assert [out.outputs[0].finish_reason for out in outputs] == ["length"] * NUM_REQUESTS
        assert stats.gpu_cache_usage == stats.cpu_cache_usage == 0.0


def _layers_read_the_paged_cache(llm: LLM) -> bool:
    return llm.engine._runner.config._attn_implementation == "cupaged"


def test_swap_moves_blocks_and_recompute_does_not(llama_dir, monkeypatch):
    """The two ways of preempting are two: what they give is equal, so look at what they do."""
    from cupaged.engine import kv_cache

    moved = {"swap": 0, "recompute": 0}
    for mode in moved:
        original = kv_cache.cupaged.swap_blocks

        def counting(src, dst, mapping, mode=mode, original=original):
            moved[mode] += len(mapping)
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
        with monkeypatch.context() as patch:
            patch.setattr(kv_cache.cupaged, "swap_blocks", counting)
            llm.generate(
                [{"prompt_token_ids": [i] * 20} for i in range(6)],
                SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
                use_tqdm=False,
            )
        assert llm.engine.stats().num_preemptions > 0
    assert moved["swap"] > 0
    assert moved["recompute"] == 0
