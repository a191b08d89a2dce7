"""Steps/s of every script on its tasks while it trains: the column of the README's tables of
results.

    python benchmarks/steps_per_second.py             # all tasks of scores.py, ten minutes
    python benchmarks/steps_per_second.py TASK ...    # some of them

The command of each task runs for some seconds, is stopped by Ctrl-C's signal, and its metrics.csv
says how many steps the second half of that time held: no launch, no compilation, no evaluation, but
logging. Two rounds over all tasks, nothing beside. Prints Markdown and writes
benchmarks/results/steps_per_second.csv.
"""

import csv
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from record import ROOT, read, without_xla_flags, write
from scores import TASKS as SCORED

TASKS = {name: (script, flags) for name, (script, flags, *_) in SCORED.items()}
TASKS["ppo_cartpole"] = ("ppo.py", "--env-id gymnax::CartPole-v1")
ROUNDS, SECONDS = 2, 6


def points_of(run_dir: Path) -> list[tuple[int, float]]:
    """-> environment steps and seconds since the launch of each log step."""
    path = run_dir / "metrics.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]


def speed(script: str, flags: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, ROOT / script, *flags.split(), "--eval-episodes", "0"]
        options = {"stdout": subprocess.DEVNULL, "env": without_xla_flags()}
        process = subprocess.Popen([*command, "--run-dir", run_dir], **options)
        while process.poll() is None:
            if (run_dir / "metrics.csv").exists():
                try:
                    process.wait(SECONDS)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGINT)
                    process.wait()
            time.sleep(0.05)
        if process.returncode not in (0, 130, -signal.SIGINT):  # -SIGINT: it was about to end
            raise SystemExit(f"{script} {flags} ended with status {process.returncode}")
        points = points_of(run_dir)
    (_, start), (last, end) = points[0], points[-1]
    middle = [x for x in points if x[1] >= (start + end) / 2][0]
    first, begun = middle if middle != points[-1] else points[0]
    return (last - first) / (end - begun)


def main(tasks: list[str]) -> None:
    rows = [row for row in read("steps_per_second") if row["task"] not in tasks]
    for number in range(ROUNDS):
        for task in tasks:
            row = {"task": task, "round": number}
            rows.append(row | {"steps_per_second": round(speed(*TASKS[task]))})
            print(rows[-1], file=sys.stderr, flush=True)
        write("steps_per_second", rows)
    print("| task | steps/s |\n|---|---|")
    for task in tasks:
        speeds = [row["steps_per_second"] for row in rows if row["task"] == task]
        print(f"| {task} | {median(speeds):,.0f} |")


if __name__ == "__main__":
    if not set(sys.argv[1:]) <= set(TASKS):
        sys.exit(f"usage: python benchmarks/steps_per_second.py [TASK ...], of {', '.join(TASKS)}")
    main(sys.argv[1:] or list(TASKS))
