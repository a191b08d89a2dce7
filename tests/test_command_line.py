"""The scripts as their users meet them: run, stop, resume, and what they say to bad input.

What is plumbing, the same text in all (tests/copies.py), is tried with ppo.py alone.
"""

import ast
import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest
from probes import ALL_SCRIPTS, CONTINUOUS, DISTINCT

import enjoy
import ppo
import pqn
import rppo

SCRIPT = Path(ppo.__file__)
SHORT = ["--env-id", "gymnax::CartPole-v1", "--total-timesteps", "16384", "--num-envs", "16"]
SHORT += ["--num-steps", "32", "--num-minibatches", "4", "--eval-episodes", "5"]
# In all of them, an iteration has 512 steps.
SHORT_RUNS = {
    "ppo": SHORT,
    "a2c": "--env-id gymnax::CartPole-v1 --num-envs 16 --num-steps 32",
    "ppo_continuous": "--num-envs 16 --num-steps 32 --num-minibatches 4 --norm-obs --norm-reward",
    "dqn": "--num-envs 8 --num-steps 64 --learning-starts 600 --buffer-size 900 --max-grad-norm 10 "
    "--n-step 3 --prioritized-replay",
    "sac": "--num-envs 8 --num-steps 64 --learning-starts 600 --buffer-size 900 "
    "--updates-per-step .05 --block-type simba --norm-obs --actor-hidden-size 16 --critic-hidden-size 16 "
    "--prioritized-replay --linear-decay-sampling --monitor-gradients --decay-steps 500",
    "sacd": "--num-envs 8 --num-steps 64 --learning-starts 600 --buffer-size 900 "
    "--updates-per-step .05 --actor-hidden-size 16 --critic-hidden-size 16 --q-clip .5 "
    "--aggregate mean --no-critic-entropy",
    "td3": "--num-envs 8 --num-steps 64 --learning-starts 600 --buffer-size 900 "
    "--updates-per-step .05 --actor-hidden-size 16 --critic-hidden-size 16 --norm-obs --anneal-lr "
    "--prioritized-replay --linear-decay-sampling --monitor-gradients --max-grad-norm 1",
    "pqn": "--env-id gymnax::CartPole-v1 --num-envs 16 --num-steps 32 --num-minibatches 4",
    "impala": "--env-id gymnax::CartPole-v1 --num-envs 16 --num-steps 32 --num-minibatches 4 "
    "--num-actor-threads 2",
}
SHORT_RUNS["ppo_lstm"] = (
    SHORT_RUNS["a2c"] + " --num-minibatches 4 --recompute-carries --chrono-length 20"
)
SHORT_RUNS["rppo"] = SHORT_RUNS["a2c"] + " --num-minibatches 4 --no-shared-encoder --embed-dim 16"
SHORT_RUNS["rpqn"] = SHORT_RUNS["pqn"] + " --embed-dim 16 --hidden-size 16"
SHORT_RUNS["drqn"] = (
    "--num-envs 16 --num-steps 32 --learning-starts 1500 --buffer-size 2100 --batch-size 16 "
    "--train-frequency 64 --embed-dim 16 --hidden-size 16 --max-grad-norm 10 --burn-in 4 --n-step 3 "
    "--rescale-values --prioritized-replay"
)
SHORT_RUNS["rsac"] = SHORT_RUNS["rsacd"] = (
    "--num-envs 16 --num-steps 32 --learning-starts 1500 --buffer-size 2100 --batch-size 16 "
    "--updates-per-step .02 --embed-dim 16 --actor-hidden-size 16 --critic-hidden-size 16 --burn-in 4 "
    "--previous-reward --max-grad-norm 10"
)
SHORT_RUNS["rsacd"] += " --anneal-lr --aggregate mean --no-critic-entropy --no-previous-action"
SHORT_RUNS["impala_lstm"] = SHORT_RUNS["impala"] + " --embed-dim 16"
SHORT_RUNS["rppo_continuous"] = (
    "--num-envs 16 --num-steps 32 --num-minibatches 4 --sequence-length 16 --burn-in 4 "
    "--recompute-advantages"
)
SHORT_RUNS["ppo_trxl"] = (
    SHORT_RUNS["a2c"] + " --num-minibatches 4 --memory-length 10 --window-length 16 --embed-dim 16"
)
SHORT_RUNS["ppo_gtrxl"] = SHORT_RUNS["ppo_trxl_pmap"] = SHORT_RUNS["ppo_trxl"] + " --num-layers 1"
for name in set(SHORT_RUNS) - {"ppo"}:
    SHORT_RUNS[name] = SHORT_RUNS[name].split()
    SHORT_RUNS[name] += ["--total-timesteps", "16384", "--eval-episodes", "5"]


def run(*flags, cwd, script=SCRIPT, timeout=300, **environment):
    command = [sys.executable, str(script), *map(str, flags)]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
    )


