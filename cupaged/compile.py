"""Compile the kernels in `cuda/` with NVRTC, and keep the results on disk.

NVRTC makes machine code (a cubin) with no nvcc and no GPU, through CuPy's binding. A result is filed under
a digest of everything that went into it: the source with all its headers, the options, the version of
NVRTC and the architecture.

    python -m cupaged.compile --arch 90a --out DIR

compiles every kernel ahead of time (`precompile.py`); with ``CUPAGED_CACHE_DIR=DIR`` none is compiled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

DTYPES = ("fp32", "fp16", "bf16")
CACHE_DTYPES = ("fp8_e4m3", "fp8_e5m2", "int8")  # of quantised caches, under queries of any of the above
HEAD_SIZES = (32, 64, 80, 96, 112, 120, 128, 192, 256)
# The most common of them: what quantised caches and wide tiles of decode are compiled for ahead of time.
COMMON_HEAD_SIZES = (64, 128, 256)
HEAD_TILES = (1, 2, 4, 8)  # query heads that one block of paged_decode handles
ARCHS = ("75", "80", "86", "89", "90a", "100", "120")

# -ftz: a logit below 1e-38 counts as zero, and exp2 is one instruction.
OPTIONS = ("--std=c++17", "-ftz=true", "--ptxas-options=-v")

# Part of every digest: raise it when what is kept for the same inputs changes.
ENTRY_FORMAT = 3

# Bytes of shared memory that one block can have. Above 48 KiB it has to be dynamic.
STATIC_SHARED_MEMORY = 48 * 1024
SHARED_MEMORY = {
    "70": 96 * 1024,
    "75": 64 * 1024,
    "80": 163 * 1024,
    "86": 99 * 1024,
    "87": 163 * 1024,
    "89": 99 * 1024,
    "90": 227 * 1024,
    "100": 227 * 1024,
    "103": 227 * 1024,
    "110": 227 * 1024,
    "120": 99 * 1024,
    "121": 99 * 1024,
}


# Static shared memory of paged_decode_mma: block ids, the planner's sums, the warps' states.
DECODE_MMA_STATIC = 4 * 1024
PREFILL_TILE = 32  # bytes of a PrefillTile (prefill_tiles.cuh)
# paged_prefill_wgmma: rows of the query, and its shared memory besides tiles: items, barriers.
PREFILL_WGMMA_ROWS = 128
PREFILL_WGMMA_STATIC = 256


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to compile: a source in `cuda/`, its ``extern "C"`` entry point and its macros.

    Also what it is launched with: the threads of a block, and its bytes of dynamic shared memory.
    """

    source: str
    entry: str
    defines: tuple[tuple[str, str], ...] = ()
    threads: int = 128
    dynamic_shared_memory: int = 0

    def __str__(self) -> str:
        values = (f"{name.removeprefix('CUPAGED_').lower()}={value}" for name, value in self.defines)
        return f"{self.entry}[{', '.join(values)}]".lower().replace("cupaged_", "")


