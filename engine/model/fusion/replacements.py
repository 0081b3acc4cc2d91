"""Replace the forward of recognised modules by fused operators.

A module keeps its place and its attributes; only its ``forward`` is overridden, and its linear layers may be
merged. What a call needs is looked up once, in `bind`, so that little Python runs between the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch

import cupaged
from cupaged.backends.cpu.tape import Tape, recorded

from ..attention import AttentionMetadata
from ..workspace import Workspace
from .attention import Attention, half_of
from .layers import Layer
from .linears import MergedLinear, can_replay, function_of
from .mlp import GatedMLP
from .norms import RMSNorm

# Returns where to write an intermediate result of a name and a number of columns; None: into new memory.
Buffer = Callable[[str, int], torch.Tensor | None]
Rows = Callable[[torch.Tensor, Buffer], torch.Tensor]  # from rows [T, C] to rows [T, C]
Halves = tuple[torch.Tensor | None, torch.Tensor | None]


class Replacement(Protocol):
    """A module that is replaced."""

    module: torch.nn.Module

    def bind(self) -> None:
        """Override the module's forward."""

    def release(self) -> None:
        """Drop the weights that `bind` looked up."""

    def keep(self) -> None:
        """Drop what `undo` needs."""

    def undo(self) -> None:
        """Restore the module."""


def _new(name: str, columns: int) -> None:
    """Let an intermediate result be written into new memory."""


def _columns(parent: torch.nn.Module, name: str) -> int:
    """Return the number of outputs of a linear layer."""
    return cast(torch.nn.Linear, parent.get_submodule(name)).out_features


def _restore(module: torch.nn.Module) -> None:
    vars(module).pop("forward", None)


class FusedNorm:
    """Replace an RMS norm; as the last one of a model it takes what the last layer has not added yet."""

    def __init__(self, norm: RMSNorm, source: Link | None = None) -> None:
        self.module = norm.module
        self._norm = norm
        self._source = source

    def bind(self) -> None:
        norm, source = self._norm, self._source
        weight, size = norm.weight.detach(), len(norm.weight)
        settings: dict[str, Any] = {"epsilon": norm.epsilon, "weight_offset": norm.weight_offset}
        rms_norm = cupaged.rms_norm

        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            return rms_norm(hidden_states.reshape(-1, size), weight, **settings).view(hidden_states.shape)

        def forward_and_add(hidden_states: torch.Tensor) -> torch.Tensor:
            residual, addend = source.take()  # type: ignore[union-attr]
            x = rms_norm(addend, weight, residual=residual, input_weight=source.weight, **settings)  # type: ignore[union-attr]
            return x.view(hidden_states.shape)

        self.module.forward = forward if source is None else forward_and_add

    def release(self) -> None:
        _restore(self.module)

    def keep(self) -> None:
        pass

    def undo(self) -> None:
        _restore(self.module)