def rows(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def timeless(run_dir):
    """metrics.csv without the two columns that hold the clock."""
    clock = {"seconds", "charts/SPS"}
    return [{k: v for k, v in row.items() if k not in clock} for row in rows(run_dir)]


def last_checkpoint(run_dir):
    steps = [int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


# --- A run and its files --------------------------------------------------------------------------


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    """-> run(name, flags): the script's main as the command line calls it, without a process for it."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.chdir(tmp_path)

    def run(name, *flags):
        script = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        return script.main(script.parse_args())

    yield run
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == handlers  # what a run does with signals ends with its training


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_a_short_run_leaves_its_files_and_goes_on(name, in_process, capfd):
    """Six iterations and an evaluation; then the last two again, and exactly, by --resume."""
    flags = [*SHORT_RUNS[name], "--total-timesteps", 3072, "--run-dir", "here"]
    run_dir = in_process(name, *flags, "--checkpoint-every", 4)
    files = {"config.json", "metrics.csv", "learning_curve.png", "evaluation.json", "checkpoints"}
    assert {path.name for path in run_dir.iterdir()} == files
    assert "greedy return over 5 episodes" in capfd.readouterr().out
    metrics, whole = rows(run_dir), timeless(run_dir)
    assert metrics[-1]["step"] == "3072" and last_checkpoint(run_dir) == 6
    shutil.rmtree(run_dir / "checkpoints" / "6")
    in_process(name, "--resume", "here", "--eval-episodes", 0)
    assert timeless(run_dir) == whole and last_checkpoint(run_dir) == 6
    losses = {key: float(x) for key, x in metrics[-1].items() if key.startswith("losses/")}
    assert len(losses) >= 2 and np.isfinite(list(losses.values())).all()
    if name == "ppo":  # and on beyond what was asked for first
        in_process(name, "--resume", "here", "--total-timesteps", 4096, "--eval-episodes", 0)
        assert timeless(run_dir)[: len(whole)] == whole and last_checkpoint(run_dir) == 8


def test_a_row_holds_the_mean_loss_of_its_call_and_the_last_of_all_else():
    def train_iteration(state):
        return state + 1, {"losses/loss": 1.0 * state, "charts/episodes": state}

    init = lambda key: jax.numpy.int32(3)
    state, train = ppo.compile_training(ppo.Args(), init, train_iteration)
    state, metrics = train(state, 4)
    assert state == 7 and metrics == {"losses/loss": (3 + 4 + 5 + 6) / 4, "charts/episodes": 6}


@pytest.mark.thorough
def test_a_seed_among_several_is_judged_in_the_episodes_of_that_seed_alone(in_process):
    """With a step size of 0 the agents are the same, and so must be their greedy returns."""
    flags = [*SHORT, "--total-timesteps", 1024, "--learning-rate", 0]
    several = in_process("ppo", *flags, "--num-seeds", 2, "--run-dir", "several")
    alone = in_process("ppo", *flags, "--seed", 2, "--run-dir", "alone")
    read = lambda run_dir: json.loads((run_dir / "evaluation.json").read_text())["seeds"]
    assert read(several)[1] == read(alone)[0] != read(several)[0] | {"seed": 2}


def needs(name):
    """-> the packages that the script's first lines name, and what it imports."""
    text = SCRIPT.with_name(f"{name}.py").read_text()
    block, imported = text.partition("# ///\n")[0], set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            imported.add(ast.unparse(node.args[0]).strip("'"))
    return block, {name.split(".")[0] for name in imported} - sys.stdlib_module_names


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_a_script_names_and_imports_what_one_of_two_does(name):
    assert needs(name) in [needs("ppo"), needs("dqn")]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_the_packages_that_a_script_names_are_enough(name, tmp_path):
    """In an environment made from its own block, as `uv run` makes it: all name and import the same."""
    shutil.copy(SCRIPT.with_name(f"{name}.py"), tmp_path)
    uv = [sys.executable, "-m", "uv", "run", "--no-project", "--python", sys.executable]
    command = [*uv, f"{name}.py", *SHORT_RUNS[name], "--total-timesteps", 2048]
    environment = {
        key: x for key, x in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")
    }
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "greedy return over 5 episodes" in done.stdout


@pytest.mark.thorough
def test_thirty_two_seeds_learn_in_one_program_and_are_drawn(tmp_path):
    """Of MinAtar's Breakout, where random play has half a point and each of these had 4 or more."""
    flags = "--num-seeds 32 --total-timesteps 65536 --num-envs 16 --exploration-fraction 0.3"
    flags = [*flags.split(), "--eval-episodes", 20, "--run-dir", "here"]
    done = run(*flags, cwd=tmp_path, script=SCRIPT.with_name("pqn.py"), XLA_FLAGS="")
    assert done.returncode == 0 and "Warning" not in done.stderr, (
        done.stderr
    )  # a legend of 32 lines
    seeds = json.loads((tmp_path / "here/evaluation.json").read_text())["seeds"]
    means = [seed["mean"] for seed in seeds]
    assert len(set(means)) > 10 and min(means) > 2


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["ppo", "a2c", "ppo_gtrxl", "ppo_trxl_pmap"])  # others: see below
def test_the_script_runs_copied_alone_into_an_empty_folder(tmp_path, name):
    shutil.copy(SCRIPT.with_name(f"{name}.py"), tmp_path / "mine.py")
    programs = {"XLA_FLAGS": "--xla_dump_to=hlo", "JAX_COMPILATION_CACHE_DIR": "cache"}
    done = run(*SHORT_RUNS[name], "--num-seeds", 2, cwd=tmp_path, script="mine.py", **programs)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"mine__gymnax-\w+-v1__1__\d{8}-\d{6}-\d+", run_dir.name)
    assert run_dir.name in done.stdout and "greedy return over 5 episodes" in done.stdout
    assert "\r" not in done.stdout  # plain lines where there is no terminal

    metrics = rows(run_dir)
    assert list(metrics[0])[:3] == ["step", "seconds", "seed"]
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {x for x in metrics[0] if x.startswith("losses/")}
    assert len(expected) >= 6
    assert expected <= set(metrics[0])
    assert [(row["step"], row["seed"]) for row in metrics[-2:]] == [("16384", "1"), ("16384", "2")]
    assert any(metrics[-1][x] != metrics[-2][x] for x in expected)  # two seeds
    assert (run_dir / "learning_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert last_checkpoint(run_dir) == 32
    config = json.loads((run_dir / "config.json").read_text())
    assert config["script"] == "mine.py" and config["args"]["num_seeds"] == 2
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert [seed["seed"] for seed in evaluation["seeds"]] == [1, 2]
    for seed in evaluation["seeds"]:
        assert seed["episodes"] == 5 and seed["min"] <= seed["mean"] <= seed["max"]
    low, high = evaluation["iqm_ci95"]
    assert low <= evaluation["iqm"] <= high

    # Two batched QR factorisations at the same time would wait for each other on two cores.
    programs = [path.read_text() for path in (tmp_path / "hlo").glob("*before_optimizations.txt")]
    factorised = re.findall(r"= \(f32\[([\d,]+)\][^=]*custom-call.*geqrf", "\n".join(programs))
    assert factorised and all(shape.count(",") == 1 for shape in factorised)


@pytest.mark.parametrize(
    ("flags", "threads"),
    [
        ({"num_envs": 32, "num_steps": 64, "num_minibatches": 16, "hidden_size": 64}, "1"),
        ({"num_envs": 32, "num_steps": 64, "num_minibatches": 16, "hidden_size": 256}, None),
        ({"num_envs": 32, "num_steps": 64, "hidden_size": 64, "num_seeds": 8}, None),
        ({}, None),  # those of images are the same
    ],
)
def test_small_networks_get_one_thread_unless_the_user_says_otherwise(flags, threads, monkeypatch):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    pqn.use_one_thread(pqn.Args(**flags))
    assert os.environ.pop("PJRT_NPROC", None) == threads
    monkeypatch.setenv("PJRT_NPROC", "3")
    pqn.use_one_thread(pqn.Args(**flags))
    assert os.environ["PJRT_NPROC"] == "3"


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("hidden_size", [64, 256])
def test_the_command_line_starts_jax_with_as_many_threads(hidden_size, tmp_path):
    flags = (
        f"--num-minibatches 8 --hidden-size {hidden_size} --total-timesteps 2048 --eval-episodes 0"
    )
    program = f"""if True:
        import os, pathlib, runpy, sys
        sys.argv = ["pqn.py", *{[*SHORT[:2], *flags.split()]}]
        runpy.run_path({str(SCRIPT.with_name("pqn.py"))!r}, run_name="__main__")
        names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
        print(sum("XLAEigen" in name for name in names))
    """
    command = [sys.executable, "-c", program]
    environment = {k: v for k, v in os.environ.items() if k != "PJRT_NPROC"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=True, **options)
    cores = len(os.sched_getaffinity(0))
    assert int(done.stdout.split()[-1]) == (1 if hidden_size == 64 else cores)


@pytest.mark.thorough
def test_target_return_stops_the_run(tmp_path):
    done = run(*SHORT, "--total-timesteps", 500_000, "--target-return", 100, cwd=tmp_path)
    assert "return 1" in done.stdout.splitlines()[-2], done.stdout + done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    metrics = rows(run_dir)
    before, last = [float(row["charts/episodic_return"]) for row in metrics[-2:]]
    assert before < 100 <= last
    assert int(metrics[-1]["step"]) < 500_000


@pytest.mark.thorough
def test_tensorboard_and_offline_weights_and_biases(tmp_path):
    flags = [*SHORT, "--tensorboard", "--track", "--run-dir", "here"]
    done = run(*flags, cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "here").glob("events.out.tfevents.*"))
    assert list((tmp_path / "here" / "wandb").glob("offline-run-*"))


