"""Connect transformers' attention interface to the paged kernels.

A model loaded with ``attn_implementation="cupaged"`` calls `paged_attention_forward` in every layer, with
unrepeated keys and values after the rotary embedding. The batch is one row with the T tokens of all
sequences. `AttentionMetadata`, a keyword argument of ``model.forward``, maps tokens to sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface

import cupaged

ATTENTION_NAME = "cupaged"


@dataclass(frozen=True)
class AttentionMetadata:
    """Map the tokens of a step to sequences and to the blocks of their keys and values.

    Args:
        kv_caches: view of the cache for each layer, ``[num_blocks, 2, Hkv, B, D]``.
        kv_scales: scales of keys and of values for each layer, float32 ``[Hkv]``; None unless the cache is
            quantized.
        slot_mapping: int64 ``[T]``, slot for the key and value of each token; -1 if they are stored already.
        block_tables: int32 ``[S, max_blocks]``.
        seq_lens: int32 ``[S]``, number of tokens of each sequence, including those of this step.
        query_start_loc: int32 ``[S + 1]``, or None if every sequence has one token in this step.
        windows: sliding window of each layer, in tokens; None where it has none.
        shared_prefix: neighbouring sequences begin with the same blocks, which the kernels may read once.
        rotary_halves: what fused layers share in a step: cosines and sines as the operator takes them, by the
            id of the model's own, which stand beside them.
        workspace: the `Workspace` in which the tensors of this step always are; None: they are new.
        latents: the latents of this step's tokens, of a model whose latents are cached (`latents.Latents`);
            ``kv_caches`` then are ``[num_blocks, B, Dk]``.
        buffer: where fused layers write intermediate results (`workspace.Buffer`); None: into new memory.
    """

    kv_caches: tuple[torch.Tensor, ...]
    kv_scales: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor | None
    windows: tuple[int | None, ...]
    shared_prefix: bool = False
    rotary_halves: dict[int, Any] = field(default_factory=dict)
    latents: Any = None
    workspace: Any = None
    buffer: Any = None


def register_attention() -> None:
    """Register "cupaged" as an attention implementation of transformers; calling it again has no effect."""
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

    `attention_probe` has checked that the model passes no other keyword that changes the result.

    Args:
        query: ``[1, H, T, D]``.
        key, value: ``[1, Hkv, T, D]`` and ``[1, Hkv, T, Dv]``. Where the cache
            has more heads or longer ones, they are repeated and padded with zeros.
        attention_mask: None: transformers builds no mask for this attention; it follows from ``paged``.
        scaling: factor of the logits; None: 1 / sqrt(D).
        softcap: soft cap of the logits; None: no cap.
        s_aux: attention sinks ``[H]``.

    Returns:
        The output ``[1, T, H, Dv]``, and None in place of attention weights.
    """
    if paged.latents is not None:
        return paged.latents.attend(module, query, scaling, paged), None
    layer: int = module.layer_idx  # type: ignore[assignment]
    kv_cache = paged.kv_caches[layer]
    k_scale, v_scale = (None, None) if paged.kv_scales is None else paged.kv_scales[layer]
    queries, keys, values = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))
    key_size, value_size = key.shape[3], value.shape[3]
    num_kv_heads, head_size = kv_cache.shape[2], kv_cache.shape[4]
    if (key.shape[1], key_size, value_size) != (num_kv_heads, head_size, head_size):
        scaling = key_size**-0.5 if scaling is None else scaling
        queries = pad(queries, (0, head_size - key_size))
        keys, values = (_as_in_cache(each, num_kv_heads, head_size) for each in (keys, values))
    cupaged.reshape_and_cache(keys, values, kv_cache, paged.slot_mapping, k_scale, v_scale)
    out = cupaged.paged_attention(
        queries,
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
    if value_size != head_size:
        out = out[..., :value_size]
    return out.unsqueeze(0), None


def _as_in_cache(heads: torch.Tensor, num_heads: int, head_size: int) -> torch.Tensor:
    """Repeat the heads of ``[T, h, d]`` and pad them with zeros, to ``[T, num_heads, head_size]``."""
    return pad(heads, (0, head_size - heads.shape[2])).repeat_interleave(num_heads // heads.shape[1], dim=1)
