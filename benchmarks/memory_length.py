"""How long a memory each script learns to bridge: MemoryChain in gymnax, by its length.

    python benchmarks/memory_length.py                  # all scripts and lengths, some hours
    python benchmarks/memory_length.py ppo_lstm 8 32    # some lengths of one script

The bit is in the first two observations, and the action after `length` steps is to name it: reward
1, or -1. Guessing is right half of the time. Every script gets 2,500 episodes or 164k steps,
whichever is more. The two Transformers remember as many steps as the chain has; the LSTM's gradient
goes back over the 128 steps of a rollout. Five seeds; greedy, 100 episodes after the whole run.
Prints Markdown, replaces the rows of what was run in benchmarks/results/memory_length.csv and draws
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
from record import ROOT, read, write

LENGTHS, NUM_SEEDS, NUM_ENVS, NUM_STEPS, EPISODES = (8, 32, 128, 512), 5, 64, 128, 2_500
COMMON = f"--num-envs {NUM_ENVS} --num-steps {NUM_STEPS} --learning-rate 1e-3 --reward-scale 1 "
COMMON += "--gamma 0.99 --num-minibatches 8"
SCRIPTS = {  # name: label, flags
    "ppo": ("no memory (ppo.py)", ""),
    "ppo_lstm": ("LSTM (ppo_lstm.py)", ""),
    "ppo_trxl": ("Transformer-XL (ppo_trxl.py)", "--memory-length {length}"),
    "ppo_gtrxl": ("GTrXL (ppo_gtrxl.py)", "--memory-length {length}"),
}


def success(name: str, length: int, seed: int) -> dict:
    """-> the share of right answers after the whole run, and the steps that were taken until
    the last 100 training episodes averaged 0.95 (empty if they never did)."""
    steps = max(20 * NUM_ENVS * NUM_STEPS, EPISODES * (length + 1))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / f"{name}.py", *COMMON.split(), "--seed", str(seed)]
        command += SCRIPTS[name][1].format(length=length).split()
        command += ["--env-id", "gymnax::MemoryChain-bsuite", "--total-timesteps", str(steps)]
        command += ["--env-kwargs", json.dumps({"memory_length": length})]
        subprocess.run(
            [*command, "--run-dir", f"{folder}/run"], check=True, stdout=subprocess.DEVNULL
        )
        (result,) = json.loads(Path(f"{folder}/run/evaluation.json").read_text())["seeds"]
        with Path(f"{folder}/run/metrics.csv").open() as file:
            metrics = list(csv.DictReader(file))
    learned = (x["step"] for x in metrics if float(x["charts/episodic_return"] or 0) >= 0.95)
    return {
        "script": name,
        "length": length,
        "seed": seed,
        "success": round((result["mean"] + 1) / 2, 3),
        "steps": int(metrics[-1]["step"]),
        "learned_after": next(learned, ""),
    }


def main(names: list[str], lengths: list[int]) -> None:
    rows = read("memory_length")
    print("| script | length | right answers of each seed | learned after |\n|---|---|---|---|")
    for name in names:
        for length in lengths:
            new = [success(name, length, seed) for seed in range(1, NUM_SEEDS + 1)]
            rights, after = [
                " ".join(str(row[x]) for row in new) for x in ("success", "learned_after")
            ]
            print(f"| {name}.py | {length} | {rights} | {after} |", flush=True)
            done = (name, str(length))
            rows = [row for row in rows if (row["script"], str(row["length"])) != done] + new
            order = list(SCRIPTS)
            rows.sort(key=lambda x: (order.index(x["script"]), int(x["length"]), int(x["seed"])))
            write("memory_length", rows)
    draw(rows)


def draw(rows: list[dict]) -> None:
    """A line for the mean of each script, a dot for each seed."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for (name, (label, _)), marker, line in zip(
        SCRIPTS.items(), "osD^", ("--", "-.", "-", ":"), strict=True
    ):
        own = [row for row in rows if row["script"] == name]
        points = [(int(row["length"]), float(row["success"])) for row in own]
        lengths = sorted({x for x, _ in points})
        means = [np.mean([y for x, y in points if x == length]) for length in lengths]
        (drawn,) = axes.plot(lengths, means, line, marker=marker, label=label)
        axes.plot(*zip(*points, strict=True), marker, color=drawn.get_color(), alpha=0.3, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, LENGTHS)
    axes.set(xlabel="steps between the bit and the question", ylabel="right answers")
    axes.axhline(0.5, color="gray", linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=len(SCRIPTS), fontsize="x-small")
    figure.savefig(ROOT / "assets" / "memory_length.png", dpi=130)


if __name__ == "__main__":
    names, lengths = sys.argv[1:2] or list(SCRIPTS), [int(x) for x in sys.argv[2:]] or LENGTHS
    main(names, lengths)
