"""The README and the other documents: snippets run, figures are those of the results, and what they name is
there."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from collections import defaultdict
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import cupaged
from benchmarks import readme_table
from cupaged import serve
from cupaged.engine import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
OPERATORS = (ROOT / "docs" / "operators.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README + OPERATORS, re.DOTALL)
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [
    *GUIDES,
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "results" / "README.md",
    *sorted((ROOT / "tests").glob("*/README.md")),
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "snippet",
    # The demo model is downloaded and converted first.
    [pytest.param(s, marks=pytest.mark.matrix) if "LLM(" in s else s for s in SNIPPETS],
    ids=lambda s: re.search(r"import (\w+)", s)[1],
)
def test_a_snippet_runs_and_prints_what_it_says(snippet, capsys):
    exec(snippet, {"__name__": "__main__"})  # it has what it imports; a process would import torch again
    printed = capsys.readouterr().out
    assert printed.strip()
    for line in re.findall(r"print\(.*\)  # (.*)", snippet):
        assert line in printed


def test_the_readme_is_short():
    assert len(README.split()) < 1200


# -- figures -----------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path) -> Path:
    """What `readme_table` reads and writes."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    return tmp_path


def test_tables_and_charts_are_what_the_results_say():
    assert readme_table.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("docs/paper.md", "98.4 (96.3)"),
        ("docs/benchmarks.md", "| decode | 32 x 160 |"),
        ("docs/speed.svg", "3.0x"),
    ],
)
def test_a_figure_that_no_result_has_is_found_and_mended(copy, name, figure):
    document = copy / name
    right = document.read_text()
    assert figure in right
    document.write_text(right.replace(figure, "1.0", 1))
    assert readme_table.main(["--check"], copy) == 1
    assert readme_table.main([], copy) == 0
    assert document.read_text() == right
    assert readme_table.main(["--check"], copy) == 0


@pytest.mark.parametrize("name", ["kernels-cpu", "throughput-cpu", "scheduler-cpu", "paper-memory"])
def test_figures_follow_the_results(copy, name):
    """Each number of a result that is shown anywhere; here all of them are larger by a half."""
    result = copy / "benchmarks" / "results" / f"{name}.json"
    larger = re.sub(r"\d+\.\d+(?:e-?\d+)?", lambda match: repr(1.5 * float(match[0])), result.read_text())
    result.write_text(larger)
    before = {path.name: path.read_text() for path, _ in readme_table.documents(copy)}
    changed = {path.name for path, text in readme_table.documents(copy) if text != before[path.name]}
    shown = {"paper-memory": {"paper.md"}}
    assert changed >= shown.get(name, {"benchmarks.md"})


def test_a_result_that_is_not_there_yet_is_named(copy):
    (copy / "docs" / "paper.md").write_text("<!-- allocators-abacus.json -->\n<!-- end -->\n")
    text = readme_table.filled(copy, copy / "docs" / "paper.md")
    assert text == "<!-- allocators-abacus.json -->\nNot measured yet.\n<!-- end -->\n"


def test_every_result_is_shown():
    shown = "".join((ROOT / "docs" / name).read_text() for name in ("benchmarks.md", "paper.md"))
    assert not [
        path.name for path in (ROOT / "benchmarks" / "results").glob("*.json") if path.name not in shown
    ]


# -- what documents name -----------------------------------------------------------------------------


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def definitions() -> dict[str, dict[str, set[str]]]:
    """Of every Python file its functions and classes, and of each class its methods and attributes."""
    found: dict[str, dict[str, set[str]]] = {}
    for path in sources("cupaged", "engine", "tests", "benchmarks"):
        names = found[name_of(path)] = defaultdict(set)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                names[node.name] = set()
            elif isinstance(node, ast.ClassDef):
                for part in ast.walk(node):
                    if isinstance(part, ast.FunctionDef):
                        names[node.name].add(part.name)
                    elif isinstance(part, (ast.Assign, ast.AnnAssign)):
                        targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                        names[node.name] |= {
                            each.attr if isinstance(each, ast.Attribute) else each.id
                            for target in targets
                            for each in ast.walk(target)
                            if isinstance(each, (ast.Attribute, ast.Name))
                        }
    return found


def defines(file: str, name: str) -> bool:
    owner, _, attribute = name.partition(".")
    names = definitions()[file]
    return owner in names and (not attribute or attribute in names[owner])


