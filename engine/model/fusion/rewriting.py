"""Rewrite a model into fused operators, and undo it if the logits do not agree."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from .calls import Calls, recorded
from .proof import Proof
from .recognition import Recognition
from .replacements import FusedAttention, FusedLayer, FusedMLP, FusedNorm, Link, Replacement
from .report import Report

_log = logging.getLogger("cupaged.engine")


@dataclass
class Fusion:
    """Hold the replacements of a model.

    Args:
        report: what was replaced, and what was not and why.
    """

    report: Report
    replacements: list[Replacement] = field(default_factory=list)

    def bind(self) -> None:
        """Look up what the replacements call."""
        for replacement in self.replacements:
            replacement.bind()

    def release(self) -> None:
        """Drop the weights that `bind` looked up, before linear layers are replaced; `bind` has to follow."""
        for replacement in self.replacements:
            replacement.release()

    def can_replay(self, num_layers: int) -> bool:
        """Return whether a `Tape` records all that the model's layers compute."""
        layers = [replacement for replacement in self.replacements if isinstance(replacement, FusedLayer)]
        return len(layers) == num_layers and all(layer.can_replay for layer in layers)

    def undo(self) -> None:
        """Restore the model."""
        while self.replacements:
            self.replacements.pop().undo()


def fuse_model(model: Any, proof: Proof) -> Fusion:
    """Rewrite a transformers decoder into fused operators and merged projections, in place.

    What is not recognised, or computes something else, stays as it is; one line in the log says so.

    Args:
        model: a decoder that was loaded with the "cupaged" attention.
        proof: compares its logits, before it is changed and afterwards.
    """
    recognition = Recognition(model, proof.attending, proof.padded)
    fusion = Fusion(recognition.report)
    calls: Calls = {}
    try:
        plain = proof.logits(recorded(model, calls))
        bound = proof.bound(plain)
        recognition.recognise(calls)
        _replace(recognition, fusion)
        fusion.bind()
        problem = proof.difference(proof.logits(), plain, bound)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        fusion.undo()
        fusion.report.refuse(problem)
    for replacement in fusion.replacements:
        replacement.keep()
    _log.log(fusion.report.level, "%s", fusion.report.line())
    return fusion


def _replace(recognition: Recognition, fusion: Fusion) -> None:
    """Replace what was recognised; MLPs and attentions come before the layers that call them."""
    replacements = fusion.replacements
    mlps: dict[torch.nn.Module, FusedMLP] = {}
    for module, mlp in recognition.mlps.items():
        mlps[module] = FusedMLP(mlp)
        replacements.append(mlps[module])
    attentions: dict[torch.nn.Module, FusedAttention] = {}
    for module, attention in recognition.attentions.items():
        attentions[module] = FusedAttention(attention)
        replacements.append(attentions[module])
    sources: dict[torch.nn.Module, Link] = {}
    for module, layer in recognition.layers.items():
        successor = recognition.successors.get(module)
        fused = FusedLayer(
            layer,
            attentions[layer.attention.module],
            mlps.get(layer.mlp),
            source=sources.get(module),
            linked=successor is not None,
        )
        if successor is not None:
            sources[successor] = fused.link
        replacements.append(fused)
    replacements += [FusedNorm(norm, sources.get(module)) for module, norm in recognition.norms.items()]
