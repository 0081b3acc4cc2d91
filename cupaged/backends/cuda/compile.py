"""Compile the kernels in `cuda/` with NVRTC, and keep the results on disk.

NVRTC makes machine code (a cubin) with no nvcc and no GPU, through CuPy's binding. A result is filed under
a digest of everything that went into it: the source with all its headers, the options, the version of
NVRTC and the architecture. `python -m cupaged.compile` compiles ahead of time (`precompile.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from ...paths import user_cache
from .specs import KernelSpec

_log = logging.getLogger("cupaged")

# -ftz: a logit below 1e-38 counts as zero, and exp2 is one instruction.
OPTIONS = ("--std=c++17", "-ftz=true", "--ptxas-options=-v")

# Part of every digest: raise it when what is kept for the same inputs changes.
ENTRY_FORMAT = 3


@dataclass(frozen=True)
class ResourceUsage:
    """The resources of an entry point, as ptxas reports them. Sizes are in bytes of a thread or a block."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared_memory: int  # static
    warnings: tuple[str, ...] = ()  # of ptxas, about the speed


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its cubin and where it is."""

    content: bytes
    path: Path | None  # where it is kept; None: it could not be written
    usage: dict[str, ResourceUsage]  # by entry point
    compile_ms: float
    hit: bool  # found in the cache


def cuda_dir() -> Path:
    """Return the directory of the kernels' sources: in an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for directory in (package / "cuda", package.parent / "cuda"):
        if (directory / "common.cuh").is_file():
            return directory
    raise FileNotFoundError(f"no kernel sources in {package / 'cuda'} or {package.parent / 'cuda'}")


def cache_dir(root: Path | None = None) -> Path:
    """Return the directory of compiled kernels in `user_cache()`, or in another directory."""
    return (root or user_cache()) / "kernels"


def import_cupy() -> ModuleType:
    """Return CuPy, or raise an ImportError that names the package for torch's CUDA version."""
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
    """Return the directory of `cuda_fp16.h`."""
    from cuda import pathfinder  # type: ignore[attr-defined]  # mypy sees our cuda/ only

    found = pathfinder.find_nvidia_header_directory("cudart")
    if found is None or not (Path(found) / "cuda_fp16.h").is_file():
        raise FileNotFoundError(
            "the CUDA headers are missing: pip install 'cuda-toolkit[cudart,nvrtc,crt]' "
            "with the major version of your CuPy package"
        )
    return Path(found)


def arch_for_capability(major: int, minor: int, supported: Iterable[int]) -> str:
    """Return the architecture to compile for: the device's own, or the nearest whose code it can run.

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
    """Return the architectures that NVRTC compiles for, as 10 * major + minor."""
    import_cupy()
    from cupy.cuda import nvrtc

    return tuple(nvrtc.getSupportedArchs())


_INCLUDE = re.compile(rb'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def include_closure(source: Path, include_dirs: Iterable[Path]) -> list[Path]:
    """Return the source and all headers that it can include, in the order in which they are read.

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
    """Return a digest of what a kernel is compiled from: text, options, NVRTC's version, architecture."""
    directory = (sources or cuda_dir()).resolve()
    sha = hashlib.sha256()
    for path in include_closure(directory / spec.source, (directory, toolkit_include_dir())):
        content = _read_toolkit(path) if directory not in path.parents else path.read_bytes()
        sha.update(f"{path.name} {len(content)}\n".encode())
        sha.update(content)
    sha.update(repr((ENTRY_FORMAT, spec.macros, OPTIONS, nvrtc_version(), arch)).encode())
    return sha.hexdigest()[:32]


@cache
def _read_toolkit(path: Path) -> bytes:
    """Read a header of NVIDIA, once: unlike ours, these do not change under a running process."""
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
        *(f"-D{name}={value}" for name, value in spec.macros),
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
    """Restore the zeros at the end of a cubin that its headers count and that were lost on the way.

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
    """Return the resources of each entry point, from the output of ``--ptxas-options=-v``."""
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
    """Return the compiled kernel from the cache, or compile it.

    Two files make an entry, the cubin and a JSON with its checksum. Each is written under another name
    and renamed, so that a reader sees a whole file or none, and writers may race. Whatever does not fit
    its checksum is compiled again. Where nothing can be written the kernel is as good; it is said once.

    Args:
        directory: of the cache, `cache_dir()` by default.
    """
    folder = directory or cache_dir()
    binary, record = _entry(spec, arch, folder)
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
        _warn_not_kept(folder, error.strerror)
        return Compiled(content, None, usage, compile_ms, hit=False)
    return Compiled(content, binary, usage, compile_ms, hit=False)


def kept(spec: KernelSpec, arch: str, directory: Path | None = None) -> Compiled | None:
    """Return the compiled kernel from the cache, or None."""
    return _read_entry(*_entry(spec, arch, directory or cache_dir()))


def _entry(spec: KernelSpec, arch: str, folder: Path) -> tuple[Path, Path]:
    stem = f"{spec.entry}-sm_{arch}-{digest(spec, arch)}"
    return folder / f"{stem}.cubin", folder / f"{stem}.json"


@cache
def _warn_not_kept(folder: Path, why: str) -> None:
    _log.warning(
        "compiled kernels are not kept, and the next start compiles them again: %s cannot be written (%s); "
        "make room, or set CUPAGED_CACHE_DIR to another directory",
        folder,
        why,
    )


def _read_entry(binary: Path, record: Path) -> Compiled | None:
    try:
        description = json.loads(record.read_bytes())
        content = binary.read_bytes()
        if hashlib.sha256(content).hexdigest() != description["sha256"]:
            return None
        usage = {
            entry: ResourceUsage(**used | {"warnings": tuple(used["warnings"])})
            for entry, used in description["usage"].items()
        }
        return Compiled(content, binary, usage, float(description["compile_ms"]), hit=True)
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
