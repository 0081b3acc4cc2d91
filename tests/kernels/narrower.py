"""Run tests of the CPU kernels as on a CPU with narrower registers, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cupaged.backends.cpu import ir

_ROOT = Path(__file__).resolve().parents[2]
_FEATURES = ("avx", "avx2", "fma", "f16c", "bmi", "bmi2", "popcnt", "lzcnt", "sse4.2")
# What makes numba compile for a CPU with AVX2 at most; another CPU than one with AVX-512 is narrower itself.
_HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in _FEATURES)}


def check_on_narrower_cpu(*arguments: str) -> None:
    """Check that pytest passes with these arguments there, and skips nothing."""
    environment = {**os.environ, **(_HASWELL if ir.NATIVE == 16 else {})}
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
