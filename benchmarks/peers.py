"""Our scripts beside what else pip installs, with the same networks and updates: PPO, SAC,
recurrent PPO.

    python benchmarks/peers.py                                     # lists the tasks
    python benchmarks/peers.py ppo_speed recurrent_speed ...

No program evaluates. They take turns, each as a process of its own with the compilation cache that
it has by itself (the peers: none; ours: emptied). Seconds are those of the whole process, the
steady state what comes after the first quarter of the steps (of memorax the second half, as its
second call compiles once more). The peers live in virtual environments that this script makes
(benchmarks/.venv-*).

ppo_speed: LunarLander-v3, 64 environments x 128 steps, 4 epochs of 32 minibatches, 64 x 64 tanh
networks for actor and critic, 131,072 steps. The peers step Gymnasium's simulators one after the
other, their default and the fastest of theirs for such a cheap one; ppo.py runs in EnvPool, its
default, and in the same Gymnasium.

sac_speed_pendulum, sac_speed_halfcheetah: one environment, an update with 256 transitions for each
step after the first 1,000, networks of 256 x 256; 20,000 and 10,000 steps.

recurrent_speed: Pendulum-v1 in gymnax, 64 environments x 128 steps, 4 epochs of 8 minibatches of
whole rollouts; actor and critic with an encoder of 64, an LSTM of 64 and a linear head each;
393,216 steps.

For each task it prints a Markdown table and writes benchmarks/results/<task>.csv.
"""

import csv
import subprocess
import sys
import tempfile
import time
from functools import partial
from statistics import median

from record import ROOT, python_of, without_xla_flags, write

ROUNDS = 3

CLOCK_OF_SB3 = """
import sys, time
from stable_baselines3.common.callbacks import BaseCallback

class Clock(BaseCallback):
    # Where each rollout begins: SAC's are single steps, so that both find a quarter of the steps.
    def _on_step(self):
        return True
    def _on_rollout_start(self):
        if self.num_timesteps == steps // 4:
            self.quarter = time.perf_counter()

steps, clock = int(sys.argv[1]), Clock()
"""
PPO_OF_SB3 = """
from stable_baselines3.common.env_util import make_vec_env
if sys.argv[2] == "sbx":
    from sbx import PPO
    policy = {}  # 64 x 64 is its default
else:
    from stable_baselines3 import PPO
    policy = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}}
env = make_vec_env("LunarLander-v3", n_envs=64, seed=1)
model = PPO("MlpPolicy", env, n_steps=128, batch_size=256, n_epochs=4, learning_rate=3e-3,
            gamma=0.997, gae_lambda=0.95, ent_coef=0.01, policy_kwargs=policy, seed=1, device="cpu")
"""
SAC_OF_SBX = """
from sbx import SAC
model = SAC("MlpPolicy", sys.argv[2], learning_starts=1000, batch_size=256, buffer_size=100_000,
            policy_kwargs={"net_arch": [256, 256]}, train_freq=1, gradient_steps=1, seed=1)
"""
END_OF_SB3 = """
model.learn(steps, callback=clock)
print(0.75 * steps / (time.perf_counter() - clock.quarter))
"""
PPO_OF_MEMORAX = """
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


def peer(name: str, program: str, words: list[str], steps: int) -> tuple:
    """-> seconds of the whole process, steps/s in steady state (its last word)."""
    command = [python_of(name), "-c", program, str(steps), *words]
    environment, start = without_xla_flags(), time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - start, float(done.stdout.split()[-1])


def ours(script: str, flags: str, steps: int) -> tuple[float, float]:
    """-> the same for one of our scripts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / script, *flags.split(), "--eval-episodes", "0"]
        command += ["--total-timesteps", str(steps), "--run-dir", f"{folder}/run"]
        environment = without_xla_flags() | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        seconds = time.perf_counter() - start
        with open(f"{folder}/run/metrics.csv") as file:
            points = [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]
    (first, began), (last, ended) = next(x for x in points if x[0] >= steps // 4), points[-1]
    return seconds, (last - first) / (ended - began)


PPO = "--num-envs 64 --num-steps 128 --num-minibatches 32 --env-id"
RPPO = (
    "--env-id gymnax::Pendulum-v1 --mask-obs --num-envs 64 --num-steps 128 --sequence-length 128 "
    "--num-minibatches 8 --update-epochs 4"
)
sb3 = lambda body: CLOCK_OF_SB3 + body + END_OF_SB3
TASKS = {  # name: steps, virtual environment of the peers, programs
    "ppo_speed": (
        131_072,
        "sbx",
        {
            "ppo.py, EnvPool": partial(ours, "ppo.py", f"{PPO} envpool::LunarLander-v3"),
            "ppo.py, Gymnasium": partial(ours, "ppo.py", f"{PPO} gymnasium::LunarLander-v3"),
            "SBX, Gymnasium": partial(peer, "sbx", sb3(PPO_OF_SB3), ["sbx"]),
            "Stable-Baselines3, Gymnasium": partial(peer, "sbx", sb3(PPO_OF_SB3), ["sb3"]),
        },
    ),
    "sac_speed_pendulum": (
        20_000,
        "sbx",
        {
            "sac.py": partial(ours, "sac.py", "--env-id gymnax::Pendulum-v1"),
            "sbx": partial(peer, "sbx", sb3(SAC_OF_SBX), ["Pendulum-v1"]),
        },
    ),
    "sac_speed_halfcheetah": (
        10_000,
        "sbx",
        {
            "sac.py": partial(ours, "sac.py", "--env-id envpool::HalfCheetah-v5"),
            "sbx": partial(peer, "sbx", sb3(SAC_OF_SBX), ["HalfCheetah-v5"]),
        },
    ),
    "recurrent_speed": (
        393_216,
        "memorax",
        {
            "rppo_continuous.py": partial(ours, "rppo_continuous.py", RPPO),
            "memorax": partial(peer, "memorax", PPO_OF_MEMORAX, []),
        },
    ),
}


def run(task: str) -> None:
    steps, peers, programs = TASKS[task]
    rows = []
    for number in range(ROUNDS):
        for name, timing in programs.items():
            seconds, speed = timing(steps)
            row = {"round": number, "program": name, "seconds": round(seconds, 2)}
            rows.append(row | {"steps_per_second": round(speed, 1)})
            print(rows[-1], file=sys.stderr, flush=True)
        write(task, rows, peers)
    print(f"| {task}, {steps:,} steps | whole process, s | steady state, steps/s |\n|---|---|---|")
    for name in programs:
        own = [row for row in rows if row["program"] == name]
        seconds, speed = [median(x[key] for x in own) for key in ("seconds", "steps_per_second")]
        print(f"| {name} | {seconds:.1f} | {speed:,.0f} |")


if __name__ == "__main__":
    if not sys.argv[1:] or not set(sys.argv[1:]) <= set(TASKS):
        sys.exit(f"usage: python benchmarks/peers.py TASK ..., of {', '.join(TASKS)}")
    for task in sys.argv[1:]:
        run(task)
