"""No bank conflicts and no wasted sectors where it counts, by counting in the interpreted kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.cases import check, draw
from cupaged import backends
from cupaged.backends.cuda.kernels import Kernels
from tests.kernels.test_attention import run

from .launcher import PtxLauncher
from .traffic import Traffic

WIDE = ("cp.async", "st.global.v4")


def of_attention(monkeypatch, arch: str, decode: bool, head_size: int, cache_dtype) -> dict[str, Traffic]:
    """By entry point."""
    launcher = PtxLauncher(0, arch)
    launcher.traffic = {}
    monkeypatch.setattr(backends, "for_device", lambda device_type: Kernels(launcher))
    problem = draw(
        0,
        dtype=torch.float16,
        cache_dtype=cache_dtype,
        head_size=head_size,
        block_size=16,
        num_kv_heads=1,
        group=4,
        seq_lens=[140, 80],
        query_lens=None if decode else [40, 16],
    )
    out, lse = run(problem, "cpu")
    check(out, problem, lse)
    return launcher.traffic


@pytest.mark.matrix
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize(
    ("arch", "kernel"),
    [("80", "paged_decode_mma"), ("80", "paged_prefill_mma"), ("90a", "paged_prefill_wgmma")],
)
def test_keys_and_values(monkeypatch, arch, kernel, head_size):
    """Copies from the cache to shared memory, matrices from there to registers, and 16 bytes of output."""
    traffic = of_attention(monkeypatch, arch, "decode" in kernel, head_size, None)[kernel]
    shared = {op: cost for (_, op), cost in traffic.shared.items() if op.startswith(("cp.", "ldmatrix"))}
    assert len(shared) == (1 if "wgmma" in kernel else 3)  # wgmma reads shared memory itself
    for cost in shared.values():
        assert cost.taken == cost.fewest
    sectors = {
        op: cost for (_, op), cost in traffic.globally.items() if op.startswith(("cp.", "st.global.v4"))
    }
    assert len(sectors) == 2
    for cost in sectors.values():
        assert cost.taken == cost.fewest


@pytest.mark.matrix
@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("head_size", [48, 64, 96, 128])
def test_warps_sums(monkeypatch, head_size, cache_dtype):
    """What the warps of decode have of the output on its way to be merged, but for a last part of a row."""
    traffic = of_attention(monkeypatch, "80", True, head_size, cache_dtype)["paged_decode_mma"]
    stores = [c for (_, op), c in traffic.shared.items() if op in ("st.shared.v2.f32", "st.shared.v4.f32")]
    assert sum(cost.requests for cost in stores) > 0
    assert sum(cost.taken for cost in stores) <= 1.2 * sum(cost.fewest for cost in stores)


@pytest.mark.parametrize(
    ("addresses", "size", "turns"),
    [
        (4 * np.arange(32), 4, 1),
        (np.zeros(32, int), 4, 1),  # one word for all
        (128 * np.arange(32), 4, 32),
        (8 * np.arange(32), 4, 2),
        (16 * np.arange(32), 16, 4),
        (32 * np.arange(32), 16, 8),
        (128 * np.arange(8), 16, 8),
        (144 * np.arange(8), 16, 1),
        (2 * np.arange(32), 2, 1),
    ],
)
def test_turns_of_shared_memory(addresses, size, turns):
    traffic = Traffic()
    traffic.count_shared(("", ""), addresses, size)
    assert traffic.shared["", ""].taken == turns


@pytest.mark.parametrize(
    ("addresses", "size", "sectors", "fewest"),
    [(4 * np.arange(32), 4, 4, 4), (64 * np.arange(32), 4, 32, 4), (16 + 16 * np.arange(4), 16, 3, 2)],
)
def test_sectors_of_global_memory(addresses, size, sectors, fewest):
    traffic = Traffic()
    traffic.count_global(("", ""), addresses, size)
    cost = traffic.globally["", ""]
    assert (cost.taken, cost.fewest) == (sectors, fewest)
