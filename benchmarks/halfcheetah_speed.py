"""How much of the raw simulator's speed is left while ppo_continuous.py trains on HalfCheetah-v5.

    python benchmarks/halfcheetah_speed.py

EnvPool's HalfCheetah-v5, 64 environments. Raw: a Python loop that steps the pool with random
actions. Training: `python ppo_continuous.py` with normalisation, 10 epochs of 32 minibatches (the
flags stand in scores.py), charts/SPS at the end. The two take turns. Prints Markdown and writes
benchmarks/results/halfcheetah_speed.csv.
"""

import csv
import subprocess
import sys
import tempfile
import time
from statistics import median

import envpool
import numpy as np
from record import ROOT, write
from scores import HALFCHEETAH

NUM_ENVS, ROUNDS = 64, 3


def raw() -> float:
    """Steps/s of the pool alone."""
    pool = envpool.make_gymnasium("HalfCheetah-v5", num_envs=NUM_ENVS, seed=1)
    pool.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (500, NUM_ENVS, 6))
    start = time.perf_counter()
    for action in actions:
        pool.step(action)
    return len(actions) * NUM_ENVS / (time.perf_counter() - start)


def training() -> float:
    """Steps/s of ppo_continuous.py, compilation not counted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "ppo_continuous.py", *HALFCHEETAH.split()]
        command += ["--total-timesteps", "100000", "--eval-episodes", "0"]
        command += ["--run-dir", f"{folder}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(f"{folder}/run/metrics.csv") as file:
            return float(list(csv.DictReader(file))[-1]["charts/SPS"])


def main() -> None:
    rows = []
    for number in range(ROUNDS):
        rows.append({"round": number, "raw": round(raw()), "training": round(training())})
        print(rows[-1], file=sys.stderr, flush=True)
    write("halfcheetah_speed", rows)
    ratio = median(row["training"] / row["raw"] for row in rows)
    simulator, script = [median(row[name] for row in rows) for name in ("raw", "training")]
    print("| HalfCheetah-v5, 64 environments | raw simulator | ppo_continuous.py | ratio |")
    print(f"|---|---|---|---|\n| steps/s | {simulator:,.0f} | {script:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
