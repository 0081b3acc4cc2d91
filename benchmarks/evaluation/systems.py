"""The systems that the paper compares, simulated with the memory of its OPT-13B on one A100 (Table 1)."""

from __future__ import annotations

from typing import Any

from benchmarks.cost_model import opt_13b_on_a100
from benchmarks.simulation import SimulatedEngine

NOTE = "A simulation: no model ran, and the times are those of a cost model."
SLOTS = 15_700  # of the KV cache
MAX_MODEL_LEN = 2048
BLOCK_SIZE = 16
SYSTEMS = {  # memory policy, batching
    "paged": ("paged", "continuous"),
    "Orca (Oracle)": ("orca-oracle", "continuous"),
    "Orca (Pow2)": ("orca-pow2", "continuous"),
    "Orca (Max)": ("orca-max", "continuous"),
    "FasterTransformer": ("orca-max", "static"),
}
ORCA = tuple(SYSTEMS)[1:4]


def engine(
    system: str,
    *,
    block_size: int = BLOCK_SIZE,
    preemption_mode: str = "recompute",
    enable_prefix_caching: bool = False,
    **settings: Any,
) -> SimulatedEngine:
    """Return a simulated engine of a system; contiguous memory neither shares nor preempts."""
    policy, batching = SYSTEMS[system]
    paged = policy == "paged"
    return SimulatedEngine(
        SLOTS // block_size,
        preemption_mode,
        block_size=block_size,
        max_num_seqs=512,
        budget=2048,
        costs=opt_13b_on_a100(block_size if paged else None),
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=enable_prefix_caching and paged,
        memory_policy=policy,
        batching=batching,
        **settings,
    )
