"""dqn.py and sac.py: targets, the squashed Gaussian, schedules, replay, SimBa."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rlax
from flax import nnx
from probes import probe, quick, real_env, small_args, train

import dqn
import sac
import sacd
import td3

# === test_dqn.py ===


class Table(nnx.Module):
    """Q(obs, .) is a row of a table, for observations that are numbers."""

    def __init__(self, rows):
        self.rows = nnx.Param(jnp.array(rows))

    def __call__(self, obs):
        return self.rows[...][obs[..., 0].astype(int)]


# Three transitions: an ordinary one, a time limit, the end of the task.
DQN_BATCH = dqn.Transition(
    obs=jnp.array([[[0.0]], [[1.0]], [[2.0]]]),
    action=jnp.array([[0], [1], [1]]),
    reward=jnp.array([[1.0], [2.0], [4.0]]),
    next_obs=jnp.array([[[1.0]], [[2.0]], [[0.0]]]),
    terminated=jnp.array([[False], [False], [True]]),  # the second was cut by a limit
    done=jnp.array([[False], [True], [True]]),
)
ONLINE = Table([[9.0, 1.0], [3.0, 7.0], [8.0, 2.0]])
TARGET = Table([[5.0, 6.0], [10.0, 20.0], [30.0, 40.0]])


@pytest.mark.parametrize(
    ("double_q", "next_values"),
    [(True, [20.0, 30.0]), (False, [20.0, 40.0])],  # online prefers action 1, then 0
)
def test_dqn_s_targets_against_a_buffer_computed_by_hand(double_q, next_values):
    args = dqn.Args(gamma=0.5, double_q=double_q, n_step=1, reward_scale=3.0)
    targets = dqn.compute_targets(ONLINE, TARGET, DQN_BATCH, args)
    by_hand = [3.0 * 1.0 + 0.5 * next_values[0], 3.0 * 2.0 + 0.5 * next_values[1], 3.0 * 4.0]
    np.testing.assert_allclose(targets, by_hand)


def test_dqn_s_errors_are_those_of_rlax_s_double_q_learning():
    rng = np.random.default_rng(0)
    online, target = Table(rng.normal(size=(9, 4))), Table(rng.normal(size=(9, 4)))
    number = lambda high: jnp.array(rng.integers(0, high, 50))
    obs, next_obs, action, ends = number(9), number(9), number(4), number(2) == 1
    reward = jnp.array(rng.normal(size=50))
    rows = (obs[:, None], action, reward, next_obs[:, None], ends, ends)
    batch = dqn.Transition(*[x[:, None] for x in rows])  # one step in a row
    targets = dqn.compute_targets(
        online, target, batch, dqn.Args(gamma=0.9, n_step=1, reward_scale=1.0)
    )
    _, (_, errors) = dqn.dqn_loss(online, batch, targets, 1.0)
    tables = online.rows[...], target.rows[...]
    expected = jax.vmap(rlax.double_q_learning)(
        tables[0][obs], action, reward, 0.9 * ~ends, tables[1][next_obs], tables[0][next_obs]
    )
    np.testing.assert_allclose(-errors, expected, atol=1e-5)


def test_dqn_s_loss_is_the_squared_error_of_the_chosen_actions():
    targets = jnp.array([10.0, 7.0, 0.0])
    loss, (metrics, _) = dqn.dqn_loss(ONLINE, DQN_BATCH, targets, 1.0)
    np.testing.assert_allclose(loss, (1.0**2 + 0.0**2 + 2.0**2) / 3)  # Q: 9, 7, 2
    np.testing.assert_allclose(metrics["losses/q_values"], 6.0)
    grads = jax.grad(lambda agent: dqn.dqn_loss(agent, DQN_BATCH, targets, 1.0)[0])
    np.testing.assert_allclose(
        grads(ONLINE).rows[...], [[-2 / 3, 0], [0, 0], [0, 4 / 3]], rtol=1e-6
    )


def test_dqn_s_loss_refuses_shapes_that_would_broadcast():
    with pytest.raises(AssertionError):
        dqn.dqn_loss(ONLINE, DQN_BATCH, jnp.zeros((3, 1)), 1.0)


# --- Schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", quick([1, 3, 8], 3))
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

    def update(agent, target, opt_state, tx, batch, weights, due_at, args):
        old = target
        agent, target, opt_state, *rest = real_update(
            agent, target, opt_state, tx, batch, weights, due_at, args
        )
        copied = jnp.any(target.head.kernel[...] != old.head.kernel[...])
        same = jnp.all(target.head.kernel[...] == agent.head.kernel[...])
        jax.debug.callback(lambda *x: events.append(x), due_at, copied, same, ordered=True)
        return agent, target, opt_state, *rest

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
                expected.append((done, due))
        assert dqn.gradient_steps_due(state.step, args) == len(expected) == len(events)
    assert [(int(due_at), bool(copied)) for due_at, copied, _ in events] == expected
    assert all(bool(same) for _, copied, same in events if copied)
    assert sum(copied for _, copied in expected) > 3 and state.step == done


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
    fields = {"num_envs": 3, "buffer_size": 50, "batch_size": 8, "num_steps": 1, "n_step": 1}
    args = small_args("dqn", learning_starts=10**6, **fields)
    env = real_env("dqn", num_envs=3, limit=6)
    kept = []

    def step(key, env_state, action):
        obs = env_state[1]
        env_state, timestep = env.step(key, env_state[0], action)
        ends = (timestep.terminated, timestep.terminated | timestep.truncated)
        row = (obs, action, timestep.reward, timestep.next_obs, *ends)
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
    stored = jax.tree.map(lambda x: np.concatenate(x), state.buffer.experience)
    rows = lambda items: sorted(tuple(np.concatenate([np.ravel(x) for x in row])) for row in items)
    assert rows(zip(*stored, strict=True)) == rows(kept[-48:])
    assert any(not np.array_equal(row[3], nxt[0]) for row, nxt in zip(kept, kept[3:], strict=False))

    sample = dqn.make_replay(args).sample
    seen = {
        float(x)
        for k in range(100)
        for x in sample(state.buffer, jax.random.key(k)).experience.obs[:, 0, 0]
    }
    assert seen == {float(x) for x in stored.obs[:, 0]}


# === test_sac.py ===

# --- The squashed Gaussian ------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.4), (-0.7, 2.0)])
def test_the_squashed_density_integrates_to_the_probability(mean, std):
    """Over all of (-1, 1) it integrates to 1, and up to a to the Gaussian's share below artanh a."""
    actions = np.linspace(-1.0, 1.0, 400_001)[1:-1]
    u = jnp.arctanh(jnp.array(actions, jnp.float32))[:, None]
    squashed, logprob = sac.squash(u, jax.scipy.stats.norm.logpdf(u, mean, std)[:, 0])
    np.testing.assert_allclose(squashed[:, 0], actions, atol=1e-5)
    density = np.exp(np.asarray(logprob, np.float64))
    shares = np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(actions))
    for a in (-0.9, -0.2, 0.5, 0.99):
        expected = jax.scipy.stats.norm.cdf((np.arctanh(a) - mean) / std)
        assert shares[np.searchsorted(actions, a) - 1] == pytest.approx(float(expected), abs=2e-3)


