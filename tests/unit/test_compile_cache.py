"""The cache of compiled kernels: what makes an entry another one, and what makes it unusable."""

from __future__ import annotations

import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from cupaged.backends.cuda import compile as kc
from cupaged.backends.cuda import precompile
from cupaged.backends.cuda import specs as kernel_specs
from cupaged.backends.cuda.reachable import reachable

SPEC = kernel_specs.copy_blocks(16)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the kernels that a test may edit."""
    copy = tmp_path / "cuda"
    shutil.copytree(kc.cuda_dir(), copy)
    monkeypatch.setattr(kc, "cuda_dir", lambda: copy)
    return copy


def test_the_second_time_is_a_hit(tmp_path):
    assert kc.kept(SPEC, "80", tmp_path) is None
    first = kc.cubin(SPEC, "80", tmp_path)
    second = kc.cubin(SPEC, "80", tmp_path)
    assert (first.hit, second.hit) == (False, True)
    assert kc.kept(SPEC, "80", tmp_path) == second
    assert (second.path, second.usage) == (first.path, first.usage)
    assert first.path.read_bytes() == first.content == second.content
    assert first.content[:4] == b"\x7fELF"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".cubin", ".json"]  # no temporary stays


def test_a_cubin_is_whole(tmp_path):
    """Its program headers stand at the very end, where a byte was lost once."""
    content = kc.cubin(SPEC, "90a", tmp_path).path.read_bytes()
    assert kc.whole_elf(content) == content
    assert kc.whole_elf(content[:-1]) == content
    assert len(content) == int.from_bytes(content[32:40], "little") + 56 * content[56]


def test_arch_macros_and_every_reachable_text_are_part_of_the_digest(sources):
    base = kc.digest(SPEC, "80")
    assert base == kc.digest(SPEC, "80")
    assert kc.digest(SPEC, "86") != base
    assert kc.digest(kernel_specs.copy_blocks(1), "80") != base
    for name in ("copy_blocks.cu", "common.cuh"):
        with (sources / name).open("a") as file:
            file.write("// changed\n")
        assert kc.digest(SPEC, "80") != base, name
        base = kc.digest(SPEC, "80")
    with (sources / "softmax.cuh").open("a") as file:
        file.write("// not included by copy_blocks.cu\n")
    assert kc.digest(SPEC, "80") == base


def test_the_options_and_the_compilers_version_are_part_of_the_digest(monkeypatch):
    base = kc.digest(SPEC, "80")
    with monkeypatch.context() as patch:
        patch.setattr(kc, "OPTIONS", (*kc.OPTIONS, "-lineinfo"))
        assert kc.digest(SPEC, "80") != base
    monkeypatch.setattr(kc, "nvrtc_version", lambda: (99, 0))
    assert kc.digest(SPEC, "80") != base


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "gone"])
def test_a_damaged_entry_is_compiled_again(tmp_path, suffix, damage):
    whole = kc.cubin(SPEC, "80", tmp_path)
    path = whole.path.with_suffix(suffix)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:-7], "empty": b"", "flipped": flipped}[damage])
    binary = whole.path.read_bytes() if suffix == ".json" else None
    again = kc.cubin(SPEC, "80", tmp_path)
    if suffix == ".cubin" or damage != "flipped":  # a flip in the JSON may hit text that nothing depends on
        assert not again.hit
    assert again.usage == whole.usage
    assert again.path.read_bytes()[:4] == b"\x7fELF"
    assert binary is None or again.path.read_bytes() == binary
    assert kc.cubin(SPEC, "80", tmp_path).hit


def test_writers_may_race(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: kc.cubin(SPEC, "80", tmp_path), range(8)))
    assert len({compiled.path for compiled in found}) == 1
    assert kc.cubin(SPEC, "80", tmp_path).hit


@pytest.fixture(params=["unwritable", "full"])
def bad_directory(request, tmp_path):
    """A directory that takes no kernel: it cannot be made, or there is room for 64 bytes a file."""
    kc._warn_not_kept.cache_clear()
    if request.param == "unwritable":
        (tmp_path / "file").write_text("")
        yield tmp_path / "file" / "below"
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "kernels").glob("*")) == list((tmp_path / "kernels").glob(".*")) == []


def test_a_directory_that_takes_nothing_prevents_no_launch(bad_directory, tmp_path, caplog):
    for _ in range(2):
        compiled = kc.cubin(SPEC, "80", bad_directory)
        assert (compiled.hit, compiled.path) == (False, None)
        assert compiled.content[:4] == b"\x7fELF"
        assert compiled.usage[SPEC.entry].registers > 0
    (record,) = caplog.records  # said once
    assert str(bad_directory) in record.getMessage()
    assert "CUPAGED_CACHE_DIR" in record.getMessage()


def test_the_command_line_says_that_its_directory_takes_nothing(bad_directory, capsys):
    arguments = ["--arch", "80", "--only", "copy_blocks[unit_bytes=16]", "--out", str(bad_directory)]
    assert precompile.main(arguments) == 1
    assert f"error: {bad_directory / 'kernels'} cannot be written" in capsys.readouterr().err


def test_the_directory_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "chosen"))
    assert kc.cache_dir() == tmp_path / "chosen" / "kernels"
    monkeypatch.delenv("CUPAGED_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kc.cache_dir() == tmp_path / "xdg" / "cupaged" / "kernels"


def test_what_the_command_line_compiled_is_found_under_that_cache_dir(tmp_path, monkeypatch, capsys):
    """Run it in this process: `test_packaging` starts the command."""
    assert precompile.main(["--arch", "90a", "--out", str(tmp_path), "--only", "copy_blocks"]) == 0
    assert "copy_blocks[unit_bytes=16]" in capsys.readouterr().out
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kc, "compile_cubin", None)  # nothing is compiled again
    for unit_bytes in (16, 1):
        assert kc.cubin(kernel_specs.copy_blocks(unit_bytes), "90a").hit


def test_the_command_line_takes_the_rare_kernels_too_when_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(precompile, "compile_all", lambda work, *options: asked.append(work) or [])
    assert precompile.main(["--arch", "80"]) == precompile.main(["--arch", "80", "--all"]) == 0
    usual, everything = (tuple(spec for spec, _ in work) for work in asked)
    assert usual == kernel_specs.variants("80")
    assert everything == reachable("80")


@pytest.mark.parametrize("arguments", [["--arch", "61"], ["--only", "nothing"]])
def test_the_command_line_refuses_what_it_cannot_do(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        precompile.main(arguments)
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "supported", "arch"),
    [
        ((9, 0), (80, 90, 100), "90a"),
        ((8, 7), (80, 86, 89), "86"),
        ((8, 0), (75, 80), "80"),
        ((12, 1), (100, 120), "120"),
    ],
)
def test_the_arch_of_a_device(capability, supported, arch):
    assert kc.arch_for_capability(*capability, supported) == arch


def test_an_arch_the_compiler_has_dropped_is_an_error():
    with pytest.raises(RuntimeError, match=r"7\.0"):
        kc.arch_for_capability(7, 0, (75, 80, 90))
