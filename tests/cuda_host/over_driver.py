"""Launches through CuPy's real wrapper of the driver, over the stand-in for libcuda.so.1 of `driver.cpp`.

    LD_LIBRARY_PATH=<directory of that libcuda.so.1> python -m tests.cuda_host.over_driver

prints what each of the checks below found, "" or how it failed, as JSON. CuPy's runtime API has libcudart
inside, which asks a real driver for undocumented tables: what needs it is stood in for, `setDevice` and
`RawModule`. So are torch's functions that ask which device and stream are current.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import random
import re
import struct
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cupy
import numpy as np
import pytest
import torch

import cupaged
from cupaged import backends
from cupaged.backends import reference
from cupaged.backends.cuda import compile as kernel_compiler
from cupaged.backends.cuda import launcher, raw
from cupaged.backends.cuda.arguments import OF_KERNEL, DecodeArguments
from cupaged.backends.cuda.kernels import Kernels
from cupaged.backends.cuda.specs import KernelSpec, paged_decode_mma

from .build import Module, load, runtime

INDEX = 1  # of the device that the launches are on; current is another
STREAM = 0x7FFF12345678


@dataclass
class Seen:
    """A launch as the driver got it."""

    function: int
    shape: tuple[int, ...]
    stream: int
    extra: int | None
    params: int  # address of the addresses

    def arguments(self, bytes_: int) -> bytes:
        """The one parameter."""
        address = ctypes.c_void_p.from_address(self.params).value
        return ctypes.string_at(address, bytes_)


class FakeTorch:
    """Two devices, of which 0 is current but within `torch.cuda.device`."""

    def __init__(self) -> None:
        self._state = threading.local()
        torch.cuda.device = self.device
        torch.cuda.current_device = lambda: getattr(self._state, "current", 0)
        torch.cuda.get_device_capability = lambda index: (9, 0)
        torch.cuda.get_device_properties = lambda device: type("", (), {"multi_processor_count": 4})
        torch._C._cuda_getCurrentRawStream = lambda index: STREAM + index
        cupy.cuda.runtime.setDevice = self.set_device

    @contextlib.contextmanager
    def device(self, index):
        before = torch.cuda.current_device()
        self._state.current = index
        try:
            yield
        finally:
            self._state.current = before

    def set_device(self, index):
        assert index == torch.cuda.current_device() == INDEX
        self._state.context = index

    def context(self) -> int | None:
        """Of the thread: what the driver would launch on."""
        return getattr(self._state, "context", None)


class FakeRawModule:
    """`cupy.RawModule` of a file, by the driver alone."""

    def __init__(self, *, path: str) -> None:
        self._module = cupy.cuda.driver.moduleLoad(path)

    def get_function(self, name: str) -> FakeRawKernel:
        return FakeRawKernel(cupy.cuda.driver.moduleGetFunction(self._module, name))


class FakeRawKernel:
    """`cupy.RawKernel`, on CuPy's current stream."""

    def __init__(self, function: int) -> None:
        self.kernel = type("", (), {"ptr": function})

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return DRIVER.cupaged_dynamic_shared_memory(ctypes.c_void_p(self.kernel.ptr))

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, value: int) -> None:
        attribute = cupy.cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        cupy.cuda.driver.funcSetAttribute(self.kernel.ptr, attribute, value)

    def __call__(self, grid, block, args, *, shared_mem=0) -> None:
        """Take arrays of the CPU as CuPy does: what they hold is the parameter."""
        assert all(isinstance(arg, np.ndarray) for arg in args)
        addresses = (ctypes.c_void_p * len(args))(*(arg.ctypes.data for arg in args))
        shape = (*grid, 1, 1)[:3] + (*block, 1, 1)[:3]
        cupy.cuda.driver.launchKernel(
            self.kernel.ptr, *shape, shared_mem, STREAM, ctypes.addressof(addresses), 0
        )


FAKE_TORCH = FakeTorch()
cupy.RawModule = FakeRawModule
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
)
DRIVER = ctypes.CDLL("libcuda.so.1")  # as CuPy finds it