# --- Stop and resume ------------------------------------------------------------------------------


def start(*flags, cwd, script=SCRIPT):
    """The script as a child process with its output in `output`."""
    with open(cwd / "output", "a") as output:
        command = [sys.executable, str(script), *map(str, flags)]
        return subprocess.Popen(command, cwd=cwd, stdout=output, stderr=output)


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end
        time.sleep(0.01)


@pytest.mark.thorough
@pytest.mark.parametrize(  # a2c.py's state is that of ppo.py
    ("name", "num_seeds"), [(name, 1 + (name == "ppo")) for name in DISTINCT if name != "a2c"]
)
def test_a_killed_run_resumes_exactly(tmp_path, name, num_seeds):
    """N + M iterations equal N, SIGKILL, resume, M: bit for bit, metrics.csv and last state, with
    statistics, replay buffer and the rollouts that actor threads have under way. The script is alone in an
    empty folder."""
    script, module = tmp_path / "mine.py", importlib.import_module(name)
    shutil.copy(SCRIPT.with_name(f"{name}.py"), script)
    flags = [*SHORT_RUNS[name], "--total-timesteps", 51_200, "--checkpoint-every", 10]
    flags += ["--num-seeds", num_seeds]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(*flags, "--run-dir", whole, cwd=tmp_path, script=script)
    assert done.returncode == 0 and "greedy return over 5 episodes" in done.stdout, done.stderr
    files = {"config.json", "metrics.csv", "learning_curve.png", "evaluation.json", "checkpoints"}
    assert {path.name for path in whole.iterdir()} == files
    assert {"charts/episodic_return", "charts/SPS"} <= set(rows(whole)[0])

    process = start(*flags, "--run-dir", killed, cwd=tmp_path, script=script)
    wait_for(lambda: last_checkpoint(killed) >= 20, process)
    process.kill()
    process.wait()
    iteration = last_checkpoint(killed)
    assert 20 <= iteration < 100
    # What a kill in the middle of a write leaves behind: a torn row, rows after the checkpoint,
    # and a checkpoint that was never finished.
    with (killed / "metrics.csv").open("a") as file:
        file.write("99999,1.0,1,1,1,1,1,1,1,1,1,1,1,1\n51200,1.0")
    shutil.copytree(
        killed / "checkpoints" / str(iteration),
        killed / "checkpoints" / f"{iteration + 10}.orbax-checkpoint-tmp",
    )
    done = run("--resume", killed, cwd=tmp_path, script=script)
    assert done.returncode == 0, done.stderr

    assert timeless(killed) == timeless(whole)
    states = []
    for run_dir in (whole, killed):
        config = json.loads((whole / "config.json").read_text())["args"]
        args = module.Args(**config | {"run_dir": None})
        rest = (0, args.env_kwargs, tuple(args.mask_obs))
        number = getattr(args, "num_actors", 1)
        size = args.num_envs // number
        envs = [module.make_env(args.env_id, size, *rest) for _ in range(number)]
        init, key = module.make_train(args, *envs)[0], jax.random.key(0)
        if num_seeds > 1:
            init, key = partial(jax.lax.map, init), jax.random.split(key, num_seeds)
        states.append(module.load_checkpoint(run_dir, jax.jit(init)(key)))
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "number", "status"),
    [("ppo", signal.SIGINT, 130), ("ppo", signal.SIGTERM, 143), ("impala", signal.SIGINT, 130)],
)
def test_a_stopped_run_saves_and_resumes(tmp_path, name, number, status):
    """impala.py: all its threads end."""
    here, script = tmp_path / "here", SCRIPT.with_name(f"{name}.py")
    flags = [*SHORT_RUNS[name], "--total-timesteps", 5_000_000, "--run-dir", here]
    process = start(*flags, cwd=tmp_path, script=script)
    wait_for(lambda: (here / "metrics.csv").exists() and rows(here), process)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    assert "--resume" in (tmp_path / "output").read_text()
    saved = last_checkpoint(here) * 16 * 32
    assert saved == int(rows(here)[-1]["step"]) and (here / "learning_curve.png").exists()

    done = run("--resume", here, "--total-timesteps", saved + 16384, cwd=tmp_path, script=script)
    assert done.returncode == 0, done.stderr
    steps = [int(row["step"]) for row in rows(here)]
    seconds = [float(row["seconds"]) for row in rows(here)]
    assert steps == sorted(set(steps)) and steps[-1] == saved + 16384
    assert seconds == sorted(seconds)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["ppo", "impala", "sac"])
