"""What the benchmarks share: raw results with their origin, their command lines, and our scripts
as processes.

Nothing is run here. results/measured.csv has a row for each file of results/: the command, the day,
the machine and the versions (of the last command, where several wrote rows of a file, which is then
noted). BENCHMARK_RESULTS in the environment names another folder.
"""

import argparse
import csv
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or ROOT / "benchmarks" / "results")
PACKAGES = ("jax", "flax", "optax", "gymnax", "envpool", "gymnasium")


def read(name: str) -> list[dict]:
    """The rows of results/<name>.csv, [] where there is none yet."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write(name: str, rows: list[dict], *keys: str, peers: str = "") -> None:
    """rows -> results/<name>.csv, their origin -> results/measured.csv.

    They take the place of those with the same keys, and the others stay; without keys, of all.
    Programs that write at the same time wait for each other. peers: what they ran beside.
    """
    key_of = lambda row: tuple(str(row[key]) for key in keys)
    number = lambda text: (float(text), "") if text.replace(".", "").isdigit() else (0, text)
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    origin = {"file": f"{name}.csv", "day": date.today().isoformat()}
    origin |= {"command": " ".join(["python", *words]), "machine": machine()}
    origin |= {"python": platform.python_version()}
    origin |= {package: version_of(package) for package in PACKAGES}
    origin |= {"peers": peers, "noted": "when measured"}
    new = {key_of(row) for row in rows}
    with one_at_a_time():
        kept = [row for row in read(name) if key_of(row) not in new]
        rows = sorted(kept + rows, key=lambda row: [number(text) for text in key_of(row)])
        save(f"{name}.csv", rows)
        others = [row for row in read("measured") if row["file"] != origin["file"]]
        before = [row for row in read("measured") if row["file"] == origin["file"]]
        alone = all(row[x] == origin[x] for row in before for x in ("command", "noted"))
        if kept and not alone:
            origin["noted"] = "when measured, others wrote rows before"
        save("measured.csv", sorted([*others, origin], key=lambda row: row["file"]))


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@contextmanager
def one_at_a_time():
    """Locks the folder of the results."""
    folder = os.open(RESULTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def save(file_name: str, rows: list[dict]) -> None:
    """Rows need not have the same columns. The file is whole at any moment."""
    path, columns = RESULTS / file_name, dict.fromkeys(key for row in rows for key in row)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


@cache
def machine() -> str:
    """Number and model of the processors, and the accelerator where JAX finds one."""
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    model = names[0].partition(":")[2].strip() if names else platform.processor()
    program = "import jax; print(jax.devices()[0].device_kind)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    accelerator = found.stdout.strip()
    beside = f", {accelerator}" if accelerator and accelerator != "cpu" else ""
    return f"{len(os.sched_getaffinity(0))} x {model}{beside}"


def parse_tasks(doc: str, names: Iterable[str], words: list[str], seeds=False):
    """A command line of tasks, and seeds where there are some -> .tasks, .seeds. An empty one prints
    what there is."""
    formatter, known = argparse.RawDescriptionHelpFormatter, ["all", *names]
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    parser.add_argument("tasks", nargs="+", choices=known, metavar="TASK", help=", ".join(known))
    if seeds:
        parser.add_argument("--seeds", type=int, nargs="+", help="others than those of the task")
    args = parser.parse_args(words or ["--help"])
    args.tasks = known[1:] if "all" in args.tasks else args.tasks
    return args


def show(row: dict, heading: bool) -> None:
    """Prints a line of a Markdown table, with its heading before the first."""
    if heading:
        print(f"\n| {' | '.join(row)} |\n|{'---|' * len(row)}")
    print(f"| {' | '.join(map(str, row.values()))} |", flush=True)


class Run(NamedTuple):
    seconds: float  # of the whole process
    metrics: list[dict]  # the rows of metrics.csv
    evaluation: list[dict]  # the seeds of evaluation.json, [] if there was none


def run_script(script: str, flags: str, cold: bool = False, **environment) -> Run:
    """One of our scripts as a process; if it is to be timed from cold, without compiled programs."""
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"} if cold else {}
        command, start = command_of(script, flags, f"{folder}/run"), time.perf_counter()
        options = {"stdout": subprocess.DEVNULL, "env": without_xla_settings() | environment}
        subprocess.run(command, check=True, **options)
        return finished(Path(folder) / "run", time.perf_counter() - start)


def finished(run_dir: Path, seconds: float = 0.0) -> Run:
    """What a run left in its folder."""
    result = run_dir / "evaluation.json"
    evaluation = json.loads(result.read_text())["seeds"] if result.exists() else []
    return Run(seconds, metrics_of(run_dir), evaluation)


def command_of(script: str, flags: str, run_dir: Path | str) -> list:
    return [sys.executable, ROOT / script, *shlex.split(flags), "--run-dir", run_dir]


def metrics_of(run_dir: Path | str) -> list[dict]:
    """The rows of its metrics.csv, [] where there is none yet."""
    path = Path(run_dir) / "metrics.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def without_xla_settings() -> dict:
    """The environment of a process that is timed: each program sets the flags that it wants."""
    own = ("XLA_FLAGS", "PJRT_NPROC")
    return {name: value for name, value in os.environ.items() if name not in own}
