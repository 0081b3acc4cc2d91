"""Which device runs and why, and what `make` installs for it: on stand-ins for a driver, torch and CuPy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cupaged import backends
from cupaged import device as devices
from cupaged.engine import LLM
from cupaged.serve import main

ROOT = Path(__file__).resolve().parents[2]
BANNERS = {
    "old": "| NVIDIA-SMI 535.104.05    Driver Version: 535.104.05    CUDA Version: {} |",
    "driver 610": "| NVIDIA-SMI 610.43.02     KMD Version: 610.43.02     CUDA UMD Version: {} |",
    "--version": "CUDA Version        : {}",
}


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a tool of that name first on the PATH, which prints a line and ends with a status."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUPAGED_BACKEND", raising=False)

    def write(line: str, status: int = 0) -> None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{line}'\nexit {status}\n")
        (folder / "nvidia-smi").chmod(0o755)

    write("", status=9)
    return write


@pytest.mark.parametrize("banner", BANNERS)
@pytest.mark.parametrize(
    ("version", "driver", "extra"),
    [("11.8", 11, ""), ("12.2", 12, "cuda12"), ("13.0", 13, "cuda13"), ("14.1", 14, "cuda13")],
)
def test_the_extra_follows_the_driver(nvidia_smi, banner, version, driver, extra):
    nvidia_smi(BANNERS[banner].format(version))
    assert devices.driver_cuda_version() == driver
    assert devices.extra(driver) == extra


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", 9),
        ("No devices were found", 6),
        (BANNERS["old"].format("N/A"), 0),
    ],
)
def test_a_driver_that_runs_nothing_is_none(nvidia_smi, line, status):
    nvidia_smi(line, status)
    assert devices.driver_cuda_version() is None
    assert devices.extra(None) == ""


def make(checkout: Path, *arguments: str) -> str:
    """What `make` would run."""
    command = ["make", "-n", f"PYTHON={sys.executable}", *arguments]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_installs_what_fits_the_driver(nvidia_smi, tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copytree(ROOT / "cupaged", checkout / "cupaged", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", ".ci/constraints.txt"):
        shutil.copy(ROOT / name, checkout / name)

    plain = make(checkout, "serve", "PORT=9000")
    assert '-c .ci/constraints.txt -e "."' in plain
    assert "cupaged.serve --port 9000" in plain
    assert '-e ".[test,lint]"' in make(checkout, "venv")

    nvidia_smi(BANNERS["driver 610"].format("13.3"))
    assert '-c .ci/constraints.txt -e ".[cuda13]"' in make(checkout, "serve")
    assert '-e ".[test,lint]"' in make(checkout, "venv")
    stamps = [checkout / ".venv" / name for name in ("bin/python", ".servecuda13", ".testcuda13")]
    for stamp in stamps:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    assert "pip" not in make(checkout, "serve"), "the second time there is nothing to install"
    assert "pip" not in make(checkout, "test")

    # Another driver: CuPy is changed, whatever has been installed before. The tested set holds CUDA 13.
    nvidia_smi(BANNERS["old"].format("12.4"))
    commands = make(checkout, "test", "TORCH_INDEX=http://index.example/cu12")
    assert '-c .venv/constraints.txt -e ".[cuda12]"' in commands
    assert '-e ".[cuda12,test-tools,lint]"' in commands
    assert "--extra-index-url http://index.example/cu12" in commands
    told = subprocess.run(
        ["make", f"PYTHON={sys.executable}", "serve"], cwd=checkout, capture_output=True, text=True
    )
    assert told.returncode != 0
    assert "make TORCH_INDEX=URL" in told.stderr
    pinned = subprocess.run(
        ["make", f"PYTHON={sys.executable}", ".venv/constraints.txt"],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert pinned.returncode == 0, pinned.stderr
    kept = (checkout / ".venv/constraints.txt").read_text()
    assert "numba==" in kept
    assert "cuda-toolkit" not in kept
    assert "nvidia-cuda" not in kept


@pytest.fixture
def gpu(monkeypatch):
    """Torch with CUDA 12.6 and one GPU."""
    properties = SimpleNamespace(name="Stand-in", major=9, minor=0)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture
def without_cupy(monkeypatch):
    backends.for_device.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    yield
    backends.for_device.cache_clear()


def test_a_gpu_with_cupy_is_used(nvidia_smi, gpu, monkeypatch):
    monkeypatch.setattr(backends, "for_device", lambda device_type: None)
    device, why = devices.choose_device(None)
    assert device.type == "cuda"
    assert why == "cuda backend: Stand-in, compute capability 9.0, CUDA 12.6"
    assert devices.choose_device("cpu")[1] == "cpu backend: as asked"
    with pytest.raises(ValueError, match="'cuda:1', and the CUDA devices are 1"):
        devices.choose_device("cuda:1")


@pytest.mark.parametrize("wanted", [None, "cuda"])
def test_a_gpu_without_cupy_is_an_error_that_names_the_package(nvidia_smi, gpu, without_cupy, wanted):
    with pytest.raises(RuntimeError, match=r"pip install cupy-cuda12x .*--device cpu"):
        devices.choose_device(wanted)
    with pytest.raises(RuntimeError, match=r"pip install cupy-cuda12x"):
        LLM("no-such-model", device=wanted)


def test_the_server_says_so_before_it_loads_anything(nvidia_smi, gpu, without_cupy, capsys):
    assert main(["--port", "0", "--model", "no-such-model"]) == 1
    assert "error: the CUDA kernels need CuPy: pip install cupy-cuda12x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("driver", "built_for", "message"),
    [
        ("13.0", None, "is built for the CPU: install torch for CUDA 13 .* cupy-cuda13x"),
        ("12.4", "13.0", "is built for CUDA 13.0: install torch for CUDA 12 .* cupy-cuda12x"),
        ("14.0", None, "install torch for CUDA 13 .* cupy-cuda13x"),
        ("13.0", "12.6", r"cannot use it: .*torch\.cuda\.init"),
        ("11.4", "13.0", "needs CUDA 12 or newer: update the driver"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_never_the_cpu(nvidia_smi, monkeypatch, driver, built_for, message):
    nvidia_smi(BANNERS["old"].format(driver))
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wanted in (None, "cuda"):
        with pytest.raises(RuntimeError, match=message):
            devices.choose_device(wanted)
    assert devices.choose_device("cpu")[0].type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # also a way to ask for the CPU
    assert devices.choose_device(None)[0].type == "cpu"


def test_without_a_driver_it_is_the_cpu_and_says_why(nvidia_smi, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, why = devices.choose_device(None)
    assert device.type == "cpu"
    assert why == f"cpu backend: torch {torch.__version__} sees no CUDA device"
    with pytest.raises(ValueError, match=r"device is 'cuda:0', and torch .* sees no CUDA device"):
        devices.choose_device("cuda:0")
    for nonsense in ("gpu", "cuda:x", "mps"):
        with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or"):
            devices.choose_device(nonsense)
