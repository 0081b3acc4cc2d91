"""What the checks of arguments let through, and how they say what is wrong."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cupaged
from cupaged import backends, checks
from cupaged.backends import reference
from cupaged.quantisation import LARGEST

from .test_ops import batch


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setattr(backends, "for_device", lambda device_type: reference)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(4, 32).expand(2, 4, 32),
        torch.empty(2, 1, 32).expand(2, 4, 32),
        torch.empty(1, 1, 32).expand(2, 4, 32),
        torch.empty(500).as_strided((2, 4, 32), (127, 32, 1)),
        torch.empty(500).as_strided((2, 4, 32), (128, 31, 1)),
    ],
    ids=["tokens", "heads", "both", "tokens by one element", "heads by one element"],
)
def test_an_out_whose_rows_overlap_is_refused(out):
    with pytest.raises(ValueError, match=r"the rows of out overlap: shape \[2, 4, 32\] with strides"):
        cupaged.paged_attention(**batch(), out=out)
    b = batch()
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in b.items()}
        with pytest.raises(ValueError, match="the rows of out overlap"):
            cupaged.paged_attention(**fakes, out=mode.from_tensor(out))


def test_an_out_of_any_strides_that_keep_rows_apart_is_written():
    b = batch()
    expected = cupaged.paged_attention(**b)
    for out in (
        torch.zeros(4, 2, 32).transpose(0, 1),
        torch.zeros(2, 9, 48)[:, ::2, 8:40][:, :4],
        torch.zeros(400).as_strided((2, 4, 32), (40, 80, 1)),  # heads of both tokens take turns
        torch.zeros(500).as_strided((2, 4, 32), (96, 64, 1)),  # and so that neither stride covers the other
    ):
        assert torch.equal(cupaged.paged_attention(**b, out=out), expected)
    query = b["query"].clone()
    assert cupaged.paged_attention(**{**b, "query": query}, out=query) is query
    assert torch.equal(query, expected)


def test_rows_overlap_where_two_elements_have_one_address(seed):
    """Small shapes and strides, drawn, against all addresses; a stride of a size of 1 says nothing."""
    rng = random.Random(seed)
    seen = {True: 0, False: 0}
    for _ in range(3000):
        size = rng.choice([1, 2, 8])
        shape = (rng.randrange(5), rng.randrange(5), size)
        strides = (rng.randrange(6 * size), rng.randrange(6 * size), 1)
        addresses = [
            a * strides[0] + b * strides[1] + c
            for a in range(shape[0])
            for b in range(shape[1])
            for c in range(size)
        ]
        overlap = len(set(addresses)) < len(addresses)
        seen[overlap] += 1
        value = torch.empty(300).as_strided(shape, strides)
        if overlap:
            with pytest.raises(ValueError, match="the rows of out overlap"):
                checks.rows_apart("out", value)
        else:
            checks.rows_apart("out", value)
    assert min(seen.values()) > 300


@pytest.mark.parametrize("dtype", list(LARGEST), ids=str)
def test_a_scale_and_its_reciprocal_are_positive_and_finite(dtype):
    """1 / 1e-40 is beyond float32, and a GPU, which takes what is below 2**-126 to be 0, needs a bit more."""
    key, cache, slots = torch.zeros(3, 2, 32), torch.ones(5, 2, 2, 8, 32).to(dtype), torch.arange(3)
    one = torch.ones(2)
    for bad in (0.0, -1.0, math.nan, math.inf, 1e-40, 1e-38, 1e38):
        scale = torch.tensor([1.0, bad])
        for name, scales in (("k_scale", (scale, one)), ("v_scale", (one, scale))):
            with pytest.raises(
                ValueError, match=rf"^{name} must be positive and finite, and 1 / {name} too.*{name}\.clamp\("
            ):
                cupaged.reshape_and_cache(key, key, cache, slots, *scales)
    for good in (2.0**-126, 2.0**126):
        scale = torch.tensor([1.0, good])
        cupaged.reshape_and_cache(key, key, cache, slots, scale, scale)
        assert not cache[0, :, :, :3].float().any()


def test_the_recipe_for_scales_holds_for_a_head_of_zeros():
    recipe = re.search(r"just holds every key is\s+``(.*?)``", cupaged.reshape_and_cache.__doc__)[1]
    key = torch.randn(3, 2, 32)
    key[:, 1] = 0
    scale = eval(recipe, {"key": key})
    cache = torch.zeros(5, 2, 2, 8, 32).to(torch.float8_e4m3fn)
    cupaged.reshape_and_cache(key, key, cache, torch.arange(3), scale, scale)
    assert cache.float().abs().amax() == 448
    assert not cache[:, :, 1].float().any()


@pytest.mark.parametrize("name", ["block_tables", "seq_lens", "query_start_loc"])
def test_ids_and_lengths_of_other_integers_are_told_the_cast(name):
    b = batch(query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32))
    for dtype in (torch.int64, torch.int16, torch.uint8):
        with pytest.raises(
            ValueError, match=rf"^{name} must be torch\.int32, got {dtype}; pass {name}\.int\(\)$"
        ):
            cupaged.paged_attention(**{**b, name: b[name].to(dtype)})
    for dtype in (torch.float32, torch.bool):  # of which a cast may be no remedy
        with pytest.raises(ValueError, match=rf"^{name} must be torch\.int32, got {dtype}$"):
            cupaged.paged_attention(**{**b, name: b[name].to(dtype)})


def test_slots_and_mappings_of_other_integers_are_told_the_cast():
    key, cache = torch.zeros(3, 2, 32), torch.zeros(5, 2, 2, 8, 32)
    pairs = torch.tensor([[0, 1]], dtype=torch.int32)
    wanted = r"{0} must be torch\.int64, got torch\.int32; pass {0}\.long\(\)$"
    with pytest.raises(ValueError, match=wanted.format("slot_mapping")):
        cupaged.reshape_and_cache(key, key, cache, torch.arange(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=wanted.format("block_mapping")):
        cupaged.copy_blocks(cache, pairs)
    with pytest.raises(ValueError, match=wanted.format("block_mapping")):
        cupaged.swap_blocks(cache, cache.clone(), pairs)


def test_a_size_that_is_a_number_is_named_by_its_place():
    vllm = torch.zeros(2, 5, 8, 2, 32)  # keys and values first, heads after tokens
    with pytest.raises(ValueError) as raised:
        cupaged.paged_attention(**batch(kv_cache=vllm))
    assert str(raised.value) == (
        "kv_cache must be [num_blocks, 2, Hkv, B, D] with 2 in dimension 1, got shape [2, 5, 8, 2, 32]"
    )


def test_a_query_longer_than_its_sequence_is_named():
    b = batch(
        query=torch.randn(6, 4, 32),
        seq_lens=torch.tensor([0, 3], dtype=torch.int32),  # nothing is asked of an empty sequence
        query_start_loc=torch.tensor([0, 2, 6], dtype=torch.int32),
    )
    with pytest.raises(ValueError) as raised:
        cupaged.paged_attention(**b)
    assert str(raised.value) == (
        "seq_lens counts the query's own tokens: sequence 1 has 4 query tokens, but seq_lens[1] is 3"
    )
    b["query_start_loc"][1] = 3
    cupaged.paged_attention(**b)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_results_are_no_part_of_autograds_graph(name, monkeypatch):
    """Inputs that require grad are taken, also where they are traced; no result does, nor does the cache."""
    module = backends.load(name)
    monkeypatch.setattr(backends, "for_device", lambda device_type: module)

    def all_three(query, kv_cache, block_tables, seq_lens):
        cupaged.reshape_and_cache(query[:, :2], query[:, 2:], kv_cache, torch.tensor([3, 17]))
        out, lse = cupaged.paged_attention(query, kv_cache, block_tables, seq_lens, return_lse=True)
        states = [out + query * 0, query], [lse + query.sum() * 0, lse]
        return (out, lse, *cupaged.merge_attention_states(*states))

    b = batch(query=torch.randn(2, 4, 32, requires_grad=True))
    for function in (all_three, torch.compile(all_three, fullgraph=True, backend="aot_eager")):
        results = function(**b)
        assert not [result for result in (*results, b["kv_cache"]) if result.requires_grad]
    stacked = torch.randn(2, 3, 4, 32, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    assert not [result for result in cupaged.merge_attention_states(*stacked) if result.requires_grad]
