"""What the benchmarks share: raw results with their origin, and virtual environments for the peers.

`write` is called by each benchmark; nothing is run here. results/measured.csv has a row for each file of
results/: the command, the day, the machine and the versions.
"""

import csv
import os
import platform
import subprocess
import sys
import venv
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "flax", "optax", "gymnax", "envpool", "gymnasium")


def read(name: str) -> list[dict]:
    """The rows of results/<name>.csv, [] where there is none yet."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write(name: str, rows: list[dict], peers: str = "") -> None:
    """rows -> results/<name>.csv, their origin -> results/measured.csv. peers: packages and versions."""
    origin = {"file": f"{name}.csv", "day": date.today().isoformat()}
    origin["command"] = (
        f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    )
    origin |= {"machine": machine(), "python": platform.python_version()}
    origin |= {package: version(package) for package in PACKAGES} | {"peers": peers}
    others = [row for row in read("measured") if row["file"] != origin["file"]]
    save(f"{name}.csv", rows)
    save("measured.csv", sorted([*others, origin], key=lambda row: row["file"]))


def save(file_name: str, rows: list[dict]) -> None:
    with (RESULTS / file_name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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


def python_of(name: str, packages: list[str]) -> Path:
    """The interpreter of benchmarks/.venv-<name>, which is made with these packages if it is missing."""
    python = ROOT / "benchmarks" / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def without_xla_flags() -> dict:
    """The environment of a process that is timed: each program sets the flags that it wants."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
