"""Every script learns the probe environments, and keeps what all scripts promise."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import (
    CONTINUOUS,
    DISTINCT,
    MEMORY,
    NUM_ENVS,
    ON_POLICY,
    SCRIPTS,
    SEQUENCES,
    THREADED,
    VALUE_BASED,
    greedy_player,
    learn,
    log_prob,
    make_train,
    probe,
    quick,
    real_env,
    small_args,
)

# More where each learns less.
ITERATIONS = {"dqn": 150, "sac": 150, "td3": 150, "sacd": 150, "a2c": 150, "impala": 150}


def learn_probe(name, observe, reward, iterations=1.0, **ends):
    env = probe(observe, reward, continuous=name in CONTINUOUS, **ends)
    return learn(name, env, int(iterations * ITERATIONS.get(name, 60)))


ZERO_ONE = jnp.array([[0.0], [1.0]])


@pytest.mark.parametrize("name", quick(sorted(set(SCRIPTS) - set(MEMORY) - set(SEQUENCES)), "ppo"))
def test_probe_discount(name):
    """Two steps, reward 1 at the second: V(second) = 1, V(first) = gamma."""
    learned = learn_probe(
        name,
        lambda time, bit: time,
        lambda time, bit, action: time == 1,
        terminated=lambda time, bit: time >= 2,
    )
    reset = jnp.array([True, False])
    np.testing.assert_allclose(learned.value(ZERO_ONE, reset), [0.8, 1.0], atol=0.05)


@pytest.mark.parametrize(
    "name", quick(sorted(set(SCRIPTS) - set(MEMORY) - set(SEQUENCES)), "impala")
)
def test_probe_time_limit(name):
    """One step from 0 or 1. From 1, reward 1 and the end: V(1) = 1. From 0, no reward, and a time
    limit at 1: V(0) = gamma V(1) = 0.8. Taken for an end, V(0) = 0; with the observation after the
    reset in place of the last one, V(0) = 0.67.
    """
    learned = learn_probe(
        name,
        lambda time, bit: jnp.where(time == 0, bit, 1),
        lambda time, bit, action: bit,
        terminated=lambda time, bit: bit,
        truncated=lambda time, bit: ~bit,
        iterations=1.5,
    )
    np.testing.assert_allclose(learned.value(ZERO_ONE), [0.8, 1.0], atol=0.05)


@pytest.mark.parametrize("name", quick(sorted(set(SCRIPTS) - set(MEMORY) - set(SEQUENCES)), "dqn"))
def test_probe_policy(name):
    """One step: the best action is the bit that is seen, or plus or minus a half by it."""
    learned = learn_probe(name, lambda time, bit: bit, following(name), **ONE_STEP)
    assert_follows(name, learned.act(ZERO_ONE))
    assert learned.value(ZERO_ONE).min() > 0.6


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["dqn", "sac", "sacd", "td3"])
def test_probe_policy_on_screens(name):
    """The same, where the bit lights the right half of a screen instead of the left one."""
    screens = jnp.zeros((2, 36, 36, 1), jnp.uint8).at[0, :, :18].set(255).at[1, :, 18:].set(255)
    show = lambda obs: screens[obs[:, 0].astype(int)]
    continuous = name in CONTINUOUS
    env = probe(lambda time, bit: bit, following(name), continuous=continuous, **ONE_STEP)

    def reset(key):
        state, obs = env.reset(key)
        return state, show(obs)

    def step(*x):
        state, timestep = env.step(*x)
        obs, next_obs = show(timestep.obs), show(timestep.next_obs)
        return state, timestep._replace(obs=obs, next_obs=next_obs)

    on_screens = env._replace(reset=reset, step=step, obs_shape=screens.shape[1:])
    # At the step size of the other probes td3.py's actor jumps to a bound, where tanh has no gradient.
    gently = {"policy_lr": 3e-4, "q_lr": 1e-3} if name == "td3" else {}
    learned = learn(name, on_screens, batch_size=16, **gently)
    assert_follows(name, learned.act(screens))


ONE_STEP = {"terminated": lambda time, bit: time >= 1}


def following(name):
    """The reward of a script's actions that follow the bit."""
    if name in CONTINUOUS:
        return lambda time, bit, action: 1.0 - 4.0 * (action - jnp.where(bit, 0.5, -0.5)) ** 2
    return lambda time, bit, action: jnp.where(action == bit, 1.0, -1.0)


def assert_follows(name, actions):
    if name in CONTINUOUS:
        np.testing.assert_allclose(actions[:, 0], [-0.5, 0.5], atol=0.1)
    else:
        np.testing.assert_array_equal(actions, [0, 1])


