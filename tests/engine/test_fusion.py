"""Fused layers: the same logits, few operations, and what computes something else is left as it is."""

from __future__ import annotations

import copy
import gc
import logging
import re
import weakref
from pathlib import Path

import pytest
import torch
import transformers as tf

import cupaged
from cupaged.engine import EngineConfig, LLMEngine, SamplingParams, explain
from cupaged.engine.model.attention import ATTENTION_NAME, register_attention
from cupaged.engine.model.fusion import fuse_model, layer_operations
from cupaged.engine.model.model_runner import ModelRunner
from tests import tiny_configs, tiny_models

from . import sweep
from .harness import run, small_engine

FEW_OPERATIONS = ("llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text")
EVERY_DAY = {
    *FEW_OPERATIONS,
    "qwen2_moe",  # biases, and MLPs beside experts
    "glm4",  # interleaved pairs, some of the dimensions
    "cohere2",  # layers without positions, and a layout of cosines of its own
    "gpt_oss",  # sinks
    "olmo2",  # norms of whole projections
    "phi",  # LayerNorm
}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
BLOCK_SIZE = 8


def built(config: tf.PretrainedConfig, seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return a model with drawn weights and the paged attention."""
    register_attention()
    model = tf.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=ATTENTION_NAME
    )
    tiny_configs.draw_weights(model, seed)
    return model.to(dtype).eval().requires_grad_(False)


def tiny(model_type: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return built(tiny_configs.tiny_config(model_type), seed, dtype)


def fused(model: torch.nn.Module):
    """Fuse a model.

    Returns:
        The report, and the logits before and after.
    """
    proof = ModelRunner(model).proof(BLOCK_SIZE)
    before = proof.logits()
    report = fuse_model(model, proof).report
    return report, before, proof.logits()


@pytest.mark.parametrize("model_type", FEW_OPERATIONS)
def test_a_layer_takes_at_most_ten_operations_in_decode(model_type, seed):
    model = tiny(model_type, seed)
    proof = ModelRunner(model).proof(BLOCK_SIZE)
    assert min(len(names) for names in layer_operations(model, proof)) > 25
    fuse_model(model, proof)
    operations = layer_operations(model, proof)
    assert len(operations) == model.config.num_hidden_layers
    assert max(len(names) for names in operations) <= 10
    assert all(names.count("paged_attention") == 1 for names in operations)
    assert all(sum("mm" in name.split("_") for name in names) == 4 for names in operations)


TABLE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
SERVED = [
    pytest.param(kind, marks=() if kind in EVERY_DAY else pytest.mark.matrix)
    for kind in tiny_configs.MODEL_TYPES
    if sweep.row(kind, None) in TABLE.splitlines()
]


@pytest.mark.parametrize("model_type", SERVED)
def test_greedy_tokens_are_the_same(model_type, tmp_path, seed):
    """`test_model_sweep` compares all log probabilities of fused models with those of transformers."""
    sweep.save(model_type, tmp_path, seed)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(2, tiny_models.PAD, (29,), generator=generator).tolist()
    outputs = []
    for fuse in (False, True):
        engine = small_engine(str(tmp_path), fuse=fuse)
        outputs.append(run(engine, {"x": ({"prompt_token_ids": prompt}, GREEDY)})["x"].outputs[0].token_ids)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("model_type", SERVED)
def test_bfloat16_logits_are_as_close_as_those_of_torch(model_type, seed):
    """Every expert is used: to choose others is no rounding error."""
    config = tiny_configs.tiny_config(model_type)
    for name in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"):
        if hasattr(config, name):
            setattr(config, name, 4)
    model = built(config, seed, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    wanted = ModelRunner(exact).proof(BLOCK_SIZE).logits()
    report, before, after = fused(model)
    assert report.undone is None
    error, own_error = (after - wanted).norm(), (before - wanted).norm()
    assert error <= 2 * own_error


def change(module: torch.nn.Module, forward) -> None:
    """Give a module another forward, which gets the former one as its first argument but ``self``."""
    former = type(module).forward

    def changed(self, *args, **kwargs):
        return forward(self, former, *args, **kwargs)

    module.__class__ = type("Almost", (type(module),), {"forward": changed})


def later_scaled(self, former, hidden_states, position_ids, **keywords):
    factor = 1 + 0.1 * (position_ids[..., None] > 100)
    hidden_states = hidden_states * factor.to(hidden_states.dtype)
    return former(self, hidden_states, position_ids=position_ids, **keywords)


def turned_back(self, former, hidden_states, position_embeddings, **keywords):
    cos, sin = position_embeddings
    return former(self, hidden_states, position_embeddings=(cos, -sin), **keywords)


def scaled_output(self, former, hidden_states, **keywords):
    output, weights = former(self, hidden_states, **keywords)
    return output * 1.01, weights


def gated(self, former, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-7, 7))


def root_apart(self, former, x):
    return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


# Parts of a Llama layer that compute almost what they seem to.
ALMOST = {
    "norm that scales": ("input_layernorm", lambda self, former, x: former(self, x) * 1.01),
    "norm that shifts": ("input_layernorm", lambda self, former, x: former(self, x) + 1e-3),
    "norm that bounds": ("input_layernorm", lambda self, former, x: former(self, x).clamp(-2, 2)),
    "norm about the mean": ("input_layernorm", lambda self, f, x: f(self, x - x.mean(-1, keepdim=True))),
    "norm with epsilon outside the root": ("input_layernorm", root_apart),
    "MLP that scales": ("mlp", lambda self, former, x: former(self, x) * 1.01),
    "MLP that bounds": ("mlp", gated),
    "MLP of another input": ("mlp", lambda self, former, x: former(self, x * 1.01)),
    "attention that scales by position": ("self_attn", later_scaled),
    "attention that turns back": ("self_attn", turned_back),
    "attention that scales": ("self_attn", scaled_output),
    "layer that scales": ("", lambda self, former, x, **keywords: former(self, x, **keywords) * 1.01),
    "layer that adds": ("", lambda self, former, x, **keywords: former(self, x, **keywords) + x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALMOST)
def test_what_computes_something_else_is_left_as_it_is(name, dtype, seed, caplog):
    model = tiny("llama", seed, dtype)
    part, forward = ALMOST[name]
    layer = model.model.layers[0]
    module = layer.get_submodule(part)
    change(module, forward)
    with caplog.at_level(logging.INFO, "cupaged.engine"):
        report, before, after = fused(model)
    assert report.undone is None
    assert [record.getMessage() for record in caplog.records] == [report.line()]
    assert "forward" not in vars(module)
    assert "Almost" in report.line()
    assert report.fused["layers"] == (2 if part == "mlp" else 1)
    if dtype == torch.float32:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_scale_by_late_positions_is_seen(tmp_path, seed):
    """Scale queries as no position below 32 has it."""
    config = tiny_configs.tiny_config("ministral3")
    config.rope_parameters = {**config.rope_parameters, "original_max_position_embeddings": 32}
    report, before, after = fused(built(config, seed))
    assert report.undone is None
    assert "attentions" not in report.fused
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


ROPE = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("rope_type", ROPE)
def test_frequencies_are_those_of_transformers(rope_type, seed):
    config = tiny_configs.tiny_config("llama")
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE[rope_type]}
    report, before, after = fused(built(config, seed))
    assert report.fused["layers"] == config.num_hidden_layers
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def flipped(rope_and_cache):
    return lambda *a, interleaved, **k: rope_and_cache(*a, interleaved=not interleaved, **k)


def without_last(rope_and_cache):
    def wrong(query, key, value, cos, sin, kv_cache, slots, **keywords):
        slots = torch.cat((slots[:-1], slots.new_full((1,), -1)))
        rope_and_cache(query, key, value, cos, sin, kv_cache, slots, **keywords)

    return wrong


WRONG = {
    "norm": ("rms_norm", lambda right: lambda x, w, **k: right(x, torch.ones_like(w), **k)),
    "sum": ("rms_norm", lambda right: lambda x, w, residual=None, input_weight=None, **k: right(x, w, **k)),
    "halves": ("act_and_mul", lambda right: lambda x, **k: right(torch.cat(x.chunk(2, -1)[::-1], -1), **k)),
    "pairs": ("rope_and_cache", flipped),
    "slots": ("rope_and_cache", without_last),
    "error": ("act_and_mul", lambda right: lambda x, activation: right(x, activation="relu")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_logits_put_everything_back(name, dtype, seed, monkeypatch, caplog):
    """As if an operator were wrong on some machine."""
    model = tiny("llama", seed, dtype)
    draw_apart(model, seed)
    parameters = dict(model.named_parameters())
    values = {key: value.clone() for key, value in parameters.items()}
    operator, wrong = WRONG[name]
    monkeypatch.setattr(cupaged, operator, wrong(getattr(cupaged, operator)), raising=False)
    with caplog.at_level(logging.INFO, "cupaged.engine"):
        report, before, after = fused(model)
    assert report.undone
    assert not report.fused
    assert [record.getMessage() for record in caplog.records] == [report.line()]
    assert after.equal(before)
    assert dict(model.named_parameters()) == parameters
    assert all(values[key].equal(value) for key, value in model.named_parameters())


def draw_apart(model: torch.nn.Module, seed: int) -> None:
    """Draw weights so large that every part of a layer counts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise * 0.3 if parameter.dim() > 1 else 1 + noise)


