"""Every causal language model class of transformers: its own tokens, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as tf

from tests import tiny_configs

from . import sweep

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
EVERY_DAY = {
    "llama",  # plain: windows in its configuration are stray
    "olmo3",  # windows by layer_types
    "phimoe",  # a window that its attention is not told of
    "qwen2_moe",
    "moshi",  # a window in its configuration that is not in its mask
    "gemma2",  # soft caps
    "gpt_oss",  # sinks
    "dbrx",  # the number of its KV heads is elsewhere in its configuration
    "llama4_text",  # chunks
    "bloom",  # ALiBi
    "deepseek_v3",  # values of another size than keys
    "deepseek_v32",  # sparse attention
    "inkling_text",  # position biases
    "mamba",
}
MODELS = [
    pytest.param(kind, marks=() if kind in EVERY_DAY else pytest.mark.matrix)
    for kind in tiny_configs.MODEL_TYPES
]


@pytest.mark.parametrize("model_type", MODELS)
def test_tokens_are_those_of_transformers_or_the_model_is_refused(model_type, tmp_path, seed):
    found = sweep.outcomes(model_type, tmp_path, seed, sweep.STRAY)
    assert sweep.row(model_type, found[sweep.AS_IT_IS]) in TABLE.read_text().splitlines()


def test_the_table_has_every_class_of_this_transformers():
    text = TABLE.read_text()
    assert f"transformers {tf.__version__} " in text
    listed = {line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")}
    expected = {*tiny_configs.MODEL_TYPES, *tiny_configs.NOT_BUILT}
    assert listed - {"`model_type`"} == expected
    assert set(tiny_configs.MODEL_TYPES) >= EVERY_DAY
