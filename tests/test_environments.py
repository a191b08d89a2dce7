"""Every suite keeps the protocol: same-step resets, the true next_obs, terminated against truncated.

Each is stepped with random actions and compared with a plain loop over the simulator itself.
"""

import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo

ROOT = Path(ppo.__file__).parent
ENVPOOL_KWARGS = '{"max_episode_steps": 60}'


def simulator_seed(seed):
    """What make_env turns a seed into, for simulators that give environment i the seed + i."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0] >> 2)


def play(env, num_envs, num_steps, seed=0):
    """Random actions -> first obs, actions [T, B] and the stacked Timestep [T, B, ...]."""
    actions = np.random.default_rng(seed).integers(0, env.action_size, (num_steps, num_envs))
    actions = actions.astype(np.int32)

    @jax.jit
    def run(key, actions):
        env_state, first_obs = env.reset(key)

        def step(env_state, x):
            return env.step(x[0], env_state, x[1])

        keys = jax.random.split(key, num_steps)
        return first_obs, jax.lax.scan(step, env_state, (keys, actions))[1]

    first_obs, steps = run(jax.random.key(seed), actions)
    return np.asarray(first_obs), actions, jax.tree.map(np.asarray, steps)


def check_protocol(first_obs, steps):
    """What every suite must keep, whatever the simulator does."""
    done = steps.terminated | steps.truncated
    following = np.concatenate([first_obs[None], steps.obs[:-1]])
    np.testing.assert_array_equal(steps.obs[~done], steps.next_obs[~done])
    assert done.any(), "no episode ended: nothing was tested"
    assert not np.array_equal(steps.obs[done], steps.next_obs[done])
    assert np.isfinite(steps.reward).all() and following.shape == steps.obs.shape


def compare_with_plain_loop(make_one, first_obs, actions, steps, atol=0.0):
    """make_one(b) -> reset() -> obs, step(action) -> obs, reward, terminated, truncated."""
    returns, finished, plain_returns = np.zeros(actions.shape[1]), [], []
    for b in range(actions.shape[1]):
        reset, step = make_one(b)
        np.testing.assert_allclose(first_obs[b], reset(), atol=atol)
        total = 0.0
        for t, action in enumerate(actions[:, b]):
            obs, reward, terminated, truncated = step(int(action))
            np.testing.assert_allclose(steps.next_obs[t, b], obs, atol=atol, err_msg=f"{t} {b}")
            np.testing.assert_allclose(steps.reward[t, b], reward, rtol=1e-6, atol=1e-6)
            assert (steps.terminated[t, b], steps.truncated[t, b]) == (terminated, truncated)
            total, returns[b] = total + reward, returns[b] + steps.reward[t, b]
            if terminated or truncated:
                np.testing.assert_allclose(steps.obs[t, b], reset(), atol=atol)
                finished.append(returns[b])
                plain_returns.append(total)
                total = returns[b] = 0.0
    np.testing.assert_allclose(finished, plain_returns, rtol=1e-5, atol=1e-4)
    assert finished


# --- gymnasium ------------------------------------------------------------------------------------


def gymnasium_loop(name, seed, **kwargs):
    def make_one(b):
        env = gymnasium.make(name, **kwargs)
        flat = gymnasium.wrappers.FlattenObservation(env)
        flat.reset(seed=simulator_seed(seed) + b)
        flat.reset()  # make_env does so too, to see what an observation looks like
        reset = lambda: flat.reset()[0].astype(np.float32)

        def step(action):
            obs, reward, terminated, truncated, _ = flat.step(action)
            return obs.astype(np.float32), reward, terminated, truncated

        return reset, step

    return make_one


@pytest.mark.parametrize("name", ["CartPole-v1", "LunarLander-v3", "FrozenLake-v1"])
def test_gymnasium_is_what_a_plain_loop_gives(name):
    kwargs = '{"max_episode_steps": 30}'
    env = ppo.make_env(f"gymnasium::{name}", 3, seed=5, env_kwargs=kwargs)
    first_obs, actions, steps = play(env, 3, 120)
    check_protocol(first_obs, steps)
    loop = gymnasium_loop(name, 5, max_episode_steps=30)
    compare_with_plain_loop(loop, first_obs, actions, steps)
    assert env.obs_shape == first_obs.shape[1:]


class Nested(gymnasium.Env):
    """Dict and Tuple observations; three steps, then the end."""

    box = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    observation_space = gymnasium.spaces.Dict(
        {"time": box, "rest": gymnasium.spaces.Tuple([box, gymnasium.spaces.Discrete(3)])}
    )
    action_space = gymnasium.spaces.Discrete(2)

    def observe(self):
        return {"time": np.full(2, self.time, float), "rest": (np.array([7.0, 8.0]), self.time % 3)}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        return self.observe(), float(action), self.time >= 3, False, {}


class Boundless(Nested):
    observation_space = gymnasium.spaces.Sequence(Nested.box)


gymnasium.register("Nested-v0", Nested)
gymnasium.register("Boundless-v0", Boundless)


def test_gymnasium_flattens_dict_and_tuple_observations():
    env = ppo.make_env("gymnasium::Nested-v0", 2)
    assert env.obs_shape == (2 + 3 + 2,)
    first_obs, _, steps = play(env, 2, 7)
    np.testing.assert_array_equal(first_obs[0], [7, 8, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(steps.terminated[:, 0], [0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(steps.next_obs[2, 0], [7, 8, 1, 0, 0, 3, 3])
    np.testing.assert_array_equal(steps.obs[2, 0], [7, 8, 1, 0, 0, 0, 0])


def test_gymnasium_refuses_observations_without_a_size(capsys):
    with pytest.raises(SystemExit) as stop:
        ppo.make_env("gymnasium::Boundless-v0", 2)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Boundless-v0" in error and error.count("\n") == 1


# --- envpool --------------------------------------------------------------------------------------


def envpool_loop(name, seed):
    import envpool

    def make_one(b):
        seed_b = simulator_seed(seed) + b
        pool = envpool.make_gymnasium(name, num_envs=1, seed=seed_b, max_episode_steps=60)
        pool.reset()  # make_env does so too, to see what an observation looks like

        def step(action):
            obs, reward, terminated, truncated, _ = pool.step(np.array([action], np.int32))
            return obs[0], reward[0], terminated[0], truncated[0]

        return lambda: pool.reset()[0][0], step

    return make_one


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["LunarLander-v3", "CartPole-v1"])
def test_envpool_is_what_a_plain_loop_gives(name, backend, monkeypatch):
    monkeypatch.setattr(
        jax, "default_backend", lambda: backend
    )  # a GPU's callback runs on a CPU too
    env = ppo.make_env(f"envpool::{name}", 3, seed=5, env_kwargs=ENVPOOL_KWARGS)
    first_obs, actions, steps = play(env, 3, 150)
    check_protocol(first_obs, steps)
    assert steps.truncated.any() or name == "CartPole-v1"
    compare_with_plain_loop(envpool_loop(name, 5), first_obs, actions, steps)


def test_envpool_with_64_bit_arrays_is_what_a_plain_loop_gives():
    """MuJoCo's arrays have 64 bits, JAX's have 32."""
    import envpool

    env = ppo.make_env("envpool::InvertedPendulum-v5", 2, seed=5)
    pool = envpool.make_gymnasium("InvertedPendulum-v5", num_envs=2, seed=simulator_seed(5))
    pool.reset()
    env_state, obs = env.reset(jax.random.key(0))
    np.testing.assert_allclose(obs, pool.reset()[0], atol=1e-6)
    step, ends = jax.jit(env.step), 0
    for t in range(60):
        action = np.sin(np.arange(2.0) + t).reshape(2, 1)
        env_state, timestep = step(jax.random.key(t), env_state, jnp.float32(action))
        obs, reward, terminated, truncated, _ = pool.step(np.float32(action).astype(float))
        np.testing.assert_allclose(timestep.next_obs, obs, atol=1e-5)
        np.testing.assert_allclose(timestep.reward, reward, atol=1e-6)
        np.testing.assert_array_equal(timestep.terminated, terminated)
        if terminated.any():
            obs[terminated] = pool.reset(np.flatnonzero(terminated).astype(np.int32))[0]
            np.testing.assert_allclose(timestep.obs, obs, atol=1e-5)
            ends += 1
    assert ends


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_envpool_steps_wait_for_the_reset_even_if_the_action_does_not_need_it(backend, monkeypatch):
    """Two steps with one action, as action repeat makes them: the second one's action does not
    depend on the first one's obs, so nothing but env_state can make it wait for the reset."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    env = ppo.make_env("envpool::LunarLander-v3", 16, seed=5)

    @jax.jit
    def run(key, actions):
        def step(env_state, action):
            env_state, first = env.step(key, env_state, action)
            env_state, second = env.step(key, env_state, action)
            return env_state, (first, second)

        return jax.lax.scan(step, env.reset(key)[0], actions)[1]

    actions = np.random.default_rng(0).integers(0, 4, (300, 16)).astype(np.int32)
    first, second = jax.tree.map(np.asarray, run(jax.random.key(0), actions))
    ended = first.terminated | first.truncated
    assert ended.sum() > 30
    # A false transition is a reset in the place of a step: no reward, and no motion from obs.
    assert (second.reward[ended] != 0).all()
    assert (second.next_obs[ended] != first.obs[ended]).any(axis=1).all()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_step_s_call_is_given_what_the_one_before_returned(backend, monkeypatch):
    """Nothing else orders them: neither road asks JAX for ordered calls."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    env = ppo.make_env("envpool::CartPole-v1", 2)

    def steps(key, action):
        env_state, _ = env.reset(key)
        env_state, _ = env.step(key, env_state, action)
        return env.step(key, env_state, action)

    equations = jax.make_jaxpr(steps)(jax.random.key(0), np.zeros(2, np.int32)).eqns
    calls = [x for x in equations if "callback" in x.primitive.name]
    assert len(calls) == 3
    for before, call in pairwise(calls):
        assert any(x is y for x in call.invars for y in before.outvars)


def test_a_gpu_s_program_has_no_tokens_of_xla(monkeypatch):
    """Its compiler for GPUs aborts ("Check failed: shape.IsArray()") on many of the loops that pass
    one on, as ordered callbacks do: so did ppo.py, pqn.py and ppo_continuous.py on EnvPool."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    env = ppo.make_env("envpool::CartPole-v1", 2)

    @jax.jit
    def run(key, action):
        step = lambda env_state, _: env.step(key, env_state, action)
        return jax.lax.scan(step, env.reset(key)[0], length=3)

    program = run.lower(jax.random.key(0), np.zeros(2, np.int32)).as_text()
    assert program.count("callback") >= 2 and "token" not in program


