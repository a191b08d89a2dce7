"""Steady-state steps/s of PPO on gymnax CartPole-v1 beside rejax, in the same configuration.

    python benchmarks/cartpole_speed.py

64 x 64 tanh networks, 128 steps, 4 epochs x 4 minibatches, about 500k steps per timing. The two
take turns, each in a process of its own that compiles first; rejax lives in a virtual environment
that this script makes (benchmarks/.venv-rejax), and runs as it is and with the XLA flag that ppo.py
sets for itself. Eight seeds at once are timed against one. The share of the peak compares the
arithmetic of the matrix products of the networks (forward in the rollout, forward and twice that
backward in each epoch) with the best large product that JAX reaches here. Prints Markdown and
writes benchmarks/results/cartpole_speed.csv.
"""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

from record import ROOT, python_of, without_xla_flags, write

NUM_ENVS, ROUNDS, NUM_STEPS = (4, 64, 2048), 3, 128
PRODUCTS = 2 * ((4 * 64 + 64 * 64 + 64 * 2) + (4 * 64 + 64 * 64 + 64))  # FLOP, both networks
GFLOP_PER_STEP = PRODUCTS * (1 + 4 * 3) / 1e9


def calls_of_half_a_million(num_envs: int) -> int:
    return max(1, 500_000 // (num_envs * NUM_STEPS))


def time_ppo(num_envs: int, num_seeds: int) -> float:
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp

    import ppo

    args = ppo.Args(
        env_id="gymnax::CartPole-v1",
        num_envs=num_envs,
        num_steps=NUM_STEPS,
        num_minibatches=4,
        update_epochs=4,
        total_timesteps=2 * max(500_000, num_envs * NUM_STEPS),
        learning_rate=5e-4,
        anneal_lr=False,
        gamma=0.99,
        reward_scale=1.0,
    )
    init, train_iteration = ppo.make_train(args, ppo.make_env(args.env_id, num_envs))
    key = jax.random.key(0)
    if num_seeds > 1:
        init, train_iteration = partial(jax.lax.map, init), jax.vmap(train_iteration)
        key = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
    state, train = ppo.compile_training(init, train_iteration, key)
    return time_calls(lambda state, n: train(state, n)[0], state, num_envs)


def time_rejax(num_envs: int, num_seeds: int) -> float:
    import jax
    from rejax import PPO

    steps = calls_of_half_a_million(num_envs) * num_envs * NUM_STEPS
    algorithm = PPO.create(
        env="CartPole-v1",
        agent_kwargs={"activation": "tanh"},
        num_envs=num_envs,
        num_steps=NUM_STEPS,
        num_minibatches=4,
        num_epochs=4,
        total_timesteps=steps,
        eval_freq=steps,
        learning_rate=5e-4,
        gamma=0.99,
        gae_lambda=0.95,
        clip_eps=0.2,
        ent_coef=0.01,
        max_grad_norm=0.5,
        skip_initial_evaluation=True,
    )

    def train(state, n):
        return jax.lax.fori_loop(0, n, lambda _, state: algorithm.train_iteration(state), state)

    state = jax.jit(algorithm.init_state)(jax.random.key(0))
    return time_calls(jax.jit(train, donate_argnums=0), state, num_envs)


def time_calls(train, state, num_envs: int) -> float:
    """Steps/s of a seed: one call of about 500k steps, after a shorter one to warm up."""
    import jax

    calls = calls_of_half_a_million(num_envs)
    state = jax.block_until_ready(train(state, max(1, calls // 4)))
    start = time.perf_counter()
    jax.block_until_ready(train(state, calls))
    return calls * num_envs * NUM_STEPS / (time.perf_counter() - start)


def peak() -> float:
    """GFLOP/s of a large float32 matrix product."""
    import jax
    import jax.numpy as jnp

    product, x = jax.jit(lambda x: x @ x), jnp.ones((4096, 4096))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        best = min(best, time.perf_counter() - start)
    return 2 * 4096**3 / best / 1e9


def child(
    python: Path | str, what: str, num_envs: int = 0, num_seeds: int = 1, flags: str = ""
) -> float:
    command = [python, __file__, what, str(num_envs), str(num_seeds)]
    environment = without_xla_flags() | ({"XLA_FLAGS": flags} if flags else {})
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def main() -> None:
    rejax = python_of("rejax")
    rows = []
    for num_envs in NUM_ENVS:
        for number in range(ROUNDS):
            row = {"num_envs": num_envs, "round": number}
            row["ppo"] = round(child(sys.executable, "ppo", num_envs))
            row["rejax"] = round(child(rejax, "rejax", num_envs))
            flags = "--xla_cpu_prefer_vector_width=512"
            row["rejax_same_flag"] = round(child(rejax, "rejax", num_envs, flags=flags))
            row["ppo_8_seeds"] = round(child(sys.executable, "ppo", num_envs, 8))
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    top = median(child(sys.executable, "peak") for _ in range(3))
    rows = [row | {"peak_gflops": round(top)} for row in rows]
    write("cartpole_speed", rows, peers="rejax")
    print(
        "| environments | ppo.py | rejax | ratio | same flag | share of the peak | 8 seeds cost |"
    )
    print("|---|---|---|---|---|---|---|")
    for num_envs in NUM_ENVS:
        mine = [row for row in rows if row["num_envs"] == num_envs]
        ours, theirs = [median(row[name] for row in mine) for name in ("ppo", "rejax")]
        ratio, alike = [
            median(row["ppo"] / row[name] for row in mine) for name in ("rejax", "rejax_same_flag")
        ]
        seeds = median(row["ppo"] / row["ppo_8_seeds"] for row in mine)
        share = ours * GFLOP_PER_STEP / top
        print(
            f"| {num_envs} | {ours:,} | {theirs:,} | {ratio:.2f} | {alike:.2f} | {share:.0%} | {seeds:.1f} x one |"
        )
    print(f"\nsteps/s, medians of {ROUNDS} interleaved runs; peak: {top:.0f} GFLOP/s")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        what, num_envs, num_seeds = sys.argv[1], *map(int, sys.argv[2:])
        timing = {"ppo": time_ppo, "rejax": time_rejax, "peak": lambda *_: peak()}[what]
        print(timing(num_envs, num_seeds))
    else:
        main()