def test_the_squashed_density_is_finite_far_out():
    u = jnp.array([[-40.0], [-12.0], [12.0], [40.0]])
    _, logprob = sac.squash(u, jnp.zeros(4))
    # log(1 - tanh(u)^2) tends to log 4 - 2 |u|.
    np.testing.assert_allclose(logprob, 2 * jnp.abs(u[:, 0]) - jnp.log(4.0), rtol=1e-5)


def test_entries_of_an_action_add_their_log_densities():
    u = jnp.array([[0.3, -1.2, 2.0]])
    _, joint = sac.squash(u, jnp.zeros(1))
    single = [sac.squash(u[:, i : i + 1], jnp.zeros(1))[1] for i in range(3)]
    np.testing.assert_allclose(joint, sum(single), rtol=1e-6)


def test_actions_reach_the_bounds_of_the_simulator():
    env = real_env("sac")
    np.testing.assert_allclose(
        sac.to_bounds(jnp.array([[-1.0], [0.0], [1.0]]), env), [[-2], [0], [2]]
    )
    lopsided = env._replace(action_low=np.array([0.0]), action_high=np.array([10.0]))
    np.testing.assert_allclose(sac.to_bounds(jnp.array([[-1.0], [0.5]]), lopsided), [[0.0], [7.5]])


