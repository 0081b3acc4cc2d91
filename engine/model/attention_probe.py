"""Find out what attention a model's layers need by running the model's own code.

A configuration does not tell: one model class reads an entry as a window, another ignores it, and in a third
it is left over from another model. So two rows of three tokens run through the model with an attention that
only records the keys that it gets and the mask function that the model asked transformers for. Eager and
SDPA attention depend on that mask alone.

In this run every token attends only to itself. If its result still depends on the token before it, the model
has another path between tokens, such as a convolution, whose state the paged cache would lose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from cupaged.checks import MAX_HEAD_SIZE

PROBE_NAME = "cupaged-probe"
SUPPORTED = "the paged cache serves causal attention, with or without a sliding window"
_TOKENS = 3
_MAX_POSITIONS = 1 << 20  # maximum number of positions at which masks are checked
# Relative change of a result by another token. Smaller ones are rounding, which may select other experts.
_MAX_DEPENDENCE = 0.05
_RULE = "_cupaged_rule"  # attribute of a mask that holds its `_Rule`

# Keywords that models pass to their attention and that do not change its result here: they are for training
# or for other outputs, or repeat what positions and mask say.
_WITHOUT_EFFECT = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "dropout", "is_causal",
    "logits_to_keep", "max_length_k", "max_length_q", "output_attentions", "output_hidden_states",
    "output_router_logits", "past_key_values", "position_ids", "return_dict", "sliding_window", "use_cache",
}  # fmt: skip
# Explanations of some unsupported keywords.
_MEANING = {
    "block_indices": "block_indices (sparse attention: each token chooses blocks of keys)",
    "indices": "indices (sparse attention: each token chooses its keys)",
    "position_bias": "position_bias (numbers added to the logits)",
}
# Keywords that `paged_attention_forward` takes.
_SUPPORTED_KEYWORDS = {"scaling", "softcap", "s_aux"}


class NotHandedOnError(ValueError):
    """Report that an attention does not get the arguments of the model's forward."""


@dataclass(frozen=True)
class LayerAttention:
    """Describe the attention of one layer.

    Args:
        module: the module that attends.
        num_heads: number of heads of queries.
        num_kv_heads: number of heads of keys and of values.
        head_size: number of elements of a key, or of a value if these are longer.
        value_size: number of elements of a value.
        window: sliding window in tokens, including the token itself; None: no window.
    """

    module: torch.nn.Module
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    window: int | None


@dataclass(frozen=True, eq=False)
class _Rule:
    """Hold the index-based function of transformers behind a mask.

    Args:
        visible: mask function of batch, head, query and key indices.
        span: window or chunk size that transformers passes with the mask, if any.
        device: device on which the function runs.
    """

    visible: Callable[..., torch.Tensor]
    span: int | None
    device: torch.device


@dataclass
class Probe:
    """Collect what the layers do; passed in place of `AttentionMetadata` during the probe.

    Args:
        num_positions: maximum number of tokens of a sequence.
        layers: the attention of each layer so far, by layer index.
        windows: the windows of the masks so far.
    """

    num_positions: int
    layers: dict[int, LayerAttention] = field(default_factory=dict)
    windows: dict[_Rule, int | None] = field(default_factory=dict)


def probe_layers(model: Any, num_positions: int | None) -> tuple[LayerAttention, ...]:
    """Return the attention of every layer that keeps keys and values, in order.

    Args:
        model: a transformers decoder; its attention implementation is restored at the end.
        num_positions: maximum number of tokens of a sequence; None: the model has no maximum.

    Raises:
        ValueError: the paged attention does not support a layer.
    """
    AttentionInterface.register(PROBE_NAME, _record_layer)
    AttentionMaskInterface.register(PROBE_NAME, _mask_with_rule)
    text_config = model.config.get_text_config(decoder=True)
    original = text_config._attn_implementation
    model.set_attn_implementation(PROBE_NAME)
    try:
        if text_config._attn_implementation != PROBE_NAME:
            raise ValueError("its attention is not an interface of transformers")
        limited = num_positions is not None and num_positions > 0  # some models have -1 for no limit
        probe = Probe(min(num_positions or 0, _MAX_POSITIONS) if limited else _MAX_POSITIONS)
        device = next(model.parameters()).device
        positions = torch.arange(_TOKENS, device=device)[None].expand(2, -1)
        token_ids = torch.zeros_like(positions).contiguous()
        token_ids[1, 0] = 1
        # Not in inference mode, in which `_base` of a view is not kept (see `_rule`).
        with torch.no_grad():
            logits = model(input_ids=token_ids, position_ids=positions, use_cache=False, paged=probe).logits
    finally:
        model.set_attn_implementation(original)
    layers = [probe.layers[index] for index in sorted(probe.layers)]
    num_layers = max(text_config.num_hidden_layers, max(probe.layers, default=-1) + 1)
    missing = [index for index in range(num_layers) if index not in probe.layers]
    if missing:
        raise ValueError(f"of its {num_layers} layers these do not keep keys and values: {_listed(missing)}")
    first, second = logits[:, 1:].float()  # the rows differ in token 0 only
    if float((first - second).norm()) > _MAX_DEPENDENCE * float(first.norm()):
        raise ValueError("its tokens depend on those before them beside the attention, as in a convolution")
    widest = max(layer.num_kv_heads for layer in layers)
    if any(widest % layer.num_kv_heads or layer.num_heads % widest for layer in layers):
        numbers = sorted({layer.num_kv_heads for layer in layers})
        raise ValueError(f"its layers have different numbers of KV heads: {_listed(numbers)}")
    return tuple(layers)


