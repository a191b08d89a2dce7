"""What the README shows is what the files say."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import record
import tables

README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_results_and_the_line_counts_those_of_the_files():
    assert tables.fill(README) == README, "run: python benchmarks/tables.py --write"


@pytest.mark.parametrize(
    "number", [r"(\d)\.\d ± \d", r"\| 1,\d(\d)\d \(", r"in (\d+)\.\d s \(", r"(\d) of \d+ ≥"]
)
def test_a_number_that_was_changed_by_hand_is_noticed(number):
    start, end = re.search(number, README).span(1)
    changed = README[:start] + str(int(README[start:end]) + 1) + README[end:]
    assert tables.fill(changed) == README


def commands(text):
    """Script and flags of each "python script.py ..." that has a line of its own."""
    text = text.replace("\\\n", " ")
    for name, flags in re.findall(r"^[^`\n]*python (\w+)\.py\b(.*)$", text, re.MULTILINE):
        if (ROOT / f"{name}.py").exists() and not re.search(r"\.\.\.|--help", flags):
            yield name, shlex.split(flags.partition("  #")[0])


def test_every_command_of_the_readme_and_of_the_headers_parses():
    texts = [README, *[ast.get_docstring(ast.parse(x.read_text())) for x in ROOT.glob("*.py")]]
    found = [command for text in texts for command in commands(text)]
    assert len(found) > 50
    for name, flags in found:
        tyro.cli(importlib.import_module(name).Args, args=flags)


def test_the_benchmarks_can_be_imported():
    """All but the one that is no more than its steps."""
    for path in (ROOT / "benchmarks").glob("*.py"):
        if path.stem != "where_time_goes":
            importlib.import_module(path.stem)


def test_every_script_and_benchmark_is_listed():
    for path in [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert path.name in README or path.name == "record.py", path.name


def test_every_raw_file_says_where_it_comes_from():
    """measured.csv: its command names a benchmark and one of its tasks; versions and machine are there."""
    rows = {row["file"]: row for row in record.read("measured")}
    files = {path.name for path in record.RESULTS.glob("*.csv")}
    assert set(rows) == files - {"measured.csv"}
    for row in rows.values():
        python, path, *words = row["command"].split()
        assert python == "python" and (ROOT / path).is_file(), row
        tasks = importlib.import_module(Path(path).stem) if words else None
        assert not words or words[0] in getattr(tasks, "TASKS", {}) | getattr(tasks, "SCRIPTS", {})
        assert all(row[name] for name in ("day", "machine", "python", *record.PACKAGES)), row


def test_links_lead_somewhere_and_the_page_is_light():
    links = re.findall(r"\]\(([^)]+)\)", README)
    local = {link for link in links if not link.startswith(("http", "#"))}
    missing = [link for link in local if not (ROOT / link).is_file()]
    assert not missing
    headings = {
        re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-")
        for x in re.findall(r"^#+ (.*)", README, re.M)
    }
    assert {link[1:] for link in links if link.startswith("#")} <= headings
    pictures = {link for link in local if link.startswith("assets/")}
    assert {f"assets/{path.name}" for path in (ROOT / "assets").iterdir()} == pictures
    sizes = [(ROOT / link).stat().st_size for link in pictures]
    assert max(sizes) < 1_000_000 and sum(sizes) + len(README) < 5_000_000
