"""What is found of a model's attention before there is an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from cupaged.engine.model.attention_probe import SUPPORTED, LayerAttention, probe_layers
from cupaged.engine.model.model_runner import ModelRunner
from tests import tiny_configs, tiny_models


def windows(model_type: str, **entries: Any) -> list[int | None]:
    config = tiny_configs.tiny_config(model_type)
    for name, value in entries.items():
        setattr(config, name, value)
    model = tf.AutoModelForCausalLM.from_config(config)
    return [layer.window for layer in probe_layers(model, config.max_position_embeddings)]


def llama(**changes: Any) -> torch.nn.Module:
    config = tiny_models.CONFIGS["llama"]()
    config.update(changes)
    return tf.AutoModelForCausalLM.from_config(config)


def test_a_window_is_the_masks_not_the_configurations(seed):
    window = 1 + seed % 40
    assert windows("llama", sliding_window=window) == [None, None]
    assert windows("llama", sliding_window=window, use_sliding_window=False) == [None, None]
    assert windows("mistral", sliding_window=window) == [window, window]
    assert windows("phimoe", sliding_window=window) == [window, window]
    kinds = ["full_attention", "sliding_attention"]
    assert windows("olmo3", sliding_window=window, layer_types=kinds) == [None, window]
    assert windows("qwen2_moe", sliding_window=window, layer_types=kinds) == [None, window]
    assert windows("moshi", sliding_window=window) == [None, None]


@pytest.mark.parametrize("window", [4095, 4096, 131072, 131073])
def test_windows_as_large_as_they_come(window):
    found = windows("mistral", sliding_window=window, max_position_embeddings=131072)
    assert found == [window if window < 131072 else None] * 2


def test_chunks_are_refused_unless_a_sequence_is_one():
    with pytest.raises(ValueError, match="Llama4TextAttention attends in chunks of 100 tokens"):
        windows("llama4_text", attention_chunk_size=100)
    assert windows("llama4_text", attention_chunk_size=tiny_models.MAX_LEN) == [None, None]


def test_the_shape_is_that_of_the_keys():
    runner = ModelRunner(tf.AutoModelForCausalLM.from_config(tiny_configs.tiny_config("dbrx")))
    shape = runner.kv_shape(16)
    assert (shape.num_layers, shape.num_kv_heads, shape.head_size) == (2, 2, 16)


def test_the_shape_is_that_of_the_widest_layer():
    """Take the longer of keys and values, rounded up to what the kernels take."""
    config = tiny_configs.tiny_config("mimo_v2_flash")
    config.update({"head_dim": 12, "v_head_dim": 20})
    runner = ModelRunner(tf.AutoModelForCausalLM.from_config(config))
    shape = runner.kv_shape(16)
    assert (shape.num_kv_heads, shape.head_size) == (4, 24)
    assert [(each.num_kv_heads, each.head_size, each.value_size) for each in runner._layers] == [
        (2, 20, 20),
        (4, 20, 20),
    ]


def test_the_model_is_left_as_it_was():
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        expected = [LayerAttention(layer.self_attn, 4, 2, 16, 16, None) for layer in model.model.layers]
        assert probe_layers(model, None) == tuple(expected)
        assert model.config._attn_implementation == implementation
        model.model.layers[1].self_attn.layer_idx = 0
        with pytest.raises(ValueError, match="attends twice in layer 0"):
            probe_layers(model, None)
        assert model.config._attn_implementation == implementation
        model.model.layers[1].self_attn.layer_idx = 1
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_passes_from_token_to_token_beside_the_attention_is_seen(dtype):
    """A convolution, a token shift or an n-gram embedding would lose what is not in the step."""
    model = llama(num_hidden_layers=8).to(dtype)
    probe_layers(model, None)
    mlp = model.model.layers[5].mlp
    usual = mlp.forward
    mlp.forward = lambda x: usual(x + 0.5 * x.roll(1, dims=1))
    with pytest.raises(ValueError, match="its tokens depend on those before them beside the attention"):
        probe_layers(model, None)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"position_bias": torch.zeros(1)}, r"position_bias \(numbers added to the logits\)"),
        ({"indices": torch.zeros(1), "novelty": 1}, r"indices \(sparse attention.*\), novelty"),
    ],
)
def test_an_attention_that_needs_more_is_refused_by_what_it_needs(keywords, message):
    model = llama()
    attention = model.model.layers[2].self_attn
    usual = attention.forward
    attention.forward = lambda **given: usual(**given, **keywords)
    with pytest.raises(
        ValueError, match=f"^llama is not supported: LlamaAttention attends with {message}; "
    ) as e:
        ModelRunner(model)
    assert str(e.value).endswith(SUPPORTED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask + 1, "with a mask of its own"),
        (lambda mask: None, "without a mask, to later tokens as well"),
    ],
)
def test_a_mask_that_transformers_did_not_make_is_refused(change, message):
    model = llama()
    attention = model.model.layers[2].self_attn
    usual = attention.forward
    attention.forward = lambda attention_mask, **given: usual(attention_mask=change(attention_mask), **given)
    with pytest.raises(ValueError, match=message):
        ModelRunner(model)


def test_a_slice_of_a_mask_keeps_its_rule():
    model = llama()
    attention = model.model.layers[2].self_attn
    usual = attention.forward
    attention.forward = lambda attention_mask, **given: usual(attention_mask=attention_mask[..., :3], **given)
    assert len(probe_layers(model, None)) == 3


@pytest.mark.parametrize("error", [AttributeError, TypeError, IndexError, KeyError, RuntimeError])
def test_code_that_fails_is_a_refusal(error):
    model = llama()

    def fail(**_):
        raise error("out of order")

    model.model.layers[0].self_attn.forward = fail
    with pytest.raises(ValueError, match=f"^llama is not supported: its code fails with {error.__name__}: "):
        ModelRunner(model)
