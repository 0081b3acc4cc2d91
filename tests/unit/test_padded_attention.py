"""Attention of layers whose keys and values have not the shape of the cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cupaged.engine.model.attention import AttentionMetadata, paged_attention_forward
from cupaged.engine.model.kv_cache import KVCache, KVShape

CPU = torch.device("cpu")


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_padding_and_repeated_heads_change_nothing(seed, scaling):
    """Attend over a cache of wider layers, in which poison is wherever nothing was written."""
    generator = torch.Generator().manual_seed(seed)

    def number(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    num_kv_heads, repeats, group = number(1, 2), number(1, 2), number(1, 3)
    key_size, value_size, num_tokens = number(1, 24), number(1, 24), number(1, 20)
    num_heads = num_kv_heads * repeats * group
    shape = KVShape(1, num_kv_heads * repeats, 8, 24, torch.float32)
    cache = KVCache(shape, 4, 0, CPU)
    cache.blocks.fill_(torch.nan)
    query, key, value = (
        torch.randn(1, heads, num_tokens, size, generator=generator)
        for heads, size in ((num_heads, key_size), (num_kv_heads, key_size), (num_kv_heads, value_size))
    )
    table = torch.randperm(4, generator=generator)[None]
    positions = torch.arange(num_tokens)
    paged = AttentionMetadata(
        kv_caches=cache.layers,
        kv_scales=None,
        slot_mapping=table[0, positions // 8] * 8 + positions % 8,
        block_tables=table.int(),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32),
        windows=(None,),
    )
    out, _ = paged_attention_forward(
        SimpleNamespace(layer_idx=0), query, key, value, None, paged=paged, scaling=scaling
    )
    expected = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, scale=scaling, enable_gqa=True
    )
    assert out.shape == (1, num_tokens, num_heads, value_size)
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
