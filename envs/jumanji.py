"""jumanji::Snake-v1, Game2048-v1, Maze-v0, Tetris-v0, Knapsack-v1, RubiksCube-v0, ...

pip install jumanji. One agent, up to 10,000 actions; masks are unused. --env-kwargs: time_limit.
"""

import jax.numpy as jnp
import jumanji
import numpy as np


def make(name, **kwargs):
    env = jumanji.make(name, **kwargs)
    sizes = np.atleast_1d(env.action_spec.num_values)  # of each part of an action
    assert not env.reward_spec.shape and np.prod(sizes, dtype=float) <= 10_000, "too large"
    limit, env.time_limit = getattr(env, "time_limit", 2**31 - 1), 2**31 - 1  # it would terminate

    def observe(state, timestep, steps):
        ends = timestep.last(), steps >= limit
        return timestep.observation, (state, steps), timestep.reward, *ends

    def step(key, state, action):
        action = jnp.stack(jnp.unravel_index(action, sizes)).reshape(env.action_spec.shape)
        return observe(*env.step(state[0], action), state[1] + 1)

    return lambda key: observe(*env.reset(key), jnp.int32(0))[:2], step, int(sizes.prod())
