"""plot.py draws what stands in the runs; enjoy.py plays what a run has learned."""

import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from conftest import ROOT
from PIL import Image, ImageSequence
from scipy import stats

import enjoy
import plot
import ppo
import rppo
import run_policy

thorough = lambda x: pytest.param(x, marks=pytest.mark.thorough)

# === test_plot.py ===

METRIC = "charts/episodic_return"


def make_run(folder, script="ppo.py", task="gymnax::CartPole-v1", seeds=(1,), steps=11, **flags):
    """Seed s has the return 100 s + step / 10, and nan in the first row."""
    folder.mkdir()
    args = {"env_id": task, "seed": seeds[0], "num_seeds": len(seeds)} | flags
    (folder / "config.json").write_text(json.dumps({"script": script, "args": args}))
    with (folder / "metrics.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "seconds", "seed", METRIC])
        for step in range(0, 10 * steps, 10):
            for seed in seeds:
                value = 100 * seed + step / 10 if step else np.nan
                writer.writerow([step, 5 + step / seed, seed, value])
    return folder


def test_a_line_is_the_interquartile_mean_and_its_interval(tmp_path):
    folders = [make_run(tmp_path / f"{seed}", seeds=(seed,)) for seed in (1, 2, 3, 40)]
    runs = [plot.read_run(folder, METRIC) for folder in folders]
    ((label, curves),) = plot.lines_of(runs).items()
    assert label == "ppo.py" and len(curves) == 4
    grid, middle, low, high = plot.summarize(curves, "steps")
    assert (grid[0], grid[-1]) == (10, 100)  # nan is no value
    np.testing.assert_allclose(middle, 250 + grid / 10)  # of 100, 200, 300, 4000
    ends = np.array([[100.0], [200.0], [300.0], [4000.0]])
    iqm = lambda x, axis: stats.trim_mean(x, 0.25, axis=axis)
    expected = stats.bootstrap((ends[:, 0],), iqm, method="percentile", rng=1, axis=0)
    expected = expected.confidence_interval
    assert low[0] - 1 == pytest.approx(expected.low, abs=1)
    assert high[0] - 1 == pytest.approx(expected.high, rel=0.05)


def test_a_line_ends_with_its_shortest_seed_and_counts_from_the_launch(tmp_path):
    runs = [make_run(tmp_path / "a", seeds=(1,)), make_run(tmp_path / "b", seeds=(2,), steps=6)]
    curves = [plot.read_run(folder, METRIC).curves[0] for folder in runs]
    assert plot.summarize(curves, "steps")[0][-1] == 50
    seconds, middle, *_ = plot.summarize(curves, "seconds")
    assert (seconds[0], seconds[-1]) == (15, 30)  # 5 + 10 / 1, 5 + 50 / 2
    np.testing.assert_allclose(middle[-1], np.mean([100 + 2.5, 200 + 5]))


def test_seeds_of_one_run_and_of_many_are_the_same_line(tmp_path):
    together = make_run(tmp_path / "one", seeds=(1, 2, 3))
    apart = [make_run(tmp_path / f"{seed}", seeds=(seed,)) for seed in (1, 2, 3)]
    lines = [plot.lines_of([plot.read_run(x, METRIC) for x in xs]) for xs in ([together], apart)]
    for one, other in zip(lines[0]["ppo.py"], lines[1]["ppo.py"], strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_what_differs_has_a_line_of_its_own(tmp_path):
    runs = [
        make_run(tmp_path / "a", learning_rate=0.1),
        make_run(tmp_path / "b", learning_rate=0.2),
        make_run(tmp_path / "c", learning_rate=0.2, seeds=(2,)),
        make_run(tmp_path / "d", script="dqn.py", learning_rate=0.3),
    ]
    lines = plot.lines_of([plot.read_run(folder, METRIC) for folder in runs])
    assert {label: len(curves) for label, curves in lines.items()} == {
        "ppo.py --learning-rate 0.1": 1,
        "ppo.py --learning-rate 0.2": 2,
        "dqn.py": 1,
    }


def draw(*flags, cwd):
    command = [sys.executable, str(ROOT / "plot.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)


@pytest.mark.thorough
def test_the_picture_has_a_row_for_each_task_and_names_each_line(tmp_path):
    make_run(tmp_path / "a", seeds=(1, 2))
    make_run(tmp_path / "b", script="dqn.py", task="gymnax::Acrobot-v1")
    done = draw("a", "b", "--out", "pictures/both", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 seeds of 2 runs" in done.stdout
    assert (tmp_path / "pictures/both.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    svg = (tmp_path / "pictures/both.svg").read_text()
    for text in ("ppo.py (2 seeds)", "dqn.py (1 seed)", "CartPole-v1", "Acrobot-v1"):
        assert text in svg
    assert svg.count("environment steps") == svg.count("seconds since the launch") == 2


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("", "name the folders of runs"),
        ("broken", "broken is no run: it needs a config.json and a metrics.csv"),
        ("a b", "ppo.py has seed 1 twice; leave one of the runs out"),
        ("a --metric losses/nothing", "has no losses/nothing, but charts/episodic_return"),
    ],
)
def test_plot_s_bad_input_is_one_clear_line_and_status_2(tmp_path, flags, hint):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    (make_run(tmp_path / "broken") / "config.json").write_text("{}")
    done = draw(*flags.split(), cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert hint in done.stderr and {x.name for x in tmp_path.iterdir()} == {"a", "b", "broken"}


def test_a_folder_in_which_nothing_has_begun_is_left_out(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "begun").mkdir()
    done = draw("a", "begun", cwd=tmp_path)
    assert done.returncode == 0 and "begun is left out" in done.stderr
    assert "1 seed of 1 run" in done.stdout


# === test_enjoy.py ===

RUNS = {  # a memory and two seeds; a normaliser and Gymnasium; actors and EnvPool
    "ppo_lstm": "--env-id gymnax::CartPole-v1 --mask-obs 1 3 --num-envs 16 --num-steps 32 "
    "--num-minibatches 4 --num-seeds 2",
    "ppo_continuous": "--env-id gymnasium::Pendulum-v1 --num-envs 4 --num-steps 128 --norm-obs "
    "--num-minibatches 4",
    "impala": "--env-id envpool::CartPole-v1 --num-envs 16 --num-steps 32 --num-minibatches 4 "
    "--num-actor-threads 2",
}


def run(script, *flags, cwd):
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def frames(path):
    with Image.open(path) as image:
        return [np.asarray(x.convert("RGB")) for x in ImageSequence.Iterator(image)]


@pytest.mark.thorough
@pytest.mark.parametrize("name", RUNS)
def test_the_returns_are_those_of_the_evaluation_and_an_episode_is_drawn(tmp_path, name):
    flags = [*RUNS[name].split(), "--total-timesteps", 512 * 8, "--eval-episodes", 5]
    done = run(f"{name}.py", *flags, "--run-dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "here/evaluation.json").read_text())
    for seed in evaluation["seeds"]:
        draw = "--draw" if seed == evaluation["seeds"][-1] else "--no-draw"
        done = run("enjoy.py", "here", "--seed", seed["seed"], draw, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        numbers = re.search(r"over 5 episodes: (\S+) \+- (\S+), (\S+) to (\S+),", done.stdout)
        for number, key in zip(numbers.groups(), ("mean", "std", "min", "max"), strict=True):
            assert float(number) == pytest.approx(seed[key], abs=0.06), key
    pictures, total = re.search(r"gif: (\d+) pictures .* return (\S+)", done.stdout).groups()
    drawn = frames(tmp_path / "here/episode.gif")
    assert drawn[0].shape[1] == 320 and drawn[0].std() > 5  # not blank
    moves = [np.abs(x.astype(int) - y).sum() > 0 for x, y in zip(drawn, drawn[1:], strict=False)]
    assert np.mean(moves) > 0.3
    # In CartPole a reward of 1 for each step; EnvPool's last picture is the next episode's.
    if "CartPole" in RUNS[name]:
        assert int(pictures) == float(total) - ("envpool" in RUNS[name])
    if "Pendulum" in RUNS[name]:  # the steps within a repeated action too
        assert int(pictures) == 200 + 1


@pytest.mark.thorough
@pytest.mark.parametrize("name", RUNS)
def test_a_policy_is_exported_and_acts_without_jax(tmp_path, name):
    flags = [*RUNS[name].split(), "--total-timesteps", 512, "--eval-episodes", 0]
    done = run(f"{name}.py", *flags, "--run-dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run("enjoy.py", "here", "--export", tmp_path / "out/policy.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    program = """if True:
        import sys; sys.modules["jax"] = None
        from run_policy import Policy
        import numpy as np
        policy = Policy("policy.npz")
        obs = np.ones(4 if "Cart" in sys.argv[1] else 3, np.float32)
        print(policy(obs, policy.memory, first=True)[0])
    """
    command = [sys.executable, "-c", program, RUNS[name]]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True)
    assert re.fullmatch(r"[01]|\[-?[\d.]+\]", done.stdout.strip()), done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["ppo_continuous", "impala"])  # seeds alone decide what they meet
def test_a_policy_taken_along_has_the_returns_of_the_evaluation(tmp_path, monkeypatch, name):
    """In your own loop, one episode in each environment: run_policy.py, and enjoy.load_policy."""
    flags = [*RUNS[name].split(), "--total-timesteps", 512 * 8, "--eval-episodes", 5]
    done = run(f"{name}.py", *flags, "--run-dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wanted,) = json.loads((tmp_path / "here/evaluation.json").read_text())["seeds"]
    done = run("enjoy.py", "here", "--export", "policy.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.setitem(sys.modules, name, importlib.import_module(name))  # enjoy.py loads its own
    script, args = enjoy.load_script(tmp_path / "here")
    act, _ = enjoy.load_policy(tmp_path / "here")
    for policy in (run_policy.Policy(tmp_path / "policy.npz"), act):
        env = enjoy.make_env(script, args, 5, args.seed + 2**30)
        env_state, obs = env.reset(jax.random.key(0))
        returns, alive = np.zeros(5), np.ones(5, bool)
        while alive.any():
            action = jnp.stack([policy(x)[0] for x in np.asarray(obs)])
            env_state, timestep = env.step(jax.random.key(0), env_state, action)
            returns += alive * np.asarray(timestep.reward)
            alive &= ~np.asarray(timestep.terminated | timestep.truncated)
            obs = timestep.obs
        assert returns.mean() == pytest.approx(wanted["mean"], rel=1e-3)
        assert returns.std() == pytest.approx(wanted["std"], rel=1e-2)


@pytest.mark.thorough
def test_a_policy_is_loaded_in_python_with_its_memory_and_its_masks(tmp_path, monkeypatch, capsys):
    flags = [*RUNS["ppo_lstm"].split(), "--total-timesteps", 512, "--eval-episodes", 0]
    assert run("ppo_lstm.py", *flags, "--run-dir", "here", cwd=tmp_path).returncode == 0
    done = run("enjoy.py", "here", "--seed", 2, "--export", "policy.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.setitem(sys.modules, "ppo_lstm", importlib.import_module("ppo_lstm"))
    act, memory = enjoy.load_policy(tmp_path / "here", seed=2)
    policy = run_policy.Policy(tmp_path / "policy.npz")
    many = jax.vmap(act, (0, None, None))
    obs, own = np.random.default_rng(0).normal(size=(20, 4)), policy.memory
    for number, x in enumerate(obs):
        first = number in (0, 13)
        np.testing.assert_array_equal(many(x[None], memory, first)[0][0], act(x, memory, first)[0])
        action, memory = act(x, memory, first)
        expected, _, own = policy(np.float32(x), own, first)
        assert action == expected
        for ours, theirs in zip(memory, own, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(SystemExit):
        enjoy.load_policy(tmp_path / "here", seed=0)
    assert "--seed 0 is not in this run, whose seeds are 1 to 2" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_policy_that_computes_in_bfloat16_is_exported_in_float32(tmp_path):
    flags = "--env-id gymnax::CartPole-v1 --num-envs 4 --num-steps 16 --num-minibatches 2"
    flags += " --window-length 8 --memory-length 8 --total-timesteps 128 --eval-episodes 0"
    flags = [*flags.split(), "--compute-dtype", "bfloat16", "--run-dir", "here"]
    assert run("ppo_trxl.py", *flags, cwd=tmp_path).returncode == 0
    done = run("enjoy.py", "here", "--export", "policy.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    policy = run_policy.Policy(tmp_path / "policy.npz")
    action, scores, _ = policy(np.ones(4, np.float32), policy.memory, first=True)
    assert action in (0, 1) and scores.dtype == np.float32


# Weights and memories of any kind; a normaliser, masked entries, bounds, screens, observations of parts.
EXPORTED = {
    "ppo": "--env-id gymnax::CartPole-v1 --mask-obs 1",
    "ppo_continuous": "--norm-obs",
    "ppo_lstm": "",
}
EXPORTED_TOO = {
    "ppo of screens": "--env-id envpool::Pong-v5",
    **dict.fromkeys(
        ("a2c", "impala", "pqn", "rpqn", "td3", "sacd", "rsacd", "rppo_continuous"), ""
    ),
    "ppo_trxl": "--env-id gymnax::CartPole-v1 --memory-length 8",
    "dqn": "",
    "ppo_gtrxl": "--env-id gymnax::CartPole-v1 --memory-length 8",
    "sac": "",
    "sac with SimBa": "--block-type simba --norm-obs",
    "rsac": "",
    "drqn": "",
    "impala_lstm": "",
    **{f"rppo {x.stem}": f"--memory {x.stem}" for x in (ROOT / "memories").glob("*.py")},
}
CHAOTIC = ("rppo dnc",)  # equal usages are told apart by their last digits: 50 observations
SHORTER = {*EXPORTED_TOO} - {
    "ppo of screens",
    "ppo_gtrxl",
    "sac",
    *CHAOTIC,
}  # 1,000; others: 10,000


@pytest.mark.parametrize("name", [*EXPORTED, *[thorough(x) for x in EXPORTED_TOO]])
def test_an_exported_policy_does_what_the_agent_does(tmp_path, name):
    """Observations one after the other, with episodes of 73 steps: scores and actions."""
    flags = (EXPORTED | EXPORTED_TOO)[name]
    script = importlib.import_module(name.split()[0])
    args = tyro.cli(script.Args, args=["--num-envs", "4", *flags.split()])
    env = script.make_env(args.env_id, 4, 0, args.env_kwargs, args.mask_obs)
    state = jax.jit(script.make_train(args, env)[0])(jax.random.key(1))
    if getattr(state, "obs_stats", None):
        state = state._replace(obs_stats=jax.tree.map(lambda x: x + 0.5, state.obs_stats))
    where = "agent" if hasattr(state, "agent") else "learner"
    state = state._replace(**{where: noisy(getattr(state, where))})
    enjoy.export(script, args, state, tmp_path / "policy.npz")
    enjoy.export(script, args, state, tmp_path / "policy.stablehlo")
    policy = run_policy.Policy(tmp_path / "policy.npz")
    exported = jax.export.deserialize((tmp_path / "policy.stablehlo").read_bytes())
    one = enjoy.make_env(script, args, 1, 0)
    step, (example,), memory = enjoy.greedy_step(script, args, state, one)

    draw = np.random.default_rng(0)
    length = 50 if name in CHAOTIC else 1_000 if name in SHORTER else 10_000
    if example.dtype == np.uint8:
        obs = draw.integers(0, 256, (length, *example.shape), np.uint8)
    else:
        obs = np.float32(draw.normal(size=(length, *example.shape)))
    first = np.arange(length) % 73 == 0

    def acts(step, memory):
        def act(memory, given):
            action, memory = step([given[0]], given[1][None], memory)
            return memory, action[0]

        return jax.jit(lambda *x: jax.lax.scan(act, *x))(memory, (obs, first))[1]

    expected = acts(step, memory)
    *_, zeros = jax.tree.unflatten(exported.in_tree, exported.in_avals)[
        0
    ]  # not read at a first step
    zeros = [np.zeros(x.shape, x.dtype) for x in zeros]
    by_export = acts(exported.call, zeros)
    own, actions, scores = policy.memory, [], []
    for x, begins in zip(obs, first, strict=True):
        action, score, own = policy(x[0], own, begins)
        actions.append(action)
        scores.append(score)
    assert np.std(scores, axis=0).max() > 0.01  # they depend on what is seen
    if np.ndim(actions[0]):
        np.testing.assert_allclose(actions, expected, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(by_export, expected, atol=1e-5, rtol=1e-5)
        return
    best = np.sort(scores, axis=1)
    clear = best[:, -1] - best[:, -2] > 1e-5  # of the others, rounding may choose
    assert clear.mean() > 0.9
    for some in (actions, by_export):
        np.testing.assert_array_equal(np.array(some)[clear], np.asarray(expected)[clear])
    shaped = jax.vmap(lambda x: script.shape_obs(args.mask_obs, x))(obs)
    agent = state.learner.actor if where == "learner" else state.agent
    if hasattr(agent, "history"):  # rsacd.py acts on more than observations
        return
    if hasattr(agent, "step"):
        start = getattr(agent, "open", lambda x: x)(agent.initial_memory(1))
        look = lambda memory, given: agent.step(memory, given[0], given[1][None])[:2]
        scored = jax.lax.scan(look, start, (shaped, first))[1]
    else:
        scored = jax.lax.map(agent, shaped)
        scored = scored[0] if isinstance(scored, tuple) else scored
    np.testing.assert_allclose(scores, scored[:, 0], atol=1e-5, rtol=1e-5)


def noisy(agent):
    """With every parameter perturbed: a fresh actor's last layer would hide errors, its outputs being
    near 0."""
    leaves, structure = jax.tree.flatten(agent)
    draw = np.random.default_rng(1)
    made = [x + np.asarray(draw.normal(0, 0.1, x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, made)


def test_what_runs_an_exported_policy_needs_nothing_but_numpy():
    text = (ROOT / "run_policy.py").read_text()
    imports = re.findall(r"^ *(?:import|from) (\S+)", text, re.MULTILINE)
    assert imports == ["json", "numpy"] and len(text.splitlines()) <= 60


def test_a_policy_that_numpy_cannot_run_is_refused_in_one_line(tmp_path, capsys):
    args = rppo.Args(memory=str(tmp_path / "mine.py:Sorts"), num_envs=4)
    text = (ROOT / "memories/none.py").read_text().replace("class Memory", "class Sorts")
    (tmp_path / "mine.py").write_text(
        re.sub(r"return (\w+), x$", r"return \1, jnp.sort(x)", text, flags=re.M)
    )
    env = rppo.make_env(args.env_id, 4, 0, args.env_kwargs, args.mask_obs)
    state = rppo.make_train(args, env)[0](jax.random.key(1))
    with pytest.raises(SystemExit):
        enjoy.export(rppo, args, state, tmp_path / "policy.npz")
    assert "run_policy.py knows no sort" in capsys.readouterr().err


@pytest.mark.thorough
def test_enjoy_s_bad_input_is_one_clear_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ppo", ppo)  # enjoy.py loads its own; put this one back

    def refused(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            enjoy.main(tyro.cli(enjoy.Args, args=list(map(str, flags))))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.splitlines()) == 1, error
        return error

    flags = "--env-id gymnax::MemoryChain-bsuite --num-envs 4 --num-steps 16 --num-minibatches 4"
    flags = [*flags.split(), "--total-timesteps", 64, "--eval-episodes", 2, "--run-dir", "here"]
    assert run("ppo.py", *flags, cwd=tmp_path).returncode == 0
    assert "holds no config.json of a run" in refused("nowhere")
    assert "--seed 7 is not in this run, whose seeds are 1 to 1" in refused("here", "--seed", 7)
    assert "must end in .gif" in refused("here", "--out", "film.mov")
    assert "must end in .npz or .stablehlo" in refused("here", "--export", "policy.onnx")
    assert "no pictures of MemoryChain-bsuite: --no-draw prints" in refused("here")
    enjoy.main(enjoy.Args(Path("here"), draw=False))
    config = tmp_path / "here/config.json"
    config.write_text(config.read_text().replace('"ppo.py"', '"mine.py"'))
    assert "a run of mine.py: put that script beside enjoy.py" in refused("here")
    shutil.rmtree(tmp_path / "here/checkpoints")
    config.write_text(config.read_text().replace('"mine.py"', '"ppo.py"'))
    assert "no checkpoint" in refused("here")
