"""popjym::RepeatFirstEasy, RepeatPreviousHard, StatelessCartPoleMedium, ... (POPGym in JAX)

pip install git+https://github.com/FLAIROx/popjym (popjaxrl's tasks; not on PyPI). CartPole and
Pendulum have a time limit; the others' length is the game's. MetaCartPole needs an older JAX.
"""

import copy

import popjym


def make(name, **kwargs):
    env, params = popjym.make(name, **kwargs)
    env.discount = lambda state, params: 1.0  # gymnax 1.0 has another one
    endless = copy.copy(env)  # it calls the time limit a termination
    endless.max_steps_in_episode = 2**31 - 1

    def step(key, state, action):
        terminated = endless.step_env(key, state, action, params)[3]
        obs, state, reward, done, _ = env.step_env(key, state, action, params)
        return obs, state, reward, terminated, done & ~terminated

    return lambda key: env.reset_env(key, params), step, env.action_space(params)
