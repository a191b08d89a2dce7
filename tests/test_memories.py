"""Every file of memories/ keeps the protocol: what is unrolled is what is stepped, an episode knows nothing
of the one before, and nothing grows without bound. A new file is covered by being there."""

import ast
import csv
import dataclasses
import functools
import inspect
import json
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from probes import NUM_ENVS, act_from, learn, probe, quick, real_env, small_args

import ppo_gtrxl
import ppo_lstm
import rppo

NAMES = sorted(path.stem for path in (ROOT / "memories").glob("*.py"))
MEMORIES = {name: runpy.run_path(str(ROOT / "memories" / f"{name}.py"))["Memory"] for name in NAMES}
SMALL = {  # what looks back no farther than a part of the sequences here, several layers and heads
    "s5": {"states": 8},
    "lru": {"states": 5},
    "mlstm": {"piece": 7},  # three of them, and a rest
    "shm": {"features": 5},
    "ffm": {"features": 5, "context": 3},
    "xlstm": {"heads": 2},  # of two numbers a head, its norm leaves signs, which rounding can turn
    "dnc": {"slots": 4, "width": 3, "readers": 2},
    "gpt2": {"length": 5},
    "gtrxl": {"length": 5},
}
LINEAR = ("ffm", "lru", "s5", "shm")  # their unroll is a loop or a tree of products
SIZE, BATCH, STEPS = 8, 5, 24
unroll = jax.jit(lambda module, *x: module.unroll(*x))


@jax.jit
def step_all(module, memory, x, reset):
    """The same by steps -> acting, y [T, B, D]."""
    return jax.lax.scan(
        lambda acting, step: module.step(acting, *step), module.open(memory), (x, reset)
    )


@functools.cache
def make(name, size=SIZE, **kwargs):
    """A memory whose every parameter is random, so that none hides behind a zero."""
    module = MEMORIES[name](size, nnx.Rngs(0), **{**SMALL.get(name, {}), **kwargs})
    leaves, structure = jax.tree.flatten(module)
    keys = jax.random.split(jax.random.key(1), len(leaves) + 1)
    noisy = [
        x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=False)
    ]
    return jax.tree.unflatten(structure, noisy)


def inputs(seed=0, steps=STEPS, batch=BATCH, size=SIZE):
    """x [T, B, D], reset [T, B]: some at the first step, some episodes of a single one."""
    key = jax.random.key(seed)
    reset = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.15, (steps, batch))
    return jax.random.normal(key, (steps, batch, size)), reset.at[7:9, 0].set(True)


@functools.cache
def used(name):
    """A memory in the middle of episodes."""
    x, reset = inputs(seed=9, steps=13)
    module = make(name)
    return unroll(module, module.initial_memory(BATCH), x, reset)[0]


def assert_close(one, other, **tolerance):
    np.testing.assert_allclose(one, other, **({"atol": 3e-5, "rtol": 1e-3} | tolerance))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_stands_alone_and_says_what_its_memory_costs(name):
    tree = ast.parse((ROOT / "memories" / f"{name}.py").read_text())
    imported = [
        alias.name for x in ast.walk(tree) if isinstance(x, ast.Import) for alias in x.names
    ]
    imported += [x.module or "." for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)]
    known = {"jax", "flax", "numpy", "typing", "functools", "math"}
    assert {x.partition(".")[0] for x in imported} <= known
    said = " ".join(ast.get_docstring(tree).split())
    for what in ("State: ", "Cost per step", "Good at: ", "Bad at: "):
        assert what in said, what


# --- Unrolling is stepping ------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(NAMES, "mlstm"))
def test_an_unroll_is_as_many_steps_and_the_sum_of_its_pieces(name):
    """From a memory that is not empty, with resets at random places; memories are compared by what they
    answer next."""
    module, (x, reset) = make(name), inputs()
    memory, y = unroll(module, used(name), x, reset)
    acting, by_steps = step_all(module, used(name), x, reset)
    assert_close(y, by_steps)
    piece, pieces = used(name), []
    for start, end in ((0, 1), (1, 10), (10, 11), (11, STEPS)):
        piece, part = unroll(module, piece, x[start:end], reset[start:end])
        pieces.append(part)
    assert_close(y, jnp.concatenate(pieces))
    after = inputs(seed=5)
    further = unroll(module, memory, *after)[1]
    assert_close(further, unroll(module, piece, *after)[1])
    for n in range(3):
        acting, answer = jax.jit(lambda module, *x: module.step(*x))(
            module, acting, after[0][n], after[1][n]
        )
        assert_close(answer, further[n])
    if name != "none":  # the memory matters, or all of this says nothing
        fresh = unroll(module, module.initial_memory(BATCH), x, reset & False)[1]
        assert jnp.abs(fresh[:3] - unroll(module, used(name), x, reset & False)[1][:3]).max() > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_structure_and_types_stay_what_they_were(name):
    module, (x, reset) = make(name), inputs()
    memory = module.initial_memory(BATCH)
    acting = module.open(memory)
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(memory))
    after, y = unroll(module, memory, x, reset)
    assert described(after) == described(memory) and y.shape == x.shape and y.dtype == x.dtype
    after, y = module.step(acting, x[0], reset[0])
    assert described(after) == described(acting) and y.shape == x[0].shape


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_environments_do_not_mix(name):
    module = make(name)
    chosen = jnp.array([3, 0])
    memory = jax.tree.map(lambda leaf: leaf[chosen], used(name))
    one, other = memory, used(name)
    for seed in (0, 5):  # and what those memories answer next
        x, reset = inputs(seed)
        one, some = unroll(module, one, x[:, chosen], reset[:, chosen])
        other, y = unroll(module, other, x, reset)
        assert_close(some, y[:, chosen])


