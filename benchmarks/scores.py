"""Greedy score after the full default budget, judged in the reference implementation of the task.

    python benchmarks/scores.py

Trains `python ppo.py` (EnvPool's LunarLander-v3) with ten seeds and plays 100 greedy episodes of each
in Gymnasium's LunarLander-v3 (limit 1000 steps). Prints a Markdown table, writes
scores_lunarlander.csv and curves_lunarlander.csv to benchmarks/results and draws
assets/ppo_lunarlander.png.
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
SEEDS = range(1, 11)


def score(seed: int) -> tuple[dict, list[dict]]:
    """-> what evaluation.json says of the seed, and its learning curve."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, ROOT / "ppo.py", "--seed", str(seed), "--run-dir", run_dir]
        command += ["--eval-env-id", "gymnasium::LunarLander-v3"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((run_dir / "evaluation.json").read_text())["seeds"][0]
        with (run_dir / "metrics.csv").open() as file:
            metrics = list(csv.DictReader(file))
    names = {
        "seed": "seed",
        "step": "step",
        "seconds": "seconds",
        "return": "charts/episodic_return",
    }
    curve = [{short: float(row[name]) for short, name in names.items()} for row in metrics]
    training_return = round(curve[-1]["return"], 1)
    values = {name: round(result[name], 1) for name in ("mean", "std", "min", "max")}
    speed = {"training_return": training_return, "steps_per_second": int(metrics[-1]["charts/SPS"])}
    return {"seed": seed} | values | speed, curve


def write(name: str, rows: list[dict]) -> None:
    with (ROOT / "benchmarks" / "results" / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(curves: list[list[dict]]) -> None:
    """A thin line for each seed, and their mean."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in curves[0]]
    returns = np.array([[row["return"] for row in curve] for curve in curves])
    axes.plot(steps, returns.T, color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(steps, returns.mean(axis=0), color="tab:blue", label=f"mean of {len(curves)} seeds")
    axes.axhline(200, color="gray", linestyle="--", linewidth=0.8, label="solved")
    axes.set(xlabel="environment steps", ylabel="return (last 100 training episodes)")
    axes.set_title("python ppo.py: LunarLander-v3", fontsize="medium")
    axes.legend()
    figure.savefig(ROOT / "assets" / "ppo_lunarlander.png", dpi=130)


def main() -> None:
    rows, curves = [], []
    for seed in SEEDS:
        row, curve = score(seed)
        rows.append(row)
        curves.append(curve)
        if seed == SEEDS[0]:
            print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    means = np.array([row["mean"] for row in rows])
    print(
        f"\n{means.mean():.1f} +- {means.std():.1f}; {(means >= 200).sum()} of {len(means)} >= 200"
    )
    write("scores_lunarlander.csv", rows)
    write("curves_lunarlander.csv", sum(curves, []))
    draw(curves)


if __name__ == "__main__":
    main()
