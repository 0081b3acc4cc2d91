"""Hand the engine's argument on to the attention of models whose layers drop what they do not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ARGUMENT = "paged"


def hand_on(model: torch.nn.Module) -> None:
    """Give each attention the argument ``paged`` that its layer was called with, in place."""
    for layer in model.modules():
        for attention in layer.children():
            if isinstance(getattr(attention, "layer_idx", None), int):
                _connect(layer, attention)


def _connect(layer: torch.nn.Module, attention: torch.nn.Module) -> None:
    current: list[Any] = []  # of the call that runs

    def enter(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        current[:] = [kwargs[ARGUMENT]] if ARGUMENT in kwargs else []

    def leave(*_: Any) -> None:
        current.clear()

    layer.register_forward_pre_hook(enter, with_kwargs=True)
    layer.register_forward_hook(leave, always_call=True)
    attention.register_forward_pre_hook(_adding(current), with_kwargs=True)


def _adding(current: list[Any]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    def add(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, ({ARGUMENT: current[0]} if current else {}) | kwargs

    return add
