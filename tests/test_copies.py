"""tests/copies.py, on made-up scripts and on the real ones."""

import subprocess
import sys
from pathlib import Path

import copies
import pytest

ROOT_SCRIPT = '''
LIMIT = 3


def shared(x):
    """The text that counts."""
    return x + LIMIT


class Args:
    seed = 1


def make_train():
    return shared(1)
'''

SIBLING = """
LIMIT = 4


def own():
    return 0


@staticmethod
def shared(x):
    return x + LIMIT + 1


class Args:
    seed = 2


def make_train():
    return shared(2)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ppo.py").write_text(ROOT_SCRIPT)
    (tmp_path / "a_sibling.py").write_text(SIBLING)
    (tmp_path / "plot.py").write_text("LIMIT = 5\n")  # no script of the collection: no make_train
    return tmp_path


def test_differences_are_found_and_names_that_vary_are_not(folder):
    assert sorted(copies.compare(folder)) == [
        "a_sibling.py: LIMIT differs from ppo.py",
        "a_sibling.py: shared differs from ppo.py",
    ]


def test_fix_copies_the_root_text_and_nothing_else(folder):
    copies.compare(folder, fix=True)
    mended = (folder / "a_sibling.py").read_text()
    assert copies.compare(folder) == []
    assert "LIMIT = 3" in mended and '"""The text that counts."""' in mended
    assert "@staticmethod" not in mended
    assert "seed = 2" in mended and "return shared(2)" in mended and "def own" in mended
    assert (folder / "ppo.py").read_text() == ROOT_SCRIPT
    assert (folder / "plot.py").read_text() == "LIMIT = 5\n"


def test_missing_plumbing_is_found_and_put_in_its_place(folder):
    plumbing = (
        "\n\n# --- Environment ---\n\n\ndef one():\n    return 1\n\n\ndef two():\n    return 2\n"
    )
    (folder / "ppo.py").write_text(ROOT_SCRIPT + plumbing)
    sibling = SIBLING + "\n\ndef one():\n    return 1\n\n\ndef three():\n    return 3\n"
    (folder / "a_sibling.py").write_text(sibling)
    assert "a_sibling.py: two is missing" in copies.compare(folder, fix=True)
    assert copies.compare(folder) == []
    mended = (folder / "a_sibling.py").read_text()
    assert mended.index("def one") < mended.index("def two") < mended.index("def three")


def test_the_real_scripts_agree():
    command = [sys.executable, str(Path(copies.__file__))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
