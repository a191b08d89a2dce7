"""The scripts that remember: a memory is exact, or it is a bug that no curve shows."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from probes import (
    CONTINUOUS,
    DISTINCT,
    MEMORY,
    NUM_ENVS,
    SEQUENCES,
    THREADED,
    VALUE_BASED,
    act_from,
    learn,
    log_prob,
    make_train,
    opened,
    probe,
    quick,
    real_env,
    small_args,
)

import ppo_gtrxl
import ppo_lstm
import ppo_trxl
import rppo_continuous

NUM_STEPS = 24
BY_RATIO = sorted(set(MEMORY) & set(DISTINCT) - set(VALUE_BASED))


@functools.cache
def agent_of(name, **changes):
    """An agent whose every parameter is random, so that none hides behind a zero."""
    script, args = importlib.import_module(name), small_args(name, **changes)
    agent = jax.jit(script.make_train(args, real_env(name))[0])(jax.random.key(0)).agent
    leaves, structure = jax.tree.flatten(agent)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def steps_of(name, seed=0, num_envs=5):
    """obs [T, B, ...] and reset [T, B], also at the first step of some environments only."""
    size = real_env(name).obs_shape[0]
    obs = jax.random.normal(jax.random.key(seed), (NUM_STEPS, num_envs, size))
    return obs, jax.random.bernoulli(jax.random.key(seed + 1), 0.15, (NUM_STEPS, num_envs))


def acting(script, agent, env, seed=0):
    """Where acting begins."""
    env_state, obs = env.reset(jax.random.key(seed))
    reset, memory = jnp.ones(NUM_ENVS, bool), agent.initial_memory(NUM_ENVS)
    return script.Acting(env_state, obs, reset, memory)


compiled_unroll = jax.jit(lambda agent, *x: agent.unroll(*x))
compiled_step = jax.jit(lambda agent, *x: agent.step(*x))


def unroll(agent, memory, obs, reset, lengths):
    """Pieces of these lengths, each from the memory that the one before has left."""
    parts, start = [], 0
    for length in lengths:
        piece = slice(start, start + length)
        memory, *out = compiled_unroll(agent, memory, obs[piece], reset[piece])
        parts.append([out[0], out[-1]])  # log-probs or means, and values
        start += length
    assert start == len(obs)
    return memory, [jnp.concatenate(x) for x in zip(*parts, strict=True)]


def step_by_step(agent, memory, obs, reset):
    acting, parts = opened(agent, memory), []
    for x, r in zip(obs, reset, strict=True):
        acting, *out = compiled_step(agent, acting, x, r)
        parts.append([out[0], out[-1]])  # log-probs or means, and values
    return acting, [jnp.stack(x) for x in zip(*parts, strict=True)]


def assert_close(one, other, **tolerance):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, **({"atol": 2e-5, "rtol": 1e-4} | tolerance))


def used_memory(agent, name):
    """One in the middle of episodes."""
    return unroll(agent, agent.initial_memory(5), *steps_of(name, seed=7), [NUM_STEPS])[0]


LONGER = (
    "ppo_gtrxl",
    "rppo",
    "impala_lstm",
    "drqn",
    "rpqn",
)  # test_memories.py looks at that of rppo.py
VARIANTS = [(name, {}) for name in MEMORY if name not in LONGER]  # the others are for --thorough
OTHERS = [(name, {}) for name in LONGER]
OTHERS += [("ppo_trxl", {"positional_encoding": x}) for x in ("absolute", "learned")]
OTHERS += [("ppo_trxl", {"num_layers": 1, "num_heads": 1, "memory_length": 1})]
VARIANTS += [pytest.param(*variant, marks=pytest.mark.thorough) for variant in OTHERS]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_unroll_is_as_many_steps_and_the_sum_of_its_pieces(name, changes):
    """Outputs and what the memories answer next, from one that is not empty, with resets at random."""
    agent = agent_of(name, **changes)
    obs, reset = steps_of(name)
    memory = used_memory(agent, name)
    last, whole = unroll(agent, memory, obs, reset, [NUM_STEPS])
    acting, by_steps = step_by_step(agent, memory, obs, reset)
    pieced, pieces = unroll(agent, memory, obs, reset, [1, 9, 1, 13])
    assert_close(whole, by_steps)
    assert_close((last, whole), (pieced, pieces))
    more, no = steps_of(name, seed=5)[0], jnp.zeros(5, bool)
    answers = [compiled_step(agent, x, more[0], no)[1:] for x in (acting, opened(agent, last))]
    assert_close(*answers)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_a_first_memory_needs_no_reset(name, changes):
    agent = agent_of(name, **changes)
    obs, reset = steps_of(name)
    empty = agent.initial_memory(5)
    begins = reset.at[0].set(True)
    used = used_memory(agent, name)
    with_reset = unroll(agent, used, obs, begins, [NUM_STEPS])[1]
    assert_close(unroll(agent, empty, obs, reset.at[0].set(False), [NUM_STEPS])[1], with_reset)
    assert_close(unroll(agent, empty, obs, begins, [NUM_STEPS])[1], with_reset)


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_nothing_passes_a_reset_nor_comes_from_the_future(name, changes):
    agent = agent_of(name, **changes)
    obs, _ = steps_of(name)
    reset = jnp.zeros(obs.shape[:2], bool).at[10].set(True)
    memory = used_memory(agent, name)
    both = lambda obs, memory=memory: [
        unroll(agent, memory, obs, reset, [NUM_STEPS])[1],
        step_by_step(agent, memory, obs, reset)[1],
    ]
    for before, plain, other in zip(
        both(obs.at[:10].add(1.0), agent.initial_memory(5)),
        both(obs),
        both(obs.at[17].add(1.0)),
        strict=True,
    ):
        for x, y, z in zip(before, plain, other, strict=True):
            np.testing.assert_array_equal(x[10:], y[10:])  # what was before the reset is gone
            assert jnp.abs(x[:10] - y[:10]).max() > 1e-3
            np.testing.assert_allclose(z[:17], y[:17], atol=1e-6)  # the future does not count
            assert jnp.abs(z[17] - y[17]).max() > 1e-3
            assert jnp.abs(z[18] - y[18]).max() > 1e-5  # but the past of the episode does


@pytest.mark.parametrize("name", quick(BY_RATIO, "ppo_lstm", "ppo_trxl"))
def test_the_ratio_is_1_before_the_first_update(name):
    """Across episode ends, from a memory in the middle of episodes; and what the advantages are
    bootstrapped from is what the next rollout's first step computes."""
    script, args, env = importlib.import_module(name), small_args(name), real_env(name)
    state = jax.jit(script.make_train(args, env)[0])(jax.random.key(0))
    agent = agent_of(name)
    start = state.acting[0] if name in THREADED else state.acting
    rollout = jax.jit(lambda *x: act_from(script, agent, env, *x))
    for seed in (1, 2):
        after, batch = rollout(start, jax.random.key(seed))
        assert batch.done.sum() >= NUM_ENVS
        np.testing.assert_array_equal(batch.reset[1:], batch.done[:-1])
        memory, *pi, value = agent.unroll(start.memory, batch.obs, batch.reset)
        assert jnp.abs(jnp.exp(log_prob(pi, batch.action) - batch.logprob) - 1).max() < 1e-4
        if "value" in batch._fields:
            np.testing.assert_allclose(value, batch.value, atol=1e-4)
        last_value = agent.step(after.memory, after.obs, after.reset)[-1]
        start = after._replace(memory=memory)
    if "value" in batch._fields:
        _, following = act_from(script, agent, env, start, jax.random.key(3), 1)
        np.testing.assert_allclose(last_value, following.value[0], atol=1e-4)


