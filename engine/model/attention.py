"""The seam: transformers' attention interface on one side, the paged kernels on the other.

A model loaded with ``attn_implementation="cupaged"`` calls `paged_attention_forward` in every layer, with
keys and values unrepeated and after the rotary embedding. The batch is one row of T tokens of all sequences;
which token is whose stands in `AttentionMetadata`, a keyword argument of ``model.forward``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

import cupaged

ATTENTION_NAME = "cupaged"


@dataclass(frozen=True)
class AttentionMetadata:
    """Which tokens of a step belong to which sequence and where their keys and values are.

    Args:
        kv_caches: a layer's view of the cache each, ``[num_blocks, 2, Hkv, B, D]``.
        kv_scales: of a quantised cache: a layer's for keys and for values each, float32 ``[Hkv]``; else None.
        slot_mapping: int64 ``[T]``, where each token's key and value go.
        block_tables: int32 ``[S, max_blocks]``.
        seq_lens: int32 ``[S]``, tokens of each sequence, those of this step included.
        query_start_loc: int32 ``[S + 1]``, or None when every sequence has one token in this step.
        windows: a layer's sliding window each, None where it has none.
        shared_prefix: neighbours begin with the same blocks, and it may pay to read those once.
    """

    kv_caches: tuple[torch.Tensor, ...]
    kv_scales: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor | None
    windows: tuple[int | None, ...]
    shared_prefix: bool = False


def register_attention() -> None:
    """Make "cupaged" an attention implementation of transformers. Doing it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    paged: AttentionMetadata,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **without_effect: Any,
) -> tuple[torch.Tensor, None]:
    """Write this layer's keys and values to the cache and attend over it.

    `attention_probe` has seen to it that the model asks for nothing else.

    Args:
        query: ``[1, H, T, D]``. key, value: ``[1, Hkv, T, D]``.
        attention_mask: transformers builds none for this attention; the mask follows from ``paged``.
        s_aux: attention sinks ``[H]``.

    Returns:
        ``[1, T, H, D]`` and no attention weights.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    kv_cache = paged.kv_caches[layer]
    k_scale, v_scale = (None, None) if paged.kv_scales is None else paged.kv_scales[layer]
    cupaged.reshape_and_cache(
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        kv_cache,
        paged.slot_mapping,
        k_scale,
        v_scale,
    )
    out = cupaged.paged_attention(
        query.squeeze(0).transpose(0, 1),
        kv_cache,
        paged.block_tables,
        paged.seq_lens,
        paged.query_start_loc,
        scale=scaling,
        sliding_window=paged.windows[layer],
        logits_soft_cap=softcap,
        sinks=None if s_aux is None else s_aux.float(),
        k_scale=k_scale,
        v_scale=v_scale,
        shared_prefix=paged.shared_prefix,
    )
    return out.unsqueeze(0), None
