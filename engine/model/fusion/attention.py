"""Recognise attention: merged projections, QK norm, rotary positions, attention, output projection."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from .calls import Call, NotRecognised, Stub, call_with_stubs
from .formulas import Draw, agree, rotate
from .linears import linear_stubs, plain_linears
from .norms import RMSNorm

# How the cosines of a step hold one half: twice in turn, each number twice, or once.
HALVES, PAIRS, ONCE = "halves", "pairs", "once"


@dataclass(frozen=True)
class Rotary:
    """Describe the rotary positions of an attention.

    Args:
        keyword: name of the argument with cosines and sines.
        layout: how they hold the ``[T, R / 2]`` that the operator takes.
        interleaved: pairs are (2i, 2i + 1), not (i, i + R / 2).
    """

    keyword: str
    layout: str
    interleaved: bool


@dataclass(frozen=True, eq=False)
class Attention:
    """Describe an attention module.

    Args:
        inputs: names of the linear layers whose outputs are, together, query, key and value.
        output: name of the output projection.
        rotary: None: no positions.
        norms: RMS norms of the heads of query and key, or None.
        sinks: name of the parameter with attention sinks, or None.
        layer: index of its cache.
    """

    module: torch.nn.Module
    inputs: tuple[str, ...]
    output: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    rotary: Rotary | None
    norms: tuple[RMSNorm, RMSNorm] | None
    scaling: float | None
    softcap: float | None
    sinks: str | None
    layer: int


@dataclass
class _Seen:
    """Hold what the attention function was called with, and its random result."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    keywords: dict[str, Any]


@dataclass
class _Watch:
    """Collect the calls of the attention function; passed in place of `AttentionMetadata`."""

    draw: Draw
    calls: list[_Seen] = field(default_factory=list)


