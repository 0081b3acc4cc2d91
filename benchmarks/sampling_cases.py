"""Draw logits and settings of `cupaged.sample`, and check its tokens against the distribution in float64.

A token is right if the number drawn, times the total, is between the cumulative weights before and after it,
within a bound of the error of float32 weights. Where such an error decides how many tokens min-p or top-p
keep, each of these numbers is allowed. So the check holds for every seed.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from cupaged.backends import reference
from cupaged.params import fraction_bits

NAMES = ("temperature", "top_k", "top_p", "min_p", "seeds", "indices", "positions")
UNIT = 2.0**-24  # relative error of a rounding to float32
SMALLEST = 2.0**-126  # a GPU counts smaller logits as 0


def neutral(num_rows: int, **changes) -> dict[str, torch.Tensor]:
    """Return settings that truncate nothing, at temperature 1."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 0, "indices": 0}
    values = {name: torch.from_numpy(np.full(num_rows, value)) for name, value in defaults.items()}
    return values | {"positions": torch.arange(num_rows)} | changes


def draw_settings(rng: random.Random, num_rows: int, size: int) -> dict[str, torch.Tensor]:
    """Return settings of each row, every one of them neutral in some."""
    rows, pick, uniform = range(num_rows), rng.choice, rng.uniform
    temperature = [pick([0.0, 1.0, 1.0, uniform(0.1, 3), 10.0 ** uniform(-3, 3)]) for _ in rows]
    top_k = [pick([0, 0, -1, 1, rng.randint(1, 60), rng.randint(1, size + 3)]) for _ in rows]
    tenths = range(1, 10)
    top_p = [pick([1.0, 1.0, uniform(0, 1), uniform(0.9, 1), 1e-9, pick(tenths) / 10]) for _ in rows]
    min_p = [pick([0.0, 0.0, uniform(0, 1) ** 4, 1.0, 0.5]) for _ in rows]
    bits = [[rng.getrandbits(64) - (1 << 63) for _ in rows] for _ in range(2)]
    values = [temperature, top_k, top_p, min_p, *bits, [rng.randrange(1 << 20) for _ in rows]]
    return {name: torch.from_numpy(np.array(value)) for name, value in zip(NAMES, values)}


def draw_logits(rng: random.Random, num_rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of many kinds: normal, flat, with few distinct values, of zeros, mostly ruled out."""
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    rows = torch.randn(num_rows, size, generator=generator)
    for row in rows:
        kind = rng.choice(["normal", "normal", "ties", "flat", "zeros", "ruled out", "large"])
        row *= {"normal": rng.uniform(0.5, 6), "flat": 1e-3, "zeros": 0, "large": 3e4}.get(kind, 1)
        if kind == "ties":
            row.copy_(row.mul(2).round() / 2)
        if kind == "ruled out":
            row[torch.rand(size, generator=generator) < 0.9] = float("-inf")
        row += rng.choice([0, 0, -20, 7])
    rows = rows.to(dtype)
    return rows.masked_fill(rows.abs() < SMALLEST, 0)


def weight_errors(weights: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Return bounds of the errors of a row's weights, which are the exponentials of the exponents."""
    # Of the exponent: the difference, its factor of three roundings, the product. Of the power: some more.
    errors = weights * (6 * UNIT * np.minimum(-exponents, 100) + 8 * UNIT)
    return errors + 2.0 ** -fraction_bits(len(weights))


def check_token(logits: torch.Tensor, token: int, settings: list, uniform: float) -> None:
    """Check the token of one row, on the CPU."""
    temperature, top_k, top_p, min_p = settings
    size = len(logits)
    assert 0 <= token < size
    x = logits.double().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")).numpy()
    largest = x.max()
    if not temperature > 0 or np.isinf(largest):
        assert token == np.flatnonzero(x == largest)[0]
        return
    exponents = (x - largest) / min(max(temperature, 1e-30), 1e30)
    weights = np.exp(exponents)
    errors = weight_errors(weights, exponents)
    order = np.argsort(-x, kind="stable")  # the first of equal logits come first
    ordered, slack = weights[order], errors[order]
    least, most = (int(np.sum(ordered + sign * slack >= min(min_p, 1.0))) for sign in (-1, 1))
    least, most = max(least, 1), max(most, 1)
    if top_k > 0:
        least, most = min(least, top_k), min(most, top_k)
    if top_p < 1:
        before = np.concatenate([[0.0], np.cumsum(ordered)])
        error = float(errors.sum()) + 1e-12 * before[-1]
        counts = [
            max(1, int(np.sum(before[:kept] < top_p * before[kept] + sign * 2 * error)))
            for kept in (least, most)
            for sign in (-1, 1)
        ]
        least, most = min(counts), max(counts)
    rank = int(np.flatnonzero(order == token)[0])
    assert rank < most, f"token {token} is the {rank}th, of which {least} to {most} are kept"
    distances = []
    # Between the two, the numbers differ by weights that are within the error, but for the last.
    for kept in {least, most, *range(max(least, most - 3), most)}:
        if rank < kept:
            here = np.zeros(size)
            here[order[:kept]] = ordered[:kept]
            cumulative = here.cumsum()
            target = uniform * cumulative[-1]
            distances.append(max(target - cumulative[token], cumulative[token] - here[token] - target, 0))
    allowed = 2 * errors.sum() + 1e-12 * weights.sum()
    if most - least > 4:
        allowed += ordered[least : most - 3].sum()
    assert min(distances) <= allowed, f"token {token} is {min(distances)} from the number, allowed {allowed}"


def check_tokens(tokens: torch.Tensor, logits: torch.Tensor, settings: dict[str, torch.Tensor]) -> None:
    """Check the tokens of all rows."""
    columns = {name: value.cpu() for name, value in settings.items()}
    uniforms = reference.uniform(*(columns[name] for name in NAMES[4:])).tolist()
    for row, token in enumerate(tokens.tolist()):
        numbers = [columns[name][row].item() for name in NAMES[:4]]
        try:
            check_token(logits[row].cpu(), token, numbers, uniforms[row])
        except AssertionError as error:
            raise AssertionError(f"row {row}, {numbers}, {uniforms[row]}: {error}") from None
