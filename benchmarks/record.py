"""What the benchmarks share: raw results with their origin, and virtual environments for the peers.

`write` is called by each benchmark; nothing is run here. results/measured.csv has a row for each
file of results/: the command, the day, the machine and the versions.
"""

import csv
import os
import platform
import re
import subprocess
import sys
import venv
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "flax", "optax", "gymnax", "envpool", "gymnasium")
PEERS = {  # virtual environment: what is installed there, beside the JAX that we run
    "rejax": ["rejax==0.1.3", "gymnax==0.0.9", "gymnasium<1.4"],
    "sbx": ["sbx-rl==0.28.0", "stable-baselines3==2.9.2", "gymnasium[box2d,mujoco]<1.4"],
    "memorax": ["memorax==1.0.1", "gymnax==0.0.9"],  # it expects the steps of this gymnax
}


def read(name: str) -> list[dict]:
    """The rows of results/<name>.csv, [] where there is none yet."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write(name: str, rows: list[dict], peers: str = "") -> None:
    """rows -> results/<name>.csv, their origin -> results/measured.csv. peers: see PEERS."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    origin = {"file": f"{name}.csv", "day": date.today().isoformat()}
    origin |= {"command": " ".join(["python", *words]), "machine": machine()}
    origin |= {"python": platform.python_version()}
    origin |= {package: version(package) for package in PACKAGES}
    origin |= {"peers": versions_of(peers) if peers else "", "noted": "when measured"}
    others = [row for row in read("measured") if row["file"] != origin["file"]]
    save(f"{name}.csv", rows)
    save("measured.csv", sorted([*others, origin], key=lambda row: row["file"]))


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


def python_of(name: str) -> Path:
    """The interpreter of benchmarks/.venv-<name>; makes it if it is missing or holds something else."""
    folder = ROOT / "benchmarks" / f".venv-{name}"
    python, stamp = folder / "bin" / "python", folder / "installed"
    packages = [*PEERS[name], f"jax=={version('jax')}"]
    if not stamp.exists() or stamp.read_text() != str(packages):
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        stamp.write_text(str(packages))
    return python


def versions_of(name: str) -> str:
    """What is installed there of the packages that matter."""
    words = [re.match(r"[\w-]+", package)[0] for package in [*PEERS[name], "jax", "flax"]]
    program = (
        "import importlib.metadata as m, sys\n"
        "print(', '.join(f'{x} {m.version(x)}' for x in sys.argv[1:]))"
    )
    command = [python_of(name), "-c", program, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def without_xla_flags() -> dict:
    """The environment of a process that is timed: each program sets the flags that it wants."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
