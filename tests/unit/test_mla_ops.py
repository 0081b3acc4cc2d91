"""The functions of latent attention: their checks, and what torch asks of an operator."""

from __future__ import annotations

import math

import pytest
import torch

import cupaged
from cupaged import backends
from cupaged.backends import reference


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setattr(backends, "for_device", lambda device_type: reference)


def batch(**changes) -> dict:
    """A valid decode batch of two sequences and 4 heads, whose values have 24 of 32 elements."""
    arguments = {
        "query": torch.randn(2, 4, 32),
        "kv_cache": torch.randn(5, 8, 32),
        "block_tables": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "seq_lens": torch.tensor([12, 3], dtype=torch.int32),
        "scale": 0.2,
        "value_size": 24,
    }
    return arguments | changes


BAD = {
    "cache rank": (
        {"kv_cache": torch.randn(5, 2, 1, 8, 32)},
        r"kv_cache must have 3 dimensions \[num_blocks",
    ),
    "dtype": ({"query": torch.randn(2, 4, 32).half()}, "query must be torch.float32, got torch.float16"),
    "cache dtype": ({"kv_cache": torch.zeros(5, 8, 32).to(torch.int8)}, "kv_cache must be torch.float32 or"),
    "key size": ({"query": torch.randn(2, 4, 40)}, "query must be .* with Dk = 32"),
    "large keys": (
        {"query": torch.randn(2, 4, 584), "kv_cache": torch.randn(5, 8, 584)},
        "kv_cache has keys of size 584; it must be a multiple of 8 and at most 576",
    ),
    "odd keys": (
        {"query": torch.randn(2, 4, 36), "kv_cache": torch.randn(5, 8, 36)},
        "keys of size 36; it must be a multiple of 8",
    ),
    "block size": ({"kv_cache": torch.randn(5, 12, 32)}, "block size 12; supported are 1, 2, 4, 8"),
    "large blocks": ({"kv_cache": torch.randn(5, 512, 32)}, "block size 512; supported are .*, 256"),
    "cache strides": ({"kv_cache": torch.randn(5, 32, 8).transpose(1, 2)}, "each block of kv_cache must be"),
    "odd values": ({"value_size": 20}, "out has values of size 20; it must be a multiple of 8"),
    "values longer than keys": ({"value_size": 40}, "pass a value_size of at most 32"),
    "value size": ({"value_size": 0}, "value_size must be an integer of at least 1, got 0"),
    "value size type": ({"value_size": 24.0}, "value_size must be an integer of at least 1, got 24.0"),
    "out": (
        {"out": torch.empty(2, 4, 32)},
        r"out must be \[T, H, value_size\] = \[2, 4, 24\], got \[2, 4, 32\]",
    ),
    "out dtype": ({"out": torch.empty(2, 4, 24).half()}, "out must be torch.float32, got torch.float16"),
    "no scale": ({"scale": None}, "scale must be a finite number, got None"),
    "scale": ({"scale": math.nan}, "scale must be a finite number"),
    "causal": ({"causal": 1}, "causal must be True or False"),
    "max_query_len": ({"max_query_len": 0}, "max_query_len must be an integer of at least 1"),
    "tokens": ({"query": torch.randn(3, 4, 32)}, "query has 3 tokens for 2 sequences"),
    "lengths": ({"seq_lens": torch.tensor([17, 3], dtype=torch.int32)}, "block_tables is too narrow"),
    "block ids": (
        {"block_tables": torch.tensor([[0, 5], [2, 3]], dtype=torch.int32)},
        "block_tables must be from 0 to 4",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bad_input_is_named(name, backend, monkeypatch):
    monkeypatch.setattr(backends, "for_device", lambda device_type: backends.load(backend))
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        cupaged.mla_attention(**batch(**changes))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bad_writes_are_named(backend, monkeypatch):
    monkeypatch.setattr(backends, "for_device", lambda device_type: backends.load(backend))
    cache, slots = torch.randn(5, 8, 32), torch.arange(3)
    kv_c, k_pe = torch.randn(3, 24), torch.randn(3, 8)
    for arguments, message in [
        ((kv_c, torch.randn(3, 16), cache, slots), "rows of 24 and 16 elements, .* kv_cache's 32 together"),
        ((torch.randn(3, 20), torch.randn(3, 12), cache, slots), "kv_c has rows of 20 elements"),
        ((kv_c, k_pe[:2], cache, slots), "k_pe must be .* with T = 3"),
        ((kv_c.half(), k_pe, cache, slots), "kv_c must be torch.float32, got torch.float16"),
        ((kv_c, k_pe, cache, slots.int()), "slot_mapping must be torch.int64"),
        ((kv_c, k_pe, cache, slots + 38), "slot_mapping must be from -1 to 39, got values from 38 to 40"),
    ]:
        before = cache.clone()
        with pytest.raises(ValueError, match=message):
            cupaged.concat_and_cache_mla(*arguments)
        assert torch.equal(cache, before)


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(return_lse):
    b = batch()
    starts = torch.tensor([0, 1, 2], dtype=torch.int32) if return_lse else None
    lse = torch.zeros(2, 4) if return_lse else None
    tensors = [b[name] for name in ("query", "kv_cache", "block_tables", "seq_lens")]
    torch.library.opcheck(
        torch.ops.cupaged.mla_attention.default,
        (*tensors, starts, 0.2, True, 2, torch.zeros(2, 4, 24), lse),
    )
    torch.library.opcheck(
        torch.ops.cupaged.concat_and_cache_mla.default,
        (torch.randn(3, 24), torch.randn(3, 8), b["kv_cache"], torch.tensor([3, -1, 7])),
    )


def test_compile_without_graph_break():
    """A layer's write and read, traced as one graph, equal the eager result."""

    def layer(query, kv_c, k_pe, kv_cache, slots, block_tables, seq_lens):
        cupaged.concat_and_cache_mla(kv_c * 2, k_pe, kv_cache, slots)
        out, lse = cupaged.mla_attention(
            query, kv_cache, block_tables, seq_lens, scale=0.2, value_size=24, return_lse=True
        )
        return out + 1, lse

    b = batch()
    arguments = torch.tensor([11, 18]), b["block_tables"], b["seq_lens"]
    new = b["query"], torch.randn(2, 24), torch.randn(2, 8)
    caches = [b["kv_cache"].clone() for _ in range(2)]
    eager = layer(*new, caches[0], *arguments)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*new, caches[1], *arguments)
    for actual, expected in zip((*compiled, caches[1]), (*eager, caches[0])):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
