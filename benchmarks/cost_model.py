"""Predict the time of a step: a few coefficients, fitted to measured step times.

`benchmarks/step_times.py` measures them on a device and writes the JSON that `read` takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Work:
    """Count what a step computes and moves.

    Args:
        prompt_tokens: number of tokens of prompts.
        prompt_pairs: number of pairs of such a token and a token that it attends to.
        decoded_tokens: number of sequences that decode.
        decode_context: number of tokens that these attend to, in all.
        moved_blocks: number of blocks that are swapped out or in.
    """

    prompt_tokens: int = 0
    prompt_pairs: float = 0.0
    decoded_tokens: int = 0
    decode_context: int = 0
    moved_blocks: int = 0


@dataclass(frozen=True)
class Costs:
    """A linear cost model, in seconds: of a step, and of each of the things that `Work` counts."""

    step: float = 5e-3
    prompt_token: float = 1e-4
    prompt_pair: float = 0.0
    decoded_token: float = 2e-4
    context_token: float = 0.0
    moved_block: float = 5e-4

    def seconds(self, work: Work) -> float:
        """Return the time of a step."""
        return (
            self.step
            + self.prompt_token * work.prompt_tokens
            + self.prompt_pair * work.prompt_pairs
            + self.decoded_token * work.decoded_tokens
            + self.context_token * work.decode_context
            + self.moved_block * work.moved_blocks
        )


FITTED = ("step", "prompt_token", "prompt_pair", "decoded_token", "context_token")


@dataclass(frozen=True)
class Fit:
    """A cost model, and how far its predictions are from the measured times, relative to these."""

    costs: Costs
    median_error: float
    largest_error: float


def pairs(num_tokens: int, context: int) -> float:
    """Return the number of pairs of a token and one it attends to, for tokens after ``context`` others."""
    return num_tokens * (context + (num_tokens + 1) / 2)


def fit(rows: Sequence[Mapping[str, float]], moved_block: float = 0.0) -> Fit:
    """Fit coefficients that are not negative to measured steps, by least squares of the relative error.

    Args:
        rows: ``prefill_tokens`` and ``prefill_context`` (of the one prompt of the step), ``decode_seqs`` and
            ``context`` (of each of them), ``ms``.
        moved_block: seconds to move a block to the swap space or back.

    Raises:
        ValueError: there are too few different steps for the coefficients, or a time is not positive.
    """
    times = np.array([row["ms"] / 1e3 for row in rows])
    if len(rows) < len(FITTED) or not (times > 0).all():
        raise ValueError(
            f"a fit needs {len(FITTED)} steps or more, each of a positive number of ms; got {len(rows)} "
            "rows: measure again with benchmarks/step_times.py"
        )
    columns = np.array([list(_columns(row)) for row in rows])
    # Of all sets of coefficients the best one without negative values is the least-squares solution under the
    # constraint; there are 31 of them, which is cheaper than a dependency.
    best, least = np.zeros(len(FITTED)), np.inf
    relative = columns / times[:, None]
    for count in range(1, len(FITTED) + 1):
        for chosen in combinations(range(len(FITTED)), count):
            solution = np.linalg.lstsq(relative[:, chosen], np.ones(len(rows)), rcond=None)[0]
            error = float(np.square(relative[:, chosen] @ solution - 1).sum())
            if (solution >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(len(FITTED)), error
                best[list(chosen)] = solution
    errors = np.abs(relative @ best - 1)
    costs = Costs(moved_block=moved_block, **dict(zip(FITTED, best.tolist())))
    return Fit(costs, float(np.median(errors)), float(errors.max()))


def read(path: Path) -> Fit:
    """Return the fit of a file of step times.

    Raises:
        ValueError: the file is not one that `benchmarks/step_times.py` or `benchmarks/allocators.py` writes.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text())["results"]
        results = results.get("step_times", results)
        return fit(results["steps"], results["moved_block_ms"] / 1e3)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} has no step times ({error!r}): write it with benchmarks/step_times.py --out"
        ) from error


def _columns(row: Mapping[str, float]) -> Iterator[float]:
    """Yield what the coefficients of `FITTED` are multiplied by."""
    yield 1.0
    yield row["prefill_tokens"]
    yield pairs(int(row["prefill_tokens"]), int(row["prefill_context"]))
    yield row["decode_seqs"]
    yield row["decode_seqs"] * row["context"]


# The paper's OPT-13B on one A100 with 40 GB, after no measurement of ours but from its sizes.
_LAYERS, _HIDDEN = 40, 5120
_KV_BYTES = 2 * 2 * _LAYERS * _HIDDEN  # of a token: 16-bit keys and values
_MEMORY, _LINK = 1.555e12, 25e9  # bytes/s of its memory and of PCIe 4.0
# A copy of a block is one of keys and one of values in each layer, and each takes so long to start.
TRANSFER = 5e-6
# Reading a block costs as much as reading so many tokens more: the paper's kernel takes 20 to 26 % longer
# than FasterTransformer's with blocks of 16 tokens (section 7.1), which is all put down to its blocks here.
BLOCK_TOKENS = 4


def opt_13b_on_a100(block_size: int | None = 16) -> Costs:
    """Return the cost model of the paper's OPT-13B on one A100.

    A prompt's token takes 26 GFLOP, a pair of tokens 0.8 MFLOP, at half to two thirds of 312 TFLOP/s. A
    step's constant (the weights take 17 ms to read) and the cost of a sequence are chosen by one figure of
    the paper: at 2 requests/s of ShareGPT 30.42 run at once, at 30 of Alpaca 132.44 (Figure 13).

    Args:
        block_size: number of tokens of a block; None: memory is contiguous, and nothing is swapped.
    """
    per_token = _KV_BYTES / _MEMORY
    moved = 0.0
    if block_size is not None:
        per_token *= 1 + BLOCK_TOKENS / block_size
        moved = 2 * _LAYERS * TRANSFER + block_size * _KV_BYTES / _LINK
    return Costs(
        step=0.028,
        prompt_token=1.3e-4,
        prompt_pair=5e-9,
        decoded_token=3e-4,
        context_token=per_token,
        moved_block=moved,
    )
