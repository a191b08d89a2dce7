"""impala.py and impala_lstm.py: V-trace, what the learner makes of the actors' memories, and that threads
and devices compute what the plain iteration computes.
"""

import importlib
import textwrap
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from copies import definitions
from probes import (
    THREADED,
    act_from,
    log_prob,
    make_train,
    quick,
    real_env,
    run_on_devices,
    small_args,
)
from test_memory import agent_of
from test_on_policy import trajectory

import impala
import impala_lstm
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


# --- Memories -------------------------------------------------------------------------------------

NAME = "impala_lstm"


def played(limit=20, seed=1, num_steps=30, **changes):
    """Arguments, an agent, and a batch that it plays from the middle of episodes on: what it remembers
    before, the batch, and where acting stands after it."""
    args, env, agent = (
        small_args(NAME, **changes),
        real_env(NAME, limit=limit),
        agent_of(NAME, **changes),
    )
    start = impala_lstm.begin(agent, env, jax.random.key(0))
    after, batch = act_from(impala_lstm, agent, env, start, jax.random.key(seed), 12)
    memory = agent.unroll(start.memory, batch.obs, batch.reset)[0]
    begun = after._replace(memory=memory)
    after, batch = act_from(impala_lstm, agent, env, begun, jax.random.key(seed + 1), num_steps)
    assert batch.reset.any() and not (batch.reset[1:] == batch.done[1:]).all()
    return args, agent, memory, batch, after


def test_the_learner_computes_what_the_actor_computed():
    """With the same agent and the ends of episodes: all ratios are 1, so the targets are those of GAE
    with the values of acting step by step, and the last of these begins the next rollout."""
    args, agent, memory, batch, after = played(limit=1000, norm_adv=False)
    assert batch.done.sum() > 16 and not batch.cut.any()
    last = (after.obs, after.reset)
    targets, advantages, metrics = impala_lstm.compute_targets(agent, memory, batch, last, args)
    assert abs(metrics["losses/approx_kl"]) < 1e-7
    acting, values = agent.open(memory), []
    for obs, reset in [*zip(batch.obs, batch.reset, strict=True), last]:
        acting, logprobs, value = agent.step(acting, obs, reset)
        values.append(value)
        if len(values) <= len(batch.obs):
            number = len(values) - 1
            logprob = log_prob([logprobs], batch.action[number])
            np.testing.assert_allclose(logprob, batch.logprob[number], atol=1e-5)
    begins = agent.unroll(memory, batch.obs, batch.reset)[0]
    first = agent.step(agent.open(begins), *last)[-1]
    np.testing.assert_allclose(values[-1], first, atol=1e-5)
    expected = ppo.compute_gae(
        batch.reward, jnp.stack(values[:-1]), batch.done, values[-1], args.gamma, 1.0
    )
    np.testing.assert_allclose(advantages, expected[0], atol=1e-4)
    np.testing.assert_allclose(targets, expected[1], atol=1e-4)


def test_the_value_at_a_time_limit_is_the_learner_s_with_its_own_memory():
    """V(next_obs) is that of one more step in the episode that was cut, from its beginning on."""
    args, agent, memory, batch, after = played(limit=7)
    learner = jax.tree.map(lambda x: 0.9 * x, agent)
    values = np.asarray(impala_lstm.values_beyond(learner, memory, batch))
    assert not values[~batch.cut].any()
    for t in (0, 3, 11, 29):
        obs = jnp.concatenate([batch.obs[: t + 1], batch.next_obs[t : t + 1]])
        reset = jnp.concatenate([batch.reset[: t + 1], batch.reset[:1] & False])
        cut, value = batch.cut[t], learner.unroll(memory, obs, reset)[-1][-1]
        np.testing.assert_allclose(values[t][cut], value[cut], atol=1e-5)
    assert batch.cut[jnp.array([0, 3, 11, 29])].sum() > 8
    last = (after.obs, after.reset)
    by_hand = batch._replace(reward=batch.reward + args.gamma * values, cut=batch.cut & False)
    targets, expected = [
        impala_lstm.compute_targets(learner, memory, x, last, args)[0] for x in (batch, by_hand)
    ]
    np.testing.assert_allclose(targets, expected, rtol=1e-4, atol=1e-4)


