"""Fused layers: the same logits, few operations, and what computes something else is left as it is."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from pathlib import Path

import pytest
import torch
import transformers as tf

import cupaged
from cupaged.engine import EngineConfig, LLMEngine, SamplingParams, explain
from cupaged.engine.model.attention import ATTENTION_NAME, register_attention
from cupaged.engine.model.fusion import attention_layers, fuse_model, layer_operations
from cupaged.engine.model.model_runner import ModelRunner
from tests import tiny_configs, tiny_models

from . import sweep
from .harness import run, small_engine

FEW_OPERATIONS = ("llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text")
EVERY_DAY = {
    *FEW_OPERATIONS,
    "qwen2_moe",  # biases, and MLPs beside experts
    "glm4",  # interleaved pairs, some of the dimensions
    "cohere2",  # layers without positions, and a layout of cosines of its own
    "gpt_oss",  # sinks
    "olmo2",  # norms of whole projections
    "phi",  # LayerNorm
}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
BLOCK_SIZE = 8


def built(config: tf.PretrainedConfig, seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return a model with drawn weights and the paged attention."""
    register_attention()
    model = tf.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=ATTENTION_NAME
    )
    tiny_configs.draw_weights(model, seed)
    return model.to(dtype).eval().requires_grad_(False)


def tiny(model_type: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return built(tiny_configs.tiny_config(model_type), seed, dtype)


def fused(model: torch.nn.Module):
    """Fuse a model.

    Returns:
        The report, and the logits before and after.
    """
    proof = ModelRunner(model).proof(BLOCK_SIZE)
    before = proof.logits()
    report = fuse_model(model, proof).report
    return report, before, proof.logits()


@pytest.mark.parametrize("model_type", FEW_OPERATIONS)
def test_a_layer_takes_at_most_ten_operations_in_decode(model_type, seed):
    model = tiny(model_type, seed)
    runner = ModelRunner(model)
    proof = runner.proof(BLOCK_SIZE)
    layers = attention_layers(model, proof)
    assert min(len(names) for names in layer_operations(proof, layers)) > 25
    runner.rewrite(BLOCK_SIZE)
    operations = layer_operations(proof, layers)
    assert len(operations) == model.config.num_hidden_layers
    assert max(len(names) for names in operations) <= 10
    assert all(names.count("paged_attention") == 1 for names in operations)


TABLE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
SERVED = [
    pytest.param(kind, marks=() if kind in EVERY_DAY else pytest.mark.matrix)
    for kind in tiny_configs.MODEL_TYPES
    if sweep.row(kind, None) in TABLE.splitlines()
]


@pytest.mark.parametrize("model_type", SERVED)
def test_greedy_tokens_are_the_same(model_type, tmp_path, seed):
    """`test_model_sweep` compares all log probabilities of fused models with those of transformers."""
    sweep.save(model_type, tmp_path, seed)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(2, tiny_models.PAD, (29,), generator=generator).tolist()
    outputs = []
    for fuse in (False, True):
        engine = small_engine(str(tmp_path), fuse=fuse)
        outputs.append(run(engine, {"x": ({"prompt_token_ids": prompt}, GREEDY)})["x"].outputs[0].token_ids)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("model_type", SERVED)
def test_bfloat16_logits_are_as_close_as_those_of_torch(model_type, seed):
    """Every expert is used: to choose others is no rounding error."""
    config = tiny_configs.tiny_config(model_type)
    for name in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"):
        if hasattr(config, name):
            setattr(config, name, 4)
    model = built(config, seed, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    wanted = ModelRunner(exact).proof(BLOCK_SIZE).logits()
    report, before, after = fused(model)
    assert report.undone is None
    error, own_error = (after - wanted).norm(), (before - wanted).norm()
    assert error <= 2 * own_error
