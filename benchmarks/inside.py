"""Our scripts from inside: where their time goes, and how it grows.

    python benchmarks/inside.py where_time_goes growth ...

Each task has a process of its own, prints Markdown and writes benchmarks/results/<task>.csv.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from inspect import getdoc
from pathlib import Path
from statistics import median

from peers import our_script, our_training, ours
from record import metrics_of, parse_tasks, run_script, show, write
from tasks import FAULT_STEPS, MINATAR
from tasks import TASKS as SCORED

ROUNDS = {"trxl_speed": 2, "halfcheetah_speed": 3, "growth": 5, "replay_speed": 5, "lstm_speed": 10}
ROUNDS |= {"one_thread": 3}
REPLAY_FLAGS = ("prioritized_replay", "linear_decay_sampling", "monitor_gradients")
REPLAY_CASES = {"none": ()} | {flag: (flag,) for flag in REPLAY_FLAGS} | {"all": REPLAY_FLAGS}
TRXL = {"env_kwargs": '{"memory_length": 5}', "num_envs": 512, "num_steps": 128}
TRXL |= {"memory_length": 128, "window_length": 64, "num_layers": 2, "num_heads": 8}
TRXL |= {"embed_dim": 256, "num_minibatches": 8, "update_epochs": 4, "total_timesteps": 10**7}
TRXL_CASES = {
    "ppo_trxl.py, float32": ("ppo_trxl", {}),
    "ppo_trxl.py, bfloat16": ("ppo_trxl", {"compute_dtype": "bfloat16"}),
    "ppo_gtrxl.py, float32": ("ppo_gtrxl", {}),
}
CARTPOLE = {"env_id": "gymnax::CartPole-v1", "num_steps": 128, "num_envs": 64}
CARTPOLE |= {"num_minibatches": 4, "update_epochs": 4, "total_timesteps": 10**9}
CHAIN = {"num_envs": 64, "num_steps": 128, "window_length": 64, "total_timesteps": 10**9}
AXES = {  # name: script, fixed arguments, the one that grows, its values
    "environments (ppo.py)": ("ppo", CARTPOLE, "num_envs", [4**k for k in range(7)]),
    "seeds (ppo.py)": ("ppo", CARTPOLE | {"num_envs": 16}, "num_seeds", [1, 4, 16, 64]),
    "width (ppo.py)": ("ppo", CARTPOLE, "hidden_size", [16, 64, 256, 1024]),
    "memory, steps (ppo_trxl.py)": ("ppo_trxl", CHAIN, "memory_length", [8, 32, 128, 512]),
}
THREAD_CASES = {  # scored task, more flags: steps
    ("pqn_cartpole", ""): 500_000,
    ("pqn_cartpole", "--num-seeds 8"): 200_000,
    ("ppo_lunarlander", ""): 500_000,
    ("ppo_continuous_pendulum", ""): 500_000,
    ("dqn_cartpole", ""): 150_000,
    ("a2c_lunarlander", ""): 200_000,
    ("ppo_lstm_cartpole", ""): 300_000,
    ("sac_pendulum", ""): 4_000,
}


def seconds_of(function, *inputs) -> float:
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    return time.perf_counter() - start


def where_time_goes() -> Iterator[dict]:
    """The phases of `python ppo.py` one after the other, with an empty compilation cache. Simulating,
    acting and updating share one compiled program; their parts are timed in programs of their own."""
    folder = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    clock = time.perf_counter()

    def lap(phase: str) -> dict:
        """Seconds since the last lap."""
        nonlocal clock
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        return {"phase": phase, "seconds": round(seconds, 2)}

    import jax

    ppo = our_script("ppo")
    yield lap("import")
    args = ppo.Args()
    env = ppo.make_env(args.env_id, args.num_envs, args.seed)
    yield lap("build the environments (imports EnvPool)")
    init, train_iteration = ppo.make_train(args, env)
    state, train = ppo.compile_training(args, init, train_iteration)
    yield lap("trace and compile")
    for _ in range(args.num_iterations):
        state, _ = jax.block_until_ready(train(state, 1))
    yield (training := lap("train"))
    ppo.save_checkpoint(Path(folder.name), state)
    yield lap("save (imports Orbax)")
    test_env = ppo.make_env(args.env_id, args.eval_episodes, 2**30)
    yield lap("build the environments of the evaluation")
    play = jax.jit(lambda state: ppo.evaluate(state, test_env, jax.random.key(0)))
    jax.block_until_ready(play(state))
    yield lap("evaluate (compile, and play 100 episodes)")
    for part, share in shares_of_training(ppo, args, env, train_iteration, state).items():
        yield {"phase": f"  of that: {part}", "seconds": round(training["seconds"] * share, 2)}


def shares_of_training(ppo, args, env, train_iteration, state) -> dict[str, float]:
    """Part of an iteration -> its share of the time, from programs that hold more and more of it."""
    import jax

    def simulate(state, actions):
        def step(env_state, action):
            env_state, timestep = env.step(None, env_state, action)
            return env_state, timestep.reward

        return jax.lax.scan(step, state.acting.env_state, actions)[1]

    def roll_out(state):
        return ppo.rollout(state.agent, env, state.acting, jax.random.key(0), args.num_steps)[1]

    def best(function, *inputs):
        """Seconds of the fastest of five calls, after one to compile."""
        return min([seconds_of(function, *inputs) for _ in range(6)][1:])

    iteration = best(jax.jit(lambda state: train_iteration(state)[1]), state)
    acting = best(jax.jit(roll_out), state)
    simulating = best(jax.jit(simulate), state, jax.jit(roll_out)(state).action)
    seconds = {"simulate": simulating, "act": acting - simulating}
    seconds |= {"advantages and update": iteration - acting}
    return {part: x / iteration for part, x in seconds.items()}


def growth() -> Iterator[dict]:
    """Steps/s of whole iterations in steady state, over environments, seeds, width and memory.

    Medians of five calls. ppo.py: CartPole-v1 in gymnax, 128 steps, 4 epochs of 4 minibatches, 64
    environments and 64 x 64 networks unless they are what grows (seeds: 16 environments each; all of
    them count). ppo_trxl.py: MemoryChain-bsuite, 64 environments, 128 steps, windows of 64, 2 layers
    of 64.
    """
    for name, (script, fixed, field, values) in AXES.items():
        for value in values:
            speed = steps_per_second(our_script(script), fixed | {field: value})
            yield {"axis": name, "value": value, "steps_per_second": round(speed)}


def steps_per_second(script, fields: dict) -> float:
    """Environment steps a second, of all seeds together."""
    import jax

    args = script.Args(**fields)
    train, state = our_training(script, args, args.num_seeds)
    steps, seconds = args.batch_size * args.num_seeds, []
    calls = max(1, 100_000 // steps)  # of about a second together
    for _ in range(1 + ROUNDS["growth"]):
        start = time.perf_counter()
        state = jax.block_until_ready(train(state, calls))
        seconds.append(time.perf_counter() - start)
    return calls * steps / median(seconds[1:])


def trxl_speed() -> Iterator[dict]:
    """Where an iteration of ppo_trxl.py goes in the reference configuration, and what its cache saves.

    512 environments x 128 steps of MemoryChain, 2 layers of 256 with 8 heads, memory 128, windows of
    64, 4 epochs of 8 minibatches: the sizes of transformerXL_PPO_JAX, whose layers have gates, like
    those of ppo_gtrxl.py. Steady state, in turns; "without cache" is the same rollout with keys and
    values of the whole memory computed at each step.
    """
    for name, (script, changes) in TRXL_CASES.items():
        parts = parts_of(our_script(script), changes)
        for number in range(ROUNDS["trxl_speed"]):
            for part, run in parts.items():
                row = {"case": name, "part": part, "round": number}
                yield row | {"seconds": round(seconds_of(run), 3)}


def parts_of(script, changes: dict) -> dict:
    """Name -> function without arguments that takes as long as the part of an iteration."""
    import jax

    args = script.Args(**TRXL | changes)
    env = script.make_env(args.env_id, args.num_envs, args.seed, args.env_kwargs)
    init, train_iteration = script.make_train(args, env)
    state, key = jax.jit(init)(jax.random.key(0)), jax.random.key(1)

    def roll_out(state):
        acting = state.acting._replace(memory=state.agent.open(state.acting.memory))
        return script.rollout(state.agent, env, acting, key, args.num_steps)

    uncached = lambda state: rollout_without_cache(state.agent, env, state.acting, key, 16)
    parts = {"iteration": train_iteration, "rollout": roll_out}
    parts |= {"rollout without cache, 16 steps": uncached}
    parts = {name: partial(jax.jit(part), state) for name, part in parts.items()}
    for part in parts.values():
        jax.block_until_ready(part())  # compile
    return parts


def rollout_without_cache(agent, env, acting, key, num_steps: int):
    import jax

    def act_and_step(acting, key):
        env_state, obs, reset, memory = acting
        step = agent.unroll(memory, obs[None], reset[None])
        memory, (logprobs, value) = step[0], [x[0] for x in step[1:]]
        action = jax.random.categorical(key, logprobs)
        env_state, timestep = env.step(key, env_state, action)
        done = timestep.terminated | timestep.truncated
        return (env_state, timestep.obs, done, memory), (action, value)

    return jax.lax.scan(act_and_step, (*acting,), jax.random.split(key, num_steps))


def halfcheetah_speed() -> Iterator[dict]:
    """How much of the raw simulator's speed is left while ppo_continuous.py trains on HalfCheetah-v5.

    Raw: a Python loop that steps EnvPool's 64 environments with random actions. Training: the command
    of tasks.py, charts/SPS at the end. The two take turns.
    """
    for number in range(ROUNDS["halfcheetah_speed"]):
        yield {"round": number, "raw": round(raw_speed()), "training": round(training_speed())}


def raw_speed() -> float:
    """Steps/s of the pool alone."""
    import envpool
    import numpy as np

    pool = envpool.make_gymnasium("HalfCheetah-v5", num_envs=64, seed=1)
    pool.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (500, 64, 6))
    start = time.perf_counter()
    for action in actions:
        pool.step(action)
    return len(actions) * 64 / (time.perf_counter() - start)


def training_speed() -> float:
    """Steps/s of ppo_continuous.py, compilation not counted."""
    task = SCORED["ppo_continuous_halfcheetah"]
    run = run_script(task.script, f"{task.flags} --total-timesteps 100000 --eval-episodes 0")
    return float(run.metrics[-1]["charts/SPS"])


def pqn_fault(game: str) -> Iterator[dict]:
    """Ten seeds of pqn.py in one program, with its targets and with those of the published
    implementations, in which the last but one step of a rollout bootstraps from the observation after
    the last (purejaxql, issue 12). curve: training returns at equal distances."""
    import numpy as np

    pqn = our_script("pqn")
    right = pqn.compute_lambda_returns

    def published(rewards, values, dones, last_value, *rest):
        return right(rewards, values.at[-1].set(last_value), dones, last_value, *rest)

    for name, targets in {"right": right, "published": published}.items():
        pqn.compute_lambda_returns = targets
        with tempfile.TemporaryDirectory() as folder:
            run_dir, env_id = Path(folder) / "run", f"gymnax::{game}-MinAtar"
            args = pqn.Args(env_id, num_seeds=10, total_timesteps=FAULT_STEPS, run_dir=run_dir)
            pqn.main(args)
            evaluation = json.loads((run_dir / "evaluation.json").read_text())["seeds"]
            metrics = metrics_of(run_dir)
        for result in evaluation:
            own = [row for row in metrics if int(row["seed"]) == result["seed"]]
            steps, returns = np.array(
                [(float(row["step"]), float(row["charts/episodic_return"])) for row in own]
            ).T
            curve = np.interp(np.linspace(0, FAULT_STEPS, 101)[1:], steps, np.nan_to_num(returns))
            row = {"targets": name, "seed": result["seed"], "score": round(result["mean"], 2)}
            yield row | {"curve": " ".join(f"{x:.2f}" for x in curve)}


def replay_speed() -> Iterator[dict]:
    """What the replay and monitoring flags of sac.py cost: gradient steps/s on Pendulum-v1, in turns."""
    sac, trains = our_script("sac"), {}
    for size in (100_000, 1_000_000):
        for case, flags in REPLAY_CASES.items():
            args = sac.Args(buffer_size=size, **dict.fromkeys(flags, True))
            train, state = our_training(sac, args)
            trains[size, case] = train, train(state, 6)  # the first 1,000 steps are random
    for number, (size, case), seconds in in_turns(
        trains, "replay_speed", 5
    ):  # of 200 gradient steps
        row = {"buffer_size": size, "flags": case, "round": number}
        yield row | {"gradient_steps_per_second": round(1_000 / seconds)}


def lstm_speed() -> Iterator[dict]:
    """What rppo.py's choice of a memory costs: its steps/s with an LSTM and those of ppo_lstm.py, on
    CartPole, in turns."""
    trains = {}
    for name, fields in (("ppo_lstm", {}), ("rppo", {"memory": "lstm"})):
        script = our_script(name)
        args = script.Args(total_timesteps=10**9, **fields)
        train, state = our_training(script, args)
        trains[name] = train, train(state, 5)
    for number, name, seconds in in_turns(trains, "lstm_speed", 20):
        steps = 20 * args.num_envs * args.num_steps  # the same in both
        yield {"script": f"{name}.py", "round": number, "steps_per_second": round(steps / seconds)}


def one_thread() -> Iterator[dict]:
    """Steps/s with one thread of XLA, by PJRT_NPROC, and with one for each core, in turns."""
    for number in range(ROUNDS["one_thread"]):
        for (name, more), steps in THREAD_CASES.items():
            row = {"task": name, "flags": more, "round": number}
            for threads in (1, os.cpu_count()):
                command = SCORED[name].script, f"{SCORED[name].flags} {more}", steps
                speed = ours(*command, PJRT_NPROC=str(threads))[1]
                yield row | {"threads": threads, "steps_per_second": round(speed)}


def in_turns(trains: dict, task: str, calls: int) -> Iterator[tuple]:
    """Name -> training, state; goes on with each for so many iterations -> round, name, seconds."""
    for number in range(ROUNDS[task]):
        for name, (train, state) in trains.items():
            start = time.perf_counter()
            state = train(state, calls)
            int(state.iteration)
            seconds, trains[name] = time.perf_counter() - start, (train, state)
            yield number, name, seconds


FUNCTIONS = (where_time_goes, growth, trxl_speed, halfcheetah_speed, replay_speed)
FUNCTIONS += (lstm_speed, one_thread)
TASKS = {function.__name__: function for function in FUNCTIONS}
TASKS |= {f"pqn_fault_{game.lower()}": partial(pqn_fault, game) for game in MINATAR}


def parse(words: list[str]) -> list[str]:
    about = "\n\n".join(f"{x.__name__}: {getdoc(x)}" for x in (*FUNCTIONS, pqn_fault))
    return parse_tasks(f"{__doc__}\n{about}", TASKS, words).tasks


def files(words: list[str]) -> set[str]:
    """The raw files that a command line writes."""
    return {f"{task}.csv" for task in parse(words)}


def main(names: list[str]) -> None:
    if len(names) > 1:
        for name in names:
            subprocess.run([sys.executable, __file__, name], check=True)
        return
    rows = []
    for row in TASKS[names[0]]():
        show(row, heading=not rows)
        rows.append(row)
    write(names[0], rows)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
