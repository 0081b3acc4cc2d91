"""Write tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterator


def header(*titles: str) -> Iterator[str]:
    """Yield the first two lines of a table."""
    yield line(*titles)
    yield "|" + "---|" * len(titles)


def line(*cells: str) -> str:
    """Return a line of a table."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
