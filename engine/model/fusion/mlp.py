"""Recognise gated MLPs: ``down(act(gate(x)) * up(x))``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from .calls import Call, NotRecognised, call_with_stubs
from .formulas import ACTIVATIONS, Draw, agree
from .linears import LINEAR, linear_stubs, plain_linears


@dataclass(frozen=True, eq=False)
class GatedMLP:
    """Describe a gated MLP.

    Args:
        inputs: names of the linear layers gate and up, or of one that is both.
        output: name of the linear layer down.
        activation: name that `cupaged.act_and_mul` has for the activation.
    """

    module: torch.nn.Module
    inputs: tuple[str, ...]
    output: str
    activation: str


def may_be_mlp(module: torch.nn.Module) -> bool:
    """Return whether a module has two or three linear layers."""
    return sum(isinstance(child, LINEAR) for child in module._modules.values()) in (2, 3)


def recognise_mlp(module: torch.nn.Module, call: Call, draw: Draw) -> GatedMLP:
    """Return what a gated MLP computes; its linear layers are replaced by random results meanwhile.

    Raises:
        NotRecognised: it computes something else.
    """
    hidden = call.hidden
    if hidden is None or hidden.dim() < 2 or len(call.args) + len(call.kwargs) != 1:
        raise NotRecognised("it takes more than hidden states")
    if not isinstance(call.output, torch.Tensor):
        raise NotRecognised("it does not return hidden states")
    stubs = linear_stubs(plain_linears(module), draw)
    x = draw.rows(*hidden.shape[:-2], 5, hidden.shape[-1])
    args, kwargs = call.with_hidden(x)
    result = call_with_stubs(module, stubs, args, kwargs)
    inputs = [name for name, stub in stubs.items() if torch.equal(stub.call.hidden, x)]  # type: ignore[arg-type]
    outputs = [name for name in stubs if name not in inputs]
    if len(outputs) != 1 or result is not stubs[outputs[0]].call.output:
        raise NotRecognised("it is not a gated MLP")
    product = stubs[outputs[0]].call.hidden
    assert product is not None
    for names in itertools.permutations(inputs):
        both = torch.cat([stubs[name].call.output for name in names], -1)
        if both.shape[-1] != 2 * product.shape[-1]:
            break
        gate, up = both.chunk(2, -1)
        for activation, function in ACTIVATIONS.items():
            if agree(product, function(gate) * up):
                return GatedMLP(module, names, outputs[0], activation)
    raise NotRecognised("its activation is not SiLU or GELU of one half times the other")
