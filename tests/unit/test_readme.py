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


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: re.search(r"import (\w+)", s)[1])
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