def test_numbers_as_observations_become_one_hot():
    env = ppo.make_env("gymnasium::FrozenLake-v1", 3)
    obs = env.reset(jax.random.key(0))[1]
    assert env.obs_shape == (16,) and obs.shape == (3, 16) and obs.dtype == jnp.float32
    np.testing.assert_array_equal(obs.sum(axis=1), 1.0)


def test_envpool_joins_dict_observations():
    env = ppo.make_env("envpool::CartpoleBalance-v1", 2)  # DM Control
    env_state, obs = env.reset(jax.random.key(0))
    assert env.obs_shape == obs.shape[1:] == (5,) and env.action_size == 1
    np.testing.assert_array_equal([env.action_low, env.action_high], [[-1.0], [1.0]])
    _, timestep = env.step(jax.random.key(1), env_state, jnp.zeros((2, 1)))
    assert timestep.next_obs.shape == (2, 5) and (timestep.reward > 0).all()


def test_envpool_screens_have_their_channels_last():
    env = ppo.make_env("envpool::Pong-v5", 1)
    _, obs = env.reset(jax.random.key(0))
    assert env.obs_shape == (84, 84, 4) and obs.shape == (1, 84, 84, 4) and obs.dtype == jnp.uint8


# --- gymnax ---------------------------------------------------------------------------------------


