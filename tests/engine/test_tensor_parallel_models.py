"""Every class with a tensor parallel plan, divided among ranks, beside transformers' own forward."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from cupaged.engine import EngineConfig, LLMEngine
from cupaged.engine.distributed.launch import RankGroup
from cupaged.engine.distributed.plan import check_sizes
from tests import tiny_configs, tiny_models

from . import sweep
from .harness import SMALL, run

pytestmark = pytest.mark.matrix
SIZES = (2, 4)


@functools.cache
def planned() -> list[str]:
    """Return the classes for which transformers has a plan."""
    return [kind for kind in tiny_configs.MODEL_TYPES if _plan(tf.CONFIG_MAPPING[kind])]


def save(model_type: str, directory: Path, seed: int, num_kv_heads: int) -> None:
    """Write a tiny model of the type with a head for each rank, its weights drawn."""
    config = tiny_configs.tiny_config(model_type)
    of_text = config.get_text_config(decoder=True)
    kv_heads = getattr(of_text, "num_key_value_heads", None)
    if isinstance(kv_heads, int) and kv_heads != of_text.num_attention_heads:  # some demand as many
        of_text.num_key_value_heads = num_kv_heads
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tiny_configs.draw_weights(model, seed)
    model.save_pretrained(directory)
    tiny_models.tokenizer().save_pretrained(directory)


def _plan(config_class: Any) -> Any:
    parts = [config_class, *config_class.sub_configs.values()]
    return any(getattr(part, "base_model_tp_plan", None) for part in parts)


@pytest.fixture(scope="module", params=SIZES)
def group(request):
    config = EngineConfig(tensor_parallel_size=request.param, device="cpu")
    ranks = RankGroup(config, torch.device("cpu"))
    yield ranks
    ranks.close()
    assert ranks.failure is None


def refusal(directory: Path, size: int) -> str | None:
    """Return why a model does not divide, or None."""
    try:
        check_sizes(tf.AutoConfig.from_pretrained(directory).get_text_config(decoder=True), size)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("model_type", planned())
def test_a_class_with_a_plan_runs_as_in_transformers(model_type, group, tmp_path, seed):
    """Or it is refused with a reason, on all ranks: those of one device, or that it does not divide."""
    size = group.ranks.size
    save(model_type, tmp_path, seed, num_kv_heads=max(2, size))
    settings = {**SMALL, "tensor_parallel_size": size}
    try:
        LLMEngine(str(tmp_path), EngineConfig(**SMALL)).close()
    except ValueError:
        return  # docs/models.md has why
    if (why := refusal(tmp_path, size)) is not None:
        with pytest.raises(ValueError, match=re.escape(why)):
            LLMEngine(str(tmp_path), EngineConfig(**settings), group)
        return
    reference = sweep._reference(tmp_path)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(2, tiny_models.PAD, (sweep.PROMPT_TOKENS,), generator=generator).tolist()
    engine = LLMEngine(str(tmp_path), EngineConfig(**settings), group)
    output = run(engine, {"x": ({"prompt_token_ids": prompt}, sweep.GREEDY)})["x"]
    engine.close()
    sweep.assert_as_transformers(output, reference)
