"""craftax::Craftax-Symbolic-v1, -Pixels-v1, Craftax-Classic-Symbolic-v1, ...: pip install craftax

Truncated is its own step limit, --env-kwargs '{"max_timesteps": 10000}'. Worlds are expensive: 16
environments that end in a step share a new one.
"""

import numpy as np
from craftax.craftax_env import make_craftax_env_from_name


def make(name, **kwargs):
    env = make_craftax_env_from_name(name, auto_reset=False)
    params = env.default_params.replace(**kwargs)
    without_limit = params.replace(max_timesteps=np.iinfo(np.int32).max)

    def reset(key):
        return env.reset(key, params)

    def step(key, state, action):
        obs, state, reward, done, _ = env.step(key, state, action, params)
        terminated = env.is_terminal(state, without_limit)
        return obs, state, reward, terminated, done & ~terminated

    return reset, step, env.action_space(params), 16
