"""Kernels compile for every architecture: no spills, shared memory enough, the machine code that is meant.

Every run of the tests compiles some, by the rule in `thinned`, `make test-all` those that are compiled ahead
of time (`specs.variants`). To compile all that a call can launch takes an hour of one core: `python
benchmarks/kernel_resources.py` does, and what it found is in `benchmarks/results/kernel-resources.json`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from itertools import product

import pytest

from benchmarks import kernel_resources
from cupaged.backends.cuda import compile as kc
from cupaged.backends.cuda import kernel_choice, precompile
from cupaged.backends.cuda import specs as kernel_specs
from cupaged.backends.cuda.occupancy import occupancy
from cupaged.backends.cuda.specs import KernelSpec

from .sass import machine_code_complaints
from .thinned import E4M3, KINDS, all_kernels, has_fp8, kind_of, thinned

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

# A block has the registers that it is launched with; its consumers would wait for ever for others.
WGMMA_REGISTERS = 65536 // 384 // 8 * 8


def unfit(rows: list[precompile.Row]) -> list[str]:
    """Return what is wrong with kernels, also beyond what `python -m cupaged.compile` complains of."""
    found = []
    for row in rows:
        complaints = row.complaints()
        if row.spec.entry == "paged_prefill_wgmma" and row.usage.registers != WGMMA_REGISTERS:
            complaints.append(f"has {row.usage.registers} registers")
        # Prefill launches a block for all that a multiprocessor has room for; of rare kernels more may fit.
        planned = planned_blocks(row.arch).get(row.spec)
        if planned is not None and occupancy(row.spec, row.usage, row.arch).blocks > planned:
            complaints.append(f"more than {planned} blocks of it fit")
        found += [f"{row.spec} sm_{row.arch} {complaint}" for complaint in complaints]
    return found


def outdated(rows: list[precompile.Row]) -> list[str]:
    """Return the kernels of which the table in the results says something else; another NVRTC may."""
    results = kernel_resources.read()
    if results["nvrtc"] != ".".join(map(str, kc.nvrtc_version())):
        return []
    written = kernel_resources.by_name(results["kernels"])
    compiled = kernel_resources.by_name(kernel_resources.table(rows))
    return [f"{name}: {values}" for name, values in compiled.items() if written.get(name) != values]


@cache
def planned_blocks(arch: str) -> dict[KernelSpec, int]:
    """Return how many blocks of prefill are launched for a multiprocessor, by kernels of usual models."""
    kernels = [
        kernel_choice.prefill_kernel(dtype, cache_dtype, head_size, 1, arch)
        for dtype, head_size in product(kernel_specs.DTYPES, kernel_specs.HEAD_SIZES)
        for cache_dtype in (dtype, *(kernel_specs.CACHE_DTYPES if dtype == "bf16" else ()))
    ]
    return {kernel.spec: kernel.blocks_per_sm for kernel in kernels}


@pytest.mark.parametrize("kind", KINDS)
def test_thinned_kernels_are_fit_to_ship(kind):
    """Compile the kernels of the rule in `thinned`, and read their row of the table and the code of some.

    The disassembler takes as long as the compiler: it reads the first, and the first with e4m3 of those that
    have the instruction to convert it and of those that have not.
    """
    kernels = [kernel for kernel in thinned() if kind_of(kernel[0]) == kind]
    assert kernels
    rows = list(precompile.compile_all(kernels, kc.cache_dir(), jobs=1))
    assert unfit(rows) == []
    assert outdated(rows) == [], kernel_resources.REMEDY
    firsts = {
        (E4M3 in spec.defines and has_fp8(arch), E4M3 in spec.defines): (spec, arch)
        for spec, arch in reversed(kernels)
    }
    assert [text for kernel in firsts.values() for text in machine_code_complaints(*kernel)] == []


@pytest.mark.matrix
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", kernel_specs.ARCHS)
def test_kernels_of_usual_models_are_fit_to_ship(arch, capsys):
    """All that are compiled ahead of time, their machine code, and what the table says of them.

    The rarer ones, five in six, would take the tests an hour: the table's test reads what was found of them.
    """
    ahead = kernel_specs.variants(arch)
    work = [(spec, arch) for spec in ahead]
    rows = list(precompile.compile_all(work, kc.cache_dir()))
    with capsys.disabled():
        _print_summary(rows)
    assert [(row.spec, row.arch) for row in rows] == work
    assert unfit(rows) == []
    assert outdated(rows) == [], kernel_resources.REMEDY
    assert [text for spec in ahead for text in machine_code_complaints(spec, arch)] == []


def test_the_table_in_the_results_is_of_every_kernel_and_no_other():
    """Compare the table with what a call can launch (`test_reachable`): no spills, and a block can run.

    The rarest may be in its list of what was not compiled; nothing that is compiled ahead of time is there.
    """
    results = kernel_resources.read()
    families = results["kernels"]
    missing = kernel_resources.names(results["not_compiled"])
    expected = Counter(kernel_resources.name_of(*kernel) for kernel in all_kernels())
    written = Counter([*kernel_resources.names(families), *missing])
    assert results["coverage"] == {"compiled": written.total() - len(missing), "of": expected.total()}
    assert set(expected.values()) == {1}
    assert list((expected - written) + (written - expected)) == [], kernel_resources.REMEDY
    ahead = {
        kernel_resources.name_of(spec, arch)
        for arch in kernel_specs.ARCHS
        for spec in kernel_specs.variants(arch)
    }
    assert ahead.isdisjoint(missing)
    for name, (registers, spilled_bytes, _, blocks) in kernel_resources.by_name(families).items():
        assert (spilled_bytes, min(registers, blocks) > 0) == (0, True), name
        assert name[0] != "paged_prefill_wgmma" or registers == WGMMA_REGISTERS, name


def test_the_table_says_of_each_kernel_what_the_compiler_said(tmp_path):
    """Of kernels that differ in every number, through the file."""
    specs = [kernel_specs.paged_decode("fp32", "fp32", head_size, 4) for head_size in (64, 8)]
    specs += [kernel_specs.plan_prefill(), kernel_specs.paged_prefill_mma("bf16", "int8", 128, "80")]
    rows = [
        precompile.Row(spec, "80", kc.ResourceUsage(100 + i, 0, 4 * i, i, 1000 * i), 1.0)
        for i, spec in enumerate(specs)
    ]
    path = tmp_path / "table.json"
    missing = [kernel_specs.paged_decode("fp32", "fp32", head_size, 8) for head_size in (8, 16)]
    kernel_resources.write(rows, [(spec, "80") for spec in (*specs, *missing)], path)
    results = kernel_resources.read(path)
    decode, plan, prefill = results["kernels"]
    names = kernel_resources.names(results["not_compiled"])
    assert names == [kernel_resources.name_of(spec, "80") for spec in missing]
    assert results["coverage"] == {"compiled": 4, "of": 6}
    assert decode == {
        "kernel": "paged_decode",
        "arch": "80",
        "macros": {"dtype": "fp32", "head_tile": "4"},
        "head_size": [64, 8],
        "registers": [100, 101],
        "spilled_bytes": [0, 5],
        "shared_memory": [0, 1000],
        "blocks_per_multiprocessor": [4, 4],
    }
    assert (plan["macros"], plan["head_size"], plan["shared_memory"]) == ({}, [None], [2000])
    assert prefill["macros"] == {"dtype": "bf16", "cache_dtype": "int8", "stages": "3", "tile_keys": "32"}
    assert prefill["shared_memory"] == [3000 + specs[3].dynamic_shared_memory]
    found = kernel_resources.by_name([decode, plan, prefill])
    assert list(found) == [kernel_resources.name_of(spec, "80") for spec in specs]
    assert list(found.values())[:2] == [(100, 0, 0, 4), (101, 5, 1000, 4)]


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
                assert f"rope_and_cache[dtype={dtype}, cache_dtype={cache_dtype}]" in names
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
