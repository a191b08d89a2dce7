"""mujoco::CartpoleBalance, CheetahRun, Go1JoystickFlatTerrain, ... (MuJoCo Playground)

pip install playground. Robots' models (locomotion, manipulation) are fetched with git when first
used. --env-kwargs: the environment's config, {"episode_length": 500}; impl "warp" needs a GPU.
"""

import jax.numpy as jnp
import numpy as np
from mujoco_playground import registry


def make(name, impl="jax", **kwargs):
    env = registry.load(name, config_overrides={"impl": impl, **kwargs})
    bound = np.ones(env.action_size, np.float32)

    def observe(state, steps):
        obs = state.obs["state"] if isinstance(state.obs, dict) else state.obs  # critics see more
        return obs, (state, steps)

    def step(key, state, action):
        state, steps = env.step(state[0], action), state[1] + 1
        ends = state.done > 0, steps >= env._config.episode_length
        return *observe(state, steps), state.reward, *ends

    return lambda key: observe(env.reset(key), jnp.int32(0)), step, (-bound, bound)