def on_launch(handle: Callable[[Seen], None]) -> None:
    """Let the driver call ``handle`` at every launch; an exception fails the launch."""

    def launch(function, shape, stream, params, extra):
        try:
            assert FAKE_TORCH.context() == INDEX
            handle(Seen(function, tuple(shape[:7]), stream, extra, params))
            return 0
        except Exception:
            traceback.print_exc()
            return 1

    on_launch.kept = LAUNCH(launch)  # the driver has its address only
    DRIVER.cupaged_set_launch(on_launch.kept)


class Address:
    """What a launch takes from a tensor."""

    def __init__(self, address: int) -> None:
        self.data_ptr = lambda: address


def every_argument_arrives_bit_for_bit() -> None:
    rng = random.Random(1)
    for kind in {*OF_KERNEL.values()}:
        seen: list[tuple] = []
        arguments = kind.from_buffer_copy(rng.randbytes(ctypes.sizeof(kind)))  # a NaN has a payload
        before = bytes(arguments)
        shape = tuple(rng.randrange(1, 2**31) for _ in range(7))

        def record(launch: Seen, seen=seen, kind=kind) -> None:
            content = launch.arguments(ctypes.sizeof(kind))
            seen.append((launch.function, launch.shape, launch.stream, launch.extra, content))

        on_launch(record)
        driver = cupy.cuda.driver
        launch = launcher.PreparedLaunch(
            partial(driver.launchKernel, 0x123456789ABC, *shape),
            partial(cupy.cuda.runtime.setDevice, INDEX),
            arguments,
            INDEX,
        )
        count = len(kind.pointers())
        for _ in range(3):
            addresses = [rng.choice([None, rng.getrandbits(64)]) for _ in range(count)]
            launch([None if address is None else Address(address) for address in addresses])
            pointers = b"".join((address or 0).to_bytes(8, "little") for address in addresses)
            expected = pointers + before[len(pointers) :]
            assert seen.pop() == (0x123456789ABC, shape, STREAM + INDEX, None, expected)
        assert bytes(arguments) == before  # they are the plan's
        for wrong in (count - 1, count + 1):
            with contextlib.suppress(struct.error):
                launch([None] * wrong)
                raise AssertionError("a launch with too few or too many tensors")
    assert torch.cuda.current_device() == 0


def threads_do_not_mix_their_arguments() -> None:
    seen: list[tuple[int, ...]] = []
    count = len(DecodeArguments.pointers())
    on_launch(lambda launch: seen.append(struct.unpack(f"={count}Q", launch.arguments(8 * count))))
    launch = launcher.PreparedLaunch(
        partial(cupy.cuda.driver.launchKernel, 1, *[1] * 7),
        partial(cupy.cuda.runtime.setDevice, INDEX),
        DecodeArguments.from_buffer_copy(bytes(ctypes.sizeof(DecodeArguments))),
        INDEX,
    )

    def work(value: int) -> None:
        for _ in range(300):
            launch([Address(value)] * count)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1200
    assert all(len(set(launch)) == 1 for launch in seen)


def emulate(launch: Seen, name: str, module: Module) -> None:
    """Run an emulated kernel on what arrived."""
    error = ctypes.create_string_buffer(2048)
    runtime().cupaged_host_launch(
        ctypes.c_void_p(module.kernel),
        name.encode(),
        ctypes.c_void_p(launch.params),
        (ctypes.c_uint * 3)(*launch.shape[:3]),
        (ctypes.c_uint * 3)(*launch.shape[3:6]),
        ctypes.c_size_t(launch.shape[6]),
        ctypes.c_uint64(7),
        ctypes.c_double(60.0),
        error,
        ctypes.c_size_t(len(error)),
    )
    assert not error.value, error.value.decode()


