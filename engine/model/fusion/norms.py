"""Recognise RMS norms by their structure and by what they compute."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from .calls import Call, NotRecognised
from .formulas import Draw, agree, rms_norm

_LARGEST_EPSILON = 0.1


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """Describe a module that computes ``x / sqrt(mean(x^2) + epsilon) * (weight_offset + weight)``."""

    module: torch.nn.Module
    weight: torch.Tensor
    epsilon: float
    weight_offset: float


def may_be_norm(module: torch.nn.Module) -> bool:
    """Return whether a module is a leaf with one parameter, which is a vector."""
    parameters = [p for p in module._parameters.values() if p is not None]
    return not module._modules and len(parameters) == 1 and parameters[0].dim() == 1


def recognise_norm(module: torch.nn.Module, calls: list[Call], draw: Draw) -> RMSNorm:
    """Return what an RMS norm computes.

    A copy in float32 runs on rows so small that epsilon matters, and on large ones.

    Raises:
        NotRecognised: it computes something else.
    """
    (name, weight), *_ = ((n, p) for n, p in module._parameters.items() if p is not None)
    for call in calls:
        x = call.args[0] if len(call.args) == 1 and not call.kwargs else None
        if not isinstance(x, torch.Tensor) or x.shape[-1:] != weight.shape or x.dtype != weight.dtype:
            raise NotRecognised("it is not called with hidden states of its weight's size and dtype")
        y = call.output
        if not isinstance(y, torch.Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            raise NotRecognised("it does not return hidden states")
    exact = copy.copy(module)
    exact._parameters = {**module._parameters, name: torch.nn.Parameter(weight.float(), requires_grad=False)}
    x = draw.rows(5, len(weight))
    try:
        y = exact.forward(x)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise NotRecognised(f"its code fails in float32: {type(error).__name__}") from error
    # A float of the module that is small is epsilon, whatever its name.
    for epsilon in {v for v in vars(module).values() if type(v) is float and 0 <= v < _LARGEST_EPSILON}:
        for weight_offset in (0.0, 1.0):
            if agree(y, rms_norm(x, weight.float(), epsilon, weight_offset)):
                return RMSNorm(module, weight, epsilon, weight_offset)
    raise NotRecognised("it computes something else than an RMS norm")
