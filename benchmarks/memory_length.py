"""How long a memory each script learns to bridge: MemoryChain in gymnax, by its length.

    python benchmarks/memory_length.py

The first observation shows a bit, the action after `memory_length` more steps is to name it: reward 1, or
-1. Guessing is right half of the time. Every script gets the same number of episodes of each length; the
two Transformers remember as many steps as the chain has. Two seeds each, in one program; greedy,
100 episodes. Prints Markdown, writes benchmarks/results/memory_length.csv and draws
assets/memory_length.png.
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
LENGTHS, NUM_SEEDS, NUM_ENVS, NUM_STEPS, EPISODES = (8, 32, 128), 2, 64, 128, 2_500
COMMON = f"--num-envs {NUM_ENVS} --num-steps {NUM_STEPS} --num-seeds {NUM_SEEDS}"
COMMON += " --learning-rate 1e-3 --reward-scale 1 --gamma 0.99 --num-minibatches 8"
SCRIPTS = {  # name: label, flags
    "ppo": ("no memory (ppo.py)", ""),
    "ppo_lstm": ("LSTM (ppo_lstm.py)", ""),
    "ppo_trxl": ("Transformer-XL (ppo_trxl.py)", "--window-length 32 --memory-length {length}"),
    "ppo_gtrxl": ("GTrXL (ppo_gtrxl.py)", "--window-length 32 --memory-length {length}"),
}


def success(name: str, length: int) -> list[dict]:
    """-> the share of right answers of each seed."""
    steps = max(20 * NUM_ENVS * NUM_STEPS, EPISODES * (length + 1))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / f"{name}.py", *COMMON.split()]
        command += SCRIPTS[name][1].format(length=length).split()
        command += ["--env-id", "gymnax::MemoryChain-bsuite", "--total-timesteps", str(steps)]
        command += ["--env-kwargs", json.dumps({"memory_length": length})]
        subprocess.run(
            [*command, "--run-dir", f"{folder}/run"], check=True, stdout=subprocess.DEVNULL
        )
        seeds = json.loads(Path(f"{folder}/run/evaluation.json").read_text())["seeds"]
    row = {"script": name, "length": length, "steps": steps}
    return [row | {"seed": x["seed"], "success": round((x["mean"] + 1) / 2, 3)} for x in seeds]


def main() -> None:
    rows = []
    print("| script |", *[f"{length} |" for length in LENGTHS])
    print("|---|" + "---|" * len(LENGTHS))
    for name in SCRIPTS:
        cells = []
        for length in LENGTHS:
            rows += success(name, length)
            values = [row["success"] for row in rows[-NUM_SEEDS:]]
            cells.append(" ".join(f"{value:.2f}" for value in values))
            print(name, length, cells[-1], file=sys.stderr, flush=True)
        print(f"| {name}.py |", *[f"{cell} |" for cell in cells], flush=True)
    with (ROOT / "benchmarks/results/memory_length.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows)


def draw(rows: list[dict]) -> None:
    """A line for the mean of each script, a dot for each seed."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for (name, (label, _)), marker, line in zip(
        SCRIPTS.items(), "osD^", ("--", "-.", "-", ":"), strict=True
    ):
        points = [(row["length"], row["success"]) for row in rows if row["script"] == name]
        means = [np.mean([y for x, y in points if x == length]) for length in LENGTHS]
        (drawn,) = axes.plot(LENGTHS, means, line, marker=marker, label=label)
        axes.plot(*zip(*points, strict=True), marker, color=drawn.get_color(), alpha=0.3, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, LENGTHS)
    axes.set(xlabel="steps between the bit and the question", ylabel="right answers")
    axes.axhline(0.5, color="gray", linewidth=0.8)
    axes.legend(fontsize="small")
    figure.savefig(ROOT / "assets" / "memory_length.png", dpi=130)


if __name__ == "__main__":
    main()
