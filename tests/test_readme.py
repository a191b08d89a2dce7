"""What the README shows is what the files say."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import record
import tables

README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_results_and_the_line_counts_those_of_the_files():
    assert tables.fill(README) == README, "run: python benchmarks/tables.py --write"


@pytest.mark.parametrize("old", ["279.0 ± 4.0", "(275)", "8.1 s", "10 of 10 ≥ 200"])
def test_a_number_that_was_changed_by_hand_is_noticed(old):
    assert README.count(old) >= 1
    changed = README.replace(old, old.replace("1", "2").replace("7", "8"), 1)
    assert changed != README and tables.fill(changed) == README


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
