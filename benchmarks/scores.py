"""Greedy score after a full budget: every script on its tasks, 100 episodes for each seed.

    python benchmarks/scores.py                       # lists the tasks
    python benchmarks/scores.py ppo_lunarlander ...   # trains, seed by seed, and plays

Each seed is a process of its own; nothing is timed. LunarLander-v3 is trained in EnvPool and judged
in Gymnasium's (limit 1000 steps). For each task it prints a Markdown table and writes
scores_<task>.csv and curves_<task>.csv to benchmarks/results. Then `python benchmarks/curves.py`
draws them.
"""

import csv
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from record import ROOT, write

LANDER = "--eval-env-id gymnasium::LunarLander-v3"
HALFCHEETAH = (
    "--env-id envpool::HalfCheetah-v5 --num-envs 64 --num-steps 64 --num-minibatches 32 "
    "--update-epochs 10 --learning-rate 3e-4 --gamma 0.99 --reward-scale 1 --norm-obs --norm-reward"
)
LANDER_BY_DQN = (
    "--env-id envpool::LunarLander-v3 --num-envs 8 --total-timesteps 400000 --reward-scale 0.1 "
    "--learning-rate 5e-4 --buffer-size 100000 --learning-starts 5000 --train-frequency 2 "
    "--target-network-frequency 1000 --exploration-fraction 0.3 --hidden-sizes 128 128"
)
BREAKOUT_BY_DQN = (
    "--env-id gymnax::Breakout-MinAtar --total-timesteps 5000000 --num-envs 64 --learning-rate 5e-4 "
    "--buffer-size 100000 --train-frequency 32 --target-network-frequency 4000 --end-e 0.01 "
    "--exploration-fraction 0.1 --hidden-sizes 128 128"
)
MASKED_CARTPOLE = "--env-id gymnax::CartPole-v1 --mask-obs 1 3"
CARTPOLE_BY_TRXL = f"{MASKED_CARTPOLE} --memory-length 32 --window-length 32"
MASKED_MOUNTAINCAR = (  # one action for 8 steps: noise in single steps hardly ever reaches the top
    '--env-id gymnax::MountainCarContinuous-v0 --mask-obs 1 --env-kwargs {"action_repeat":8} '
    "--total-timesteps 200000 --gamma 0.99 --sequence-length 128"
)
CARTPOLE_BY_PPO = (
    f"{MASKED_CARTPOLE} --total-timesteps 500000 --num-envs 16 --num-minibatches 4 "
    "--learning-rate 2e-3 --gamma 0.99"
)
LANDER_BY_LSTM = (
    "--env-id envpool::LunarLander-v3 --total-timesteps 1000000 --num-envs 64 --num-minibatches 16 "
    "--gamma 0.997"
)
LANDER_BY_TRXL = f"{LANDER_BY_LSTM} --memory-length 32 --window-length 32"
TASKS = {  # name: script, flags, number of seeds, score that counts as solved
    "ppo_lunarlander": ("ppo.py", LANDER, 10, 200),
    "a2c_lunarlander": ("a2c.py", LANDER, 6, 200),
    "impala_lunarlander": ("impala.py", LANDER, 6, 200),
    "ppo_continuous_pendulum": ("ppo_continuous.py", "", 10, -170),
    "ppo_continuous_halfcheetah": (
        "ppo_continuous.py",
        f"{HALFCHEETAH} --total-timesteps 1000000",
        5,
        0,
    ),
    "dqn_cartpole": ("dqn.py", "", 10, 475),
    "dqn_lunarlander": ("dqn.py", f"{LANDER_BY_DQN} {LANDER}", 5, 200),
    "dqn_breakout": ("dqn.py", BREAKOUT_BY_DQN, 5, 28),  # 28: PPO's score in gymnax
    "sac_pendulum": ("sac.py", "", 6, -160),
    "ppo_masked_cartpole": ("ppo.py", CARTPOLE_BY_PPO, 5, 475),
    "ppo_lstm_cartpole": ("ppo_lstm.py", "", 5, 475),
    "ppo_trxl_cartpole": ("ppo_trxl.py", CARTPOLE_BY_TRXL, 5, 475),
    "ppo_gtrxl_cartpole": ("ppo_gtrxl.py", CARTPOLE_BY_TRXL, 5, 475),
    "rppo_continuous_pendulum": ("rppo_continuous.py", "", 10, -200),
    "ppo_lstm_lunarlander": ("ppo_lstm.py", f"{LANDER_BY_LSTM} {LANDER}", 5, 200),
    "rppo_continuous_mountaincar": ("rppo_continuous.py", MASKED_MOUNTAINCAR, 5, 90),
    "ppo_trxl_lunarlander": ("ppo_trxl.py", f"{LANDER_BY_TRXL} {LANDER}", 5, 200),
    "ppo_gtrxl_lunarlander": ("ppo_gtrxl.py", f"{LANDER_BY_TRXL} {LANDER}", 5, 200),
    "ppo_trxl_memorychain": ("ppo_trxl.py", "", 5, 1),
    "ppo_gtrxl_memorychain": ("ppo_gtrxl.py", "", 5, 1),
    "sac_halfcheetah": (
        "sac.py",
        "--env-id envpool::HalfCheetah-v5 --learning-starts 5000 --total-timesteps 200000",
        5,
        0,
    ),
}


def score(script: str, flags: str, seed: int) -> tuple[dict, list[dict]]:
    """-> what evaluation.json says of the seed, and its learning curve."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, ROOT / script, *flags.split()]
        command += ["--seed", str(seed), "--run-dir", run_dir]
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
    every = max(1, len(metrics) // 200)  # points enough for a picture
    points = [*metrics[:-1:every], metrics[-1]]
    curve = [{short: float(row[name]) for short, name in names.items()} for row in points]
    training_return = round(curve[-1]["return"], 1)
    values = {name: round(result[name], 1) for name in ("mean", "std", "min", "max")}
    last = {"steps": int(metrics[-1]["step"]), "training_return": training_return}
    return {"seed": seed} | values | last, curve


def run(task: str) -> None:
    script, flags, num_seeds, solved = TASKS[task]
    print(f"\n`python {script} {shlex.join(flags.split())}`\n")
    rows, curves = [], []
    for seed in range(1, num_seeds + 1):
        row, curve = score(script, flags, seed)
        rows.append(row)
        curves.append(curve)
        if seed == 1:
            print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
        write(f"scores_{task}", rows)
        write(f"curves_{task}", sum(curves, []))
    means = np.array([row["mean"] for row in rows])
    good = (means >= solved).sum()
    print(f"\n{means.mean():.1f} +- {means.std():.1f}; {good} of {len(means)} >= {solved}")


if __name__ == "__main__":
    if not sys.argv[1:] or not set(sys.argv[1:]) <= set(TASKS):
        sys.exit(f"usage: python benchmarks/scores.py TASK ..., of {', '.join(TASKS)}")
    for name in sys.argv[1:]:
        run(name)