def test_gymnax_cartpole_moves_like_gymnasium_s():
    """Gymnasium's CartPole, put into each state, moves alike; the limit is 60 steps."""
    env = ppo.make_env("gymnax::CartPole-v1", 4, env_kwargs='{"max_steps_in_episode": 60}')
    first_obs, actions, steps = play(env, 4, 200)
    check_protocol(first_obs, steps)
    oracle = gymnasium.make("CartPole-v1").unwrapped
    oracle.reset()
    length = np.zeros(4, int)
    before = np.concatenate([first_obs[None], steps.obs[:-1]])
    for t, b in np.ndindex(actions.shape):
        oracle.state, oracle.steps_beyond_terminated = before[t, b].astype(float), None
        obs, reward, terminated, _, _ = oracle.step(int(actions[t, b]))
        length[b] += 1
        np.testing.assert_allclose(steps.next_obs[t, b], obs, atol=1e-5)
        assert steps.reward[t, b] == reward and steps.terminated[t, b] == terminated
        assert steps.truncated[t, b] == (length[b] == 60)
        if steps.terminated[t, b] or steps.truncated[t, b]:
            assert (np.abs(steps.obs[t, b]) <= 0.05).all()  # a fresh start
            length[b] = 0


def test_gymnax_truncates_at_its_limit():
    env = ppo.make_env("gymnax::CartPole-v1", 4, env_kwargs='{"max_steps_in_episode": 5}')
    _, _, steps = play(env, 4, 20)
    np.testing.assert_array_equal(steps.truncated[:, 0], np.arange(1, 21) % 5 == 0)
    assert not steps.terminated.any()