def test_a_host_simulator_resumes_with_new_episodes_and_says_so(tmp_path, name):
    env_id = "envpool::Pendulum-v1" if name in CONTINUOUS else "envpool::CartPole-v1"
    flags, script = [*SHORT_RUNS[name], "--env-id", env_id], SCRIPT.with_name(f"{name}.py")
    assert run(*flags, "--run-dir", "here", cwd=tmp_path, script=script).returncode == 0
    done = run("--resume", "here", "--total-timesteps", 32768, cwd=tmp_path, script=script)
    assert done.returncode == 0 and "new episodes start here" in done.stdout, done.stderr
    assert int(rows(tmp_path / "here")[-1]["step"]) == 32768


@pytest.mark.thorough
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    flags = [*SHORT, "--learning-rate", "1e30", "--checkpoint-every", 16, "--run-dir", "here"]
    done = run(*flags, cwd=tmp_path)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert "loss nan or inf" in message
    assert "Traceback" not in done.stderr and not (tmp_path / "here/checkpoints").exists()


# --- Bad input ------------------------------------------------------------------------------------

BAD_FLAGS = {
    "unknown suite": (["--env-id", "gymnaz::CartPole-v1"], "gymnax, gymnasium, envpool"),
    "empty name": (["--env-id", "gymnax::"], "gymnax::"),
    "empty suite": (["--env-id", "::CartPole-v1"], "gymnax"),
    "limit below 0": (
        ["--env-id", "gymnasium::CartPole-v1", "--env-kwargs", '{"max_episode_steps": -3}'],
        "max_episode_steps",
    ),
    "old version": (["--env-id", "gymnasium::HalfCheetah-v2"], "HalfCheetah-v2"),
    "no suite": (["--env-id", "CartPole-v1"], "suite::name"),
    "unknown gymnax id": (["--env-id", "gymnax::CartPol-v1"], "CartPol-v1"),
    "unknown gymnasium id": (["--env-id", "gymnasium::CartPol-v1"], "CartPole"),
    "unknown package": (["--env-id", "gymnasium::no_package:MyEnv-v0"], "no_package"),
    "unknown envpool id": (["--env-id", "envpool::LunarLandr-v3"], "LunarLandr-v3"),
    "unknown craftax id": (["--env-id", "craftax::Craftax-Symbolik-v1"], "Craftax-Symbolik-v1"),
    "continuous gymnax": (["--env-id", "gymnax::Pendulum-v1"], "ppo_continuous.py"),
    "continuous envpool": (["--env-id", "envpool::HalfCheetah-v5"], "ppo_continuous.py"),
    "continuous gymnasium": (["--env-id", "gymnasium::Pendulum-v1"], "ppo_continuous.py"),
    "actions from 1": (["--env-id", "gymnasium::One-v0"], "only Discrete (from 0)"),
    "several actions": (["--env-id", "gymnasium::Many-v0"], "only Discrete (from 0)"),
    "indivisible batch": (["--num-minibatches", "7"], "take one of [1, 2, 4, 8"),
    "less than a batch": (["--total-timesteps", "100"], "8192"),
    "no environments": (["--num-envs", "0"], "--num-envs must be from 1"),
    "negative steps": (["--num-steps", "-1"], "--num-steps must be from 1"),
    "no minibatches": (["--num-minibatches", "0"], "--num-minibatches must be from 1"),
    "gamma": (["--gamma", "1.01"], "--gamma must be from 0 to 1"),
    "lambda": (["--gae-lambda", "-0.1"], "--gae-lambda must be from 0 to 1"),
    "nan": (["--learning-rate", "nan"], "--learning-rate must be from 0"),
    "infinite": (["--ent-coef", "inf"], "--ent-coef must be from 0"),
    "no number as target": (["--target-return", "nan"], "--target-return must be from"),
    "seed": (["--seed", str(2**31)], "--seed must be from 0 to 1073741824"),
    "several seeds of a host suite": (["--num-seeds", "2"], "--num-seeds"),
    "mask out of range": (["--mask-obs", "1", "8"], "out of bounds for axis 0 with size 8"),
    "mask of all": (["--mask-obs", *"01234567"], "hides every entry"),
    "mask below 0": (["--mask-obs", "-1"], "--mask-obs must be from 0"),
    "mask of images": (["--env-id", "envpool::Pong-v5", "--mask-obs", "1"], "these are images"),
    "kwargs no JSON": (["--env-kwargs", "{gravity}"], "--env-kwargs"),
    "kwargs no object": (["--env-kwargs", "[1]"], "--env-kwargs"),
    "kwargs unknown": (["--env-kwargs", '{"gravitation": 1}'], "gravitation"),
    "no such run": (["--resume", "nowhere"], "nowhere"),
    "another evaluation": (["--eval-env-id", "gymnax::CartPole-v1"], "other observations"),
    "unknown evaluation": (["--eval-env-id", "gymnax::CartPol-v1"], "CartPol-v1"),
}


