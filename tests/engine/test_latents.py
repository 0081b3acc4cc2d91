"""Multi-head latent attention: the cache holds latents, and tokens are those of the expanded computation."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import transformers as tf

from cupaged.engine.model.attention import register_attention
from cupaged.engine.model.latents import Expansion, Latents, cache_latents
from cupaged.engine.model.model_runner import ModelRunner
from tests import tiny_configs, tiny_models

from . import sweep
from .harness import run, small_engine
from .test_equality import is_greedy

MODELS = ("deepseek_v2", "deepseek_v3", "axk1", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu")


def model_of(seed: int, **changes) -> tf.PreTrainedModel:
    """Return a tiny DeepSeek-V3 with drawn weights."""
    register_attention()
    config = tiny_configs.tiny_config("deepseek_v3")
    config.update({**changes, "head_dim": changes.get("qk_rope_head_dim", config.qk_rope_head_dim)})
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="cupaged")
    tiny_configs.draw_weights(model, seed)
    return model.eval()


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.matrix
def test_tokens_are_those_of_transformers_under_preemption(tmp_path, model_type, mode, seed):
    """Run requests that begin alike in a memory that is too small for them."""
    sweep.save(model_type, tmp_path, seed)
    rng = random.Random(seed)
    common = [rng.randrange(tiny_models.PAD) for _ in range(20)]
    prompts = [common + [rng.randrange(tiny_models.PAD) for _ in range(10)] for _ in range(8)]
    params = replace(sweep.GREEDY, max_tokens=24)
    requests = {str(i): ({"prompt_token_ids": prompt}, params) for i, prompt in enumerate(prompts)}
    engine = small_engine(str(tmp_path), preemption_mode=mode, num_gpu_blocks_override=12, max_model_len=64)
    assert engine._runner.kv_shape(8).latent
    outputs = run(engine, requests)
    assert engine.stats().num_preemptions > 0
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for output in outputs.values():
        sweep.assert_as_transformers(output, model)
    # A prompt that is computed whole finds no prefix, so again without its log probabilities.
    params = replace(params, prompt_logprobs=None, logprobs=None)
    again = run(engine, {name: (prompt, params) for name, (prompt, _) in requests.items()})
    assert engine.stats().prefix_cache_hits > 0
    with torch.inference_mode():
        for output in again.values():
            assert is_greedy(model, output.prompt_token_ids, output.outputs[0].token_ids)


def test_a_token_of_deepseek_v3_has_576_elements_a_layer(seed):
    """Hold what the paper says: 512 of the latent and 64 with RoPE, whatever the number of heads."""
    model = model_of(seed, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=40)
    runner = ModelRunner(model)
    expanded = runner.kv_shape(16).block_bytes
    runner.cache_latents()
    shape = runner.kv_shape(16)
    assert shape.block_bytes == 2 * 16 * (512 + 64) * 4
    assert expanded == 2 * 16 * 2 * 4 * 96 * 4


def test_what_expands_in_another_way_is_left_as_it_is(seed):
    model = model_of(seed)
    attention = model.model.layers[1].self_attn
    expand = attention.expand_kv

    def scaled(latents, rotary):
        keys, values = expand(latents, rotary)
        return keys, values * 1.01

    attention.expand_kv = scaled
    runner = ModelRunner(model)
    assert cache_latents(model, runner._layers) is None
    assert isinstance(attention.kv_b_proj, torch.nn.Linear)
    assert attention.expand_kv is scaled
    del attention.expand_kv
    assert cache_latents(model, runner._layers) == (24, 16)
    assert isinstance(attention.kv_b_proj, Expansion)


@pytest.mark.parametrize(
    "changes",
    [{"kv_lora_rank": 20}, {"kv_lora_rank": 520}, {"qk_rope_head_dim": 4}],
    ids=["odd latents", "large latents", "odd RoPE"],
)
def test_sizes_that_the_kernels_lack_are_expanded(seed, changes):
    runner = ModelRunner(model_of(seed, **changes))
    runner.cache_latents()
    assert not runner.kv_shape(16).latent


def test_a_quantised_cache_holds_keys_and_values(tmp_path, seed):
    model_of(seed, qk_nope_head_dim=24).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    engine = small_engine(str(tmp_path), kv_cache_dtype="int8")
    assert not engine._cache.shape.latent
    assert engine._cache.shape.dtype == torch.int8


def test_latents_are_taken_once():
    latents = Latents()
    of_layer = torch.zeros(1, 1, 2, 16), torch.ones(1, 1, 2, 8)
    assert latents.update(*of_layer, 3) == of_layer
    assert latents.get_seq_length() == 0
    assert latents.take(3) == of_layer
    with pytest.raises(KeyError):
        latents.take(3)
