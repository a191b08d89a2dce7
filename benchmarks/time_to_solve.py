"""Seconds from typing the command to the line that says the target is reached, seed by seed.

    python benchmarks/time_to_solve.py                      # LunarLander-v3 to 200, ten seeds
    python benchmarks/time_to_solve.py cartpole             # CartPole-v1 to 475, ten seeds

Each seed is a process of its own, one after the other, with an empty compilation cache: imports and
compilation count. Prints a Markdown table and writes benchmarks/results/time_to_solve_<task>.csv.
"""

import csv
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
TASKS = {
    "lunarlander": ["--target-return", "200"],
    "cartpole": ["--env-id", "gymnax::CartPole-v1", "--target-return", "475"],
}
SEEDS = range(1, 11)


def solve(flags: list[str], seed: int) -> dict:
    """One cold launch -> seed, seconds and environment steps to the target (nan if missed)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "ppo.py", *flags, "--seed", str(seed)]
        command += ["--eval-episodes", "0", "--run-dir", f"{folder}/run"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        start = time.time()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        result = {"seed": seed, "seconds": float("nan"), "steps": float("nan")}
        for line in process.stdout:
            if match := re.match(r"target return .* reached: ([\d,]+) steps", line):
                seconds = round(time.time() - start, 2)
                result |= {"seconds": seconds, "steps": int(match[1].replace(",", ""))}
        if process.wait():
            raise SystemExit(f"{command} failed")
    return result


def main() -> None:
    task = sys.argv[1] if len(sys.argv) > 1 else "lunarlander"
    rows = []
    print(f"`python ppo.py {' '.join(TASKS[task])}`, {platform.python_version()}, 2 CPU cores\n")
    print("| seed | seconds | steps |\n|---|---|---|")
    for seed in SEEDS:
        rows.append(solve(TASKS[task], seed))
        print("| {seed} | {seconds} | {steps:,} |".format(**rows[-1]), flush=True)
    for name, pick in [("median", median), ("worst", max)]:
        seconds, steps = [pick([row[key] for row in rows]) for key in ("seconds", "steps")]
        print(f"| {name} | {seconds:.2f} | {steps:,.0f} |")
    with (ROOT / f"benchmarks/results/time_to_solve_{task}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
