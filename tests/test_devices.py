"""Many devices and many processes train as one, and leave the files of one."""

import csv
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import real_env, run_on_devices, small_args

import ppo_trxl_pmap

pytestmark = pytest.mark.thorough

FLAGS = (
    "--env-id gymnax::CartPole-v1 --num-envs 16 --num-steps 32 --num-minibatches 4 --gamma 0.99 "
)
FLAGS += (
    "--memory-length 10 --window-length 16 --embed-dim 16 --learning-rate 1e-3 --eval-episodes 5"
)
FLAGS = FLAGS.split()

ORACLE = """
    import dataclasses, functools, jax, jax.numpy as jnp, numpy as np, ppo_trxl, ppo_trxl_pmap
    from unittest import mock
    from probes import act_from, real_env, small_args

    DEVICES = 4
    assert jax.device_count() == DEVICES


    def off_the_mesh(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(np.asarray(jax.random.key_data(x)))
        return np.asarray(x)


    def on_one_device(state, args, env):
        '''An iteration by ppo_trxl.py of what the devices do, side by side.'''
        rollout_key, update_key, _ = jax.random.split(state.key, 3)
        shares = [jax.tree.map(lambda x: jnp.split(x, DEVICES)[d], state.acting) for d in range(DEVICES)]
        act = lambda d, acting: act_from(
            ppo_trxl, state.agent, env, acting, jax.random.fold_in(rollout_key, d), args.num_steps
        )
        ends, batches = zip(*[act(d, ppo_trxl.Acting(*acting)) for d, acting in enumerate(shares)])
        last_value = jnp.concatenate(
            [state.agent.step(end.memory, end.obs, end.reset)[-1] for end in ends]
        )
        join = lambda axis: lambda *x: jnp.concatenate(x, axis)
        batch = jax.tree.map(join(1), *batches)
        end = jax.tree.map(join(0), *[end._replace(memory=None) for end in ends])
        memory, starts = ppo_trxl.remember(
            state.agent, state.acting.memory, batch, args.window_length
        )
        rewards = args.reward_scale * batch.reward + args.gamma * batch.final_value
        data = ppo_trxl.compute_gae(
            rewards, batch.value, batch.done, last_value, args.gamma, args.gae_lambda
        )
        # Minibatch n is made of the n-th minibatches of all devices.
        windows, orders = args.num_windows, []
        for d in range(DEVICES):
            order_key = jax.random.split(jax.random.fold_in(update_key, d), args.update_epochs)[0]
            order = jnp.argsort(jax.random.bits(order_key, (windows,)))
            order = order.reshape(args.num_minibatches, -1)
            window, number = jnp.divmod(order, args.num_envs)
            orders.append(window * args.num_envs * DEVICES + d * args.num_envs + number)
        order = jnp.concatenate(orders, axis=1)
        together = dataclasses.replace(args, num_envs=args.num_envs * DEVICES)
        learning_rate = args.learning_rate * (1 - state.iteration / args.num_iterations)
        clip = ppo_trxl.optax.clip_by_global_norm(args.max_grad_norm)
        tx = ppo_trxl.optax.chain(clip, ppo_trxl.optax.scale_by_adam(eps=1e-5))
        with mock.patch.object(jnp, "argsort", lambda bits: order):
            agent, _, metrics = ppo_trxl.update(
                state.agent, state.opt_state, tx, learning_rate, starts,
                jax.tree.map(lambda x: ppo_trxl.to_sequences(x, args.window_length), (batch, *data)),
                update_key, together,
            )
        _, episodes = ppo_trxl.record_episodes(state.episode_stats, batch.reward, batch.done)
        explained = 1 - jnp.var(data[1] - batch.value) / jnp.var(data[1])
        metrics |= {"losses/explained_variance": explained} | episodes
        return agent, end._replace(memory=memory), metrics


    def compare(args, num_iterations):
        env = real_env("ppo_trxl_pmap", num_envs=args.num_envs)
        init, train_iteration = ppo_trxl_pmap.make_train(args, env)
        state, train_iteration = jax.jit(init)(jax.random.key(0)), jax.jit(train_iteration)
        assert len(np.unique(state.acting.obs, axis=0)) == args.num_envs * DEVICES  # own episodes
        expected = jax.jit(functools.partial(on_one_device, args=args, env=env))
        for _ in range(num_iterations):
            agent, end, numbers = expected(jax.tree.map(off_the_mesh, state))
            state, metrics = train_iteration(state)
            for x, y in zip(*map(jax.tree.leaves, (agent, state.agent)), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
            for x, y in zip(*map(jax.tree.leaves, (end, state.acting)), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
            for name, number in numbers.items():
                np.testing.assert_allclose(number, metrics[name], rtol=1e-3, atol=1e-5, err_msg=name)
        return state
"""


