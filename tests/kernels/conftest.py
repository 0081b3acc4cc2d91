"""The backends the kernel suite runs over: reference, cpu, cuda_host (emulation), cuda where there is a GPU.

Only when asked for: cuda_ptx, which interprets what NVRTC makes of the kernels.
"""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from cupaged import backends
from cupaged.backends.cuda.kernels import Kernels

BACKENDS = ("reference", "cpu", "cuda_host", "cuda")
HAS_GPU = torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None


def pytest_generate_tests(metafunc):
    """Run on each backend that there is, or on those that were asked for."""
    if "backend" in metafunc.fixturenames:
        names = metafunc.config.getoption("--backend") or [n for n in BACKENDS if n != "cuda" or HAS_GPU]
        if metafunc.definition.get_closest_marker("cuda_kernels"):
            names = [name for name in names if "cuda" in name]
        operator = metafunc.definition.get_closest_marker("operator")
        if operator and not hasattr(Kernels, operator.args[0]):
            names = [name for name in names if "cuda" not in name]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request, monkeypatch, seed):
    """Make the public functions run on one backend; gives its name and the device of its tensors."""
    name = request.param
    device = "cpu"
    if name == "cpu":
        request.getfixturevalue("two_threads")
    if name == "cuda":
        if not HAS_GPU:
            pytest.fail("--backend cuda was asked for, and there is no GPU")
        device = "cuda"
        module = backends.load("cuda")
    elif name == "cuda_host":
        if shutil.which("g++") is None:
            pytest.skip("no g++ to build the emulation with")
        from tests.cuda_host import emulator

        # Hopper has a prefill of its own; half of the tests run what the others have.
        module = emulator.backend(seed, "90a" if seed % 2 else "80")
    elif name == "cuda_ptx":
        from tests.ptx import launcher

        module = launcher.backend(seed, ("75", "80", "90a")[seed % 3])
    else:
        module = backends.load(name)
    monkeypatch.setattr(backends, "for_device", lambda device_type: module)
    return name, device


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Tensor cores with room for three stages of keys, with less shared memory, none.
@pytest.fixture(params=["90a", "86", "75"])
def emulated_arch(request, monkeypatch, seed) -> str:
    """Run on the emulation of a GPU of this architecture."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulation with")
    from tests.cuda_host import emulator

    module = emulator.backend(seed, request.param)
    monkeypatch.setattr(backends, "for_device", lambda device_type: module)
    return request.param
