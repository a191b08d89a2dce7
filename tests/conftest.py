"""Puts the scripts on the path, gives all runs of a session one compilation cache, knows --thorough.

XLA's backend optimises little here: what is computed is the same, and a third of the tests' time was its
compiling. The quick tests do without its newer emitters of fused loops besides, for another half; without
them, two programs that compute the same can differ in the last digit, which some thorough tests compare.
"""

import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="unroll-cache-"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")  # not TF32, where there is a GPU


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="run what takes longer, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: takes long, runs with --thorough")
    older = " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    flags = "--xla_backend_optimization_level=0" + older * (not config.getoption("--thorough"))
    os.environ.setdefault("XLA_FLAGS", flags)  # JAX is not imported yet


def pytest_collection_modifyitems(config, items):
    """Tests that start processes come first, so that none is left to one worker at the end."""
    first = ["test_devices.py", "test_command_line.py", "test_tools.py"]
    items.sort(key=lambda item: item.path.name not in first)
    if not config.getoption("--thorough"):
        long = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


@pytest.fixture(autouse=True)
def forget_programs():
    """Each compiled program holds memory maps, and Linux gives a process 65,530: then XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        sys.modules["jax"].clear_caches()
