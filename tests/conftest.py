"""Puts the scripts on the path, gives all runs of a session one compilation cache, begins with what takes long.

XLA's backend optimises little here: what is computed is the same, and a third of the tests' time was its
compiling.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="unroll-cache-"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def pytest_collection_modifyitems(items):
    """Tests that start processes come first, so that none is left to one worker at the end."""
    first = ["test_ppo_trxl_pmap.py", "test_command_line.py", "test_enjoy.py"]
    items.sort(key=lambda item: item.path.name not in first)
