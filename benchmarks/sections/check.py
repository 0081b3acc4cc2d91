"""Check the kernels on this device: random problems against float64, with poison in all unused memory.

Problems and tolerance are those of the tests (`benchmarks/cases.py`), without pytest, so that a bare GPU
machine can run them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter

import torch

import cupaged
from benchmarks import cases
from cupaged import checks
from cupaged.backends import reference

from ..report import Context, reason
from . import fused, sampling

HEAD_SIZES = (32, 64, 80, 96, 112, 120, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 5, 7, 8, 16)
BLOCK_SIZES = (8, 16, 32, 64, 128)
FEATURES = ((), ("window",), ("cap",), ("alibi",), ("sinks",), ("full",), ("window", "cap", "alibi", "sinks"))
MODES = ("decode", "few", "prefill")  # few: at most 8 query tokens per sequence

Check = Callable[[torch.device, int], None]


def run(context: Context) -> None:
    """Run every check with a seed of its own, which is reported if the check fails."""
    if not __debug__:
        raise RuntimeError("the checks are assertions: run Python without -O")
    failed = 0
    for name, check in context.within_budget(list(checks_of(context)), itemgetter(0)):
        seed = context.seed + len(context.result.rows)
        row = {"name": name, "seed": seed}
        try:
            check(context.device, seed)
        except Exception as error:
            row["error"] = reason(error)
            context.result.wrong.append(f"{name} (seed {seed}): {row['error']}")
            failed += 1
        context.result.rows.append(row)
    context.result.notes.append(f"{len(context.result.rows) - failed} right, {failed} wrong")
    if not context.on_gpu:
        context.result.left_out.append("CUDA graphs: there is no GPU")


def checks_of(context: Context) -> Iterator[tuple[str, Check]]:
    quick = context.quick
    for dtype in checks.DTYPES:
        for head_size in HEAD_SIZES[1:2] if quick else HEAD_SIZES:
            for mode in MODES:
                name = f"{mode} {dtype} D={head_size}"
                yield name, partial(attention, mode=mode, dtype=dtype, head_size=head_size)
    for features in FEATURES[-1:] if quick else FEATURES:
        for block_size in BLOCK_SIZES[:1] if quick else BLOCK_SIZES:
            for mode in MODES:
                name = f"{mode} B={block_size} {'+'.join(features)}"
                yield name, partial(attention, mode=mode, block_size=block_size, features=features)
    for group in GROUPS[-1:] if quick else (*GROUPS, 32, 71):
        for mode in MODES:
            yield f"{mode} group {group}", partial(attention, mode=mode, group=group, dtype=torch.bfloat16)
    yield "decode of long sequences", partial(attention, mode="decode", longest=700 if quick else 40000)
    for mode in MODES:
        yield f"batch invariance of {mode}", partial(invariance, mode=mode)
    for group in (1, 4, 8):
        for mode in MODES[:2]:
            yield f"shared prefix, {mode}, group {group}", partial(sharing, mode=mode, group=group)
    yield "merge_attention_states", merge
    for dtype in (*checks.DTYPES, *checks.QUANTISED):
        for head_size in (64,) if quick else (32, 64, 80, 128, 256):
            yield f"reshape_and_cache {dtype} D={head_size}", partial(write, dtype=dtype, head_size=head_size)
    for dtype in checks.DTYPES:
        for i in range(1 if quick else 5):
            yield f"sample {dtype} {i}", partial(sampling.check, dtype=dtype)
        for kind in (fused.Norm, fused.Gated):
            for i in range(1 if quick else 5):
                yield f"{kind.name} {dtype} {i}", partial(fused.check, kind=kind, dtype=dtype)
        for cache_dtype in (None, *checks.QUANTISED):
            fixed = {"dtype": dtype, "cache_dtype": cache_dtype}
            yield f"rope_and_cache {dtype} {cache_dtype}", partial(fused.check, kind=fused.Rope, **fixed)
    for dtype in checks.QUANTISED:
        for mode in MODES:
            fixed = {"dtype": torch.bfloat16, "cache_dtype": dtype}
            yield f"{mode} over {dtype}", partial(attention, mode=mode, **fixed)
    for shape in ((2, 2, 8, 32), (3, 2, 1, 16, 64), (1, 3)):
        yield f"copy_blocks {shape}", partial(copy, shape=shape)
        for out in (True, False):
            yield f"swap_blocks {'out' if out else 'in'} {shape}", partial(swap, shape=shape, out=out)
    if context.on_gpu:
        for mode in MODES:
            yield f"CUDA graph of {mode}", partial(graph, mode=mode)


def draw(
    seed: int,
    mode: str,
    *,
    dtype: torch.dtype = torch.float32,
    head_size: int = 64,
    group: int | None = None,
    block_size: int | None = None,
    features: tuple[str, ...] | None = None,
    longest: int = 700,
    cache_dtype: torch.dtype | None = None,
) -> cases.Problem:
    """Draw a problem, with random values for the arguments that are None."""
    rng = random.Random(seed)
    lengths = [0, 1, *(rng.randrange(1, longest) for _ in range(4))]
    max_query_len = {"decode": 1, "few": 8, "prefill": 90}[mode]
    queries = None
    if mode != "decode":
        queries = [rng.randrange(min(n, 1), min(n, max_query_len) + 1) for n in lengths]
    problem = cases.draw(
        seed,
        dtype=dtype,
        head_size=head_size,
        block_size=block_size or rng.choice(BLOCK_SIZES),
        num_kv_heads=rng.choice([1, 2, 3]),
        group=group or rng.choice(GROUPS),
        seq_lens=lengths,
        query_lens=queries,
        padding_rows=0 if queries is None else rng.choice([0, 3]),
        block_stride_factor=rng.choice([1, 3]),
        features=rng.choice(FEATURES) if features is None else features,
        cache_dtype=cache_dtype,
    )
    if mode == "few":  # the hint selects the decode kernel
        problem.options["max_query_len"] = max_query_len
    return problem


def attention(device: torch.device, seed: int, mode: str, **fixed) -> None:
    problem = draw(seed, mode, **fixed)
    out, lse = _call(problem.to(str(device)))
    cases.check(_filled(problem, out), problem, lse)


def _call(p: cases.Problem) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full_like(p.query, float("nan"))
    tables = (p.block_tables, p.seq_lens, p.query_start_loc)
    return cupaged.paged_attention(p.query, p.kv_cache, *tables, **p.options, out=out, return_lse=True)


def _filled(problem: cases.Problem, out: torch.Tensor) -> torch.Tensor:
    """Return ``out`` after checking that every row was written, padding included."""
    if bool(torch.isnan(out).any()):
        raise AssertionError("rows of out were not written, or are NaN")
    return out


def invariance(device: torch.device, seed: int, mode: str) -> None:
    """Check that the result of a sequence is bitwise independent of its batch."""
    p = draw(seed, mode, features=(), longest=3000).to(str(device))
    together, _ = _call(p)
    starts = list(range(len(p.seq_lens) + 1)) if p.query_start_loc is None else p.query_start_loc.tolist()
    for s in range(len(p.seq_lens)):
        rows = slice(starts[s], starts[s + 1])
        own = None
        if p.query_start_loc is not None:
            own = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32, device=device)
        alone = cupaged.paged_attention(
            p.query[rows], p.kv_cache, p.block_tables[s : s + 1], p.seq_lens[s : s + 1], own, **p.options
        )
        if not torch.equal(alone, together[rows]):
            raise AssertionError(f"sequence {s} has other bits alone than in the batch")


def sharing(device: torch.device, seed: int, mode: str, group: int) -> None:
    """Check sequences that share leading blocks, also for the same bits as without ``shared_prefix``."""
    rng = random.Random(seed)
    prefix, count = 1024, 40 if device.type == "cuda" else 4
    lengths = [prefix + rng.randrange(8, 600) for _ in range(count)]
    problem = cases.draw(
        seed,
        dtype=torch.bfloat16,
        head_size=64,
        block_size=rng.choice(BLOCK_SIZES),
        num_kv_heads=2,
        group=group,
        seq_lens=lengths,
        query_lens=None if mode == "decode" else [rng.randrange(1, 9) for _ in lengths],
        features=rng.choice([(), ("alibi", "sinks"), ("cap",)]),
    )
    unshared = rng.randrange(count)
    blocks = prefix // problem.kv_cache.shape[3]
    for s in range(1, count):
        if s != unshared:
            problem.block_tables[s, :blocks] = problem.block_tables[0, :blocks]
    problem.options["max_query_len"] = 8
    p = problem.to(str(device))
    alone, _ = _call(p)
    p.options["shared_prefix"] = True
    out, lse = _call(p)
    cases.check(_filled(problem, out), problem, lse)
    if not torch.equal(out, alone):
        raise AssertionError("sharing changed the result")


def merge(device: torch.device, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outs = torch.randn(3, 7, 4, 64, generator=generator)
    lses = 5 * torch.randn(3, 7, 4, generator=generator)
    lses[0, 2], lses[:, 3] = float("-inf"), float("-inf")
    outs[0, 2] = float("nan")
    exact, plain = torch.empty(7, 4, 64, dtype=torch.float64), torch.empty(7, 4, 64)
    reference.merge_attention_states(outs.double(), lses.double(), exact, lses[0].double())
    reference.merge_attention_states(outs, lses, plain, lses[0].clone())
    cases.close(cupaged.merge_attention_states(outs.to(device), lses.to(device))[0], plain, exact)


def write(device: torch.device, seed: int, dtype: torch.dtype, head_size: int) -> None:
    """Check that the cache is bitwise as the reference writes it."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    heads, block_size, tokens = rng.choice([1, 2, 5]), rng.choice(BLOCK_SIZES), rng.randrange(1, 200)
    cache = torch.empty(tokens, 2, heads, block_size, head_size, dtype=dtype)
    cache.view(torch.uint8).fill_(0xFF)
    slots = torch.tensor(rng.sample(range(tokens * block_size), tokens))
    slots[torch.rand(tokens, generator=generator) < 0.2] = -1
    model_dtype = dtype if dtype in checks.DTYPES else torch.bfloat16
    scales: list[torch.Tensor | None] = [None, None]
    if dtype not in checks.DTYPES:
        scales = [0.01 + torch.rand(heads, generator=generator) / 50 for _ in range(2)]
    padding = rng.choice([0, 1])  # with 1, rows are not aligned to 16 bytes
    pair = torch.randn(tokens, 2 * heads, head_size + padding, generator=generator).to(model_dtype)
    actual = cache.clone().to(device)
    moved = pair.to(device)
    cupaged.reshape_and_cache(
        moved[:, :heads, padding:],
        moved[:, heads:, padding:],
        actual,
        slots.to(device),
        *(scale if scale is None else scale.to(device) for scale in scales),
    )
    reference.reshape_and_cache(pair[:, :heads, padding:], pair[:, heads:, padding:], cache, slots, *scales)
    _same(actual, cache)