# --- Targets and losses ---------------------------------------------------------------------------


class FixedActor(nnx.Module):
    """A Gaussian that does not look."""

    def __init__(self):
        self.mean = nnx.Param(jnp.array([0.2]))

    def __call__(self, obs):
        mean = jnp.broadcast_to(self.mean[...], (*obs.shape[:-1], 1))
        return mean, 0.5 * jnp.ones_like(mean)


class LinearCritics(nnx.Module):
    """Two critics: w_i obs + 10 action."""

    def __init__(self, weights):
        self.weights = nnx.Param(jnp.array(weights))

    def __call__(self, obs, action):
        return self.weights[...][:, None] * obs[:, 0] + 10.0 * action[:, 0]


# Three transitions: an ordinary one, a time limit, the end of the task.
SAC_BATCH = sac.Transition(
    obs=jnp.array([[0.0], [1.0], [2.0]]),
    action=jnp.array([[0.1], [0.2], [0.3]]),
    reward=jnp.array([1.0, 2.0, 4.0]),
    next_obs=jnp.array([[-1.0], [2.0], [5.0]]),
    terminated=jnp.array([False, False, True]),  # the second was cut by a limit: not terminated
)


def test_sac_s_targets_against_a_buffer_computed_by_hand():
    args, alpha, key = sac.Args(gamma=0.5, reward_scale=3.0), 0.7, jax.random.key(4)
    target = LinearCritics([3.0, 5.0])
    targets = sac.compute_targets(FixedActor(), target, alpha, SAC_BATCH, key, args)
    action, logprob = sac.sample_action(FixedActor(), SAC_BATCH.next_obs, key)
    next_q = np.array([-5.0, 6.0, 15.0]) + 10.0 * action[:, 0]  # the smaller of 3 obs and 5 obs
    next_value = next_q - 0.7 * logprob
    by_hand = [3.0 + 0.5 * next_value[0], 6.0 + 0.5 * next_value[1], 12.0]
    np.testing.assert_allclose(targets, by_hand, rtol=1e-6)


def test_critic_loss_is_the_squared_error_of_both():
    loss, q_values = sac.critic_loss(
        LinearCritics([3.0, 5.0]), SAC_BATCH, jnp.array([1.0, 4.0, 10.0]), sac.Args()
    )
    values = np.array([[1.0, 5.0, 9.0], [1.0, 7.0, 13.0]])
    np.testing.assert_allclose(loss, 0.5 * ((values - [1.0, 4.0, 10.0]) ** 2).mean(axis=1).sum())
    np.testing.assert_allclose(q_values, values)


def test_the_losses_refuse_shapes_that_would_broadcast():
    """Targets or log-probs [M, 1] against values [M] would make [M, M], the commonest bug of SAC."""
    critic = LinearCritics([3.0, 5.0])
    with pytest.raises(AssertionError):
        sac.critic_loss(critic, SAC_BATCH, jnp.zeros((3, 1)), sac.Args())
    column = lambda obs, action: critic(obs, action)[..., None]
    with pytest.raises(AssertionError):
        sac.actor_loss(FixedActor(), column, 0.1, SAC_BATCH, jax.random.key(0))
    with pytest.raises(AssertionError):
        args = sac.Args()
        sac.compute_targets(FixedActor(), column, 0.1, SAC_BATCH, jax.random.key(0), args)


