"""What a model's layers attend to, asked of the model's own code before there is an engine.

A configuration does not say it: the same entry is a window in one class, ignored in the next, and left over
from another model in a third. So two rows of three tokens run through the model with an attention that only
looks: at the keys it gets, and at the rule behind the mask that the model asked transformers for. Eager and
SDPA attention obey that mask and nothing else.

In that run every token attends to itself alone. If the token before it changes its result all the same, the
model passes something on beside the attention, as a convolution does, which the paged cache would lose.
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
SUPPORTED = (
    "the paged cache serves causal attention, with or without a sliding window, whose keys and values are of "
    "one size in all layers"
)
_TOKENS = 3
_POSITIONS = 1 << 20  # how far masks are looked at
# Less is rounding, which moves the experts of a few tokens.
_CARRIED = 0.05
_RULE = "_cupaged_rule"  # attribute of a mask: whom it lets see whom

# Keywords that go to the attention of some models and change none of its results here: for training, for
# outputs beside the result, or said by the positions and the mask already.
_WITHOUT_EFFECT = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "dropout", "is_causal",
    "logits_to_keep", "max_length_k", "max_length_q", "output_attentions", "output_hidden_states",
    "output_router_logits", "past_key_values", "position_ids", "return_dict", "sliding_window", "use_cache",
}  # fmt: skip
# Some of those that it does not know.
_MEANING = {
    "block_indices": "block_indices (sparse attention: each token chooses blocks of keys)",
    "indices": "indices (sparse attention: each token chooses its keys)",
    "position_bias": "position_bias (numbers added to the logits)",
}
# What the paged attention takes.
_PASSED_ON = {"scaling", "softcap", "s_aux"}


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer.

    Args:
        window: number of the last tokens it sees, the token itself included; None: all.
    """

    num_kv_heads: int
    head_size: int
    window: int | None


@dataclass(frozen=True, eq=False)
class _Rule:
    """Whom a mask lets see whom: transformers' index-based function, with the place it runs at."""

    visible: Callable[..., torch.Tensor]
    span: int | None  # where a pattern may turn, if transformers says so
    device: torch.device


@dataclass
class Probe:
    """Stands in the place of `AttentionMetadata` while the model is looked at.

    Args:
        num_positions: sequences have no more tokens.
        layers: what has been found, by the layer's index.
        windows: of the masks that have been looked at.
    """

    num_positions: int
    layers: dict[int, LayerAttention] = field(default_factory=dict)
    windows: dict[_Rule, int | None] = field(default_factory=dict)


def probe_layers(model: Any, num_positions: int | None) -> tuple[LayerAttention, ...]:
    """Return the attention of every layer that keeps keys and values, in order.

    Args:
        model: a transformers decoder; it is left with the attention that it has.
        num_positions: maximum number of tokens of a sequence; None: the model says none.

    Raises:
        ValueError: the paged attention cannot do what a layer asks for.
    """
    AttentionInterface.register(PROBE_NAME, _look)
    AttentionMaskInterface.register(PROBE_NAME, _mask_with_rule)
    text_config = model.config.get_text_config(decoder=True)
    usual = text_config._attn_implementation
    model.set_attn_implementation(PROBE_NAME)
    try:
        if text_config._attn_implementation != PROBE_NAME:
            raise ValueError("its attention is not an interface of transformers")
        limited = num_positions is not None and num_positions > 0  # some say -1 for no limit
        probe = Probe(min(num_positions or 0, _POSITIONS) if limited else _POSITIONS)
        device = next(model.parameters()).device
        positions = torch.arange(_TOKENS, device=device)[None].expand(2, -1)
        token_ids = torch.zeros_like(positions).contiguous()
        token_ids[1, 0] = 1
        # Not in inference mode, where views do not know of what.
        with torch.no_grad():
            logits = model(input_ids=token_ids, position_ids=positions, use_cache=False, paged=probe).logits
    finally:
        model.set_attn_implementation(usual)
    layers = [probe.layers[index] for index in sorted(probe.layers)]
    num_layers = max(text_config.num_hidden_layers, max(probe.layers, default=-1) + 1)
    missing = [index for index in range(num_layers) if index not in probe.layers]
    if missing:
        raise ValueError(f"of its {num_layers} layers these do not keep keys and values: {_listed(missing)}")
    one, other = logits[:, 1:].float()
    if float((one - other).norm()) > _CARRIED * float(one.norm()):
        raise ValueError("its tokens depend on those before them beside the attention, as in a convolution")
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, layer in enumerate(layers):
        shapes.setdefault((layer.num_kv_heads, layer.head_size), []).append(index)
    if len(shapes) > 1:
        found = "; ".join(f"{heads} heads of {size} in {_listed(of)}" for (heads, size), of in shapes.items())
        raise ValueError(f"its layers have keys of different shapes: {found}")
    return tuple(layers)


