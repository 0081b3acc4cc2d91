"""The kernels that every run of the tests compiles, a fiftieth of those that can be reached.

The rule, by which nothing is drawn. A kind is an entry point, or paged_decode_mma with wide tiles. A kernel
has values: its architecture, its macros, and with an e4m3 cache whether the architecture has the instruction
that converts it. Of each kind take, one after the other, the kernel with the most values that no kernel taken
of this kind has, until there is no such value; of several with as many, one without a quantised cache, which
compiles in half the time, of those the one whose values were taken least often, and of those the first in the
order of `reachable`. Only the head sizes that models have count as values here. Each of the others is then
taken for one kind, the kinds taking turns.

So there is each kind for every architecture, head size of a model, dtype, cache dtype, head tile and number
of stages that it has, and every other head size for some kind. All kernels are compiled by `python
benchmarks/kernel_resources.py`.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import cycle

from cupaged.backends.cuda import specs as kernel_specs
from cupaged.backends.cuda.reachable import reachable
from cupaged.backends.cuda.specs import KernelSpec

Kernel = tuple[KernelSpec, str]  # and its architecture
Value = tuple[str, str]  # of a macro, or the architecture
KINDS = (
    "act_and_mul",
    "concat_and_cache_mla",
    "copy_blocks",
    "find_shared_splits",
    "merge_splits",
    "merge_states",
    "mla_attention",
    "mla_attention_mma",
    "paged_decode",
    "paged_decode_mma",
    "paged_decode_mma wide",
    "paged_prefill",
    "paged_prefill_mma",
    "paged_prefill_wgmma",
    "plan_prefill",
    "reshape_and_cache",
    "rms_norm",
    "rope_and_cache",
    "sample",
)
E4M3 = ("CUPAGED_CACHE_DTYPE", "CUPAGED_FP8_E4M3")
OTHER_SIZES = frozenset(map(str, range(8, 257, 8))) - frozenset(map(str, kernel_specs.HEAD_SIZES))


@cache
def all_kernels() -> tuple[Kernel, ...]:
    """Return what any call launches on any architecture."""
    return tuple((spec, arch) for arch in kernel_specs.ARCHS for spec in reachable(arch))


def has_fp8(arch: str) -> bool:
    """Return whether the architecture has instructions that convert 8-bit floats."""
    return int(arch.rstrip("a")) >= 89


def kind_of(spec: KernelSpec) -> str:
    """Return what the kernels of a kind have in common: the code, but for sizes and types."""
    return f"{spec.entry} wide" if "CUPAGED_ROW_GROUPS" in dict(spec.defines) else spec.entry


def head_size(spec: KernelSpec) -> str:
    """Return the head size that a kernel is compiled for; empty where it takes any."""
    return dict(spec.defines).get("CUPAGED_HEAD_SIZE", "")


def values_of(spec: KernelSpec, arch: str) -> frozenset[Value]:
    """Return the architecture, the macros, that a cache is not quantised, and how e4m3 is converted."""
    values = {"ARCH": arch, "CUPAGED_CACHE_DTYPE": ""} | dict(spec.defines)
    if E4M3 in spec.defines:
        values["E4M3"] = "instruction" if has_fp8(arch) else "no instruction"
    return frozenset(values.items())


def counted_values(spec: KernelSpec, arch: str) -> frozenset[Value]:
    """Return the values that each kind is to have."""
    return frozenset(value for value in values_of(spec, arch) if value[1] not in OTHER_SIZES)


@cache
def thinned() -> tuple[Kernel, ...]:
    """Return the kernels that the rule takes."""
    kinds: dict[str, list[Kernel]] = {}
    for kernel in all_kernels():
        kinds.setdefault(kind_of(kernel[0]), []).append(kernel)
    taken: dict[Kernel, None] = {}
    often = {kind: Counter[Value]() for kind in kinds}

    def take(kind: str, kernels: list[Kernel], missing: frozenset[Value] = frozenset()) -> frozenset[Value]:
        def preference(kernel: Kernel) -> tuple[int, bool, int]:
            values = values_of(*kernel)
            plain = ("CUPAGED_CACHE_DTYPE", "") in values
            return len(values & missing), plain, -sum(often[kind][value] for value in values)

        best = max(kernels, key=preference)
        taken[best] = None
        often[kind].update(values_of(*best))
        return missing - values_of(*best)

    for kind, kernels in kinds.items():
        missing = frozenset().union(*(counted_values(*kernel) for kernel in kernels))
        while missing:
            missing = take(kind, kernels, missing)
    sized = cycle(kind for kind, kernels in kinds.items() if head_size(kernels[0][0]))
    for size in sorted(OTHER_SIZES, key=int):
        kind = next(sized)
        take(kind, [kernel for kernel in kinds[kind] if head_size(kernel[0]) == size])
    return tuple(taken)
