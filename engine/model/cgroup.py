"""How much memory the limits of a container leave: cgroups of both versions, as mounted.

What is free on the machine says nothing inside a container, whose processes are killed beyond its limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Of each version: the limits, what is in use, and of that the page cache that is given back at once.
_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return what this process may take beyond what is in use; None where no limit is found.

    The groups that its own one is in have limits too, and count what all in them use.

    Args:
        root: where ``proc`` and the mount points are.
    """
    found = []
    for version, group, top in _groups(root):
        limits, usage, reclaimable = _FILES[version]
        for directory in (group, *group.parents):
            limited = [value for name in limits if (value := _number(directory / name)) is not None]
            if limited:
                used = (_number(directory / usage) or 0) - _statistic(directory, reclaimable)
                found.append(max(0, min(limited) - max(0, used)))
            if directory == top:
                break
    return min(found, default=None)


def _groups(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield each hierarchy that counts memory: version, the process's directory in it, and mount point."""
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
        # The mount may show a part of the hierarchy, from the container's own group on.
        inside = own.is_relative_to(shown) and ".." not in own.parts
        group = top / own.relative_to(shown) if inside else top
        yield version, group if group.is_dir() else top, top


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # not Linux
        return []


def _unescape(field: str) -> str:
    """Put back spaces and the like, which stand as octal numbers in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _number(file: Path) -> int | None:
    """Return a file's number; None for "max", and where there is no such file, as in the root group."""
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
