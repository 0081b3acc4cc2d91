"""The fused operators apart from drawn input: bad input, torch.library, and what models compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cupaged
from cupaged import backends
from cupaged.backends import reference
from cupaged.quantisation import LARGEST

from .test_ops import Seen, opcheck

CACHE_DTYPES = [torch.float32, *LARGEST]


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setattr(backends, "for_device", lambda device_type: reference)


@pytest.fixture(params=["reference", "cpu"])
def backend(request, monkeypatch):
    module = backends.load(request.param)
    monkeypatch.setattr(backends, "for_device", lambda device_type: module)


def norm(**changes) -> dict:
    """Valid arguments of `rms_norm`."""
    arguments = {"input": torch.randn(3, 20), "weight": torch.randn(20), "residual": torch.randn(3, 20)}
    arguments.update(changes)
    return arguments


def rope(**changes) -> dict:
    """Valid arguments of `rope_and_cache`: 4 query and 2 KV heads."""
    qkv = torch.randn(3, 8, 32)
    angles = torch.rand(3, 16)
    arguments = {
        "query": qkv[:, :4],
        "key": qkv[:, 4:6],
        "value": qkv[:, 6:],
        "cos": angles.cos(),
        "sin": angles.sin(),
        "kv_cache": torch.randn(5, 2, 2, 8, 32),
        "slot_mapping": torch.tensor([3, -1, 39]),
    }
    arguments.update(changes)
    return arguments


BAD_NORM = {
    "rank": ({"input": torch.randn(3, 4, 20)}, "input must have 2 dimensions"),
    "dtype": ({"input": torch.zeros(3, 20).int()}, "input must be torch.float32 or torch.float16 or"),
    "strides": ({"input": torch.randn(20, 3).T}, r"input must be contiguous.*pass input.contiguous\(\)"),
    "weight": ({"weight": torch.randn(21)}, r"weight must be \[C\] with C = 20"),
    "weight dtype": ({"weight": torch.randn(20).half()}, "weight must be torch.float32, got torch.float16"),
    "weight strides": ({"weight": torch.randn(40)[::2]}, r"weight must be contiguous"),
    "residual": ({"residual": torch.randn(4, 20)}, "residual must be .* with T = 3"),
    "residual dtype": ({"residual": torch.randn(3, 20).half()}, "residual must be torch.float32"),
    "residual rows": ({"residual": torch.randn(20).expand(3, 20)}, "the rows of residual overlap"),
    "input_weight": ({"input_weight": torch.randn(2, 20)}, "input_weight must have 1 dimension"),
    "input_weight dtype": ({"input_weight": torch.randn(20).half()}, "input_weight must be torch.float32"),
    "no residual": (
        {"residual": None, "input_weight": torch.randn(20)},
        "input_weight is for the norm before a residual is added; pass residual too",
    ),
    "out": ({"out": torch.empty(3, 21)}, "out must be .* with C = 20"),
    "out dtype": ({"out": torch.empty(3, 20).half()}, "out must be torch.float32"),
    "out rows": ({"out": torch.empty(20).expand(3, 20)}, "the rows of out overlap"),
    "device": ({"weight": torch.empty(20, device="meta")}, "weight must be on cpu"),
    "epsilon": ({"epsilon": -1e-6}, "epsilon must be a finite number of at least 0, got -1e-06"),
    "no epsilon": ({"epsilon": None}, "epsilon must be a finite number"),
    "epsilon text": ({"epsilon": "1e-6"}, "epsilon must be a finite number"),
    "offset": ({"weight_offset": float("nan")}, "weight_offset must be a finite number"),
    "offset bool": ({"weight_offset": True}, "weight_offset must be a finite number"),
}


@pytest.mark.parametrize("name", BAD_NORM)
def test_bad_input_of_rms_norm_is_named(name):
    changes, message = BAD_NORM[name]
    arguments = norm(**changes)
    before = None if arguments["residual"] is None else arguments["residual"].clone()
    with pytest.raises(ValueError, match=message):
        cupaged.rms_norm(**arguments)
    assert before is None or torch.equal(arguments["residual"], before)


def test_out_and_residual_are_two_tensors():
    arguments = norm()
    with pytest.raises(ValueError, match="out must not be residual"):
        cupaged.rms_norm(**arguments, out=arguments["residual"])


BAD_ACTIVATION = {
    "name": ({"activation": "relu"}, "activation must be one of silu, gelu, gelu_tanh, got 'relu'"),
    "no name": ({"activation": None}, "activation must be one of silu"),
    "function": ({"activation": torch.nn.functional.silu}, "activation must be one of silu"),
    "odd": ({"input": torch.randn(3, 21)}, r"input must be \[T, 2I\], gate and up side by side"),
    "rank": ({"input": torch.randn(20)}, "input must have 2 dimensions"),
    "dtype": ({"input": torch.zeros(3, 20).double()}, "input must be torch.float32 or"),
    "strides": ({"input": torch.randn(20, 4).T}, "input must be contiguous in its last dimension"),
    "out": ({"out": torch.empty(3, 20)}, "out must be .* with I = 10"),
    "out dtype": ({"out": torch.empty(3, 10).half()}, "out must be torch.float32"),
    "out rows": ({"out": torch.empty(10).expand(3, 10)}, "the rows of out overlap"),
}


@pytest.mark.parametrize("name", BAD_ACTIVATION)
def test_bad_input_of_act_and_mul_is_named(name):
    changes, message = BAD_ACTIVATION[name]
    with pytest.raises(ValueError, match=message):
        cupaged.act_and_mul(**{"input": torch.randn(3, 20), "activation": "silu", **changes})


BAD_ROPE = {
    "query": ({"query": torch.randn(2, 4, 32)}, "query must be .* with T = 3"),
    "query size": ({"query": torch.randn(3, 4, 16)}, "query must be .* with D = 32"),
    "query dtype": ({"query": torch.randn(3, 4, 32).half()}, "query must be torch.float32"),
    "query rows": ({"query": torch.randn(3, 1, 32).expand(3, 4, 32)}, "the rows of query overlap"),
    "key": ({"key": torch.randn(3, 3, 32)}, "key must be .* with Hkv = 2"),
    "value": ({"value": torch.randn(3, 2, 64)[..., ::2]}, "value must be contiguous in its last dimension"),
    "no cos": ({"cos": None}, "cos is missing: pass both sin and cos, or neither"),
    "no sin": ({"sin": None}, "sin is missing: pass both cos and sin, or neither"),
    "wide cos": (
        {"cos": torch.randn(3, 32), "sin": torch.randn(3, 32)},
        r"cos has 32 columns.*a head of size 32 has 16 pairs; pass cos\[:, :16\] if its halves repeat",
    ),
    "cos": ({"cos": torch.randn(2, 16)}, "cos must be .* with T = 3"),
    "cos dtype": ({"cos": torch.randn(3, 16).half()}, "cos must be torch.float32, got torch.float16"),
    "sin": ({"sin": torch.randn(3, 8)}, "sin must be .* with R/2 = 16"),
    "sin strides": ({"sin": torch.randn(16, 3).T}, "sin must be contiguous"),
    "slots": ({"slot_mapping": torch.arange(3).int()}, r"slot_mapping must be torch\.int64"),
    "slot": ({"slot_mapping": torch.tensor([0, 40, 1])}, "slot_mapping must be from -1 to 39"),
    "one weight": ({"query_weight": torch.randn(32)}, "key_weight is missing: pass both query_weight and"),
    "other weight": ({"key_weight": torch.randn(32)}, "query_weight is missing"),
    "weights": (
        {"query_weight": torch.randn(32), "key_weight": torch.randn(64)},
        r"key_weight must be \[D\] with D = 32",
    ),
    "weight dtypes": (
        {"query_weight": torch.randn(32), "key_weight": torch.randn(32).half()},
        "key_weight must be torch.float32, got torch.float16",
    ),
    "scale": ({"k_scale": torch.ones(2)}, "k_scale is for quantised caches"),
    "no scale": ({"kv_cache": torch.zeros(5, 2, 2, 8, 32).to(torch.int8)}, "k_scale is missing"),
    "scale value": (
        {
            "kv_cache": torch.zeros(5, 2, 2, 8, 32).to(torch.int8),
            "k_scale": torch.ones(2),
            "v_scale": torch.tensor([1.0, 0.0]),
        },
        "v_scale must be positive and finite",
    ),
    "interleaved": ({"interleaved": 1}, "interleaved must be True or False, got 1"),
    "epsilon": ({"epsilon": float("inf")}, "epsilon must be a finite number"),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", BAD_ROPE)
def test_bad_input_of_rope_and_cache_is_named(name):
    changes, message = BAD_ROPE[name]
    arguments = rope(**changes)
    before = arguments["query"].clone(), arguments["kv_cache"].clone()
    with pytest.raises(ValueError, match=message):
        cupaged.rope_and_cache(**arguments)
    assert torch.equal(arguments["query"], before[0])
    assert torch.equal(arguments["kv_cache"].view(torch.uint8), before[1].view(torch.uint8))


def test_bad_input_is_named_with_fake_tensors():
    with FakeTensorMode() as mode:

        def fake(arguments):
            return {name: mode.from_tensor(value) for name, value in arguments.items()}

        assert cupaged.rms_norm(**fake(norm())).shape == (3, 20)
        assert cupaged.act_and_mul(torch.empty(3, 20), activation="gelu").shape == (3, 10)
        cupaged.rope_and_cache(**fake(rope()))
        with pytest.raises(ValueError, match="residual must be"):
            cupaged.rms_norm(**fake(norm(residual=torch.randn(4, 20))))
        with pytest.raises(ValueError, match="sin must be"):
            cupaged.rope_and_cache(**fake(rope(sin=torch.randn(3, 8))))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_opcheck(cache_dtype):
    operators = torch.ops.cupaged
    x, weight = torch.randn(3, 20), torch.randn(20)
    for residual, input_weight in ((None, None), (torch.randn(3, 20), None), (torch.randn(3, 20), weight)):
        arguments = (x, weight, 1e-6, 1.0, residual, input_weight, torch.zeros(3, 20))
        opcheck(operators.rms_norm.default, arguments)
    opcheck(operators.act_and_mul.default, (x, "gelu_tanh", torch.zeros(3, 10)))
    quantised = cache_dtype != torch.float32
    scales = (torch.ones(2), torch.ones(2)) if quantised else (None, None)
    arguments = rope(kv_cache=torch.zeros(5, 2, 2, 8, 32).to(cache_dtype))
    arguments["query"] = arguments["query"].contiguous()
    weights = torch.rand(2, 32)
    opcheck(operators.rope_and_cache.default, (*arguments.values(), True, *weights, 1e-6, 0.0, *scales))
    if not quantised:
        no_angles = {**arguments, "cos": None, "sin": None}
        opcheck(
            operators.rope_and_cache.default, (*no_angles.values(), False, None, None, 1e-6, 0.0, *scales)
        )


def layer(x, residual, weight, cos, sin, kv_cache, slots):
    """What a decoder does around its linear layers."""
    normed = cupaged.rms_norm(x, weight, residual=residual, epsilon=1e-5)
    query, key, value = torch.cat([normed, 2 * normed, 3 * normed], dim=1).view(3, 12, 32).split(4, dim=1)
    cupaged.rope_and_cache(query, key[:, :2], value[:, :2], cos, sin, kv_cache, slots)
    return cupaged.act_and_mul(query.flatten(1), activation="silu") + 1


def test_compile_without_graph_break():
    """Operators that mutate views of a merged projection, traced as one graph, equal the eager results."""
    b = rope()
    x, weight = torch.randn(3, 128), torch.randn(128)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        residual, cache = torch.ones(3, 128), b["kv_cache"].clone()
        out = function(x, residual, weight, b["cos"], b["sin"], cache, b["slot_mapping"])
        results.append((out, residual, cache))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


def test_settings_may_be_symbols():
    def normed(x, weight, epsilon, offset):
        return cupaged.rms_norm(x, weight, epsilon=epsilon, weight_offset=offset)

    compiled = torch.compile(normed, fullgraph=True, dynamic=True, backend="aot_eager")
    x, weight = torch.randn(3, 20), torch.randn(20)
    for settings in ((1e-6, 0.5), (1e-3, 1.0), (1e-5, 2.0)):
        torch.testing.assert_close(compiled(x, weight, *settings), normed(x, weight, *settings))


def test_out_may_be_the_input_when_compiled():
    def in_place(x, weight, residual):
        return cupaged.rms_norm(x, weight, residual=residual, out=x) * 2

    results = []
    for function in (in_place, torch.compile(in_place, fullgraph=True, backend="aot_eager")):
        x, residual = torch.arange(60.0).view(3, 20), torch.ones(3, 20)
        results.append((function(x, torch.ones(20), residual), x, residual))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


def test_modes_see_the_operators():
    with torch.no_grad(), Seen() as seen:
        cupaged.rms_norm(**norm())
        cupaged.act_and_mul(torch.randn(3, 20), activation="silu")
        cupaged.rope_and_cache(**rope())
    assert seen.names == ["rms_norm", "act_and_mul", "rope_and_cache"]


@pytest.mark.usefixtures("backend")
def test_arrays_of_other_libraries_are_used_in_place():
    """NumPy in place of any tensor: the same results, and writes land in the caller's memory."""

    def array(value):
        return value.numpy().copy() if isinstance(value, torch.Tensor) else value

    arguments = norm(input_weight=torch.randn(20))
    arrays = {name: array(value) for name, value in arguments.items()}
    expected = cupaged.rms_norm(**arguments)
    out = np.zeros((3, 20), np.float32)
    assert cupaged.rms_norm(**arrays, out=out) is out
    assert np.array_equal(out, expected.numpy())
    assert np.array_equal(arrays["residual"], arguments["residual"].numpy())
    assert isinstance(cupaged.rms_norm(arrays["input"], arrays["weight"]), torch.Tensor)

    expected = cupaged.act_and_mul(arguments["input"], activation="gelu")
    out = np.zeros((3, 10), np.float32)
    assert cupaged.act_and_mul(arrays["input"], activation="gelu", out=out) is out
    assert np.array_equal(out, expected.numpy())

    arguments = rope(query_weight=torch.rand(32), key_weight=torch.rand(32))
    arrays = {name: array(value) for name, value in arguments.items()}
    cupaged.rope_and_cache(**arguments)
    cupaged.rope_and_cache(**arrays)
    for name in ("query", "kv_cache"):
        assert np.array_equal(arrays[name], arguments[name].numpy())


