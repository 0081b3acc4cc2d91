"""The public functions apart from their results: bad input, torch.library, torch.compile."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import cupaged
from cupaged import backends, checks, registration
from cupaged.backends import reference
from cupaged.quantisation import quantise


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setattr(backends, "for_device", lambda device_type: reference)


def batch(**changes) -> dict:
    """A valid decode batch of two sequences, 4 query and 2 KV heads."""
    arguments = {
        "query": torch.randn(2, 4, 32),
        "kv_cache": torch.randn(5, 2, 2, 8, 32),
        "block_tables": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "seq_lens": torch.tensor([12, 3], dtype=torch.int32),
    }
    arguments.update(changes)
    return arguments


QUANTISED = torch.zeros(5, 2, 2, 8, 32).to(torch.float8_e4m3fn)
CACHE_DTYPES = [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]

BAD_ATTENTION = {
    "rank": ({"query": torch.randn(4, 32)}, "query must have 3 dimensions"),
    "type": ({"query": [1.0]}, "query must be a torch.Tensor"),
    "cache rank": ({"kv_cache": torch.randn(5, 2, 8, 32)}, "kv_cache must have 5 dimensions"),
    "cache pair": ({"kv_cache": torch.randn(5, 3, 2, 8, 32)}, "with 2 in dimension 1"),
    "dtype": ({"query": torch.randn(2, 4, 32).half()}, "query must be torch.float32, got torch.float16"),
    "cache dtype": ({"kv_cache": torch.zeros(5, 2, 2, 8, 32).int()}, "kv_cache must be torch.float32 or"),
    "heads": ({"query": torch.randn(2, 3, 32)}, "3 heads, not a multiple of kv_cache's 2"),
    "head size": ({"query": torch.randn(2, 4, 64)}, "query must be .* with D = 32"),
    "odd head size": (
        {"query": torch.randn(2, 4, 33), "kv_cache": torch.randn(5, 2, 2, 8, 33)},
        "multiple of 8",
    ),
    "block size": ({"kv_cache": torch.randn(5, 2, 2, 12, 32)}, "kv_cache has block size 12"),
    "last dimension": (
        {"query": torch.randn(2, 4, 64)[..., ::2]},
        r"query must be contiguous in its last dimension.*query.contiguous\(\)",
    ),
    "cache strides": (
        {"kv_cache": torch.randn(5, 2, 8, 2, 32).transpose(2, 3)},
        "each block of kv_cache must be contiguous",
    ),
    "device": ({"seq_lens": torch.empty(2, dtype=torch.int32, device="meta")}, "seq_lens must be on cpu"),
    "lens dtype": ({"seq_lens": torch.tensor([12, 3])}, "seq_lens must be torch.int32"),
    "number of sequences": (
        {
            "seq_lens": torch.tensor([12], dtype=torch.int32),
            "block_tables": torch.zeros(1, 2, dtype=torch.int32),
        },
        "query has 2 tokens for 1 sequences",
    ),
    "tables": ({"block_tables": torch.zeros(3, 2, dtype=torch.int32)}, "block_tables must be .* with S = 2"),
    "start loc": (
        {"query_start_loc": torch.tensor([0, 2], dtype=torch.int32)},
        r"query_start_loc must be \[S \+ 1\]",
    ),
    "narrow table": (
        {"seq_lens": torch.tensor([17, 3], dtype=torch.int32)},
        "block_tables is too narrow: 2 blocks of 8 hold 16 tokens, but seq_lens has a sequence of 17",
    ),
    "id": (
        {"block_tables": torch.tensor([[0, 5], [2, 9]], dtype=torch.int32)},
        "block_tables must be from 0 to 4",
    ),
    "query too long": (
        {
            "query_start_loc": torch.tensor([0, 1, 5], dtype=torch.int32),
            "query": torch.randn(5, 4, 32),
        },
        "seq_lens counts the query's own tokens",
    ),
    "slopes": ({"alibi_slopes": torch.ones(2)}, "alibi_slopes must be .* with H = 4"),
    "sinks": ({"sinks": torch.ones(4).half()}, "sinks must be torch.float32"),
    "scale": ({"k_scale": torch.ones(2)}, "k_scale is for quantised caches"),
    "value scale": ({"v_scale": torch.ones(2)}, "v_scale is for quantised caches; kv_cache is torch.float32"),
    "no scales": ({"kv_cache": QUANTISED}, "k_scale is missing: a kv_cache of torch.float8_e4m3fn needs"),
    "one scale": ({"kv_cache": QUANTISED, "k_scale": torch.ones(2)}, "v_scale is missing"),
    "scale of heads": (
        {"kv_cache": QUANTISED, "k_scale": torch.ones(2), "v_scale": torch.ones(4)},
        r"v_scale must be \[Hkv\] with Hkv = 2",
    ),
    "scale dtype": (
        {"kv_cache": QUANTISED, "k_scale": torch.ones(2).half(), "v_scale": torch.ones(2)},
        "k_scale must be torch.float32",
    ),
    "quantised head size": (
        {"query": torch.randn(2, 4, 24), "kv_cache": torch.zeros(5, 2, 2, 8, 24, dtype=torch.int8)},
        "head size 24; a cache of torch.int8 needs a multiple of 16",
    ),
    "int8 query": (
        {"query": torch.ones(2, 4, 32).to(torch.int8), "kv_cache": QUANTISED},
        "query must be torch.float32 or torch.float16 or torch.bfloat16, got torch.int8",
    ),
    "out": ({"out": torch.empty(2, 4, 32).half()}, "out must be torch.float32"),
}


@pytest.mark.parametrize("name", BAD_ATTENTION)
def test_bad_attention_input_is_named(name):
    changes, message = BAD_ATTENTION[name]
    with pytest.raises(ValueError, match=message):
        cupaged.paged_attention(**batch(**changes))


BAD_SETTINGS = {
    "scale": ["x", [1.0], math.nan, math.inf, True, torch.ones(2)],
    "causal": [None, 1, "no", torch.tensor(True)],
    "sliding_window": [0, -3, 2.5, True, "8", torch.tensor(8)],
    "logits_soft_cap": [0.0, -1.0, math.nan, math.inf, True, "30", torch.ones(2)],
    "max_query_len": [0, -1, 1.5, True, "2"],
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_named(name):
    for value in BAD_SETTINGS[name]:
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got "):
            cupaged.paged_attention(**batch(**{name: value}))


def test_settings_may_be_numpys():
    settings = {"scale": np.float32(0.25), "sliding_window": np.int64(3), "logits_soft_cap": np.float64(2)}
    b = batch()
    expected = cupaged.paged_attention(**b, scale=0.25, sliding_window=3, logits_soft_cap=2.0)
    assert torch.equal(cupaged.paged_attention(**b, **settings), expected)


OPS = {
    cupaged.paged_attention: batch(query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32)),
    cupaged.reshape_and_cache: {
        "key": torch.randn(3, 2, 32),
        "value": torch.randn(3, 2, 32),
        "kv_cache": torch.randn(5, 2, 2, 8, 32),
        "slot_mapping": torch.arange(3),
    },
    partial(cupaged.mla_attention, scale=0.2, value_size=24): {
        "query": torch.randn(2, 4, 32),
        "kv_cache": torch.randn(5, 8, 32),
        "block_tables": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "seq_lens": torch.tensor([12, 3], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 1, 2], dtype=torch.int32),
    },
    cupaged.concat_and_cache_mla: {
        "kv_c": torch.randn(3, 24),
        "k_pe": torch.randn(3, 8),
        "kv_cache": torch.randn(5, 8, 32),
        "slot_mapping": torch.arange(3),
    },
    cupaged.merge_attention_states: {"outs": torch.randn(2, 3, 2, 8), "lses": torch.randn(2, 3, 2)},
    cupaged.copy_blocks: {"kv_cache": torch.randn(5, 2, 2, 8, 32), "block_mapping": torch.tensor([[0, 1]])},
    cupaged.swap_blocks: {
        "src": torch.randn(5, 2, 2, 8, 32),
        "dst": torch.randn(5, 2, 2, 8, 32),
        "block_mapping": torch.tensor([[0, 1]]),
    },
    cupaged.rms_norm: {
        "input": torch.randn(3, 20),
        "weight": torch.randn(20),
        "residual": torch.randn(3, 20),
        "input_weight": torch.randn(20),
    },
    partial(cupaged.act_and_mul, activation="gelu"): {"input": torch.randn(3, 20)},
    cupaged.rope_and_cache: {
        "query": torch.randn(3, 4, 32),
        "key": torch.randn(3, 2, 32),
        "value": torch.randn(3, 2, 32),
        "cos": torch.rand(3, 8),
        "sin": torch.rand(3, 8),
        "kv_cache": torch.randn(5, 2, 2, 8, 32),
        "slot_mapping": torch.arange(3),
        "query_weight": torch.rand(32),
        "key_weight": torch.rand(32),
    },
    cupaged.sample: {
        "logits": torch.randn(3, 20),
        "temperature": torch.ones(3).double(),
        "top_k": torch.tensor([0, 5, 30]),
        "top_p": torch.tensor([0.5, 1.0, 0.9]).double(),
        "min_p": torch.zeros(3).double(),
        "seeds": torch.tensor([-5, 7, 1 << 62]),
        "indices": torch.arange(3),
        "positions": torch.arange(3),
    },
}


def name_of(function) -> str:
    return getattr(function, "func", function).__name__


@pytest.mark.parametrize("function", OPS, ids=name_of)
def test_what_is_no_tensor_or_of_no_fitting_shape_is_named(function):
    """Every tensor argument of every function in turn."""
    optional = ("query_start_loc", "residual", "input_weight")
    function(**OPS[function])
    for name in OPS[function]:
        bad = [
            5,
            True,
            2.5,
            "x",
            [],
            [1, 2],
            torch.tensor(1.0),
            torch.zeros(0),
            torch.zeros(7, dtype=torch.int8),
        ]
        for value in bad if name in optional else [None, *bad]:
            with pytest.raises(ValueError, match=rf"\b{name}\b"):
                function(**{**OPS[function], name: value})


def test_states_to_merge_that_differ_are_named():
    outs, lses = [torch.randn(3, 2, 8)] * 2, [torch.randn(3, 2)] * 2
    cupaged.merge_attention_states(outs, lses)
    for other in (torch.randn(2, 2, 8), outs[0].half(), outs[0].to("meta")):
        with pytest.raises(
            ValueError, match=r"outs\[1\] must be like outs\[0\], \[3, 2, 8\] of torch.float32 on"
        ):
            cupaged.merge_attention_states([outs[0], other], lses)
    with pytest.raises(ValueError, match=r"lses\[0\] must be a torch"):
        cupaged.merge_attention_states(outs, [None, None])


def test_other_bad_input_is_named():
    cache = torch.randn(5, 2, 2, 8, 32)
    key = torch.randn(3, 2, 32)
    slots = torch.arange(3)
    with pytest.raises(ValueError, match=r"value must be .* with T = 3"):
        cupaged.reshape_and_cache(key, key[:2], cache, slots)
    with pytest.raises(ValueError, match=r"slot_mapping must be torch\.int64"):
        cupaged.reshape_and_cache(key, key, cache, slots.int())
    with pytest.raises(ValueError, match="slot_mapping must be from -1 to 39, got values from 0 to 40"):
        cupaged.reshape_and_cache(key, key, cache, torch.tensor([0, 40, 1]))
    with pytest.raises(ValueError, match=r"value must be torch\.float32, got torch\.float16"):
        cupaged.reshape_and_cache(key, key.half(), QUANTISED, slots, torch.ones(2), torch.ones(2))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        scale = torch.tensor([1.0, bad])
        with pytest.raises(ValueError, match="v_scale must be positive and finite"):
            cupaged.reshape_and_cache(key, key, QUANTISED, slots, torch.ones(2), scale)
    with pytest.raises(ValueError, match=r"block_mapping must be \[N, 2\]"):
        cupaged.copy_blocks(cache, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"block_mapping\[:, 1\] \(destination\) must be from 0 to 4"):
        cupaged.copy_blocks(cache, torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match="dst must have blocks like src's"):
        cupaged.swap_blocks(cache, cache[:, :1].contiguous(), torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="outs holds no state"):
        cupaged.merge_attention_states(torch.empty(0, 2, 1, 8), torch.empty(0, 2, 1))


def test_ids_are_not_read_on_a_gpu_unless_asked(monkeypatch):
    """`CUPAGED_CHECK` is the switch; the CPU always checks."""
    monkeypatch.setattr(checks, "device_checks_enabled", checks.device_checks_enabled.__wrapped__)
    for value, expected in [("", False), ("0", False), ("1", True)]:
        monkeypatch.setenv("CUPAGED_CHECK", value)
        assert checks.device_checks_enabled() is expected


def opcheck(op, arguments) -> None:
    """torch.library's own tests. That of the schema compares tensors with arithmetic float8 lacks."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    float8 = any(isinstance(a, torch.Tensor) and str(a.dtype).startswith("torch.float8") for a in arguments)
    torch.library.opcheck(op, arguments, test_utils=checks[1:] if float8 else checks)


