"""The directories of the user."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the directory for cached files: ``CUPAGED_CACHE_DIR``, or `cupaged` in the user's cache."""
    if chosen := os.environ.get("CUPAGED_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cupaged"
