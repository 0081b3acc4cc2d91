"""Make tensors that lie in poisoned memory, and check errors, for the tests of the fused operators."""

from __future__ import annotations

import random

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "strided", "unaligned"]


def placed(values: torch.Tensor, layout: str, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values [..., C] as a view of memory that is NaN around them, and that memory.

    The view is contiguous in its last dimension. Rows that are strided or unaligned have NaN between them,
    and those that are unaligned begin at an odd element.
    """
    before, after = {"contiguous": (0, 0), "strided": (16, 32), "unaligned": (1, rng.randrange(4))}[layout]
    *sizes, columns = values.shape
    memory = torch.full((2, *sizes, before + columns + after), float("nan"), dtype=values.dtype)
    view = memory[0][..., before : before + columns]
    view.copy_(values)
    return view, memory


def moved(view: torch.Tensor, memory: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both on another device; on the CPU as copies."""
    target = memory.clone() if device == "cpu" else memory.to(device)
    return target.as_strided(view.shape, view.stride(), view.storage_offset()), target


def bits(value: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor on the CPU."""
    return value.cpu().contiguous().view(torch.uint8)


def check_surroundings(view: torch.Tensor, memory: torch.Tensor) -> None:
    """Check that all memory around a view is still the NaN that `placed` wrote."""
    inside = torch.zeros(memory.shape, dtype=torch.bool, device=memory.device)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    fresh = torch.full_like(memory, float("nan"))
    assert torch.equal(bits(memory[~inside]), bits(fresh[~inside])), "memory beside the rows was written"


def check_rounded(actual: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor) -> None:
    """Check that each value is the exact one, rounded once to its dtype, after an error of at most `slack`.

    Args:
        exact, slack: float64.
    """
    info = torch.finfo(actual.dtype)
    allowed = slack + (exact.abs() + slack) * info.eps / 2 + info.smallest_normal * info.eps
    error = (actual.cpu().double() - exact).abs()
    wrong = ~(error <= allowed)  # NaN is wrong
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} values are wrong, the first at {at}: {actual[at].item()} "
            f"for {exact[at].item()}, allowed {allowed[at].item():.3g}"
        )
