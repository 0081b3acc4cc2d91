"""Say what of a model was fused, and what was not and why."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

import torch


@dataclass
class Report:
    """Count the parts of a model that were fused and that were not.

    Args:
        fused: number of fused parts by what they are: layers, attentions, MLPs, norms.
        left: number of parts that stay as they are, by their class and the reason.
        num_layers: number of layers with attention.
        undone: why everything was put back, if it was.
    """

    fused: Counter[str] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_layers: int = 0
    undone: str | None = None

    def leave(self, module: torch.nn.Module, reason: str) -> None:
        """Note that a module stays as it is."""
        self.left[type(module).__name__, reason] += 1

    def refuse(self, reason: str) -> None:
        """Note that everything was put back."""
        self.undone = reason
        self.fused.clear()

    @property
    def level(self) -> int:
        """Return the level of the line in the log: that everything is fused is nothing to tell."""
        if self.undone is not None:
            return logging.WARNING
        return logging.INFO if self.left else logging.DEBUG

    def line(self) -> str:
        """Return a line for the log."""
        if self.undone is not None:
            return f"the model runs unfused, as its logits were others when fused: {self.undone}"
        parts = [f"{count} {kind}" for kind, count in self.fused.items() if kind != "layers"]
        text = ", ".join([f"fused {self.fused['layers']} of {self.num_layers} layers", *parts])
        if self.left:
            text += "; as they are: " + "; ".join(self.left_lines())
        return text

    def left_lines(self) -> list[str]:
        """Return for each class and reason what stays as it is."""
        return [f"{count} x {name} ({reason})" for (name, reason), count in self.left.items()]
