"""Models whose layers all have a window: what it leaves behind is free, and no token changes."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as tf

from cupaged.engine import SamplingParams
from tests import tiny_models

from .harness import finish, small_engine
from .test_equality import is_greedy


@pytest.fixture(scope="module")
def mistral_dir(tmp_path_factory) -> str:
    return str(tiny_models.save("mistral", tmp_path_factory.mktemp("mistral")))


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
@torch.inference_mode()
def test_blocks_behind_the_window_serve_others(mistral_dir, mode, caching, seed):
    """Empty blocks are NaN. Six sequences of up to 120 tokens in 26 blocks of 8: one at a time without a
    window. Three more are urgent and need more than they leave, so that some make way for them."""
    rng = random.Random(seed)
    engine = small_engine(
        mistral_dir,
        num_gpu_blocks_override=26,
        preemption_mode=mode,
        enable_prefix_caching=caching,
        scheduling_policy="priority",
    )
    lengths = [*(rng.randrange(60, 81) for _ in range(6)), 112, 112, 112]
    prompts = {
        str(i): [rng.randrange(tiny_models.PAD) for _ in range(length)] for i, length in enumerate(lengths)
    }
    most = {name: 119 - len(prompt) for name, prompt in prompts.items()}

    def add(name: str, priority: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=most[name], ignore_eos=True)
        engine.add_request(name, {"prompt_token_ids": prompts[name]}, params, priority=priority)

    for i in range(6):
        add(str(i), 1)
    decoding, step = [0], engine.step

    def counting():
        outputs = step()
        running = engine._scheduler.running
        for group in running:
            for seq in group.live:
                # The window, the chunk of a prompt, and a block at either end.
                assert engine._blocks.num_distinct([seq.seq_id]) <= -(-(tiny_models.WINDOW + 32) // 8) + 2
        decoding.append(sum(not group.prefilling for group in running))
        if decoding[-1] == 6 and "6" not in engine.request_ids and not engine.stats().num_preemptions:
            for name in ("6", "7", "8"):
                add(name, 0)
        return outputs

    engine.step = counting
    outputs = finish(engine)
    assert max(decoding) >= 6
    assert engine.stats().num_preemptions > 0
    assert len(outputs) == 9
    model = tf.AutoModelForCausalLM.from_pretrained(mistral_dir, attn_implementation="eager").eval()
    for name, output in outputs.items():
        assert len(output.outputs[0].token_ids) == most[name]
        assert is_greedy(model, prompts[name], output.outputs[0].token_ids)


@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
def test_layers_that_see_all_keep_all(architecture, tmp_path):
    engine = small_engine(str(tiny_models.save(architecture, tmp_path)))
    assert engine._runner.window is None
    engine.add_request("a", {"prompt_token_ids": [1] * 90}, SamplingParams(max_tokens=9, ignore_eos=True))
    while engine.stats().num_running == 0 or engine._scheduler.running[0].prefilling:
        engine.step()
    seq = engine._scheduler.running[0].live[0]
    assert engine._blocks.num_distinct([seq.seq_id]) == -(-90 // 8)
    finish(engine)
