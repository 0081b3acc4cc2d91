"""The kernels that plan work, interpreted, give to the bit what they give under the emulation.

Which `tests/kernels` checks against plain Python. Here it is the order of their accesses that counts: their
threads share global memory too.
"""

from __future__ import annotations

import random
import re
import shutil

import pytest
import torch

from cupaged.backends.cuda import plans, specs
from cupaged.backends.cuda.arguments import PlanPrefillArguments
from cupaged.backends.cuda.specs import KernelCall
from cupaged.params import AttentionParams
from tests.cuda_host.emulator import HostLauncher

from .launcher import PtxLauncher, ptx
from .memory import PtxError
from .program import parse

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulation with")
CPU = torch.device("cpu")


def plan_prefill(rng: random.Random) -> tuple[KernelCall, list[torch.Tensor]]:
    """Of more sequences than the block has threads."""
    count = rng.randrange(300, 600)
    query_lens = torch.tensor([rng.choice([0, 1, 2, rng.randrange(2, 300)]) for _ in range(count)])
    prefixes = torch.tensor([rng.choice([0, rng.randrange(3000)]) for _ in range(count)])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), query_lens.cumsum(0)]).int()
    padded = int(starts[-1]) + rng.choice([0, 5])
    arguments = PlanPrefillArguments(
        num_tokens=padded,
        num_seqs=count,
        tile_tokens=16,
        group=4,
        num_kv_heads=2,
        tile_heads=4,
        window=rng.choice([0, 700]),
        max_splits=rng.choice([1, 4]),
        blocks=rng.choice([8, 300]),
    )
    tensors = [
        (query_lens + prefixes * (query_lens > 0)).int(),
        starts,
        torch.full((2 * count + 6,), -1).int(),
    ]
    return KernelCall(specs.plan_prefill(), (1, 1), arguments), tensors


def find_shared_splits(rng: random.Random) -> tuple[KernelCall, list[torch.Tensor]]:
    """Families of sequences, some with more members than are looked at together."""
    block_size, width = 32, 3 * plans.SPLIT_TOKENS // 32
    rows: list[list[int]] = []
    while len(rows) < 260:
        family = [rng.randrange(1 << 30) for _ in range(width)]
        for _ in range(rng.choice([1, 2, 7, 150])):
            shared = rng.choice([0, 16, 32, 33, width])
            rows.append(family[:shared] + [rng.randrange(1 << 30) for _ in range(width - shared)])
    block_tables = torch.tensor(rows, dtype=torch.int32)
    seq_lens = torch.tensor([rng.randrange(1, width * block_size + 1) for _ in rows], dtype=torch.int32)
    query = torch.zeros(len(rows), 4, 64, dtype=torch.float16)
    kv_cache = torch.zeros(1, 2, 2, block_size, 64, dtype=torch.float16)
    params = AttentionParams(scale=1.0, shared_prefix=True)
    plan = plans.decode(query, kv_cache, block_tables, None, query, params, "90a", 4)
    assert plan.search is not None
    assert plan.tile_lists is not None
    lists = (torch.full(shape, -1, dtype=torch.int32) for shape in (plan.tile_lists[:2], plan.tile_lists))
    return plan.search, [block_tables, seq_lens, None, *lists]


PLANNERS = {"plan_prefill": plan_prefill, "find_shared_splits": find_shared_splits}


@pytest.mark.parametrize("name", PLANNERS)
def test_as_under_the_emulation(seed, name):
    call, tensors = PLANNERS[name](random.Random(seed))
    copies = [None if tensor is None else tensor.clone() for tensor in tensors]
    HostLauncher(seed).prepare(call, CPU)(tensors)
    PtxLauncher(seed, "80").prepare(call, CPU)(copies)
    for expected, actual in zip(tensors, copies):
        assert expected is None or torch.equal(actual, expected)


@pytest.mark.matrix
@pytest.mark.parametrize("name", PLANNERS)
def test_every_barrier_is_needed(name):
    """What the kernel is without one is noticed. The compiler may have several of one, some of no use: before
    the first pass of a loop, say."""
    text = ptx(PLANNERS[name](random.Random(0))[0].spec, "80")
    places = [found.span() for found in re.finditer(r"bar\.sync[^;]*;", text)]
    lines = [i.line for i in parse(text).instructions if i.opcode == "bar.sync"]
    unnoticed = set(lines)
    for line, (start, end) in zip(lines, places):
        if line in unnoticed and is_noticed(name, text[:start] + text[end:]):
            unnoticed.remove(line)
    assert not unnoticed


def is_noticed(name: str, text: str) -> bool:
    for seed in range(12):
        call, tensors = PLANNERS[name](random.Random(seed))
        try:
            PtxLauncher(seed, "80", lambda _: text).prepare(call, CPU)(tensors)
        except PtxError:
            return True
    return False


def test_constant_loads_of_what_is_written_are_noticed():
    """As a pointer to const would let the compiler make them."""
    call, tensors = plan_prefill(random.Random(0))
    launcher = PtxLauncher(0, "80", lambda text: text.replace("ld.global.u32", "ld.global.nc.u32"))
    with pytest.raises(PtxError, match=r"ld\.global\.nc"):
        launcher.prepare(call, CPU)(tensors)
