"""All seeds of a task in one process, though its simulator runs outside JAX: sixteen learners of
sac.py take a GPU twice as long as one.

    python benchmarks/at_once.py sac_halfcheetah_1m td3_halfcheetah_1m
    python benchmarks/at_once.py sac_halfcheetah_1m --seeds 21 22 23

The scripts are run as they are but for make_env: the environments of all seeds are one pool, and one
step of it is one call. Seeds must follow each other. Writes what `run.py scores` writes.
"""

import shlex
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from peers import our_script
from record import Run, finished, parse_tasks, show, write
from run import SCORED, scores_of
from tasks import TASKS, Task


def pooled_env(
    make_env: Callable, call_host: Callable, num_seeds: int, env_id, num_envs, *args
) -> Any:
    """An Env of num_envs environments, which are block k of a pool: k is the seed's place under a
    vmap over num_seeds, or how often reset was called before."""
    pool = make_env(env_id, num_seeds * num_envs, *args)
    blocks = lambda x: x.reshape(num_seeds, num_envs, *x.shape[1:])
    token, obs = jax.jit(pool.reset)(jax.random.key(0))
    first, turns = jax.device_get(blocks(obs)), count()

    def reset(key):
        block = jax.ShapeDtypeStruct(first.shape[1:], first.dtype)
        return token, call_host(lambda: first[next(turns)], block)

    @custom_vmap
    def step(key, token, action):  # only its shapes count: it is always called under vmap
        action = jnp.tile(action, (num_seeds, *[1] * (action.ndim - 1)))
        own = lambda x: jnp.zeros((num_envs, *x.shape[1:])[: x.ndim], x.dtype)
        return jax.tree.map(own, jax.eval_shape(pool.step, key, token, action))

    @step.def_vmap
    def step_all(axis_size, in_batched, keys, tokens, actions):
        assert axis_size == num_seeds and all(in_batched)
        token, timestep = pool.step(keys[0], tokens[0], jnp.concatenate(actions))
        result = jnp.broadcast_to(token, (num_seeds,)), jax.tree.map(blocks, timestep)
        return result, jax.tree.map(lambda _: True, result)

    return pool._replace(reset=reset, step=step, hosted=False)


def run_at_once(task: Task, seeds: list[int]) -> Run:
    """A whole run of all seeds."""
    script = our_script(task.script.removesuffix(".py"))
    make_env, words = script.make_env, sys.argv

    def make_pool(*args):
        """Called first, for the training; later ones are judged in, one seed after the other."""
        script.make_env = lambda *args: make_env(*args)._replace(hosted=False)
        return pooled_env(make_env, script.call_host, len(seeds), *args)

    with tempfile.TemporaryDirectory() as folder:
        flags = f"{task.scored_flags} --seed {seeds[0]} --num-seeds {len(seeds)}"
        sys.argv = [task.script, *shlex.split(flags), "--run-dir", f"{folder}/run"]
        script.make_env = make_pool
        try:
            return finished(script.main(script.parse_args()))
        finally:
            script.make_env, sys.argv = make_env, words


def parse(words: list[str]):
    names = [name for name in SCORED if "envpool::" in TASKS[name].flags]
    args = parse_tasks(__doc__, names, words, seeds=True)
    for seeds in [args.seeds] if args.seeds else [TASKS[name].seeds for name in args.tasks]:
        if sorted(seeds) != [*range(min(seeds), min(seeds) + max(2, len(seeds)))]:
            print(
                "at_once.py: error: --seeds must be a row of two or more, as 1 2 3", file=sys.stderr
            )
            sys.exit(2)
    return args


def files(words: list[str]) -> set[str]:
    """The raw files that a command line writes."""
    return {f"{kind}_{task}.csv" for task in parse(words).tasks for kind in ("scores", "curves")}


def main(words: list[str]) -> None:
    args = parse(words)
    for name in args.tasks:
        seeds = sorted(args.seeds or TASKS[name].seeds)
        run = run_at_once(TASKS[name], seeds)
        for number, seed in enumerate(seeds):
            for kind, rows in zip(("scores", "curves"), scores_of(run, seed), strict=True):
                write(f"{kind}_{name}", rows, "seed")
            show({"task": name} | scores_of(run, seed)[0][0], heading=number == 0)


if __name__ == "__main__":
    main(sys.argv[1:])