def test_rewards_are_floats_also_where_gymnax_counts_them():
    env = ppo.make_env("gymnax::BernoulliBandit-misc", 3)
    state, _ = env.reset(jax.random.key(0))
    _, timestep = env.step(jax.random.key(1), state, jnp.zeros(3, int))
    assert timestep.reward.dtype == jnp.float32


def test_gymnax_grids_become_vectors():
    env = ppo.make_env("gymnax::Breakout-MinAtar", 2)
    first_obs, _, steps = play(env, 2, 100)
    assert env.obs_shape == (400,) and first_obs.dtype == np.float32
    check_protocol(first_obs, steps)


# --- craftax --------------------------------------------------------------------------------------


def test_gymnax_loads_what_it_draws_with_when_it_draws():
    """In a process of its own, as here everything is loaded already."""
    program = """
        import sys
        import ppo

        ppo.make_env("gymnax::CartPole-v1", 2)
        assert not {"seaborn", "pandas", "scipy.stats", "matplotlib.pyplot"} & set(sys.modules)
        import matplotlib.pyplot, seaborn
        from gymnax.environments.misc import pong

        assert pong.sns.heatmap is seaborn.heatmap
        assert pong.plt.figure is matplotlib.pyplot.figure
        loaded = sys.modules["seaborn"]
        ppo.make_env("gymnax::CartPole-v1", 2)
        assert sys.modules["seaborn"] is loaded
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True)


@pytest.mark.thorough
def test_craftax_shares_out_fresh_worlds_and_tells_limit_from_death():
    """Compared with Craftax's own step for a single world, with the keys that vmap_env hands out."""
    from craftax.craftax_env import make_craftax_env_from_name

    name, num_envs, limit = "Craftax-Classic-Symbolic-v1", 2, 6
    env = ppo.make_env(f"craftax::{name}", num_envs, env_kwargs='{"max_timesteps": 6}')
    single = make_craftax_env_from_name(name, auto_reset=False)
    params = single.default_params.replace(max_timesteps=limit)
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    env_state, obs = reset(jax.random.key(0))
    for t in range(1, 14):
        key = jax.random.key(t)
        if t == 9:  # world 1 dies of thirst and hunger
            health = env_state.player_health.at[1].set(0)
            env_state = env_state.replace(player_health=health)
        *step_keys, reset_key = jax.random.split(key, num_envs + 1)
        old = [jax.tree.map(lambda x, b=b: x[b], env_state) for b in range(num_envs)]
        env_state, timestep = step(key, env_state, jnp.array([0, 5]))
        for b, b_key in enumerate(step_keys):
            obs, _, reward, done, _ = single.step(b_key, old[b], [0, 5][b], params)
            np.testing.assert_allclose(timestep.next_obs[b], obs, atol=1e-6)
            np.testing.assert_allclose(timestep.reward[b], reward, atol=1e-6)
            assert done == timestep.terminated[b] | timestep.truncated[b]
        done = timestep.terminated | timestep.truncated
        expected = {6: [0, 0], 9: [0, 1], 12: [0, 0]}.get(t, [0, 0])
        np.testing.assert_array_equal(timestep.terminated, expected)
        np.testing.assert_array_equal(timestep.truncated, {6: [1, 1], 12: [1, 0]}.get(t, [0, 0]))
        fresh = single.reset(jax.random.split(reset_key, 1)[0], params)[0] if done.any() else None
        for b in range(num_envs):
            np.testing.assert_allclose(timestep.obs[b], fresh if done[b] else timestep.next_obs[b])


