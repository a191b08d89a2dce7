"""impala.py: V-trace, and that threads and devices compute what the plain iteration computes."""

import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from probes import log_prob, make_train, real_env, run_on_devices, small_args
from test_on_policy import trajectory

import impala
import ppo

GAMMA = 0.97


def ratios_like(rewards, seed=3):
    return np.exp(0.5 * np.random.default_rng(seed).normal(size=rewards.shape)).astype(np.float32)


# --- V-trace --------------------------------------------------------------------------------------


@pytest.mark.parametrize("vtrace_lambda", [1.0, 0.9])
def test_vtrace_on_policy_is_generalised_advantage_estimation(vtrace_lambda):
    """Remark 1 of the paper is the case of lambda 1."""
    rewards, values, dones, last_value = trajectory()
    batch, ones = (rewards, values, dones, last_value), np.ones_like(rewards)
    targets, advantages = impala.compute_vtrace(*batch, ones, GAMMA, vtrace_lambda=vtrace_lambda)
    gae, returns = ppo.compute_gae(*batch, GAMMA, vtrace_lambda)
    np.testing.assert_allclose(targets, returns, atol=1e-4)
    np.testing.assert_allclose(advantages, gae, atol=1e-4)


def test_vtrace_of_ratio_0_leaves_the_values_alone():
    """What the agent would never do teaches nothing: only the TD error is left."""
    rewards, values, dones, last_value = trajectory()
    zeros = np.zeros_like(rewards)
    targets, advantages = impala.compute_vtrace(rewards, values, dones, last_value, zeros, GAMMA)
    np.testing.assert_array_equal(targets, values)
    td_errors, _ = ppo.compute_gae(rewards, values, dones, last_value, GAMMA, 0.0)
    np.testing.assert_allclose(advantages, td_errors, atol=1e-5)  # to be weighted by 0


def test_vtrace_with_traces_cut_is_the_weighted_td_error():
    rewards, values, dones, last_value = trajectory()
    ratios = ratios_like(rewards)
    targets, _ = impala.compute_vtrace(
        rewards, values, dones, last_value, ratios, GAMMA, rho_bar=0.7, c_bar=0.0
    )
    following = np.concatenate([values[1:], last_value[None]])
    errors = rewards + GAMMA * np.where(dones, 0.0, following) - values
    np.testing.assert_allclose(targets, values + np.minimum(ratios, 0.7) * errors, atol=1e-5)


@pytest.mark.parametrize("vtrace_lambda", [1.0, 0.8])
def test_vtrace_agrees_with_rlax_with_ends_and_time_limits(vtrace_lambda):
    """Each episode alone for rlax, whose last bootstrap is V(next_obs) where a limit cut it."""
    rewards, values, dones, last_value = trajectory(num_steps=60, num_envs=2)
    truncated = dones & (np.random.default_rng(1).random(dones.shape) < 0.5)
    final_values = np.random.default_rng(2).normal(size=dones.shape).astype(np.float32) * truncated
    ratios = ratios_like(rewards)
    bounds = {"rho_bar": 1.3, "c_bar": 1.0, "vtrace_lambda": vtrace_lambda}
    targets, advantages = impala.compute_vtrace(
        rewards + GAMMA * final_values, values, dones, last_value, ratios, GAMMA, **bounds
    )
    for b in range(dones.shape[1]):
        starts = np.flatnonzero(np.append(True, dones[:-1, b]))
        for start, end in zip(starts, np.append(starts[1:], len(rewards)), strict=True):
            part, last = slice(start, end), end - 1
            discounts = np.full(end - start, GAMMA, np.float32)
            if dones[last, b] and not truncated[last, b]:
                discounts[-1] = 0.0
            bootstrap = final_values[last, b] if dones[last, b] else last_value[b]
            expected = rlax.vtrace_td_error_and_advantage(
                values[part, b],
                np.append(values[start + 1 : end, b], bootstrap).astype(np.float32),
                rewards[part, b],
                discounts,
                ratios[part, b],
                lambda_=vtrace_lambda,
                clip_rho_threshold=1.3,
                clip_pg_rho_threshold=1.3,
            )
            np.testing.assert_allclose(
                targets[part, b], values[part, b] + expected.errors, atol=1e-4
            )
            weighted = np.minimum(ratios, 1.3)[part, b] * advantages[part, b]
            np.testing.assert_allclose(weighted, expected.pg_advantage, atol=1e-4)


