"""Find the parts of a model that the fused operators can compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .attention import Attention, attend_to_stub, recognise_attention
from .calls import Call, Calls, NotRecognised, attention_function, untouchable
from .formulas import Draw
from .layers import Layer, recognise_layer
from .mlp import GatedMLP, may_be_mlp, recognise_mlp
from .norms import RMSNorm, may_be_norm, recognise_norm
from .report import Report

_STUB_NAME = "cupaged-stub"
T = TypeVar("T")


class Recognition:
    """Collect what is recognised in a model.

    Args:
        model: a transformers decoder.
        attending: its modules that attend, in order.
        padded: those whose keys and values have not the shape of the cache.

    Attributes:
        successors: by layer, the layer or norm that alone reads its result.
    """

    def __init__(
        self,
        model: Any,
        attending: tuple[torch.nn.Module, ...],
        padded: frozenset[torch.nn.Module] = frozenset(),
    ) -> None:
        self._model, self._padded = model, padded
        self._untouchable = untouchable(model)
        self._parents = {child: module for module in model.modules() for child in module.children()}
        self._attending = attending
        self._reasons: dict[torch.nn.Module, str] = {}
        self.norms: dict[torch.nn.Module, RMSNorm] = {}
        self.mlps: dict[torch.nn.Module, GatedMLP] = {}
        self.attentions: dict[torch.nn.Module, Attention] = {}
        self.layers: dict[torch.nn.Module, Layer] = {}
        self.successors: dict[torch.nn.Module, torch.nn.Module] = {}
        self.report = Report()

    @torch.no_grad()
    def recognise(self, calls: Calls) -> None:
        """Recognise norms, then MLPs and attentions, then layers.

        Args:
            calls: the calls of one step.
        """
        draw = Draw(next(self._model.parameters()).device)
        for module in filter(may_be_norm, calls):
            self._try(module, self.norms, lambda m: recognise_norm(m, calls[m], draw))
        for module in filter(may_be_mlp, calls):
            if module not in self._attending:
                self._try(module, self.mlps, lambda m: recognise_mlp(m, calls[m][0], draw))
        with attention_function(self._model, _STUB_NAME, attend_to_stub):
            for module in self._attending:
                self._try(module, self.attentions, lambda m: self._attention(m, calls[m][0], draw))
        for module, attention in self.attentions.items():
            self._try(
                self._parents[module],
                self.layers,
                lambda m, attention=attention: recognise_layer(m, calls, attention, self.norms, draw),
            )
        self._link(calls)
        self._write_report()

    def _attention(self, module: torch.nn.Module, call: Call, draw: Draw) -> Attention:
        if module in self._padded:
            raise NotRecognised("its keys and values are not in the cache as they are")
        return recognise_attention(module, call, self.norms, draw)

    def _try(
        self, module: torch.nn.Module, results: dict[torch.nn.Module, T], recognise: Callable[..., T]
    ) -> None:
        """Recognise a module, or note why it is not recognised."""
        try:
            for part in module.modules():
                if part in self._untouchable:
                    name = "" if part is module else f"of its {type(part).__name__}: "
                    raise NotRecognised(f"{name}{self._untouchable[part]}")
            results[module] = recognise(module)
        except NotRecognised as error:
            self._reasons[module] = str(error)

    def _link(self, calls: Calls) -> None:
        """Find the layers whose result goes, as it is, to the next layer or to a norm, and nowhere else."""
        readers: dict[int, list[torch.nn.Module]] = {id(calls[layer][0].output): [] for layer in self.layers}
        for module, of_module in calls.items():
            for call in of_module:
                for value in (*call.args, *call.kwargs.values()):
                    if id(value) in readers:
                        readers[id(value)].append(module)
        for layer, description in self.layers.items():
            reading = readers[id(calls[layer][0].output)]
            outermost = [m for m in reading if not any(m is not o and m in o.modules() for o in reading)]
            if len(outermost) != 1 or len(calls[outermost[0]]) != 1:
                continue
            successor = outermost[0]
            if successor in self.layers:
                norm = self.layers[successor].before[0]
            elif successor in self.norms:
                norm = self.norms[successor]
            else:
                continue
            own = description.before[0]
            if (norm.epsilon, norm.weight_offset) == (own.epsilon, own.weight_offset):
                self.successors[layer] = successor

    def _write_report(self) -> None:
        report = self.report
        report.num_layers = len(self._attending)
        counts = {"layers": len(self.layers), "attentions": len(self.attentions)}
        counts |= {"MLPs": len(self.mlps), "norms": len(self.norms)}
        report.fused.update({kind: count for kind, count in counts.items() if count})
        for module in self._attending:
            parent = self._parents[module]
            for part in (module, parent):
                if part in self._reasons:
                    report.leave(part, self._reasons[part])
            for child in parent.children():
                known = child is module or child in self.norms or child in self.mlps
                if not known and any(True for _ in child.parameters()):
                    report.leave(child, self._reasons.get(child, "it is neither an RMS norm nor a gated MLP"))
        for module, reason in self._reasons.items():
            if may_be_norm(module) and self._parents[module] not in self.layers:
                report.leave(module, reason)