def quantised_batch(cache_dtype) -> tuple[dict, torch.Tensor | None, torch.Tensor | None]:
    """A batch with a cache of any dtype, and its scales."""
    b = batch()
    if cache_dtype == torch.float32:
        return b, None, None
    scales = torch.tensor([[0.02, 0.05], [0.04, 0.03]])
    codes = [quantise(b["kv_cache"][:, i].transpose(1, 2), scales[i], cache_dtype) for i in range(2)]
    return {**b, "kv_cache": torch.stack(codes, 1).transpose(2, 3).contiguous()}, scales[0], scales[1]


@pytest.mark.thinned
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("prefill", [False, True])
def test_opcheck_attention(return_lse, prefill, cache_dtype):
    b, k_scale, v_scale = quantised_batch(cache_dtype)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32) if prefill else None
    out = torch.zeros_like(b["query"])
    lse = torch.zeros(2, 4) if return_lse else None
    opcheck(
        torch.ops.cupaged.paged_attention.default,
        (*b.values(), starts, 0.2, True, None, None, 2, True, True, None, None, k_scale, v_scale, out, lse),
    )


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_opcheck_others(cache_dtype):
    b, k_scale, v_scale = quantised_batch(cache_dtype)
    cache = b["kv_cache"]
    key = torch.randn(3, 2, 32)
    opcheck(
        torch.ops.cupaged.reshape_and_cache.default,
        (key, key, cache, torch.tensor([3, -1, 7]), k_scale, v_scale),
    )
    opcheck(torch.ops.cupaged.copy_blocks.default, (cache, torch.tensor([[0, 1]])))
    opcheck(torch.ops.cupaged.swap_blocks.default, (cache, torch.zeros_like(cache), torch.tensor([[0, 1]])))
    opcheck(torch.ops.cupaged.merge_attention_states.default, (torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2)))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_compile_without_graph_break(cache_dtype):
    """A layer's write and read, traced as one graph, equal the eager result."""

    def layer(query, key, value, kv_cache, block_tables, seq_lens, slots):
        cupaged.reshape_and_cache(key * 2, value, kv_cache, slots, k_scale, v_scale)
        out, lse = cupaged.paged_attention(
            query, kv_cache, block_tables, seq_lens, k_scale=k_scale, v_scale=v_scale, return_lse=True
        )
        return out + 1, lse

    b, k_scale, v_scale = quantised_batch(cache_dtype)
    key, value = torch.randn(2, 2, 32), torch.randn(2, 2, 32)
    slots = torch.tensor([11, 18])
    eager_cache, compiled_cache = b["kv_cache"].clone(), b["kv_cache"].clone()
    arguments = (b["block_tables"], b["seq_lens"], slots)
    eager = layer(b["query"], key, value, eager_cache, *arguments)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(
        b["query"], key, value, compiled_cache, *arguments
    )
    assert torch.equal(eager_cache.view(torch.uint8), compiled_cache.view(torch.uint8))
    assert not torch.equal(eager_cache.view(torch.uint8), b["kv_cache"].view(torch.uint8))
    for e, c in zip(eager, compiled):
        torch.testing.assert_close(e, c)