class One(gymnasium.Env):
    """An environment whose actions are 1, 2 and 3: taken for 0, 1 and 2, it would be trained wrongly."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Discrete(3, start=1)

    def reset(self, seed=None, options=None):
        return np.zeros(3, np.float32), {}


class Many(One):
    action_space = gymnasium.spaces.MultiDiscrete([2, 3])


gymnasium.register("One-v0", One)
gymnasium.register("Many-v0", Many)

# What is each script's own.
OWN_BAD_FLAGS = {
    ("a2c", "--num-envs 0"): "--num-envs must be from 1",
    ("a2c", "--total-timesteps 100"): "at least one batch",
    ("a2c", "--env-id gymnax::Pendulum-v1"): "ppo_continuous.py",
    ("ppo_continuous", "--env-id gymnax::CartPole-v1"): "use ppo.py",
    ("ppo_continuous", "--num-minibatches 7"): "take one of",
    ("dqn", "--env-id gymnax::Pendulum-v1"): "use sac.py",
    ("dqn", "--buffer-size 100"): "--buffer-size must hold a batch",
    ("dqn", "--train-frequency 0"): "--train-frequency must be from 1",
    ("dqn", "--tau 1.5"): "--tau must be from 0 to 1",
    ("dqn", "--hidden-sizes 0 84"): "--hidden-sizes must be from 1",
    ("dqn", "--total-timesteps 100"): "at least --num-envs x --num-steps",
    ("dqn", "--total-timesteps 10000"): "--learning-starts must be below",
    ("sacd", "--env-id gymnax::Pendulum-v1"): "use sac.py",
    ("sacd", "--alpha 0"): "--alpha must be above 0",
    ("td3", "--env-id gymnax::CartPole-v1"): "use dqn.py",
    ("td3", "--policy-frequency 0"): "--policy-frequency must be from 1",
    ("td3", "--buffer-size 100"): "--buffer-size must hold a batch",
    ("pqn", "--env-id gymnax::Pendulum-v1"): "use sac.py",
    ("pqn", "--q-lambda 1.5"): "--q-lambda must be from 0 to 1",
    ("pqn", "--num-minibatches 7"): "take one of",
    ("rpqn", "--num-minibatches 7"): "take one of",
    ("rpqn", "--memory gur"): "there are",
    ("drqn", "--burn-in 32"): "--burn-in must be below --num-steps",
    ("drqn", "--buffer-size 100"): "--buffer-size must hold",
    ("drqn", "--learning-starts 100"): "--learning-starts must be at least",
    ("rsac", "--env-id gymnax::CartPole-v1"): "use rsacd.py",
    ("rsac", "--memory-kwargs 3"): "--memory-kwargs",
    ("rsacd", "--env-id gymnax::Pendulum-v1"): "use rsac.py",
    ("rsacd", "--burn-in 32"): "--burn-in must be below --num-steps",
    ("rppo_continuous", '--memory none --memory-kwargs {"heads":2}'): "there are",
    ("sac", "--env-id gymnax::CartPole-v1"): "use dqn.py",
    ("sac", "--buffer-size 100"): "--buffer-size must hold a batch",
    ("sac", "--updates-per-step inf"): "--updates-per-step must be",
    ("sac", "--updates-per-step 2000"): "--updates-per-step must be",
    ("sac", "--alpha 0"): "--alpha must be above 0",
    ("sac", "--target-entropy-scale nan"): "--target-entropy-scale must be",
    ("sac", "--total-timesteps 800"): "--learning-starts must be below",
    ("sac", "--num-critics 0"): "--num-critics must be from 1",
    ("sac", "--num-envs 7 --total-timesteps 100"): "at least --num-envs x --num-steps",
    ("ppo_lstm", "--env-id gymnax::Pendulum-v1"): "rppo_continuous.py",
    ("ppo_lstm", "--num-minibatches 7"): "take one of",
    ("rppo", "--env-id gymnax::Pendulum-v1"): "rppo_continuous.py",
    ("rppo", "--num-minibatches 7"): "take one of",
    ("rppo", "--memory nothing"): "there are dnc, ffm,",
    ("rppo", "--memory mine.py:Mine"): "mine.py:Mine with",
    ("rppo", '--memory s5 --memory-kwargs {"stats":3}'): "unexpected keyword argument 'stats'",
    ("rppo", '--memory s5 --memory-kwargs {"states":1}'): "states must be at least 2, not 1",
    ("rppo", '--memory gpt2 --memory-kwargs {"length":0}'): "length must be at least 1",
    ("rppo", '--memory gtrxl --memory-kwargs {"length":0}'): "length must be at least 1",
    ("rppo", '--memory gpt2 --memory-kwargs {"heads":3}'): "heads must divide the width 64, not 3",
    ("rppo", "--memory-kwargs {heads"): "--memory-kwargs '{heads'",
    ("rppo_continuous", "--env-id gymnax::CartPole-v1"): "ppo_lstm.py",
    ("rppo_continuous", "--sequence-length 7"): "--sequence-length must divide",
    ("rppo_continuous", "--burn-in 1000"): "--burn-in must be below",
    ("rppo_continuous", "--num-minibatches 7"): "take one of",
    ("ppo_trxl", "--env-id gymnax::Pendulum-v1"): "rppo_continuous.py",
    ("ppo_trxl", "--window-length 7"): "--window-length must divide",
    ("ppo_trxl", "--num-heads 3"): "must be even and a multiple of --num-heads 3",
    ("ppo_trxl", "--memory-length 0"): "--memory-length must be from 1",
    ("ppo_trxl", "--num-minibatches 7"): "take one of",
    ("ppo_gtrxl", "--gate-bias nan"): "--gate-bias must be",
    ("ppo_trxl_pmap", "--env-id envpool::LunarLander-v3"): "use ppo_trxl.py",
    ("ppo_trxl_pmap", "--num-minibatches 7"): "take one of",
    ("impala", "--env-id gymnax::Pendulum-v1"): "ppo_continuous.py",
    ("impala", "--num-actor-threads 3"): "must be a multiple of 3, to divide among",
    ("impala", "--num-minibatches 5"): "must be a multiple of 5",
    ("impala", "--c-bar 3"): "--c-bar 3.0 must be at most --rho-bar 1.0",
    ("impala", "--learner-device-ids 7"): "--learner-device-ids takes different ids of the 1",
    ("impala", "--actor-device-ids 0 0"): "--actor-device-ids takes different ids",
    ("impala_lstm", "--env-id gymnax::Pendulum-v1"): "rppo_continuous.py",
    ("impala_lstm", "--num-minibatches 5"): "must be a multiple of 5",
    ("impala_lstm", "--embed-dim 0"): "--embed-dim must be from 1",
    ("impala_lstm", "--memory nothing"): "there are dnc, ffm,",
    ("impala_lstm", '--memory s5 --memory-kwargs {"stats":3}'): "argument 'stats'",
}


@pytest.mark.parametrize(
    ("name", "flags", "hint"),
    [("ppo", *case) for case in BAD_FLAGS.values()]
    + [(name, flags.split(), hint) for (name, flags), hint in OWN_BAD_FLAGS.items()],
    ids=[*BAD_FLAGS, *[f"{name} {flags}" for name, flags in OWN_BAD_FLAGS]],
)
def test_bad_input_is_one_clear_line_and_status_2(name, flags, hint, tmp_path, monkeypatch, capfd):
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args())
    error = [line for line in capfd.readouterr().err.splitlines() if "WARN" not in line]
    error = [line for line in error if "gym.logger" not in line and line.strip()]
    assert stop.value.code == 2
    assert len(error) == 1 and hint in error[0], error
    assert list(tmp_path.iterdir()) == []  # no folder of a run that never began


NONE = SCRIPT.with_name("memories") / "none.py"
BAD_MEMORIES = {  # none.py with a change -> what is said of it
    "no such class": ("class Memory", "class Other", "'Memory'"),
    "no unroll": ("def unroll", "def roll", "no attribute 'unroll'"),
    "a count": ("return jnp.zeros((batch, 0))", "return jnp.zeros((batch, 0)), 0", "first axis"),
    "a batch behind": ("zeros((batch, 0))", "zeros((3, batch))", "first axis"),
    "another type": ("return memory, x", "return memory.astype(int), x", "the form"),
    "another shape": ("return acting, x", "return acting[:, None], x", "the form"),
    "another structure": ("return memory, x", "return (memory, memory), x", "the form"),
    "another width": ("return memory, x", "return memory, x[..., :1]", "as wide as"),
}


@pytest.mark.parametrize(("old", "new", "hint"), BAD_MEMORIES.values(), ids=list(BAD_MEMORIES))
def test_a_memory_that_cannot_work_is_refused_in_one_line(old, new, hint, tmp_path, capsys):
    assert old in NONE.read_text()
    (tmp_path / "mine.py").write_text(NONE.read_text().replace(old, new))
    with pytest.raises(SystemExit) as stop:
        rppo.check_args(rppo.Args(memory=f"{tmp_path}/mine.py:Memory"))
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1 and hint in error[0], error


MEMORY_SCRIPTS = "rppo rppo_continuous rpqn drqn impala_lstm rsac rsacd".split()


@pytest.mark.parametrize("name", MEMORY_SCRIPTS)
def test_a_memory_of_one_s_own_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = importlib.import_module(name).Args(memory="mine.py:Memory")
    assert args.memory == str(tmp_path / "mine.py:Memory")
    assert dataclasses.replace(args).memory == args.memory
    assert importlib.import_module(name).Args(memory="s5").memory == "s5"


@pytest.mark.thorough
def test_a_run_with_a_memory_of_one_s_own_goes_on_in_another_folder(
    in_process, tmp_path, monkeypatch
):
    shutil.copy(NONE, tmp_path / "mine.py")
    flags = [*SHORT_RUNS["rppo"], "--run-dir", "here", "--memory", "mine.py:Memory"]
    in_process("rppo", *flags, "--total-timesteps", 512)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    rppo.load_memory.cache_clear()  # as in a process of its own
    in_process("rppo", "--resume", "../here", "--total-timesteps", 1024)
    assert last_checkpoint(tmp_path / "here") == 2
    monkeypatch.setitem(sys.modules, "rppo", rppo)  # enjoy.py loads its own; put this one back
    enjoy.main(enjoy.Args(Path("../here"), draw=False))


@pytest.mark.thorough
def test_resume_of_what_does_not_fit(tmp_path, monkeypatch, capfd):
    assert run(*SHORT, "--run-dir", "here", cwd=tmp_path).returncode == 0
    config = (tmp_path / "here" / "config.json").read_text()
    monkeypatch.chdir(tmp_path)

    def refused(*flags):
        monkeypatch.setattr(sys, "argv", ["ppo.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            ppo.main(ppo.parse_args())
        error = capfd.readouterr().err.strip()
        assert stop.value.code == 2 and len(error.splitlines()) == 1, error
        assert (tmp_path / "here" / "config.json").read_text() == config  # nothing is lost
        return error

    assert "fits these flags" in refused("--resume", "here", "--hidden-size", 32)
    assert "cannot change --num-envs, which is 16" in refused("--resume", "here", "--num-envs", 32)
    assert "not empty" in refused(*SHORT, "--run-dir", "here")
    with monkeypatch.context() as renamed:
        renamed.setattr(ppo, "__file__", "other.py")
        assert "a run of other.py: it is a run of ppo.py" in refused("--resume", "here")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text(config[:100])
    assert "no config.json of a run" in refused("--resume", "torn")
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(*SHORT, "--run-dir", "file/here")
    shutil.rmtree(tmp_path / "here" / "checkpoints")
    assert "no checkpoint" in refused("--resume", "here")


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ppo.util, "find_spec", lambda module: None)
    with pytest.raises(SystemExit) as stop:
        ppo.open_run(ppo.Args(run_dir=tmp_path / "here", tensorboard=True))
    assert stop.value.code == 2 and "pip install tensorboardX" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["ppo", "impala"])
def test_an_environment_that_raises_shows_its_own_traceback(tmp_path, name):
    """impala.py: although it raises in an actor's thread."""
    (tmp_path / "my_package.py").write_text(
        textwrap.dedent(
            """
            import gymnasium

            class MyEnv(gymnasium.Env):
                observation_space = gymnasium.spaces.Box(-1, 1, (3,))
                action_space = gymnasium.spaces.Discrete(2)
                steps = 0

                def reset(self, seed=None, options=None):
                    return self.observation_space.sample(), {}

                def step(self, action):
                    self.steps += 1
                    if self.steps == 40:
                        raise RuntimeError("the motor is on fire")
                    return self.observation_space.sample(), 1.0, self.steps % 10 == 0, False, {}

            gymnasium.register("MyEnv-v0", MyEnv)
            """
        )
    )
    flags = [*SHORT_RUNS[name], "--env-id", "gymnasium::my_package:MyEnv-v0"]
    script, path = SCRIPT.with_name(f"{name}.py"), str(tmp_path)
    done = run(*flags, cwd=tmp_path, timeout=120, script=script, PYTHONPATH=path)
    assert done.returncode == 1
    assert 'my_package.py", line 15, in step' in done.stderr
    assert "RuntimeError: the motor is on fire" in done.stderr.strip().splitlines()[-5:]


# --- The flags themselves -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_every_flag_is_read_and_explained(name):
    text = SCRIPT.with_name(f"{name}.py").read_text()
    tree = ast.parse(text)
    (args,) = [x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Args"]
    fields = [x.target.id for x in args.body if isinstance(x, ast.AnnAssign)]
    outside = [x for x in tree.body if getattr(x, "name", "") not in ("Args", "check_args")]
    read = {
        node.attr
        for part in [*outside, *[x for x in args.body if isinstance(x, ast.FunctionDef)]]
        for node in ast.walk(part)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("args", "self")
    }
    assert set(fields) <= read, set(fields) - read
    lines = text.splitlines()
    for field in [x for x in args.body if isinstance(x, ast.AnnAssign)]:
        assert re.search(r"  # \w.{9,}", lines[field.lineno - 1]), field.target.id
