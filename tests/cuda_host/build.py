"""Compile kernels for the CPU, and keep the results on disk under a digest of all that went in."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cupaged.backends.cuda.arguments import OF_KERNEL
from cupaged.backends.cuda.compile import cache_dir, cuda_dir, include_closure, toolkit_include_dir
from cupaged.backends.cuda.specs import KernelSpec

HERE = Path(__file__).resolve().parent
INCLUDE = HERE / "include"
ROOT = HERE.parents[1]
MAX_THREADS = 1024  # of any block

# Kernels load 16 bytes through pointers to other types.
OPTIONS = (
    "-std=c++17",
    "-O1",  # most kernels take longer to compile than to run
    "-g0",
    "-w",
    "-fPIC",
    "-fno-exceptions",
    "-fno-gnu-unique",  # a variable of a template belongs to one kernel
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-fno-math-errno",
)
# What every kernel begins with, and the headers of CUDA that take the compiler half of its time.
PRELUDE = '#include "shim.h"\n#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n'
REGISTER_POISON = "-ftrivial-auto-var-init=pattern"
CHECKS = (
    "-fsanitize=bounds,alignment,shift,signed-integer-overflow",
    "-fno-sanitize-recover=all",
)


class _ArgumentStruct(ctypes.Structure):
    """`cupaged_host::Argument`."""

    _fields_ = (("offset", ctypes.c_int), ("size", ctypes.c_int), ("kind", ctypes.c_char))


class _KernelStruct(ctypes.Structure):
    """`cupaged_host::Kernel`."""

    _fields_ = (
        ("call", ctypes.c_void_p),
        ("num_arguments", ctypes.c_int),
        ("arguments", ctypes.POINTER(_ArgumentStruct)),
        ("struct_size", ctypes.c_int),
        ("max_threads", ctypes.c_int),
        ("shared_begin", ctypes.c_void_p),
        ("shared_end", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Argument:
    """Describe what a launch gives a kernel: a parameter, or a field of the struct that is its only one."""

    offset: int  # in the struct
    size: int
    kind: str  # p: pointer, c: pointer to const, i: integer, f: floating point


@dataclass(frozen=True)
class Module:
    """A compiled kernel, loaded."""

    library: ctypes.CDLL
    kernel: int  # address of the struct
    arguments: tuple[Argument, ...]
    struct_size: int  # 0: each argument is a parameter
    max_threads: int  # of a block
    static_shared: int  # bytes, with padding between variables


@cache
def compiler() -> str:
    """The command of the C++ compiler: ``CXX`` or g++."""
    return os.environ.get("CXX") or "g++"


@cache
def _compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], check=True, capture_output=True, text=True).stdout


@cache
def register_poison() -> tuple[str, ...]:
    """The option that fills uninitialised variables, where the compiler has it (GCC 12)."""
    command = [compiler(), REGISTER_POISON, "-xc++", "-fsyntax-only", os.devnull]
    return (REGISTER_POISON,) if subprocess.run(command, capture_output=True).returncode == 0 else ()


def build(
    stem: str, texts: Sequence[Path], unit: str, options: Sequence[str], link_options: Sequence[str] = ()
) -> Path:
    """Compile one translation unit to a shared library, or find it from an earlier run.

    ``CXXFLAGS`` are added to the options.

    Args:
        texts: the files that the result depends on besides unit and options.
    """
    options = (*options, *_more_options())
    # Another checkout of the same sources has the same digest, and its messages the same places.
    what = repr((unit, options, link_options, _compiler_version())).replace(f"{ROOT}/", "")
    what = re.sub(r"'[^']*/prelude-\w+/", "'", what)
    sha = hashlib.sha256(what.encode())
    options = (*options, f"-ffile-prefix-map={ROOT}/=")
    for text in texts:
        sha.update(text.read_bytes())
    folder = cache_dir() / "host"
    target = folder / f"{stem}-{sha.hexdigest()[:24]}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, binary = Path(scratch) / "unit.cpp", Path(scratch) / "unit.so"
        source.write_text(unit, encoding="utf-8")
        # Two steps: with -fsanitize the linker would add a library that `sanitizer.cpp` stands in for.
        commands = (
            [compiler(), *options, "-c", str(source), "-o", f"{scratch}/unit.o"],
            [compiler(), "-shared", *link_options, f"{scratch}/unit.o", "-o", str(binary)],
        )
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{stem} does not compile:\n{' '.join(command)}\n{done.stderr[:8000]}")
        os.replace(binary, target)
    return target


@cache
def runtime() -> ctypes.CDLL:
    """The library that runs kernels. Its symbols are global, for the kernels' libraries."""
    names = ("runtime", "barriers", "proxies", "warpgroup", "products", "sanitizer")
    sources = [HERE / f"{name}.cpp" for name in names]
    headers = [
        *(HERE / f"{name}.h" for name in ("machine", "warpgroup", "fiber")),
        INCLUDE / "host_runtime.h",
    ]
    unit = "".join(f'#include "{path}"\n' for path in sources)
    options = (
        *("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-U_FORTIFY_SOURCE"),
        *(f"-I{HERE}", f"-I{INCLUDE}", "-isystem", str(toolkit_include_dir())),
    )
    library = ctypes.CDLL(str(build("runtime", [*sources, *headers], unit, options)), mode=ctypes.RTLD_GLOBAL)
    library.cupaged_host_launch.restype = ctypes.c_bool
    return library