def test_actor_loss_goes_through_the_sampled_action():
    """Its gradient is that of alpha log pi - Q by finite differences of the mean, noise held fixed."""
    critic, key, alpha = LinearCritics([3.0, 5.0]), jax.random.key(0), 2.0
    loss = lambda actor: sac.actor_loss(actor, critic, alpha, SAC_BATCH, key)[0]
    actor = FixedActor()
    gradient = jax.grad(loss)(actor).mean[...]
    up, down = FixedActor(), FixedActor()
    up.mean[...], down.mean[...] = actor.mean[...] + 1e-2, actor.mean[...] - 1e-2
    np.testing.assert_allclose(gradient, (loss(up) - loss(down)) / 2e-2, rtol=1e-2)


def test_alpha_rises_while_the_entropy_is_too_low():
    gradient = jax.grad(sac.alpha_loss)
    assert gradient(0.0, -3.0, -1.0) < 0 < gradient(0.0, 2.0, -1.0)


def sac_setup(**changes):
    args = small_args("sac", **changes)
    env = real_env("sac", args.num_envs)
    init, train_iteration = sac.make_train(args, env)
    return args, env, jax.jit(init)(jax.random.key(0)), jax.jit(train_iteration)


def test_critics_differ_and_the_target_starts_as_a_copy_and_follows():
    args, _, state, train_iteration = sac_setup(
        num_envs=1, num_steps=1, learning_starts=0, updates_per_step=1.0, tau=0.1
    )
    learner = state.learner
    first, second = learner.critic.bodies
    assert not np.allclose(first.layers[0].kernel[...], second.layers[0].kernel[...])
    old = jax.tree.map(np.array, learner.target)
    for one, other in zip(jax.tree.leaves(learner.critic), jax.tree.leaves(old), strict=True):
        np.testing.assert_array_equal(one, other)
    state, _ = train_iteration(state)
    new = state.learner
    for critic, target, before in zip(
        *map(jax.tree.leaves, (new.critic, new.target, old)), strict=True
    ):
        np.testing.assert_allclose(target, 0.1 * critic + 0.9 * before, rtol=1e-4, atol=1e-6)


