"""What the project declares agrees with what the scripts need."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import copies
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = copies.scripts(ROOT)
LOCAL = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]}
PACKAGE_OF = {
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
}  # where the import's name is not the package's
OPTIONAL = {"tensorboardX", "wandb"}  # imported only when asked for, and named if missing


def requirements(lines):
    """Lines like "gymnasium[box2d]>=1.3,<1.4" -> {"gymnasium": the line}."""
    lines = [line.split("#")[0].strip() for line in lines]
    return {re.match(r"[\w-]+", line)[0]: line for line in lines if line}


def script_metadata(path):
    """The PEP 723 block of a script."""
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", path.read_text(), re.MULTILINE)
    return tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))


def imported(path):
    """Packages outside the standard library that a script imports, by statement or by import_module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            if isinstance(node.args[0], ast.Constant):
                names.add(node.args[0].value)
    names = {name.partition(".")[0] for name in names}
    return {PACKAGE_OF.get(name, name) for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_requirements_script_metadata_and_imports_agree(path):
    everything = requirements((ROOT / "requirements.txt").read_text().splitlines())
    own = requirements(script_metadata(path)["dependencies"])
    assert {name: everything.get(name) for name in own} == own
    # numpy and scipy come with jax, which needs them itself; gymnax needs six and does not say so.
    assert imported(path) - OPTIONAL - {"numpy", "scipy"} == set(own) - {"six"}
    assert imported(path) <= set(everything) | {"numpy", "scipy"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_no_file_of_the_project(path):
    assert not imported(path) & LOCAL


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_header_tells_what_a_reader_wants_to_know(path):
    header = ast.get_docstring(ast.parse(path.read_text()))
    assert len(header.splitlines()) <= 25
    assert "arXiv:" in header and f"python {path.name}" in header and "Differs from" in header


def test_the_tests_need_nothing_that_is_not_declared():
    everything = requirements((ROOT / "requirements.txt").read_text().splitlines())
    for path in (ROOT / "tests").glob("*.py"):
        needed = imported(path) - LOCAL - {"numpy", "scipy"}
        assert needed <= set(everything), f"{path.name}: {needed - set(everything)}"