def is_defined(name: str) -> bool:
    return any(defines(file, name) for file in definitions())


def code_spans(path: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", GUIDES, ids=name_of)
def test_files_and_members_that_are_named_exist(document):
    for span in code_spans(document):
        for path in re.findall(
            r"(?<![\w./~-])(?:[\w.-]+/)+(?:[\w-]+\.(?:py|md|cuh?|json|txt))?(?![\w/<*])", span
        ):
            assert (ROOT / path).exists(), f"{path} in `{span}`"
        if re.fullmatch(r"_?[A-Z]\w*[a-z]\w*\.\w+", span):
            assert is_defined(span), span


def test_contributing_names_what_is_there():
    """Every single word of code in it is one of the sources'."""
    files = [
        *sources("cupaged", "engine", "tests", "benchmarks"),
        *(ROOT / "cuda").iterdir(),
        ROOT / "Makefile",
    ]
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in files)))
    named = {span for span in code_spans(ROOT / "CONTRIBUTING.md") if re.fullmatch(r"[A-Za-z_]\w+", span)}
    assert len(named) > 30
    assert not sorted(named - words)


def test_an_option_costs_as_many_files_as_contributing_says():
    files = [*sources("cupaged"), *(ROOT / "cuda").iterdir()]
    named = [path for path in files if re.search(r"soft_cap|\bcap\b", path.read_text())]
    assert f"the {len(named)} files of `logits_soft_cap`" in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_picture_is_of_our_names():
    picture = re.search(r"```mermaid\n(.*?)```", README, re.DOTALL)[1]
    names = re.findall(r"\[\"(.*?)\"\]", picture)
    assert len(names) > 8
    assert not [name for name in names if not is_defined(name)]


def test_the_reading_order_leads_to_what_it_names():
    section = README.partition("## Reading order\n")[2].partition("\n## ")[0]
    lines = section.strip().splitlines()
    assert len(lines) == 10
    for line in lines:
        name, file = re.match(r"\d+\. \[`(.*?)`\]\((.*?)\): \w", line).groups()
        assert (ROOT / file).is_file()
        assert name == file or defines(file, name), line


def test_every_option_of_paged_attention_is_in_the_table():
    rows = re.search(r"\| option of `paged_attention`.*?\n\n", README, re.DOTALL)[0]
    named = set(
        re.findall(r"`(\w+)(?:=\w+)?`", "".join(line.split("|")[1] for line in rows.splitlines()[2:-1]))
    )
    parameters = inspect.signature(cupaged.paged_attention).parameters.values()
    assert named == {p.name for p in parameters if p.default is not inspect.Parameter.empty}


def test_every_setting_of_the_engine_is_in_the_table():
    rows = re.search(r"\| settings \|.*?\n\n", CONFIGURATION, re.DOTALL)[0]
    named = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in rows.splitlines()[2:-1]))
    assert sorted(named) == sorted(
        field.name for field in fields(EngineConfig) if field.name != "check_integrity"
    )


@pytest.mark.parametrize("document", GUIDES, ids=name_of)
def test_commands_have_the_targets_and_flags_they_are_given(document):
    text = document.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert not set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) - targets
    flags = {option for action in serve.parser()._actions for option in action.option_strings}
    for module, rest in re.findall(r"python (-m [\w.]+|benchmarks/\w+\.py)([^`\n]*)", text):
        name = module[3:].replace(".", "/").replace("cupaged/engine/", "engine/") + ".py"
        file = ROOT / (name if module.startswith("-m") else module)
        assert file.is_file(), module
        known = flags if file.name == "serve.py" else set(re.findall(r"\"(--[\w-]+)\"", file.read_text()))
        if file.name == "compile.py":  # whose command line is the backend's
            known = set(
                re.findall(r"\"(--[\w-]+)\"", (ROOT / "cupaged/backends/cuda/precompile.py").read_text())
            )
        assert not set(re.findall(r"--[a-z][\w-]*", rest)) - known - {"--help"}, rest


def test_every_environment_variable_is_listed():
    table = CONFIGURATION.partition("## Environment variables")[2]
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


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.name
)
def test_results_name_no_place_of_a_machine(path):
    assert re.findall(r'"(?:/|~|[A-Z]:)[^"]*"', path.read_text()) == []