# --- Updates per step -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", quick([1, 3, 8], 3))
@pytest.mark.parametrize("updates_per_step", quick([1.0, 2.0, 0.25], 2.0, 0.25))
def test_updates_per_step_do_not_depend_on_the_number_of_environments(num_envs, updates_per_step):
    args = small_args(
        "sac",
        num_envs=num_envs,
        updates_per_step=updates_per_step,
        learning_starts=10,
        num_steps=1,
        batch_size=4,
    )
    env = probe(lambda time, bit: bit, lambda *_: 1.0, num_envs=num_envs, continuous=True)
    init, train_iteration = sac.make_train(args, env)
    state, train_iteration = jax.jit(init)(jax.random.key(0)), jax.jit(train_iteration)
    for step in range(1, 48 // num_envs + 1):
        state, metrics = train_iteration(state)
        total = int(metrics["charts/updates"])
        assert total == int(max(step * num_envs - 10, 0) * updates_per_step)
        assert state.learner.opt_states["actor"][0].count == total
    assert total >= 9


def test_step_sizes_fall_to_0_over_the_run_and_gradients_are_clipped():
    """Adam's first step has the size of the rate, whatever the gradient; after 90 of 100, a tenth."""
    flags = {"total_timesteps": 110, "learning_starts": 10, "policy_lr": 0.5, "q_lr": 2.0}
    plain, annealed = [sac.make_optimizers(sac.Args(**flags, anneal_lr=x)) for x in (False, True)]
    for name, rate in {"actor": 0.5, "critic": 2.0, "log_alpha": 2.0}.items():
        for tx, late in ((plain[name], 1.0), (annealed[name], 0.1)):
            params, sizes = jnp.zeros(3), []
            state = tx.init(params)
            for _ in range(91):
                updates, state = tx.update(jnp.ones(3), state, params)
                sizes.append(-updates)
            np.testing.assert_allclose(sizes[0], rate, rtol=1e-4)
            np.testing.assert_allclose(sizes[90], rate * late, rtol=1e-3)
    clipped = sac.make_optimizers(sac.Args(max_grad_norm=0.5))["critic"]
    _, state = clipped.update(jnp.array([30.0, 40.0]), clipped.init(jnp.zeros(2)), jnp.zeros(2))
    np.testing.assert_allclose(state[1][0].mu, [0.03, 0.04], rtol=1e-5)  # a tenth of .3 and .4


@pytest.mark.thorough
def test_dqn_clips_gradients_where_it_is_asked_to():
    args = small_args("dqn", max_grad_norm=1e-3, learning_rate=1.0, num_envs=4)
    env = probe(lambda time, bit: bit, lambda time, bit, action: 1e3, num_envs=4)
    seen = []
    for norm in (1e-3, None):
        args = dataclasses.replace(args, max_grad_norm=norm)
        state, _ = train("dqn", args, env, 20)
        seen.append(optax.tree.norm(optax.tree.get(state.opt_state, "mu")))
    assert 0 < seen[0] <= 1e-3 < 1 < seen[1]


# --- SimBa ----------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_simba_statistics_are_numpy_s_over_the_acted_observations():
    """Every observation acted on counts once, replayed ones do not."""
    args, env, state, _ = sac_setup(norm_obs=True, num_envs=3, updates_per_step=1.0)
    txs = {name: optax.adam(1e-3) for name in ("actor", "critic", "log_alpha")}
    opt_states = {k: tx.init(getattr(state.learner, k)) for k, tx in txs.items()}
    state = state._replace(learner=state.learner._replace(opt_states=opt_states))
    step = jax.jit(lambda state: sac.step_and_learn(state, env, sac.make_replay(args), txs, args))
    acted = []
    for _ in range(60):
        acted.append(np.asarray(state.acting.obs, np.float64))
        state, _ = step(state)
    acted = np.concatenate(acted)
    assert state.obs_stats.count == len(acted) == 180
    np.testing.assert_allclose(state.obs_stats.mean, acted.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(state.obs_stats.var, acted.var(axis=0), rtol=1e-3)
    normalized = np.asarray(sac.normalize(jnp.array(acted, jnp.float32), state.obs_stats))
    np.testing.assert_allclose(normalized.mean(axis=0), 0.0, atol=1e-3)
    np.testing.assert_allclose(normalized.std(axis=0), 1.0, atol=1e-3)


def test_simba_is_what_the_paper_says():
    """Embedding, x + W2 relu(W1 LN(x)) with W1 4 times as wide, LN; computed by numpy."""
    simba = sac.SimBa(3, 8, 2, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def dense(layer, x):
        return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])

    y = dense(simba.embed, x)
    for block in simba.blocks:
        assert block.widen.kernel.shape == (8, 32)
        y = y + dense(block.narrow, np.maximum(dense(block.widen, norm(y)), 0.0))
    np.testing.assert_allclose(simba(x), norm(y), atol=1e-4)
    he = np.sqrt(2 / 512)
    wide = sac.ResidualBlock(512, nnx.Rngs(0)).widen.kernel[...]
    assert float(wide.std()) == pytest.approx(he, rel=0.05)


@pytest.mark.thorough
def test_simba_learns_a_probe():
    env = probe(
        lambda time, bit: bit,
        lambda time, bit, action: 1.0 - 4.0 * (action - jnp.where(bit, 0.5, -0.5)) ** 2,
        terminated=lambda time, bit: time >= 1,
        continuous=True,
    )
    args = small_args(
        "sac", 150, block_type="simba", norm_obs=True, num_critics=1, actor_num_blocks=1
    )
    init, train_iteration = sac.make_train(args, env)
    state, train_iteration = jax.jit(init)(jax.random.key(1)), jax.jit(train_iteration)
    for _ in range(args.num_iterations):
        state, _ = train_iteration(state)
    obs = sac.normalize(jnp.array([[0.0], [1.0]]), state.obs_stats)
    actions = jnp.tanh(state.learner.actor(obs)[0])[:, 0]
    np.testing.assert_allclose(actions, [-0.5, 0.5], atol=0.15)


# === td3.py =======================================================================================


class Constant(nnx.Module):
    """An actor that does not look: .4 and -.95."""

    def __init__(self):
        self.action = nnx.Param(jnp.array([0.4, -0.95]))

    def __call__(self, obs):
        return jnp.broadcast_to(self.action[...], (*obs.shape[:-1], 2))


class SumCritics(nnx.Module):
    """Two critics: a_1 + 100 a_2, and that + 7, each times a weight of 1."""

    def __init__(self):
        self.weights = nnx.Param(jnp.ones(2))

    def __call__(self, obs, action):
        value = action[:, 0] + 100.0 * action[:, 1]
        return self.weights[...][:, None] * jnp.stack([value, value + 7.0])


TD3_BATCH = td3.Transition(
    obs=jnp.zeros((300, 1)),
    action=jnp.zeros((300, 2)),
    reward=jnp.arange(300.0),
    next_obs=jnp.ones((300, 1)),
    terminated=jnp.arange(300) % 3 == 0,
)


@pytest.mark.parametrize("policy_noise", quick([0.0, 0.1, 50.0], 0.0, 50.0))
def test_td3_s_targets_smooth_each_action_entry_on_its_own(policy_noise):
    args = td3.Args(gamma=0.5, reward_scale=2.0, policy_noise=policy_noise, noise_clip=0.3)
    targets = td3.compute_targets(Constant(), SumCritics(), TD3_BATCH, jax.random.key(0), args)
    ended = np.asarray(TD3_BATCH.terminated)
    np.testing.assert_allclose(targets[ended], 2.0 * TD3_BATCH.reward[ended])
    value = (np.asarray(targets - 2.0 * TD3_BATCH.reward) / 0.5)[~ended]
    if policy_noise == 0.0:
        np.testing.assert_allclose(value, 0.4 - 95.0, rtol=1e-4)  # the smaller of the two critics
    elif policy_noise == 50.0:  # nearly every noise is clipped to .3, and actions to [-1, 1]
        distances = np.abs(value[:, None] - [0.1 - 100, 0.7 - 100, 0.1 - 65, 0.7 - 65])
        nearest = distances.argmin(axis=1)
        assert (distances.min(axis=1) < 0.01).mean() > 0.95
        assert (
            np.bincount(nearest, minlength=4) > 30
        ).all()  # the entries have noises of their own
    else:
        assert 3.0 < value.std() < 10.0 and 0.1 - 100 <= value.min() < value.max() <= 0.7 - 65


def test_td3_s_actor_follows_the_first_critic_alone():
    gradient = jax.grad(td3.actor_loss)(Constant(), SumCritics(), TD3_BATCH).action[...]
    np.testing.assert_allclose(gradient, [-1.0, -100.0], rtol=1e-5)
    gradient = jax.grad(td3.actor_loss, argnums=1)(Constant(), SumCritics(), TD3_BATCH).weights[...]
    assert gradient[0] != 0 == gradient[1]


def test_td3_s_actor_and_targets_move_with_every_third_step_of_the_critics():
    """Counted in gradient steps, whatever the number of environments."""
    args = small_args(
        "td3", num_envs=4, policy_frequency=3, learning_starts=8, num_steps=1, tau=0.1
    )
    args = dataclasses.replace(args, updates_per_step=0.5)  # two gradient steps in each iteration
    env = probe(lambda time, bit: bit, lambda *_: 1.0, num_envs=4, continuous=True)
    init, train_iteration = td3.make_train(args, env)
    state, train_iteration = jax.jit(init)(jax.random.key(0)), jax.jit(train_iteration)
    count = lambda state, name: int(optax.tree.get(state.learner.opt_states[name], "count"))
    same = lambda *trees: all(
        np.array_equal(*x) for x in zip(*map(jax.tree.leaves, trees), strict=True)
    )
    for _ in range(10):
        before = state
        state, metrics = train_iteration(state)
        steps = count(state, "critic")
        assert steps == metrics["charts/updates"] and count(state, "actor") == steps // 3
        followed = count(state, "actor") > count(before, "actor")
        for name in ("actor", "target_actor", "target_critic"):
            pair = getattr(before.learner, name), getattr(state.learner, name)
            assert same(*pair) == (not followed), name
    assert count(state, "actor") == 5
    first, second = state.learner.critic.bodies
    assert not same(first, second)


@pytest.mark.thorough
def test_td3_explores_within_the_bounds():
    args, env = small_args("td3", exploration_noise=0.3), real_env("td3")
    state = jax.jit(td3.make_train(args, env)[0])(jax.random.key(0))
    state = state._replace(step=jnp.int32(10**6))
    replay, txs = td3.make_replay(args), td3.make_optimizers(args)
    never = dataclasses.replace(args, updates_per_step=0.0)
    after = jax.jit(lambda state: td3.step_and_learn(state, env, replay, txs, never))(state)[0]
    action = after.buffer.experience.action[0, : args.num_envs, 0]
    noise = action - state.learner.actor(state.acting.obs)[:, 0]
    assert 0.15 < noise.std() < 0.5 and jnp.abs(action).max() <= 1.0


# === sacd.py ======================================================================================


class FixedPolicy(nnx.Module):
    """Probabilities .2 and .8, whatever is seen."""

    def __init__(self):
        self.logits = nnx.Param(jnp.log(jnp.array([0.2, 0.8])))

    def __call__(self, obs):
        return jnp.broadcast_to(nnx.log_softmax(self.logits[...]), (*obs.shape[:-1], 2))


class TableCritics(nnx.Module):
    """Two critics: [obs, 2 obs] and [4 - obs, 3]."""

    def __init__(self, shift=0.0):
        self.shift = nnx.Param(jnp.float32(shift))

    def __call__(self, obs):
        x = obs[:, 0]
        first, second = jnp.stack([x, 2.0 * x], -1), jnp.stack([4.0 - x, 3.0 + 0.0 * x], -1)
        return jnp.stack([first, second]) + self.shift[...]


SACD_BATCH = sacd.Transition(
    obs=jnp.array([[1.0], [3.0], [2.0]]),
    action=jnp.array([0, 1, 1]),
    reward=jnp.array([1.0, 2.0, 4.0]),
    next_obs=jnp.array([[3.0], [1.0], [5.0]]),
    terminated=jnp.array([False, False, True]),  # the second was cut by a limit: not terminated
)
ENTROPY = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))


