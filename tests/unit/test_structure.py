"""The rules of the package's shape: import direction, public names, what an import may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cupaged

ROOT = Path(__file__).resolve().parents[2]


def imported(path: Path) -> set[str]:
    """Absolute names of the modules a file imports anywhere; relative ones are resolved."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    package = ("cupaged", *inside[:-1]) if inside[0] == "engine" else inside[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_imports_point_one_way():
    """engine -> cupaged -> cuda; only the command line of the server looks at the engine."""
    for path in sources("cupaged"):
        if path.name != "serve.py":
            assert not [m for m in imported(path) if within(m, "cupaged.engine")], path
    assert not list((ROOT / "cuda").rglob("*.py")), (
        "cuda/ is device code; __init__.py shadows NVIDIA's package"
    )


def test_engine_is_imported_under_one_name():
    """`import engine` would make a second copy of every class."""
    for folder in ("cupaged", "engine", "tests", "benchmarks"):
        for path in sources(folder):
            assert not [m for m in imported(path) if within(m, "engine")], path


WITHOUT_TORCH = [
    *("block_pool", "block_tables", "prefix_hash", "block_manager", "group_memory", "pinned", "plan"),
    *("preemption", "request", "scheduler", "accounting", "reservation"),
]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_scheduler_does_not_know_torch(module):
    path = ROOT / "engine" / f"{module}.py"
    assert not [m for m in imported(path) if within(m, "torch")]


def test_kernels_are_plain_device_code():
    for path in (ROOT / "cuda").glob("*.cu*"):
        text = path.read_text()
        for word in ("<<<", "std::", "torch", "#include <vector"):
            assert word not in text, f"{word} in {path.name}"


@pytest.mark.parametrize("statement", ["import cupaged", "import cupaged.ops", "import cupaged.engine"])
def test_an_import_loads_no_backend(statement):
    code = (
        f"import sys; {statement}; print([m for m in ('cupy', 'numba', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "place"), [("cupaged", "cupaged"), ("cupaged.engine", "engine")])
def test_names_are_known_before_they_are_used(name, place):
    """To completion, by ``dir``, and to editors, which run nothing; torch stays unloaded."""
    code = f"import sys, {name} as m; print(*m.__all__); print(*dir(m)); print('torch' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    public, names, torch_loaded = output.stdout.splitlines()
    assert {*public.split(), "__doc__", "__path__"} <= set(names.split())
    assert torch_loaded == "False"
    tree = ast.parse((ROOT / place / "__init__.py").read_text())
    blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    shown = {a.name for b in blocks for n in b.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert shown == set(public.split()) - {"__version__"}


def test_public_names():
    """A change here is a change for users: say so in the CHANGELOG."""
    assert sorted(cupaged.__all__) == [
        "__version__",
        "copy_blocks",
        "merge_attention_states",
        "paged_attention",
        "reshape_and_cache",
        "swap_blocks",
    ]
    for name in cupaged.__all__:
        assert getattr(cupaged, name)
    with pytest.raises(AttributeError, match="no attribute 'paged_atention'"):
        cupaged.paged_atention  # noqa: B018