@dataclass(frozen=True)
class ResourceUsage:
    """What ptxas reports of an entry point. Sizes in bytes, a thread's or a block's."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared_memory: int  # static
    warnings: tuple[str, ...] = ()  # of ptxas, about the speed


@dataclass(frozen=True)
class Compiled:
    """A cubin on disk."""

    path: Path
    usage: dict[str, ResourceUsage]  # by entry point
    compile_ms: float
    hit: bool  # found in the cache


def spec_reshape_and_cache(dtype: str, cache_dtype: str) -> KernelSpec:
    return KernelSpec("reshape_and_cache.cu", "reshape_and_cache", _defines(dtype, cache_dtype))


def spec_copy_blocks(unit_bytes: int) -> KernelSpec:
    defines = (("CUPAGED_UNIT_BYTES", str(unit_bytes)),)
    return KernelSpec("copy_blocks.cu", "copy_blocks", defines, threads=256)


def spec_paged_decode(dtype: str, cache_dtype: str, head_size: int, head_tile: int) -> KernelSpec:
    defines = _defines(dtype, cache_dtype, HEAD_SIZE=head_size, HEAD_TILE=head_tile)
    return KernelSpec("paged_decode.cu", "paged_decode", defines)


def has_mma(arch: str) -> bool:
    """Whether the architecture has mma.sync for fp16 and bf16, and cp.async."""
    return int(arch.rstrip("af")) >= 80


def decode_mma_rows(head_size: int, arch: str, wide: bool) -> int:
    """Query rows of a tile of paged_decode_mma: 16, or with `wide` as many as it has for shared pieces."""
    # Rows of 512 bytes leave a block of 99 KiB no room for more.
    return (32 if head_size > 240 and _shared_memory(arch) < 128 * 1024 else 64) if wide else 16


def spec_paged_decode_mma(
    dtype: str, cache_dtype: str, head_size: int, arch: str, wide: bool = False
) -> KernelSpec:
    """With three stages of keys and values where they fit, else two."""
    rows = decode_mma_rows(head_size, arch, wide)
    phases, group_rows = (4, 32 if wide else 16) if head_size <= 128 else (2, 16)
    query_row, cache_row = _mma_rows(cache_dtype, head_size)
    for stages in (3, 2):
        shared_bytes = rows * query_row + phases * stages * 2 * 16 * cache_row
        if shared_bytes + DECODE_MMA_STATIC <= _shared_memory(arch):
            break
    shared_bytes = max(shared_bytes, rows * query_row + 4 * phases * group_rows * head_size)
    row_groups = rows // group_rows
    sizes = {"HEAD_SIZE": head_size, "STAGES": stages} | ({"ROW_GROUPS": row_groups} if wide else {})
    return KernelSpec(
        "paged_decode_mma.cu",
        "paged_decode_mma",
        _defines(dtype, cache_dtype, **sizes),
        32 * phases * row_groups,
        shared_bytes,
    )


def _shared_memory(arch: str) -> int:
    return SHARED_MEMORY[arch.rstrip("af")]


def _mma_rows(cache_dtype: str, head_size: int) -> tuple[int, int]:
    """Bytes of a row of the query and of the cache in the shared memory of mma_attention.cuh."""
    chunks = 2 * -(-head_size // (32 if cache_dtype in CACHE_DTYPES else 16))  # of 16 bytes
    elements = chunks * (16 if cache_dtype in CACHE_DTYPES else 8)
    return 16 * (elements // 8 + 1), 16 * (chunks + 1)


def spec_find_shared_pieces() -> KernelSpec:
    return KernelSpec("find_shared_pieces.cu", "find_shared_pieces", ())


def spec_plan_prefill() -> KernelSpec:
    return KernelSpec("plan_prefill.cu", "plan_prefill", threads=256)


def spec_paged_prefill(dtype: str, cache_dtype: str, head_size: int) -> KernelSpec:
    defines = _defines(dtype, cache_dtype, HEAD_SIZE=head_size)
    return KernelSpec("paged_prefill.cu", "paged_prefill", defines)


def prefill_mma_rows(head_size: int) -> int:
    """Query rows of a block of paged_prefill_mma."""
    return 128 if head_size <= 128 else 64


def spec_paged_prefill_mma(dtype: str, cache_dtype: str, head_size: int, arch: str) -> KernelSpec:
    """With as many keys and stages of them as fit."""
    query_row, cache_row = _mma_rows(cache_dtype, head_size)
    # The logits of 32 keys fit into registers everywhere but on sm_120, where ptxas spills.
    most_keys = 16 if arch.startswith("12") and head_size > 112 else 32
    for keys, stages in ((most_keys, 3), (most_keys, 2), (16, 3), (16, 2)):
        tile_bytes = keys * (2 * cache_row + 4)
        shared_bytes = PREFILL_TILE + prefill_mma_rows(head_size) * query_row + stages * tile_bytes
        if shared_bytes <= _shared_memory(arch):
            break
    defines = _defines(dtype, cache_dtype, HEAD_SIZE=head_size, TILE_KEYS=keys, STAGES=stages)
    return KernelSpec("paged_prefill_mma.cu", "paged_prefill_mma", defines, 128, shared_bytes)


def has_wgmma(arch: str) -> bool:
    """Whether it is Hopper, whose warpgroups multiply out of shared memory; no other generation does."""
    return arch == "90a"


def spec_paged_prefill_wgmma(dtype: str, head_size: int) -> KernelSpec:
    """With as many keys of a tile as leave registers for the output, and then as many stages as fit."""
    keys = 128 if head_size <= 128 else 96 if head_size <= 192 else 80
    stages = 3 if head_size <= 128 else 2
    row_bytes = 128 * -(-head_size // 64)
    shared_bytes = (PREFILL_WGMMA_ROWS + stages * 2 * keys) * row_bytes + PREFILL_WGMMA_STATIC
    defines = _defines(dtype, HEAD_SIZE=head_size, TILE_KEYS=keys, STAGES=stages)
    return KernelSpec("paged_prefill_wgmma.cu", "paged_prefill_wgmma", defines, 384, shared_bytes)


def head_tiles(cache_dtype: str) -> tuple[int, ...]:
    """Query heads that one block of paged_decode can handle. With 8-bit codes a lane holds twice the
    elements of a row, and 8 heads of them do not fit in registers."""
    return HEAD_TILES[:-1] if cache_dtype in CACHE_DTYPES else HEAD_TILES


def spec_merge_splits(dtype: str) -> KernelSpec:
    return KernelSpec("merge_splits.cu", "merge_splits", _defines(dtype))


def spec_merge_states(dtype: str) -> KernelSpec:
    return KernelSpec("merge_states.cu", "merge_states", _defines(dtype))


def variants(arch: str) -> tuple[KernelSpec, ...]:
    """Every kernel that an architecture uses for the head sizes that models have; for the most common of them
    also over quantised caches, under bfloat16 queries, and with wide tiles.

    The others are compiled when they are met.
    """
    specs = [*(spec_copy_blocks(unit_bytes) for unit_bytes in (16, 1)), spec_plan_prefill()]
    if has_mma(arch):
        specs.append(spec_find_shared_pieces())
    for dtype in DTYPES:
        specs += [spec_merge_splits(dtype), spec_merge_states(dtype)]
        specs += [spec_reshape_and_cache(dtype, cache_dtype) for cache_dtype in (dtype, *CACHE_DTYPES)]
        tensor_cores = dtype != "fp32" and has_mma(arch)
        for cache_dtype in (dtype, *CACHE_DTYPES) if dtype == "bf16" else (dtype,):
            for head_size in HEAD_SIZES if cache_dtype == dtype else COMMON_HEAD_SIZES:
                if tensor_cores:
                    for wide in (False, True) if head_size in COMMON_HEAD_SIZES else (False,):
                        specs.append(spec_paged_decode_mma(dtype, cache_dtype, head_size, arch, wide))
                    if has_wgmma(arch) and cache_dtype == dtype:
                        specs.append(spec_paged_prefill_wgmma(dtype, head_size))
                    else:
                        specs.append(spec_paged_prefill_mma(dtype, cache_dtype, head_size, arch))
                else:
                    tiles = head_tiles(cache_dtype)
                    specs += [spec_paged_decode(dtype, cache_dtype, head_size, tile) for tile in tiles]
                    specs.append(spec_paged_prefill(dtype, cache_dtype, head_size))
    return tuple(specs)


def _defines(dtype: str, cache_dtype: str = "", **values: int) -> tuple[tuple[str, str], ...]:
    named = [(f"CUPAGED_{name}", str(value)) for name, value in values.items()]
    if cache_dtype in CACHE_DTYPES:
        named.insert(0, ("CUPAGED_CACHE_DTYPE", f"CUPAGED_{cache_dtype.upper()}"))
    return (("CUPAGED_DTYPE", f"CUPAGED_{dtype.upper()}"), *named)


def cuda_dir() -> Path:
    """The directory of the kernels' sources: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for directory in (package / "cuda", package.parent / "cuda"):
        if (directory / "common.cuh").is_file():
            return directory
    raise FileNotFoundError(f"no kernel sources in {package / 'cuda'} or {package.parent / 'cuda'}")


