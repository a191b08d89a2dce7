"""What drqn.py, rsac.py and rsacd.py replay: sequences, the memory before them, episodes that end inside."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from probes import CONTINUOUS, NUM_ENVS, SEQUENCES, probe, quick, real_env, small_args

import drqn

T = 8  # steps of a sequence


def counter(name):
    """The observation is the step in the episode, which ends after 5 steps or is cut after 11."""
    return probe(
        lambda time, bit: time,
        lambda time, bit, action: time,
        terminated=lambda time, bit: bit & (time >= 5),
        truncated=lambda time, bit: ~bit & (time >= 11),
        continuous=name in CONTINUOUS,
    )


@functools.cache
def trained(name, num_iterations=6, memory="gru", buffer_size=8_000):
    """A state whose agent stayed as it was, with random parameters, while it filled its buffer."""
    script = importlib.import_module(name)
    rates = {"learning_rate": 0.0} if name == "drqn" else {"policy_lr": 0.0, "q_lr": 0.0}
    changes = rates | {"memory": memory, "buffer_size": buffer_size, "batch_size": 32}
    args = small_args(name, 100, **changes)
    init, train_iteration = script.make_train(args, counter(name))
    state, train_iteration = jax.jit(init)(jax.random.key(0)), jax.jit(train_iteration)
    noisy = lambda x, key: x + 0.3 * jax.random.normal(key, x.shape)
    network = state.agent if name == "drqn" else state.learner
    parts = [network] if name == "drqn" else [network.actor, network.critic]
    for n, part in enumerate(parts):
        leaves, structure = jax.tree.flatten(part)
        keys = jax.random.split(jax.random.key(n), len(leaves))
        parts[n] = jax.tree.unflatten(structure, list(map(noisy, leaves, keys)))
    if name == "drqn":
        state = state._replace(agent=parts[0], target=parts[0])
    else:
        own = dict(zip(("actor", "critic", "target"), (*parts, parts[1]), strict=True))
        state = state._replace(learner=network._replace(**own))
    for _ in range(num_iterations):
        state, _ = train_iteration(state)
    return script, args, state


def networks(name, state, sequences):
    """Pairs of what has a memory, and its memory before the sequences."""
    if name == "drqn":
        return [(state.agent, state.agent, sequences.memory)]
    actor, critic = state.learner.actor.history, state.learner.critic.history
    return [
        (actor, actor.memory, sequences.memory.actor),
        (critic, critic.memory, sequences.memory.critic),
    ]


def stored(state, number=None):
    """The sequences in the buffer, [number, ...]."""
    return jax.tree.map(lambda x: x[0, :number], state.buffer.experience)


def numbers(name, obs):
    return obs[..., 0] if name == "drqn" else obs.obs[..., 0]


@pytest.mark.parametrize("name", quick(SEQUENCES, "drqn"))
@pytest.mark.parametrize("memory", quick(["gru", "s5", "gtrxl"], "gru"))
def test_sequences_come_back_as_they_were_lived(name, memory):
    """What the agent gave step by step, from the first reset on, is what it gives when it unrolls each
    sequence from the memory that is stored with it; and the step after a sequence begins the next."""
    script, args, state = trained(name, memory=memory)
    sequences = stored(state, 6 * NUM_ENVS)  # [6 * B], rollout after rollout
    in_time = lambda x: x.reshape(6, NUM_ENVS, *x.shape[1:])
    rollouts = jax.tree.map(in_time, sequences)
    for x, y in zip(
        jax.tree.leaves(rollouts.last_obs), jax.tree.leaves(rollouts.steps.obs), strict=True
    ):
        np.testing.assert_array_equal(x[:-1], y[1:, :, 0])
    np.testing.assert_array_equal(rollouts.last_reset[:-1], rollouts.steps.reset[1:, :, 0])
    life = jax.tree.map(  # [6 * T, B, ...]
        lambda x: x.swapaxes(1, 2).reshape(6 * T, NUM_ENVS, *x.shape[3:]), rollouts.steps
    )
    assert life.terminated.any() and life.truncated.any()
    for network, module, before in networks(name, state, sequences):
        acting = jax.tree.map(lambda x: x[:NUM_ENVS], before)  # the first ones
        acting, lived = jax.lax.scan(
            lambda acting, step, network=network: network.step(acting, *step),
            module.open(acting),
            (life.obs, life.reset),
        )
        again = script.unroll(network, before, sequences, args)[:-1]  # [T, 6 * B, ...]
        again = again.reshape(T, 6, NUM_ENVS, -1).swapaxes(0, 1).reshape(6 * T, NUM_ENVS, -1)
        np.testing.assert_allclose(again, lived.reshape(again.shape), atol=2e-4)
        assert jnp.abs(again).max() > 0.1


@pytest.mark.parametrize("name", quick(SEQUENCES, "rsacd"))
def test_no_sequence_spans_the_write_head(name):
    """A buffer of 40 sequences takes in 16 with each rollout: it wraps around within rollouts."""
    _, args, state = trained(name, num_iterations=8, buffer_size=40 * T)
    assert args.num_sequences == 40 and state.buffer.is_full
    sequences = stored(state)
    append = lambda x, last: np.concatenate([x, last[:, None]], axis=1)  # [40, T + 1]
    obs = append(numbers(name, sequences.steps.obs), numbers(name, sequences.last_obs))
    reset = append(sequences.steps.reset, sequences.last_reset)
    np.testing.assert_array_equal(obs == 0, reset)
    np.testing.assert_array_equal(obs[:, 1:], np.where(reset[:, 1:], 0, obs[:, :-1] + 1))
    done = np.asarray(sequences.steps.terminated | sequences.steps.truncated)
    np.testing.assert_array_equal(reset[:, 1:], done)
    np.testing.assert_array_equal(sequences.steps.reward, obs[:, :-1])


@pytest.mark.parametrize("name", quick(SEQUENCES, "rsac"))
def test_nothing_of_another_episode_counts_before_it(name):
    """Neither in what is given for a step, nor in targets."""
    script, args, state = trained(name)
    sequences = stored(state, 5)
    steps = sequences.steps
    ends = jnp.zeros((5, T), bool).at[:, 3].set(True)
    reset = jnp.zeros((5, T), bool).at[:, 4].set(True)
    steps = steps._replace(terminated=ends, truncated=ends & False, reset=reset)
    sequences = sequences._replace(steps=steps, last_reset=jnp.zeros(5, bool))
    other = jax.tree.map(lambda x: x.at[:, 4:].add(1.0), steps.obs)
    other = sequences._replace(steps=steps._replace(obs=other))
    for network, _, before in networks(name, state, sequences):
        one, two = [script.unroll(network, before, x, args) for x in (sequences, other)]
        np.testing.assert_array_equal(one[:4], two[:4])
        assert jnp.abs(one[4:] - two[4:]).max() > 1e-3


@pytest.mark.parametrize("name", quick(SEQUENCES, "drqn"))
def test_what_a_time_limit_cut_is_not_learned_from(name):
    """The reward of a step that a limit cut changes no gradient of the critics; that of another does."""
    script, args, state = trained(name)
    sequences = stored(state, 32)
    steps = jax.tree.map(lambda x: x, sequences.steps)
    cut = jnp.zeros((32, T), bool).at[:, 3].set(True)
    reset = jnp.zeros((32, T), bool).at[:, 4].set(True)
    steps = steps._replace(terminated=cut & False, truncated=cut, reset=reset)

    def gradient(reward):
        batch = sequences._replace(steps=steps._replace(reward=reward))
        if name == "drqn":
            loss = lambda agent: drqn.drqn_loss(agent, state.target, batch, args)[0]
            return jax.grad(loss)(state.agent)
        key = (jax.random.key(0),) if name == "rsac" else ()
        parts = {x: getattr(state.learner, x) for x in ("actor", "critic", "log_alpha")}
        loss = lambda parts: script.losses(parts, state.learner.target, batch, *key, args)[0]
        return jax.grad(loss)(parts)

    plain, at_cut, elsewhere = [
        jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradient(reward))])
        for reward in (steps.reward, steps.reward.at[:, 3].add(5.0), steps.reward.at[:, 5].add(5.0))
    ]
    np.testing.assert_array_equal(plain, at_cut)
    assert jnp.abs(plain - elsewhere).max() > 1e-3


@pytest.mark.parametrize("name", quick(SEQUENCES, "drqn"))
def test_burn_in_warms_the_memory_up_without_a_gradient(name):
    script, args, state = trained(name)
    args, sequences = dataclasses.replace(args, burn_in=3), stored(state, 7)
    in_time = lambda x: x.swapaxes(0, 1)
    obs, reset = jax.tree.map(in_time, (sequences.steps.obs, sequences.steps.reset))
    for network, _, before in networks(name, state, sequences):
        changed = jax.tree.map(lambda x: 0.8 * x, network)
        first = jax.tree.map(lambda x: x[:3], (obs, reset))
        rest = jax.tree.map(lambda x: x[3:], (obs, reset))
        warm = changed.unroll(before, *first)[0]  # with the parameters of this network
        whole = lambda net, before=before: script.unroll(net, before, sequences, args)[:-1]
        by_hand = lambda net, warm=warm, rest=rest: net.unroll(warm, *rest)[1]
        np.testing.assert_allclose(whole(changed), by_hand(changed), atol=1e-5)
        square = lambda f: lambda net: (f(net) ** 2).sum()
        one, two = [jax.grad(square(f))(changed) for f in (whole, by_hand)]
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)
        cold = network.unroll(before, *first)[0]
        assert jnp.abs(whole(changed) - changed.unroll(cold, *rest)[1]).max() > 1e-4


# --- drqn.py --------------------------------------------------------------------------------------


def episodes_in(seed, steps=20, batch=6):
    """Steps [W, M] with ends and limits inside and at the last one, values [W + 1, M]."""
    rng = np.random.default_rng(seed)
    ends = rng.random((steps, batch)) < 0.15
    ends[-1, :2] = True
    truncated = ends & (rng.random(ends.shape) < 0.5)
    reward, values = rng.normal(size=ends.shape), rng.normal(size=(steps + 1, batch))
    zero = jnp.zeros(ends.shape)
    step = drqn.Transition(zero, zero, zero, jnp.float32(reward), ends & ~truncated, truncated)
    return step, jnp.float32(values)


@pytest.mark.parametrize("n_step", [1, 3])
def test_targets_are_those_of_a_loop_over_the_episode(n_step):
    batch, values = episodes_in(n_step)
    args = drqn.Args(n_step=n_step, gamma=0.9, reward_scale=0.5)
    targets, known = drqn.compute_targets(batch, values, args)
    steps, count = batch.reward.shape
    for b in range(count):
        for t in range(steps):
            total, discount, cut = 0.0, 1.0, False
            for n in range(t, min(t + n_step, steps)):
                total += discount * 0.5 * batch.reward[n, b]
                discount *= 0.9
                if batch.terminated[n, b] or batch.truncated[n, b]:
                    cut, discount = bool(batch.truncated[n, b]), 0.0
                    break
            total += discount * values[min(t + n_step, steps), b]
            assert known[t, b] == (not cut)
            if not cut:
                np.testing.assert_allclose(targets[t, b], total, atol=1e-5)
    assert 0.5 < known.mean() < 1.0


def test_rescaled_targets_are_rlax_s():
    batch, _ = episodes_in(5)
    batch = batch._replace(truncated=batch.truncated & False)
    args = drqn.Args(n_step=3, gamma=0.9, reward_scale=1.0)
    q_values = jax.random.normal(jax.random.key(0), (21, 6, 4)) * 20.0
    best = jax.random.randint(jax.random.key(1), (21, 6), 0, 4)
    chosen = jnp.take_along_axis(q_values, best[..., None], axis=-1)[..., 0]
    targets = drqn.rescale(drqn.compute_targets(batch, drqn.unscale(chosen), args)[0])
    theirs = jax.vmap(
        lambda q, a, r, d: rlax.transformed_n_step_q_learning(
            q[:-1], a[:-1], q[1:], a[1:], r, d, 3, tx_pair=rlax.SIGNED_HYPERBOLIC_PAIR
        ),
        in_axes=1,
        out_axes=1,
    )
    errors = theirs(q_values, best, batch.reward, 0.9 * ~batch.terminated)
    np.testing.assert_allclose(targets - chosen[:-1], errors, rtol=1e-3, atol=1e-3)


def test_values_are_rescaled_and_back_without_loss():
    x = jnp.concatenate([10.0 ** jnp.arange(-6.0, 5.0), jnp.zeros(1)])
    for signed in (x, -x):
        np.testing.assert_allclose(drqn.unscale(drqn.rescale(signed)), signed, rtol=2e-3, atol=1e-7)
        np.testing.assert_allclose(drqn.rescale(signed), rlax.signed_hyperbolic(signed), rtol=1e-4)


def test_double_q_and_the_size_of_errors():
    """a* is the online network's; a sequence's error is 0.9 of the largest and 0.1 of the mean, and 0 where
    no target is known."""
    script, args, state = trained("drqn")
    sequences = stored(state, 32)
    target = jax.tree.map(jnp.flip, state.agent)  # which prefers other actions
    q_values, next_q = [
        script.unroll(x, sequences.memory, sequences, args) for x in (state.agent, target)
    ]
    steps = jax.tree.map(lambda x: x.swapaxes(0, 1), sequences.steps)
    assert (q_values.argmax(axis=-1) != next_q.argmax(axis=-1)).mean() > 0.1
    for double in (True, False):
        own = dataclasses.replace(args, double_q=double)
        best = (q_values if double else next_q).argmax(axis=-1)
        values = np.take_along_axis(np.asarray(next_q), np.asarray(best)[..., None], -1)[..., 0]
        targets, known = drqn.compute_targets(steps, jnp.array(values), own)
        taken = jnp.take_along_axis(q_values[:-1], steps.action[..., None], -1)[..., 0]
        errors = np.where(known, np.abs(taken - targets), 0.0)
        loss, (_, sizes) = drqn.drqn_loss(state.agent, target, sequences, own)
        np.testing.assert_allclose(loss, (errors**2).sum() / known.sum(), rtol=1e-4)
        means = errors.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        expected = 0.9 * errors.max(axis=0) + 0.1 * means
        np.testing.assert_allclose(sizes, expected, rtol=1e-4)


def test_sequences_are_drawn_in_proportion_to_their_priorities():
    """Chi-square over many draws; new ones have the highest priority, also around the end."""
    script, args, state = trained("drqn", num_iterations=7, buffer_size=40 * T)
    priorities = jnp.arange(40.0)
    draw = jax.jit(
        lambda key: script.sample(script.make_replay(args), state.buffer, priorities, key, args)[1]
    )
    drawn = jax.vmap(draw)(jax.random.split(jax.random.key(0), 1_000)).ravel()
    expected = priorities / priorities.sum() * drawn.size
    counts = np.bincount(drawn, minlength=40)
    assert counts[0] == 0
    chi_square = ((counts - expected)[1:] ** 2 / expected[1:]).sum()
    assert chi_square < 38 + 5 * (2 * 38) ** 0.5
    begin = int(state.buffer.current_index)
    sequences = stored(state, NUM_ENVS)
    after = script.store(
        state._replace(priorities=0.1 * priorities), script.make_replay(args), sequences, args
    )
    new = (begin + np.arange(NUM_ENVS)) % 40
    assert begin + NUM_ENVS > 40
    np.testing.assert_allclose(after.priorities[new], 3.9)
    old = np.setdiff1d(np.arange(40), new)
    np.testing.assert_allclose(after.priorities[old], 0.1 * old)


# --- rsac.py and rsacd.py -------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(["rsac", "rsacd"], "rsac"))
def test_no_loss_has_a_gradient_for_another_s_network(name):
    script, args, state = trained(name)
    batch, key = stored(state, 32), (jax.random.key(0),) if name == "rsac" else ()
    parts = {x: getattr(state.learner, x) for x in ("actor", "critic", "log_alpha")}
    target = jax.tree.map(lambda x: 0.9 * x, state.learner.critic)
    whole = jax.grad(lambda parts: script.losses(parts, target, batch, *key, args)[0])(parts)
    for metric, own in (("qf_loss", "critic"), ("actor_loss", "actor")):
        alone = jax.grad(
            lambda parts, m=metric: script.losses(parts, target, batch, *key, args)[1][
                f"losses/{m}"
            ]
        )(parts)
        for name_of, grads in alone.items():
            leaves = jax.tree.leaves(grads)
            if name_of == own:
                for x, y in zip(leaves, jax.tree.leaves(whole[own]), strict=True):
                    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
                assert max(jnp.abs(x).max() for x in leaves) > 1e-4
            else:
                assert all(jnp.all(x == 0) for x in leaves)


@pytest.mark.parametrize("name", quick(["rsac", "rsacd"], "rsacd"))
def test_only_actions_that_were_played_are_remembered(name):
    """An action enters the memory with the observation that it led to, not before; and what leads into
    an episode is 0."""
    script, args, state = trained(name)
    sequences = stored(state, 9)
    seen, reset = sequences.steps.obs, sequences.steps.reset
    played = sequences.steps.action
    if name == "rsacd":
        played = jax.nn.one_hot(played, 2)
    following = np.where(np.asarray(reset)[:, 1:, None], 0.0, played[:, :-1])
    np.testing.assert_array_equal(seen.action[:, 1:], following)
    assert not np.any(np.asarray(seen.action)[np.asarray(reset)])
    assert not np.any(np.asarray(seen.reward)[np.asarray(reset)])
    other = seen._replace(action=seen.action.at[:, 5].add(1.0))
    changed = sequences._replace(steps=sequences.steps._replace(obs=other))
    for history, _, before in networks(name, state, sequences):
        one, two = [script.unroll(history, before, x, args) for x in (sequences, changed)]
        np.testing.assert_array_equal(one[:5], two[:5])
        assert jnp.abs(one[5] - two[5]).max() > 1e-3
        assert history.parts == (True, True, False)  # the rewards are left out by default


@pytest.mark.parametrize("name", quick(["rsac", "rsacd"], "rsac"))
def test_targets_are_those_of_the_paper(name):
    """Step by step in numpy, with the target critics' values of what is next."""
    script, args, state = trained(name)
    sequences = stored(state, 6)
    steps = jax.tree.map(lambda x: x.swapaxes(0, 1), sequences.steps)
    assert steps.terminated.any()
    target = jax.tree.map(lambda x: 0.9 * x, state.learner.critic)
    x = script.unroll(target.history, sequences.memory.critic, sequences, args)
    actor = state.learner.actor
    policy = actor(script.unroll(actor.history, sequences.memory.actor, sequences, args))
    if name == "rsac":
        actions, logprobs = script.sample_squashed(*policy, jax.random.key(3))
        targets = script.compute_targets(target, x, actions, logprobs, 0.2, steps, args)
        values = np.asarray(target(x, actions)).min(axis=0) - 0.2 * np.asarray(logprobs)
    else:
        targets = script.compute_targets(target, x, policy, 0.2, steps, args)
        q_values = np.asarray(target(x)).min(axis=0)
        values = (np.exp(policy) * (q_values - 0.2 * np.asarray(policy))).sum(axis=-1)
    for t in range(T):
        for m in range(6):
            expected = float(steps.reward[t, m])
            if not steps.terminated[t, m]:
                expected += args.gamma * values[t + 1, m]
            np.testing.assert_allclose(targets[t, m], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["rsac", "rsacd"])
def test_the_critics_of_one_history_begin_with_weights_of_their_own(name):
    script, args = importlib.import_module(name), small_args(name)
    critic = jax.jit(script.make_train(args, real_env(name))[0])(jax.random.key(0)).learner.critic
    one, two = [jax.tree.leaves(body) for body in critic.bodies]
    assert any(jnp.abs(x - y).max() > 0.1 for x, y in zip(one, two, strict=True))
