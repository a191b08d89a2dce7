"""Where the seconds of the default command go: `python ppo.py`, phase by phase.

    python benchmarks/where_time_goes.py

Runs the phases of ppo.main one after the other with a clock around each and an empty compilation
cache. Simulating, acting and updating share one compiled program; their parts are timed in programs
of their own. Prints a Markdown table and writes benchmarks/results/where_time_goes.csv.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from record import ROOT, write

FOLDER = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = FOLDER.name
sys.path.insert(0, str(ROOT))
rows, clock = [], time.perf_counter()


def lap(phase: str, seconds: float | None = None) -> None:
    """Notes the seconds since the last lap, or those given."""
    global clock
    now = time.perf_counter()
    rows.append({"phase": phase, "seconds": round(now - clock if seconds is None else seconds, 2)})
    clock = time.perf_counter()


def best(function, *args) -> float:
    """Seconds of the fastest of five calls, after one to compile."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


import jax  # noqa: E402
import numpy as np  # noqa: E402

import ppo  # noqa: E402

lap("import")
args = ppo.Args()
env = ppo.make_env(args.env_id, args.num_envs, args.seed)
lap("build the environments (imports EnvPool)")
init, train_iteration = ppo.make_train(args, env)
state, train = ppo.compile_training(init, train_iteration, jax.random.key(args.seed))
lap("trace and compile")
for _ in range(args.num_iterations):
    state, metrics = jax.block_until_ready(train(state, 1))
lap("train")
run_dir = Path(FOLDER.name)
ppo.save_checkpoint(run_dir, args.num_iterations, state)
lap("save (imports Orbax)")
test_env = ppo.make_env(args.env_id, args.eval_episodes, 2**30)
lap("build the environments of the evaluation")
play = jax.jit(lambda state: ppo.evaluate(state, test_env, jax.random.key(0))[0])
returns = jax.block_until_ready(play(state))
lap("evaluate (compile, and play 100 episodes)")
total = sum(row["seconds"] for row in rows)
trained = next(row["seconds"] for row in rows if row["phase"] == "train")


def simulate(state, actions):
    def step(env_state, action):
        env_state, timestep = env.step(None, env_state, action)
        return env_state, timestep.reward

    return jax.lax.scan(step, state.env_state, actions)[1]


def roll_out(state):
    key = jax.random.key(0)
    return ppo.rollout(state.agent, env, state.env_state, state.obs, key, args.num_steps)[2]


iteration = best(jax.jit(lambda state: train_iteration(state)[1]), state)
rolled = best(jax.jit(roll_out), state)
simulated = best(jax.jit(simulate), state, jax.jit(roll_out)(state).action)
scale = trained / iteration
lap("  of that: simulate", simulated * scale)
lap("  of that: act", (rolled - simulated) * scale)
lap("  of that: advantages and update", (iteration - rolled) * scale)

print("| phase | seconds | share |\n|---|---|---|")
for row in rows:
    print(f"| {row['phase']} | {row['seconds']:.2f} | {row['seconds'] / total:.0%} |")
speed = args.num_iterations * args.batch_size / trained
print(f"\ntotal {total:.1f} s; {speed:,.0f} steps/s; greedy return {np.mean(returns):.0f}")
write("where_time_goes", rows)
