"""PPO beside Stable-Baselines3 and SBX on LunarLander-v3, with the same networks and updates.

    python benchmarks/ppo_speed.py

64 environments x 128 steps, 4 epochs of 32 minibatches, 64 x 64 tanh networks for actor and critic, 16
iterations (131,072 steps), no evaluation. All take turns, each as a process of its own with the
compilation cache that it has by itself (SBX: none; ppo.py: emptied). Seconds are those of the whole
process; the steady state is the part after the first quarter. The peers step Gymnasium's simulators one after the
other, their default and the fastest of theirs for such a cheap one; ppo.py runs in EnvPool, its
default, and in the same Gymnasium. The peers live in a virtual environment that this script makes
(benchmarks/.venv-sbx). Prints Markdown and writes benchmarks/results/ppo_speed.csv.
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
PEERS = ROOT / "benchmarks" / ".venv-sbx"
ROUNDS, STEPS = 3, 16 * 64 * 128

PEER_PROGRAM = """
import sys, time
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

class Clock(BaseCallback):
    def _on_step(self):
        return True
    def _on_rollout_start(self):
        if self.num_timesteps == steps // 4:
            self.quarter = time.perf_counter()

which, steps = sys.argv[1], int(sys.argv[2])
if which == "sbx":
    from sbx import PPO
    policy = {}
else:
    from stable_baselines3 import PPO
    policy = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}}
env = make_vec_env("LunarLander-v3", n_envs=64, seed=1)
model = PPO("MlpPolicy", env, n_steps=128, batch_size=256, n_epochs=4, learning_rate=3e-3,
            gamma=0.997, gae_lambda=0.95, ent_coef=0.01, policy_kwargs=policy, seed=1, device="cpu")
clock = Clock()
model.learn(steps, callback=clock)
print(0.75 * steps / (time.perf_counter() - clock.quarter))
"""


def time_peer(which: str) -> tuple[float, float]:
    """-> seconds of the whole process, steps/s in steady state."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [PEERS / "bin" / "python", "-c", PEER_PROGRAM, which, str(STEPS)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - start, float(done.stdout.split()[-1])


def time_ours(env_id: str) -> tuple[float, float]:
    """-> the same for ppo.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "ppo.py", "--env-id", env_id, "--eval-episodes", "0"]
        command += ["--total-timesteps", str(STEPS), "--num-minibatches", "32"]
        command += ["--num-envs", "64", "--num-steps", "128", "--run-dir", f"{folder}/run"]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/cache"
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        seconds = time.perf_counter() - start
        with open(f"{folder}/run/metrics.csv") as file:
            points = [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]
    (first, began), (last, ended) = next(x for x in points if x[0] >= STEPS // 4), points[-1]
    return seconds, (last - first) / (ended - began)


PROGRAMS = {  # label: timing
    "ppo.py, EnvPool": lambda: time_ours("envpool::LunarLander-v3"),
    "ppo.py, Gymnasium": lambda: time_ours("gymnasium::LunarLander-v3"),
    "SBX, Gymnasium": lambda: time_peer("sbx"),
    "Stable-Baselines3, Gymnasium": lambda: time_peer("sb3"),
}


def main() -> None:
    if not (PEERS / "bin" / "python").exists():
        venv.create(PEERS, with_pip=True)
        packages = ["sbx-rl==0.28.0", "gymnasium[box2d,classic-control,mujoco]<1.4"]
        subprocess.run(
            [PEERS / "bin" / "python", "-m", "pip", "install", "-q", *packages], check=True
        )
    rows = []
    for number in range(ROUNDS):
        for name, timing in PROGRAMS.items():
            seconds, speed = timing()
            row = {"round": number, "program": name, "seconds": round(seconds, 2)}
            rows.append(row | {"steps_per_second": round(speed, 1)})
            print(rows[-1], file=sys.stderr, flush=True)
    with (ROOT / "benchmarks/results/ppo_speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("| program | whole process, s | steady state, steps/s |\n|---|---|---|")
    for name in PROGRAMS:
        own = [row for row in rows if row["program"] == name]
        seconds, speed = [median(x[key] for x in own) for key in ("seconds", "steps_per_second")]
        print(f"| {name} | {seconds:.1f} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
