"""ppo_continuous.py: the Gaussian, clipping for the simulator alone, and running normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from probes import real_env, small_args
from scipy import stats

import ppo_continuous

script = ppo_continuous


def test_the_policy_is_a_gaussian_whose_deviation_does_not_look_at_the_observation():
    agent = script.Agent((3,), 2, 16, nnx.Rngs(0))
    agent.log_std[...] = jnp.array([0.3, -0.7])
    obs = jax.random.normal(jax.random.key(0), (5, 3))
    pi, _ = agent(obs)
    std = np.exp([0.3, -0.7])
    np.testing.assert_allclose(pi.stddev(), np.tile(std, (5, 1)), rtol=1e-5)
    action = jax.random.normal(jax.random.key(1), (5, 2))
    expected = stats.norm.logpdf(action, pi.mean(), std).sum(axis=1)
    np.testing.assert_allclose(pi.log_prob(action), expected, rtol=1e-4)
    np.testing.assert_allclose(pi.entropy(), stats.norm.entropy(scale=std).sum(), rtol=1e-5)


def wide_state(args, env):
    """A first state with a deviation of 3 where the bounds are 2, and statistics not trivial."""
    state = jax.jit(script.make_train(args, env)[0])(jax.random.key(0))
    state.agent.log_std[...] = jnp.log(jnp.array([3.0]))
    head = state.agent.actor.head  # so that the mean depends on the observation visibly
    head.kernel[...] = 100.0 * head.kernel[...]
    mean, var = jnp.array([0.2, -0.1, 1.0]), jnp.array([0.5, 0.4, 9.0])
    return state._replace(obs_stats=script.RunningStats(mean, var, jnp.float32(100.0)))


def test_only_the_simulator_sees_clipped_actions():
    args, env = small_args("ppo_continuous"), real_env("ppo_continuous")
    state, seen = wide_state(args, env), []

    def step(key, env_state, action):
        jax.debug.callback(lambda x: seen.append(np.array(x)), action, ordered=True)
        return env.step(key, env_state, action)

    spied = env._replace(step=step)
    _, batch = script.rollout(state.agent, spied, state.acting, jax.random.key(1), 30)
    jax.effects_barrier()
    assert jnp.abs(batch.action).max() > 3.0
    np.testing.assert_array_equal(np.stack(seen), np.clip(batch.action, -2.0, 2.0))
    logprob = state.agent(batch.obs)[0].log_prob(batch.action)
    np.testing.assert_allclose(batch.logprob, logprob, atol=1e-5)


def test_the_ratio_is_1_with_normalised_observations():
    """The first gradient step of an iteration sees approx_kl 0: rollout and update agree."""
    args = small_args("ppo_continuous", norm_obs=True, num_minibatches=1, update_epochs=1)
    env = real_env("ppo_continuous")
    _, metrics = jax.jit(script.make_train(args, env)[1])(wide_state(args, env))
    assert abs(metrics["losses/approx_kl"]) < 1e-5 and metrics["losses/clipfrac"] == 0
    assert abs(metrics["losses/entropy"] - stats.norm.entropy(scale=3.0)) < 1e-4


def test_running_statistics_are_numpy_s_over_everything_seen():
    rng = np.random.default_rng(0)
    chunks = [rng.normal(3.0, 0.1 + k, size=(4 + k, 2, 3)).astype(np.float32) for k in range(6)]
    running = script.init_running((3,))
    for chunk in chunks:
        running = script.update_running(running, chunk)
    everything = np.concatenate([chunk.reshape(-1, 3) for chunk in chunks])
    assert running.count == len(everything)
    np.testing.assert_allclose(running.mean, everything.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(running.var, everything.var(axis=0), rtol=1e-4)
    normalized = np.asarray(script.normalize(everything, running))
    inside = np.abs(normalized) < 10
    np.testing.assert_allclose(
        normalized[inside], ((everything - running.mean) / np.sqrt(running.var))[inside], atol=1e-4
    )
    assert script.normalize(everything, None) is everything
    np.testing.assert_array_equal(script.normalize(1e6 * jnp.ones(3), running), 10.0)


def test_the_state_keeps_the_statistics_of_what_was_acted_on():
    args, env = small_args("ppo_continuous", norm_obs=True), real_env("ppo_continuous")
    init, train_iteration = script.make_train(args, env)
    state, acted = jax.jit(init)(jax.random.key(0)), []
    assert state.obs_stats.count == 0
    rollout = script.rollout

    def keep(*arguments):
        acting, batch = rollout(*arguments)
        jax.debug.callback(lambda x: acted.append(np.array(x, np.float64)), batch.obs)
        return acting, batch

    script.rollout = keep
    try:
        for _ in range(3):
            state, _ = train_iteration(state)
    finally:
        script.rollout = rollout
    jax.effects_barrier()
    everything = np.concatenate(acted).reshape(-1, 3)
    assert state.obs_stats.count == len(everything) == 3 * args.batch_size
    np.testing.assert_allclose(state.obs_stats.mean, everything.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(state.obs_stats.var, everything.var(axis=0), rtol=1e-3)


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    rng = np.random.default_rng(0)
    rewards = rng.normal(2.0, 5.0, size=(3, 40, 4)).astype(np.float32)
    dones = rng.random(rewards.shape) < 0.1
    running, discounted = script.init_running(()), jnp.zeros(4)
    totals, total = [], np.zeros(4)
    for chunk_rewards, chunk_dones in zip(rewards, dones, strict=True):
        scaled, discounted, running = script.normalize_rewards(
            chunk_rewards, chunk_dones, discounted, running, 0.9
        )
        for reward, done in zip(chunk_rewards, chunk_dones, strict=True):
            total = 0.9 * total + reward
            totals.append(total)
            total = np.where(done, 0.0, total)
        np.testing.assert_allclose(discounted, total, rtol=1e-4)
        np.testing.assert_allclose(scaled, chunk_rewards / np.std(totals), rtol=1e-3)
    unchanged = script.normalize_rewards(rewards[0], dones[0], discounted, None, 0.9)
    np.testing.assert_array_equal(unchanged[0], rewards[0])
    assert unchanged[2] is None


def test_evaluation_normalises_with_the_statistics_as_they_are():
    args, env = small_args("ppo_continuous", norm_obs=True), real_env("ppo_continuous")
    state = wide_state(args, env)
    returns, _ = script.evaluate(state, env, jax.random.key(0))
    blind = script.evaluate(state._replace(obs_stats=None), env, jax.random.key(0))[0]
    by_hand = lambda obs: state.agent((obs - state.obs_stats.mean) / state.obs_stats.var**0.5)
    expected, _ = script.evaluate(
        state._replace(agent=by_hand, obs_stats=None), env, jax.random.key(0)
    )
    np.testing.assert_allclose(returns, expected, rtol=1e-4)
    assert not np.allclose(returns, blind, rtol=1e-4)
