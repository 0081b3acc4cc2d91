"""Load kernels as `cupy.RawKernel`s, for the launcher and for users who launch them on their own arrays."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import compile as kernel_compiler
from . import specs as kernel_specs
from .kernel_choice import CACHE_DTYPE_NAMES, DTYPE_NAMES
from .specs import KernelSpec

KERNELS: dict[str, Callable[..., KernelSpec]] = {
    "act_and_mul": kernel_specs.act_and_mul,
    "concat_and_cache_mla": kernel_specs.concat_and_cache_mla,
    "copy_blocks": kernel_specs.copy_blocks,
    "find_shared_splits": kernel_specs.find_shared_splits,
    "merge_splits": kernel_specs.merge_splits,
    "merge_states": kernel_specs.merge_states,
    "mla_attention": kernel_specs.mla_attention,
    "mla_attention_mma": kernel_specs.mla_attention_mma,
    "paged_decode": kernel_specs.paged_decode,
    "paged_decode_mma": kernel_specs.paged_decode_mma,
    "paged_prefill": kernel_specs.paged_prefill,
    "paged_prefill_mma": kernel_specs.paged_prefill_mma,
    "paged_prefill_wgmma": kernel_specs.paged_prefill_wgmma,
    "plan_prefill": kernel_specs.plan_prefill,
    "reshape_and_cache": kernel_specs.reshape_and_cache,
    "rms_norm": kernel_specs.rms_norm,
    "rope_and_cache": kernel_specs.rope_and_cache,
    "sample": kernel_specs.sample,
}


def raw_kernel(name: str, *, arch: str | None = None, **variant: Any) -> Any:
    """Compile a kernel, or find it compiled, and load it on CuPy's current device.

    A kernel takes one argument, a struct that `cupaged.backends.cuda.arguments` has by the kernel's name
    (`OF_KERNEL`). `docs/kernels.md` has an example.

    Args:
        name: the kernel's, as "paged_decode_mma": a file in `cuda/`, whose head says what it does.
        arch: to compile for, as "80" or "90a"; by default the device's own.
        variant: what else the kernel is compiled for, as its function in `specs.py` takes it: ``dtype`` of
            queries and outputs, ``cache_dtype`` (by default the same), ``head_size``, ``wide``,
            ``head_tile``, ``unit_bytes``. Dtypes are torch's or their names here, as "bf16".

    Returns:
        A `cupy.RawKernel`. Its ``max_threads_per_block`` and ``max_dynamic_shared_size_bytes`` are what it is
        to be launched with.

    Raises:
        ValueError: there is no such kernel, or it takes other values.
        ImportError: CuPy is missing; the message names the package.
    """
    cupy = kernel_compiler.import_cupy()
    if arch is None:
        major, minor = divmod(int(cupy.cuda.Device().compute_capability), 10)
        arch = kernel_compiler.arch_for_capability(major, minor, kernel_compiler.nvrtc_archs())
    return load(_spec(name, arch, variant), arch)


def load(spec: KernelSpec, arch: str) -> Any:
    """Return the kernel as a `cupy.RawKernel` that is loaded on CuPy's current device."""
    with _file_of(kernel_compiler.cubin(spec, arch)) as path:
        kernel = kernel_compiler.import_cupy().RawModule(path=str(path)).get_function(spec.entry)
        kernel.max_dynamic_shared_size_bytes = spec.dynamic_shared_memory  # loads it, while there is a file
    return kernel


@contextmanager
def _file_of(compiled: kernel_compiler.Compiled) -> Iterator[Path]:
    """Return the path of a cubin: in the cache, or in a temporary file where that cannot be written."""
    if compiled.path is not None:
        yield compiled.path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.content)
        yield path


def _spec(name: str, arch: str, variant: dict[str, Any]) -> KernelSpec:
    if name not in KERNELS:
        raise ValueError(f"there is no kernel {name!r}, only {', '.join(KERNELS)}")
    parameters = inspect.signature(KERNELS[name]).parameters
    values = {key: CACHE_DTYPE_NAMES.get(value, value) for key, value in variant.items()}
    if "cache_dtype" in parameters and "dtype" in values:
        values.setdefault("cache_dtype", values["dtype"])
    if "arch" in parameters:
        values["arch"] = arch
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    missing, unknown = required - values.keys(), values.keys() - parameters.keys()
    if missing or unknown:
        taken = [key for key in parameters if key != "arch"]
        raise ValueError(
            f"{name} is compiled for {', '.join(taken) or 'nothing'}; "
            f"missing: {sorted(missing)}, unknown: {sorted(unknown)}"
        )
    for key, names in (("dtype", DTYPE_NAMES), ("cache_dtype", CACHE_DTYPE_NAMES)):
        if key in values and values[key] not in names.values():
            raise ValueError(f"{key} must be one of {', '.join(names.values())}, got {values[key]!r}")
    return KERNELS[name](**values)