class FusedMLP:
    """Replace a gated MLP by two linear layers and `cupaged.act_and_mul` between them."""

    def __init__(self, mlp: GatedMLP) -> None:
        self.module = mlp.module
        self._mlp = mlp
        self._merged = MergedLinear(mlp.module, mlp.inputs)
        self._merged.apply()

    def bind(self) -> None:
        self.rows = rows = self._make_rows()

        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            size = hidden_states.shape[-1]
            return rows(hidden_states.reshape(-1, size), _new).view(*hidden_states.shape[:-1], -1)

        self.module.forward = forward

    @property
    def can_replay(self) -> bool:
        return can_replay(self.module, self._merged.name, self._mlp.output)

    def _make_rows(self) -> Rows:
        names = self._merged.name, self._mlp.output
        gate_up, down = (function_of(self.module, name) for name in names)
        wide, size = (_columns(self.module, name) for name in names)
        activation, act_and_mul = self._mlp.activation, cupaged.act_and_mul

        def rows(x: torch.Tensor, buffer: Buffer) -> torch.Tensor:
            both = gate_up(x, buffer("gate and up", wide))
            product = act_and_mul(both, activation=activation, out=buffer("activated", wide // 2))
            return down(product, buffer("down", size))

        return rows

    def release(self) -> None:
        _restore(self.module)
        del self.rows

    def keep(self) -> None:
        self._merged.keep()

    def undo(self) -> None:
        _restore(self.module)
        self._merged.undo()


class FusedAttention:
    """Replace an attention module: one projection, `cupaged.rope_and_cache`, attention, one projection."""

    def __init__(self, attention: Attention) -> None:
        self.module = attention.module
        self._attention = attention
        self._merged = MergedLinear(attention.module, attention.inputs)
        self._merged.apply()

    def bind(self) -> None:
        self.rows = rows = self._make_rows()
        halves = self.halves

        def forward(hidden_states: torch.Tensor, *_: Any, **keywords: Any) -> tuple[torch.Tensor, None]:
            size = hidden_states.shape[-1]
            out = rows(hidden_states.view(-1, size), halves(keywords), keywords["paged"], _new)
            return out.view(*hidden_states.shape[:-1], -1), None

        self.module.forward = forward

    @property
    def halves(self) -> Callable[[dict[str, Any]], Halves]:
        """Return a function that cuts the cosines and sines among a call's keywords, once a step."""
        rotary = self._attention.rotary
        if rotary is None:
            return lambda keywords: (None, None)
        name, layout = rotary.keyword, rotary.layout

        def halves(keywords: dict[str, Any]) -> Halves:
            parts, paged = keywords[name], keywords["paged"]
            known = paged.rotary_halves
            entry = known.get(id(parts[0]))
            if entry is None:
                cut = half_of(parts[0], layout), half_of(parts[1], layout)
                if paged.workspace is not None:
                    cut = paged.workspace.keep_halves(len(known), cut)
                # Holds the whole tensors too, so that no other one gets their id.
                known[id(parts[0])] = entry = cut, parts
            return entry[0]

        return halves

    @property
    def can_replay(self) -> bool:
        return can_replay(self.module, self._merged.name, self._attention.output)

    def _make_rows(self) -> Callable[[torch.Tensor, Halves, AttentionMetadata, Buffer], torch.Tensor]:
        attention, module = self._attention, self.module
        names = self._merged.name, attention.output
        qkv, output = (function_of(module, name) for name in names)
        wide, columns = (_columns(module, name) for name in names)
        layer, head_size = attention.layer, attention.head_size
        sizes = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
        num_heads, size = sum(sizes), attention.num_heads * head_size
        rope: dict[str, Any] = {"interleaved": attention.rotary is not None and attention.rotary.interleaved}
        if attention.norms is not None:
            of_query, of_key = attention.norms
            rope |= {"query_weight": of_query.weight.detach(), "key_weight": of_key.weight.detach()}
            rope |= {"epsilon": of_query.epsilon, "weight_offset": of_query.weight_offset}
        attend: dict[str, Any] = {"scale": attention.scaling, "logits_soft_cap": attention.softcap}
        if attention.sinks is not None:
            attend["sinks"] = module._parameters[attention.sinks].detach().float()  # type: ignore[union-attr]
        rope_and_cache, paged_attention = cupaged.rope_and_cache, cupaged.paged_attention

        def rows(x: torch.Tensor, halves: Halves, paged: AttentionMetadata, buffer: Buffer) -> torch.Tensor:
            heads = qkv(x, buffer("query, key and value", wide)).view(-1, num_heads, head_size)
            query, key, value = heads.split_with_sizes(sizes, 1)
            out = buffer("attended", size)
            kv_cache = paged.kv_caches[layer]
            k_scale, v_scale = (None, None) if paged.kv_scales is None else paged.kv_scales[layer]
            rope_and_cache(
                query, key, value, *halves, kv_cache, paged.slot_mapping,
                k_scale=k_scale, v_scale=v_scale, **rope,
            )  # fmt: skip
            attended = paged_attention(
                query, kv_cache, paged.block_tables, paged.seq_lens, paged.query_start_loc,
                sliding_window=paged.windows[layer], k_scale=k_scale, v_scale=v_scale,
                shared_prefix=paged.shared_prefix,
                out=None if out is None else out.view(-1, sizes[0], head_size), **attend,
            )  # fmt: skip
            return output(attended.view(-1, size), buffer("projected", columns))

        return rows

    def release(self) -> None:
        _restore(self.module)
        del self.rows

    def keep(self) -> None:
        self._merged.keep()

    def undo(self) -> None:
        _restore(self.module)
        self._merged.undo()


class Link:
    """Carry the result of a layer's MLP to the norm that adds it to the hidden states, in one operator.

    Args:
        weight: weight of a norm of the result, before it is added; None: there is none.
    """

    __slots__ = ("addend", "residual", "weight")

    def __init__(self, weight: torch.Tensor | None) -> None:
        self.weight = weight
        self.residual: torch.Tensor | None = None
        self.addend: torch.Tensor | None = None

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        residual, addend = self.residual, self.addend
        self.residual = self.addend = None
        return residual, addend  # type: ignore[return-value]


class FusedLayer:
    """Replace a decoder layer, with additions to the hidden states as parts of the norms after them.

    The hidden states are added to in place.

    Args:
        attention: the replacement of its attention.
        mlp: the replacement of its MLP, or None: the module is called as it is.
        source: the link from the layer before, or None: hidden states come whole.
        linked: the module after this one takes the result through `link`.
    """

    def __init__(
        self,
        layer: Layer,
        attention: FusedAttention,
        mlp: FusedMLP | None,
        source: Link | None,
        linked: bool,
    ) -> None:
        self.module = layer.module
        self.link = Link(None if layer.after is None else layer.after[1].weight.detach())
        self._layer = layer
        self._attention = attention
        self._mlp = mlp
        self._source = source
        self._linked = linked

    def bind(self) -> None:
        """Override the module's forward, after its attention and MLP were bound."""
        layer, source, link, linked = self._layer, self._source, self.link, self._linked
        first, second = (norm.weight.detach() for norm in layer.before)
        after = None if layer.after is None else layer.after[0].weight.detach()
        norm = layer.before[0]
        settings: dict[str, Any] = {"epsilon": norm.epsilon, "weight_offset": norm.weight_offset}
        attend, halves, size = self._attention.rows, self._attention.halves, len(first)
        mlp = self._mlp.rows if self._mlp else _as_rows(layer.mlp)
        rms_norm, module = cupaged.rms_norm, self.module

        def compute(
            residual: torch.Tensor, x: torch.Tensor, rotary: Halves, paged: AttentionMetadata, buffer: Buffer
        ) -> torch.Tensor:
            normed = buffer("normed", size)
            if source is None:
                x = rms_norm(residual, first, out=normed, **settings)
            else:
                x = rms_norm(x, first, residual=residual, input_weight=source.weight, out=normed, **settings)
            x = attend(x, rotary, paged, buffer)
            x = rms_norm(x, second, residual=residual, input_weight=after, out=normed, **settings)
            return mlp(x, buffer)

        def replay(hidden_states: torch.Tensor, keywords: dict[str, Any], workspace: Workspace) -> None:
            """Run the layer in a workspace, where its calls are recorded once."""
            if source is None:
                residual = x = workspace.buffer("residual", size)
                residual.copy_(hidden_states.view(-1, size))
            else:
                residual, x = source.take()
            rotary, entry = halves(keywords), workspace.tapes.get(module)
            if entry is None:
                with recorded() as calls:
                    result = compute(residual, x, rotary, keywords["paged"], workspace.buffer)
                entry = workspace.tapes[module] = Tape(calls), result
            elif not entry[0].replay():  # the operator that refuses its arguments says why
                compute(residual, x, rotary, keywords["paged"], workspace.buffer)
            link.residual, link.addend = residual, entry[1]

        def forward(hidden_states: torch.Tensor, *_: Any, **keywords: Any) -> torch.Tensor:
            paged = keywords["paged"]
            if paged.workspace is not None:
                replay(hidden_states, keywords, paged.workspace)
                return hidden_states
            residual, x = (hidden_states.view(-1, size),) * 2 if source is None else source.take()
            x = compute(residual, x, halves(keywords), paged, paged.buffer or _new)
            if linked:
                link.residual, link.addend = residual, x
            else:
                residual += x if link.weight is None else rms_norm(x, link.weight, **settings)
            return hidden_states

        self.module.forward = forward

    def release(self) -> None:
        _restore(self.module)

    @property
    def can_replay(self) -> bool:
        """Return whether all that the layer computes is recorded by a `Tape`."""
        return self._linked and self._attention.can_replay and self._mlp is not None and self._mlp.can_replay

    def keep(self) -> None:
        pass

    def undo(self) -> None:
        _restore(self.module)


def _as_rows(module: torch.nn.Module) -> Rows:
    """Return a function of rows that calls a module with the hidden states of a step."""

    def rows(x: torch.Tensor, buffer: Buffer) -> torch.Tensor:
        output = module(x[None])
        return (output[0] if isinstance(output, tuple) else output).view(x.shape)

    return rows
