"""Steady-state steps/s of DQN on gymnax CartPole-v1 beside rejax, and in PureJaxRL's configuration.

    python benchmarks/dqn_speed.py

10 environments, a gradient step on 128 transitions for each 10 steps, a buffer of 10,000. Beside
rejax: 64 x 64 networks (rejax has no others), double Q-learning. In PureJaxRL's configuration: 120
x 84, no double Q-learning; PureJaxRL is in no package index, so it is not run here. The programs
take turns, each in a process of its own that compiles and warms up first; rejax lives in a virtual
environment that this script makes (benchmarks/.venv-rejax). The peak is that of a matrix product of
the larger layer's size, 128 x 120 x 84, which XLA runs on one core. Prints Markdown and writes
benchmarks/results/dqn_speed.csv.
"""

import subprocess
import sys
import time
from statistics import median

from record import ROOT, python_of, without_xla_flags, write

ROUNDS, STEPS = 3, 200_000


def time_calls(train, state) -> float:
    """Steps/s of train(state, 1000-step iterations), after a call to warm up."""
    import jax

    state = jax.block_until_ready(train(state, STEPS // 4_000))
    start = time.perf_counter()
    jax.block_until_ready(train(state, STEPS // 1_000))
    return STEPS / (time.perf_counter() - start)


def time_ours(hidden_sizes: tuple[int, int], double_q: bool) -> float:
    sys.path.insert(0, str(ROOT))
    import jax

    import dqn

    args = dqn.Args(hidden_sizes=hidden_sizes, double_q=double_q, anneal_lr=False)
    init, train_iteration = dqn.make_train(args, dqn.make_env(args.env_id, args.num_envs))
    state, train = dqn.compile_training(init, train_iteration, jax.random.key(0))
    state, _ = train(state, 20)  # past learning_starts
    return time_calls(lambda state, n: train(state, n)[0], state)


def time_rejax() -> float:
    import jax
    from rejax import DQN

    algorithm = DQN.create(
        env="CartPole-v1",
        agent_kwargs={"activation": "relu"},
        num_envs=10,
        num_epochs=1,
        batch_size=128,
        buffer_size=10_000,
        fill_buffer=1_000,
        target_update_freq=500,
        total_timesteps=500_000,
        eval_freq=500_000,
        learning_rate=2.5e-4,
        gamma=0.99,
        skip_initial_evaluation=True,
    )

    def train(state, n):
        body = lambda _, state: algorithm.train_iteration(state)
        return jax.lax.fori_loop(0, 100 * n, body, state)

    state = jax.jit(algorithm.init_state)(jax.random.key(0))
    return time_calls(jax.jit(train, donate_argnums=0), state)


def peak() -> float:
    """GFLOP/s of a product [128, 120] x [120, 84]."""
    import jax
    import jax.numpy as jnp

    x, w, number = jnp.ones((128, 120)), jnp.full((120, 84), 1e-3), 20_000
    body = lambda _, x: x + 1e-9 * (x @ w).sum()
    product = jax.jit(lambda x: jax.lax.fori_loop(0, number, body, x))
    product(x).block_until_ready()
    start = time.perf_counter()
    product(x).block_until_ready()
    return 2 * 128 * 120 * 84 * number / (time.perf_counter() - start) / 1e9


PROGRAMS = {
    "ours_64_64_double": lambda: time_ours((64, 64), True),
    "rejax_64_64_double": time_rejax,
    "ours_120_84_double": lambda: time_ours((120, 84), True),
    "ours_120_84": lambda: time_ours((120, 84), False),
    "peak_gflops": peak,
}


def child(program: str) -> float:
    theirs = program.startswith("rejax")
    python = python_of("rejax") if theirs else sys.executable
    environment = without_xla_flags()
    command = [python, __file__, program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def main() -> None:
    rows = []
    for number in range(ROUNDS):
        rows.append({"round": number} | {name: round(child(name)) for name in PROGRAMS})
        print(rows[-1], file=sys.stderr, flush=True)
    write("dqn_speed", rows, peers="rejax")
    print("| program | steps/s (peak: GFLOP/s) |\n|---|---|")
    for name in PROGRAMS:
        print(f"| {name} | {median(row[name] for row in rows):,} |")
    ratio = median(row["ours_64_64_double"] / row["rejax_64_64_double"] for row in rows)
    print(f"\nratio to rejax: {ratio:.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(PROGRAMS[sys.argv[1]]())
    else:
        main()
