"""The README's Python snippets run as they stand, and its figures are those of the result file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import readme_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    "snippet",
    # The demo model is downloaded and converted first.
    [pytest.param(s, marks=pytest.mark.matrix) if "LLM(" in s else s for s in SNIPPETS],
    ids=lambda s: re.search(r"import (\w+)", s)[1],
)
def test_a_snippet_runs_and_prints_what_it_says(snippet, tmp_path):
    done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for line in re.findall(r"print\(.*\)  # (.*)", snippet):
        assert line in done.stdout


def test_the_tables_are_what_the_results_say(tmp_path):
    assert readme_table.main(["--check"]) == 0
    changed = tmp_path / "README.md"
    changed.write_text(re.sub(r"\| decode \| (.*?) \|", "| decode | 1 x 1 |", README, count=1))
    assert readme_table.main(["--check"], changed) == 1
    assert readme_table.main([], changed) == 0
    assert changed.read_text() == README


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_environment_variable_is_listed():
    table = README.partition("## Environment variables")[2]
    read = {
        name
        for path in sources("cupaged", "engine", "tests", "benchmarks")
        for name in re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text())
    }
    assert {"CUPAGED_CACHE_DIR", "CUPAGED_BACKEND", "CXX"} <= read, "the search finds them"
    assert not [name for name in sorted(read - {"PATH"}) if f"`{name}" not in table]
    listed = set(re.findall(r"^\| .*?`(CUPAGED_\w+)", table, re.MULTILINE))
    assert listed <= read, "one that nothing reads is listed"


def test_the_tree_is_the_tree():
    """What it names is there, and every package is in it."""
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL)[1]
    folders: list[str] = []
    listed = set()
    for line in tree.splitlines():
        name = line.split()[0]
        folders[(len(line) - len(line.lstrip())) // 2 :] = [name]
        place = ROOT / "".join(folders)
        assert place.is_dir(), line
        listed.add(place)
        for file in re.findall(r"[\w]+\.py", line):
            assert (place / file).exists(), f"{file} in {line!r}"
    packages = {path.parent for path in sources("cupaged", "engine")}
    assert not packages - listed
