"""Launches through CuPy's real wrapper of the driver, over the stand-in for libcuda.so.1 of `driver.cpp`.

    LD_LIBRARY_PATH=<directory of that libcuda.so.1> python -m tests.cuda_host.over_driver

prints what each of the checks below found, "" or how it failed, as JSON. CuPy's runtime API has libcudart
inside, which asks a real driver for undocumented tables: `setDevice` alone of it is needed, and stood in for.
So are torch's functions that ask which device and stream are current.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import random
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cupy
import numpy as np
import torch

import cupaged
from cupaged import backends
from cupaged.backends import reference
from cupaged.backends.cuda import launcher
from cupaged.backends.cuda.kernels import Kernels
from cupaged.backends.cuda.specs import paged_decode_mma

from .build import load, runtime

INDEX = 1  # of the device that the launches are on; current is another
STREAM = 0x7FFF12345678
WIDTHS = {np.int32: 4, np.float32: 4, np.int64: 8}


@dataclass
class Seen:
    """A launch as the driver got it."""

    function: int
    shape: tuple[int, ...]
    stream: int
    extra: int | None
    params: int  # address of the addresses

    def param(self, i: int, width: int) -> bytes:
        address = ctypes.c_void_p.from_address(self.params + 8 * i).value
        return ctypes.string_at(address, width)


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
        yield
        self._state.current = before

    def set_device(self, index):
        assert index == torch.cuda.current_device() == INDEX
        self._state.context = index

    def context(self) -> int | None:
        """Of the thread: what the driver would launch on."""
        return getattr(self._state, "context", None)


FAKE_TORCH = FakeTorch()
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
    seen: list[tuple] = []
    kinds = [rng.choice(list(WIDTHS)) for _ in range(20)]
    numbers = [np.frombuffer(rng.randbytes(WIDTHS[kind]), kind)[0] for kind in kinds]  # a NaN has a payload
    shape = tuple(rng.randrange(1, 2**31) for _ in range(7))

    def record(launch: Seen) -> None:
        pointers = [launch.param(i, 8) for i in range(6)]
        values = [launch.param(i, WIDTHS[kind]) for i, kind in enumerate(kinds, 6)]
        seen.append((launch.function, launch.shape, launch.stream, launch.extra, pointers, values))

    on_launch(record)
    driver = cupy.cuda.driver
    launch = launcher.PreparedLaunch(
        partial(driver.launchKernel, 0x123456789ABC, *shape),
        partial(cupy.cuda.runtime.setDevice, INDEX),
        numbers,
        INDEX,
    )
    for _ in range(3):
        addresses = [rng.choice([None, rng.getrandbits(64)]) for _ in range(6)]
        launch([None if address is None else Address(address) for address in addresses])
        pointers = [(address or 0).to_bytes(8, "little") for address in addresses]
        values = [number.tobytes() for number in numbers]
        assert seen.pop() == (0x123456789ABC, shape, STREAM + INDEX, None, pointers, values)
    assert torch.cuda.current_device() == 0


def threads_do_not_mix_their_arguments() -> None:
    seen: list[tuple[int, ...]] = []
    on_launch(lambda launch: seen.append(tuple(int.from_bytes(launch.param(i, 8)) for i in range(12))))
    launch = launcher.PreparedLaunch(
        partial(cupy.cuda.driver.launchKernel, 1, *[1] * 7),
        partial(cupy.cuda.runtime.setDevice, INDEX),
        (np.int32(0),),
        INDEX,
    )

    def work(value: int) -> None:
        for _ in range(300):
            launch([Address(value)] * 12)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1200
    assert all(len(set(launch)) == 1 for launch in seen)


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
        error = ctypes.create_string_buffer(2048)
        runtime().cupaged_host_launch(
            ctypes.c_void_p(module.kernel),
            str(spec).encode(),
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


def kernels_run_on_what_arrives() -> None:
    """The public functions, down to the kernels, against the reference."""
    generator = torch.Generator().manual_seed(5)
    launcher = EmulatedLauncher()
    emulated = Kernels(launcher)
    num_seqs, heads, head_size, block_size, width = 3, 2, 64, 16, 40
    found = {}
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
        found[name] = cache, swapped, *cupaged.paged_attention(query, cache, tables, lengths, return_lse=True)
    for got, expected in zip(found["driver"][:2], found["reference"][:2]):
        assert torch.equal(got, expected)
    for got, expected in zip(found["driver"][2:], found["reference"][2:]):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert launcher.launched == [
        "reshape_and_cache",
        "copy_blocks",
        "copy_blocks",
        "paged_decode",
        "merge_splits",
    ]


def large_shared_memory_is_asked_for() -> None:
    spec = paged_decode_mma("bf16", "bf16", 128, "90a")
    function = launcher.CupyLauncher()._load(spec, INDEX)
    granted = DRIVER.cupaged_dynamic_shared_memory(ctypes.c_void_p(function))
    assert granted == spec.dynamic_shared_memory > 48 * 1024


CHECKS = (
    every_argument_arrives_bit_for_bit,
    threads_do_not_mix_their_arguments,
    kernels_run_on_what_arrives,
    large_shared_memory_is_asked_for,
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