def test_settings_may_be_symbols():
    """With ``dynamic`` the numbers are traced; they are still checked and still work."""

    def attend(query, kv_cache, block_tables, seq_lens, scale, window, cap):
        return cupaged.paged_attention(
            query, kv_cache, block_tables, seq_lens, scale=scale, sliding_window=window, logits_soft_cap=cap
        )

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    b = batch()
    for settings in ((0.2, 3, 10.0), (0.3, 5, 20.0), (0.4, 2, 30.0)):
        torch.testing.assert_close(compiled(*b.values(), *settings), attend(*b.values(), *settings))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_arrays_of_other_libraries_are_used_in_place(name, monkeypatch):
    """NumPy in place of any tensor: the same results, and writes land in the caller's memory."""
    module = backends.load(name)
    monkeypatch.setattr(backends, "for_device", lambda device_type: module)
    b, key, slots = batch(), torch.randn(3, 2, 32), torch.tensor([5, -1, 39])
    cache = b["kv_cache"].numpy().copy()
    original = cache.copy()
    cupaged.reshape_and_cache(key.numpy(), key, cache, slots.numpy())
    cupaged.reshape_and_cache(key, key, b["kv_cache"], slots)
    assert np.array_equal(cache, b["kv_cache"].numpy())
    assert not np.array_equal(cache, original)

    expected, expected_lse = cupaged.paged_attention(**b, sinks=torch.ones(4), return_lse=True)
    arrays = {name: value.numpy() for name, value in b.items()}
    for argument in arrays:  # mixed
        mixed = {**b, argument: arrays[argument]}
        assert torch.equal(
            cupaged.paged_attention(**mixed, sinks=np.ones(4, np.float32), return_lse=True)[0], expected
        )
    out = np.zeros((2, 4, 32), np.float32)
    starts = np.array([0, 1, 2], np.int32)
    result, lse = cupaged.paged_attention(
        **arrays, query_start_loc=starts, sinks=np.ones(4, np.float32), out=out, return_lse=True
    )
    assert result is out
    assert isinstance(lse, torch.Tensor)
    np.testing.assert_allclose(out, expected.numpy())
    torch.testing.assert_close(lse, expected_lse)
    assert isinstance(cupaged.paged_attention(**arrays), torch.Tensor)

    states = (torch.stack([expected, expected]), torch.stack([lse, lse]))
    merged = cupaged.merge_attention_states(*states)
    for outs, lses in ((states[0].numpy(), states[1].numpy()), ([out, expected], [lse.numpy(), lse])):
        for got, wanted in zip(cupaged.merge_attention_states(outs, lses), merged):
            torch.testing.assert_close(got, wanted)

    cupaged.copy_blocks(cache, np.array([[0, 1]]))
    assert np.array_equal(cache[1], cache[0])
    other = np.zeros_like(cache)
    cupaged.swap_blocks(cache, other, np.array([[0, 4]]))
    assert np.array_equal(other[4], cache[0])
    assert not other[:4].any()


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def test_read_only_arrays_are_read_and_not_written():
    written = {
        cupaged.reshape_and_cache: ["kv_cache"],
        cupaged.copy_blocks: ["kv_cache"],
        cupaged.swap_blocks: ["dst"],
        cupaged.rms_norm: ["residual"],
        cupaged.rope_and_cache: ["query", "kv_cache"],
    }
    for function, names in written.items():
        arrays = {key: read_only(value.numpy()) for key, value in OPS[function].items()}
        writable = {name: OPS[function][name].numpy().copy() for name in names}
        for name in names:
            others = {key: value for key, value in writable.items() if key != name}
            with pytest.raises(ValueError, match=f"{name} is written, but the ndarray is read-only; pass a"):
                function(**{**arrays, **others})
        function(**{**arrays, **writable})
    b = {name: read_only(value.numpy()) for name, value in batch().items()}
    cupaged.paged_attention(**b)
    for function, arguments, out in (
        (cupaged.paged_attention, b, b["query"]),
        (cupaged.rms_norm, OPS[cupaged.rms_norm], np.zeros((3, 20), np.float32)),
        (cupaged.sample, OPS[cupaged.sample], np.zeros(3, np.int64)),
        (partial(cupaged.act_and_mul, activation="silu"), {"input": b["query"][0]}, np.zeros((4, 16))),
    ):
        with pytest.raises(ValueError, match="out is written"):
            function(**arguments, out=read_only(out))