def four_devices(program, *flags):
    done = run_on_devices(4, "-c", textwrap.dedent(ORACLE) + textwrap.dedent(program), *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_four_devices_learn_what_one_device_learns(tmp_path):
    """ppo_trxl.py on one device, with the environments of all four and the same random numbers, has
    the same memories, metrics and parameters: with minibatches, and with epochs. What is saved from four
    devices is what one device loads.
    """
    program = """
        import pathlib, sys

        small = {"num_envs": 4, "num_layers": 1, "update_epochs": 1}
        compare(small_args("ppo_trxl_pmap", 3, **small), 3)
        small |= {"update_epochs": 3, "num_minibatches": 1}
        state = compare(small_args("ppo_trxl_pmap", 3, **small), 1)
        ppo_trxl_pmap.save_checkpoint(pathlib.Path(sys.argv[1]), state)
        arrays = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
        np.savez(sys.argv[1] + "/arrays.npz", *arrays)
        assert state.acting.obs.sharding.shard_shape(state.acting.obs.shape)[0] == 4
    """
    four_devices(program, tmp_path)
    program = """
        import pathlib, sys, jax, numpy as np, ppo_trxl_pmap
        from probes import act_from, real_env, small_args

        size = 16 // jax.device_count()
        args = small_args("ppo_trxl_pmap", num_envs=size, num_layers=1, num_minibatches=1)
        env = real_env("ppo_trxl_pmap", num_envs=size)
        init, train_iteration = ppo_trxl_pmap.make_train(args, env)
        state = jax.jit(init)(jax.random.key(1))
        state = ppo_trxl_pmap.load_checkpoint(pathlib.Path(sys.argv[1]), state)
        saved, data = np.load(sys.argv[1] + "/arrays.npz"), jax.random.key_data(state.key)
        for array, name in zip(jax.tree.leaves(state._replace(key=data)), saved, strict=True):
            np.testing.assert_array_equal(array, saved[name], err_msg=name)
        assert state.acting.obs.sharding.shard_shape(state.acting.obs.shape)[0] == size
        _, metrics = jax.jit(train_iteration)(state)
        assert np.isfinite(metrics["losses/value_loss"])
    """
    for count in (1, 2):
        done = run_on_devices(count, "-c", textwrap.dedent(program), tmp_path)
        assert done.returncode == 0, done.stderr


def test_a_minibatch_holds_two_collectives_and_the_rollout_none():
    """One all-reduce of the gradients and metrics and one all-gather of two moments, in the same loop; nothing
    else but what the metrics gather once in an iteration. Read from the compiled program."""
    program = """
        args = small_args("ppo_trxl_pmap", num_envs=4)
        init, train_iteration = ppo_trxl_pmap.make_train(args, real_env("ppo_trxl_pmap", num_envs=4))
        state = jax.eval_shape(init, jax.random.key(0))
        print(jax.jit(train_iteration).lower(state).compile().as_text())
        print("parameters", sum(x.size for x in jax.tree.leaves(state.agent)))
    """
    text = four_devices(program)
    size = int(text.split()[-1]) + 5  # losses
    computation, found = "", []
    for line in text.splitlines():
        if heading := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = "entry" if heading[1] else heading[2]
        kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
        if collective := re.search(rf"= (\S+) ({kinds})(-start)?\(", line):
            found.append((computation, collective[2], collective[1].partition("{")[0]))
    in_loop = [x for x in found if x[0] != "entry"]
    assert len({where for where, *_ in in_loop}) == 1
    kinds = {kind: shape for _, kind, shape in in_loop}
    assert kinds.pop("all-reduce") == f"f32[{size}]" and len(in_loop) == 2
    assert set(kinds) == {"all-gather"} and kinds["all-gather"].count("4")  # of each device, two
    assert {kind for where, kind, _ in found if where == "entry"} == {"all-gather"}


def test_advantages_far_from_0_are_normalised_over_all_devices():
    """Mean 100, deviation .1, of which E[x^2] - mean^2 in float32 leaves two digits at most."""
    args, env = small_args("ppo_trxl_pmap", ent_coef=0.0), real_env("ppo_trxl_pmap")
    agent = jax.jit(ppo_trxl_pmap.make_train(args, env)[0])(jax.random.key(0)).agent
    shape = (4, 8, 32)  # devices, steps, windows
    keys = jax.random.split(jax.random.key(1), 3)
    obs, zeros = jax.random.normal(keys[0], (*shape, *env.obs_shape)), jnp.zeros(shape)
    fields = {"obs": obs, "action": jnp.int32(zeros), "reset": zeros > 0}
    fields["logprob"] = jnp.log(0.5) + 0.1 * jax.random.normal(keys[1], shape)
    fields = [fields.get(field, zeros) for field in ppo_trxl_pmap.Transition._fields]
    batch = ppo_trxl_pmap.Transition(*fields)
    shares = 100.0 + 0.1 * jnp.arange(4.0)[:, None, None]  # each device has a mean of its own
    advantages = shares + 0.1 * jax.random.normal(keys[2], shape)
    exact = np.float64(advantages)
    normalised = jnp.float32((exact - exact.mean()) / exact.std())

    def pg_loss(advantages, **changes):
        loss = lambda *x: ppo_trxl_pmap.ppo_loss(
            agent, agent.initial_memory(32), *x, zeros[0], dataclasses.replace(args, **changes)
        )
        metrics = jax.vmap(loss, axis_name="devices")(batch, advantages)[1]
        return metrics["losses/policy_loss"]

    by_hand = pg_loss(normalised, norm_adv=False)
    np.testing.assert_allclose(pg_loss(advantages), by_hand, rtol=1e-3)


# --- As users run it ------------------------------------------------------------------------------


def rows(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def start_processes():
    """Starts processes as below, and leaves none behind."""
    started = []
    yield lambda *args, **kwargs: started.extend(start_two(*args, **kwargs)) or started
    for process in started:
        process.kill()


def start_two(folder, *flags, slurm=False):
    """Two processes on this machine, that find each other by flags or as SLURM would tell them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # From the job's number JAX makes the port 61440 + number % 4096.
    job = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    started = []
    for number in range(2):
        own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        command = [sys.executable, ppo_trxl_pmap.__file__, *map(str, flags)]
        if not slurm:
            command += ["--coordinator-address", f"localhost:{port}", "--num-processes", "2"]
            command += ["--process-id", str(number)]
        with (folder / f"log{number}").open("w") as log:
            options = {"cwd": folder, "stdout": log, "stderr": log}
            env = os.environ | (job | own if slurm else {})
            started.append(subprocess.Popen(command, env=env, **options))
    return started


def wait_for_first_call(run_dir, processes, seconds=300):
    """It takes all processes: before it, one may not have come to where it notes signals."""
    end, path = time.time() + seconds, run_dir / "metrics.csv"
    while not (path.exists() and path.stat().st_size):
        assert time.time() < end and all(process.poll() is None for process in processes)
        time.sleep(0.2)


def test_two_processes_are_two_devices_and_stop_and_resume_as_one(tmp_path, start_processes):
    """A signal that one process catches lets both save and end; one of them writes; and the run goes on
    from there, also its evaluation."""
    flags = [*FLAGS, "--no-anneal-lr"]
    started = start_processes(tmp_path, *flags, "--total-timesteps", 10**8, "--run-dir", "two")
    wait_for_first_call(tmp_path / "two", started)
    started[1].send_signal(signal.SIGINT)
    assert [process.wait(200) for process in started] == [130, 130]
    assert "stopped and saved" in (tmp_path / "log0").read_text()
    assert "stopped and saved" not in (tmp_path / "log1").read_text()
    files = {"checkpoints", "config.json", "learning_curve.png", "metrics.csv"}
    assert {x.name for x in (tmp_path / "two").iterdir()} == files

    steps = int(rows(tmp_path / "two")[0]["step"])
    flags += ["--total-timesteps", steps, "--run-dir", "one"]
    done = run_on_devices(2, ppo_trxl_pmap.__file__, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (one,), (two, *_) = rows(tmp_path / "one"), rows(tmp_path / "two")
    for name in set(one) - {"seconds", "charts/SPS"}:
        assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-3, abs=1e-5), name

    last = rows(tmp_path / "two")[-1]
    flags = ["--resume", "two", "--total-timesteps", int(last["step"]) + 2048]
    started = start_processes(tmp_path, *flags, slurm=True)[-2:]
    assert [process.wait(250) for process in started] == [0, 0], (tmp_path / "log0").read_text()
    before, after = rows(tmp_path / "two")[-2:]
    assert before == last and int(after["step"]) == int(last["step"]) + 2048
    assert float(after["charts/episodes"]) > float(last["charts/episodes"])
    assert json.loads((tmp_path / "two/config.json").read_text())["args"]["process_id"] is None
    assert (tmp_path / "two/evaluation.json").exists()

    (tmp_path / "two/evaluation.json").unlink()  # a finished run is evaluated once more
    started = start_processes(tmp_path, *flags, slurm=True)[-2:]
    assert [process.wait(250) for process in started] == [0, 0], (tmp_path / "log0").read_text()
    assert rows(tmp_path / "two")[-1] == after and (tmp_path / "two/evaluation.json").exists()


def test_a_process_that_dies_takes_the_other_along(tmp_path, start_processes):
    flags = [*FLAGS, "--total-timesteps", 10**8, "--run-dir", "here"]
    started = start_processes(tmp_path, *flags)
    wait_for_first_call(tmp_path / "here", started)
    started[1].kill()
    assert started[1].wait(10) == -signal.SIGKILL
    assert started[0].wait(200) not in (0, 130)


@pytest.mark.parametrize(
    ("count", "flags", "hint"),
    [
        (3, "", "--num-envs 1024 must be a multiple of the 3 devices"),
        (4, "--num-envs 4 --num-minibatches 4", "the windows of a device"),
        (1, "--process-id 1", "give --coordinator-address, --num-processes and --process-id: "),
        (1, "--coordinator-address here", "--coordinator-address must be HOST:PORT, not here"),
    ],
)
def test_devices_that_do_not_fit_are_one_clear_line_and_status_2(tmp_path, count, flags, hint):
    done = run_on_devices(count, ppo_trxl_pmap.__file__, *flags.split(), cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert hint in done.stderr and not list(tmp_path.iterdir())


def test_a_run_that_cannot_begin_ends_in_all_processes(tmp_path, start_processes):
    """Only process 0 looks at the folder; the other hears of it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    started = start_processes(tmp_path, *FLAGS, "--run-dir", "full")
    assert [process.wait(250) for process in started] == [2, 2]
    assert "full is not empty" in (tmp_path / "log0").read_text()
    assert list((tmp_path / "full").iterdir()) == [tmp_path / "full" / "file"]
    assert os.listdir(tmp_path).count("runs") == 0
