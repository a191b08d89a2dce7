"""sac.py: the squashed Gaussian, targets, temperature, SimBa, and the ratio of updates to steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from probes import probe, real_env, small_args

import sac

# --- The squashed Gaussian ------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.4), (-0.7, 2.0)])
def test_the_squashed_density_integrates_to_the_probability(mean, std):
    """Over all of (-1, 1) it integrates to 1, and up to a to the Gaussian's share below artanh a."""
    actions = np.linspace(-1.0, 1.0, 400_001)[1:-1]
    u = jnp.arctanh(jnp.array(actions, jnp.float32))[:, None]
    normal = sac.distrax.MultivariateNormalDiag(jnp.array([mean]), jnp.array([std]))
    squashed, logprob = sac.squash(u, normal.log_prob(u))
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
        return sac.distrax.MultivariateNormalDiag(mean, 0.5 * jnp.ones_like(mean))


class LinearCritics(nnx.Module):
    """Two critics: w_i obs + 10 action."""

    def __init__(self, weights):
        self.weights = nnx.Param(jnp.array(weights))

    def __call__(self, obs, action):
        return self.weights[...][:, None] * obs[:, 0] + 10.0 * action[:, 0]


# Three transitions: an ordinary one, a time limit, the end of the task.
BATCH = sac.Transition(
    obs=jnp.array([[0.0], [1.0], [2.0]]),
    action=jnp.array([[0.1], [0.2], [0.3]]),
    reward=jnp.array([1.0, 2.0, 4.0]),
    next_obs=jnp.array([[-1.0], [2.0], [5.0]]),
    terminated=jnp.array([False, False, True]),  # the second was cut by a limit: not terminated
)


def test_targets_against_a_buffer_computed_by_hand():
    args, alpha, key = sac.Args(gamma=0.5, reward_scale=3.0), 0.7, jax.random.key(4)
    target = LinearCritics([3.0, 5.0])
    targets = sac.compute_targets(FixedActor(), target, alpha, BATCH, key, args)
    action, logprob = sac.sample_action(FixedActor(), BATCH.next_obs, key)
    next_q = np.array([-5.0, 6.0, 15.0]) + 10.0 * action[:, 0]  # the smaller of 3 obs and 5 obs
    next_value = next_q - 0.7 * logprob
    by_hand = [3.0 + 0.5 * next_value[0], 6.0 + 0.5 * next_value[1], 12.0]
    np.testing.assert_allclose(targets, by_hand, rtol=1e-6)


def test_critic_loss_is_the_squared_error_of_both():
    loss, mean = sac.critic_loss(LinearCritics([3.0, 5.0]), BATCH, jnp.array([1.0, 4.0, 10.0]))
    values = np.array([[1.0, 5.0, 9.0], [1.0, 7.0, 13.0]])
    np.testing.assert_allclose(loss, 0.5 * ((values - [1.0, 4.0, 10.0]) ** 2).mean(axis=1).sum())
    np.testing.assert_allclose(mean, values.mean())


def test_the_losses_refuse_shapes_that_would_broadcast():
    """Targets or log-probs [M, 1] against values [M] would make [M, M], the commonest bug of SAC."""
    critic = LinearCritics([3.0, 5.0])
    with pytest.raises(AssertionError):
        sac.critic_loss(critic, BATCH, jnp.zeros((3, 1)))
    column = lambda obs, action: critic(obs, action)[..., None]
    with pytest.raises(AssertionError):
        sac.actor_loss(FixedActor(), column, 0.1, BATCH, jax.random.key(0))
    with pytest.raises(AssertionError):
        args = sac.Args()
        sac.compute_targets(FixedActor(), column, 0.1, BATCH, jax.random.key(0), args)


def test_actor_loss_goes_through_the_sampled_action():
    """Its gradient is that of alpha log pi - Q by finite differences of the mean, noise held fixed."""
    critic, key, alpha = LinearCritics([3.0, 5.0]), jax.random.key(0), 2.0
    loss = lambda actor: sac.actor_loss(actor, critic, alpha, BATCH, key)[0]
    actor = FixedActor()
    gradient = jax.grad(loss)(actor).mean[...]
    up, down = FixedActor(), FixedActor()
    up.mean[...], down.mean[...] = actor.mean[...] + 1e-2, actor.mean[...] - 1e-2
    np.testing.assert_allclose(gradient, (loss(up) - loss(down)) / 2e-2, rtol=1e-2)


def test_alpha_rises_while_the_entropy_is_too_low():
    gradient = jax.grad(sac.alpha_loss)
    assert gradient(0.0, -3.0, -1.0) < 0 < gradient(0.0, 2.0, -1.0)


def setup(**changes):
    args = small_args("sac", **changes)
    env = real_env("sac", args.num_envs)
    init, train_iteration = sac.make_train(args, env)
    return args, env, jax.jit(init)(jax.random.key(0)), jax.jit(train_iteration)


def test_critics_differ_and_the_target_starts_as_a_copy_and_follows():
    args, _, state, train_iteration = setup(
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


@pytest.mark.parametrize("num_envs", [1, 3, 8])
@pytest.mark.parametrize("updates_per_step", [1.0, 2.0, 0.25])
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


# --- SimBa ----------------------------------------------------------------------------------------


def test_simba_statistics_are_numpy_s_over_the_acted_observations():
    """Every observation acted on counts once, replayed ones do not."""
    args, env, state, _ = setup(block_type="simba", num_envs=3, updates_per_step=1.0)
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


def test_simba_learns_a_probe():
    env = probe(
        lambda time, bit: bit,
        lambda time, bit, action: 1.0 - 4.0 * (action - jnp.where(bit, 0.5, -0.5)) ** 2,
        terminated=lambda time, bit: time >= 1,
        continuous=True,
    )
    args = small_args("sac", 150, block_type="simba", num_critics=1, actor_num_blocks=1)
    init, train_iteration = sac.make_train(args, env)
    state, train_iteration = jax.jit(init)(jax.random.key(1)), jax.jit(train_iteration)
    for _ in range(args.num_iterations):
        state, _ = train_iteration(state)
    obs = sac.normalize(jnp.array([[0.0], [1.0]]), state.obs_stats)
    actions = jnp.tanh(state.learner.actor(obs).mean())[:, 0]
    np.testing.assert_allclose(actions, [-0.5, 0.5], atol=0.15)
