"""Recurrent PPO beside memorax on Pendulum-v1 in gymnax, with the same networks and updates.

    python benchmarks/recurrent_speed.py

64 environments x 128 steps, 4 epochs of 8 minibatches of whole rollouts; actor and critic with an encoder
of 64, an LSTM of 64 and a linear head each; 48 iterations (393,216 steps), no evaluation. The two take turns, each
as a process of its own with the compilation cache that it has by itself (memorax: none;
rppo_continuous.py: emptied). Seconds are those of the whole process; the steady state is the part after the
first quarter, of memorax the second half, as its second call compiles once more. memorax lives in a virtual environment that this script makes
(benchmarks/.venv-memorax). Prints Markdown and writes benchmarks/results/recurrent_speed.csv.
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
MEMORAX = ROOT / "benchmarks" / ".venv-memorax"
ROUNDS, STEPS = 3, 48 * 64 * 128

MEMORAX_PROGRAM = """
import sys, time
import flax.linen as nn, jax, optax
from memorax.algorithms import PPO, PPOConfig
from memorax.environments import environment
from memorax.networks import MLP, RNN, FeatureExtractor, Network, heads

steps = int(sys.argv[1])
env, params = environment.make("gymnax::Pendulum-v1")
config = PPOConfig(name="PPO", num_envs=64, num_eval_envs=1, num_steps=128, gamma=0.95,
                   gae_lambda=0.95, num_minibatches=8, update_epochs=4, normalize_advantage=True,
                   clip_coef=0.2, clip_vloss=False, ent_coef=0.0, vf_coef=0.5)
network = lambda head: Network(
    FeatureExtractor(observation_extractor=MLP(features=(64,))), RNN(cell=nn.LSTMCell(64)), head)
tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(2e-3))
agent = PPO(config, env, params, network(heads.Gaussian(env.action_space(params).shape[0])),
            network(heads.VNetwork()), tx, tx)
key, state = agent.init(jax.random.key(1))
times = []
for _ in range(4):
    key, state, _ = jax.block_until_ready(agent.train(key, state, num_steps=steps // 4))
    times.append(time.perf_counter())
print(0.5 * steps / (times[-1] - times[1]))  # the second call compiles once more
"""


def time_memorax() -> tuple[float, float]:
    """-> seconds of the whole process, steps/s in steady state."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [MEMORAX / "bin" / "python", "-c", MEMORAX_PROGRAM, str(STEPS)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - start, float(done.stdout.split()[-1])


def time_ours() -> tuple[float, float]:
    """-> the same for rppo_continuous.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "rppo_continuous.py", "--env-id", "gymnax::Pendulum-v1"]
        command += ["--mask-obs", "--num-envs", "64", "--num-steps", "128", "--update-epochs", "4"]
        command += ["--sequence-length", "128", "--num-minibatches", "8", "--eval-episodes", "0"]
        command += ["--total-timesteps", str(STEPS), "--run-dir", f"{folder}/run"]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/cache"
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        seconds = time.perf_counter() - start
        with open(f"{folder}/run/metrics.csv") as file:
            points = [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]
    (first, began), (last, ended) = next(x for x in points if x[0] >= STEPS // 4), points[-1]
    return seconds, (last - first) / (ended - began)


def main() -> None:
    if not (MEMORAX / "bin" / "python").exists():
        venv.create(MEMORAX, with_pip=True)
        install = [MEMORAX / "bin" / "python", "-m", "pip", "install", "-q", "memorax==1.0.1"]
        install.append("gymnax==0.0.9")  # memorax expects the steps of this one
        subprocess.run(install, check=True)
    rows = []
    for number in range(ROUNDS):
        for name, timing in [("rppo_continuous.py", time_ours), ("memorax", time_memorax)]:
            seconds, speed = timing()
            row = {"round": number, "program": name, "seconds": round(seconds, 2)}
            rows.append(row | {"steps_per_second": round(speed, 1)})
            print(rows[-1], file=sys.stderr, flush=True)
    with (ROOT / "benchmarks/results/recurrent_speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("| program | whole process, s | steady state, steps/s |\n|---|---|---|")
    for name in dict.fromkeys(row["program"] for row in rows):
        own = [row for row in rows if row["program"] == name]
        seconds, speed = [median(x[key] for x in own) for key in ("seconds", "steps_per_second")]
        print(f"| {name} | {seconds:.1f} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