@pytest.mark.parametrize("function", OPS, ids=name_of)
def test_arrays_that_dlpack_cannot_pass_are_named(function):
    class Broken:
        def __dlpack__(self, **_):
            raise RuntimeError("no")

    for name, good in OPS[function].items():
        shape = good.shape
        bad = [np.zeros(shape, object), np.zeros(shape, ">f4"), np.zeros(shape)[::-1], Broken()]
        for value in bad:
            with pytest.raises(ValueError, match=rf"^{name} "):
                function(**{**OPS[function], name: value})


class Seen(TorchDispatchMode):
    """The operators of this package that a mode gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cupaged":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def direct(monkeypatch):
    """The calls that go past torch's dispatcher, by name."""
    calls: list[str] = []

    def spy(name, implementation, fake):
        return lambda *arguments: calls.append(name) or implementation(*arguments), fake

    spied = {name: spy(name, *functions) for name, functions in registration._IMPLEMENTATIONS.items()}
    monkeypatch.setattr(registration, "_IMPLEMENTATIONS", spied)
    return calls


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_plain_calls_go_past_the_dispatcher(direct, guard):
    b = batch()
    expected = cupaged.paged_attention(**b)
    assert direct == []  # autograd is on
    with guard():
        torch.testing.assert_close(cupaged.paged_attention(**b, sinks=None, scale=32**-0.5), expected)
        with pytest.raises(ValueError, match="query must have 3 dimensions"):
            cupaged.paged_attention(**{**b, "query": b["query"][0]})
        cupaged.paged_attention(**b, sinks=torch.nn.Parameter(torch.ones(4)))
    assert direct == 3 * ["paged_attention"]