@cache
def _emulation_headers() -> tuple[Path, ...]:
    return tuple(sorted(path for path in INCLUDE.rglob("*") if path.is_file()))


def _more_options() -> list[str]:
    return os.environ.get("CXXFLAGS", "").split()


@cache
def _prelude(options: tuple[str, ...]) -> Path:
    """Precompile the prelude for these options. Return its header's path, to be included by it."""
    sha = hashlib.sha256(repr((PRELUDE, options, _compiler_version())).encode())
    for header in _emulation_headers():
        sha.update(header.read_bytes())
    folder = cache_dir() / "host" / f"prelude-{sha.hexdigest()[:24]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        (scratch / "prelude.h").write_text(PRELUDE)
        command = [compiler(), *options, "-xc++-header", "prelude.h", "-o", "prelude.h.gch"]
        # A compiler that cannot is left to read the header itself.
        subprocess.run(command, cwd=scratch, capture_output=True)
        try:
            scratch.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(scratch)
    return folder / "prelude.h"


def _launch_bound(source: str, entry: str) -> str:
    """The first argument of the entry point's ``__launch_bounds__``, a C++ expression."""
    found = re.search(rf"__launch_bounds__\(([^,()]+)[^()]*\)\s*{entry}\b", source)
    return f"({found[1]})" if found else str(MAX_THREADS)


def _fields(entry: str) -> str:
    """The macro that names the fields of a kernel's arguments, none for a kernel of these tests."""
    if entry not in OF_KERNEL:
        return ""
    names = " ".join(f"F({name})" for name, _ in OF_KERNEL[entry]._fields_)
    return f"#define CUPAGED_HOST_FIELDS(F) {names}\n"


def load(spec: KernelSpec, sources: Path | None = None) -> Module:
    """Compile a kernel and load it.

    Args:
        sources: the directory of ``spec.source``, `cuda/` by default.
    """
    runtime()
    directory = (sources or cuda_dir()).resolve()
    source = directory / spec.source
    includes = (directory, cuda_dir().resolve(), INCLUDE)
    unit = (
        f'#include "{source}"\n'
        f"#define CUPAGED_HOST_ENTRY {spec.entry}\n"
        f"#define CUPAGED_HOST_MAX_THREADS {_launch_bound(source.read_text(encoding='utf-8'), spec.entry)}\n"
        f'{_fields(spec.entry)}#include "module.h"\n'
    )
    common = (
        *OPTIONS,
        *CHECKS,
        *register_poison(),
        *(f"-I{INCLUDE}", "-isystem", str(toolkit_include_dir())),
    )
    # The prelude must have been compiled with the same options, and is the same for every kernel.
    prelude = _prelude((*common, f"-ffile-prefix-map={ROOT}/=", *_more_options()))
    options = (
        *common,
        *("-include", str(prelude)),
        *(f"-I{path}" for path in includes),
        *(f"-D{name}={value}" for name, value in spec.macros),
    )
    texts = [*include_closure(source, includes), *_emulation_headers(), toolkit_include_dir() / "cuda.h"]
    library = ctypes.CDLL(str(build(spec.entry, texts, unit, options, ("-nostartfiles",))), mode=os.RTLD_NOW)
    library.cupaged_host_kernel.restype = ctypes.POINTER(_KernelStruct)
    pointer = library.cupaged_host_kernel()
    kernel = pointer.contents
    return Module(
        library,
        ctypes.addressof(kernel),
        tuple(Argument(a.offset, a.size, a.kind.decode()) for a in kernel.arguments[: kernel.num_arguments]),
        kernel.struct_size,
        kernel.max_threads,
        kernel.shared_end - kernel.shared_begin,
    )
