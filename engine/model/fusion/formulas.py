"""State in plain torch what the fused operators compute, to compare a model's own modules with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import gelu, silu

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}
_TOLERANCE = 1e-5  # relative to a row's largest element, in float32
# Factors of the rows of random input: a bound or a constant that a module adds shows in some of them.
_ROW_SCALES = (1.0, 1e-3, 30.0, 1.0, 1e3)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, weight_offset: float) -> torch.Tensor:
    """Return ``x`` divided by the root of its mean square, times the weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * (weight_offset + weight)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return heads with rotary positions.

    Args:
        x: ``[..., T, D]``.
        cos, sin: ``[T, R / 2]``; the first R elements of a head are rotated.
    """
    half = cos.shape[-1]
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    pair = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((rotated, x[..., 2 * half :]), -1)


def agree(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two float32 tensors differ by rounding only, row by row."""
    if actual.shape != expected.shape:
        return False
    actual, expected = actual.float(), expected.float()
    difference, size = (actual - expected).abs().amax(-1), expected.abs().amax(-1)
    return bool((difference <= _TOLERANCE * size + 1e-30).all())


class Draw:
    """Draw random tensors for probes, the same in every process.

    Args:
        device: device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(0)

    def plain(self, *shape: int) -> torch.Tensor:
        """Return normally distributed numbers."""
        return torch.randn(shape, generator=self._generator).to(self.device)

    def rows(self, *shape: int) -> torch.Tensor:
        """Return normally distributed rows of very different sizes, by their index in the last dimension
        but one."""
        scales = torch.tensor(_ROW_SCALES).repeat(-(-shape[-2] // len(_ROW_SCALES)))[: shape[-2]]
        return (torch.randn(shape, generator=self._generator) * scales[:, None]).to(self.device)