def user_cache() -> Path:
    """Where everything that is made once is kept: ``CUPAGED_CACHE_DIR``, or `cupaged` in the user's cache."""
    if chosen := os.environ.get("CUPAGED_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cupaged"


def cache_dir(root: Path | None = None) -> Path:
    """Of the compiled kernels, in `user_cache()` or another directory that may become it."""
    return (root or user_cache()) / "kernels"


def import_cupy() -> ModuleType:
    """CuPy, or an ImportError that names the package which fits torch's CUDA version."""
    try:
        import cupy
    except ImportError as error:
        import torch

        major = (torch.version.cuda or "13").partition(".")[0]
        raise ImportError(
            f"the CUDA kernels need CuPy: pip install cupy-cuda{major}x (or cupaged[cuda{major}])"
        ) from error
    return cupy


@cache
def toolkit_include_dir() -> Path:
    """Where `cuda_fp16.h` is."""
    from cuda import pathfinder  # type: ignore[attr-defined]  # mypy sees our cuda/ only

    found = pathfinder.find_nvidia_header_directory("cudart")
    if found is None or not (Path(found) / "cuda_fp16.h").is_file():
        raise FileNotFoundError(
            "the CUDA headers are missing: pip install 'cuda-toolkit[cudart,nvrtc,crt]' "
            "with the major version of your CuPy package"
        )
    return Path(found)


def arch_for_capability(major: int, minor: int, supported: Iterable[int]) -> str:
    """The architecture to compile for: the device's own, or the nearest that its machine code runs on.

    Args:
        supported: what NVRTC knows, as 10 * major + minor.

    Raises:
        RuntimeError: NVRTC knows none of the device's generation.
    """
    fitting = [arch for arch in supported if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        raise RuntimeError(
            f"NVRTC {'.'.join(map(str, nvrtc_version()))} cannot compile for compute capability "
            f"{major}.{minor}; install the CuPy package of another CUDA version"
        )
    best = max(fitting)
    return f"{best}a" if best == 90 else str(best)


def nvrtc_version() -> tuple[int, int]:
    import_cupy()
    from cupy.cuda import nvrtc

    return tuple(nvrtc.getVersion())


def nvrtc_archs() -> tuple[int, ...]:
    """The architectures NVRTC compiles for, as 10 * major + minor."""
    import_cupy()
    from cupy.cuda import nvrtc

    return tuple(nvrtc.getSupportedArchs())


_INCLUDE = re.compile(rb'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def include_closure(source: Path, include_dirs: Iterable[Path]) -> list[Path]:
    """The source and every header it can reach, in the order of reading.

    Conditions are not evaluated; a header that is nowhere (one for another platform) is left out.
    """
    directories = tuple(include_dirs)
    closure: list[Path] = []
    pending = [source]
    while pending:
        path = pending.pop()
        if path in closure:
            continue
        closure.append(path)
        for match in reversed(_INCLUDE.findall(path.read_bytes())):
            name = match.decode()
            found = (d / name for d in (path.parent, *directories) if (d / name).is_file())
            if (header := next(found, None)) is not None:
                pending.append(header.resolve())
    return closure


def digest(spec: KernelSpec, arch: str, sources: Path | None = None) -> str:
    """What identifies a compiled kernel: all its text, the options, NVRTC's version, the architecture."""
    directory = (sources or cuda_dir()).resolve()
    sha = hashlib.sha256()
    for path in include_closure(directory / spec.source, (directory, toolkit_include_dir())):
        content = _read_toolkit(path) if directory not in path.parents else path.read_bytes()
        sha.update(f"{path.name} {len(content)}\n".encode())
        sha.update(content)
    sha.update(repr((ENTRY_FORMAT, spec.defines, OPTIONS, nvrtc_version(), arch)).encode())
    return sha.hexdigest()[:32]


@cache
def _read_toolkit(path: Path) -> bytes:
    """NVIDIA's headers do not change under a running process; ours do, in tests."""
    return hashlib.sha256(path.read_bytes()).digest()


def compile_cubin(
    spec: KernelSpec, arch: str, sources: Path | None = None
) -> tuple[bytes, dict[str, ResourceUsage]]:
    """Compile without looking at the cache.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    import_cupy()
    from cupy.cuda import nvrtc

    directory = sources or cuda_dir()
    path = directory / spec.source
    options = (
        *OPTIONS,
        f"--gpu-architecture=sm_{arch}",
        f"-I{directory}",
        f"-I{toolkit_include_dir()}",
        *(f"-D{name}={value}" for name, value in spec.defines),
    )
    program = nvrtc.createProgram(path.read_text(encoding="utf-8"), str(path), (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"{spec} does not compile for sm_{arch}: {error}\n{log}") from None
        return whole_elf(nvrtc.getCUBIN(program)), parse_log(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def whole_elf(cubin: bytes) -> bytes:
    """The cubin with the zeros at its end that its headers count and that were lost on the way.

    CuPy takes it for a text and drops the last byte, the zero in the top of the last program header. The
    driver does not mind, nvdisasm does.
    """
    programs, sections = struct.unpack_from("<QQ", cubin, 32)
    program_size, program_count, section_size, section_count = struct.unpack_from("<4H", cubin, 54)
    end = max(programs + program_size * program_count, sections + section_size * section_count)
    return cubin.ljust(end, b"\0")


_FUNCTION = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"(\d+) bytes smem")
# That a wait for products was put in, or that they were serialised, or setmaxnreg left out.
_WARNING = re.compile(r"\(C75\d\d\) (.*?)\s+in (?:the )?function '(\w+)'")


def parse_log(log: str) -> dict[str, ResourceUsage]:
    """Registers, spills and shared memory by entry point, from the text of ``--ptxas-options=-v``."""
    usage = {}
    warnings = [(entry, text) for text, entry in _WARNING.findall(log)]
    sections = _FUNCTION.split(log)
    for entry, text in zip(sections[1::2], sections[2::2]):
        frame, registers, smem = _FRAME.search(text), _REGISTERS.search(text), _SMEM.search(text)
        if frame is None or registers is None:
            raise RuntimeError(f"ptxas reported nothing on {entry}:\n{log}")
        stack, stores, loads = map(int, frame.groups())
        usage[entry] = ResourceUsage(
            int(registers[1]),
            stack,
            stores,
            loads,
            int(smem[1]) if smem is not None else 0,
            tuple(text for name, text in warnings if name == entry),
        )
    return usage


def cubin(spec: KernelSpec, arch: str, directory: Path | None = None) -> Compiled:
    """The compiled kernel, from the cache or made now.

    Two files make an entry, the cubin and a JSON with its checksum. Each is written under another name
    and renamed, so that a reader sees a whole file or none, and writers may race. Whatever does not fit
    its checksum is compiled again.

    Args:
        directory: of the cache, `cache_dir()` by default.
    """
    folder = directory or cache_dir()
    stem = f"{spec.entry}-sm_{arch}-{digest(spec, arch)}"
    binary, record = folder / f"{stem}.cubin", folder / f"{stem}.json"
    if (found := _read_entry(binary, record)) is not None:
        return found
    start = time.perf_counter()
    content, usage = compile_cubin(spec, arch)
    compile_ms = (time.perf_counter() - start) * 1e3
    description = {
        "kernel": str(spec),
        "sha256": hashlib.sha256(content).hexdigest(),
        "compile_ms": compile_ms,
        "usage": {entry: asdict(used) for entry, used in usage.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomic(binary, content)
        _write_atomic(record, json.dumps(description, indent=1).encode())
    except OSError as error:
        raise OSError(
            f"cannot write compiled kernels to {folder}; set CUPAGED_CACHE_DIR to a writable directory"
        ) from error
    return Compiled(binary, usage, compile_ms, hit=False)


def _read_entry(binary: Path, record: Path) -> Compiled | None:
    try:
        description = json.loads(record.read_bytes())
        if hashlib.sha256(binary.read_bytes()).hexdigest() != description["sha256"]:
            return None
        usage = {
            entry: ResourceUsage(**used | {"warnings": tuple(used["warnings"])})
            for entry, used in description["usage"].items()
        }
        return Compiled(binary, usage, float(description["compile_ms"]), hit=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_atomic(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    from cupaged.precompile import main

    sys.exit(main())