def test_what_watches_operators_sees_them(direct):
    """The mode, the profiler, a tracer, fake tensors and a subclass of Tensor."""
    b = batch()
    with torch.no_grad():
        with Seen() as seen:
            cupaged.paged_attention(**b)
        assert seen.names == ["paged_attention"]
        with torch.profiler.profile() as profile:
            cupaged.paged_attention(**b)
        assert "cupaged::paged_attention" in {event.key for event in profile.key_averages()}
        graph = make_fx(lambda query: cupaged.paged_attention(**{**b, "query": query}))(b["query"])
        assert "cupaged.paged_attention" in graph.code
        with FakeTensorMode() as mode:
            fakes = {name: mode.from_tensor(tensor) for name, tensor in b.items()}
            assert cupaged.paged_attention(**fakes).shape == b["query"].shape
            with pytest.raises(ValueError, match="query must have 3 dimensions"):
                cupaged.paged_attention(**{**fakes, "query": fakes["query"][0]})
        cupaged.paged_attention(**{**b, "query": b["query"].as_subclass(Subclass)})
        compiled = torch.compile(lambda **b: cupaged.paged_attention(**b), fullgraph=True, backend="eager")
        compiled(**b)
        with pytest.raises(RuntimeError, match="Batching rule"):
            torch.vmap(lambda query: cupaged.paged_attention(**{**b, "query": query}))(b["query"][None])
    assert direct == []


def test_a_wrong_argument_is_named_while_it_is_traced():
    b = batch()
    compiled = torch.compile(cupaged.paged_attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"seq_lens must be torch\.int32"):
        compiled(**{**b, "seq_lens": b["seq_lens"].long()})


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_batch_invariant_is_a_bool(value):
    with pytest.raises(ValueError, match="batch_invariant must be True or False"):
        cupaged.paged_attention(**batch(), batch_invariant=value)
