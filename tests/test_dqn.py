"""dqn.py: targets, schedules that do not depend on the number of environments, and the replay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from probes import probe, real_env, small_args

import dqn


class Table(nnx.Module):
    """Q(obs, .) is a row of a table, for observations that are numbers."""

    def __init__(self, rows):
        self.rows = nnx.Param(jnp.array(rows))

    def __call__(self, obs):
        return self.rows[...][obs[..., 0].astype(int)]


# Three transitions: an ordinary one, a time limit, the end of the task.
BATCH = dqn.Transition(
    obs=jnp.array([[0.0], [1.0], [2.0]]),
    action=jnp.array([0, 1, 1]),
    reward=jnp.array([1.0, 2.0, 4.0]),
    next_obs=jnp.array([[1.0], [2.0], [0.0]]),
    terminated=jnp.array([False, False, True]),  # the second was cut by a limit: not terminated
)
ONLINE = Table([[9.0, 1.0], [3.0, 7.0], [8.0, 2.0]])
TARGET = Table([[5.0, 6.0], [10.0, 20.0], [30.0, 40.0]])


@pytest.mark.parametrize(
    ("double_q", "next_values"),
    [(True, [20.0, 30.0]), (False, [20.0, 40.0])],  # online prefers action 1, then 0
)
def test_targets_against_a_buffer_computed_by_hand(double_q, next_values):
    args = dqn.Args(gamma=0.5, double_q=double_q, reward_scale=3.0)
    targets = dqn.compute_targets(ONLINE, TARGET, BATCH, args)
    by_hand = [3.0 * 1.0 + 0.5 * next_values[0], 3.0 * 2.0 + 0.5 * next_values[1], 3.0 * 4.0]
    np.testing.assert_allclose(targets, by_hand)


def test_the_loss_is_the_squared_error_of_the_chosen_actions():
    loss, metrics = dqn.dqn_loss(ONLINE, BATCH, jnp.array([10.0, 7.0, 0.0]))
    np.testing.assert_allclose(loss, (1.0**2 + 0.0**2 + 2.0**2) / 3)  # Q: 9, 7, 2
    np.testing.assert_allclose(metrics["losses/q_values"], 6.0)
    grads = jax.grad(lambda agent: dqn.dqn_loss(agent, BATCH, jnp.array([10.0, 7.0, 0.0]))[0])
    np.testing.assert_allclose(
        grads(ONLINE).rows[...], [[-2 / 3, 0], [0, 0], [0, 4 / 3]], rtol=1e-6
    )


def test_the_loss_refuses_shapes_that_would_broadcast():
    with pytest.raises(AssertionError):
        dqn.dqn_loss(ONLINE, BATCH, jnp.zeros((3, 1)))


# --- Schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3, 8])
@pytest.mark.parametrize(("train_frequency", "target_frequency"), [(4, 20), (10, 10), (1, 7)])
def test_schedules_do_not_depend_on_the_number_of_environments(
    num_envs, train_frequency, target_frequency, monkeypatch
):
    """Gradient steps and copies of the target network come in the order that a plain loop over
    single environment steps gives, and none is lost or doubled."""
    args = small_args(
        "dqn",
        num_envs=num_envs,
        train_frequency=train_frequency,
        target_network_frequency=target_frequency,
        learning_starts=20,
        num_steps=1,
        buffer_size=500,
        batch_size=4,
        tau=1.0,
        anneal_lr=False,
    )
    env = probe(lambda time, bit: bit, lambda time, bit, action: 1.0, num_envs=num_envs)
    tx, replay, events = optax.scale_by_adam(), dqn.make_replay(args), []
    real_update = dqn.update

    def update(agent, target, opt_state, tx, batch, number, args):
        old = target
        agent, target, opt_state, metrics = real_update(
            agent, target, opt_state, tx, batch, number, args
        )
        copied = jnp.any(target.head.kernel[...] != old.head.kernel[...])
        same = jnp.all(target.head.kernel[...] == agent.head.kernel[...])
        jax.debug.callback(lambda *x: events.append(x), number, copied, same, ordered=True)
        return agent, target, opt_state, metrics

    monkeypatch.setattr(dqn, "update", update)
    state = jax.jit(dqn.make_train(args, env)[0])(jax.random.key(0))
    step = jax.jit(lambda state: dqn.step_and_learn(state, env, replay, tx, args))
    done, expected = 0, []
    for _ in range(120 // num_envs):
        state, _ = step(state)
        jax.effects_barrier()
        for _ in range(num_envs):  # the plain loop
            done += 1
            if done > args.learning_starts and done % train_frequency == 0:
                due = done // target_frequency > (done - train_frequency) // target_frequency
                expected.append((len(expected), due, due))
        assert dqn.updates_due(state.step, args) == len(expected) == len(events)
    assert [(int(n), bool(c)) for n, c, _ in events] == [(n, c) for n, c, _ in expected]
    assert all(bool(same) for _, copied, same in events if copied)
    assert sum(copied for _, copied, _ in expected) > 3 and state.step == done


def test_epsilon_falls_to_its_end_and_stays():
    args = dqn.Args(start_e=0.9, end_e=0.1, exploration_fraction=0.5, total_timesteps=1000)
    epsilons = dqn.epsilon_at(jnp.array([0, 250, 500, 900]), args)
    np.testing.assert_allclose(epsilons, [0.9, 0.5, 0.1, 0.1], rtol=1e-6)


def test_epsilon_greedy_explores_as_often_as_it_says():
    q_values = jnp.tile(jnp.array([0.0, 3.0, 1.0]), (30_000, 1))
    for epsilon in (0.0, 0.3, 1.0):
        actions = dqn.epsilon_greedy(q_values, epsilon, jax.random.key(0))
        shares = np.bincount(actions, minlength=3) / len(actions)
        expected = np.array([epsilon / 3, 1 - epsilon + epsilon / 3, epsilon / 3])
        np.testing.assert_allclose(shares, expected, atol=0.01)


# --- Replay ---------------------------------------------------------------------------------------


def test_replay_holds_the_last_steps_also_after_it_wrapped_around():
    """What is in the buffer are the last buffer_size transitions, with the true next_obs at the
    ends of episodes, and nothing else; samples come from all of it."""
    fields = {"num_envs": 3, "buffer_size": 50, "batch_size": 8, "num_steps": 1}
    args = small_args("dqn", learning_starts=10**6, **fields)
    env = real_env("dqn", num_envs=3, limit=6)
    kept = []

    def step(key, env_state, action):
        obs = env_state[1]
        env_state, timestep = env.step(key, env_state[0], action)
        row = (obs, action, timestep.reward, timestep.next_obs, timestep.terminated)
        jax.debug.callback(lambda *x: kept.extend(zip(*x, strict=True)), *row, ordered=True)
        return (env_state, timestep.obs), timestep

    def reset(key):
        env_state, obs = env.reset(key)
        return (env_state, obs), obs

    init, train_iteration = dqn.make_train(args, env._replace(reset=reset, step=step))
    state, train_iteration = jax.jit(init)(jax.random.key(0)), jax.jit(train_iteration)
    for _ in range(40):
        state, _ = train_iteration(state)
    jax.effects_barrier()
    assert len(kept) == 120
    stored = jax.tree.map(lambda x: np.asarray(x[0]), state.buffer.experience)
    rows = lambda items: sorted(tuple(np.concatenate([np.ravel(x) for x in row])) for row in items)
    assert rows(zip(*stored, strict=True)) == rows(kept[-50:])
    assert any(not np.array_equal(row[3], nxt[0]) for row, nxt in zip(kept, kept[3:], strict=False))

    sample = dqn.make_replay(args).sample
    seen = {
        float(x)
        for k in range(100)
        for x in sample(state.buffer, jax.random.key(k)).experience.obs[:, 0]
    }
    assert seen == {float(x) for x in stored.obs[:, 0]}