def apart(memory):
    """-> the leaves that have a gradient, and together(them) -> memory."""
    leaves, structure = jax.tree.flatten(memory)
    real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def together(some):
        some = iter(some)
        whole = [next(some) if r else leaf for r, leaf in zip(real, leaves, strict=True)]
        return jax.tree.unflatten(structure, whole)

    return [leaf for r, leaf in zip(real, leaves, strict=True) if r], together


def gradients(module, memory, x, reset):
    """Of what an unroll answers and leaves behind, by its parameters, what came before, and x."""
    some, together = apart(memory)

    def loss(module, some, x):
        end, y = module.unroll(together(some), x, reset)
        return (y**2).sum() + sum((jnp.abs(leaf) ** 2).sum() for leaf in jax.tree.leaves(end))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(module, some, x)


def assert_the_same(one, other, steps=STEPS):
    """Two forms of a memory, with the same parameters, from the middle of episodes: to the last gradient."""
    middle = unroll(other, other.initial_memory(BATCH), *inputs(seed=9, steps=13))[0]
    of = lambda module, *x: (unroll(module, *x), gradients(module, *x))
    forms = [of(module, middle, *inputs(steps=steps)) for module in (one, other)]
    for a, b in zip(*map(jax.tree.leaves, forms), strict=True):
        assert_close(a, b, atol=1e-4 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("name", quick(LINEAR, "shm"))
def test_a_tree_of_products_is_the_loop(name):
    """With resets, also at the first step, and for sequences of one step."""
    tree, loop = make(name, parallel=True), make(name, parallel=False)
    for steps in (STEPS, 1):
        assert_the_same(tree, loop, steps)


@pytest.mark.parametrize("name", LINEAR)
def test_the_tree_is_the_choice_where_there_is_an_accelerator(name, monkeypatch):
    has_tree = lambda module: [m.parallel for m in getattr(module, "layers", [module])]
    make = lambda **kwargs: MEMORIES[name](SIZE, nnx.Rngs(0), **kwargs)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not any(has_tree(make())) and all(has_tree(make(parallel=True)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert all(has_tree(make())) and not any(has_tree(make(parallel=False)))


@pytest.mark.thorough
@pytest.mark.parametrize("piece", [1, 6, 7, STEPS])
def test_the_mlstm_s_pieces_are_all_steps_at_once(piece):
    assert_the_same(*[make("mlstm", heads=1, piece=n) for n in (piece, 100)])


# --- What a step may know -------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(NAMES, "mlstm"))
def test_an_episode_knows_nothing_of_the_one_before_nor_of_the_future(name):
    """In values and in gradients, which are exactly 0: also of the memory with which all began."""
    module, (x, reset) = make(name), inputs()
    reset = jnp.zeros_like(reset).at[10].set(True)
    floats, together = apart(used(name))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def of(x, floats, asked):
        y = module.unroll(together(floats), x, reset)[1]
        return jnp.where(asked[:, None, None], y**2, 0.0).sum()

    steps = jnp.arange(STEPS)
    grad_x, grad_memory = of(x, floats, steps >= 10)
    assert all(jnp.all(leaf == 0) for leaf in grad_memory)
    assert jnp.all(grad_x[:10] == 0) and jnp.abs(grad_x[10:]).max() > 0
    for end in (10, 17):  # also of the future of its own episode
        grad_x, _ = of(x, floats, steps < end)
        assert jnp.all(grad_x[end:] == 0) and jnp.abs(grad_x[:end]).max() > 0
    fresh = unroll(module, module.initial_memory(BATCH), x[10:], reset[10:] & False)[1]
    assert_close(unroll(module, used(name), x, reset)[1][10:], fresh)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_what_was_seen_is_remembered(name):
    """The first step's input still changes what comes two steps later."""
    module, (x, reset) = make(name), inputs()
    memory = module.initial_memory(BATCH)
    other = unroll(module, memory, x.at[0].multiply(-1.0), reset & False)[1]
    assert jnp.abs(unroll(module, memory, x, reset & False)[1] - other)[2].max() > 1e-4


# --- Nothing grows without bound ------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_steps_of_large_inputs_stay_finite(name):
    module = MEMORIES[name](SIZE, nnx.Rngs(0), **SMALL.get(name, {}))
    x = 100.0 * jax.random.uniform(jax.random.key(0), (10_000, 2, SIZE), minval=-1.0)
    x = x.at[2_000:2_300].set(100.0)
    # The same again and again, which one fixed factor would blow up.
    x = x.at[3_000:6_000].set(x[0])
    never = jnp.zeros((500, 2), bool)

    @jax.jit
    def in_windows(module):
        window = lambda memory, x: module.unroll(memory, x, never)
        return jax.lax.scan(window, module.initial_memory(2), x.reshape(20, 500, 2, SIZE))

    finite = lambda tree: all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    assert finite(step_all(module, module.initial_memory(2), x, jnp.zeros((10_000, 2), bool)))
    for kwargs in [{"parallel": True}, {"parallel": False}] if name in LINEAR else [{}]:
        arguments = SMALL.get(name, {}) | kwargs
        assert finite(in_windows(MEMORIES[name](SIZE, nnx.Rngs(0), **arguments)))


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("resets", ["at random", "at each step", "never"])
def test_gradients_are_finite(name, resets):
    """Of an untrained memory and of a perturbed one, also where every step begins an episode."""
    x, reset = inputs()
    reset = {"at random": reset, "at each step": reset | True, "never": reset & False}[resets]
    for module in (make(name), MEMORIES[name](SIZE, nnx.Rngs(0), **SMALL.get(name, {}))):
        loss = lambda module, x: (
            unroll(module, module.initial_memory(BATCH), x, reset)[1] ** 2
        ).sum()
        grads = jax.grad(loss, argnums=(0, 1))(module, 10.0 * x)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.thorough
@pytest.mark.parametrize("resets", ["at each step", "never"])
@pytest.mark.parametrize(("name", "kwargs"), [("mlstm", {}), ("xlstm", {"blocks": "mm"})])
def test_gradients_are_finite_where_hardly_anything_was_taken_in(name, kwargs, resets):
    """i~ = -110: exp(-m) is more than float32 holds, and its gradient 0 times infinity."""
    module, (x, reset) = MEMORIES[name](SIZE, nnx.Rngs(0), **kwargs), inputs()
    for cell in module.blocks if name == "xlstm" else [module]:
        cell.gates.bias[...] = cell.gates.bias[...].at[: cell.heads].set(-110.0)
    reset = jnp.full_like(reset, resets == "at each step")
    grads = gradients(module, module.initial_memory(BATCH), x, reset)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.thorough
def test_an_s5_whose_eigenvalues_were_learned_to_grow_does_not():
    module = MEMORIES["s5"](SIZE, nnx.Rngs(0), states=8)
    for layer in module.layers:
        layer.eigenvalues[...] = layer.eigenvalues[...].at[0].set(0.5)
    x, reset = inputs(steps=10_000, batch=1)
    assert jnp.isfinite(unroll(module, module.initial_memory(1), x, reset & False)[1]).all()


def sizes_of(name):
    """Width, batch and arguments of the smallest: a width of one, one head, one environment."""
    heads = "heads" in inspect.signature(MEMORIES[name].__init__).parameters
    return [(1, BATCH, {"heads": 1} if heads else {}), (SIZE, 1, {})] + heads * [
        (SIZE, BATCH, {"heads": 1})
    ]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "sizes"), [(name, x) for name in NAMES for x in sizes_of(name)])
def test_one_is_enough(name, sizes):
    size, batch, kwargs = sizes
    module, (x, reset) = make(name, size=size, **kwargs), inputs(batch=batch, size=size)
    y = unroll(module, module.initial_memory(batch), x, reset)[1]
    assert jnp.isfinite(y).all()
    assert_close(y, step_all(module, module.initial_memory(batch), x, reset)[1])


# --- In rppo.py -----------------------------------------------------------------------------------


def flags(name):
    return {"memory": name, "memory_kwargs": json.dumps(SMALL.get(name, {})), "embed_dim": SIZE}


@pytest.mark.thorough
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_acted_on_is_what_is_learned_from(name, shared):
    """The ratio is 1 before the first update, over two rollouts and the ends of episodes; the value
    bootstrapped from is that of the next rollout's first step. (test_memory.py looks at time limits.)"""
    args, env = small_args("rppo", shared_encoder=shared, **flags(name)), real_env("rppo", limit=17)
    state = jax.jit(rppo.make_train(args, env)[0])(jax.random.key(0))
    leaves, structure = jax.tree.flatten(state.agent)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    agent, start = jax.tree.unflatten(structure, noisy), state.acting
    rollout, batches = jax.jit(lambda *x: act_from(rppo, agent, env, *x, 40)), []
    for seed in (1, 2):
        after, batch = rollout(start, jax.random.key(seed))
        assert batch.done.sum() >= NUM_ENVS
        memory, logprobs, value = agent.unroll(start.memory, batch.obs, batch.reset)
        logprob = jnp.take_along_axis(logprobs, batch.action[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(logprob, batch.logprob, atol=1e-4)
        np.testing.assert_allclose(value, batch.value, atol=1e-4)
        *_, last_value = agent.step(after.memory, after.obs, after.reset)
        start = after._replace(memory=memory)
        batches.append(batch)
    # Both rollouts unrolled as one: the second began with what the first had left.
    obs, reset, value = [
        jnp.concatenate([getattr(batch, x) for batch in batches]) for x in ("obs", "reset", "value")
    ]
    np.testing.assert_allclose(agent.unroll(state.acting.memory, obs, reset)[-1], value, atol=1e-4)
    _, following = rollout(start, jax.random.key(3))
    np.testing.assert_allclose(last_value, following.value[0], atol=1e-4)


def memory_probe():
    """A bit is shown at the first step; the action of the second is to name it."""
    return probe(
        lambda time, bit: jnp.where(time == 0, 2.0 * bit - 1.0, 0.0),
        lambda time, bit, action: jnp.where(time == 0, 0.0, jnp.where(action == bit, 1.0, -1.0)),
        terminated=lambda time, bit: time >= 2,
    )


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_each_memory_learns_what_needs_one_and_the_control_does_not(name):
    learned = learn("rppo", memory_probe(), 60, **flags(name) | {"embed_dim": 16})
    play = jax.jit(lambda key: rppo.evaluate(learned.state, memory_probe(), key)[0])
    returns = jnp.stack([play(jax.random.key(seed)) for seed in range(20)])
    if name == "none":
        assert abs(returns.mean()) < 4 / returns.size**0.5  # four standard errors of fair coins
    else:
        np.testing.assert_array_equal(returns, 1.0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_any_memory_resumes_exactly_and_can_be_played(name, tmp_path, monkeypatch):
    config = small_args("rppo", 4, env_id="gymnax::CartPole-v1", **flags(name), checkpoint_every=2)
    config = dataclasses.replace(config, run_dir=tmp_path / "run", eval_episodes=3)
    saved, save = [], rppo.save_checkpoint

    def noted(run_dir, state):
        is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        data = lambda x: jax.random.key_data(x) if is_key(x) else x
        saved.append([np.array(data(x)) for x in jax.tree.leaves(state)])
        save(run_dir, state)

    def results():
        """All of metrics.csv but the clock."""
        with (tmp_path / "run" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        clock = ("seconds", "charts/SPS")
        return [{k: v for k, v in row.items() if k not in clock} for row in rows]

    monkeypatch.setattr(rppo, "save_checkpoint", noted)
    rppo.main(config)
    whole, once = results(), saved[-1]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    rppo.main(dataclasses.replace(config, resume=tmp_path / "run", run_dir=None))
    assert results() == whole and len(whole) > 1
    for one, other in zip(once, saved[-1], strict=True):
        np.testing.assert_array_equal(one, other)


# --- Each against what it is known to be ----------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "name", "kwargs"),
    [
        (rppo.GRU, "gru", {}),
        (ppo_lstm.LSTM, "lstm", {}),
        (ppo_lstm.LSTM, "lstm", {"chrono_length": 20}),
    ],
)
def test_the_cell_of_a_script_is_that_of_the_file(own, name, kwargs):
    x, reset = inputs()
    ours, file = [make(SIZE, nnx.Rngs(3), **kwargs) for make in (own, MEMORIES[name])]
    one, other = [unroll(m, m.initial_memory(BATCH), x, reset)[1] for m in (ours, file)]
    np.testing.assert_array_equal(one, other)


@pytest.mark.thorough
def test_the_gru_is_flax_s():
    module, (x, reset) = make("gru"), inputs()
    cell = nnx.GRUCell(SIZE, SIZE, rngs=nnx.Rngs(0))
    cell.dense_i.kernel[...], cell.dense_i.bias[...] = (
        module.inputs.kernel[...],
        module.inputs.bias[...],
    )
    cell.dense_h.kernel[...] = module.recurrent.kernel[...]
    module = make("gru")
    module.recurrent.bias[...] = 0.0 * module.recurrent.bias[...]
    h, expected = jnp.zeros((BATCH, SIZE)), []
    for step in x:
        h, _ = cell(h, step)
        expected.append(h)
    y = unroll(module, module.initial_memory(BATCH), x, reset & False)[1]
    assert_close(y, jnp.stack(expected))


def test_a_gru_with_a_closed_gate_keeps_what_it_knows():
    """z = 1: h' = (1 - z) n + z h = h."""
    module, (x, reset) = MEMORIES["gru"](SIZE, nnx.Rngs(0)), inputs()
    module.inputs.bias[...] = module.inputs.bias[...].at[SIZE : 2 * SIZE].set(50.0)
    h = jax.random.normal(jax.random.key(1), (BATCH, SIZE))
    y = unroll(module, h, x, reset & False)[1]
    assert_close(y, jnp.broadcast_to(h, y.shape), atol=1e-5)


@pytest.mark.thorough
def test_the_lstm_is_flax_s():
    module, (x, reset) = make("lstm"), inputs()
    cell = nnx.LSTMCell(SIZE, SIZE, rngs=nnx.Rngs(0))
    kernels = [
        jnp.split(layer.kernel[...], 4, axis=1) for layer in (module.inputs, module.recurrent)
    ]
    biases = jnp.split(module.inputs.bias[...] + module.recurrent.bias[...], 4)
    for n, gate in enumerate("ifgo"):
        getattr(cell, {"f": "if_"}.get(gate, "i" + gate)).kernel[...] = kernels[0][n]
        getattr(cell, "h" + gate).kernel[...] = kernels[1][n]
        getattr(cell, "h" + gate).bias[...] = biases[n]
    carry, expected = (jnp.zeros((BATCH, SIZE)),) * 2, []
    for step in x:
        carry, h = cell(carry, step)
        expected.append(h)
    y = unroll(module, module.initial_memory(BATCH), x, reset & False)[1]
    assert_close(y, jnp.stack(expected))


def test_the_slstm_with_open_gates_keeps_a_running_mean():
    """i~ = 0, f~ = o~ = 50: h is the mean of tanh z~ so far."""
    module = MEMORIES["slstm"](SIZE, nnx.Rngs(0))
    gates = jnp.zeros((12, BATCH, 4 * SIZE)).at[..., SIZE : 2 * SIZE].set(50.0)
    z = jax.random.normal(jax.random.key(0), (12, BATCH, SIZE))
    gates = gates.at[..., 3 * SIZE :].set(50.0).at[..., 2 * SIZE : 3 * SIZE].set(z)
    memory, no = module.initial_memory(BATCH), jnp.zeros(BATCH, bool)
    for n in range(12):
        memory = module.cell(memory, gates[n], no)
        assert_close(memory[-1], jnp.tanh(z[: n + 1]).mean(axis=0), atol=1e-5)
    # A first input that is hardly taken in counts all the same: there is nothing else.
    shy = gates[0].at[:, :SIZE].set(-110.0)
    for before, reset in ((module.initial_memory(BATCH), no), (memory, ~no)):
        assert_close(module.cell(before, shy, reset)[-1], jnp.tanh(z[0]), atol=1e-5)


def test_the_mlstm_is_its_recurrence_step_by_step():
    """In float64 and plain loops, with the stabiliser left out."""
    module, (x, reset) = make("mlstm"), inputs()
    y = unroll(module, module.initial_memory(BATCH), x, reset)[1]
    a = lambda x: np.asarray(x, np.float64)
    qkv = a(x) @ a(module.query_key_value.kernel[...])
    gates = a(x) @ a(module.gates.kernel[...]) + a(module.gates.bias[...])
    out = a(x) @ a(module.output_gate.kernel[...]) + a(module.output_gate.bias[...])
    for b in range(BATCH):
        for h in range(4):
            C, n = np.zeros((2, 2)), np.zeros(2)
            for t in range(STEPS):
                q, k, v = [part[2 * h : 2 * h + 2] for part in np.split(qkv[t, b], 3)]
                keep = 1 / (1 + np.exp(-gates[t, b, 4 + h])) * (not reset[t, b])
                take, k = np.exp(gates[t, b, h]), k / 2**0.5
                C, n = keep * C + take * np.outer(k, v), keep * n + take * k
                read = q @ C / max(abs(q @ n), 1.0)
                read = (read - read.mean()) / np.sqrt(read.var() + 1e-6)
                scale = a(module.scale[...])[2 * h : 2 * h + 2]
                gate = 1 / (1 + np.exp(-out[t, b, 2 * h : 2 * h + 2]))
                np.testing.assert_allclose(
                    y[t, b, 2 * h : 2 * h + 2], gate * read * scale, atol=2e-3
                )


def test_an_mlstm_recalls_by_its_keys_what_it_was_shown():
    """f = 1, i~ = 0 and a unit vector as key of each item: C holds the values themselves, times one factor,
    and a query alone reads its value. Inputs are [key, query, value].
    """
    module, eye = MEMORIES["mlstm"](12, nnx.Rngs(0), heads=1), jnp.eye(4)
    kernel = jnp.zeros((12, 36)).at[4:8, :4].set(eye)  # q
    kernel = kernel.at[:4, 12:16].set(eye).at[8:, 24:28].set(eye)  # k, v
    module.query_key_value.kernel[...] = kernel
    module.gates.bias[...] = jnp.array([0.0, 50.0])
    module.output_gate.kernel[...] = jnp.zeros((12, 12))
    values = jax.random.normal(jax.random.key(0), (4, 4))
    zeros, order = jnp.zeros((4, 4)), jnp.array([2, 0, 3, 1])
    shown = jnp.concatenate([eye, zeros, values], axis=1)
    asked = jnp.concatenate([zeros, eye[order], zeros], axis=1)
    x = jnp.concatenate([shown, asked])[:, None]
    (C, *_), y = unroll(module, module.initial_memory(1), x, jnp.zeros((8, 1), bool))
    assert_close(C[0, 0, :4, :4], values / 12**0.5, atol=1e-5)
    values = jnp.pad(values, [(0, 0), (0, 8)])
    normed = (values - values.mean(-1, keepdims=True)) / values.std(-1, keepdims=True)
    assert_close(y[4:, 0], 0.5 * normed[order], atol=1e-3)


def test_an_xlstm_s_mlstm_block_is_its_equations():
    """The convolution by NumPy's, episode by episode; the cell in float64, its stabiliser left out."""
    module, (x, reset) = make("xlstm", blocks="m", heads=4), inputs()
    (block,), a = module.blocks, lambda x: np.asarray(x, np.float64)
    y = unroll(module, module.initial_memory(BATCH), x, reset)[1]
    p, z = np.split(a(block.up(block.norm(x))), 2, axis=-1)
    silu, u, h = lambda x: x / (1 + np.exp(-x)), np.zeros_like(p), np.zeros_like(p)
    for b in range(BATCH):
        starts = [0, *[t for t in range(1, STEPS) if reset[t, b]], STEPS]
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            taps = a(block.taps[...])[::-1].T  # the newest input first
            conv = [np.convolve(c, w) for c, w in zip(p[start:end, b].T, taps, strict=True)]
            u[start:end, b] = silu(np.array(conv).T[: end - start])
    q, k = np.split(u @ a(block.query_key.kernel[...]), 2, axis=-1)
    v, gates = p @ a(block.value.kernel[...]), a(block.gates(jnp.asarray(u, jnp.float32)))
    for b in range(BATCH):
        for head in range(4):
            d = slice(4 * head, 4 * head + 4)
            for t in range(STEPS):
                if t == 0 or reset[t, b]:
                    C, n = np.zeros((4, 4)), np.zeros(4)
                keep, take = 1 / (1 + np.exp(-gates[t, b, 4 + head])), np.exp(gates[t, b, head])
                C = keep * C + take * np.outer(k[t, b, d] / 2, v[t, b, d])
                n = keep * n + take * k[t, b, d] / 2
                read = q[t, b, d] @ C / max(abs(q[t, b, d] @ n), 1.0)
                h[t, b, d] = (read - read.mean()) / np.sqrt(read.var() + 1e-6)
    inner = (h * a(block.scale[...]) + a(block.skip[...]) * u) * silu(z)
    expected = module.norm(x + block.down(jnp.asarray(inner, jnp.float32)))
    assert_close(y, expected, atol=2e-3)


@pytest.mark.thorough
def test_an_xlstm_s_slstm_block_is_the_slstm_beside_what_came_in():
    module, cell, (x, reset) = make("xlstm", blocks="s", heads=4), make("slstm"), inputs()
    (block,) = module.blocks
    for part in ("kernel", "bias"):
        getattr(cell.inputs, part)[...] = getattr(block.inputs, part)[...]
    cell.recurrent[...] = jnp.concatenate([*block.recurrent[...]], axis=-1)
    cell.scale[...] = block.scale[...]
    h = unroll(cell, cell.initial_memory(BATCH), block.norm_1(x), reset)[1]
    gate, value = jnp.split(block.hidden(block.norm_2(x + h)), 2, axis=-1)
    expected = module.norm(x + h + block.output(nnx.gelu(gate) * value))
    assert_close(unroll(module, module.initial_memory(BATCH), x, reset)[1], expected, atol=1e-4)
    make.cache_clear()  # slstm has been changed


@pytest.mark.thorough
def test_an_xlstm_whose_blocks_give_nothing_is_its_last_normalisation():
    module, (x, reset) = MEMORIES["xlstm"](SIZE, nnx.Rngs(0), blocks="msm"), inputs()
    zero = lambda parameter: parameter.__setitem__(..., 0.0 * parameter[...])
    for block, kind in zip(module.blocks, "msm", strict=True):
        zero(block.down.kernel if kind == "m" else block.output.kernel)
        if kind == "s":
            zero(block.scale)
    y = unroll(module, module.initial_memory(BATCH), x, reset)[1]
    assert_close(y, module.norm(x))


@pytest.mark.thorough
@pytest.mark.parametrize("reset", [False, True])
def test_an_xlstm_s_first_step_counts_however_shy_its_gate(reset):
    """i~ = -110 at the start of an episode: there is nothing else, so h is tanh z~ (with o~ = 50)."""
    module = MEMORIES["xlstm"](SIZE, nnx.Rngs(0), blocks="s")
    (block,), x = module.blocks, inputs()[0][0]
    bias = block.inputs.bias[...].at[:SIZE].set(-110.0).at[3 * SIZE :].set(50.0)
    block.inputs.bias[...] = bias
    memory = module.initial_memory(BATCH)
    if reset:  # at the end of another episode
        memory = unroll(module, memory, *inputs(seed=9))[0]
    ((*_, h),), _ = module.step(memory, x, jnp.full(BATCH, reset))
    z = jnp.split(block.inputs(block.norm_1(x)), 4, axis=-1)[2]
    assert_close(h, jnp.tanh(z), atol=1e-4)


def test_a_framestack_is_the_last_inputs_of_the_episode():
    """Exactly: each answer changes with those, and with no other."""
    module, (x, reset) = make("framestack", length=3), inputs(batch=2)
    y = unroll(module, module.initial_memory(2), x, reset)[1]
    for b in range(2):
        frames = [jnp.zeros(SIZE)] * 3
        for t in range(STEPS):
            frames = [x[t, b], *([jnp.zeros(SIZE)] * 2 if reset[t, b] else frames[:2])]
            assert_close(y[t, b], jnp.tanh(module.project(jnp.concatenate(frames))))
    answer = lambda x: unroll(module, module.initial_memory(2), x, reset & False)[1][10].sum()
    seen = jnp.abs(jax.grad(answer)(x)).max(axis=(1, 2)) > 0
    np.testing.assert_array_equal(jnp.flatnonzero(seen), [8, 9, 10])


def test_an_lru_is_powers_of_its_eigenvalues_which_decay():
    """y_t = Re(C sum_j lambda^(t - j) gamma B u_j) + d u_t, without resets, in float64."""
    module, (x, reset) = make("lru"), inputs()
    a = lambda x: np.asarray(x, np.float64)
    values = np.exp(-np.exp(a(module.nu[...])) + 1j * np.exp(a(module.log_angle[...])))
    gamma = np.sqrt(1 - np.abs(values) ** 2)
    B, C = [a(p[0]) + 1j * a(p[1]) for p in (module.B[...], module.C[...])]
    u = a(module.norm(x))
    taken = gamma * (u @ B.T)
    read = [sum(values ** (t - j) * taken[j] for j in range(t + 1)) @ C.T for t in range(STEPS)]
    y = nnx.gelu(jnp.array(np.real(read)) + module.feedthrough[...] * u)
    expected = x + module.value(y) * nnx.sigmoid(module.gate(y))
    start = module.initial_memory(BATCH)
    assert_close(unroll(module, start, x, reset & False)[1], expected, atol=1e-4)
    fresh = MEMORIES["lru"](SIZE, nnx.Rngs(0), states=1000)
    radius, angle = np.exp(-np.exp(fresh.nu[...])), np.exp(fresh.log_angle[...])
    assert 0.899 < radius.min() < 0.91 and 0.99 < radius.max() < 0.9991  # the ring of section 3.4
    assert 0 < angle.min() and angle.max() < np.pi / 10


@pytest.mark.thorough
def test_an_s5_layer_is_powers_of_its_eigenvalues():
    """y_t = 2 Re(C sum_j lambda^(t - j) B u_j) + d u_t, without resets, in float64."""
    module = MEMORIES["s5"](SIZE, nnx.Rngs(0), states=8, layers=1)
    (layer,), (x, reset) = module.layers, inputs()
    real, imag = np.asarray(layer.eigenvalues[...], np.float64)
    values = real + 1j * imag
    decay = np.exp(values * np.exp(np.asarray(layer.log_delta[...], np.float64)))
    B, C = [np.asarray(p[0] + 1j * p[1]) for p in (layer.B[...], layer.C[...])]
    u = np.asarray(layer.norm(x))
    taken = u @ (((decay - 1) / values)[:, None] * B).T
    read = [2 * sum(decay ** (t - j) * taken[j] for j in range(t + 1)) @ C.T for t in range(STEPS)]
    y = jnp.array(np.real(read)) + layer.feedthrough[...] * u
    expected = x + layer.value(nnx.gelu(y)) * nnx.sigmoid(layer.gate(nnx.gelu(y)))
    assert_close(
        unroll(module, module.initial_memory(BATCH), x, reset & False)[1], expected, atol=1e-4
    )


def test_hippo_s_eigenvalues_are_those_of_its_matrix():
    """Re = -1/2 for all, and with the vectors they make the normal matrix again (2208.04933, app. B)."""
    hippo = runpy.run_path(str(ROOT / "memories" / "s5.py"))["hippo"]
    values, vectors = hippo(16)
    p, n = np.sqrt(2 * np.arange(16) + 1), np.arange(16)
    normal = np.where(n[:, None] > n, -0.5, 0.5) * np.outer(p, p) * (
        n[:, None] != n
    ) - 0.5 * np.eye(16)
    again = 2 * np.real(vectors * values @ vectors.conj().T)
    np.testing.assert_allclose(again, normal, atol=1e-9)
    assert np.abs(values.imag).max() == pytest.approx(81, abs=1)


def test_ffm_s_traces_are_powers_of_gamma():
    module, (x, reset) = make("ffm"), inputs()
    S = unroll(module, module.initial_memory(BATCH), x, reset & False)[0]
    features, gate = jnp.split(module.inputs(x), 2, axis=-1)
    z = np.asarray(features * nnx.sigmoid(gate))
    gamma = -np.exp(module.log_alpha[...])[:, None] + 1j * np.exp(module.log_omega[...])
    expected = sum(np.exp(gamma * (STEPS - 1 - t)) * z[t][..., None] for t in range(STEPS))
    assert_close(S, expected, atol=1e-4)


@pytest.mark.thorough
def test_the_shm_is_its_recurrence_step_by_step():
    """In float64 and plain loops; begun where its random rows are about to repeat."""
    file = runpy.run_path(str(ROOT / "memories" / "shm.py"))
    module, (x, reset), m, draws = make("shm"), inputs(), 5, file["DRAWS"]
    reset = reset.at[:12, 0].set(False)
    memory = jnp.zeros((BATCH, m, m)), jnp.full(BATCH, draws - 3)
    (last, number), y = unroll(module, memory, x, reset)
    a, rows = lambda x: np.asarray(x, np.float64), len(module.theta[...])
    drawn = np.asarray(jax.random.randint(jax.random.key(0), (draws,), 0, rows))
    assert len(np.unique(drawn)) == rows  # all of them are drawn
    linear = lambda layer, x: x @ a(layer.kernel[...]) + a(layer.bias[...])
    for b in range(BATCH):
        M, seen = np.zeros((m, m)), draws - 3
        for t in range(STEPS):
            if reset[t, b]:
                M, seen = np.zeros((m, m)), 0
            u = a(x[t, b])
            u = (u - u.mean()) / np.sqrt(u.var() + 1e-6)
            K, Q, V, v_c, eta = np.split(linear(module.inputs, u), [m, 2 * m, 3 * m, 4 * m])
            K, Q = [np.maximum(z, 0) / (1e-5 + np.maximum(z, 0).sum()) for z in (K, Q)]
            factors = 1 + np.tanh(np.outer(a(module.theta[...])[drawn[seen % draws]], v_c))
            M = M * factors + np.outer(V / (1 + np.exp(-eta)), K)
            expected = linear(module.output, M @ Q + u @ a(module.skip.kernel[...]))
            np.testing.assert_allclose(y[t, b], expected, atol=1e-4, rtol=1e-3)
            seen += 1
        assert seen == number[b]
        np.testing.assert_allclose(last[b], M, atol=1e-4, rtol=1e-3)


@pytest.mark.thorough
def test_shm_without_calibration_is_linear_attention():
    """v_c = 0: every factor is 1."""
    module, (x, reset) = make("shm"), inputs()
    m = module.features
    kernel = module.inputs.kernel[...].at[:, 3 * m : 4 * m].set(0.0)
    plain = jax.tree.map(lambda x: x, module)
    plain.inputs.kernel[...] = kernel
    plain.inputs.bias[...] = plain.inputs.bias[...].at[3 * m : 4 * m].set(0.0)
    (M, age), _ = unroll(plain, plain.initial_memory(BATCH), x, reset & False)
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    K, _, V, _, eta = jnp.split(plain.inputs(normed), [m, 2 * m, 3 * m, 4 * m], axis=-1)
    K = nnx.relu(K) / (1e-5 + nnx.relu(K).sum(-1, keepdims=True))
    assert_close(M, jnp.einsum("tbi,tbj->bij", nnx.sigmoid(eta) * V, K), atol=1e-4)
    assert (age == STEPS).all()


def test_a_step_of_the_dnc_is_the_paper_s():
    """From a state of random numbers, in float64 and plain loops; the free list is sorted."""
    N, W, R, B = 5, 3, 2, 3
    module = make("dnc", slots=N, width=W, readers=R)
    keys, x = iter(jax.random.split(jax.random.key(4), 9)), inputs()[0][0, :B]
    state = jax.tree.map(
        lambda leaf: jax.random.uniform(next(keys), leaf.shape), module.initial_memory(B)
    )
    thin = lambda weights: 0.9 * weights / weights.sum(-1, keepdims=True)
    state = state._replace(  # weights are at most 1 in sum, and nothing was written after itself
        slots=2.0 * state.slots - 1.0,
        link=state.link * (1 - jnp.eye(N)) / N,
        precedence=thin(state.precedence),
        read_weights=thin(state.read_weights),
        write_weights=thin(state.write_weights),
    )
    after, y = module.step(state, x, jnp.zeros(B, bool))
    a = lambda x: np.asarray(x, np.float64)
    linear = lambda layer, *x: np.concatenate(x) @ a(layer.kernel[...]) + a(layer.bias[...])
    sigmoid, softmax = lambda x: 1 / (1 + np.exp(-x)), lambda x: np.exp(x) / np.exp(x).sum()

    def content(M, key, strength):
        cosine = [m @ key / np.sqrt((m @ m + 1e-6) * (key @ key + 1e-6)) for m in M]
        return softmax((1 + np.log1p(np.exp(strength))) * np.array(cosine))

    for b in range(B):
        M, u, L, p, w_r, w, reads, h, c = [a(leaf[b]) for leaf in state]
        i, f, g, o = np.split(linear(module.lstm, a(x[b]), reads, h), 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        sizes = np.cumsum([R * W, R, 3 * R, R, W, 1, W, W, 1])
        k_r, s_r, modes, free, k_w, s_w, erase, v, g_w, g_a = np.split(
            linear(module.interface, h), sizes
        )
        psi = np.prod([1 - sigmoid(free[r]) * w_r[r] for r in range(R)], axis=0)
        u = (u + w - u * w) * psi
        allocation, used = np.zeros(N), 1.0
        for slot in np.argsort(u):
            allocation[slot], used = (1 - u[slot]) * used, used * u[slot]
        found, (g_a,), (g_w,) = content(M, k_w, s_w[0]), sigmoid(g_a), sigmoid(g_w)
        w = g_w * (g_a * allocation + (1 - g_a) * found)
        M = M * (1 - np.outer(w, sigmoid(erase))) + np.outer(w, v)
        for one in range(N):
            for two in range(N):
                L[one, two] = (1 - w[one] - w[two]) * L[one, two] + w[one] * p[two]
        np.fill_diagonal(L, 0.0)
        p = (1 - w.sum()) * p + w
        for r in range(R):
            backward, forward, by_key = softmax(modes[3 * r : 3 * r + 3])
            read = content(M, k_r[W * r : W * r + W], s_r[r])
            w_r[r] = backward * L.T @ w_r[r] + forward * L @ w_r[r] + by_key * read
        reads = (w_r @ M).ravel()
        expected = M, u, L, p, w_r, w, reads, h, c
        for field, ours, theirs in zip(state._fields, after, expected, strict=True):
            np.testing.assert_allclose(ours[b], theirs, atol=2e-5, err_msg=field)
        assert_close(y[b], linear(module.output, h, reads), atol=2e-5)


@pytest.mark.thorough
def test_the_dnc_follows_what_was_written_after_and_before():
    """Told what to do by its biases: four steps write the unit vectors, each to a slot not yet in use; then
    one reader finds the first and one the third, and forward from the first, as backward from the third, is
    the second.
    """
    module = MEMORIES["dnc"](SIZE, nnx.Rngs(0), slots=4, width=4, readers=2)
    module.interface.kernel[...] = jnp.zeros_like(module.interface.kernel[...])
    state, x, no = module.initial_memory(1), jnp.zeros((1, SIZE)), jnp.zeros(1, bool)
    values, backward, forward, by_key = jnp.eye(4), [50, 0, 0], [0, 50, 0], [0, 0, 50]

    def step(state, value, modes, write):
        keys, strengths = [*values[0], *values[2]], [60, 60]
        free, key, strength, erase, gates = [-50, -50], [0] * 4, [0], [50] * 4, [write, 50]
        told = [*keys, *strengths, *modes, *free, *key, *strength, *erase, *value, *gates]
        module.interface.bias[...] = jnp.array(told, jnp.float32)
        return module.step(state, x, no)[0]

    for value in values:
        state = step(state, value, by_key * 2, write=50)
    assert_close(state.slots.sum(axis=1), jnp.ones((1, 4)), atol=1e-3)
    state = step(state, values[0], by_key * 2, write=-50)
    assert_close(state.reads.reshape(2, 4), values[jnp.array([0, 2])], atol=1e-3)
    state = step(state, values[0], forward + backward, write=-50)
    assert_close(state.reads.reshape(2, 4), values[jnp.array([1, 1])], atol=1e-2)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gpt2", "gtrxl"])
def test_no_gradient_flows_into_a_transformer_s_memory(name):
    module, (x, reset) = make(name), inputs()
    kept = lambda x: sum(y.sum() for y in unroll(module, used(name), x, reset)[0][0])
    assert jnp.all(jax.grad(kept)(x) == 0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gpt2", "gtrxl"])
@pytest.mark.parametrize(("layers", "length"), [(1, 4), (2, 3)])
def test_news_travels_layers_times_length_steps_and_no_farther(name, layers, length):
    (x, reset), module = inputs(steps=20), make(name, layers=layers, length=length)
    memory = module.initial_memory(BATCH)

    def changed(back):
        """How much the last answer changes with what was seen so many steps before."""
        other = x.at[19 - back].multiply(-1.0)
        one, two = [unroll(module, memory, x, reset & False)[1] for x in (x, other)]
        return jnp.abs(one - two)[19].max()

    assert changed(layers * length) > 1e-6 and changed(layers * length + 1) == 0


@pytest.mark.thorough
def test_the_gtrxl_is_ppo_gtrxl_s():
    """The same parameters, the same answers."""
    args = small_args("ppo_gtrxl", embed_dim=SIZE, num_heads=4, memory_length=5, num_layers=2)
    agent = jax.jit(ppo_gtrxl.make_train(args, real_env("ppo_gtrxl"))[0])(jax.random.key(0)).agent
    module, (x, reset) = make("gtrxl"), inputs()
    for theirs, ours in zip(agent.layers, module.layers, strict=True):
        for part in ("query", "key_value", "positions", "attention_output", "hidden", "output"):
            for kind in ("kernel", "bias"):
                getattr(getattr(theirs, part), kind)[...] = getattr(getattr(ours, part), kind)[...]
        theirs.content_bias[...] = ours.content_bias[...]
        theirs.position_bias[...] = ours.position_bias[...]
        for gate in ("gate_1", "gate_2"):
            for part in ("from_y", "from_x", "from_reset"):
                for kind in ("kernel", "bias"):
                    value = getattr(getattr(getattr(ours, gate), part), kind)[...]
                    getattr(getattr(getattr(theirs, gate), part), kind)[...] = value
            getattr(ours, gate).bias = getattr(theirs, gate).bias
    memory = agent.initial_memory(BATCH)
    ages = ppo_gtrxl.episode_ages(memory.age, reset)
    visible, y = ppo_gtrxl.visible_steps(ages, 5), x.swapaxes(0, 1)
    for n, layer in enumerate(agent.layers):
        y, _ = layer.unroll(y, memory.inputs[:, :, n], visible)
    assert_close(unroll(module, module.initial_memory(BATCH), x, reset)[1], y.swapaxes(0, 1))
