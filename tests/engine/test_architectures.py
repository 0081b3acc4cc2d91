"""Models whose layers are not all of the kind that the paged cache serves, or not the same in every batch."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf

from cupaged.engine import SamplingParams
from tests import tiny_models

from . import sweep
from .harness import run, small_engine

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
FEW = {**tiny_models._COMMON, "num_hidden_layers": 2}
IDS = tiny_models._IDS


def gemma4(**changes) -> tf.Gemma4TextConfig:
    settings = {
        **tiny_models._COMMON,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 16,
        "sliding_window": 8,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
        "tie_word_embeddings": False,
    }
    return tf.Gemma4TextConfig(**{**settings, **changes})


REFUSED = {
    "a convolution": (
        lambda: tf.Lfm2Config(**FEW, layer_types=["conv", "full_attention"]),
        "keys and values: 0;",
    ),
    "linear attention": (
        lambda: tf.MiniMaxConfig(
            **FEW, head_dim=16, num_local_experts=2, layer_types=["full_attention", "linear_attention"]
        ),
        "keys and values: 1;",
    ),
    "a state beside attention": (
        lambda: tf.JambaConfig(
            **FEW, attn_layer_period=2, attn_layer_offset=1, num_experts=1, use_mamba_kernels=False
        ),
        "jamba is not supported: it has recurrent layers",
    ),
    "a mask of its own": (
        lambda: tf.DogeConfig(**FEW, keep_window_size=8),
        "doge is not supported: DogeAttention attends with a mask of its own",
    ),
    "attention to what comes later": (
        lambda: tf.Gemma3TextConfig(**FEW, head_dim=16, use_bidirectional_attention=True),
        "Gemma3Attention attends to later tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_with_other_layers_is_refused(tmp_path, name):
    """It would run, mix the requests of a step and forget those before it."""
    config, message = REFUSED[name]
    tf.AutoModelForCausalLM.from_config(config(), dtype=torch.float32).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        small_engine(str(tmp_path))


def test_the_frequencies_are_those_of_max_model_len_in_every_batch(tmp_path):
    """Of a model with two sets, one for sequences of up to 64 tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    directory = str(tiny_models.save("llama", tmp_path, rope_parameters=rope))
    short, long = ([(3 * i * i + 7 * i) % 256 for i in range(length)] for length in (30, 100))
    outputs = {}
    for max_model_len in (64, 128):
        engine = small_engine(directory, max_model_len=max_model_len, max_num_batched_tokens=256)
        alone = run(engine, {"x": ({"prompt_token_ids": short}, GREEDY)})["x"].outputs
        outputs[max_model_len] = alone[0].token_ids
        if max_model_len > 64:
            both = {"long": ({"prompt_token_ids": long}, GREEDY), "x": ({"prompt_token_ids": short}, GREEDY)}
            found = run(engine, both)
            assert found["x"].outputs == alone
            outputs[100] = found["long"].outputs[0].token_ids
    model = tf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    for length, prompt in ((64, short), (100, long)):  # each within one set from its first token to its last
        generated = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert outputs[length] == generated[0, len(prompt) :].tolist()
    assert outputs[128] != outputs[64]


@pytest.mark.parametrize(
    "changes",
    [
        {"global_head_dim": 16},
        {"global_head_dim": 16, "num_kv_shared_layers": 2},
        {"global_head_dim": 32, "num_kv_shared_layers": 2},
        {"global_head_dim": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ],
    ids=["one size", "shared", "two sizes", "fewer heads"],
)
def test_gemma4_whose_layers_differ(tmp_path, changes):
    """The last layers may take the keys and values of those before them, and some be wider than others."""
    assert_greedy_as_transformers(gemma4(**changes), tmp_path)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.matrix
def test_padded_layers_under_preemption(tmp_path, mode, seed):
    """Requests that begin alike, in a memory that is too small for them."""
    sweep.save("mimo_v2_flash", tmp_path, seed)
    rng = random.Random(seed)
    common = [rng.randrange(tiny_models.PAD) for _ in range(20)]
    prompts = [common + [rng.randrange(tiny_models.PAD) for _ in range(10)] for _ in range(8)]
    params = replace(sweep.GREEDY, max_tokens=24)
    requests = {str(i): ({"prompt_token_ids": prompt}, params) for i, prompt in enumerate(prompts)}
    engine = small_engine(str(tmp_path), preemption_mode=mode, num_gpu_blocks_override=12, max_model_len=64)
    outputs = run(engine, requests)
    assert engine.stats().num_preemptions > 0
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for output in outputs.values():
        sweep.assert_as_transformers(output, model)


def assert_greedy_as_transformers(config: tf.PretrainedConfig, directory: Path) -> None:
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tiny_models.tokenizer().save_pretrained(directory)
    prompt = [(3 * i * i + 7 * i) % 256 for i in range(40)]
    request = {"x": ({"prompt_token_ids": prompt}, GREEDY)}
    found = run(small_engine(str(directory)), request)["x"].outputs[0].token_ids
    model = tf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert found == generated[0, len(prompt) :].tolist()
