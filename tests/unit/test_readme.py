"""The README's Python snippets run as they stand, and its figures are those of the result file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_table_is_the_result_file():
    cases = json.loads((ROOT / "benchmarks/results/kernels-cpu.json").read_text())["results"]["cases"]
    rows = re.findall(r"^\| (?:decode|prefill) \|.*\| ([\d,]+) \|.*\| ([\d,]+) \|.*\|$", README, re.MULTILINE)
    times = {(f"{c['paged_s'] * 1e6:,.0f}", f"{c['dense_s'] * 1e6:,.0f}") for c in cases}
    assert rows
    assert set(rows) <= times
