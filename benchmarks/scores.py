"""Greedy score after the full default budget, judged in the reference implementation of the task.

    python benchmarks/scores.py

Trains `python ppo.py` (EnvPool's LunarLander-v3) with ten seeds and plays 100 greedy episodes of each
in Gymnasium's LunarLander-v3 (limit 1000 steps). Prints a Markdown table and writes
benchmarks/results/scores_lunarlander.csv.
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SEEDS = range(1, 11)


def score(seed: int) -> dict:
    """-> what evaluation.json says of the seed, and the last row of metrics.csv."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, ROOT / "ppo.py", "--seed", str(seed), "--run-dir", run_dir]
        command += ["--eval-env-id", "gymnasium::LunarLander-v3"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((run_dir / "evaluation.json").read_text())["seeds"][0]
        with (run_dir / "metrics.csv").open() as file:
            last = list(csv.DictReader(file))[-1]
    training_return = round(float(last["charts/episodic_return"]), 1)
    values = {name: round(result[name], 1) for name in ("mean", "std", "min", "max")}
    speed = {"training_return": training_return, "steps_per_second": int(last["charts/SPS"])}
    return {"seed": seed} | values | speed


def main() -> None:
    rows = []
    for seed in SEEDS:
        rows.append(score(seed))
        if seed == SEEDS[0]:
            print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    means = np.array([row["mean"] for row in rows])
    print(
        f"\n{means.mean():.1f} +- {means.std():.1f}; {(means >= 200).sum()} of {len(means)} >= 200"
    )
    with (ROOT / "benchmarks/results/scores_lunarlander.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
