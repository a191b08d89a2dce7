"""envs/<suite>.py through make_env, against a plain loop over the library: no vmap, no resets.

The loop takes the state that each episode starts from, and counts the steps to the time limit.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo

pytestmark = pytest.mark.thorough

INSTALL = {
    "mujoco_playground": "pip install playground",
    "popgym_arcade": "pip install --no-deps popgym-arcade dm-pix jaxtyping wadler-lindig",
    "popjym": "pip install git+https://github.com/FLAIROx/popjym",
}


def need(name):
    return pytest.importorskip(name, reason=INSTALL.get(name, f"pip install {name.split('.')[0]}"))


# Each -> id, arguments, the suite's state -> the library's, that -> obs, and
# state, action -> state, reward, terminated. None of these environments reaches a limit of its own.

same = lambda state: state


def brax(limit, monkeypatch):
    env = need("brax.envs").get_environment("inverted_pendulum")
    kwargs = {"episode_length": limit}
    return "brax::inverted_pendulum", kwargs, lambda state: state[0], *stateful(env)


def mujoco(limit, monkeypatch):
    env = need("mujoco_playground").registry.load("CartpoleBalance", None, {"impl": "jax"})
    kwargs = {"episode_length": limit}
    return "mujoco::CartpoleBalance", kwargs, lambda state: state[0], *stateful(env)


def stateful(env):
    def step(state, action):
        state = env.step(state, action)
        return state, state.reward, state.done > 0

    return lambda state: state.obs, step


def navix(limit, monkeypatch):
    library, name = need("navix"), "Navix-LavaGapS5-v0"
    env = library.make(name, observation_fn=library.observations.symbolic_first_person)
    cache = jax.jit(env.reset)(jax.random.key(0)).state.cache

    def step(timestep, action):
        timestep = env.step(timestep, action)  # it would reset one step later
        return timestep, timestep.reward, timestep.step_type == 2

    kwargs = {"observation_fn": "symbolic_first_person", "max_steps": limit}
    restore = lambda timestep: timestep.replace(state=timestep.state.replace(cache=cache))
    return f"navix::{name}", kwargs, restore, lambda timestep: timestep.observation, step


def xminigrid(limit, monkeypatch):
    name = "MiniGrid-EmptyRandom-5x5"
    env, params = need("xminigrid").make(name, max_steps=limit)

    def step(timestep, action):
        timestep = env.step(params, timestep, action)
        return timestep, timestep.reward, timestep.reward > 0  # only the goal pays

    observe = lambda timestep: timestep.observation
    return f"xminigrid::{name}", {"max_steps": limit}, same, observe, step


def jumanji(name, limit, monkeypatch):
    env = need("jumanji").make(name)

    def step(state, action):
        if env.action_spec.shape:  # row and column
            action = jnp.array(divmod(action, env.action_spec.num_values[1]))
        state, timestep = env.step(state, action)
        return state, timestep.reward, timestep.last()

    kwargs = {"time_limit": limit} if limit else {}
    return f"jumanji::{name}", kwargs, lambda state: state[0], env._state_to_observation, step


def gxm(limit, monkeypatch):
    need("gxm"), need("pgx")
    from pgx.minatar import breakout

    env = breakout.MinAtarBreakout(sticky_action_prob=0.0)  # so that its steps need no key
    monkeypatch.setattr(breakout, "MinAtarBreakout", lambda: env)

    def step(state, action):
        state = env.step(state, action, jax.random.key(0))
        return state, state.rewards[0], state.terminated

    return "gxm::Pgx/minatar-breakout", {}, same, lambda state: state.observation, step


def popgym_arcade(limit, monkeypatch):
    registration = need("popgym_arcade").registration
    from popgym_arcade.environments.cartpole import CartPole

    short = partial(CartPole, max_steps_in_episode=limit - 1)  # it ends one step late
    monkeypatch.setattr(registration, "CartPoleEasy", short)
    return "popgym_arcade::CartPoleEasy", {}, same, *cartpole(short())


def popjym(limit, monkeypatch):
    registration = need("popjym").registration
    from popjym.environments.popgym_cartpole import NoisyStatelessCartPole

    short = partial(NoisyStatelessCartPole, max_steps_in_episode=limit)
    monkeypatch.setattr(registration, "StatelessCartPoleEasy", short)
    return "popjym::StatelessCartPoleEasy", {}, same, *cartpole(short())


def cartpole(env):
    env.discount, key, params = lambda *args: 1.0, jax.random.key(0), env.default_params
    late = type(env).__name__ == "CartPole"  # popgym_arcade judges the state before the step

    def step(state, action):
        _, after, reward, _, _ = env.step_env(key, state, action, params)
        judged = state if late else after
        fell = abs(judged.theta) > params.theta_threshold_radians
        return after, reward, fell | (abs(judged.x) > params.x_threshold)

    return lambda state: env.get_obs(state=state, params=params, key=key), step


CASES = {
    "brax": (brax, 8),
    "mujoco": (mujoco, 20),
    "navix": (navix, 10),
    "xminigrid": (xminigrid, 20),
    "jumanji-snake": (partial(jumanji, "Snake-v1"), 12),
    "jumanji-minesweeper": (partial(jumanji, "Minesweeper-v0"), None),
    "gxm": (gxm, None),
    "popgym_arcade": (popgym_arcade, 30),
    "popjym": (popjym, 15),
}


def flat(tree):
    return np.concatenate([np.ravel(x).astype(np.float32) for x in jax.tree.leaves(tree)])


def bits(state):
    """All of a state, to tell it from others."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    leaves = [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(state)]
    return b"".join(np.asarray(x).tobytes() for x in leaves)


