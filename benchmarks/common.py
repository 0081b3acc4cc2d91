"""The environment of a benchmark's run, and the file of its results."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # benchmarks run from a checkout, installed or not
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

PACKAGES = ("torch", "transformers", "numba", "cupy-cuda13x", "cupy-cuda12x", "flashinfer-python")


def environment(device: torch.device) -> dict[str, Any]:
    """Return hardware, versions, number of threads and commit of this run."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        facts |= _gpu(device)
    return facts


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        completed = subprocess.run(query, capture_output=True, text=True, timeout=30)
        facts["driver"] = completed.stdout.strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        facts["driver"] = "unknown"
    try:
        from cupaged.backends.cuda.compile import nvrtc_version

        facts["nvrtc"] = ".".join(map(str, nvrtc_version()))
    except ImportError:
        facts["nvrtc"] = "none"
    return facts


def result_name(benchmark: str, device: torch.device) -> str:
    """Return the name of the results on a device: ``kernels-cpu``, ``kernels-nvidia-h200``."""
    name = "cpu"
    if device.type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"{benchmark}-{name}"


def write(out: Path, name: str, environment: dict[str, Any], results: Any) -> Path:
    """Write the results of a run as JSON, and return the file's path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")
    return path


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        completed = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:  # no git
        return ""
    return completed.stdout.strip()
