"""List the kernels that the public functions can launch: those of `specs.variants` and the rarer ones."""

from __future__ import annotations

from functools import cache

from ...checks import MAX_HEAD_SIZE
from . import kernel_choice
from . import specs as kernel_specs
from .specs import KernelSpec


@cache
def reachable(arch: str) -> tuple[KernelSpec, ...]:
    """Return every kernel that some call launches on an architecture.

    Attention's are those that `kernel_choice` chooses for any dtypes, head size and group of query heads, so
    what a launch can choose is in this list.
    """
    found: dict[KernelSpec, None] = dict.fromkeys(
        [*(kernel_specs.copy_blocks(unit_bytes) for unit_bytes in (16, 1)), kernel_specs.plan_prefill()]
    )
    for dtype in kernel_specs.DTYPES:
        found |= dict.fromkeys([kernel_specs.merge_splits(dtype), kernel_specs.merge_states(dtype)])
        found |= dict.fromkeys([kernel_specs.rms_norm(dtype), kernel_specs.act_and_mul(dtype)])
        found |= dict.fromkeys([kernel_specs.sample(dtype), kernel_specs.concat_and_cache_mla(dtype)])
        for sizes in kernel_specs.MLA_SIZES:
            for num_heads in kernel_specs.MLA_TILE_ROWS:
                for prefills in (False, True):
                    mla = kernel_choice.mla_kernel(dtype, *sizes, num_heads, arch, prefills)
                    found[mla.spec] = None
        for cache_dtype in (dtype, *kernel_specs.CACHE_DTYPES):
            found[kernel_specs.reshape_and_cache(dtype, cache_dtype)] = None
            found[kernel_specs.rope_and_cache(dtype, cache_dtype)] = None
            for head_size in _head_sizes(cache_dtype):
                # A group of more query heads than the largest tile has takes several of those.
                for group in range(1, max(kernel_specs.HEAD_TILES) + 1):
                    decode = kernel_choice.decode_kernel(dtype, cache_dtype, head_size, group, arch)
                    prefill = kernel_choice.prefill_kernel(dtype, cache_dtype, head_size, group, arch)
                    found |= {decode.spec: None, prefill.spec: None}
                    if decode.wide_spec is not None:
                        found |= {decode.wide_spec: None, kernel_specs.find_shared_splits(): None}
    return tuple(found)


def _head_sizes(cache_dtype: str) -> range:
    """Return the head sizes that `checks.layer_cache` accepts."""
    step = 16 if cache_dtype in kernel_specs.CACHE_DTYPES else 8
    return range(step, MAX_HEAD_SIZE + 1, step)
