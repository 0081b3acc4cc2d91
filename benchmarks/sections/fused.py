"""Time the fused operators: bytes read and written, against a copy.

Every timed call was checked first, on some of its rows: against float64, and the cache bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

import cupaged
from benchmarks import cases as problems
from cupaged import checks
from cupaged.backends import reference
from cupaged.fused_checks import ACTIVATIONS

from ..problems import name_of
from ..report import Context, Row, reason
from .memory import rate

CHECKED_ROWS = 64
BLOCK_SIZE = 16
Draw = Callable[..., torch.Tensor]
Call = tuple[Callable[[], object], Callable[[], None]]  # the timed call, and one that is checked


class Operator(Protocol):
    """A call of an operator, by its shapes and settings; ``padding`` elements lie before each row."""

    tokens: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Return the name of the public function."""

    @property
    def num_bytes(self) -> int:
        """Return the bytes that a call reads and writes, without weights."""

    def make(self, draw: Draw) -> Call:
        """Return a call on new tensors, of which ``draw`` has the dtype and the device."""


@dataclass(frozen=True)
class Norm:
    """`rms_norm` without a residual, with one, or with a norm of the input before it is added."""

    tokens: int
    kind: str = "plain"
    size: int = 4096
    dtype: torch.dtype = torch.bfloat16
    padding: int = 0
    name = "rms_norm"

    def __str__(self) -> str:
        return f"{self.tokens} x {self.size}, {self.kind}"

    @property
    def num_bytes(self) -> int:
        return self.tokens * self.size * self.dtype.itemsize * (2 if self.kind == "plain" else 4)

    def make(self, draw: Draw) -> Call:
        drawn = draw(2, self.tokens, self.padding + self.size)[..., self.padding :]
        weights = draw(2, self.size)
        x, residual = drawn[0], None if self.kind == "plain" else drawn[1]
        input_weight = weights[1] if self.kind == "input norm" else None
        out = torch.empty_like(x)
        options: dict[str, Any] = {"residual": residual, "input_weight": input_weight}
        run = partial(cupaged.rms_norm, x, weights[0], out=out, **options)

        def check() -> None:
            rows = _some(self.tokens)
            before, weight = drawn[:, rows].clone().cpu(), weights.cpu()
            run()
            stored = before[0]
            if residual is not None:
                stored = residual[rows].cpu()
                total = [_sum(before.to(kind), weight.to(kind), self.kind) for kind in _kinds()]
                problems.close(stored, total[0].to(self.dtype), total[1])
            exact, plain = stored.double(), stored.clone()
            for values in (exact, plain):
                norm = weight[0].to(values.dtype)
                reference.rms_norm(values, norm, 1e-6, 0.0, None, None, values)
            problems.close(out[rows], plain, exact)

        return run, check