# --- What all scripts promise ---------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("name", DISTINCT)
def test_a_seed_determines_the_run_also_among_several(name):
    """The same seed again gives the same bits; the seed among others, the same to rounding."""
    args, env = small_args(name, 10), real_env(name)
    init, train_iteration = make_train(name, args, env)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    states = jax.jit(lambda keys: jax.lax.map(init, keys))(keys)
    init, train_one, train_all = map(jax.jit, (init, train_iteration, jax.vmap(train_iteration)))
    alone, again = init(jax.random.key(1)), init(jax.random.key(1))
    for _ in range(2):
        states, metrics = train_all(states)
        alone, metrics_alone = train_one(alone)
        again, metrics_again = train_one(again)
    for several, single in zip(jax.tree.leaves(states), jax.tree.leaves(alone), strict=True):
        if jnp.issubdtype(single.dtype, jnp.floating):
            np.testing.assert_allclose(several[1], single, rtol=1e-2, atol=1e-3)
    for metric, (_, this) in metrics.items():
        single = metrics_alone[metric]
        np.testing.assert_allclose(this, single, rtol=1e-2, atol=1e-3, err_msg=metric)
        np.testing.assert_array_equal(single, metrics_again[metric], err_msg=metric)
    losses = [metric for metric in metrics if metric.startswith("losses/")]
    assert any(metrics[metric][0] != metrics[metric][1] for metric in losses)


@pytest.mark.parametrize("name", quick(DISTINCT, "ppo"))
def test_no_random_key_is_used_twice(name):
    args, env = small_args(name, 10), real_env(name)
    script = importlib.import_module(name)
    init, train_iteration = make_train(name, args, env)
    with jax.debug_key_reuse(True):
        state = jax.jit(init)(jax.random.key(0))
        state, _ = jax.jit(train_iteration)(state)
        jax.jit(lambda state, key: script.evaluate(state, env, key, 5))(state, jax.random.key(1))


WITHOUT_MEMORY = sorted(set(ON_POLICY) - set(MEMORY) - set(VALUE_BASED) - set(SEQUENCES))


@pytest.mark.parametrize("name", quick(WITHOUT_MEMORY, "ppo", "impala"))
def test_the_ratio_is_1_before_the_first_update(name):
    """What the rollout stored is what the agent computes again, across episode ends."""
    script, args, env = importlib.import_module(name), small_args(name), real_env(name)
    state = jax.jit(script.make_train(args, env)[0])(jax.random.key(0))
    acting = state.acting[0] if name in THREADED else state.acting
    last, batch = script.rollout(state.agent, env, acting, jax.random.key(1), 64)
    assert batch.done.sum() >= NUM_ENVS
    *pi, value = state.agent(batch.obs)
    if "logprob" in batch._fields:
        assert jnp.abs(jnp.exp(log_prob(pi, batch.action) - batch.logprob) - 1).max() < 1e-5
    if "value" in batch._fields:
        np.testing.assert_allclose(value, batch.value, atol=1e-5)
        # The value that the advantages bootstrap from is that of the next rollout's first step.
        _, after = script.rollout(state.agent, env, last, jax.random.key(2), 1)
        np.testing.assert_allclose(state.agent(last.obs)[-1], after.value[0], atol=1e-5)
    assert "logprob" in batch._fields or "value" in batch._fields


@pytest.mark.parametrize("name", quick(DISTINCT, "ppo", "ppo_lstm"))
def test_evaluation_counts_one_greedy_episode_in_each_environment(name):
    """The returns are those of a plain loop; longer episodes do not push others out."""
    script = importlib.import_module(name)
    env = real_env(name, limit=40)
    state = jax.jit(script.make_train(small_args(name), env)[0])(jax.random.key(1))
    returns, lengths = script.evaluate(state, env, jax.random.key(3))

    greedy, reset = greedy_player(name, state), jnp.ones(NUM_ENVS, bool)
    reset_key, key = jax.random.split(jax.random.key(3))
    env_state, obs = env.reset(reset_key)
    expected, length, alive = np.zeros(NUM_ENVS), np.zeros(NUM_ENVS), np.ones(NUM_ENVS, bool)
    step = jax.jit(env.step)
    while alive.any():
        env_key, key = jax.random.split(key)
        env_state, timestep = step(env_key, env_state, greedy(obs, reset))
        expected += np.where(alive, timestep.reward, 0.0)
        length += alive
        alive &= ~np.asarray(timestep.terminated | timestep.truncated)
        obs, reset = timestep.obs, timestep.terminated | timestep.truncated
    np.testing.assert_allclose(returns, expected, rtol=1e-4)
    np.testing.assert_array_equal(lengths, length)
    assert len(set(expected)) > 1
