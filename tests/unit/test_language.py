"""Check the language of docstrings: a first line is a sentence, not a riddle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FOLDERS = ("cupaged", "engine", "benchmarks")

WRONG_FIRST_WORDS = {"what", "how", "whether", "who", "where", "of", "so", "those", "that"}
WRONG_WORDS = {"gives"}


def faults(source: str) -> Iterator[str]:
    """Yield the line and the first docstring line of what has a fault."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        docstring = ast.get_docstring(node) if isinstance(node, kinds) else None
        if not docstring:
            continue
        first_line = docstring.splitlines()[0]
        words = [word.strip(".,:;()`'\"").lower() for word in first_line.split()]
        if words[0] in WRONG_FIRST_WORDS or WRONG_WORDS & set(words):
            yield f"line {getattr(node, 'lineno', 1)}: {first_line}"


def modules(place: str) -> list[Path]:
    path = ROOT / place
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize("place", FOLDERS)
def test_docstrings_begin_as_sentences(place):
    found = {str(path.relative_to(ROOT)): list(faults(path.read_text())) for path in modules(place)}
    assert found
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "source",
    [
        '"""How blocks are found."""',
        'class A:\n    """Of one sequence."""',
        'def f():\n    """Whether it runs."""',
        'async def f():\n    """Find beams; gives the other rows."""',
        'class A:\n    def f(self):\n        """What was held back."""',
    ],
)
def test_riddles_are_found(source):
    assert len(list(faults(source))) == 1


def test_sentences_are_not():
    assert not list(faults('"""Return whether it runs.\n\nWhat follows is free: it gives reasons."""'))