# --- Loss -----------------------------------------------------------------------------------------


def make_batch(args, env):
    state = jax.jit(impala.make_train(args, env)[0])(jax.random.key(0))
    acting, batch = impala.rollout(state.agent, env, state.acting[0], jax.random.key(1), 30)
    return state.agent, batch, acting.obs


def test_targets_bootstrap_at_a_time_limit_with_the_learner_s_value():
    """A batch that a limit cuts has the targets of one whose reward there holds gamma V(next_obs)."""
    args = small_args("impala")
    agent, batch, last_obs = make_batch(args, real_env("impala", limit=5))
    assert batch.cut.any()
    targets, advantages, _ = impala.compute_targets(agent, batch, last_obs, args)
    value = jnp.where(batch.cut, agent(batch.next_obs)[1], 0.0)
    by_hand = batch._replace(reward=batch.reward + args.gamma * value, cut=batch.cut & False)
    expected = impala.compute_targets(agent, by_hand, last_obs, args)
    np.testing.assert_allclose(targets, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(advantages, expected[1], rtol=1e-3, atol=1e-4)
    without = batch._replace(cut=batch.cut & False)
    assert abs(targets - impala.compute_targets(agent, without, last_obs, args)[0]).max() > 1e-2


@pytest.mark.parametrize("norm_adv", [True, False])
def test_advantages_are_normalised_before_they_are_weighted(norm_adv):
    """Centred after the weights, what is good but rarely played would be pushed down: here action 1
    is the better one, and pi plays it more than mu did."""
    args = small_args("impala", norm_adv=norm_adv, gamma=0.0, rho_bar=10.0, vtrace_lambda=0.0)
    agent, batch, last_obs = make_batch(args, real_env("impala"))
    logprobs, value = agent(batch.obs)
    mu = np.where(batch.action == 1, 0.4, 1.6)  # mu over pi
    logprob = log_prob([logprobs], batch.action) + np.log(mu)
    reward = value - 1 + 0.1 * batch.action
    batch = batch._replace(logprob=logprob, reward=reward, cut=batch.cut & False)
    _, advantages, _ = impala.compute_targets(agent, batch, last_obs, args)
    unweighted = np.asarray(advantages * mu)
    if norm_adv:
        assert abs(unweighted.mean()) < 1e-4 and abs(unweighted.std() - 1) < 1e-3
        assert (advantages[batch.action == 1] > 0).all() and (
            advantages[batch.action == 0] < 0
        ).all()
    else:
        np.testing.assert_allclose(unweighted, reward - value, atol=1e-4)


def test_the_loss_refuses_shapes_that_would_broadcast():
    args = small_args("impala")
    agent, batch, last_obs = make_batch(args, real_env("impala"))
    targets, advantages, _ = impala.compute_targets(agent, batch, last_obs, args)
    with pytest.raises((AssertionError, TypeError, ValueError)):
        impala.impala_loss(agent, batch, targets[..., None], advantages, args)


def test_minibatches_are_environments_over_their_whole_time(monkeypatch):
    args = small_args("impala", num_minibatches=4)
    seen = []

    def targets(agent, batch, last_obs, args):
        jax.debug.callback(lambda *x: seen.append(x), batch.action, last_obs)
        return batch.reward, batch.reward, {}

    agent, batch, _ = make_batch(args, real_env("impala"))
    numbers = jnp.arange(16.0)
    batch = batch._replace(action=jnp.tile(numbers.astype(int), (30, 1)))
    monkeypatch.setattr(impala, "compute_targets", targets)
    tx = impala.optax.scale_by_adam()
    last_obs = jnp.tile(numbers[:, None], (1, 4))
    impala.update(agent, tx.init(agent), tx, 0.0, batch, last_obs, args)
    jax.effects_barrier()
    assert len(seen) == 4
    for action, obs in seen:
        np.testing.assert_array_equal(action, np.tile(obs[:, 0], (30, 1)))
    assert sorted(np.concatenate([obs[:, 0] for _, obs in seen])) == list(range(16))


# --- Threads --------------------------------------------------------------------------------------


def start(args):
    size = args.num_envs // args.num_actors
    envs = [impala.make_env("gymnax::CartPole-v1", size) for _ in range(args.num_actors)]
    return envs, jax.jit(impala.make_train(args, *envs)[0])(jax.random.key(0))


def assert_equal(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.mark.thorough
@pytest.mark.parametrize("num_actor_threads", [1, 2])
def test_threads_compute_what_the_plain_iteration_computes(num_actor_threads):
    """Bit for bit, over several calls, and each time that it is run."""
    args = small_args("impala", num_actor_threads=num_actor_threads)
    envs, first = start(args)
    train_iteration, plain = jax.jit(make_train("impala", args, *envs)[1]), first
    losses = []
    for _ in range(7):
        plain, plain_metrics = train_iteration(plain)
        losses.append({name: x for name, x in plain_metrics.items() if "losses/" in name})
    for calls in ([7], [1, 4, 2]):
        state = first
        with impala.actor_threads(args, *impala.make_train(args, *envs)[1:], state) as train:
            for num_iterations in calls:  # the losses of a call are means
                state, metrics = train(state, num_iterations)
                last = losses[-num_iterations:]
                means = {name: np.mean([x[name] for x in last], axis=0) for name in last[0]}
            assert [x.name for x in threading.enumerate()].count("actor") == num_actor_threads
        assert_equal((state, metrics), (plain, plain_metrics | means))
        assert not [x for x in threading.enumerate() if x.name == "actor"]


@pytest.mark.thorough
def test_the_actors_are_one_update_behind():
    args = small_args("impala")
    (env,), state = start(args)
    train_iteration = jax.jit(make_train("impala", args, env)[1])
    first, metrics = train_iteration(state)
    assert_equal(first.acting_agent, state.agent)
    second, _ = train_iteration(first)
    assert_equal(second.acting_agent, first.agent)
    # So the second batch was played by the agent of the start, and its ratios are not 1.
    args = small_args("impala", num_minibatches=1)
    train_iteration = jax.jit(make_train("impala", args, env)[1])
    first, metrics = train_iteration(state)
    assert metrics["losses/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert train_iteration(first)[1]["losses/approx_kl"] > 1e-5


def test_an_actor_that_raises_raises_in_the_learner_and_all_threads_end():
    args = small_args("impala", num_actor_threads=2)
    envs, state = start(args)
    actors, learner = impala.make_train(args, *envs)[1:]
    calls = []

    def breaks(*job):
        jax.debug.callback(lambda: calls.append(0))
        if jax.process_count():  # when traced
            raise RuntimeError("the motor is on fire")

    with pytest.raises(RuntimeError, match="the motor is on fire") as error:
        with impala.actor_threads(args, [actors[0], breaks], learner, state) as train:
            train(state, 3)
    assert any(entry.name == "breaks" for entry in error.traceback)  # its own traceback
    assert not [x for x in threading.enumerate() if x.name == "actor"]


@pytest.mark.thorough
def test_devices_share_the_work_and_change_nothing(tmp_path):
    """Two actor devices and two learner devices of four, against one: to rounding."""
    program = """
        import jax, numpy as np, impala
        from probes import small_args
        from test_impala import start

        assert jax.local_device_count() == 4
        ends = []
        for ids in [{"num_actor_threads": 2}, {"actor_device_ids": (1, 0), "learner_device_ids": (3, 2)}]:
            args = small_args("impala", **ids)
            envs, state = start(args)
            with impala.actor_threads(args, *impala.make_train(args, *envs)[1:], state) as train:
                state, metrics = train(state, 3)
            ends.append((state.agent, metrics))
        learners = {device.id for device in jax.tree.leaves(state.agent)[0].devices()}
        assert learners == {2, 3} and state.acting[0].obs.shape == (8, 4), learners
        for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
        print("the same")
    """
    done = run_on_devices(4, "-c", textwrap.dedent(program))
    assert done.stdout.strip() == "the same", done.stderr


@pytest.mark.thorough
def test_the_command_for_four_devices_trains_and_evaluates(tmp_path):
    """EnvPool's steps cannot be split over devices, so the evaluation must leave the learners'."""
    flags = "--num-envs 12 --num-actor-threads 2 --actor-device-ids 0 --learner-device-ids 1 2 3 "
    flags += "--total-timesteps 8000 --eval-episodes 3"
    done = run_on_devices(4, impala.__file__, *flags.split(), "--run-dir", tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert "greedy return over 3 episodes" in done.stdout