@pytest.mark.parametrize("critic_entropy", [True, False])
@pytest.mark.parametrize("aggregate", ["min", "mean"])
def test_sacd_s_targets_are_exact_expectations(aggregate, critic_entropy):
    flags = {"aggregate": aggregate, "critic_entropy": critic_entropy}
    args = sacd.Args(gamma=0.5, reward_scale=2.0, **flags)
    targets = sacd.compute_targets(FixedPolicy(), TableCritics(), 0.7, SACD_BATCH, args)
    q_values = {  # at 3: [3, 6] and [1, 3]; at 1: [1, 2] and [3, 3]
        "min": [0.2 * 1 + 0.8 * 3, 0.2 * 1 + 0.8 * 2],
        "mean": [0.2 * 2 + 0.8 * 4.5, 0.2 * 2 + 0.8 * 2.5],
    }[aggregate]
    values = np.array(q_values) + 0.7 * ENTROPY * critic_entropy
    np.testing.assert_allclose(targets, [*([2.0, 4.0] + 0.5 * values), 8.0], rtol=1e-5)

    probs = jnp.array([0.2, 0.8])
    q_values = getattr(TableCritics()(SACD_BATCH.next_obs), aggregate)(axis=0)
    q_values -= 0.7 * critic_entropy * jnp.log(probs)
    rewards, discounts = 2.0 * SACD_BATCH.reward, 0.5 * ~SACD_BATCH.terminated
    errors = jax.vmap(rlax.expected_sarsa, in_axes=(0, 0, 0, 0, 0, None))(
        jnp.zeros((3, 2)), SACD_BATCH.action, rewards, discounts, q_values, probs
    )
    np.testing.assert_allclose(targets, errors, rtol=1e-5)


