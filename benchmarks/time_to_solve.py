"""Seconds from typing the command to the line that says the target is reached, seed by seed.

    python benchmarks/time_to_solve.py                      # lists the tasks
    python benchmarks/time_to_solve.py ppo_lunarlander ...  # ten seeds of each

Each seed is a process of its own, one after the other, with an empty compilation cache: imports and
compilation count. Prints a Markdown table and writes benchmarks/results/time_to_solve_<task>.csv.
"""

import platform
import re
import subprocess
import sys
import tempfile
import time
from math import inf, isnan
from statistics import median

from record import ROOT, without_xla_flags, write
from scores import LANDER_BY_LSTM, LANDER_BY_TRXL

TASKS = {  # name: script, flags with the target
    "ppo_lunarlander": ("ppo.py", "--target-return 200"),
    "ppo_cartpole": ("ppo.py", "--env-id gymnax::CartPole-v1 --target-return 475"),
    "a2c_lunarlander": ("a2c.py", "--target-return 200"),
    "impala_lunarlander": ("impala.py", "--target-return 200"),
    "ppo_continuous_pendulum": ("ppo_continuous.py", "--target-return -200"),
    "ppo_lstm_cartpole": ("ppo_lstm.py", "--target-return 475"),
    "rppo_continuous_pendulum": ("rppo_continuous.py", "--target-return -200"),
    "ppo_lstm_lunarlander": ("ppo_lstm.py", f"{LANDER_BY_LSTM} --target-return 200"),
    "ppo_trxl_lunarlander": ("ppo_trxl.py", f"{LANDER_BY_TRXL} --target-return 200"),
    "ppo_gtrxl_lunarlander": ("ppo_gtrxl.py", f"{LANDER_BY_TRXL} --target-return 200"),
}
SEEDS = range(1, 11)


def solve(script: str, flags: str, seed: int) -> dict:
    """One cold launch -> seed, seconds and environment steps to the target (nan if missed)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / script, *flags.split(), "--seed", str(seed)]
        command += ["--eval-episodes", "0", "--run-dir", f"{folder}/run"]
        environment = without_xla_flags() | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
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


def run(task: str) -> None:
    rows, (script, flags) = [], TASKS[task]
    print(f"\n`python {script} {flags}`, {platform.python_version()}, 2 CPU cores\n")
    print("| seed | seconds | steps |\n|---|---|---|")
    for seed in SEEDS:
        rows.append(solve(script, flags, seed))
        print("| {seed} | {seconds} | {steps:,} |".format(**rows[-1]), flush=True)
        write(f"time_to_solve_{task}", rows)
    for name, pick in [("median", median), ("worst", max)]:
        # A seed that missed the target took longer than any that did not.
        seconds, steps = [
            pick([inf if isnan(row[key]) else row[key] for row in rows])
            for key in ("seconds", "steps")
        ]
        print(f"| {name} | {seconds:.2f} | {steps:,.0f} |")


if __name__ == "__main__":
    if not sys.argv[1:] or not set(sys.argv[1:]) <= set(TASKS):
        sys.exit(f"usage: python benchmarks/time_to_solve.py TASK ..., of {', '.join(TASKS)}")
    for name in sys.argv[1:]:
        run(name)
