"""Faults planted in the compiled kernels must be noticed: that the other tests can fail."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import pytest
import torch

import cupaged
from benchmarks.cases import check, draw
from benchmarks.sampling_cases import check_tokens, neutral
from cupaged import backends
from tests.kernels import test_norm
from tests.kernels.test_attention import run

from . import launcher
from .memory import PtxError

UNORDERED = "before what another thread writes|that another thread still reads"
WRONG = "maximum error|NaN"  # results


@dataclass(frozen=True)
class Fault:
    """A change of the n-th place in a kernel where a pattern is found, or of all of them."""

    kernel: str  # paged_decode_mma, ...
    pattern: str
    replacement: str
    message: str
    n: int | None = 0

    def plant(self, text: str) -> str:
        if f".entry {self.kernel}(" not in text:
            return text
        if self.n is None:
            return re.sub(self.pattern, self.replacement, text)
        places = list(re.finditer(self.pattern, text))
        place = places[self.n]
        return text[: place.start()] + place.expand(self.replacement) + text[place.end() :]


DECODE, PREFILL, HOPPER = "paged_decode_mma", "paged_prefill_mma", "paged_prefill_wgmma"
NORM, SAMPLE = "rms_norm", "sample"
FAULTS = {
    # Order
    "decode: copies not waited for": Fault(DECODE, r"cp.async.wait_group 1;", "", UNORDERED),
    "decode: one stage too many": Fault(DECODE, r"wait_group 1;", "wait_group 2;", UNORDERED),
    "decode: a warp does not meet": Fault(DECODE, r"bar.warp.sync[^;]*;", "", UNORDERED),
    "decode: a block does not meet": Fault(DECODE, r"bar.sync[^;]*;", "", UNORDERED, n=-1),
    "prefill: a block does not meet": Fault(PREFILL, r"bar.sync[^;]*;", "", UNORDERED, n=-1),
    "norm: a block does not meet": Fault(NORM, r"bar.sync[^;]*;", "", UNORDERED),
    "norm: a block does not meet again": Fault(NORM, r"bar.sync[^;]*;", "", UNORDERED, n=1),
    "sample: a block does not meet": Fault(SAMPLE, r"bar.sync[^;]*;", "", UNORDERED),
    "sample: a block does not meet in a search": Fault(SAMPLE, r"bar.sync[^;]*;", "", UNORDERED, n=3),
    "hopper: the copy is not fenced": Fault(HOPPER, r"fence.proxy.async[^;]*;", "", UNORDERED, n=None),
    "hopper: no wait for a stage": Fault(
        HOPPER, r"mbarrier.try_wait\S+ done,[^;]*;", "setp.eq.b32 done, 0, 0;", UNORDERED, n=-2
    ),
    "hopper: a product not waited for": Fault(HOPPER, r"(wgmma.wait_group\S+) 1;", r"\1 2;", UNORDERED),
    "hopper: no wait for the last": Fault(
        HOPPER, r"wgmma.wait_group\S+ 0;", "", f"under way|{UNORDERED}", n=-1
    ),
    "hopper: an arrival too few": Fault(HOPPER, r"mbarrier.arrive[^;]*;", "", "all warps wait", n=1),
    "hopper: barriers are not shown": Fault(HOPPER, r"bar.sync\s+0;", "", "no barrier|" + UNORDERED),
    # Operands of the inline assembly
    "decode: registers swapped": Fault(
        DECODE, r"(mma.sync\S+ \{[^}]*\}, )\{(%r\d+), (%r\d+)", r"\1{\3, \2", WRONG
    ),
    "decode: not transposed": Fault(DECODE, r"\.trans\.", ".", WRONG),
    "decode: half a copy's address": Fault(DECODE, r"(cp.async.cg\S+ \[%r\d+)\]", r"\1+8]", "multiple of 16"),
    "decode: beyond the cache": Fault(
        DECODE, r"(cp.async.cg\S+ \[%r\d+\], \[%rd\d+)\]", r"\1+1048576]", "global memory"
    ),
    "hopper: not transposed": Fault(HOPPER, r", p, 1, 1, 1;", ", p, 1, 1, 0;", WRONG),
    "hopper: adds to what was before": Fault(
        HOPPER, r"setp.ne.b32 p, %r\d+, 0;", "setp.eq.b32 p, 0, 0;", WRONG
    ),
    "hopper: another register first": Fault(
        HOPPER, r"(wgmma.mma\S+ \{)(%f\d+), (%f\d+)", r"\1\3, \2", WRONG, n=-8
    ),
    # Arguments
    "decode: across two pointers": Fault(
        DECODE, r"(ld.param.u64[^[]*\[\w+)\+\d+\]", r"\1+4]", "8 bytes of the arguments at 4 are no field"
    ),
    "decode: half a pointer": Fault(
        DECODE,
        r"(ld.param.v2.u32[^[]*\[\w+)\+\d+\]",
        r"\1+72]",
        "4 bytes of the arguments at 72 are no field",
    ),
    "decode: beyond the arguments": Fault(
        DECODE, r"(ld.param.u32[^[]*\[\w+)\+\d+\]", r"\1+232]", "4 bytes of the arguments at 232 are no field"
    ),
    # Control
    "decode: a lane stays away": Fault(
        DECODE, r"(shfl.sync.bfly\S+\s+\S+ \S+ \S+ \S+) (%r\d+);", r"\1 1;", "not in the mask"
    ),
}


# One of each kernel; the rest belongs to the matrix.
FIRST = {fault.kernel: name for name, fault in reversed(FAULTS.items())}.values()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FIRST else pytest.mark.matrix) for name in FAULTS]
)
def test_is_noticed(name, monkeypatch):
    fault = FAULTS[name]
    arch = "90a" if fault.kernel == HOPPER else "80"

    def call(change) -> None:
        module = launcher.backend(1, arch, change)
        monkeypatch.setattr(backends, "for_device", lambda device_type: module)
        if fault.kernel == NORM:
            test_norm.check_call("cpu", random.Random(1), torch.float16, "input norm", "contiguous", 1, 2048)
            return
        if fault.kernel == SAMPLE:
            logits = torch.randn(1, 2000, generator=torch.Generator().manual_seed(1))
            settings = neutral(1, top_k=torch.tensor([50]))
            check_tokens(cupaged.sample(logits, **settings), logits, settings)
            return
        problem = draw(
            1,
            dtype=torch.float16,
            head_size=32,
            block_size=16,
            num_kv_heads=1,
            group=2,
            seq_lens=[420, 7],
            query_lens=None if fault.kernel == DECODE else [70, 7],
        )
        out, lse = run(problem, "cpu")
        check(out, problem, lse)

    with pytest.raises((PtxError, AssertionError), match=fault.message):
        call(fault.plant)
