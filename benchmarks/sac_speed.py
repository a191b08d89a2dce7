"""SAC beside SBX (Stable-Baselines3's JAX sibling), with the same networks and updates.

    python benchmarks/sac_speed.py                 # Pendulum-v1, 20k steps
    python benchmarks/sac_speed.py halfcheetah     # HalfCheetah-v5, 10k steps

One environment, one update with 256 transitions for each step after the first 1,000, networks of 256
x 256, no evaluation. The two take turns, each as a process of its own with the compilation cache that
it has by itself (SBX: none; sac.py: emptied). Seconds are those of the whole process; the steady state
is the part from a quarter of the steps on. SBX lives in a virtual environment that this script makes
(benchmarks/.venv-sbx). Prints Markdown and writes benchmarks/results/sac_speed_<task>.csv.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
SBX = ROOT / "benchmarks" / ".venv-sbx"
TASKS = {  # name: ours, theirs, steps
    "pendulum": ("gymnax::Pendulum-v1", "Pendulum-v1", 20_000),
    "halfcheetah": ("envpool::HalfCheetah-v5", "HalfCheetah-v5", 10_000),
}
ROUNDS = 3

SBX_PROGRAM = """
import sys, time
from sbx import SAC
from stable_baselines3.common.callbacks import BaseCallback

class Clock(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == steps // 4:
            self.quarter = time.perf_counter()
        return True

task, steps = sys.argv[1], int(sys.argv[2])
model = SAC("MlpPolicy", task, learning_starts=1000, batch_size=256, buffer_size=100_000,
            policy_kwargs={"net_arch": [256, 256]}, train_freq=1, gradient_steps=1, seed=1)
clock = Clock()
model.learn(steps, callback=clock)
print(0.75 * steps / (time.perf_counter() - clock.quarter))
"""


def time_sbx(task: str, steps: int) -> tuple[float, float]:
    """-> seconds of the whole process, steps/s in steady state."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [SBX / "bin" / "python", "-c", SBX_PROGRAM, task, str(steps)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - start, float(done.stdout.split()[-1])


def time_ours(env_id: str, steps: int) -> tuple[float, float]:
    """-> the same for sac.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "sac.py", "--env-id", env_id, "--eval-episodes", "0"]
        command += ["--total-timesteps", str(steps), "--run-dir", f"{folder}/run"]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/cache"
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        seconds = time.perf_counter() - start
        with open(f"{folder}/run/metrics.csv") as file:
            points = [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]
    (first, began), (last, ended) = next(x for x in points if x[0] >= steps // 4), points[-1]
    return seconds, (last - first) / (ended - began)


def main() -> None:
    task = sys.argv[1] if len(sys.argv) > 1 else "pendulum"
    ours, theirs, steps = TASKS[task]
    if not (SBX / "bin" / "python").exists():
        venv.create(SBX, with_pip=True)
        packages = ["sbx-rl==0.28.0", "gymnasium[box2d,classic-control,mujoco]<1.4"]
        subprocess.run(
            [SBX / "bin" / "python", "-m", "pip", "install", "-q", *packages], check=True
        )
    rows = []
    for number in range(ROUNDS):
        for name, timing in [("sac.py", time_ours(ours, steps)), ("sbx", time_sbx(theirs, steps))]:
            row = {"round": number, "program": name, "seconds": round(timing[0], 2)}
            rows.append(row | {"steps_per_second": round(timing[1], 1)})
            print(rows[-1], file=sys.stderr, flush=True)
    with (ROOT / f"benchmarks/results/sac_speed_{task}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"| {task}, {steps:,} steps | sac.py | SBX | ratio |\n|---|---|---|---|")
    for what, column in [
        ("whole process, s", "seconds"),
        ("steady state, steps/s", "steps_per_second"),
    ]:
        mine, other = [
            [row[column] for row in rows if row["program"] == name] for name in ("sac.py", "sbx")
        ]
        ratio = median(a / b for a, b in zip(mine, other, strict=True))
        print(f"| {what} | {median(mine):,.1f} | {median(other):,.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