def _record_layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    paged: Probe | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Record a layer's attention; return the result of tokens that attend only to themselves.

    Raises:
        ValueError: the paged attention does not support the layer.
    """
    name = type(module).__name__
    if not isinstance(paged, Probe):
        raise NotHandedOnError(f"{name} does not get the arguments of the model's forward")
    unknown = [
        keyword
        for keyword, argument in keywords.items()
        if argument is not None and keyword not in _WITHOUT_EFFECT and keyword not in _SUPPORTED_KEYWORDS
    ]
    if unknown:
        raise ValueError(f"{name} attends with {', '.join(_MEANING.get(k, k) for k in sorted(unknown))}")
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise ValueError(f"{name} does not say which layer it is (layer_idx)")
    if index in paged.layers:  # the second call would overwrite the keys and values of the first
        raise ValueError(f"{name} attends twice in layer {index}")
    num_kv_heads, num_keys, key_size = key.shape[1:]
    if num_keys != query.shape[2]:
        raise ValueError(f"{name} has {num_keys} keys for {query.shape[2]} tokens")
    if value.shape[:3] != key.shape[:3] or query.shape[3] != key_size:
        raise ValueError(
            f"{name} has keys of {num_kv_heads} heads of {key_size}, values of {value.shape[1]} heads of "
            f"{value.shape[3]} and queries of {query.shape[3]}"
        )
    head_size = max(key_size, value.shape[3])
    if head_size > MAX_HEAD_SIZE:
        raise ValueError(f"{name} has heads of {head_size}, and the largest are {MAX_HEAD_SIZE}")
    rule = _rule(name, attention_mask)
    if rule not in paged.windows:
        paged.windows[rule] = _window(name, rule, paged.num_positions)
    paged.layers[index] = LayerAttention(
        module, query.shape[1], num_kv_heads, head_size, value.shape[3], paged.windows[rule]
    )
    return value.repeat_interleave(query.shape[1] // num_kv_heads, dim=1).transpose(1, 2).contiguous(), None


def _mask_with_rule(
    mask_function: Callable[..., torch.Tensor],
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **keywords: Any,
) -> torch.Tensor | None:
    """Build the mask of eager attention and attach its `_Rule`.

    transformers calls this with keywords, in `create_causal_mask` and similar functions.
    """
    keywords["allow_is_bidirectional_skip"] = False
    mask = eager_mask(mask_function=mask_function, local_size=local_size, device=device, **keywords)
    if mask is not None:
        setattr(mask, _RULE, _Rule(mask_function, local_size, torch.device(device)))
    return mask


def _rule(name: str, mask: torch.Tensor | None) -> _Rule:
    """Return the rule of the mask that a layer of class ``name`` got.

    Raises:
        ValueError: there is no mask, or the model built it itself.
    """
    if mask is None:
        raise ValueError(f"{name} attends without a mask, to later tokens as well")
    rule = getattr(mask, _RULE, None)
    if rule is None and mask._base is not None:  # a slice
        rule = getattr(mask._base, _RULE, None)
    if rule is None:
        raise ValueError(f"{name} attends with a mask of its own")
    return rule


def _window(name: str, rule: _Rule, num_positions: int) -> int | None:
    """Return the sliding window of a mask in tokens; None for a plain causal mask.

    Raises:
        ValueError: the mask is neither.
    """
    last = num_positions - 1
    span = rule.span or 1
    # Positions at which windows and chunks begin and end.
    queries = (0, 1, span - 1, span, span + 1, 2 * span - 1, 2 * span, last // 2, last)
    keys = torch.arange(num_positions, device=rule.device)
    zero = torch.zeros((), dtype=torch.int64, device=rule.device)
    rows: list[tuple[int, torch.Tensor]] = []
    for query in sorted({min(query, last) for query in queries}, reverse=True):
        try:
            row = rule.visible(zero, zero, zero + query, keys)
        except Exception as error:  # the function depends on the prompt
            raise ValueError(f"{name} attends with a mask that is not of positions only") from error
        rows.append((query, row.expand(num_positions)))
    num_visible = int(rows[0][1].sum())
    window = None if num_visible == num_positions else num_visible
    for query, row in rows:
        expected = keys <= query
        if window is not None:
            expected &= keys > query - window
        if not torch.equal(row, expected):
            raise ValueError(f"{name} attends {_pattern(query, row, rule.span)}")
    return window


def _pattern(query: int, row: torch.Tensor, span: int | None) -> str:
    """Describe an unsupported mask by the keys that a query sees, for an error message."""
    if bool(row[query + 1 :].any()):
        return "to later tokens as well"
    if span is not None:
        keys = torch.arange(len(row), device=row.device)
        if torch.equal(row, (keys <= query) & (keys // span == query // span)):
            return f"in chunks of {span} tokens"
    return "with a mask that is neither causal nor a sliding window"


def _listed(indices: list[int]) -> str:
    return ", ".join(map(str, indices))