# --- all suites -----------------------------------------------------------------------------------


def test_mask_obs_hides_entries():
    whole, part = [ppo.make_env("gymnax::CartPole-v1", 3, mask_obs=x) for x in [(), (1, 3)]]
    first_obs, _, steps = play(whole, 3, 40)
    masked_obs, _, masked_steps = play(part, 3, 40)
    assert part.obs_shape == (2,)
    np.testing.assert_array_equal(masked_obs, first_obs[:, [0, 2]])
    np.testing.assert_array_equal(masked_steps.obs, steps.obs[..., [0, 2]])
    np.testing.assert_array_equal(masked_steps.next_obs, steps.next_obs[..., [0, 2]])


MINE = """
    import jax
    import jax.numpy as jnp

    def make(name, size=2, **kwargs):
        def reset(key):
            number = jax.random.uniform(key)
            return {"time": jnp.zeros(size), "number": number}, (0, number)

        def step(key, state, action):
            time, number = state[0] + 1, jax.random.uniform(jax.random.split(key)[0])
            obs = {"time": jnp.full(size, time), "number": number}
            return obs, (time, number), action, time == 3, time == 5

        return reset, step, 2, *kwargs.values()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "mine.py").write_text(textwrap.dedent(MINE))
    monkeypatch.setattr(ppo, "__file__", str(tmp_path / "ppo.py"))


def test_a_suite_of_the_user_s_own(mine):
    """Its observations are a tree, joined by name: number, time."""
    env = ppo.make_env("mine::Counter", 2, env_kwargs='{"size": 4}')
    _, actions, steps = play(env, 2, 6)
    assert env.obs_shape == (5,) and env.action_size == 2
    np.testing.assert_array_equal(steps.next_obs[:, 0, 1:], np.tile([[1], [2], [3]] * 2, 4))
    np.testing.assert_array_equal(steps.obs[:, 0, 1], [1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(steps.reward, actions)
    assert steps.reward.dtype == np.float32 and not steps.truncated.any()


def test_new_episodes_draw_numbers_of_their_own(mine):
    """Where all environments end at once, nothing that a step drew is drawn again by a reset."""
    _, _, steps = play(ppo.make_env("mine::Counter", 4), 4, 3)
    drawn = np.append(steps.next_obs[2, :, 0], steps.obs[2, :, 0])
    assert len(set(drawn.tolist())) == 8


def test_few_new_episodes_are_shared(mine):
    """envs_per_reset, the fourth of what make returns: 8 environments that end share 2 episodes."""
    _, _, steps = play(ppo.make_env("mine::Counter", 8, env_kwargs='{"envs_per_reset": 4}'), 8, 3)
    assert len(set(steps.obs[2, :, 0].tolist())) == 2 and len(set(steps.obs[1, :, 0].tolist())) == 8


def test_a_missing_package_is_named_with_the_command_that_installs_it(mine, monkeypatch, capsys):
    (Path(ppo.__file__).parent / "envs" / "other.py").write_text("import no_such_simulator")
    monkeypatch.setitem(sys.modules, "gymnax", None)
    for env_id, words in [
        ("gymnax::CartPole-v1", "pip install gymnax"),
        ("other::Task", "no_such_simulator, which is missing: envs/other.py says how"),
    ]:
        with pytest.raises(SystemExit) as stop:
            ppo.make_env(env_id, 2)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1
