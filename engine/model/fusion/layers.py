"""Recognise decoder layers by how the results of their parts are added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .attention import Attention
from .calls import Call, NotRecognised, Stub, call_with_stubs
from .formulas import Draw, agree
from .norms import RMSNorm


@dataclass(frozen=True, eq=False)
class Layer:
    """Describe a decoder layer that adds its attention, then its MLP, to the hidden states.

    Args:
        before: norms of the input of the attention and of the MLP.
        after: norms of their results before these are added, or None (Gemma 2 and 3 have them).
        mlp: any module that takes hidden states and returns them, alone or first of a tuple.
    """

    module: torch.nn.Module
    attention: Attention
    mlp: torch.nn.Module
    before: tuple[RMSNorm, RMSNorm]
    after: tuple[RMSNorm, RMSNorm] | None


def recognise_layer(
    module: torch.nn.Module,
    calls: dict[torch.nn.Module, list[Call]],
    attention: Attention,
    norms: dict[torch.nn.Module, RMSNorm],
    draw: Draw,
) -> Layer:
    """Return how a decoder layer adds up its parts, which are replaced by random results meanwhile.

    Args:
        calls: the calls of a step.
        norms: the RMS norms of the model.

    Raises:
        NotRecognised: it does so in another way.
    """
    if len(calls.get(module, ())) != 1:
        raise NotRecognised("it is not called once a step")
    call, of_attention = calls[module][0], calls[attention.module][0]
    hidden = call.hidden
    if hidden is None or hidden.dim() != 3 or hidden.shape[0] != 1:
        raise NotRecognised("it is not called with the hidden states of a step")
    if not isinstance(call.output, torch.Tensor):
        raise NotRecognised("it returns more than hidden states")
    if any(p is not None for p in module._parameters.values()):
        raise NotRecognised("it has weights of its own beside its parts")
    order: list[str] = []

    def stub(name: str, child: torch.nn.Module) -> Stub:
        def result(x: torch.Tensor) -> Any:
            order.append(name)
            output = calls[child][0].output
            drawn = draw.rows(*x.shape)
            return (drawn, *output[1:]) if isinstance(output, tuple) else drawn

        return Stub(child, result)

    stubs = {
        name: stub(name, child)
        for name, child in module._modules.items()
        if child is not None and any(True for _ in child.parameters())
    }
    x = draw.rows(*hidden.shape)
    args, kwargs = call.with_hidden(x)
    output = call_with_stubs(module, stubs, args, kwargs)
    children = [module._modules[name] for name in order]
    kinds = ["norm" if c in norms else "attention" if c is attention.module else "mlp" for c in children]
    if kinds not in (_TWO_NORMS, _FOUR_NORMS):
        raise NotRecognised(f"its parts come in another order: {', '.join(kinds)}")
    seen = [stubs[name].call for name in order]
    results = [s.output[0] if isinstance(s.output, tuple) else s.output for s in seen]
    half = len(kinds) // 2
    middle = x + results[half - 1]
    expected = [x, *results[: half - 1], middle, *results[half:-1]]
    given = [*(s.hidden for s in seen), output]
    expected.append(middle + results[-1])
    if not all(isinstance(a, torch.Tensor) and agree(a, wanted) for a, wanted in zip(given, expected)):
        raise NotRecognised("it does not add the results of attention and MLP to its input as they are")
    mlp, of_mlp = children[kinds.index("mlp")], seen[kinds.index("mlp")]
    assert mlp is not None
    if len(of_mlp.args) != 1 or of_mlp.kwargs:
        raise NotRecognised(f"its {type(mlp).__name__} takes more than hidden states")
    if attention.rotary is not None:
        keyword = attention.rotary.keyword
        if of_attention.kwargs[keyword] is not call.kwargs.get(keyword):
            raise NotRecognised("its attention gets other cosines and sines than the layer")
    of = [norms[child] for child in children if child in norms]
    if len({(norm.epsilon, norm.weight_offset) for norm in of}) > 1:
        raise NotRecognised("its norms differ in epsilon or in what is added to their weights")
    if len(of) == 2:
        return Layer(module, attention, mlp, (of[0], of[1]), None)
    return Layer(module, attention, mlp, (of[0], of[2]), (of[1], of[3]))


_TWO_NORMS = ["norm", "attention", "norm", "mlp"]
_FOUR_NORMS = ["norm", "attention", "norm", "norm", "mlp", "norm"]
