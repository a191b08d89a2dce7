"""ppo.py, a2c.py and ppo_continuous.py: estimators, losses, the Gaussian, running normalisation."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rlax
from flax import nnx
from probes import ALL_SCRIPTS, CONTINUOUS, MEMORY, NUM_ENVS, quick, real_env, small_args
from scipy import stats

import a2c
import ppo
import ppo_continuous
import pqn

# === test_ppo.py ===

GAMMA, LAMBDA = 0.97, 0.9


def trajectory(seed=0, num_steps=40, num_envs=5):
    """Random rewards, values, dones [T, B] and last_value [B], with V(s_T) != 0."""
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, num_steps, num_envs)).astype(np.float32)
    dones = rng.random((num_steps, num_envs)) < 0.15
    return rewards, values, dones, rng.normal(size=num_envs).astype(np.float32)


# --- Advantages -----------------------------------------------------------------------------------


def test_gae_of_lambda_1_is_the_discounted_return_minus_the_value():
    rewards, values, dones, last_value = trajectory()
    advantages, returns = ppo.compute_gae(rewards, values, dones, last_value, GAMMA, 1.0)
    expected, future = np.zeros_like(rewards), last_value
    for t in reversed(range(len(rewards))):
        future = rewards[t] + GAMMA * np.where(dones[t], 0.0, future)
        expected[t] = future
    np.testing.assert_allclose(returns, expected, atol=1e-4)
    np.testing.assert_allclose(advantages, expected - values, atol=1e-4)


def test_gae_of_lambda_0_is_the_td_error():
    rewards, values, dones, last_value = trajectory()
    advantages, _ = ppo.compute_gae(rewards, values, dones, last_value, GAMMA, 0.0)
    following = np.concatenate([values[1:], last_value[None]])
    expected = rewards + GAMMA * np.where(dones, 0.0, following) - values
    np.testing.assert_allclose(advantages, expected, atol=1e-5)


def test_gae_of_two_episodes_in_a_row_is_that_of_each_alone():
    rewards, values, _, last_value = trajectory()
    dones = np.zeros_like(rewards, bool)
    dones[16] = True  # the first episode has 17 steps
    joint, _ = ppo.compute_gae(rewards, values, dones, last_value, GAMMA, LAMBDA)
    first = ppo.compute_gae(
        rewards[:17], values[:17], dones[:17], np.full_like(last_value, 1e3), GAMMA, LAMBDA
    )[0]  # the value behind the end, here 1000, must not matter
    second = ppo.compute_gae(rewards[17:], values[17:], dones[17:], last_value, GAMMA, LAMBDA)[0]
    np.testing.assert_allclose(joint, np.concatenate([first, second]), atol=1e-5)


def test_gae_agrees_with_rlax_with_ends_and_time_limits():
    """rlax takes V(s_{t+1}) of each step apart, so it can be given V(next_obs) at a time limit."""
    rewards, values, dones, last_value = trajectory()
    truncated = dones & (np.random.default_rng(1).random(dones.shape) < 0.5)
    final_values = np.random.default_rng(2).normal(size=dones.shape).astype(np.float32) * truncated
    advantages, _ = ppo.compute_gae(
        rewards + GAMMA * final_values, values, dones, last_value, GAMMA, LAMBDA
    )
    for b in range(dones.shape[1]):
        # Each episode alone, as rlax's estimator bootstraps from values[-1] only at the end.
        start, expected = 0, []
        for end in [*(np.flatnonzero(dones[:, b]) + 1), len(rewards)]:
            if end == start:
                continue
            cut = final_values[end - 1, b] if dones[end - 1, b] else last_value[b]
            discounts = np.full(end - start, GAMMA, np.float32)
            if dones[end - 1, b] and not truncated[end - 1, b]:
                discounts[-1] = 0.0
            expected.append(
                rlax.truncated_generalized_advantage_estimation(
                    rewards[start:end, b],
                    discounts,
                    LAMBDA,
                    np.append(values[start:end, b], np.float32(cut)),
                )
            )
            start = end
        np.testing.assert_allclose(advantages[:, b], np.concatenate(expected), atol=1e-4)


# --- Rollout and loss -----------------------------------------------------------------------------


def ppo_args(**changes):
    fields = {"num_envs": 8, "num_steps": 32, "num_minibatches": 4, "total_timesteps": 8 * 32 * 10}
    return ppo.Args(**{"env_id": "gymnax::CartPole-v1", **fields, **changes})


def short_cartpole(args):
    return ppo.make_env(args.env_id, args.num_envs, env_kwargs='{"max_steps_in_episode": 7}')


def test_the_loss_at_ratio_1_is_what_the_paper_says():
    args = ppo_args(norm_adv=False, ent_coef=0.3, vf_coef=0.7)
    env = short_cartpole(args)
    state = jax.jit(ppo.make_train(args, env)[0])(jax.random.key(0))
    _, batch = ppo.rollout(state.agent, env, state.acting, jax.random.key(1), 8)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    advantages, returns = jax.random.normal(jax.random.key(2), (2, *batch.value.shape))
    loss, metrics = ppo.ppo_loss(state.agent, batch, advantages, returns, args)
    entropy = np.log(2)  # two actions, nearly uniform at the start
    expected = (
        -advantages.mean() - 0.3 * entropy + 0.7 * 0.5 * ((batch.value - returns) ** 2).mean()
    )
    np.testing.assert_allclose(loss, expected, atol=1e-3)
    assert metrics["losses/clipfrac"] == 0 and abs(metrics["losses/approx_kl"]) < 1e-6


@pytest.mark.parametrize(("advantage", "moves"), [(1.0, False), (-1.0, True)])
def test_a_ratio_beyond_the_clip_only_moves_back(advantage, moves):
    """At ratio 1.5 a good action has no gradient left, a bad one still has (eq. 7)."""
    args = ppo_args(norm_adv=False, ent_coef=0.0, vf_coef=0.0)
    env = short_cartpole(args)
    state = jax.jit(ppo.make_train(args, env)[0])(jax.random.key(0))
    obs = jax.random.normal(jax.random.key(1), (16, 4))
    logprobs, value = state.agent(obs)
    action, logprob = jnp.zeros(16, jnp.int32), logprobs[:, 0] - jnp.log(1.5)
    zeros = jnp.zeros(16)
    batch = ppo.Transition(obs, action, logprob, value, zeros, zeros == 1, zeros)
    grads = jax.grad(ppo.ppo_loss, has_aux=True)(
        state.agent, batch, jnp.full(16, advantage), zeros, args
    )[0]
    assert (max(jnp.abs(x).max() for x in jax.tree.leaves(grads)) > 1e-4) == moves


CLIPPED = [name for name in ALL_SCRIPTS if hasattr(importlib.import_module(name), "ppo_loss")]


@pytest.mark.parametrize("name", quick(CLIPPED, "ppo"))
def test_the_clipped_value_loss_is_the_larger_error(name):
    """Of the value, and of the value moved no farther than the clip from the one acted with."""
    script, env = importlib.import_module(name), real_env(name)
    args = small_args(name, clip_vloss=True, clip_coef=0.2)
    agent = jax.jit(script.make_train(args, env)[0])(jax.random.key(0)).agent
    shape = (args.num_steps, NUM_ENVS)
    keys = jax.random.split(jax.random.key(1), 4)
    obs, no = jax.random.normal(keys[0], (*shape, *env.obs_shape)), jnp.zeros(shape, bool)
    memory, reset = (), ()
    if name in MEMORY or name == "ppo_trxl_pmap":
        memory, reset = (agent.initial_memory(NUM_ENVS),), (no,)
    *_, value = agent.unroll(*memory, obs, *reset) if memory else agent(obs)
    noise, returns = jax.random.normal(keys[1], (2, *shape))
    old = value + 0.5 * noise
    actions = jnp.zeros((*shape, env.action_size)) if name in CONTINUOUS else jnp.int32(no)
    fields = {"obs": obs, "reset": no, "action": actions, "logprob": 0.0 * value, "value": old}
    fields = [fields.get(field, no) for field in script.Transition._fields]
    batch = script.Transition(*fields)

    def v_loss(args):
        loss = lambda _: script.ppo_loss(agent, *memory, batch, returns, returns, args)[1]
        metrics = jax.vmap(loss, axis_name="devices")(jnp.zeros(1))
        return float(metrics["losses/value_loss"][0])

    clipped = np.clip(value, old - 0.2, old + 0.2)
    by_hand = 0.5 * np.maximum((value - returns) ** 2, (clipped - returns) ** 2).mean()
    plain = 0.5 * ((value - returns) ** 2).mean()
    assert v_loss(args) == pytest.approx(float(by_hand), rel=1e-4)
    assert v_loss(dataclasses.replace(args, clip_vloss=False)) == pytest.approx(
        float(plain), rel=1e-4
    )
    assert by_hand > 1.05 * plain


@pytest.mark.parametrize("name", quick(CLIPPED, "ppo"))
def test_target_kl_skips_the_epochs_that_remain(name):
    """At 0 all but the first, which begins at 0; far above what is reached, and at None, none."""
    sizes = {"num_minibatches": 4, "update_epochs": 3, "num_steps": 16}
    args, env = small_args(name, **sizes), real_env(name)
    state = jax.jit(importlib.import_module(name).make_train(args, env)[0])(jax.random.key(0))

    def count(target_kl):
        changed = dataclasses.replace(args, target_kl=target_kl)
        after, _ = importlib.import_module(name).make_train(changed, env)[1](state)
        return optax.tree.get(after.opt_state, "count")

    below = jax.jit(count)  # one program for all numbers
    assert below(0.0) == 4 and below(1e9) == 12
    assert jax.jit(lambda: count(None))() == 12


def test_an_epoch_takes_each_step_once_in_another_order(monkeypatch):
    seen, args = [], ppo_args(num_minibatches=4, update_epochs=3)

    def loss(agent, batch, *rest):
        jax.debug.callback(lambda x: seen.append(np.array(x)), batch.action, ordered=True)
        return 0.0 * agent(batch.obs)[1].sum(), {"losses/approx_kl": jnp.float32(0.0)}

    monkeypatch.setattr(ppo, "ppo_loss", loss)
    init, train_iteration = ppo.make_train(args, short_cartpole(args))
    rollout = ppo.rollout

    def numbered(*arguments):
        acting, batch = rollout(*arguments)
        return acting, batch._replace(
            action=jnp.arange(args.batch_size).reshape(args.num_steps, -1)
        )

    monkeypatch.setattr(ppo, "rollout", numbered)
    jax.block_until_ready(train_iteration(jax.jit(init)(jax.random.key(0))))
    jax.effects_barrier()
    epochs = np.stack([x for x in seen if x.shape == (64,)]).reshape(3, -1)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(args.batch_size), (3, 1)))
    for one, other in [(0, 1), (1, 2), (0, 2)]:  # two random orders agree in one place on average
        assert (epochs[one] == epochs[other]).sum() < 8
    assert abs(np.corrcoef(epochs[0], np.arange(args.batch_size))[0, 1]) < 0.3


# --- Training -------------------------------------------------------------------------------------


def run_iterations(args, env, num_iterations, key=None):
    init, train_iteration = ppo.make_train(args, env)
    state, train_iteration = jax.jit(init)(jax.random.key(args.seed)), jax.jit(train_iteration)
    for _ in range(num_iterations):
        state, metrics = train_iteration(state)
    return state, metrics


@pytest.mark.thorough
def test_a_seed_determines_the_metrics_with_a_host_simulator():
    def metrics(seed):
        args = ppo_args(env_id="envpool::CartPole-v1", seed=seed)
        return run_iterations(args, ppo.make_env(args.env_id, args.num_envs, seed), 3)[1]

    first, again, other = metrics(1), metrics(1), metrics(2)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name], err_msg=name)
    assert first["losses/value_loss"] != other["losses/value_loss"]


def test_the_learning_rate_falls_to_0():
    args = ppo_args(learning_rate=0.5)
    init, train_iteration = ppo.make_train(args, short_cartpole(args))
    state, train_iteration = jax.jit(init)(jax.random.key(0)), jax.jit(train_iteration)
    rates = []
    for _ in range(args.num_iterations):
        state, metrics = train_iteration(state)
        rates.append(float(metrics["charts/learning_rate"]))
    np.testing.assert_allclose(rates, 0.5 * (1 - np.arange(10) / 10), rtol=1e-6)


def test_record_episodes_agrees_with_a_plain_loop():
    rng = np.random.default_rng(0)
    stats, running = ppo.EpisodeStats(np.zeros((4, 2))), np.zeros((4, 2))
    finished = []
    for _ in range(6):
        rewards, dones = rng.normal(size=(50, 4)).astype(np.float32), rng.random((50, 4)) < 0.2
        stats, metrics = ppo.record_episodes(stats, rewards, dones)
        for reward, done in zip(rewards, dones, strict=True):
            running += np.stack([reward, np.ones(4)], axis=1)
            finished += [tuple(x) for x in running[done]]
            running[done] = 0.0
        assert stats.episodes == len(finished)
        mean_return, mean_length = np.mean(finished[-100:], axis=0)
        np.testing.assert_allclose(metrics["charts/episodic_return"], mean_return, atol=1e-4)
        np.testing.assert_allclose(metrics["charts/episodic_length"], mean_length, atol=1e-4)
    assert len(finished) > 200  # the ring of 100 went round


# === test_a2c.py ===


def a2c_batch(args):
    env = real_env("a2c")
    state = jax.jit(a2c.make_train(args, env)[0])(jax.random.key(0))
    _, batch = a2c.rollout(state.agent, env, state.acting, jax.random.key(1), args.num_steps)
    advantages, returns = jax.random.normal(jax.random.key(2), (2, *batch.value.shape))
    return state.agent, batch, advantages, returns


def test_the_policy_s_gradient_is_the_advantage_times_that_of_the_log_prob():
    """Section 4 of the paper, summed by hand over the steps."""
    args = small_args("a2c", ent_coef=0.0, vf_coef=0.0, norm_adv=False)
    agent, batch, advantages, returns = a2c_batch(args)
    grads = jax.grad(a2c.a2c_loss, has_aux=True)(agent, batch, advantages, returns, args)[0]
    logprob = lambda agent, obs, action: agent(obs)[0][action]
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    each = jax.vmap(jax.grad(logprob), (None, 0, 0))(agent, flat(batch.obs), flat(batch.action))
    by_hand = jax.tree.map(
        lambda g: -(flat(advantages).reshape(-1, *[1] * (g.ndim - 1)) * g).mean(axis=0), each
    )
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_critic_s_gradient_is_that_of_the_squared_error():
    args = small_args("a2c", ent_coef=0.0, vf_coef=0.7)
    agent, batch, advantages, returns = a2c_batch(args)
    zeros = jnp.zeros_like(advantages)
    loss, metrics = a2c.a2c_loss(agent, batch, zeros, returns, args)
    np.testing.assert_allclose(loss, 0.7 * 0.5 * ((batch.value - returns) ** 2).mean(), rtol=1e-4)
    assert metrics["losses/policy_loss"] == 0


def test_entropy_is_rewarded():
    args = small_args("a2c", ent_coef=0.3, vf_coef=0.0)
    agent, batch, advantages, returns = a2c_batch(args)
    loss, _ = a2c.a2c_loss(agent, batch, jnp.zeros_like(advantages), returns, args)
    np.testing.assert_allclose(loss, -0.3 * np.log(2), rtol=1e-3)  # two actions, nearly uniform


def test_a2c_s_loss_refuses_shapes_that_would_broadcast():
    args = small_args("a2c")
    agent, batch, advantages, returns = a2c_batch(args)
    with pytest.raises(AssertionError):
        a2c.a2c_loss(agent, batch, advantages[..., None], returns, args)


# === test_ppo_continuous.py ===


def test_the_policy_is_a_gaussian_whose_deviation_does_not_look_at_the_observation():
    agent = ppo_continuous.Agent((3,), 2, 16, -0.5, nnx.Rngs(0))
    np.testing.assert_array_equal(agent.log_std[...], -0.5)
    agent.log_std[...] = jnp.array([0.3, -0.7])
    obs = jax.random.normal(jax.random.key(0), (5, 3))
    mean, std, value = agent(obs)
    np.testing.assert_allclose(std, np.exp([0.3, -0.7]), rtol=1e-5)
    assert mean.shape == (5, 2) and value.shape == (5,)
    args, zeros = small_args("ppo_continuous"), jnp.zeros(5)
    batch = ppo_continuous.Transition(obs, mean, zeros, zeros, zeros, zeros == 1, zeros)
    _, metrics = ppo_continuous.ppo_loss(agent, batch, zeros, zeros, args)
    expected = stats.norm.entropy(scale=std).sum()
    np.testing.assert_allclose(metrics["losses/entropy"], expected, rtol=1e-5)


def wide_state(args, env):
    """A first state with a deviation of 3 where the bounds are 2, and statistics not trivial."""
    state = jax.jit(ppo_continuous.make_train(args, env)[0])(jax.random.key(0))
    state.agent.log_std[...] = jnp.log(jnp.array([3.0]))
    head = state.agent.actor.head  # so that the mean depends on the observation visibly
    head.kernel[...] = 100.0 * head.kernel[...]
    mean, var = jnp.array([0.2, -0.1, 1.0]), jnp.array([0.5, 0.4, 9.0])
    return state._replace(obs_stats=ppo_continuous.RunningStats(mean, var, jnp.float32(100.0)))


def test_only_the_simulator_sees_clipped_actions():
    args, env = small_args("ppo_continuous"), real_env("ppo_continuous")
    state, seen = wide_state(args, env), []

    def step(key, env_state, action):
        jax.debug.callback(lambda x: seen.append(np.array(x)), action, ordered=True)
        return env.step(key, env_state, action)

    spied = env._replace(step=step)
    _, batch = ppo_continuous.rollout(state.agent, spied, state.acting, jax.random.key(1), 30)
    jax.effects_barrier()
    assert jnp.abs(batch.action).max() > 3.0
    np.testing.assert_array_equal(np.stack(seen), np.clip(batch.action, -2.0, 2.0))
    mean, std, _ = state.agent(batch.obs)
    logprob = stats.norm.logpdf(batch.action, mean, std).sum(axis=-1)
    np.testing.assert_allclose(batch.logprob, logprob, atol=1e-5)


def test_the_ratio_is_1_with_normalised_observations():
    """The first gradient step of an iteration sees approx_kl 0: rollout and update agree."""
    args = small_args("ppo_continuous", norm_obs=True, num_minibatches=1, update_epochs=1)
    env = real_env("ppo_continuous")
    _, metrics = jax.jit(ppo_continuous.make_train(args, env)[1])(wide_state(args, env))
    assert abs(metrics["losses/approx_kl"]) < 1e-5 and metrics["losses/clipfrac"] == 0
    assert abs(metrics["losses/entropy"] - stats.norm.entropy(scale=3.0)) < 1e-4


def test_running_statistics_are_numpy_s_over_everything_seen():
    rng = np.random.default_rng(0)
    chunks = [rng.normal(3.0, 0.1 + k, size=(4 + k, 2, 3)).astype(np.float32) for k in range(6)]
    running = ppo_continuous.init_running((3,))
    for chunk in chunks:
        running = ppo_continuous.update_running(running, chunk)
    everything = np.concatenate([chunk.reshape(-1, 3) for chunk in chunks])
    assert running.count == len(everything)
    np.testing.assert_allclose(running.mean, everything.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(running.var, everything.var(axis=0), rtol=1e-4)
    normalized = np.asarray(ppo_continuous.normalize(everything, running))
    inside = np.abs(normalized) < 10
    np.testing.assert_allclose(
        normalized[inside], ((everything - running.mean) / np.sqrt(running.var))[inside], atol=1e-4
    )
    assert ppo_continuous.normalize(everything, None) is everything
    np.testing.assert_array_equal(ppo_continuous.normalize(1e6 * jnp.ones(3), running), 10.0)


@pytest.mark.thorough
def test_the_state_keeps_the_statistics_of_what_was_acted_on():
    args, env = small_args("ppo_continuous", norm_obs=True), real_env("ppo_continuous")
    init, train_iteration = ppo_continuous.make_train(args, env)
    state, acted = jax.jit(init)(jax.random.key(0)), []
    assert state.obs_stats.count == 0
    rollout = ppo_continuous.rollout

    def keep(*arguments):
        acting, batch = rollout(*arguments)
        jax.debug.callback(lambda x: acted.append(np.array(x, np.float64)), batch.obs)
        return acting, batch

    ppo_continuous.rollout = keep
    try:
        for _ in range(3):
            state, _ = train_iteration(state)
    finally:
        ppo_continuous.rollout = rollout
    jax.effects_barrier()
    everything = np.concatenate(acted).reshape(-1, 3)
    assert state.obs_stats.count == len(everything) == 3 * args.batch_size
    np.testing.assert_allclose(state.obs_stats.mean, everything.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(state.obs_stats.var, everything.var(axis=0), rtol=1e-3)


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    rng = np.random.default_rng(0)
    rewards = rng.normal(2.0, 5.0, size=(3, 40, 4)).astype(np.float32)
    dones = rng.random(rewards.shape) < 0.1
    running, discounted = ppo_continuous.init_running(()), jnp.zeros(4)
    totals, total = [], np.zeros(4)
    for chunk_rewards, chunk_dones in zip(rewards, dones, strict=True):
        scaled, discounted, running = ppo_continuous.normalize_rewards(
            chunk_rewards, chunk_dones, discounted, running, 0.9
        )
        for reward, done in zip(chunk_rewards, chunk_dones, strict=True):
            total = 0.9 * total + reward
            totals.append(total)
            total = np.where(done, 0.0, total)
        np.testing.assert_allclose(discounted, total, rtol=1e-4)
        np.testing.assert_allclose(scaled, chunk_rewards / np.std(totals), rtol=1e-3)
    unchanged = ppo_continuous.normalize_rewards(rewards[0], dones[0], discounted, None, 0.9)
    np.testing.assert_array_equal(unchanged[0], rewards[0])
    assert unchanged[2] is None


def test_evaluation_normalises_with_the_statistics_as_they_are():
    args, env = small_args("ppo_continuous", norm_obs=True), real_env("ppo_continuous")
    state = wide_state(args, env)
    returns, _ = ppo_continuous.evaluate(state, env, jax.random.key(0))
    blind = ppo_continuous.evaluate(state._replace(obs_stats=None), env, jax.random.key(0))[0]
    by_hand = lambda obs: state.agent((obs - state.obs_stats.mean) / state.obs_stats.var**0.5)
    expected, _ = ppo_continuous.evaluate(
        state._replace(agent=by_hand, obs_stats=None), env, jax.random.key(0)
    )
    np.testing.assert_allclose(returns, expected, rtol=1e-4)
    assert not np.allclose(returns, blind, rtol=1e-4)


# === test_pqn.py ===


def lambda_returns_by_rlax(rewards, next_values, terminated, truncated, q_lambda):
    """Here V(next_obs) stands where a time limit cut, and lambda is 0: so rlax needs no trick."""
    discounts = GAMMA * ~terminated
    lambdas = q_lambda * ~(terminated | truncated)
    returns = jax.vmap(rlax.lambda_returns, in_axes=1, out_axes=1)
    return returns(*map(jnp.float32, (rewards, discounts, next_values, lambdas)))


@pytest.mark.parametrize("q_lambda", quick([0.0, 0.65, 1.0], 0.65))
def test_lambda_returns_agree_with_rlax_with_ends_and_time_limits(q_lambda):
    """Ends and limits inside and at the last step, which is where published code went wrong."""
    rewards, values, dones, last_value = trajectory(num_steps=60, num_envs=4)
    rng = np.random.default_rng(1)
    dones[-1] = [False, True, True, False]
    truncated = dones & (rng.random(dones.shape) < 0.5)
    truncated[-1] = [False, False, True, False]
    final_values = rng.normal(size=dones.shape).astype(np.float32) * truncated
    given = (rewards + GAMMA * final_values, values, dones, last_value, GAMMA, q_lambda)
    returns = pqn.compute_lambda_returns(*given)
    following = np.concatenate([values[1:], last_value[None]])
    next_values = np.where(truncated, final_values, following)
    ends = (dones & ~truncated, truncated)
    expected = lambda_returns_by_rlax(rewards, next_values, *ends, q_lambda)
    np.testing.assert_allclose(returns, expected, atol=1e-4)
    np.testing.assert_allclose(returns, ppo.compute_gae(*given)[1], atol=1e-4)
    # The published code's last but one step takes the value after the last (purejaxql, issue 12).
    at_fault = np.concatenate([values[:-1], last_value[None]])
    published = pqn.compute_lambda_returns(given[0], at_fault, *given[2:])
    assert (np.abs(published - expected).max() > 0.1) == (q_lambda < 1)


def test_pqn_s_rollout_keeps_the_largest_action_values():
    """Of what is acted on, of what a time limit cut off, and of what is next."""
    args, env = small_args("pqn"), real_env("pqn", limit=5)
    state = jax.jit(pqn.make_train(args, env)[0])(jax.random.key(0))
    last, batch = pqn.rollout(state.agent, env, state.acting, 0.3, jax.random.key(1), 40)
    q_values = state.agent(batch.obs)
    np.testing.assert_allclose(batch.value, q_values.max(axis=-1), atol=1e-5)
    greedy = (batch.action == q_values.argmax(axis=-1)).mean()
    assert abs(greedy - (1 - 0.3 / 2)) < 0.06  # half of the random actions are the best ones
    cut = np.asarray(batch.final_value != 0)
    assert cut.any() and batch.done[cut].all()
    following = np.concatenate([batch.value[1:], state.agent(last.obs).max(axis=-1)[None]])
    assert (np.abs(batch.final_value - following)[cut] > 1e-6).all()  # not of the new episode


def test_pqn_s_layers_are_normalised():
    """Inputs a thousand times as large give the same values: LayerNorm, biases being 0."""
    agent = pqn.Agent((4,), 3, 16, nnx.Rngs(0))
    obs = jax.random.normal(jax.random.key(0), (5, 4))
    np.testing.assert_allclose(agent(1e3 * obs), agent(1e6 * obs), rtol=1e-3)


def test_pqn_refuses_shapes_that_would_broadcast():
    args, env = small_args("pqn"), real_env("pqn")
    state = jax.jit(pqn.make_train(args, env)[0])(jax.random.key(0))
    _, batch = pqn.rollout(state.agent, env, state.acting, 0.3, jax.random.key(1), 8)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    with pytest.raises(AssertionError):
        pqn.pqn_loss(state.agent, batch, batch.reward[:, None])
