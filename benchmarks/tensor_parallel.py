"""Predict what the ranks of a divided model spend on each other in a step.

    python benchmarks/tensor_parallel.py

prints the table of docs/tensor_parallel.md. It is arithmetic, not a measurement: the number of operations and
their bytes are those that tests/engine/test_tensor_parallel.py counts; latencies and bandwidths are assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

ITEM = 2  # bytes of a number in bfloat16


@dataclass(frozen=True)
class Link:
    """How GPUs are connected.

    Args:
        latency: seconds of an operation of a few bytes.
        bandwidth: bytes a second in each direction.
    """

    name: str
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Model:
    """The sizes of a model."""

    name: str
    layers: int
    hidden: int
    vocabulary: int


LINKS = (Link("NVLink", 12e-6, 400e9), Link("PCIe", 25e-6, 20e9))
MODELS = (Model("8B", 32, 4096, 128256), Model("70B", 80, 8192, 128256))
RANKS = (2, 4, 8)
STEPS = ((1, 1), (64, 64), (256, 256), (2048, 1))  # tokens, and rows of logits


def seconds(model: Model, link: Link, ranks: int, num_tokens: int, num_rows: int) -> float:
    """Return how long the operations between the ranks of a step take."""
    others = (ranks - 1) / ranks
    number = 1 + 2 * model.layers
    added_up = number * (link.latency + 2 * others * num_tokens * model.hidden * ITEM / link.bandwidth)
    joined = link.latency + others * num_rows * model.vocabulary * ITEM / link.bandwidth
    return added_up + joined


def table() -> list[str]:
    """Return the lines of the table."""
    heads = " | ".join(f"{link.name}, {ranks}" for link in LINKS for ranks in RANKS)
    lines = [f"| model | tokens | {heads} |", "|---|---|" + "---|" * (len(LINKS) * len(RANKS))]
    for model in MODELS:
        for num_tokens, num_rows in STEPS:
            times = (seconds(model, link, ranks, num_tokens, num_rows) for link in LINKS for ranks in RANKS)
            cells = " | ".join(f"{1e3 * time:.2f}" for time in times)
            lines.append(f"| {model.name} | {num_tokens} | {cells} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
