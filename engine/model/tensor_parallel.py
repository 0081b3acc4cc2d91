"""Run the parts of a model that transformers has divided among ranks on this rank's own weights.

transformers loads each rank's part of the weights, as DTensors, and replaces the ``forward`` of the modules
in its plan. What the plan does at inference is little: a linear layer has some rows or some columns of its
weight, and the results of the latter are added up over the ranks. So these modules become plain ones here,
which are then fused and packed like those of any model, with one collective operation behind some of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch

_COLUMN = ("colwise",)
_GATHERED = ("colwise_gather_output", "colwise_rep")
_ROW = ("rowwise",)
_ROW_OF_WHOLE_INPUT = ("rowwise_split_input", "rowwise_rep")
_WITHOUT_COLLECTIVE = ("replicated_with_grad_allreduce", "replicate", "local_params")
_SUMMED = ("moe_tp_experts", "all_reduce")


class Ranks(Protocol):
    """What a model that is divided needs of the group of ranks."""

    rank: int
    size: int

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over the ranks, in place, and return it."""

    def join_columns(self, tensor: torch.Tensor, num_columns: int) -> torch.Tensor:
        """Return the ``[..., num_columns]`` of which each rank has consecutive columns."""

    def wait(self) -> None:
        """Wait until all ranks are here."""

    def smallest(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""

    def check_agreement(self, facts: dict[str, str]) -> None:
        """Check that what the ranks have found out is the same."""


class RowParallelLinear(torch.nn.Module):
    """Compute a linear layer of which each rank has some of the input columns, and of the input those.

    Args:
        linear: this rank's part; its bias is added on one rank only.
        add_up: adds up a tensor over the ranks, in place.
    """

    def __init__(self, linear: torch.nn.Linear, add_up: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.local, self.add_up = linear, add_up

    @property
    def weight(self) -> torch.Tensor:
        """Return this rank's part of the weight."""
        return self.local.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add_up(self.local(x))


class SplittingLinear(RowParallelLinear):
    """Compute such a layer where every rank has the whole input.

    Args:
        start: the first of this rank's columns.
    """

    def __init__(
        self, linear: torch.nn.Linear, add_up: Callable[[torch.Tensor], torch.Tensor], start: int
    ) -> None:
        super().__init__(linear, add_up)
        self._columns = slice(start, start + linear.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add_up(self.local(x[..., self._columns].contiguous()))


class GatheringLinear(torch.nn.Module):
    """Compute a linear layer of which each rank has some outputs, and return all of them on every rank.

    Args:
        linear: this rank's part.
        out_features: number of outputs of all ranks.
    """

    def __init__(self, linear: torch.nn.Linear, ranks: Ranks, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, out_features
        self.local, self._ranks = linear, ranks

    @property
    def weight(self) -> torch.Tensor:
        """Return this rank's part of the weight."""
        return self.local.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._ranks.join_columns(self.local(x), self.out_features)


class VocabParallelEmbedding(torch.nn.Module):
    """Look up tokens in an embedding of which each rank has some rows.

    Args:
        weight: this rank's rows.
        start: the first of them.
        num_embeddings: number of rows of all ranks.
    """

    def __init__(self, weight: torch.Tensor, start: int, num_embeddings: int, ranks: Ranks) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.num_embeddings, self.embedding_dim = num_embeddings, weight.shape[1]
        self._start, self._add_up = start, ranks.add_up

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows = token_ids - self._start
        elsewhere = (rows < 0) | (rows >= len(self.weight))
        if len(self.weight):
            found = torch.nn.functional.embedding(rows.masked_fill(elsewhere, 0), self.weight)
            found.masked_fill_(elsewhere[..., None], 0)
        else:
            found = self.weight.new_zeros(*rows.shape, self.embedding_dim)
        return self._add_up(found)


def localise(model: Any, ranks: Ranks) -> None:
    """Replace the modules that transformers has divided by plain ones on this rank's weights, in place.

    A module in whose plan is something else keeps transformers' forward.

    Args:
        model: a model that was loaded with a ``distributed_config``.
    """
    plan: dict[str, str] = model.tp_plan
    parents = {child: (parent, name) for parent in model.modules() for name, child in parent._modules.items()}
    for name, module in list(model.named_modules()):
        style = plan.get(_generic(name))
        if style is None or "forward" not in vars(module):
            continue
        replaced = _replacement(module, style, ranks)
        if replaced is not None and replaced is not module:
            parent, child_name = parents[module]
            setattr(parent, child_name, replaced)


def _generic(name: str) -> str:
    """Return the name of a module in a plan, where the numbers of layers are asterisks."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _replacement(module: torch.nn.Module, style: str, ranks: Ranks) -> torch.nn.Module | None:
    """Return what takes the place of a module, the module itself if it was changed; None: it stays."""
    if style in _WITHOUT_COLLECTIVE:
        _use_own_parameters(module)
        return module
    if style in _SUMMED:
        _use_own_parameters(module)
        original = module.forward
        module.forward = lambda *args, **kwargs: ranks.add_up(original(*args, **kwargs))
        return module
    if type(module) is torch.nn.Embedding and style == "embedding_rowwise":
        whole = module.weight.shape[0]
        start, weight = _first(whole, ranks), _own(module.weight)
        return VocabParallelEmbedding(weight, start, whole, ranks)
    if type(module) is not torch.nn.Linear:
        return None
    whole_out, whole_in = module.weight.shape
    if style in _COLUMN:
        _use_own_parameters(module)
        return module
    if style in _GATHERED:
        _use_own_parameters(module)
        return GatheringLinear(module, ranks, whole_out)
    if style in _ROW or style in _ROW_OF_WHOLE_INPUT:
        _use_own_parameters(module)
        if ranks.rank:
            module.register_parameter("bias", None)
        if style in _ROW:
            return RowParallelLinear(module, ranks.add_up)
        return SplittingLinear(module, ranks.add_up, _first(whole_in, ranks))
    return None


def _first(count: int, ranks: Ranks) -> int:
    """Return the first of the rows or columns that this rank has of ``count``."""
    return min(count, ranks.rank * -(-count // ranks.size))


def _own(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a parameter."""
    to_local = getattr(parameter, "to_local", None)
    return parameter.data if to_local is None else cast(torch.Tensor, to_local()).detach()


def _use_own_parameters(module: torch.nn.Module) -> None:
    """Let a module compute with its part of the weights, by its class's forward."""
    vars(module).pop("forward")
    for name, parameter in module._parameters.items():
        if parameter is not None and hasattr(parameter, "to_local"):
            module._parameters[name] = torch.nn.Parameter(_own(parameter), requires_grad=False)
    if type(module) is torch.nn.Linear:
        module.out_features, module.in_features = module.weight.shape
