"""Find a module's linear layers, stand in for them, and merge those that read the same input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cpu_linear import PackedLinear
from ..tensor_parallel import RowParallelLinear
from .calls import NotRecognised, Stub
from .formulas import Draw

LinearFunction = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
MERGED = "merged_linear"  # name of the merged layer among the children of its module
LINEAR = (torch.nn.Linear, RowParallelLinear)


def plain_linears(module: torch.nn.Module) -> dict[str, Any]:
    """Return the linear layers among a module's children.

    Raises:
        NotRecognised: one is of a class derived from `torch.nn.Linear`, which may compute anything.
    """
    linears: dict[str, Any] = {n: child for n, child in module._modules.items() if isinstance(child, LINEAR)}
    for linear in linears.values():
        if type(linear) not in LINEAR:
            raise NotRecognised(f"it has a {type(linear).__name__} in place of a plain linear layer")
        if type(linear.weight.data) is not torch.Tensor or not linear.weight.is_floating_point():
            raise NotRecognised("its linear layers are quantised")
    if len({(linear.weight.dtype, linear.weight.device) for linear in linears.values()}) > 1:
        raise NotRecognised("its linear layers have different dtypes or devices")
    return linears


def linear_stubs(linears: dict[str, Any], draw: Draw) -> dict[str, Stub]:
    """Return stubs that return random float32 results of the linear layers' sizes."""

    def stub(linear: Any) -> Stub:
        return Stub(linear, lambda x: draw.rows(*x.shape[:-1], linear.out_features))

    return {name: stub(linear) for name, linear in linears.items()}


@dataclass
class MergedLinear:
    """Replace linear layers of a module by one whose output is theirs, concatenated.

    The weights of the originals become views of the merged one, so that there are never two copies of more
    than one module, and nothing has to be copied back.
    """

    module: torch.nn.Module
    names: tuple[str, ...]
    originals: list[torch.nn.Linear] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the name of the merged layer; a single layer keeps its own."""
        return MERGED if len(self.names) > 1 else self.names[0]

    def apply(self) -> None:
        """Merge the layers."""
        if len(self.names) == 1:
            return
        self.originals = [self.module._modules[name] for name in self.names]  # type: ignore[misc]
        sizes = [linear.out_features for linear in self.originals]
        merged = torch.nn.Linear(self.originals[0].in_features, sum(sizes), bias=False, device="meta")
        weight = torch.cat([linear.weight.data for linear in self.originals])
        merged.weight = torch.nn.Parameter(weight, requires_grad=False)
        biases = [linear.bias for linear in self.originals]
        if any(bias is not None for bias in biases):
            parts = [weight.new_zeros(n) if b is None else b.data for n, b in zip(sizes, biases)]
            merged.bias = torch.nn.Parameter(torch.cat(parts), requires_grad=False)
        for linear, rows in zip(self.originals, weight.split(sizes)):
            linear.weight.data = rows
        merged.eval()
        for name in self.names:
            del self.module._modules[name]
        self.module.add_module(MERGED, merged)

    def keep(self) -> None:
        """Drop the original layers, whose weights would keep the merged one alive after it is packed."""
        self.originals = []

    def undo(self) -> None:
        """Put the original layers back."""
        if not self.originals:
            return
        del self.module._modules[MERGED]
        self.module._modules.update(zip(self.names, self.originals))


def function_of(parent: torch.nn.Module, name: str) -> LinearFunction:
    """Return the shortest way to call a child with rows, and with where to write if it `can_replay`."""
    module = parent.get_submodule(name)
    if type(module) is PackedLinear:
        return module.multiply
    if type(module) is RowParallelLinear:
        product, add_up = function_of(module, "local"), module.add_up
        return lambda x, out: add_up(product(x, out))
    if type(module) is torch.nn.Linear and not module._forward_hooks and not module._forward_pre_hooks:
        weight, bias, linear = module.weight.detach(), module.bias, torch._C._nn.linear
        return lambda x, out: linear(x, weight, bias)
    return lambda x, out: module(x)


def can_replay(parent: torch.nn.Module, *names: str) -> bool:
    """Return whether children are linear layers that a `Tape` records."""
    return all(type(parent.get_submodule(name)) is PackedLinear for name in names)