def test_sacd_s_actor_loss_sums_over_actions():
    """Its gradient by hand: that of a softmax policy's expectation."""
    args = sacd.Args(aggregate="min")
    loss, entropy = sacd.actor_loss(FixedPolicy(), TableCritics(), 0.7, SACD_BATCH, args)
    q_values = np.array([[1.0, 2.0], [1.0, 3.0], [2.0, 3.0]])  # the smaller ones at 1, 3 and 2
    probs = np.array([0.2, 0.8])
    losses = (probs * (0.7 * np.log(probs) - q_values)).sum(axis=1)
    np.testing.assert_allclose([loss, entropy], [losses.mean(), ENTROPY], rtol=1e-5)
    run = lambda actor: sacd.actor_loss(actor, TableCritics(), 0.7, SACD_BATCH, args)[0]
    inside = 0.7 * np.log(probs) - q_values.mean(axis=0)
    by_hand = probs * (inside - (probs * inside).sum())
    np.testing.assert_allclose(jax.grad(run)(FixedPolicy()).logits[...], by_hand, rtol=1e-4)


def test_sacd_s_q_clip_takes_the_larger_error_of_each_transition():
    """Moved up by 2 from its target network, a critic is judged as if it had moved by .5."""
    targets, critic, old = jnp.array([9.0, 0.0, 4.5]), TableCritics(2.0), TableCritics()
    values = np.array([[1.0, 6.0, 4.0], [3.0, 3.0, 3.0]])  # of the actions taken
    moved, near = values + 2.0 - targets, values + 0.5 - targets
    plain, _ = sacd.critic_loss(critic, old, SACD_BATCH, targets, sacd.Args())
    np.testing.assert_allclose(plain, 0.5 * (moved**2).mean(axis=1).sum(), rtol=1e-5)
    clipped, _ = sacd.critic_loss(critic, old, SACD_BATCH, targets, sacd.Args(q_clip=0.5))
    expected = 0.5 * np.maximum(moved**2, near**2).mean(axis=1).sum()
    np.testing.assert_allclose(clipped, expected, rtol=1e-5)
    assert clipped > plain


@pytest.mark.thorough
def test_sacd_aims_at_a_share_of_the_largest_entropy():
    """However much one action is better, the temperature keeps the policy there."""
    args = small_args("sacd", autotune=True, alpha=0.5, target_entropy_scale=0.9)
    reward = lambda time, bit, action: jnp.where(action == bit, 1.0, -1.0)
    env = probe(lambda time, bit: bit, reward, terminated=lambda time, bit: time >= 1)
    state, metrics = train("sacd", args, env, 150)
    assert abs(metrics["losses/entropy"] - 0.9 * np.log(2)) < 0.05