class EmulatedLauncher(launcher.CupyLauncher):
    """`CupyLauncher` for tensors on the CPU; the driver runs the emulated kernel that it loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []
        self._specs: dict[int, tuple] = {}
        on_launch(self._run)

    def prepare(self, call, device):
        return super().prepare(call, torch.device("cuda", INDEX))

    def arch(self, device):
        return super().arch(torch.device("cuda", INDEX))

    def reaches(self, tensor, device):
        return True

    def upload(self, tensor, device):
        return tensor.clone()

    def _load(self, spec, index):
        function = super()._load(spec, index)
        self._specs[function] = spec, load(spec)
        return function

    def _run(self, launch: Seen) -> None:
        spec, module = self._specs[launch.function]
        self.launched.append(spec.entry)
        emulate(launch, str(spec), module)


def kernels_run_on_what_arrives() -> None:
    """The public functions, down to the kernels, against the reference."""
    generator = torch.Generator().manual_seed(5)
    launcher = EmulatedLauncher()
    emulated = Kernels(launcher)
    num_seqs, heads, head_size, block_size, width = 3, 2, 64, 16, 40
    found, fused = {}, {}
    for name, backend in (("driver", emulated), ("reference", reference)):
        backends.for_device = lambda device_type, backend=backend: backend
        generator.manual_seed(5)
        cache = torch.zeros(50, 2, heads, block_size, head_size)
        qkv = torch.randn(600, 3 * heads, head_size, generator=generator)
        slots = torch.randperm(50 * block_size, generator=generator)[:600]
        cupaged.reshape_and_cache(qkv[:, heads : 2 * heads], qkv[:, 2 * heads :], cache, slots)
        cupaged.copy_blocks(cache, torch.tensor([[3, 49], [5, 48]]))
        swapped = torch.zeros_like(cache)
        cupaged.swap_blocks(cache, swapped, torch.tensor([[7, 0], [49, 1]]))
        tables = torch.stack([torch.randperm(50, generator=generator)[:width] for _ in range(num_seqs)]).int()
        lengths = torch.tensor([600, 1, 515], dtype=torch.int32)
        query = torch.randn(num_seqs, heads, head_size, generator=generator)
        normed, total = torch.randn(2, 3, 1100, generator=generator)
        cupaged.rms_norm(normed, torch.rand(1100, generator=generator), residual=total, out=normed)
        products = cupaged.act_and_mul(torch.randn(3, 128, generator=generator), activation="gelu")
        turned, angles = query.clone(), torch.rand(3, head_size // 2, generator=generator)
        key = torch.randn(num_seqs, heads, head_size, generator=generator)
        written = torch.zeros_like(cache)
        cupaged.rope_and_cache(turned, key, key, angles.cos(), angles.sin(), written, torch.arange(3))
        logits = torch.randn(3, 300, generator=generator)
        settings = {"temperature": torch.ones(3).double(), "top_k": torch.tensor([0, 5, 300])}
        settings |= {"top_p": torch.tensor([0.9, 1.0, 0.5]).double(), "min_p": torch.zeros(3).double()}
        settings |= dict.fromkeys(("seeds", "indices", "positions"), torch.arange(3))
        tokens = cupaged.sample(logits, **settings)
        fused[name] = tokens, normed, total, products, turned, written
        found[name] = cache, swapped, *cupaged.paged_attention(query, cache, tables, lengths, return_lse=True)
    for got, expected in zip(found["driver"][:2], found["reference"][:2]):
        assert torch.equal(got, expected)
    close = ((*found[name][2:], *fused[name]) for name in ("driver", "reference"))
    for got, expected in zip(*close):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert launcher.launched == [
        "reshape_and_cache",
        "copy_blocks",
        "copy_blocks",
        "rms_norm",
        "act_and_mul",
        "rope_and_cache",
        "sample",
        "paged_decode",
        "merge_splits",
    ]


def large_shared_memory_is_asked_for() -> None:
    spec = paged_decode_mma("bf16", "bf16", 128, "90a")
    function = launcher.CupyLauncher()._load(spec, INDEX)
    granted = DRIVER.cupaged_dynamic_shared_memory(ctypes.c_void_p(function))
    assert granted == spec.dynamic_shared_memory > 48 * 1024


def the_documented_launch_is_right() -> None:
    """`docs/kernels.md`: what it shows, on tensors of the CPU, over emulated kernels."""
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    documented: dict = {}
    exec(text.partition("```python\n")[2].partition("```")[0], documented)
    modules = {}

    class Kernel(FakeRawKernel):
        @property
        def max_threads_per_block(self) -> int:
            return modules[self.kernel.ptr].max_threads

    def loaded(spec: KernelSpec, arch: str) -> Kernel:
        assert (arch, spec) == ("90a", paged_decode_mma("bf16", "bf16", 64, "90a"))
        kernel = Kernel(load_raw(spec, arch).kernel.ptr)
        modules[kernel.kernel.ptr] = load(spec)
        return kernel

    def run(launch: Seen) -> None:
        emulate(launch, "paged_decode_mma", modules[launch.function])

    load_raw, raw.load = raw.load, loaded
    cupy.cuda.Device = lambda: type("", (), {"compute_capability": "90"})
    with torch.cuda.device(INDEX):
        cupy.cuda.runtime.setDevice(INDEX)
        on_launch(run)
        generator = torch.Generator().manual_seed(3)
        cache = torch.randn(40, 2, 2, 16, 64, generator=generator).bfloat16()
        query = torch.randn(3, 8, 64, generator=generator).bfloat16()
        tables = torch.stack([torch.randperm(40, generator=generator)[:36] for _ in range(3)]).int()
        lengths = torch.tensor([550, 1, 33], dtype=torch.int32)
        out = torch.full_like(query, float("nan"))
        documented["decode"](query, cache, tables, lengths, out)
    raw.load = load_raw
    backends.for_device = lambda device_type: reference
    expected = cupaged.paged_attention(query.float(), cache.float(), tables, lengths)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


def a_raw_kernel_of_no_kernel_is_refused() -> None:
    for name, variant, message in (
        ("paged_decod", {}, "there is no kernel 'paged_decod', only act_and_mul, "),
        ("paged_decode_mma", {"dtype": torch.float16}, "missing: ['head_size'], unknown: []"),
        ("copy_blocks", {"unit_bytes": 16, "dtype": "bf16"}, "missing: [], unknown: ['dtype']"),
        ("merge_states", {"dtype": torch.int8}, "dtype must be one of fp32, fp16, bf16, got 'int8'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            cupaged.raw_kernel(name, arch="80", **variant)
    kernel = cupaged.raw_kernel("merge_states", arch="80", dtype=torch.float16)
    assert (kernel.kernel.ptr > 0, kernel.max_dynamic_shared_size_bytes) == (True, 0)
    for name, variant in (
        ("rms_norm", {}),
        ("act_and_mul", {}),
        ("rope_and_cache", {"cache_dtype": torch.int8}),
        ("sample", {}),
    ):
        assert cupaged.raw_kernel(name, arch="80", dtype=torch.float16, **variant).kernel.ptr > 0


def a_kernel_is_loaded_that_cannot_be_kept() -> None:
    """From a file that is gone afterwards."""
    spec = paged_decode_mma("bf16", "bf16", 64, "90a")
    whole = kernel_compiler.cubin(spec, "90a")
    paths = []

    class Module(FakeRawModule):
        def __init__(self, *, path):
            paths.append(Path(path))
            super().__init__(path=path)

    cupy.RawModule, kernel_compiler.cubin = Module, lambda spec, arch: replace(whole, path=None)
    assert raw.load(spec, "90a").kernel.ptr
    assert paths[0] != whole.path
    assert not paths[0].exists()


CHECKS = (
    every_argument_arrives_bit_for_bit,
    threads_do_not_mix_their_arguments,
    kernels_run_on_what_arrives,
    large_shared_memory_is_asked_for,
    the_documented_launch_is_right,
    a_raw_kernel_of_no_kernel_is_refused,
    a_kernel_is_loaded_that_cannot_be_kept,
)


def main() -> None:
    found = {}
    for check in CHECKS:
        try:
            check()
            found[check.__name__] = ""
        except Exception:
            found[check.__name__] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