def _pairs(seed: int, num_src: int, num_dst: int, count: int) -> torch.Tensor:
    rng = random.Random(seed)
    return torch.tensor(list(zip(rng.sample(range(num_src), count), rng.sample(range(num_dst), count))))


def copy(device: torch.device, seed: int, shape: tuple[int, ...]) -> None:
    cache = torch.randn(40, *shape, generator=torch.Generator().manual_seed(seed))
    mapping = _pairs(seed, 20, 20, 12) + torch.tensor([0, 20])  # no source is a destination
    actual = cache.clone().to(device)
    cupaged.copy_blocks(actual, mapping.to(device))
    reference.copy_blocks(cache, mapping)
    _same(actual, cache)


def swap(device: torch.device, seed: int, shape: tuple[int, ...], out: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    near = torch.randn(30, *shape, generator=generator).to(device)
    far = torch.randn(20, *shape, generator=generator)
    if device.type == "cuda":
        far = far.pin_memory()
    src, dst = (near, far) if out else (far, near)
    mapping = _pairs(seed, src.shape[0], dst.shape[0], 15)
    expected = dst.cpu().clone()
    expected[mapping[:, 1]] = src.cpu()[mapping[:, 0]]
    cupaged.swap_blocks(src, dst, mapping)
    if device.type == "cuda":
        torch.cuda.synchronize()
    _same(dst, expected)


def graph(device: torch.device, seed: int, mode: str) -> None:
    """Check a captured call that is replayed with other queries and other lengths."""
    rng = random.Random(seed)
    problem = draw(seed, mode, dtype=torch.bfloat16, features=(), longest=3000)
    problem.options["shared_prefix"] = True  # its detection is captured as well
    p = problem.to(str(device))
    _call(p)  # compiles and loads
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out, lse = _call(p)
    starts = problem.query_start_loc
    rows = torch.ones_like(problem.seq_lens) if starts is None else starts.diff()
    lengths = problem.seq_lens.tolist()
    for _ in range(3):
        problem.seq_lens = torch.tensor(
            [rng.randint(int(r), int(n)) if n else 0 for r, n in zip(rows, lengths)],
            dtype=torch.int32,
        )
        problem.query[: int(rows.sum())] *= -0.75
        p.seq_lens.copy_(problem.seq_lens)
        p.query.copy_(problem.query)
        out.fill_(float("nan"))
        captured.replay()
        cases.check(_filled(problem, out), problem, lse)


def _same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that two tensors are bitwise equal, NaN included."""
    raw = [t.cpu().contiguous().view(torch.uint8) for t in (actual, expected)]
    if not torch.equal(*raw):
        raise AssertionError(f"{int((raw[0] != raw[1]).sum())} bytes differ")
