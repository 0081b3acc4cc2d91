"""Python files that come with a model run only where that was asked for, and nobody is asked in between."""

from __future__ import annotations

import builtins
import json

import pytest

from cupaged.engine import LLM, SamplingParams
from cupaged.engine.model import loader
from tests import tiny_models

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

open({marker!r}, "w").close()

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""


def odd_model(directory, parts):
    """A Llama whose classes come with it; gives the file that running its code would write."""
    marker = directory / "ran"
    tiny_models.save("llama", directory)
    (directory / "odd.py").write_text(CODE.format(marker=str(marker)))
    if "model" in parts:
        config = json.loads((directory / "config.json").read_text())
        config["model_type"] = "odd"
        config["auto_map"] = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
        (directory / "config.json").write_text(json.dumps(config))
    if "tokenizer" in parts:
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config["tokenizer_class"] = "OddTokenizer"
        config["auto_map"] = {"AutoTokenizer": [None, "odd.OddTokenizer"]}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return marker


@pytest.fixture(autouse=True)
def _nobody_to_ask(monkeypatch, tmp_path):
    def ask(*question):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("parts", [["model"], ["tokenizer"], ["model", "tokenizer"]], ids=str)
def test_code_that_is_not_trusted_is_refused_by_the_flag_that_trusts_it(tmp_path, parts):
    directory = tmp_path / "odd"
    marker = odd_model(directory, parts)
    with pytest.raises(ValueError, match=r"--trust-remote-code \(trust_remote_code=True\)") as caught:
        LLM(directory, device="cpu", num_gpu_blocks_override=8)
    assert str(directory) in str(caught.value)
    assert not marker.exists()


def test_trusted_code_runs(tmp_path):
    directory = tmp_path / "odd"
    marker = odd_model(directory, ["model", "tokenizer"])
    settings = {"device": "cpu", "num_gpu_blocks_override": 8}
    llm = LLM(directory, trust_remote_code=True, **settings)
    assert marker.exists()
    assert type(llm.engine.tokenizer).__name__ == "OddTokenizer"
    greedy = SamplingParams(temperature=0, max_tokens=5)
    plain = LLM(tiny_models.save("llama", tmp_path / "plain"), **settings)
    outputs = [one.generate("text", greedy, use_tqdm=False)[0].outputs[0].token_ids for one in (llm, plain)]
    assert outputs[0] == outputs[1]


def test_a_model_that_transformers_has_needs_no_trust(tmp_path):
    """Code is not run where transformers has its own, as for models whose code came with them at first."""
    directory = tmp_path / "llama"
    marker = odd_model(directory, ["model"])
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    model, _ = loader.load_model(str(directory), dtype="auto", device="cpu", attn_implementation="sdpa")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not marker.exists()
