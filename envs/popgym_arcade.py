"""popgym_arcade::CartPoleEasy, CountRecallHard, NavigatorMedium, ... (games on screens)

pip install --no-deps popgym-arcade dm-pix jaxtyping wadler-lindig (its dependencies would overwrite
gymnax). For a GPU: two cores draw 230 steps/s. --env-kwargs: partial_obs, obs_size (128 or 256).
"""

import copy

import popgym_arcade


def make(name, **kwargs):
    env, params = popgym_arcade.make(name, **kwargs)
    env.discount = lambda state, params: 1.0  # gymnax 1.0 has another one
    endless = copy.copy(env)  # some call the time limit a termination
    endless.max_steps_in_episode = endless.max_episode_length = 2**31 - 1

    def step(key, state, action):
        terminated = endless.step_env(key, state, action, endless.default_params)[3]
        obs, state, reward, done, info = env.step_env(key, state, action, params)
        return obs, state, reward, terminated, done & info["truncated"]

    return lambda key: env.reset_env(key, params), step, env.action_space(params)
