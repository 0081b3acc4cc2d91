"""Models whose layers are not all of the kind that the paged cache serves."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from tests import tiny_models

from .harness import small_engine

FEW = {**tiny_models._COMMON, "num_hidden_layers": 2}
IDS = tiny_models._IDS
REFUSED = {
    "a convolution": (lambda: tf.Lfm2Config(**FEW, layer_types=["conv", "full_attention"]), "cache: 0$"),
    "linear attention": (
        lambda: tf.MiniMaxConfig(
            **FEW, head_dim=16, num_local_experts=2, layer_types=["full_attention", "linear_attention"]
        ),
        "cache: 1$",
    ),
    "a state beside attention": (
        lambda: tf.JambaConfig(
            **FEW, attn_layer_period=2, attn_layer_offset=1, num_experts=1, use_mamba_kernels=False
        ),
        "jamba has recurrent layers",
    ),
    "states alone": (
        lambda: tf.MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, state_size=8, **IDS),
        "mamba has recurrent layers",
    ),
    "attention of its own": (
        lambda: tf.BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4, **IDS),
        "bloom is not supported.* cache: 0, 1$",
    ),
    "values of another size than keys": (
        lambda: tf.DeepseekV3Config(
            **{**FEW, "num_key_value_heads": 4},
            first_k_dense_replace=2,
            kv_lora_rank=16,
            q_lora_rank=None,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
        ),
        "deepseek_v3 does not run on the paged cache",
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
