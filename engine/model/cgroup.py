"""Read how much memory the cgroup limits (v1 and v2) of a container leave.

The free memory of the machine is no bound in a container, whose processes are killed beyond its own limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# By version: files of the limits, file of the usage, and statistic of the reclaimable page cache in it.
_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the number of bytes that this process can still allocate; None where there is no limit.

    The limits of all ancestors of the process's group count, with the usage of all processes in them.

    Args:
        root: directory that contains ``proc`` and the mount points.
    """
    available = []
    for version, group, top in _groups(root):
        limits, usage, reclaimable = _FILES[version]
        for directory in (group, *group.parents):
            limited = [value for name in limits if (value := _number(directory / name)) is not None]
            if limited:
                used = (_number(directory / usage) or 0) - _statistic(directory, reclaimable)
                available.append(max(0, min(limited) - max(0, used)))
            if directory == top:
                break
    return min(available, default=None)


def _groups(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield (version, directory of the process's group, mount point) of each hierarchy that limits memory."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        version, _, options = filesystem.split(" ", 2)
        if version not in paths or (version == "cgroup" and "memory" not in re.split("[ ,]", options)):
            continue
        shown, place = (_unescape(field) for field in mount.split(" ")[3:5])
        top = root / place.lstrip("/")
        own = PurePosixPath(paths[version])
        # The mount may show only the part of the hierarchy below the container's own group.
        inside = own.is_relative_to(shown) and ".." not in own.parts
        group = top / own.relative_to(shown) if inside else top
        yield version, group if group.is_dir() else top, top


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # not Linux
        return []


def _unescape(field: str) -> str:
    """Replace the octal escapes of mountinfo, such as those of spaces."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _number(file: Path) -> int | None:
    """Return the number in a file; None for "max" or if there is no such file, as in the root group."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistic(directory: Path, name: str) -> int:
    for line in _lines(directory / "memory.stat"):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