class Derived(torch.nn.Linear):
    """May compute anything."""


def hook(layer: torch.nn.Module) -> None:
    layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: output * 2)


def derive(layer: torch.nn.Module) -> None:
    layer.self_attn.q_proj.__class__ = Derived


def override(layer: torch.nn.Module) -> None:
    forward = layer.self_attn.q_proj.forward
    layer.self_attn.q_proj.forward = lambda x: forward(x) * 2


@pytest.mark.parametrize("alter", [hook, derive, override])
def test_altered_linear_layers_are_left_as_they_are(alter, seed):
    model = tiny("llama", seed)
    layer = model.model.layers[0]
    alter(layer)
    report, before, after = fused(model)
    assert report.undone is None
    assert "q_proj" in layer.self_attn._modules
    assert "LlamaAttention (" in report.line()
    assert (report.fused["attentions"], report.fused["layers"], report.fused["MLPs"]) == (1, 1, 2)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_module_in_two_places_is_left_as_it_is(seed):
    model = tiny("llama", seed)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    report, before, after = fused(model)
    assert report.undone is None
    assert "LlamaMLP (it is used in several places)" in report.line()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_the_plain_weights_are_gone(seed):
    """The merged ones too, where they are packed: one after the other, before the next is packed."""
    model = tiny("llama", seed, torch.bfloat16)
    runner = ModelRunner(model)
    plain = [
        weakref.ref(module)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head
    ]
    num_bytes = sum(p.nbytes for p in model.parameters())
    runner.rewrite(BLOCK_SIZE)
    gc.collect()
    alive = [reference() for reference in plain if reference() is not None]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert not alive
        large = [p for p in model.parameters() if p.dim() > 1]
        assert large == [model.get_input_embeddings().weight]
    else:
        assert len(alive) == 2 * model.config.num_hidden_layers
        assert sum(p.nbytes for p in model.parameters()) == num_bytes


def test_fusing_can_be_turned_off(llama_dir):
    for fuse in (True, False):
        engine = LLMEngine(llama_dir, EngineConfig(device="cpu", num_gpu_blocks_override=8, fuse=fuse))
        layers = engine._runner._model.model.layers
        assert all(("forward" in vars(layer)) == fuse for layer in layers)


def test_the_command_lists_what_is_fused(llama_dir, capsys):
    assert explain.main([llama_dir, "--device", "cpu", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "fused: 3 layers" in printed
    assert re.search(r"operations a layer in decode: \d+ before, 10 now", printed)
    assert "  rope_and_cache\n" in printed
    assert explain.main(["/no/such/model"]) == 1
    assert "error: " in capsys.readouterr().err