# -- what models compute -----------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_a_models_own_norm(model):
    if model == "llama":
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        module, offset = LlamaRMSNorm(48, eps=1e-5), 0.0
    else:
        from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

        module, offset = Gemma3RMSNorm(48, eps=1e-5), 1.0
    torch.nn.init.normal_(module.weight)
    x, residual = torch.randn(7, 48), torch.randn(7, 48)
    with torch.no_grad():
        total = residual + x
        expected = module(total)
        settings = {"epsilon": 1e-5, "weight_offset": offset}
        torch.testing.assert_close(
            cupaged.rms_norm(x, module.weight, residual=residual, **settings), expected
        )
        assert torch.equal(residual, total)
        after = residual + module(x)  # Gemma's norm after a block
        result = cupaged.rms_norm(x, module.weight, residual=residual, input_weight=module.weight, **settings)
        torch.testing.assert_close(residual, after)
        torch.testing.assert_close(result, module(after))


@pytest.mark.usefixtures("backend")
def test_models_own_activations():
    from transformers.activations import ACT2FN

    gate, up = torch.randn(2, 5, 37) * 3
    names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    for activation, function in names.items():
        result = cupaged.act_and_mul(torch.cat([gate, up], dim=1), activation=activation)
        torch.testing.assert_close(result, ACT2FN[function](gate) * up)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("model", "interleaved", "rotated"), [("llama", False, 32), ("cohere", True, 32), ("glm", True, 16)]
)
def test_a_models_own_rotation(model, interleaved, rotated):
    """transformers repeats the cosines; those of the pairs are the first half, with Cohere every second."""
    import importlib

    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    angles = torch.rand(3, rotated // 2) * 10
    arguments = rope(cos=angles.cos(), sin=angles.sin())
    repeated = angles.repeat_interleave(2, -1) if model == "cohere" else torch.cat([angles, angles], -1)
    query, key = (arguments[name].transpose(0, 1)[None] for name in ("query", "key"))
    expected = module.apply_rotary_pos_emb(query, key, repeated.cos()[None], repeated.sin()[None])
    expected_query, expected_key = (x[0].transpose(0, 1).clone() for x in expected)
    cupaged.rope_and_cache(**arguments, interleaved=interleaved)
    torch.testing.assert_close(arguments["query"], expected_query)
    cache = arguments["kv_cache"]
    torch.testing.assert_close(cache[0, 0, :, 3], expected_key[0])
    torch.testing.assert_close(cache[4, 0, :, 7], expected_key[2])
    assert torch.equal(cache[4, 1, :, 7], arguments["value"][2])