def _sum(pair: torch.Tensor, weights: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the sum of input and residual, in their dtype."""
    added = reference.normalise(pair[0], weights[1], 1e-6, 0.0) if kind == "input norm" else pair[0]
    return pair[1] + added


@dataclass(frozen=True)
class Gated:
    """`act_and_mul`."""

    tokens: int
    activation: str = "silu"
    size: int = 14336
    dtype: torch.dtype = torch.bfloat16
    padding: int = 0
    name = "act_and_mul"

    def __str__(self) -> str:
        return f"{self.tokens} x {self.size}, {self.activation}"

    @property
    def num_bytes(self) -> int:
        return self.tokens * 3 * self.size * self.dtype.itemsize

    def make(self, draw: Draw) -> Call:
        x = draw(self.tokens, self.padding + 2 * self.size)[:, self.padding :]
        out = x.new_empty(self.tokens, self.size)
        run = partial(cupaged.act_and_mul, x, activation=self.activation, out=out)

        def check() -> None:
            run()
            rows = _some(self.tokens)
            values = x[rows].cpu()
            plain = torch.empty_like(values[:, : self.size])
            exact = plain.double()
            reference.act_and_mul(values, self.activation, plain)
            reference.act_and_mul(values.double(), self.activation, exact)
            problems.close(out[rows], plain, exact)

        return run, check


@dataclass(frozen=True)
class Rope:
    """`rope_and_cache` of a merged projection."""

    tokens: int
    interleaved: bool = False
    norms: bool = False  # of queries and keys
    cache_dtype: torch.dtype | None = None
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    padding: int = 0
    name = "rope_and_cache"

    def __str__(self) -> str:
        settings = ["interleaved"] * self.interleaved + ["norms"] * self.norms
        settings += [] if self.cache_dtype is None else [name_of(self.cache_dtype)]
        heads = f"{self.num_heads}/{self.num_kv_heads}x{self.head_size}"
        return ", ".join([f"{self.tokens} x {heads}", *settings])

    @property
    def num_bytes(self) -> int:
        pairs = self.tokens * self.head_size
        cache = (self.cache_dtype or self.dtype).itemsize
        moved = 2 * (self.num_heads + self.num_kv_heads) * self.dtype.itemsize + 2 * self.num_kv_heads * cache
        return pairs * (moved + 4)  # and half as many cosines and sines

    def make(self, draw: Draw) -> Call:
        kinds = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        qkv = draw(self.tokens, sum(kinds), self.padding + self.head_size)[..., self.padding :]
        query, key, value = qkv.split(kinds, dim=1)
        angles = draw(self.tokens, self.head_size // 2).float()
        cos, sin = angles.cos(), angles.sin()
        blocks = -(-self.tokens // BLOCK_SIZE)
        shape = (blocks, 2, self.num_kv_heads, BLOCK_SIZE, self.head_size)
        cache = torch.zeros(shape, dtype=self.cache_dtype or self.dtype, device=qkv.device)
        slots = torch.randperm(blocks * BLOCK_SIZE)[: self.tokens].to(qkv.device)
        options: dict[str, Any] = {"interleaved": self.interleaved}
        weights = draw(2, self.head_size)
        if self.norms:
            options |= {"query_weight": weights[0], "key_weight": weights[1]}
        if self.cache_dtype is not None:
            scales = draw(self.num_kv_heads).float().abs() / 50 + 0.01
            options |= {"k_scale": scales, "v_scale": scales}
        run = partial(cupaged.rope_and_cache, query, key, value, cos, sin, cache, slots, **options)

        def check() -> None:
            rows = _some(self.tokens)
            before, weight = query[rows].clone().cpu(), weights[0].cpu()
            turned, elsewhere = key.clone(), torch.zeros_like(cache)
            # The keys as queries, then written: the same bits.
            as_query = {**options, "query_weight": options.get("key_weight")}
            skipped = torch.full_like(slots, -1)
            cupaged.rope_and_cache(turned, key, value, cos, sin, elsewhere, skipped, **as_query)
            scales = (options.get("k_scale"), options.get("v_scale"))
            cupaged.reshape_and_cache(turned, value, elsewhere, slots, *scales)
            run()
            plain, exact = (self._turned(before.to(kind), weight, cos[rows], sin[rows]) for kind in _kinds())
            problems.close(query[rows], plain.to(self.dtype), exact)
            if not torch.equal(cache.view(torch.uint8), elsewhere.view(torch.uint8)):
                raise AssertionError("the cache has other bits than keys that are rotated, then written")

        return run, check

    def _turned(
        self, heads: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        if self.norms:
            heads = reference.normalise(heads, weight, 1e-6, 0.0)
        return reference.rotate(heads, cos.cpu(), sin.cpu(), self.interleaved)


def _kinds() -> tuple[torch.dtype, torch.dtype]:
    return torch.float32, torch.float64


def _some(tokens: int) -> slice:
    """Return evenly spaced rows."""
    return slice(0, tokens, max(1, tokens // CHECKED_ROWS))


def cases(context: Context) -> list[Operator]:
    """Return the layers' operators of a Llama 3 8B, and what other models have in their place."""
    if context.quick:
        small = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64}
        return [Norm(8, "residual", 256), Gated(8, size=256), Rope(8, **small)]  # type: ignore[arg-type]
    many = 16384 if context.on_gpu else 1024
    found: list[Operator] = []
    for tokens in (1, 64, 1024, 16384) if context.on_gpu else (1, 64, 1024):
        found += [Norm(tokens), Norm(tokens, "residual"), Norm(tokens, "input norm")]
        found += [Gated(tokens), Rope(tokens), Rope(tokens, norms=True)]
    found += [Gated(many, activation) for activation in ACTIVATIONS[1:]]
    found += [Rope(many, interleaved=True)]
    if context.on_gpu:
        found += [Rope(many, cache_dtype=dtype) for dtype in checks.QUANTISED]
    return found


def run(context: Context) -> None:
    for case in context.within_budget(cases(context)):
        context.progress(f"  {case.name} {case}")
        try:
            row = measure(context, case)
        except Exception as error:
            row = row_of(case) | {"wrong": reason(error)}
        if "wrong" in row:
            context.result.wrong.append(f"{case.name} {case}: {row['wrong']}")
        context.result.rows.append(row)


def measure(context: Context, case: Operator) -> Row:
    """Return the time of a call over inputs that miss the L2 cache; none if the result is wrong."""
    draw = _draw(context.device, context.seed, case.dtype)
    sets = max(1, -(-context.rotation_bytes // case.num_bytes))
    calls = [case.make(draw) for _ in range(sets)]
    try:
        calls[-1][1]()
    except AssertionError as error:
        return row_of(case) | {"wrong": str(error)}
    return row_of(case) | rate(context, [run for run, _ in calls], case.num_bytes)


def row_of(case: Operator) -> Row:
    """Return what is known of a row before it is measured."""
    return {"name": case.name, "case": str(case), "bytes": case.num_bytes}


def _draw(device: torch.device, seed: int, dtype: torch.dtype) -> Draw:
    generator = torch.Generator(device).manual_seed(seed)
    return partial(torch.randn, generator=generator, device=device, dtype=dtype)


def check(device: torch.device, seed: int, kind: type[Norm] | type[Gated] | type[Rope], **fixed: Any) -> None:
    """Check a call of drawn shape and settings."""
    rng = random.Random(seed)
    tokens, padding = rng.randrange(1, 100), rng.choice([0, 0, 1])
    drawn: dict[str, Any]
    if kind is Norm:
        size = rng.choice([64, 100, 1000, 2304, 4096, 16384, 20000])
        drawn = {"size": size, "kind": rng.choice(["plain", "residual", "input norm"])}
    elif kind is Gated:
        drawn = {"size": rng.choice([1, 64, 100, 1536, 14336]), "activation": rng.choice(ACTIVATIONS)}
    else:
        heads = rng.choice([1, 2, 5])
        drawn = {"num_heads": heads * rng.choice([1, 3, 4]), "num_kv_heads": heads}
        drawn |= {"head_size": rng.choice([32, 64, 80, 128, 256]), "norms": rng.random() < 0.5}
        drawn |= {"interleaved": rng.random() < 0.5}
    case = kind(tokens, padding=padding, **drawn | fixed)
    case.make(_draw(device, seed, case.dtype))[1]()
