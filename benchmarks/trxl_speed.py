"""Where an iteration of ppo_trxl.py goes in the reference configuration, and what its cache saves.

    python benchmarks/trxl_speed.py

512 environments x 128 steps of MemoryChain, 2 layers of 256 with 8 heads, memory 128, windows of
64, 4 epochs of 8 minibatches: the sizes of transformerXL_PPO_JAX, whose layers have gates, like
those of ppo_gtrxl.py. Steady state, after compilation; "without cache" is the same rollout with
keys and values of the whole memory computed at each step. In turns; prints Markdown and writes
benchmarks/results/trxl_speed.csv.
"""

import os
import sys
import time
from statistics import median

from record import ROOT, write

sys.path.insert(0, str(ROOT))
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")

import jax

import ppo_gtrxl
import ppo_trxl

ROUNDS = 2
REFERENCE = {
    "env_kwargs": '{"memory_length": 5}',
    "num_envs": 512,
    "num_steps": 128,
    "memory_length": 128,
    "window_length": 64,
    "num_layers": 2,
    "num_heads": 8,
    "embed_dim": 256,
    "num_minibatches": 8,
    "update_epochs": 4,
    "total_timesteps": 10_000_000,
}


def seconds(function, *inputs) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    return time.perf_counter() - start


def rollout_without_cache(agent, env, acting, key, num_steps):
    def act_and_step(acting, key):
        env_state, obs, reset, memory = acting
        memory, pi, value = agent.step(memory, obs, reset)
        action = jax.random.categorical(key, pi.logits)
        env_state, timestep = env.step(key, env_state, action)
        done = timestep.terminated | timestep.truncated
        return (env_state, timestep.obs, done, memory), (action, value)

    return jax.lax.scan(act_and_step, (*acting,), jax.random.split(key, num_steps))


def parts_of(script, **changes) -> dict:
    """Name -> function without arguments that takes as long as the part of an iteration."""
    args = script.Args(**REFERENCE | changes)
    env = script.make_env(args.env_id, args.num_envs, env_kwargs=args.env_kwargs)
    init, train_iteration = script.make_train(args, env)
    state = jax.jit(init)(jax.random.key(0))
    key = jax.random.key(1)
    rollout = jax.jit(lambda state: script.rollout(state.agent, env, state.acting, key, 128))
    uncached = jax.jit(lambda state: rollout_without_cache(state.agent, env, state.acting, key, 16))
    train_iteration = jax.jit(train_iteration)
    parts = {
        "iteration": lambda: train_iteration(state),
        "rollout": lambda: rollout(state),
        "rollout without cache, 16 steps": lambda: uncached(state),
    }
    for part in parts.values():
        jax.block_until_ready(part())  # compile
    return parts


def main() -> None:
    cases = {
        "ppo_trxl.py, float32": (ppo_trxl, {}),
        "ppo_trxl.py, bfloat16": (ppo_trxl, {"compute_dtype": "bfloat16"}),
        "ppo_gtrxl.py, float32": (ppo_gtrxl, {}),
    }
    rows, steps = [], REFERENCE["num_envs"] * REFERENCE["num_steps"]
    print("| | steps/s | s per iteration | rollout, s | its share | rollout without cache, s |")
    print("|---|---|---|---|---|---|")
    for name, (script, changes) in cases.items():
        parts = parts_of(script, **changes)
        times = {part: [] for part in parts}
        for number in range(ROUNDS):
            for part, run in parts.items():
                times[part].append(seconds(run))
                row = {"case": name, "part": part, "round": number}
                rows.append(row | {"seconds": round(times[part][-1], 3)})
        iteration, rollout, uncached = [median(times[part]) for part in parts]
        print(
            f"| {name} | {steps / iteration:,.0f} | {iteration:.1f} | {rollout:.1f} | "
            f"{rollout / iteration:.0%} | {8 * uncached:.1f} |",
            flush=True,
        )
    write("trxl_speed", rows)


if __name__ == "__main__":
    main()