def test_nothing_passes_a_reset_in_the_learner():
    """Neither into targets nor into the gradient: what came before an end could be anything."""
    args, agent, memory, batch, after = played(limit=1000, norm_adv=False)
    begin = jnp.zeros(batch.reset.shape, bool).at[10].set(True)
    batch = batch._replace(reset=begin, done=jnp.roll(begin, -1, axis=0), cut=batch.cut & False)
    other = batch._replace(obs=batch.obs.at[:10].add(1.0), reward=batch.reward.at[:10].add(1.0))
    last = (after.obs, jnp.zeros_like(after.reset))
    late = jnp.tile(jnp.arange(30)[:, None] >= 10, (1, 16))
    results, early = [], []
    for start, one in ((memory, batch), (agent.initial_memory(16), other)):
        targets, *_ = impala_lstm.compute_targets(agent, start, one, last, args)
        value = agent.unroll(start, one.obs, one.reset)[-1]  # so that early errors are 0
        rest = (jnp.where(late, 1.0, value), 1.0 * late, replace(args, ent_coef=0.0))
        grads = jax.grad(lambda *x: impala_lstm.impala_loss(*x)[0])(agent, start, one, *rest)
        results.append((targets[10:], grads))
        early.append(targets[:10])
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert jnp.abs(early[0] - early[1]).max() > 1e-2


@pytest.mark.thorough
def test_minibatches_are_environments_with_their_own_memories(monkeypatch):
    args, agent, memory, batch, after = played(num_minibatches=4)
    seen, numbers = [], jnp.arange(16)

    def targets(agent, memory, batch, last, args):
        jax.debug.callback(lambda *x: seen.append(x), memory[0], batch.action, *last)
        return batch.reward, batch.reward, {}

    monkeypatch.setattr(impala_lstm, "compute_targets", targets)
    batch = batch._replace(action=jnp.tile(numbers, (30, 1)))
    memory = tuple(jnp.tile(1.0 * numbers[:, None], (1, 32)) for _ in range(2))
    last, tx = (jnp.tile(1.0 * numbers[:, None], (1, 4)), numbers % 2 == 1), impala.optax.adam(0.1)
    impala_lstm.update(agent, tx.init(agent), tx, 0.0, memory, batch, last, args)
    jax.effects_barrier()
    assert len(seen) == 4
    for h, action, obs, reset in seen:
        np.testing.assert_array_equal(action, np.tile(h[:, 0], (30, 1)))
        np.testing.assert_array_equal(obs[:, 0], h[:, 0])
        np.testing.assert_array_equal(reset, h[:, 0] % 2 == 1)
    assert sorted(np.concatenate([h[:, 0] for h, *_ in seen])) == list(range(16))


def save_and_load(run_dir, state, like):
    impala_lstm.save_checkpoint(run_dir, state)
    return impala_lstm.load_checkpoint(run_dir, like)


@pytest.mark.parametrize("num_actor_threads", quick([1, 2], 1))
def test_the_memory_of_a_rollout_is_that_with_which_it_began(
    num_actor_threads, tmp_path, monkeypatch
):
    """Whatever the agents do: unrolled from it, the one that played gives the stored log-probs, also
    over the step at which a run is resumed."""
    args = small_args(NAME, num_actor_threads=num_actor_threads)
    envs, like = start(args, NAME)
    init, train_iteration = make_train(NAME, args, *envs)
    given = []

    def spy(agent, opt_state, tx, learning_rate, memory, batch, last, args):
        given.append((memory, batch, last))
        return jax.tree.map(lambda x: 0.8 * x, agent), opt_state, {}

    monkeypatch.setattr(impala_lstm, "update", spy)
    state = like._replace(agent=agent_of(NAME), acting_agent=agent_of(NAME))
    for iteration in range(5):
        player = state.acting_agent
        state, _ = train_iteration(state)
        memory, batch, _ = given[-1]
        assert iteration == 0 or jnp.abs(memory[0]).max() > 1e-2
        _, logprobs, _ = player.unroll(memory, batch.obs, batch.reset)
        np.testing.assert_allclose(log_prob([logprobs], batch.action), batch.logprob, atol=1e-5)
        if iteration == 2:
            state = save_and_load(tmp_path, state, like)
    for (_, before, last), (_, after, _) in zip(given, given[1:], strict=False):
        np.testing.assert_array_equal(last[0], after.obs[0])
        np.testing.assert_array_equal(last[1], after.reset[0])
        np.testing.assert_array_equal(before.done[-1], after.reset[0])
        np.testing.assert_array_equal(after.reset[1:], after.done[:-1])


@pytest.mark.thorough
@pytest.mark.parametrize("memory", ["lstm", "gru", "s5", "gtrxl"])
def test_a_run_goes_on_exactly_with_any_memory(memory, tmp_path):
    """Two iterations, saved and loaded, and two more, with rollouts under way: bit for bit four."""
    kwargs = '{"length": 12}' if memory == "gtrxl" else "{}"
    args = small_args(NAME, memory=memory, memory_kwargs=kwargs, num_actor_threads=2)
    envs, first = start(args, NAME)
    rest, ends = impala_lstm.make_train(args, *envs)[1:], []
    for parts in ([4], [2, 2]):
        state = first
        for number in parts:
            with impala_lstm.actor_threads(args, *rest, state) as train:
                state, metrics = train(state, number)
            assert np.isfinite(metrics["losses/value_loss"])
            state = save_and_load(tmp_path / f"{len(parts)}", state, first)
        ends.append(state)
    assert_equal(*ends)
    assert any(jnp.abs(x).max() > 1e-2 for x in jax.tree.leaves(state.acting[1].memory))


