"""brax::ant, halfcheetah, hopper, humanoid, inverted_pendulum, reacher, walker2d, ...

pip install brax (no longer developed; mujoco:: is). --env-kwargs: episode_length (1000), and what
the environment takes, like {"backend": "spring"}.
"""

import jax.numpy as jnp
import numpy as np
from brax import envs


def make(name, episode_length=1000, **kwargs):
    env = envs.get_environment(name, **kwargs)  # bare: Brax's wrappers lose the last observation

    def reset(key):
        state = env.reset(key)
        return state.obs, (state, jnp.int32(0))

    def step(key, state, action):
        state, steps = env.step(state[0], action), state[1] + 1
        return state.obs, (state, steps), state.reward, state.done > 0, steps >= episode_length

    bound = np.ones(env.action_size, np.float32)
    return reset, step, (-bound, bound)
