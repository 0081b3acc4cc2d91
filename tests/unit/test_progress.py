"""Progress bars on the way to a server with the demo model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers.utils import logging

from cupaged.engine import EngineConfig, LLMEngine
from cupaged.engine.model import demo_model, loader
from cupaged.engine.model.progress import without_bars


@pytest.mark.parametrize("demo", [True, False])
def test_the_demo_model_is_loaded_without_a_bar(llama_dir, monkeypatch, capfd, demo):
    monkeypatch.setattr(loader, "demo_model_dir", lambda: llama_dir)
    config = EngineConfig(device="cpu", num_gpu_blocks_override=8, max_model_len=64)
    LLMEngine(None if demo else llama_dir, config)
    bars = re.findall(r"100%\|", capfd.readouterr().err)
    assert len(bars) == (0 if demo else 1)
    assert logging.is_progress_bar_enabled()


def test_bars_come_back_and_who_has_none_gets_none():
    with pytest.raises(ValueError, match="none"), without_bars():
        int("none")
    assert logging.is_progress_bar_enabled()
    with without_bars(), without_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()


def test_the_demo_model_is_converted_with_one_bar(monkeypatch, tmp_path, llama_dir, capfd):
    """That of transformers' own reader; what it draws beside that is left out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(path: Path, **options):
        model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(llama_dir)

    monkeypatch.setattr(demo_model.gguf_model, "load", load)
    demo_model.convert(tmp_path / "x.gguf", tmp_path / "converted")
    assert demo_model.is_whole(tmp_path / "converted")
    said = capfd.readouterr().err
    assert f"Converting {demo_model.NAME} (once)" in said
    assert "%|" not in said