def _look(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    paged: Probe | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Record a layer. The result is as if each token saw itself only."""
    name = type(module).__name__
    if not isinstance(paged, Probe):
        raise ValueError(f"{name} does not hand arguments of the model's forward on to its attention")
    unknown = [
        key
        for key, given in others.items()
        if given is not None and key not in _WITHOUT_EFFECT and key not in _PASSED_ON
    ]
    if unknown:
        raise ValueError(
            f"{name} attends with {', '.join(_MEANING.get(key, key) for key in sorted(unknown))}"
        )
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise ValueError(f"{name} does not say which layer it is (layer_idx)")
    if index in paged.layers:  # the keys and values of one time would be lost
        raise ValueError(f"{name} attends twice in layer {index}")
    num_kv_heads, num_keys, head_size = key.shape[1:]
    if num_keys != query.shape[2]:
        raise ValueError(f"{name} has {num_keys} keys for {query.shape[2]} tokens")
    if value.shape != key.shape or query.shape[3] != head_size:
        raise ValueError(
            f"{name} has keys of {num_kv_heads} heads of {head_size} and values of {value.shape[1]} heads of "
            f"{value.shape[3]}"
        )
    if head_size > MAX_HEAD_SIZE:
        raise ValueError(f"{name} has heads of {head_size}, and the largest are {MAX_HEAD_SIZE}")
    rule = _rule(name, attention_mask)
    if rule not in paged.windows:
        paged.windows[rule] = _window(name, rule, paged.num_positions)
    paged.layers[index] = LayerAttention(num_kv_heads, head_size, paged.windows[rule])
    return value.repeat_interleave(query.shape[1] // num_kv_heads, dim=1).transpose(1, 2).contiguous(), None


def _mask_with_rule(
    mask_function: Callable[..., torch.Tensor],
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> torch.Tensor | None:
    """Build the mask that eager attention has, and keep with it the function it is made of.

    transformers calls this from within its `create_causal_mask` and its kin, by keywords.
    """
    others["allow_is_bidirectional_skip"] = False
    mask = eager_mask(mask_function=mask_function, local_size=local_size, device=device, **others)
    if mask is not None:
        setattr(mask, _RULE, _Rule(mask_function, local_size, torch.device(device)))
    return mask


def _rule(name: str, mask: torch.Tensor | None) -> _Rule:
    if mask is None:
        raise ValueError(f"{name} attends without a mask, to later tokens as well")
    rule = getattr(mask, _RULE, None)
    if rule is None and mask._base is not None:  # a slice
        rule = getattr(mask._base, _RULE, None)
    if rule is None:
        raise ValueError(f"{name} attends with a mask of its own")
    return rule


def _window(name: str, rule: _Rule, num_positions: int) -> int | None:
    """Return the window of a mask; None where a token sees all tokens up to itself.

    Raises:
        ValueError: neither describes the mask.
    """
    last = num_positions - 1
    span = rule.span or 1
    turns = (0, 1, span - 1, span, span + 1, 2 * span - 1, 2 * span, last // 2, last)
    keys = torch.arange(num_positions, device=rule.device)
    zero = torch.zeros((), dtype=torch.int64, device=rule.device)
    rows: list[tuple[int, torch.Tensor]] = []
    for query in sorted({min(turn, last) for turn in turns}, reverse=True):
        try:
            row = rule.visible(zero, zero, zero + query, keys)
        except Exception as error:  # a function that looks at the prompt
            raise ValueError(f"{name} attends with a mask that is not of positions only") from error
        rows.append((query, row.expand(num_positions)))
    seen = int(rows[0][1].sum())
    window = None if seen == num_positions else seen
    for query, row in rows:
        expected = keys <= query
        if window is not None:
            expected &= keys > query - window
        if not torch.equal(row, expected):
            raise ValueError(f"{name} attends {_pattern(query, row, rule.span)}")
    return window


def _pattern(query: int, row: torch.Tensor, span: int | None) -> str:
    if bool(row[query + 1 :].any()):
        return "to later tokens as well"
    if span is not None:
        keys = torch.arange(len(row), device=row.device)
        if torch.equal(row, (keys <= query) & (keys // span == query // span)):
            return f"in chunks of {span} tokens"
    return "with a mask that is neither causal nor a sliding window"


def _listed(indices: list[int]) -> str:
    return ", ".join(map(str, indices))
