"""The rules of the package's shape: import direction, public names, what an import may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path

import pytest

import cupaged
from cupaged import serve

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 400  # lines of a file


@cache
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


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("cupaged", *parts) if parts[0] == "engine" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_imports_point_one_way():
    """engine -> cupaged -> cuda; only the server's command line looks at the engine."""
    for path in sources("cupaged"):
        if path.name not in ("serve.py", "options.py", "ray_app.py"):
            assert not [m for m in imported(path) if within(m, "cupaged.engine")], path
    assert not list((ROOT / "cuda").rglob("*.py")), (
        "cuda/ is device code; __init__.py shadows NVIDIA's package"
    )


def test_engine_is_imported_under_one_name():
    """`import engine` would make a second copy of every class."""
    for folder in ("cupaged", "engine", "tests", "benchmarks"):
        for path in sources(folder):
            assert not [m for m in imported(path) if within(m, "engine")], path


def own_modules(names: set[str], modules: Collection[str]) -> set[str]:
    """Return the modules among names; a package is meant where nothing in it is."""
    found = names & set(modules)
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


# A package of the engine imports those before it and the modules that stand in no package.
FLOORS = ("memory", "scheduling", "sampling", "model")


@pytest.mark.parametrize("floor", FLOORS)
def test_the_engines_packages_do_not_import_upwards(floor):
    """Nor what stands on top of them: the engine itself, and the server."""
    above = [f"cupaged.engine.{name}" for name in FLOORS[FLOORS.index(floor) + 1 :]]
    above += [f"cupaged.engine.{name}" for name in ("server", "llm_engine", "llm", "output_processor")]
    paths = sources(f"engine/{floor}")
    assert paths
    for path in paths:
        assert not [m for m in imported(path) if any(within(m, package) for package in above)], path


@pytest.mark.parametrize("folder", ["cupaged", "engine", "benchmarks"])
def test_no_modules_import_each_other(folder):
    """Not by way of others either, nor for types alone."""
    modules = {module_name(path): path for path in sources(folder)}
    imports = {name: own_modules(imported(path), modules) - {name} for name, path in modules.items()}
    while leaves := [name for name, others in imports.items() if not others & imports.keys()]:
        for name in leaves:
            del imports[name]
    assert not imports


def test_what_the_product_uses_is_not_in_its_tests():
    for folder in ("cupaged", "engine", "benchmarks"):
        for path in sources(folder):
            assert not [m for m in imported(path) if within(m, "tests")], path


def test_files_are_short():
    for folder in ("cupaged", "engine"):
        for path in sources(folder):
            assert len(path.read_text().splitlines()) <= LONGEST, path


@pytest.mark.parametrize("floor", ["memory", "scheduling"])
def test_the_scheduler_does_not_know_torch(floor):
    for path in sources(f"engine/{floor}"):
        assert not [m for m in imported(path) if within(m, "torch")], path


def test_kernels_are_plain_device_code():
    for path in (ROOT / "cuda").glob("*.cu*"):
        text = path.read_text()
        for word in ("<<<", "std::", "torch", "#include <vector"):
            assert word not in text, f"{word} in {path.name}"


def test_an_import_loads_no_backend():
    code = (
        "import sys, cupaged, cupaged.ops, cupaged.engine\n"
        "print([m for m in ('cupy', 'numba', 'transformers') if m in sys.modules])"
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
        "act_and_mul",
        "concat_and_cache_mla",
        "copy_blocks",
        "merge_attention_states",
        "mla_attention",
        "paged_attention",
        "raw_kernel",
        "reshape_and_cache",
        "rms_norm",
        "rope_and_cache",
        "sample",
        "swap_blocks",
    ]
    for name in cupaged.__all__:
        assert getattr(cupaged, name)
    with pytest.raises(AttributeError, match="no attribute 'paged_atention'"):
        cupaged.paged_atention  # noqa: B018


WITH_RAY = {"deployment", "front", "gateway", "ingress", "ray_router", "ray_app"}


def test_ray_is_for_replicas_only(monkeypatch, capsys):
    """Who has not installed the extra never meets it: not the server, nor what its options say."""
    for folder in ("cupaged", "engine"):
        for path in sources(folder):
            if path.stem not in WITH_RAY:
                assert not [m for m in imported(path) if within(m, "ray")], path
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "cupaged.engine.replicas.front", raising=False)
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")  # the command sets it
    assert serve.main(["--replicas", "2", "--port", "0", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: --replicas needs Ray")
    assert "pip install 'cupaged[ray]'" in error