# --- Threads --------------------------------------------------------------------------------------


def start(args, name="impala"):
    size, script = args.num_envs // args.num_actors, importlib.import_module(name)
    envs = [script.make_env("gymnax::CartPole-v1", size) for _ in range(args.num_actors)]
    return envs, jax.jit(script.make_train(args, *envs)[0])(jax.random.key(0))


def test_both_scripts_start_and_judge_their_runs_alike():
    """What tests/copies.py cannot hold to ppo.py."""
    texts = []
    for script in (impala, impala_lstm):
        text = open(script.__file__).read()
        first, last = definitions(text)["main"]
        texts.append(text.splitlines()[first:last])
    assert texts[0] == texts[1]


def assert_equal(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.mark.thorough
@pytest.mark.parametrize("name", THREADED)
@pytest.mark.parametrize("num_actor_threads", [1, 2])
def test_threads_compute_what_the_plain_iteration_computes(num_actor_threads, name):
    """Bit for bit, over several calls, and each time that it is run."""
    script, args = (
        importlib.import_module(name),
        small_args(name, num_actor_threads=num_actor_threads),
    )
    envs, first = start(args, name)
    train_iteration, plain = jax.jit(make_train(name, args, *envs)[1]), first
    losses = []
    for _ in range(7):
        plain, plain_metrics = train_iteration(plain)
        losses.append({name: x for name, x in plain_metrics.items() if "losses/" in name})
    for calls in ([7], [1, 4, 2]):
        state = first
        with script.actor_threads(args, *script.make_train(args, *envs)[1:], state) as train:
            for num_iterations in calls:  # the losses of a call are means
                state, metrics = train(state, num_iterations)
                last = losses[-num_iterations:]
                means = {name: np.mean([x[name] for x in last], axis=0) for name in last[0]}
            assert [x.name for x in threading.enumerate()].count("actor") == num_actor_threads
        assert_equal((state, metrics), (plain, plain_metrics | means))
        assert not [x for x in threading.enumerate() if x.name == "actor"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", THREADED)
def test_the_actors_are_one_update_behind(name):
    args = small_args(name)
    (env,), state = start(args, name)
    train_iteration = jax.jit(make_train(name, args, env)[1])
    first, metrics = train_iteration(state)
    assert_equal(first.acting_agent, state.agent)
    second, _ = train_iteration(first)
    assert_equal(second.acting_agent, first.agent)
    # So the second batch was played by the agent of the start, and its ratios are not 1.
    args = small_args(name, num_minibatches=1)
    train_iteration = jax.jit(make_train(name, args, env)[1])
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
@pytest.mark.parametrize("name", THREADED)
def test_devices_share_the_work_and_change_nothing(name):
    """Two actor devices and two learner devices of four, against one: to rounding."""
    program = """
        import jax, numpy as np, NAME
        from probes import small_args
        from test_impala import start

        assert jax.local_device_count() == 4
        ends = []
        for ids in [{"num_actor_threads": 2}, {"actor_device_ids": (1, 0), "learner_device_ids": (3, 2)}]:
            args = small_args("NAME", **ids)
            envs, state = start(args, "NAME")
            with NAME.actor_threads(args, *NAME.make_train(args, *envs)[1:], state) as train:
                state, metrics = train(state, 3)
            ends.append((state.agent, metrics))
        learners = {device.id for device in jax.tree.leaves(state.agent)[0].devices()}
        assert learners == {2, 3} and state.acting[0].obs.shape == (8, 4), learners
        for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
        print("the same")
    """
    done = run_on_devices(4, "-c", textwrap.dedent(program).replace("NAME", name))
    assert done.stdout.strip() == "the same", done.stderr


@pytest.mark.thorough
def test_the_command_for_four_devices_trains_and_evaluates(tmp_path):
    """EnvPool's steps cannot be split over devices, so the evaluation must leave the learners'."""
    flags = "--num-envs 12 --num-actor-threads 2 --actor-device-ids 0 --learner-device-ids 1 2 3 "
    flags += "--total-timesteps 8000 --eval-episodes 3"
    done = run_on_devices(4, impala.__file__, *flags.split(), "--run-dir", tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert "greedy return over 3 episodes" in done.stdout
