"""Tiny random models of the architectures the engine promises, as Hugging Face directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 320  # 256 bytes, then the special tokens, then ids that decode to nothing
PAD, EOS, START, END = 256, 257, 258, 259
WINDOW = 12
MAX_LEN = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}<start>{{ message['role'] }}: {{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant: {% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "initializer_range": 0.3,  # large, so that the greedy token is clear
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": MAX_LEN}
_IDS = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
_GEMMA = {**_COMMON, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}

CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**_COMMON),
    "qwen3": lambda: tf.Qwen3Config(**_COMMON, head_dim=16),
    "mistral": lambda: tf.MistralConfig(**_COMMON, sliding_window=WINDOW),
    "gemma2": lambda: tf.Gemma2Config(**_GEMMA),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gpt2": lambda: tf.GPT2Config(**_GPT2, **_IDS, initializer_range=0.3),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LEN,
        init_std=0.3,
        **_IDS,
    ),
}


def save(architecture: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a model with drawn float32 weights and a byte tokenizer; gives the directory.

    Args:
        changes: settings of the architecture's configuration.
    """
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    config.update(changes)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token a byte of UTF-8, so that any text is a prompt and a character can span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<eos>", "<start>", "<end>"])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )
