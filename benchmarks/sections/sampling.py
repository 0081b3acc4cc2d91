"""Time the sampler beside torch's operators for the same distribution, and FlashInfer's.

Every timed call was checked first, on some of its rows, against the distribution in float64. Other libraries
draw other numbers, and see one setting for all rows, which is the simplest for them.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import cupaged
from benchmarks import sampling_cases

from ..report import Context, Row, reason

CHECKED_ROWS = 16
Run = Callable[[], object]
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
    "top-k, top-p": {"top_k": 50, "top_p": 0.9},
}


@dataclass(frozen=True)
class Case:
    """A batch of rows with the same settings."""

    rows: int
    vocabulary: int
    settings: str
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.rows} x {self.vocabulary}, {self.settings}"

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the logits."""
        return self.rows * self.vocabulary * self.dtype.itemsize


def cases(context: Context) -> list[Case]:
    """Return decode batches over a vocabulary of Llama 3's, on a CPU of SmolLM2's."""
    if context.quick:
        return [Case(4, 1000, settings) for settings in SETTINGS]
    rows, vocabulary = ((1, 64, 256), 128256) if context.on_gpu else ((1, 64), 49152)
    return [Case(count, vocabulary, settings) for count in rows for settings in SETTINGS]


def run(context: Context) -> None:
    for case in context.within_budget(cases(context)):
        context.progress(f"  sample {case}")
        row = measure(context, case)
        if "wrong" in row:
            context.result.wrong.append(f"sample {case}: {row['wrong']}")
        context.result.rows.append(row)


def measure(context: Context, case: Case) -> Row:
    """Return the times of all contenders over logits that miss the L2 cache; none if our tokens are wrong."""
    sets = max(1, -(-context.rotation_bytes // case.num_bytes))
    generator = torch.Generator(context.device).manual_seed(context.seed)
    shape = sets, case.rows, case.vocabulary
    logits = torch.randn(shape, generator=generator, device=context.device, dtype=case.dtype) * 3
    same = SETTINGS[case.settings]  # for all rows
    chosen = {name: torch.from_numpy(np.full(case.rows, value)) for name, value in same.items()}
    settings = sampling_cases.neutral(case.rows, **chosen)
    settings = {name: value.to(context.device) for name, value in settings.items()}
    row: Row = {"name": "sample", "case": str(case), "bytes": case.num_bytes, "seconds": {}, "failed": {}}
    try:
        tokens = cupaged.sample(logits[-1], **settings)
        some = slice(0, None, max(1, case.rows // CHECKED_ROWS))
        sampling_cases.check_tokens(
            tokens[some], logits[-1, some], {name: value[some] for name, value in settings.items()}
        )
    except Exception as error:
        return row | {"wrong": reason(error)}
    contenders: dict[str, Callable[[torch.Tensor], Run]] = {
        "cupaged": lambda x: partial(cupaged.sample, x, **settings, out=torch.empty_like(settings["top_k"])),
        "torch": lambda x: partial(_torch, x, **same),
    }
    if context.on_gpu and importlib.util.find_spec("flashinfer") is not None:
        contenders["flashinfer"] = lambda x: partial(_flashinfer, x, **same)
    for name, make in contenders.items():
        try:
            timing = context.timer([make(x) for x in logits], context.sample_s)
            row["seconds"][name] = timing.median_s
        except Exception as error:
            row["failed"][name] = reason(error)
    return row


def _torch(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Sample as one does with torch: sort where there is top-p."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, order = logits.float() / temperature, None
    if top_k:
        logits, order = logits.topk(int(top_k), dim=-1)
    elif top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    drawn = probabilities.multinomial(1)
    return drawn if order is None else order.gather(-1, drawn)


def _flashinfer(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    from flashinfer import sampling

    if temperature == 0:
        return logits.argmax(dim=-1)  # there is no kernel of its own
    logits = logits.float() / temperature
    if not top_k and top_p == 1:
        return sampling.sampling_from_logits(logits)
    if not top_k:
        return sampling.top_p_sampling_from_probs(logits.softmax(dim=-1), top_p)
    if top_p == 1:
        return sampling.top_k_sampling_from_probs(logits.softmax(dim=-1), int(top_k))
    return sampling.top_k_top_p_sampling_from_logits(logits, int(top_k), top_p)


def check(device: torch.device, seed: int, dtype: torch.dtype) -> None:
    """Check a call of drawn logits and settings."""
    rng = random.Random(seed)
    rows, size = rng.randrange(1, 9), rng.choice([1, 7, 1000, rng.randrange(2, 20000), 50257, 128256])
    logits = sampling_cases.draw_logits(rng, rows, size, dtype)
    settings = sampling_cases.draw_settings(rng, rows, size)
    on_device = {name: value.to(device) for name, value in settings.items()}
    sampling_cases.check_tokens(cupaged.sample(logits.to(device), **on_device), logits, settings)
