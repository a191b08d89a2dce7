"""What is replayed how often, n-step targets, and what the monitors of gradients report."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from probes import learn, probe, quick, small_args, train
from scipy import stats

import dqn
import drqn
import sac
import sacd
import td3

FLAGS = {"prioritized_replay": True, "linear_decay_sampling": True, "monitor_gradients": True}


def assert_drawn_as(positions, shares, least=1e-4):
    """Chi-square: that many draws look like draws with these shares, and none is of share 0."""
    shares, counts = np.asarray(shares, float), np.bincount(positions, minlength=len(shares))
    assert counts[shares == 0].sum() == 0
    counts, shares = counts[shares > 0], shares[shares > 0] / shares.sum()
    if len(shares) == 1:
        return
    assert (shares * counts.sum()).min() > 5  # or the statistic means nothing
    assert stats.chisquare(counts, shares * counts.sum()).pvalue > least


# --- How often ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [30, 64, 150]
)  # less than a row of 64, one row, more and not whole
def test_draws_are_in_proportion_to_the_weights(size):
    weights = jax.random.uniform(jax.random.key(0), (size,), minval=0.5, maxval=3.0)
    weights = weights.at[jnp.array([0, 7, size - 1])].set(0.0)
    positions = sac.draw(weights, jax.random.key(1), 20_000)
    assert_drawn_as(positions, weights)
    assert jnp.unique(sac.draw(jnp.eye(size)[3], jax.random.key(2), 100)).tolist() == [3]


@pytest.mark.parametrize("script", [dqn, drqn, sac, td3])
def test_of_a_hundred_thousand_weights_none_of_0_is_drawn(script):
    """Sums of floats round: among these draws, jax.random.choice has twelve of weight 0."""
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.uniform(keys[0], (100_000,))
    weights = jnp.where(jax.random.bernoulli(keys[1], 0.5, weights.shape), weights, 0.0)
    assert (weights[script.draw(weights, keys[2], 1_000_000)] > 0).all()


@pytest.mark.parametrize(("floor", "steps"), [(0.1, 40), (0.0, 40), (0.5, 200), (1.0, 40)])
@pytest.mark.parametrize("size", [1, 25, 100])  # fewer than fall to the floor, and more
def test_ages_are_in_proportion_to_their_recency(size, floor, steps):
    args = sac.Args(decay_floor=floor, decay_steps=steps, batch_size=40_000)
    ages = sac.recent_ages(jnp.int32(size), jax.random.key(size), args)
    # Age k stands for all times from k to k + 1.
    times = (np.arange(1000 * size) + 0.5) / 1000
    shares = np.maximum(floor, 1 - times / steps).reshape(size, 1000).mean(axis=1)
    shares[shares * 40_000 < 6 * shares.sum()] *= 0  # too rare to be tested
    kept = np.asarray(ages)[shares[np.asarray(ages)] > 0]
    assert len(kept) > 39_000 and ages.min() >= 0 and ages.max() < size
    assert_drawn_as(kept, shares)


def filled(script, args, number):
    """A buffer that has seen transitions 0, 1, ..., of which the last ones are still in it."""
    replay = script.make_replay(args)
    example = script.Transition(jnp.zeros(1), jnp.zeros(1), 0.0, jnp.zeros(1), jnp.bool_(False))
    buffer = replay.init(jax.tree.map(jnp.asarray, example))
    for k in range(0, number, args.num_envs):
        numbers = jnp.arange(k, k + args.num_envs, dtype=float)
        wide = numbers[:, None]
        buffer = replay.add(buffer, script.Transition(wide, wide, numbers, wide, numbers < 0))
    return replay, buffer


@pytest.mark.parametrize("number", [30, 50, 62, 126])  # not full, just full, wrapped around
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("recent", [False, True])
@pytest.mark.parametrize("name", quick(["sac", "td3"], "sac"))
def test_a_sample_s_shares_are_priority_times_recency(name, number, prioritized, recent):
    script = {"sac": sac, "td3": td3}[name]
    args = script.Args(
        num_envs=2,
        buffer_size=50,
        batch_size=50,  # a buffer may not hold less
        prioritized_replay=prioritized,
        linear_decay_sampling=recent,
        decay_steps=40,
        decay_floor=0.2,
    )
    replay, buffer = filled(script, args, number)
    priority_of = 1.0 + np.arange(number) % 5  # of transition k
    stored = np.arange(max(0, number - 50), number)
    priorities = jnp.zeros(50).at[stored % 50].set(priority_of[stored]) if prioritized else None
    draw = jax.vmap(lambda key: script.sample(replay, buffer, priorities, key, args)[0].reward)
    rewards = draw(jax.random.split(jax.random.key(number), 400)).ravel().astype(int)
    ages = number - 1 - stored + (0.0 if prioritized else 0.5)
    shares = np.maximum(0.2, 1 - ages / 40) if recent else np.ones(len(stored))
    shares = shares * (priority_of[stored] if prioritized else 1.0)
    assert_drawn_as(rewards - stored[0], shares)


# --- What priorities are --------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(["sac", "td3"], "sac"))
def test_priorities_are_the_larger_error_and_new_ones_the_highest(name, monkeypatch):
    """Learned from: max(error ** exponent, 1) at their positions; new: the highest of all; nothing
    where nothing is stored, until the buffer has wrapped around."""
    script = {"sac": sac, "td3": td3}[name]
    args = small_args(
        name, num_envs=2, buffer_size=75, batch_size=8, learning_starts=20, num_steps=1, **FLAGS
    )
    env = probe(lambda *x: 1.0, lambda *x: x[2], continuous=True, num_envs=2)
    # The eighth part of a gradient step is due with each step: one every fourth of the loop.
    replay, txs, errors = (
        script.make_replay(args),
        script.make_optimizers(args),
        jnp.arange(8.0) / 2,
    )
    real_sample, seen, real_update = script.sample, [], script.update

    def sample(*args):
        batch, positions = real_sample(*args)
        jax.debug.callback(seen.append, positions, ordered=True)
        return batch, positions

    monkeypatch.setattr(script, "sample", sample)
    monkeypatch.setattr(script, "update", lambda *x: (*real_update(*x)[:2], errors))
    state = jax.jit(script.make_train(args, env)[0])(jax.random.key(0))
    step = jax.jit(lambda state: script.step_and_learn(state, env, replay, txs, args)[0])
    expected = np.zeros(75)
    for number in range(60):
        new = [(2 * number + k) % 75 for k in range(2)]
        expected[new] = max(expected.max(), 1.0)
        state = step(state)
        jax.effects_barrier()
        if seen:
            for position, error in zip(seen.pop(), errors, strict=True):
                expected[position] = max(float(error) ** 0.4, 1.0)
        assert not seen
        wanted = np.asarray(state.priorities)
        if len(np.unique(wanted[wanted > 0])) < 2:
            assert number < 20
        np.testing.assert_allclose(wanted, expected, rtol=1e-5)
    assert expected.max() > 1.5 and (expected > 0).all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sac", "td3"])
def test_the_error_of_an_update_is_the_larger_one_of_the_critics(name, monkeypatch):
    script, args = {"sac": sac, "td3": td3}[name], small_args(name, prioritized_replay=True)
    monkeypatch.setattr(script, "compute_targets", lambda *x: jnp.zeros(8))
    env = probe(lambda *x: 1.0, lambda *x: x[2], continuous=True)
    learner = jax.jit(script.make_train(args, env)[0])(jax.random.key(0)).learner
    obs, action, no = *jax.random.normal(jax.random.key(1), (2, 8, 1)), jnp.zeros(8)
    batch = script.Transition(obs, action, no, obs, no > 0)
    number = (0,) if name == "td3" else ()
    rest = (script.make_optimizers(args), batch, *number, jax.random.key(0), args)
    errors = jax.jit(lambda learner: script.update(learner, *rest)[-1])(learner)
    q_values = learner.critic(obs, action)
    assert (q_values < 0).any() and (q_values > 0).any()
    np.testing.assert_allclose(errors, jnp.abs(q_values).max(axis=0), rtol=1e-5)


@pytest.mark.parametrize("script", [sac, td3])
def test_the_loss_by_priority_is_linear_beyond_an_error_of_1(script):
    """And the critics' gradients, weighted by how often each transition is drawn, are those of
    |error| ** (1 + exponent) where the error is above 1 (arXiv:2007.06049, eq. 9)."""
    errors, targets = jnp.array([0.2, -0.5, 3.0, -8.0]), jnp.zeros(4)
    batch = script.Transition(*[jnp.zeros((4, 1))] * 2, targets, jnp.zeros((4, 1)), targets > 0)

    def loss(values, **changes):
        critic = lambda obs, action: values[None]
        return script.critic_loss(critic, batch, targets, script.Args(**changes))[0]

    np.testing.assert_allclose(loss(errors), 0.5 * (errors**2).mean())
    grads = 4 * jax.grad(loss)(errors, prioritized_replay=True)
    np.testing.assert_allclose(grads, [0.2, -0.5, 1.0, -1.0], rtol=1e-6)
    priority = jnp.maximum(jnp.abs(errors) ** 0.4, 1.0)
    smooth = lambda x: jnp.where(abs(x) < 1, x**2 / 2, abs(x) ** 1.4 / 1.4).sum()
    np.testing.assert_allclose(priority * grads, jax.grad(smooth)(errors), rtol=1e-5)


# --- n steps --------------------------------------------------------------------------------------


class Numbers(dqn.nnx.Module):
    """Action 0 is worth the observation, action 1 its double."""

    def __call__(self, obs):
        return obs * jnp.array([1.0, 2.0])


@pytest.mark.parametrize("n", [1, 3, 5])
def test_n_step_targets_against_a_plain_loop(n):
    """With ends and time limits at random places of the windows."""
    rng, gamma = np.random.default_rng(n), 0.9
    reward, next_obs = rng.normal(size=(2, 200, n)).astype(np.float32)
    terminated, truncated = rng.random((2, 200, n)) < 0.15
    batch = dqn.Transition(
        next_obs[..., None],
        np.zeros((200, n), int),
        reward,
        next_obs[..., None],
        terminated,
        terminated | truncated,
    )
    args = dqn.Args(gamma=gamma, n_step=n, reward_scale=0.5)
    targets = dqn.compute_targets(Numbers(), Numbers(), jax.tree.map(jnp.asarray, batch), args)
    for m in range(200):
        total = 0.0
        for k in range(n):
            total += 0.5 * gamma**k * reward[m, k]
            if terminated[m, k] or truncated[m, k]:
                break
        if not terminated[m, k]:
            total += gamma ** (k + 1) * max(next_obs[m, k], 2 * next_obs[m, k])
        assert targets[m] == pytest.approx(total, abs=1e-5)


def test_n_step_targets_are_rlax_s():
    """Where all windows go on, which is what rlax computes."""
    reward = jax.random.normal(jax.random.key(0), (12,))
    value = jax.random.normal(jax.random.key(1), (12,))
    whole = rlax.n_step_bootstrapped_returns(reward, jnp.full(12, 0.9), value, 4)
    windows = jnp.arange(9)[:, None] + jnp.arange(4)
    no = jnp.zeros((9, 4), bool)
    obs = value[windows][..., None]
    batch = dqn.Transition(obs, windows, reward[windows], obs, no, no)
    greedy = lambda obs: jnp.concatenate([obs, obs - 1.0], axis=-1)
    targets = dqn.compute_targets(
        greedy, greedy, batch, dqn.Args(gamma=0.9, n_step=4, reward_scale=1.0)
    )
    np.testing.assert_allclose(targets, whole[:9], atol=1e-5)


@pytest.mark.parametrize("prioritized", quick([False, True], True))
@pytest.mark.parametrize("n", quick([1, 3], 3))
def test_windows_are_steps_in_a_row_and_each_is_drawn(n, prioritized):
    """They never span the place where the buffer is written, and all complete ones are drawn: alike
    often, or in proportion to their priorities."""
    args = small_args(
        "dqn",
        num_envs=2,
        num_steps=1,
        n_step=n,
        buffer_size=40,
        batch_size=40,
        learning_starts=10,
        prioritized_replay=prioritized,
        total_timesteps=10**6,
        train_frequency=10**6,
    )
    env = probe(lambda time, bit: time, lambda time, bit, action: time, num_envs=2)
    replay, tx = dqn.make_replay(args), dqn.optax.scale_by_adam()
    state = jax.jit(dqn.make_train(args, env)[0])(jax.random.key(0))
    step = jax.jit(lambda state: dqn.step_and_learn(state, env, replay, tx, args)[0])
    for number in range(1, 48):
        state = step(state)
        begins = np.arange(max(number - 20, 0), number - n + 1)
        if number in (n, 7, 19, 20, 21, 47):
            priorities, weight_of = state.priorities, np.ones(len(begins))
            if prioritized:
                assert (np.sort(priorities[0] > 0)[::-1] == (np.arange(20) < len(begins))).all()
                weight_of = 1.0 + begins % 4
                priorities = jnp.zeros((2, 20)).at[:, begins % 20].set(weight_of)
            draw = partial(dqn.sample, replay, state.buffer, priorities, 0.5, args=args)
            batch, _, weights = jax.vmap(draw)(jax.random.split(jax.random.key(number), 200))
            times = np.asarray(batch.obs[..., 0], int)  # [200, 40, n]
            np.testing.assert_array_equal(np.diff(times, axis=-1), 1)
            assert_drawn_as(times[..., 0].ravel() - begins[0], weight_of)
            if prioritized:  # (N P) ** -beta over the largest of the batch: the N cancels
                shares = weight_of / weight_of.sum() / 2
                by_hand = (2 * len(begins) * shares[times[..., 0] - begins[0]]) ** -0.5
                by_hand /= by_hand.max(axis=1, keepdims=True)
                np.testing.assert_allclose(weights, by_hand, rtol=1e-4)


def test_dqn_s_priorities_are_its_errors_and_weigh_its_loss():
    obs, targets = jnp.array([1.0, 2.0, 3.0])[:, None, None], jnp.array([1.0, 0.0, 5.0])
    no = jnp.zeros((3, 1), bool)
    batch = dqn.Transition(obs, jnp.zeros((3, 1), int), targets[:, None], obs, no, no)
    weights = jnp.array([1.0, 0.5, 0.25])
    loss, (_, errors) = dqn.dqn_loss(Numbers(), batch, targets, weights)
    np.testing.assert_allclose(errors, [0.0, 2.0, -2.0])
    np.testing.assert_allclose(loss, (0.5 * 4 + 0.25 * 4) / 3)


def test_dqn_s_priorities_follow_its_errors_and_beta_rises_to_1(monkeypatch):
    """As gradient steps come: number k is due after so many environment steps, on which beta depends."""
    args = small_args(
        "dqn",
        num_envs=4,
        learning_starts=20,
        train_frequency=8,
        num_steps=1,
        buffer_size=400,
        batch_size=4,
        total_timesteps=200,
        prioritized_replay=True,
        priority_exponent=0.6,
        priority_beta=0.4,
    )
    env = probe(lambda time, bit: bit, lambda time, bit, action: 1.0, num_envs=4)
    replay, tx, seen = dqn.make_replay(args), dqn.optax.scale_by_adam(), []
    own_sample, own_update = dqn.sample, dqn.update

    def sample(replay, buffer, priorities, beta, key, args):
        batch, positions, weights = own_sample(replay, buffer, priorities, beta, key, args)
        jax.debug.callback(lambda *x: seen.append(x), beta, *positions, ordered=True)
        return batch, positions, weights

    # The errors of a step are alike, and others in the next; the smallest are near the 1e-6 added.
    update = lambda *x: (*own_update(*x)[:-1], -1e-7 * x[-2] * jnp.ones(args.batch_size))
    monkeypatch.setattr(dqn, "sample", sample)
    monkeypatch.setattr(dqn, "update", update)
    state = jax.jit(dqn.make_train(args, env)[0])(jax.random.key(0))
    step = jax.jit(lambda state: dqn.step_and_learn(state, env, replay, tx, args)[0])
    due, betas = [at for at in range(8, 201, 8) if at > 20], []
    for _ in range(50):
        state = step(state)
        jax.effects_barrier()
        if seen:
            ((beta, *positions),) = seen
            betas.append(beta)
            wanted = (1e-7 * due[len(betas) - 1] + 1e-6) ** 0.6
            np.testing.assert_allclose(state.priorities[tuple(positions)], wanted, rtol=1e-5)
            seen.clear()
    np.testing.assert_allclose(betas, 0.4 + 0.6 * np.array(due) / 200, rtol=1e-5)
    assert betas[-1] == 1.0


# --- Who moves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(["sac", "td3", "sacd"], "sac"))
def test_a_step_size_of_0_leaves_its_network_alone_and_no_other(name):
    """Bit for bit. And two critics are two: they begin and stay different."""
    script = {"sac": sac, "td3": td3, "sacd": sacd}[name]
    env = probe(lambda time, bit: bit, lambda *x: x[2], continuous=name != "sacd")

    @jax.jit  # one program for all step sizes
    def train_with(policy_lr, q_lr):
        args = small_args(name, policy_lr=policy_lr, q_lr=q_lr)
        init, train_iteration = script.make_train(args, env)
        state = init(jax.random.key(0))
        return state.learner, train_iteration(state)[0].learner

    def moved(part, *step_sizes):
        pairs = [jax.tree.leaves(getattr(x, part)) for x in train_with(*step_sizes)]
        return [not np.array_equal(*pair) for pair in zip(*pairs, strict=True)]

    assert not any(moved("actor", 0.0, 1e-3)) and all(moved("critic", 0.0, 1e-3))
    assert all(moved("actor", 1e-3, 0.0)) and not any(moved("critic", 1e-3, 0.0))
    for learner in train_with(1e-3, 1e-3):
        first, second = learner.critic.bodies
        assert (first.layers[0].kernel[...] != second.layers[0].kernel[...]).all()


# --- Learning with all of it ----------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["dqn", "sac", "td3"])
def test_a_discounted_reward_is_learned_with_every_flag(name):
    """A reward of 1 two steps on, then the end: what each observation is worth."""
    flags = {"n_step": 2, "prioritized_replay": True} if name == "dqn" else FLAGS
    env = probe(
        lambda time, bit: time,
        lambda time, bit, action: time == 2,
        lambda time, bit: time == 3,
        continuous=name != "dqn",
    )
    learned = learn(name, env, **flags)
    values = learned.value(jnp.array([[0.0], [1.0], [2.0]]))
    np.testing.assert_allclose(values, [0.64, 0.8, 1.0], atol=0.1)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "frequency"), [("sac", 1), ("td3", 1), ("td3", 2)])
def test_monitored_gradients_are_what_was_done(name, frequency):
    """Norms of gradient, parameters and update, measured from outside, with one gradient step of the actor
    in each row; and training is the same with and without the monitor."""
    script = {"sac": sac, "td3": td3}[name]
    changes = {"num_envs": 1, "num_steps": 8, "weight_decay": 0.1, "max_grad_norm": 0.02}
    changes |= {"updates_per_step": frequency / 8}
    changes |= {"policy_frequency": frequency} if name == "td3" else {}
    env = probe(
        lambda time, bit: bit, lambda time, bit, action: action, continuous=True, num_envs=1
    )
    before, _ = train(name, small_args(name, 12, **changes), env)
    after, metrics = train(name, small_args(name, 13, **changes, monitor_gradients=True), env)
    plain, plain_metrics = train(name, small_args(name, 13, **changes), env)
    for one, other in zip(*map(jax.tree.leaves, (after.learner, plain.learner)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any("gradients" in key for key in plain_metrics)
    for part in ("actor", "critic")[
        : 1 + (frequency == 1)
    ]:  # the critic's are means over its steps
        old, new = getattr(before.learner, part), getattr(after.learner, part)
        moved = script.optax.tree.norm(jax.tree.map(jnp.subtract, new, old))
        size = script.optax.tree.norm(old)
        of = lambda key, part=part: float(metrics[f"gradients/{part}_{key}"])
        np.testing.assert_allclose(of("param_norm"), size, rtol=1e-5)
        np.testing.assert_allclose(of("update_ratio"), moved / size, rtol=1e-2)
        assert of("norm") > 0 and of("clipped") == (of("norm") > 0.02)
        assert 0 <= of("near_zero") < 1


def test_the_monitor_s_numbers_by_hand():
    part = {"w": jnp.array([3.0, 4.0])}
    grads, updates = {"w": jnp.array([0.0, -2.0])}, {"w": jnp.array([0.5, 0.0])}
    for limit, clipped in ((1.0, 1.0), (3.0, 0.0), (None, 0.0)):
        seen = sac.monitor("x", part, grads, updates, sac.Args(max_grad_norm=limit))
        by_hand = {"norm": 2.0, "param_norm": 5.0, "update_ratio": 0.1, "near_zero": 0.5}
        by_hand = {f"gradients/x_{k}": v for k, v in (by_hand | {"clipped": clipped}).items()}
        assert {k: pytest.approx(float(v)) for k, v in seen.items()} == by_hand