@pytest.mark.parametrize("name", quick(["rpqn", "drqn"], "rpqn"))
def test_values_acted_on_are_those_learned_from(name):
    """Over two rollouts and the ends of episodes; greedy actions are those of the highest values; and
    what is next is valued as the next rollout's first step."""
    script, env, agent = importlib.import_module(name), real_env(name), agent_of(name)
    start = acting(script, agent, env)
    rollout = jax.jit(lambda *x: act_from(script, agent, env, *x))
    for seed in (1, 2):
        after, batch = rollout(start, jax.random.key(seed))
        assert batch.reset.sum() >= NUM_ENVS
        memory, q_values = agent.unroll(start.memory, batch.obs, batch.reset)
        best = q_values.max(axis=-1)
        taken = jnp.take_along_axis(q_values, batch.action[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(taken, best, atol=1e-4)
        if name == "rpqn":
            np.testing.assert_allclose(batch.value, best, atol=1e-4)
        following = agent.step(after.memory, after.obs, after.reset)[1]
        start = after._replace(memory=memory)
    _, q_values = agent.step(agent.open(start.memory), start.obs, start.reset)
    np.testing.assert_allclose(following, q_values, atol=1e-4)


# What impala_lstm.py learns of an end is the learner's: tests/test_impala.py.
WITH_LIMITS = sorted(set(MEMORY) - {"drqn", *THREADED})


@pytest.mark.parametrize("name", quick(WITH_LIMITS, "ppo_lstm"))
def test_the_value_at_a_time_limit_is_that_of_the_next_step_without_a_reset(name):
    script, env = importlib.import_module(name), real_env(name, limit=7)
    agent = agent_of(name)
    start = acting(script, agent, env)
    _, batch = act_from(script, agent, env, start, jax.random.key(1), 8)
    env = real_env(name, limit=1000)
    _, without_limit = act_from(script, agent, env, start, jax.random.key(1), 8)
    cut = (batch.final_value[6] != 0) & ~without_limit.done[:7].any(axis=0)
    assert cut.sum() > NUM_ENVS // 2
    np.testing.assert_allclose(batch.final_value[6][cut], without_limit.value[7][cut], atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", BY_RATIO)
def test_the_first_minibatches_have_ratio_1(name):
    """With a step size of 0, in the whole of the second update: windows begin with the memory that
    the agent had, whatever the epoch."""
    env = real_env(name)
    init, train_iteration = make_train(name, small_args(name, learning_rate=0.0), env)
    state, train_iteration = jax.jit(init)(jax.random.key(0)), jax.jit(train_iteration)
    agents = ["agent", "acting_agent"][: 1 + (name in THREADED)]
    state = state._replace(**dict.fromkeys(agents, agent_of(name)))
    for _ in range(3):
        state, metrics = train_iteration(state)
        assert abs(metrics["losses/approx_kl"]) < 1e-7
        assert metrics.get("losses/clipfrac", 0) == 0


SECOND_PASS = ("impala_lstm", "rppo", "rppo_continuous", "rpqn")
OTHER_FORM = '{"length": 5, "heads": 2, "layers": 1}'


@pytest.mark.thorough
@pytest.mark.parametrize("memory_name", ["gtrxl", "gru"])  # acts in another form, or as it is
@pytest.mark.parametrize("name", SECOND_PASS)
def test_the_next_memory_is_that_after_the_steps_seen(name, memory_name, monkeypatch):
    """With a step size of 0, over two rollouts of fewer steps than are remembered: `unroll` from the
    memory that the rollout began with gives the next one, and its answer is that of where acting
    stood. Learning begins from the same: all ratios are 1."""
    script, env, seen = importlib.import_module(name), real_env(name), []
    sizes = {"num_steps": 4, "memory": memory_name, "learning_rate": 0.0}
    sizes |= {"memory_kwargs": OTHER_FORM} if memory_name == "gtrxl" else {}
    sizes |= {"sequence_length": 2} if name == "rppo_continuous" else {}
    own_rollout = script.rollout

    def rollout(*given):
        result = own_rollout(*given)
        keep = (result[0].memory, result[1].obs, result[1].reset)
        jax.debug.callback(lambda *x: seen.append(jax.tree.map(jnp.array, x)), *keep, ordered=True)
        return result

    monkeypatch.setattr(script, "rollout", rollout)
    init, train_iteration = make_train(name, small_args(name, **sizes), env)
    state, train_iteration = jax.jit(init)(jax.random.key(0)), jax.jit(train_iteration)
    agents = ["agent", "acting_agent"][: 1 + (name in THREADED)]
    agent = agent_of(name, **sizes)
    state = state._replace(**dict.fromkeys(agents, agent))
    first = lambda state: state.acting[0] if name in THREADED else state.acting
    for _ in range(2):
        seen.clear()
        before, (state, metrics) = first(state).memory, train_iteration(state)
        jax.effects_barrier()
        acted, obs, reset = seen[0]
        after = first(state)
        assert_close(after.memory, compiled_unroll(agent, before, obs, reset)[0])
        following = (after.obs, jnp.zeros(NUM_ENVS, bool))
        answers = [
            compiled_step(agent, x, *following)[1:] for x in (acted, agent.open(after.memory))
        ]
        assert_close(*answers)
        assert abs(metrics.get("losses/approx_kl", 0.0)) < 1e-7


def memory_probe(name):
    """Two steps: the first shows a bit; the second does not, and its action is to be the bit."""

    def reward(time, bit, action):
        if name in CONTINUOUS:
            action = action > 0
        return jnp.where(time == 1, jnp.where(action == bit, 1.0, -1.0), 0.0)

    return probe(
        lambda time, bit: jnp.where(time == 0, 2.0 * bit - 1.0, 0.0),
        reward,
        terminated=lambda time, bit: time >= 2,
        continuous=name in CONTINUOUS,
        num_envs=NUM_ENVS,
    )


RECURRENT = sorted((set(MEMORY) & set(DISTINCT)) | {"rsac", "rsacd"})


@pytest.mark.parametrize("name", quick(RECURRENT, "ppo_lstm"))
def test_a_memory_of_one_step_is_learned(name):
    # IMPALA takes one gradient step for each of its minibatches.
    iterations = 150 if name in SEQUENCES or name in THREADED else 60
    learned, script = learn(name, memory_probe(name), iterations), importlib.import_module(name)
    returns = [
        script.evaluate(learned.state, memory_probe(name), jax.random.key(seed))[0]
        for seed in range(5)
    ]
    np.testing.assert_array_equal(jnp.stack(returns), 1.0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["ppo", "impala", "pqn", "dqn", "sac", "sacd"])
def test_without_memory_it_stays_at_chance(name):
    """The observation at the second step is always the same, so is the most probable action."""
    learned, script = learn(name, memory_probe(name), 60), importlib.import_module(name)
    play = jax.jit(lambda key: script.evaluate(learned.state, memory_probe(name), key)[0])
    returns = jax.vmap(play)(jax.random.split(jax.random.key(0), 200))
    assert abs(returns.mean()) < 4 / returns.size**0.5  # four standard errors of fair coins


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(set(MEMORY) & set(DISTINCT) - {"drqn"}))
def test_a_time_limit_is_bootstrapped_with_the_memory(name):
    """Reward 1 at each step of an episode of 3 or 9 steps, cut by a limit: V is near 1 / (1 - gamma)
    = 5 anywhere. Taken for the end of the task, it is 3.4 at the start."""
    env = probe(
        lambda time, bit: 0 * time,
        lambda time, bit, action: 0 * time + 1,
        truncated=lambda time, bit: time >= jnp.where(bit, 3, 9),
        continuous=name in CONTINUOUS,
    )
    iterations = 400 if name == "rpqn" else 90
    value = learn(name, env, iterations).value(jnp.zeros((1, 1)))
    np.testing.assert_allclose(value, 5.0, atol=0.4)


# --- ppo_lstm.py and rppo_continuous.py -----------------------------------------------------------


@pytest.mark.thorough
def test_recomputed_carries_are_those_of_the_agent_that_acts():
    """The next rollout begins with the carry that the new agent has after the last one."""
    args, env = small_args("ppo_lstm", recompute_carries=True), real_env("ppo_lstm")
    init, train_iteration = ppo_lstm.make_train(args, env)
    before = jax.jit(init)(jax.random.key(0))
    after = jax.jit(train_iteration)(before)[0]
    rollout_key, *_ = jax.random.split(before.key, 3)
    stale, batch = ppo_lstm.rollout(before.agent, env, before.acting, rollout_key, args.num_steps)
    fresh = after.agent.unroll(before.acting.memory, batch.obs, batch.reset)[0]
    assert_close(after.acting.memory, fresh)
    assert jnp.abs(fresh[0] - stale.memory[0]).max() > 1e-3


def seen_by(agent, args, seed=0):
    """Memory, batch and where acting stood after it, in rppo_continuous.py."""
    env = real_env("rppo_continuous")
    start = acting(rppo_continuous, agent, env, seed)
    start = start._replace(memory=agent.unroll(start.memory, *steps_of_all())[0])
    key = jax.random.key(1)
    after, batch = act_from(rppo_continuous, agent, env, start, key, args.num_steps)
    return start.memory, batch, after


def steps_of_all():
    return steps_of("rppo_continuous", seed=7, num_envs=NUM_ENVS)


@pytest.mark.thorough
def test_burn_in_warms_the_memory_up_and_gives_no_gradient():
    args = small_args("rppo_continuous", burn_in=3, norm_adv=False)
    agent = agent_of("rppo_continuous")
    _, memory, data = rppo_continuous.prepare(agent, *seen_by(agent, args), args)
    changed = jax.tree.map(lambda x: 0.9 * x, agent)  # so that warming up makes a difference
    grad = jax.grad(rppo_continuous.ppo_loss, has_aux=True)
    burnt = grad(changed, memory, *data, args)[0]
    warm, *_ = changed.unroll(memory, data[0].obs[:3], data[0].reset[:3])
    rest = jax.tree.map(lambda x: x[3:], data)
    plain = dataclasses.replace(args, burn_in=0)
    assert_close(burnt, grad(changed, warm, *rest, plain)[0], atol=1e-6)
    cold = grad(changed, memory, *rest, plain)[0]
    one, other = [x.bodies[0].memory.recurrent.kernel[...] for x in (cold, burnt)]
    assert jnp.abs(one - other).max() > 1e-6


@pytest.mark.parametrize("memory_name", quick(["lstm", "gtrxl"], "lstm"))
def test_sequences_begin_with_the_memory_before_their_first_step(memory_name):
    args = small_args("rppo_continuous", memory=memory_name)
    agent = agent_of("rppo_continuous", memory=memory_name)
    before, batch, stood = seen_by(agent, args)
    after, memory, (cut, advantages, _) = rppo_continuous.prepare(agent, before, batch, stood, args)
    assert cut.obs.shape[:2] == advantages.shape == (8, 2 * NUM_ENVS)
    np.testing.assert_array_equal(cut.reward[:, NUM_ENVS:], batch.reward[8:])
    first = before
    for start, end in ((0, 8), (8, 16)):
        own = slice(start * NUM_ENVS // 8, end * NUM_ENVS // 8)
        assert_close(jax.tree.map(lambda x, own=own: x[own], memory), first, atol=1e-4)
        first, *_, value = agent.unroll(first, batch.obs[start:end], batch.reset[start:end])
        np.testing.assert_allclose(value, batch.value[start:end], atol=1e-4)
    assert_close(after, first, atol=1e-4)
    _, *pi, _ = agent.unroll(memory, cut.obs, cut.reset)
    np.testing.assert_allclose(log_prob(pi, cut.action), cut.logprob, atol=1e-4)


def test_replaying_a_batch_with_the_same_agent_changes_nothing():
    args, agent = small_args("rppo_continuous"), agent_of("rppo_continuous")
    seen = seen_by(agent, args)
    assert_close(rppo_continuous.replay(agent, *seen), seen)
    changed = jax.tree.map(lambda x: 0.9 * x, agent)
    memory, batch, _ = seen
    _, fresh, stood = rppo_continuous.replay(changed, *seen)
    after, *_, value = changed.unroll(memory, batch.obs, batch.reset)
    np.testing.assert_allclose(fresh.value, value, atol=1e-5)
    assert_close(stood.memory, after)
    assert jnp.abs(fresh.value - batch.value).max() > 1e-3


@pytest.mark.thorough
def test_advantages_are_recomputed_before_each_epoch_or_stay(monkeypatch):
    """What the loss is given in each epoch: by default the same, however the agent has changed; and
    always the values acted with, which --clip-vloss clips around."""
    given, acted, loss = [], [], rppo_continuous.ppo_loss

    def spy(agent, memory, batch, advantages, returns, args):
        jax.debug.callback(lambda x: given.append(float(x)), returns.sum(), ordered=True)
        values = jnp.sort(batch.value, axis=None)  # whatever the order of the sequences
        jax.debug.callback(lambda x: acted.append(np.array(x)), values, ordered=True)
        return loss(agent, memory, batch, advantages, returns, args)

    monkeypatch.setattr(rppo_continuous, "ppo_loss", spy)
    for recompute in (False, True):
        changes = {"num_minibatches": 1, "recompute_advantages": recompute}
        args, env = small_args("rppo_continuous", **changes), real_env("rppo_continuous")
        init, train_iteration = rppo_continuous.make_train(args, env)
        jax.block_until_ready(jax.jit(train_iteration)(jax.jit(init)(jax.random.key(0))))
        jax.effects_barrier()
    as_acted, recomputed = given[: args.update_epochs], given[args.update_epochs :]
    assert len(as_acted) == len(recomputed) == 4
    np.testing.assert_array_equal(acted, [acted[0]] * 8)
    np.testing.assert_allclose(as_acted, recomputed[0], rtol=1e-5)
    assert np.all(np.abs(np.diff(recomputed)) > 1e-3 * np.abs(recomputed[0]))


# --- ppo_trxl.py and ppo_gtrxl.py -----------------------------------------------------------------


def test_the_mask_shows_the_last_steps_of_the_episode():
    memory_length, num_steps = 4, 12
    reset = np.random.default_rng(0).random((num_steps, 6)) < 0.2
    age = np.array([-1, 0, 1, 2, 3, 9])
    ages = np.asarray(ppo_trxl.episode_ages(jnp.array(age), jnp.array(reset)))
    visible = np.asarray(ppo_trxl.visible_steps(jnp.array(ages), memory_length))
    for b in range(6):
        begun = -age[b] - 1  # the step with which the episode began
        for i in range(num_steps):
            begun = i if reset[i, b] else begun
            assert ages[i, b] == i - begun
            seen = {j for j in range(-memory_length, num_steps) if visible[b, i, j + memory_length]}
            assert seen == {j for j in range(i - memory_length, i + 1) if j >= begun}


@pytest.mark.parametrize("encoding", ["relative", "absolute", "learned"])
def test_attention_is_the_paper_s_formula(encoding):
    """Against a loop over steps, heads and distances in numpy."""
    agent = agent_of("ppo_trxl", positional_encoding=encoding, num_heads=2)
    layer, dim, length, num_steps = agent.layers[0], 32, 6, 5
    x = jax.random.normal(jax.random.key(0), (1, num_steps, dim))
    remembered = ppo_trxl.norm(jax.random.normal(jax.random.key(1), (1, length, dim)))
    ages = jnp.array([[2], [3], [0], [1], [2]])  # a new episode at step 2
    visible = ppo_trxl.visible_steps(ages, length)
    result, inputs = layer.unroll(x, remembered, visible)

    h = np.concatenate([remembered[0], ppo_trxl.norm(x)[0]])
    apply = lambda linear, x: x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])
    query, both = apply(layer.query, h), apply(layer.key_value, h)
    u, v = np.asarray(layer.content_bias[...]), np.asarray(layer.position_bias[...])
    attended = np.zeros((num_steps, dim))
    for i in range(num_steps):
        steps = [j for j in range(length + num_steps) if visible[0, i, j]]
        for head in (slice(0, 16), slice(16, 32)):
            scores = []
            for j in steps:
                distance = i + length - j
                score = (query[i + length] + u)[head] @ both[j, :dim][head]
                if encoding == "relative":
                    angles = distance / 10_000.0 ** (np.arange(0, dim, 2) / dim)
                    r = np.concatenate([np.sin(angles), np.cos(angles)])
                    score += (query[i + length] + v)[head] @ apply(layer.positions, r)[head]
                if encoding == "learned":
                    r = np.asarray(layer.positions.embedding[...])[distance]
                    score += (query[i + length] + v)[head] @ r[head]
                scores.append(score / 16**0.5)
            weights = np.exp(scores) / np.exp(scores).sum()
            attended[i, head] = sum(
                w * both[j, dim:][head] for w, j in zip(weights, steps, strict=True)
            )
    np.testing.assert_allclose(result[0], layer.feed_forward(x, jnp.array(attended))[0], atol=1e-4)
    np.testing.assert_allclose(inputs, ppo_trxl.norm(x), atol=1e-6)


@pytest.mark.thorough
def test_no_gradient_flows_into_the_memory():
    agent = agent_of("ppo_trxl")
    obs, reset = steps_of("ppo_trxl")
    memory, *_ = agent.unroll(agent.initial_memory(5), obs, reset)

    def value_of_the_last(agent, obs):
        memory, *_ = agent.unroll(agent.initial_memory(5), obs[:-1], reset[:-1] & False)
        return agent.step(agent.open(memory), obs[-1], reset[-1] & False)[-1].sum()

    grads = jax.grad(value_of_the_last, argnums=1)(agent, obs)
    assert jnp.abs(grads[:-1]).max() == 0 and jnp.abs(grads[-1]).max() > 0


def test_a_gate_of_large_bias_lets_nothing_through():
    gate = ppo_gtrxl.Gate(8, 2.0, nnx.Rngs(0))
    x, y = jax.random.normal(jax.random.key(0), (2, 5, 8))
    gate.bias = 50.0
    np.testing.assert_allclose(gate(x, y), x, atol=1e-6)
    gate.bias = -50.0  # a plain candidate state, which y moves
    assert jnp.abs(gate(x, y)).max() < 1 and jnp.abs(gate(x, y) - gate(x, 2 * y)).max() > 1e-2


@pytest.mark.thorough
@pytest.mark.parametrize("encoding", ["relative", "absolute", "learned"])
def test_bfloat16_computes_nearly_the_same_in_half_the_memory(encoding):
    agent = agent_of("ppo_trxl", positional_encoding=encoding)
    half = agent_of("ppo_trxl", positional_encoding=encoding, compute_dtype="bfloat16")
    obs, reset = steps_of("ppo_trxl")
    memory, logprobs, value = agent.unroll(agent.initial_memory(5), obs, reset)
    half_memory, half_logprobs, half_value = half.unroll(half.initial_memory(5), obs, reset)
    assert half_memory.inputs.dtype == jnp.bfloat16 and half_value.dtype == jnp.float32
    assert 1e-5 < jnp.abs(value - half_value).max() < 0.1
    assert jnp.abs(logprobs - half_logprobs).max() < 0.1

    # Products of the layers take bfloat16, those of encoder (1) and heads (2 x 3) float32.
    program = jax.make_jaxpr(half.unroll)(half.initial_memory(5), obs, reset)
    taken = [{x.aval.dtype.name for x in eqn.invars} for eqn in products(program.jaxpr)]
    assert taken.count({"float32"}) == 7 and taken.count({"bfloat16"}) == len(taken) - 7 > 10


@pytest.mark.parametrize("name", quick(["ppo_trxl", "ppo_gtrxl"], "ppo_trxl"))
def test_bfloat16_changes_the_first_ratios_by_some_hundredths_at_most(name):
    agent = agent_of(name, compute_dtype="bfloat16")
    obs, reset = steps_of(name)
    memory = used_memory(agent, name)
    _, (logprobs, _) = unroll(agent, memory, obs, reset, [NUM_STEPS])
    _, (acted, _) = step_by_step(agent, memory, obs, reset)
    assert jnp.abs(jnp.exp(logprobs - acted) - 1).max() < 0.05


def products(jaxpr):
    """The matrix products in a program, also in its parts."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for part in eqn.params.values():
            if hasattr(part, "jaxpr"):
                yield from products(part.jaxpr)


def test_chrono_length_spreads_how_long_the_cells_remember():
    """A cell with forget gate f forgets in 1 / (1 - f) = 1 + exp(bias) steps: here 2 to 1 + 100."""
    make = lambda length: ppo_lstm.LSTM(500, nnx.Rngs(0), chrono_length=length)
    split = lambda length: np.split(make(length).inputs.bias[...], 4)
    ignore, forget, *others = split(100)
    np.testing.assert_array_equal(ignore, -forget)
    memories = np.exp(forget)
    assert 1.0 <= memories.min() < 5.0 and 95.0 < memories.max() <= 100.0
    assert abs(memories.mean() - 50.5) < 5.0 and not np.any(others)
    ignore, forget, *others = split(0)
    assert not np.any(ignore) and (forget == 1.0).all() and not np.any(others)
