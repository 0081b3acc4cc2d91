"""numba's cache on disk is optional: whatever is wrong with it, kernels run, and it is said once."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest
from numba import types
from numba.core.caching import CompileResultCacheImpl

from cupaged.backends.cpu import disk_cache

ROOT = Path(__file__).resolve().parents[2]


SIGNATURE = types.int64(types.int64)


def double(number):
    return 2 * number


def compiled(stamp: str = "1"):
    return disk_cache.cfunc(double, SIGNATURE, stamp)


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    disk_cache._warn_damaged.cache_clear()
    disk_cache._warn_not_kept.cache_clear()


def run() -> bool:
    """Run the function as a process that starts now would; gives whether it was found in the cache."""
    function = compiled()
    assert function.ctypes(21) == 42
    return bool(function.cache_hits)


def damage(path: Path, kind: str, seed: int) -> None:
    draw = random.Random(seed)
    content = bytearray(path.read_bytes())
    if kind == "cut":
        del content[draw.randrange(len(content)) :]
    elif kind == "flipped":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "garbage":
        content[:] = draw.randbytes(draw.randint(1, 1000))
    else:
        content.clear()
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("kind", ["empty", "cut", "flipped", "garbage"])
def test_a_damaged_file_is_made_again(tmp_path, caplog, seed, suffix, kind):
    assert (run(), run()) == (False, True)
    (path,) = tmp_path.rglob(f"*{suffix}")
    damage(path, kind, seed)
    assert run() is False
    assert [record.getMessage() for record in caplog.records] == [
        f"a compiled CPU kernel is damaged and compiled again: {path}"
    ]
    assert run() is True  # it is whole again


def test_what_another_version_of_numba_wrote_is_not_read(tmp_path, monkeypatch, caplog):
    run()
    monkeypatch.setattr(numba, "__version__", "99.0")
    assert (run(), run()) == (False, True)
    assert caplog.text == ""


def test_what_another_version_of_the_kernels_wrote_is_not_read(caplog):
    assert [bool(compiled(stamp).cache_hits) for stamp in ("1", "1", "2", "2")] == [False, True, False, True]
    assert caplog.text == ""


def test_files_without_a_checksum_are_damaged_ones(tmp_path, caplog):
    """As numba writes them, and wrote them for earlier versions of this package."""
    numba.cfunc(SIGNATURE, cache=True)(double)
    assert list(tmp_path.rglob("*.nbi"))
    assert (run(), run()) == (False, True)
    assert "compiled again" in caplog.text


def test_a_full_disk(tmp_path, caplog):
    """Every write beyond 64 bytes fails, as the first kernel is compiled and as the next one is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        assert (run(), run()) == (False, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (record,) = caplog.records
    assert "not kept" in record.getMessage()
    assert str(tmp_path) in record.getMessage()
    assert "NUMBA_CACHE_DIR" in record.getMessage()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert (run(), run()) == (False, True)


def test_a_directory_that_goes_away(tmp_path, monkeypatch, caplog):
    save = disk_cache._OptionalCache.save_overload

    def save_after_that(self, sig, data):
        shutil.rmtree(tmp_path)
        tmp_path.write_text("a file")
        save(self, sig, data)

    monkeypatch.setattr(disk_cache._OptionalCache, "save_overload", save_after_that)
    assert compiled().ctypes(1) == 2
    assert "not kept" in caplog.text


def test_no_directory_to_write_to(monkeypatch, caplog):
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    assert (run(), run()) == (False, False)
    (record,) = caplog.records
    assert "not kept" in record.getMessage()


@pytest.mark.matrix
def test_the_kernels_use_it(tmp_path):
    code = (
        "import torch, cupaged\n"
        "cache = torch.arange(2 * 2 * 8 * 8.0).reshape(2, 2, 1, 8, 8)\n"
        "cupaged.copy_blocks(cache, torch.tensor([[0, 1]]))\n"
        "print(torch.equal(cache[0], cache[1]))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def outputs() -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr.strip()

    assert outputs() == ("True", "")
    for path in tmp_path.rglob("*.nb?"):
        path.write_bytes(b"")
    printed, said = outputs()
    assert printed == "True"
    assert said.startswith("a compiled CPU kernel is damaged and compiled again: ")
