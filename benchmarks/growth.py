"""How training speed grows: with environments, seeds, width of the networks and length of the
memory.

    python benchmarks/growth.py

Steps/s of whole iterations (acting and learning) in steady state, after compilation, medians of
five calls in one process. ppo.py: CartPole-v1 in gymnax, 128 steps, 4 epochs of 4 minibatches, 64
environments and 64 x 64 networks unless they are what grows (seeds: 16 environments each; all of
them count). ppo_trxl.py: MemoryChain-bsuite, 64 environments, 128 steps, windows of 64, 2 layers of
64. Prints Markdown, writes benchmarks/results/growth.csv and draws assets/growth.png.
"""

import os
import sys
import time
from statistics import median

from record import ROOT, write

sys.path.insert(0, str(ROOT))
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")

import jax
from matplotlib.figure import Figure

import ppo
import ppo_trxl

CARTPOLE = {"env_id": "gymnax::CartPole-v1", "num_steps": 128, "num_envs": 64}
CARTPOLE |= {"num_minibatches": 4, "update_epochs": 4, "total_timesteps": 10**9}
CHAIN = {"num_envs": 64, "num_steps": 128, "window_length": 64, "total_timesteps": 10**9}
CALLS = 5
AXES = {  # name: script, fixed arguments, the one that grows, its values
    "environments (ppo.py)": (ppo, CARTPOLE, "num_envs", [4**k for k in range(7)]),
    "seeds (ppo.py)": (ppo, CARTPOLE | {"num_envs": 16}, "num_seeds", [1, 4, 16, 64]),
    "width (ppo.py)": (ppo, CARTPOLE, "hidden_size", [16, 64, 256, 1024]),
    "memory, steps (ppo_trxl.py)": (ppo_trxl, CHAIN, "memory_length", [8, 32, 128, 512]),
}


def speed(script, fields: dict) -> float:
    """Environment steps a second, of all seeds together."""
    num_seeds = fields.get("num_seeds", 1)
    args = script.Args(**fields)
    env = script.make_env(args.env_id, args.num_envs, env_kwargs=args.env_kwargs)
    init, train_iteration = script.make_train(args, env)
    if num_seeds > 1:
        keys = jax.vmap(jax.random.key)(jax.numpy.arange(num_seeds))
        state, train = jax.lax.map(init, keys), jax.vmap(train_iteration)
    else:
        state, train = jax.jit(init)(jax.random.key(0)), train_iteration
    steps = args.batch_size * num_seeds
    repeats = max(1, 100_000 // steps)  # calls of about a second

    def several(state):
        metrics = jax.eval_shape(train, state)[1]
        metrics = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), metrics)
        step = lambda _, carry: train(carry[0])
        return jax.lax.fori_loop(0, repeats, step, (state, metrics))

    several = jax.jit(several, donate_argnums=0)
    state, _ = jax.block_until_ready(several(state))
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(several(state))
        seconds.append(time.perf_counter() - start)
    return repeats * steps / median(seconds)


def main() -> None:
    rows = []
    for name, (script, fixed, field, values) in AXES.items():
        print(f"\n| {name} |", *[f"{value} |" for value in values])
        print("|---|" + "---|" * len(values))
        for value in values:
            row = {"axis": name, "value": value}
            rows.append(row | {"steps_per_second": round(speed(script, fixed | {field: value}))})
            print(rows[-1], file=sys.stderr, flush=True)
        speeds = [row["steps_per_second"] for row in rows if row["axis"] == name]
        print("| steps/s |", *[f"{x:,} |" for x in speeds], flush=True)
    write("growth", rows)
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(AXES)), AXES, strict=True):
        points = [(row["value"], row["steps_per_second"]) for row in rows if row["axis"] == name]
        axes.loglog(*zip(*points, strict=True), "o-", base=2)
        axes.set_yscale("log", base=10)
        axes.set_xticks([x for x, _ in points], [x for x, _ in points], fontsize=7)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("steps/s")
    figure.savefig(ROOT / "assets" / "growth.png", dpi=110)


if __name__ == "__main__":
    main()
