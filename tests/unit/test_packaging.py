"""The wheel, built and installed in a fresh environment, imports and compiles from there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("cupaged", "cuda", "engine"):  # a copy: a build leaves its own folders in the tree
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel, and links to the dependencies that this one has."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("cupaged", "__editable__", "__pycache__")):
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str, cwd: Path) -> str:
    done = subprocess.run([python, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_is_small_and_pure(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1_000_000
    names = zipfile.ZipFile(wheel).namelist()
    page = [f"cupaged/engine/server/page/{path.name}" for path in (ROOT / "engine/server/page").iterdir()]
    assert len(page) > 5
    for expected in ("cupaged/cuda/common.cuh", "cupaged/engine/__init__.py", "cupaged/py.typed", *page):
        assert expected in names
    assert "cupaged/cuda/__init__.py" not in names
    assert not [n for n in names if n.startswith(("cuda/", "engine/", "tests/"))]


@pytest.mark.matrix  # to compile, it has to import
@pytest.mark.parametrize("from_checkout", [False, True])
def test_installed_package_imports(installed, tmp_path, from_checkout):
    """Also when Python is started in the checkout's root, where `cupaged/` shadows the installed one."""
    code = "import cupaged, cupaged.engine, cupaged.compile; print(cupaged.__file__)"
    place = run(installed, "-c", code, cwd=ROOT if from_checkout else tmp_path).strip()
    assert Path(place).is_relative_to(ROOT if from_checkout else installed.parents[1])


def test_installed_package_compiles(installed, tmp_path):
    pytest.importorskip("cupy")
    out = tmp_path / "cubins"
    options = ["--arch", "90a", "--only", "copy_blocks", "--out", str(out)]
    listing = run(installed, "-m", "cupaged.compile", *options, cwd=tmp_path)
    assert "copy_blocks" in listing
    assert list(out.rglob("*.cubin"))
