"""Every kernel compiles for every architecture, without spills and within its shared memory."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import product

import pytest

from cupaged import compile as kc
from cupaged import precompile
from cupaged import specs as kernel_specs
from cupaged.backends import plans
from cupaged.occupancy import occupancy
from cupaged.specs import KernelSpec

# 128 values alive at once in threads that can have 64 registers.
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024) planted(volatile float* data) {
    float x[128];
    #pragma unroll
    for (int i = 0; i < 128; ++i) x[i] = data[threadIdx.x + i * 1024];
    #pragma unroll
    for (int i = 0; i < 128; ++i) data[threadIdx.x + i * 1024] = x[i];
}
"""
PRODUCTS = """
#define CUPAGED_DTYPE CUPAGED_BF16
#include "%s/ptx_sm90.cuh"
using namespace cupaged;
extern "C" __global__ void __launch_bounds__(128) planted(float* out) {
    __shared__ __align__(1024) uint4 tile[1024];
    float d[8][4] = {};
    const unsigned long long matrix = wgmma_descriptor(tile, 1024, 0);
    wgmma_fence();
    Wgmma<__nv_bfloat16, 64>::shared(d, matrix, matrix, true);
    %s
    wgmma_commit();
    wgmma_wait<0>(d);
    for (int n = 0; n < 8; ++n)
        for (int i = 0; i < 4; ++i) out[(4 * n + i) * 128 + threadIdx.x] = d[n][i];
}
"""
TOO_MUCH_SHARED = """
extern "C" __global__ void planted(int* data) {
    __shared__ int table[%d];
    table[threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = table[data[0]];
}
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kernel_compiles_fit_to_ship_for_every_arch(capsys):
    work = [(spec, arch) for arch in kernel_specs.ARCHS for spec in kernel_specs.variants(arch)]
    rows = list(precompile.compile_all(work, kc.cache_dir()))
    print(precompile.HEADER)
    for row in rows:
        print(precompile.format_row(row))
    with capsys.disabled():
        _print_summary(rows)
    assert [(row.spec, row.arch) for row in rows] == work
    assert not [f"{row.spec} sm_{row.arch} {c}" for row in rows for c in row.complaints()]
    # A block has the registers that it is launched with; its consumers would wait for ever for others.
    found = {row.usage.registers for row in rows if row.spec.entry == "paged_prefill_wgmma"}
    assert found == {65536 // 384 // 8 * 8}
    # Prefill launches a block for all that a multiprocessor has room for.
    fit = {(row.spec, row.arch): occupancy(row.spec, row.usage, row.arch).blocks for row in rows}
    for dtype, head_size, arch in product(kernel_specs.DTYPES, kernel_specs.HEAD_SIZES, kernel_specs.ARCHS):
        for cache_dtype in (dtype, *(kernel_specs.CACHE_DTYPES if dtype == "bf16" else ())):
            kernel = plans.prefill_kernel(dtype, cache_dtype, head_size, 1, arch)
            assert fit.get((kernel.spec, arch), 0) <= kernel.blocks_per_sm, (kernel, arch)


def test_what_is_not_compiled_ahead_of_time_compiles(seed):
    """Some of the sizes that models have, in float32 or on Turing in bfloat16, or over a quantised cache."""
    rng = random.Random(seed)
    work = []
    for arch in kernel_specs.ARCHS:
        head_size = rng.choice(sorted({*kernel_specs.HEAD_SIZES} - {*kernel_specs.COMMON_HEAD_SIZES}))
        dtype = "bf16" if arch == "75" else "fp32"
        cache_dtype = rng.choice([dtype, *(kernel_specs.CACHE_DTYPES if head_size % 16 == 0 else ())])
        tile = rng.choice(kernel_specs.head_tiles(cache_dtype))
        work.append((kernel_specs.paged_decode(dtype, cache_dtype, head_size, tile), arch))
        work.append((kernel_specs.paged_prefill(dtype, cache_dtype, head_size), arch))
    rows = list(precompile.compile_all(work, kc.cache_dir()))
    assert not [f"{row.spec} sm_{row.arch} {c}" for row in rows for c in row.complaints()]


def test_any_head_size_compiles(seed):
    """A multiple of 8 that is not compiled ahead of time, for each kernel that is made for its size."""
    rng = random.Random(seed)
    head_size = rng.choice(sorted({*range(8, 257, 8)} - {*kernel_specs.HEAD_SIZES}))
    dtype = rng.choice(["fp16", "bf16"])
    work = [
        (kernel_specs.paged_prefill_wgmma(dtype, head_size), "90a"),
        (kernel_specs.paged_prefill_mma(dtype, dtype, head_size, "86"), "86"),
        (kernel_specs.paged_decode_mma(dtype, dtype, head_size, "90a", wide=rng.random() < 0.5), "90a"),
        (kernel_specs.paged_prefill("fp32", "fp32", head_size), "80"),
        (kernel_specs.paged_decode("fp32", "fp32", head_size, 2), "80"),
    ]
    rows = list(precompile.compile_all(work, kc.cache_dir()))
    assert not [f"{row.spec} sm_{row.arch} {c}" for row in rows for c in row.complaints()]


def _print_summary(rows: list[precompile.Row]) -> None:
    by_arch = defaultdict(list)
    for row in rows:
        by_arch[row.arch].append(row)
    print(f"\n{'arch':>5} {'kernels':>8} {'most regs':>10} {'spills':>7} {'most smem':>10} {'compile s':>10}")
    for arch, group in by_arch.items():
        print(
            f"{arch:>5} {len(group):>8} {max(r.usage.registers for r in group):>10} "
            f"{sum(r.usage.spill_stores + r.usage.spill_loads for r in group):>7} "
            f"{max(r.usage.shared_memory for r in group):>10} "
            f"{sum(r.compile_ms for r in group) / 1e3:>10.1f}"
        )


def test_the_variants_are_what_the_readme_promises():
    for arch in kernel_specs.ARCHS:
        names = {str(spec) for spec in kernel_specs.variants(arch)}
        for dtype in ("fp32", "fp16", "bf16"):
            for head_size in (32, 64, 80, 96, 112, 120, 128, 192, 256):
                of = f"dtype={dtype}, head_size={head_size}"
                if dtype == "fp32" or arch == "75":
                    ahead = head_size in (64, 128, 256) or dtype != ("bf16" if arch == "75" else "fp32")
                    assert (f"paged_prefill[{of}]" in names) == ahead
                    for tile in kernel_specs.HEAD_TILES:
                        assert (f"paged_decode[{of}, head_tile={tile}]" in names) == ahead
                else:
                    assert {f"paged_decode_mma[{of}, stages={n}]" for n in (2, 3)} & names
                    wide = {
                        f"paged_decode_mma[{of}, stages={n}, row_groups={g}]" for n in (2, 3) for g in (2, 4)
                    }
                    assert bool(wide & names) == (head_size in (64, 128, 256))
                    prefill = "paged_prefill_wgmma" if arch == "90a" else "paged_prefill_mma"
                    assert any(name.startswith(f"{prefill}[{of}, ") for name in names)
            for cache_dtype in ("fp8_e4m3", "fp8_e5m2", "int8"):
                assert f"reshape_and_cache[dtype={dtype}, cache_dtype={cache_dtype}]" in names
                for head_size in (64, 128, 256) if dtype == "bf16" else ():
                    sizes = f"dtype={dtype}, cache_dtype={cache_dtype}, head_size={head_size}"
                    for kernel in ("paged_prefill", "paged_decode"):
                        full = kernel if arch == "75" else f"{kernel}_mma"
                        assert any(name.startswith(f"{full}[{sizes}") for name in names)
    sources = {spec.source for arch in kernel_specs.ARCHS for spec in kernel_specs.variants(arch)}
    assert sources == {p.name for p in kc.cuda_dir().glob("*.cu")}


def _planted(tmp_path, source: str) -> precompile.Row:
    (tmp_path / "planted.cu").write_text(source)
    spec = KernelSpec("planted.cu", "planted")
    _, usage = kc.compile_cubin(spec, "90a", sources=tmp_path)
    return precompile.Row(spec, "90a", usage["planted"], 0.0)


def test_a_kernel_that_spills_is_unfit(tmp_path):
    assert "spills" in " ".join(_planted(tmp_path, SPILLS).complaints())


@pytest.mark.parametrize("waits", [True, False])
def test_a_kernel_whose_products_wait_for_each_other_is_unfit(tmp_path, waits):
    """Here because accumulators are touched while they are under way."""
    source = PRODUCTS % (kc.cuda_dir(), "" if waits else "d[0][0] += 1.0f;")
    assert ("warpgroup.wait is injected" in " ".join(_planted(tmp_path, source).complaints())) == (not waits)


def test_a_kernel_over_its_shared_memory_is_unfit(tmp_path):
    assert _planted(tmp_path, TOO_MUCH_SHARED % (48 * 256)).complaints() == []
    assert "shared memory" in " ".join(_planted(tmp_path, TOO_MUCH_SHARED % (48 * 256 + 1)).complaints())


def test_a_kernel_that_does_not_compile_shows_the_compilers_message(tmp_path):
    with pytest.raises(RuntimeError, match="no_such_name"):
        _planted(tmp_path, 'extern "C" __global__ void planted() { no_such_name(); }')
