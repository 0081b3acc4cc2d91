"""The seam: transformers' attention interface on one side, the paged kernels on the other.

A model loaded with ``attn_implementation="cupaged"`` calls `paged_attention_forward` in every layer, with
keys and values unrepeated and after the rotary embedding. The batch is one row of T tokens of all sequences;
which token is whose stands in `AttentionMetadata`, a keyword argument of ``model.forward``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

import cupaged

ATTENTION_NAME = "cupaged"
_OF_THE_MASK = "of the mask"  # a window
# Keywords of models that attend to some keys only, or with other weights; the kernels know neither.
_UNKNOWN = ("position_bias", "indices", "block_indices", "sinks")


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
        shared_prefix: neighbours begin with the same blocks, and it may pay to read those once.
        attended: the layers that have attended in this step.
    """

    kv_caches: tuple[torch.Tensor, ...]
    kv_scales: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor | None
    shared_prefix: bool = False
    attended: set[int] = field(default_factory=set)


def register_attention() -> None:
    """Make "cupaged" an attention implementation of transformers. Doing it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | str | None = _OF_THE_MASK,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    paged: AttentionMetadata | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Write this layer's keys and values to the cache and attend over it.

    Args:
        query: ``[1, H, T, D]``. key, value: ``[1, Hkv, T, D]``.
        attention_mask: None; the mask follows from ``paged``. transformers builds none for this attention, so
            one that comes is the model's own.
        sliding_window: where a model leaves it out, its window is in the mask that transformers would build.
        s_aux: attention sinks ``[H]``.
        is_causal: where a model leaves it out, its module says it.

    Returns:
        ``[1, T, H, D]`` and no attention weights.
    """
    if paged is None:
        raise ValueError(
            f"{type(module).__name__} was called without the argument `paged` (AttentionMetadata): the model "
            "does not hand arguments on to its attention, or was not run through cupaged.engine.LLM"
        )
    unknown = [name for name in _UNKNOWN if others.get(name) is not None]
    if attention_mask is not None or unknown:
        what = ", ".join(unknown) or "a mask of its own"
        raise ValueError(f"{type(module).__name__} attends with {what}, which is not supported")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{type(module).__name__} attends to later tokens as well, which is not supported")
    layer: int = module.layer_idx  # type: ignore[assignment]
    if layer in paged.attended:  # the keys and values of one time would be lost
        raise ValueError(f"{type(module).__name__} attends twice in layer {layer}, which is not supported")
    paged.attended.add(layer)
    window = _mask_window(module.config, layer) if isinstance(sliding_window, str) else sliding_window
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
        sliding_window=window,
        logits_soft_cap=softcap,
        sinks=None if s_aux is None else s_aux.float(),
        k_scale=k_scale,
        v_scale=v_scale,
        shared_prefix=paged.shared_prefix,
    )
    return out.unsqueeze(0), None


def _mask_window(config: Any, layer: int) -> int | None:
    """The window of a layer in transformers' masks (phimoe, qwen2_moe)."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)