@pytest.mark.parametrize("suite", CASES)
def test_suite_is_what_a_plain_loop_gives(suite, monkeypatch):
    make, limit = CASES[suite]
    env_id, kwargs, inner, observe, step = make(limit, monkeypatch)
    num_envs, rng = 3, np.random.default_rng(0)
    env = ppo.make_env(env_id, num_envs, env_kwargs=json.dumps(kwargs))
    env_step, step, observe = jax.jit(env.step), jax.jit(step), jax.jit(observe)
    env_state, obs = jax.jit(env.reset)(jax.random.key(0))
    states, lengths, ends, starts = [None] * num_envs, [0] * num_envs, [], set()
    for t in range(100):
        for b in range(num_envs):
            if lengths[b] == 0:
                states[b] = inner(jax.tree.map(lambda x, b=b: x[b], env_state))
                starts.add(bits(states[b]))
                np.testing.assert_allclose(obs[b].ravel(), flat(observe(states[b])), atol=1e-5)
        if env.action_low is None:
            action = rng.integers(0, env.action_size, num_envs).astype(np.int32)
        else:
            action = np.float32(rng.uniform(env.action_low, env.action_high, (num_envs, 1)))
            action[0] = np.nan if suite == "mujoco" and t == 50 else action[0]  # its only end
        env_state, timestep = env_step(jax.random.key(t), env_state, action)
        for b in range(num_envs):
            states[b], reward, terminated = step(states[b], action[b])
            lengths[b] += 1
            expected = flat(observe(states[b]))
            np.testing.assert_allclose(timestep.next_obs[b].ravel(), expected, atol=1e-4)
            np.testing.assert_allclose(timestep.reward[b], reward, atol=1e-5)
            assert timestep.terminated[b] == terminated
            cut = lengths[b] == limit and not terminated
            assert (timestep.truncated[b] and not timestep.terminated[b]) == cut
            if cut or terminated:
                ends.append("cut" if cut else "terminated")
                lengths[b] = 0
            else:
                np.testing.assert_array_equal(timestep.obs[b], timestep.next_obs[b])
        obs = timestep.obs
    assert "terminated" in ends and (ends.count("cut") > num_envs or limit is None), ends
    assert len(starts) == num_envs + len(ends) - sum(n == 0 for n in lengths) or suite == "gxm"


def test_popgym_goes_through_gymnasium():
    need("popgym")
    env = ppo.make_env("gymnasium::popgym:popgym-RepeatFirstEasy-v0", 2)
    assert env.obs_shape == (4,) and env.action_size == 4
    env_state, obs = env.reset(jax.random.key(0))
    first = jnp.argmax(obs, axis=1)
    total, dones = 0.0, []
    for t in range(51):
        env_state, timestep = env.step(jax.random.key(t), env_state, first)
        total += timestep.reward
        dones.append(timestep.terminated.all())
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)  # who repeats the first card wins
    assert dones.index(True) == 50