def attend_to_stub(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    paged: _Watch,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Stand in for the attention function, with a random result."""
    _, num_heads, num_tokens, head_size = query.shape
    output = paged.draw.rows(1, num_tokens, num_heads * head_size)
    paged.calls.append(_Seen(query, key, value, output, keywords))
    return output.view(1, num_tokens, num_heads, head_size), None


def recognise_attention(
    module: torch.nn.Module,
    call: Call,
    norms: dict[torch.nn.Module, RMSNorm],
    draw: Draw,
) -> Attention:
    """Return what an attention module computes; linear layers and norms are replaced by random results.

    The model's attention function is `attend_to_stub` meanwhile.

    Args:
        call: a call in a batch whose positions differ.
        norms: the RMS norms of the model.

    Raises:
        NotRecognised: it computes something that the operators do not.
    """
    hidden = call.hidden
    if hidden is None or hidden.dim() != 3 or hidden.shape[0] != 1:
        raise NotRecognised("it is not called with the hidden states of a step")
    linears = linear_stubs(plain_linears(module), draw)
    of_norms = {
        name: Stub(child, lambda x: draw.rows(*x.shape))
        for name, child in module._modules.items()
        if child in norms
    }
    x = draw.rows(*hidden.shape)
    args, kwargs = call.with_hidden(x)
    keyword, layout = _rotary_argument(call)
    half: _Half | None = None
    if keyword is not None:
        half = _half(call.kwargs[keyword], layout)
        half = (draw.plain(*half[0].shape), draw.plain(*half[1].shape))
        kwargs = {**kwargs, keyword: tuple(_whole(part, layout) for part in half)}
    watch = _Watch(draw)
    result = call_with_stubs(module, {**linears, **of_norms}, args, {**kwargs, "paged": watch})
    seen = watch.calls
    if len(seen) != 1 or not isinstance(result, tuple) or any(part is not None for part in result[1:]):
        raise NotRecognised("it does not attend once")
    inputs = [name for name, stub in linears.items() if stub.call.hidden.equal(x)]  # type: ignore[union-attr]
    outputs = [name for name in linears if name not in inputs]
    if not inputs or len(outputs) != 1 or result[0] is not linears[outputs[0]].call.output:
        raise NotRecognised("its linear layers are not query, key, value and output alone")
    attended = linears[outputs[0]].call.hidden
    if not attended.reshape(1, x.shape[1], -1).equal(seen[0].output):  # type: ignore[union-attr]
        raise NotRecognised("it changes what it attended to before the output projection")
    pairs = [(norms[module._modules[name]], stub.call) for name, stub in of_norms.items()]  # type: ignore[index]
    names, interleaved, of_heads = _projections(inputs, linears, pairs, seen[0], half)
    keywords = seen[0].keywords
    return Attention(
        module,
        names,
        outputs[0],
        num_heads=seen[0].query.shape[1],
        num_kv_heads=seen[0].key.shape[1],
        head_size=seen[0].key.shape[3],
        rotary=None if interleaved is None else Rotary(str(keyword), layout, interleaved),
        norms=of_heads,
        scaling=_number("scaling", keywords),
        softcap=_number("softcap", keywords),
        sinks=_sinks(module, keywords.get("s_aux")),
        layer=module.layer_idx,  # type: ignore[arg-type]
    )


_Norms = list[tuple[RMSNorm, Call]]
_Half = tuple[torch.Tensor, torch.Tensor]  # cosines and sines [T, R / 2]


def _projections(
    inputs: list[str], linears: dict[str, Stub], norms: _Norms, seen: _Seen, half: _Half | None
) -> tuple[tuple[str, ...], bool | None, tuple[RMSNorm, RMSNorm] | None]:
    """Return the linear layers in the order query, key, value; whether pairs of the rotation are interleaved
    (None: there is none); and the norms of query and key."""
    _, num_kv_heads, num_tokens, head_size = seen.key.shape
    sizes = [seen.query.shape[1], num_kv_heads, num_kv_heads]
    reason = "query, key and value are not parts of one merged projection"
    for names in itertools.permutations(inputs):
        merged = torch.cat([linears[name].call.output for name in names], -1)
        if merged.shape != (1, num_tokens, sum(sizes) * head_size):
            break
        query, key, value = merged.view(1, num_tokens, -1, head_size).transpose(1, 2).split(sizes, 1)
        if not value.equal(seen.value):
            continue
        reason = "query and key are neither rotated in pairs nor left, with or without a norm of each head"
        normed = [_normed(heads, norms) for heads in (query, key)]
        (query, of_query), (key, of_key) = normed
        if sum(norm is not None for norm in (of_query, of_key)) != len(norms):
            continue
        for interleaved in (None,) if half is None else (False, True, None):
            if interleaved is None:
                matches = query.equal(seen.query) and key.equal(seen.key)
            else:
                assert half is not None
                matches = agree(seen.query, rotate(query, *half, interleaved)) and agree(
                    seen.key, rotate(key, *half, interleaved)
                )
            if matches:
                return names, interleaved, _pair(of_query, of_key)
    raise NotRecognised(reason)


def _normed(heads: torch.Tensor, norms: _Norms) -> tuple[torch.Tensor, RMSNorm | None]:
    """Return what a norm made of heads ``[1, H, T, D]``, or the heads if no norm took them."""
    for norm, call in norms:
        assert call.hidden is not None
        if call.hidden.equal(heads):
            return call.output, norm
        if call.hidden.equal(heads.transpose(1, 2)):
            return call.output.transpose(1, 2), norm
    return heads, None


def _pair(query: RMSNorm | None, key: RMSNorm | None) -> tuple[RMSNorm, RMSNorm] | None:
    if query is None or key is None:
        if query is not key:
            raise NotRecognised("it has a norm of queries or of keys alone")
        return None
    if (query.epsilon, query.weight_offset) != (key.epsilon, key.weight_offset):
        raise NotRecognised("the norms of queries and of keys differ")
    return query, key


def _rotary_argument(call: Call) -> tuple[str | None, str]:
    """Return the name of the argument with cosines and sines, if there is one, and their layout."""
    for name, value in call.kwargs.items():
        if isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, torch.Tensor) for v in value):
            cos, sin = value
            if cos.dim() != 3 or cos.shape[0] != 1 or cos.shape != sin.shape:
                raise NotRecognised(f"its {name} are not cosines and sines of one position a token")
            for layout in (HALVES, PAIRS):
                if all(
                    part.shape[-1] % 2 == 0 and part[0].equal(_whole(half, layout)[0])
                    for part, half in zip(value, _half(value, layout))
                ):
                    return name, layout
            return name, ONCE
    if any(isinstance(value, tuple) for value in call.args):
        raise NotRecognised("its cosines and sines have no name")
    return None, ONCE


def half_of(part: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the ``[T, R / 2]`` that the operator takes of cosines or sines ``[1, T, ...]``."""
    if layout == HALVES:
        half = part[0, :, : part.shape[-1] // 2]
    else:
        half = part[0, :, ::2] if layout == PAIRS else part[0]
    return half if half.stride(-1) == 1 else half.contiguous()


def _half(parts: tuple[torch.Tensor, torch.Tensor], layout: str) -> _Half:
    return half_of(parts[0], layout), half_of(parts[1], layout)


def _whole(half: torch.Tensor, layout: str) -> torch.Tensor:
    """Return ``[1, T, ...]``, of which `half_of` is the inverse."""
    if layout == HALVES:
        return torch.cat((half, half), -1)[None]
    return half.repeat_interleave(2, -1)[None] if layout == PAIRS else half[None]


def _number(name: str, keywords: dict[str, Any]) -> float | None:
    value = keywords.get(name)
    if value is not None and not isinstance(value, (int, float)):
        raise NotRecognised(f"its {name} is not a number")
    return None if value is None else float(value)


def _sinks(module: torch.nn.Module, sinks: torch.Tensor | None) -> str | None:
    if sinks is None:
        return None
    for name, parameter in module._parameters.items():
        if parameter is sinks:
            return name
    raise NotRecognised("its sinks are not a parameter")
