"""Choose the device to run on: the NVIDIA driver, torch and CuPy have to agree.

    python -m cupaged.device

prints the extra of this package that fits the NVIDIA driver, or an empty line. `make` runs it before anything
is installed, so this part needs only the standard library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OLDEST_CUDA, NEWEST_CUDA = 12, 13  # with an extra of this package
_OR_CPU = "or ask for the CPU: device='cpu' (--device cpu)"


def driver_cuda_version() -> int | None:
    """Return the major version of the newest CUDA that the NVIDIA driver supports; None without a GPU."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    completed = subprocess.run([tool], capture_output=True, text=True)
    # "CUDA Version: 12.8", and "CUDA UMD Version: 13.3" from driver 610 on.
    match = re.search(r"CUDA[\w ]* Version\s*:\s*(\d+)", completed.stdout)
    return int(match[1]) if completed.returncode == 0 and match else None


def extra(driver: int | None) -> str:
    """Return the extra of this package for a driver's CUDA version. Drivers support older versions too."""
    return "" if driver is None or driver < OLDEST_CUDA else f"cuda{min(driver, NEWEST_CUDA)}"


def choose_device(wanted: str | None) -> tuple[torch.device, str]:
    """Return the device to run on, and a text for the user that says why.

    Args:
        wanted: "cpu", "cuda", "cuda:1", or None for a GPU if there is one.

    Raises:
        ValueError: ``wanted`` does not exist, or ``CUPAGED_BACKEND`` names no backend.
        RuntimeError: there is a GPU, but the installed packages cannot use it; the message names what to
            install. The CPU is used in its place only if ``wanted`` says so.
    """
    import torch

    from . import backends

    backend = os.environ.get("CUPAGED_BACKEND")
    try:
        device = torch.device(wanted or "cuda")
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:<index>', got {wanted!r}")
    why = "as asked"
    if device.type == "cuda" and not torch.cuda.is_available():
        driver = driver_cuda_version()
        if driver is not None and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1"):
            raise RuntimeError(_why_unusable(driver))
        why = f"torch {torch.__version__} sees no CUDA device"
        if wanted is not None:
            raise ValueError(f"device is {wanted!r}, and {why}")
        device = torch.device("cpu")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device is {wanted!r}, and the CUDA devices are {torch.cuda.device_count()}")
        properties = torch.cuda.get_device_properties(device)
        capability = f"compute capability {properties.major}.{properties.minor}"
        why = f"{properties.name}, {capability}, CUDA {torch.version.cuda}"
    try:
        backends.for_device(device.type)
    except ImportError as error:
        raise RuntimeError(f"{error}, {_OR_CPU}" if device.type == "cuda" else str(error)) from error
    return device, f"{backend or device.type} backend: {why}"


def _why_unusable(driver: int) -> str:
    """Return why torch does not see the GPU, and the remedy."""
    import torch

    built_for = torch.version.cuda
    said = f"there is an NVIDIA driver for CUDA {driver}, and torch {torch.__version__}"
    if driver < OLDEST_CUDA:
        return f"{said} needs CUDA {OLDEST_CUDA} or newer: update the driver, {_OR_CPU}"
    if built_for is not None and int(built_for.partition(".")[0]) <= driver:
        return f"{said} cannot use it: `python -c 'import torch; torch.cuda.init()'` says why; {_OR_CPU}"
    build = "is built for the CPU" if built_for is None else f"is built for CUDA {built_for}"
    fitting = min(driver, NEWEST_CUDA)
    return (
        f"{said} {build}: install torch for CUDA {fitting} (see https://pytorch.org/get-started) and "
        f"cupy-cuda{fitting}x, {_OR_CPU}"
    )


if __name__ == "__main__":
    print(extra(driver_cuda_version()))
