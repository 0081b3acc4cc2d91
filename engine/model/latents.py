"""Cache the latents of multi-head latent attention (MLA), where a model compresses its keys and values.

transformers' layers hand a token's latent and the part of its key with RoPE to their cache, and expand what
they get back into keys and values of every head. Here the cache keeps them for the attention function, which
writes them into blocks and attends to them without an expansion: the up-projection of the keys is applied to
the query, and that of the values to the result (DeepSeek-V2, section 2.1.2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import Cache

import cupaged
from cupaged import mla_checks

from .attention import AttentionMetadata
from .attention_probe import LayerAttention
from .fusion.calls import attention_function

_PROBE_NAME = "cupaged-latents-probe"
_TOKENS = 5
_MULTIPLE = 8  # elements of a part of a row
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative to a row's largest


class Latents(Cache):
    """Take the latents of a step from the layers, in place of a cache of transformers."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._of_layer: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a layer's latents ``[1, 1, T, Dv]`` and keys with RoPE ``[1, 1, T, Dk - Dv]``."""
        self._of_layer[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def attend(
        self, module: Any, query: torch.Tensor, scaling: float | None, paged: AttentionMetadata
    ) -> torch.Tensor:
        """Write the latents of a layer to the paged cache and attend over it.

        Args:
            module: the layer's attention, with an `Expansion`.
            query: ``[1, H, T, Dn + Dr]``, Dr elements with RoPE after Dn without.

        Returns:
            ``[1, T, H, dv]``.
        """
        latents, rotary = self.take(module.layer_idx)
        cache = paged.kv_caches[module.layer_idx]
        cupaged.concat_and_cache_mla(latents[0, 0], rotary[0, 0], cache, paged.slot_mapping)
        size = rotary.shape[-1]
        plain, rotated = query[0].split((query.shape[-1] - size, size), -1)
        expansion: Expansion = module.kv_b_proj
        out = cupaged.mla_attention(
            torch.cat((plain @ expansion.of_keys, rotated), -1).transpose(0, 1).contiguous(),
            cache,
            paged.block_tables,
            paged.seq_lens,
            paged.query_start_loc,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            value_size=latents.shape[-1],
        )
        values = out.transpose(0, 1) @ expansion.of_values.transpose(1, 2)
        return values.transpose(0, 1).unsqueeze(0)

    def take(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents of a layer, and forget them."""
        return self._of_layer.pop(layer)


class Expansion(torch.nn.Module):
    """Hold the up-projection of a layer, in place of its linear layer.

    Args:
        weight: ``[H * (Dn + dv), Dv]``, for each head the rows of keys without RoPE, then those of values.
        key_size: Dn.
    """

    def __init__(self, weight: torch.Tensor, num_heads: int, key_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
        self._heads = self.weight.view(num_heads, -1, weight.shape[1])
        self._key_size = key_size

    @property
    def of_keys(self) -> torch.Tensor:
        """Return ``[H, Dn, Dv]``."""
        return self._heads[:, : self._key_size]

    @property
    def of_values(self) -> torch.Tensor:
        """Return ``[H, dv, Dv]``."""
        return self._heads[:, self._key_size :]

    def expanded(self, latents: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values, float32 ``[H, T, ...]``, of latents ``[T, Dv]`` and their RoPE part."""
        keys = latents.float() @ self.of_keys.float().transpose(1, 2)
        rotary = rotary.float().expand(len(keys), -1, -1)
        return torch.cat((keys, rotary), -1), latents.float() @ self.of_values.float().transpose(1, 2)


def cache_latents(model: Any, layers: tuple[LayerAttention, ...]) -> tuple[int, int] | None:
    """Let the layers of a model attend to cached latents, in place, if all of them compute what this does.

    Keys and values that they expand themselves are compared with ours once.

    Args:
        model: a decoder that was loaded with the "cupaged" attention.
        layers: the attention of its layers.

    Returns:
        The sizes Dk of a cached row and Dv of a latent; None: the model is left as it was.
    """
    modules = [layer.module for layer in layers]
    if any(layer.window is not None for layer in layers) or not all(map(_may_expand, modules)):
        return None
    seen = _expanded(model)
    if seen is None or set(seen) != set(modules):
        return None
    sizes = {(latents.shape[-1], rotary.shape[-1]) for latents, rotary, *_ in seen.values()}
    expansions = {module: _expansion(module, *seen[module]) for module in modules}
    if len(sizes) != 1 or None in expansions.values() or not _fits(*(sizes_of := sizes.pop())):
        return None
    for module, expansion in expansions.items():
        module._modules["kv_b_proj"] = expansion
        # What is expanded nobody reads.
        module.expand_kv = lambda latents, rotary: (latents, rotary)  # type: ignore[assignment]
    model.register_forward_pre_hook(_with_latents, with_kwargs=True)
    return sum(sizes_of), sizes_of[0]


def _with_latents(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a step of the engine its `Latents`."""
    paged = kwargs.get("paged")
    if isinstance(paged, AttentionMetadata):
        latents = Latents()
        kwargs = {**kwargs, "past_key_values": latents, "paged": replace(paged, latents=latents)}
    return args, kwargs


def _may_expand(module: Any) -> bool:
    linear = getattr(module, "kv_b_proj", None)
    return hasattr(module, "expand_kv") and isinstance(linear, torch.nn.Linear) and linear.bias is None


def _fits(latent_size: int, rotary_size: int) -> bool:
    """Return whether the kernels take rows of these parts."""
    multiples = latent_size % _MULTIPLE == 0 and rotary_size % _MULTIPLE == 0 and rotary_size > 0
    return (
        multiples
        and latent_size <= mla_checks.MAX_VALUE_SIZE
        and latent_size + rotary_size <= mla_checks.MAX_KEY_SIZE
    )


def _expanded(model: Any) -> dict[Any, tuple[torch.Tensor, ...]] | None:
    """Return for each attending module its latents, and the keys and values that it makes of them."""
    latents, seen = Latents(), dict[Any, tuple[torch.Tensor, ...]]()

    def watch(module: Any, query: Any, key: Any, value: Any, mask: Any, **keywords: Any) -> Any:
        if keywords.get("softcap") is None and keywords.get("s_aux") is None:
            seen[module] = (*latents.take(module.layer_idx), key, value)
        return value.transpose(1, 2).contiguous(), None

    device = next(model.parameters()).device
    tokens = torch.arange(_TOKENS, device=device)[None]
    try:
        with torch.no_grad(), attention_function(model, _PROBE_NAME, watch):
            model(input_ids=tokens, position_ids=tokens, past_key_values=latents, use_cache=True)
    except (AttributeError, TypeError, LookupError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    return seen


def _expansion(
    module: Any, latents: torch.Tensor, rotary: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Expansion | None:
    """Return a module's up-projection, if keys and values are what it makes of the latents."""
    _, num_heads, num_tokens, key_size = key.shape
    if latents.shape[:3] != (1, 1, num_tokens) or rotary.shape[:3] != (1, 1, num_tokens):
        return None
    plain_size = key_size - rotary.shape[-1]
    weight = module.kv_b_proj.weight
    if plain_size <= 0 or weight.shape != (num_heads * (plain_size + value.shape[-1]), latents.shape[-1]):
        return None
    expansion = Expansion(weight, num_heads, plain_size)
    expected = expansion.expanded(latents[0, 0], rotary[0, 0])
    return expansion if all(map(_close, (key[0], value[0]), expected)) else None


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = (actual.float() - expected).abs().amax(-1)
    tolerance = _TOLERANCE.get(actual.dtype, 0.0)
    return bool((difference <= tolerance * expected.abs().amax(-1) + 1e-30).all())
