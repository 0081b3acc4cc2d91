"""Check the language of docstrings: a first line is a sentence, not a riddle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folders and modules whose docstrings have been rewritten. Add yours; at the end this is FOLDERS.
DONE = (
    "benchmarks",
    "cupaged/backends/cpu",
    "cupaged/backends/cuda",
    "cupaged/backends/__init__.py",
    "cupaged/backends/reference.py",
    "cupaged/__init__.py",
    "cupaged/checks.py",
    "cupaged/compile.py",
    "cupaged/device.py",
    "cupaged/dlpack.py",
    "cupaged/ops.py",
    "cupaged/params.py",
    "cupaged/paths.py",
    "cupaged/quantisation.py",
    "cupaged/registration.py",
    "cupaged/serve.py",
    "engine/memory",
    "engine/sampling",
    "engine/model",
    "engine/__init__.py",
    "engine/scheduling",
    "engine/server",
    "engine/config.py",
    "engine/llm.py",
    "engine/llm_engine.py",
    "engine/output_processor.py",
    "engine/outputs.py",
    "engine/prompts.py",
    "engine/sampling_params.py",
    "engine/validation.py",
)
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


@pytest.mark.parametrize("place", DONE)
def test_docstrings_begin_as_sentences(place):
    found = {str(path.relative_to(ROOT)): list(faults(path.read_text())) for path in modules(place)}
    assert found
    assert not {path: lines for path, lines in found.items() if lines}


def test_every_module_can_be_read_and_done_places_exist():
    for folder in FOLDERS:
        for path in modules(folder):
            list(faults(path.read_text()))
    for place in DONE:
        assert place.split("/")[0] in FOLDERS
        assert (ROOT / place).exists()


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
