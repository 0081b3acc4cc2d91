"""A tiny configuration of any causal language model of transformers, made by the names of its settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import tiny_models

# Classes that cannot be made of a configuration, or not of a tiny one, or not here.
NOT_BUILT = {
    "dots3_note": "its configuration is for one number of layers; its text model is dots3_note_text",
    "gemma3n": "its vision tower needs timm; its text model is gemma3n_text",
    "gemma4_assistant": "it drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values it reads",
    "musicgen": "transformers does not build it of its configuration",
    "musicgen_melody": "transformers does not build it of its configuration",
    "zamba": "transformers does not build a tiny one",
}
MODEL_TYPES = tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_BUILT)))
WINDOW = 8
_LAYERS, _HEADS, _HIDDEN = 2, 4, 64

# What a setting of this name is in a tiny model; those that a class does not have are left out.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"),
        tiny_models.VOCAB,
    ),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim"), _HIDDEN),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "n_inner"),
        96,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
        _LAYERS,
    ),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), _LAYERS),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
        ),
        _HEADS,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("swa_head_dim", "linear_head_dim", "v_head_dim", "swa_v_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions"),
        tiny_models.MAX_LEN,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "is_decoder": True,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), WINDOW),
    "hidden_size_per_layer_input": 8,
    "rotary_dim": 8,
    "attention_multiplier": 0.25,  # of the order of one over the root of the head size
    "image_size": 32,
    "word_embed_proj_dim": _HIDDEN,
    "num_mtp_layers": 0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": tiny_models.EOS,
}


def tiny_config(model_type: str) -> tf.PretrainedConfig:
    return _shrunk(tf.CONFIG_MAPPING[model_type], _OWN.get(model_type, {}))


def _shrunk(config_class: type[tf.PretrainedConfig], own: dict[str, Any]) -> tf.PretrainedConfig:
    names = {f.name for f in dataclasses.fields(config_class)}
    settings = {name: value for name, value in _SMALL.items() if name in names}
    for name, part in _parts(config_class).items():
        settings[name] = _shrunk(part, _OWN.get(part.model_type, {})).to_dict()
    return config_class(**settings | own)


def _parts(config_class: type[tf.PretrainedConfig]) -> dict[str, type[tf.PretrainedConfig]]:
    """The classes of the configurations in this one, as far as it has them by default."""
    if not config_class.sub_configs:
        return {}
    default = config_class()
    return {
        name: type(getattr(default, name))
        for name in config_class.sub_configs
        if isinstance(getattr(default, name, None), tf.PretrainedConfig)
    }


_MIXED = ["sliding_attention", "full_attention"]
_SHARED_KV = {"num_hidden_layers": 4, "layer_types": _MIXED * 2, "num_kv_shared_layers": 2}
# Settings that a class needs beside those that go by their names.
_MLA = {"num_key_value_heads": _HEADS, "head_dim": 8}  # as their own configurations have it
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _MLA),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _MLA),
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "cohere_compass_text": {
        "layer_types": _MIXED,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _MIXED},
    },
    "cpmant": {"dim_head": 16, "dim_ff": 96, "prompt_types": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": _HIDDEN},
    },
    "dots3_note": {"num_key_value_heads": _HEADS},
    "dots3_note_text": {"num_key_value_heads": _HEADS},
    "gemma3n_text": _SHARED_KV,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "moshi": {"audio_vocab_size": 32},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8, "mamba_d_state": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter, those that begin as zeros or ones too: a factor of one or a sink of zero would
    hide that it is not applied."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.1)
