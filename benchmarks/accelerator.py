"""Our scripts on the accelerator that JAX finds (on the CPU too, to try it out).

    python benchmarks/accelerator.py ppo_cartpole trxl     # parts, each begun within eight minutes
    python benchmarks/accelerator.py all --minutes 4
    python benchmarks/accelerator.py craftax_learning      # goes on from its checkpoint each time
    python benchmarks/accelerator.py craftax_learning_lstm humanoid_simba

Writes a row of results/accelerator.csv for each case: seconds to trace and compile, environment
steps/s of all seeds in steady state, peak memory. Each case has a process of its own: one that needs
more memory than there is, or more than five minutes to compile or two to be timed, says so, and the
next begins. --at-once compile side by side (by default half as many as there are cores, and each
then has more seconds of compiling than alone); when all of them have, they are timed one after the
other. Cases measured on this device, or too large for it, are not run again; with --again they are.
What is not begun in these minutes is for the next time. A slice of a long run ends with the minutes
and writes its whole curve to results/long_runs.csv.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from peers import our_script, our_training
from record import ROOT, machine, metrics_of, read, show, without_xla_settings, write

SECONDS = 3  # of training that are timed
OUT_OF_MEMORY = "out of memory"
LIMITS = {"compile": 300, "be timed": 120}  # seconds that a case may take
RUNS, POINTS = ROOT / "runs", 100  # where the long runs are, and at most so many points of a curve
PPO = {"num_steps": 128, "num_minibatches": 4, "update_epochs": 4}
SMALL = {"num_envs": 4} | PPO
TRXL = {"num_envs": 512, "num_steps": 128, "memory_length": 128, "window_length": 64}
TRXL |= {
    "num_layers": 2,
    "num_heads": 8,
    "embed_dim": 256,
    "num_minibatches": 8,
    "update_epochs": 4,
}
CHAIN = {"env_id": "gymnax::MemoryChain-bsuite", "env_kwargs": '{"memory_length": 100}'}
CRAFTAX = {"env_id": "craftax::Craftax-Symbolic-v1"}
SIZES, SEEDS = (2048, 8192, 16_384, 65_536), (1, 8, 64, 256, 1024, 2048)


def over(script: str, field: str, values: tuple, fixed: dict) -> list[tuple[str, dict]]:
    return [(script, fixed | {field: value}) for value in values]


def task(name: str) -> dict:
    return {"env_id": f"gymnax::{name}"}


PARTS = {  # name: cases, each a script and the flags that are not its defaults
    "ppo_cartpole": over("ppo", "num_envs", SIZES, task("CartPole-v1") | PPO),
    "ppo_minatar": over("ppo", "num_envs", SIZES, task("Breakout-MinAtar") | PPO),
    "ppo_seeds": over("ppo", "num_seeds", SEEDS, task("CartPole-v1") | SMALL),
    "ppo_minatar_seeds": over("ppo", "num_seeds", SEEDS, task("Breakout-MinAtar") | SMALL),
    "replay": [
        *over("dqn", "num_seeds", (1, 64, 512), {"buffer_size": 10_000, "n_step": 1}),
        *over("sac", "num_seeds", (1, 16, 128), {}),
        *over("pqn", "num_envs", (128, 2048, 16_384), task("Breakout-MinAtar")),
    ],
    "memories": [
        *over("rppo", "memory", ("gru", "lstm", "s5", "mlstm", "gtrxl"), {"num_envs": 1024}),
        *over("drqn", "num_envs", (16, 256), {}),
    ],
    "trxl": [
        (script, TRXL | where | {"compute_dtype": kind})
        for where in (CHAIN, CRAFTAX)
        for kind in ("float32", "bfloat16")
        for script in ("ppo_trxl", "ppo_gtrxl")
    ],
}
CRAFTAX_MAXIMUM = 226  # all achievements, 25 x 1 + 18 x 3 + 15 x 5 + 9 x 8 (arXiv:2402.16801)


def learning(script: str, network: str) -> list[str]:
    """The configuration that transformerXL_PPO_JAX publishes Craftax's scores with."""
    return [
        script,
        *"--env-id craftax::Craftax-Symbolic-v1 --num-envs 1024 --num-steps 128".split(),
        *f"--num-minibatches 8 --update-epochs 4 {network} --learning-rate 2e-4".split(),
        *"--gamma 0.999 --gae-lambda 0.8 --ent-coef 0.002 --max-grad-norm 1 --reward-scale 1".split(),
        *"--total-timesteps 1000000000 --checkpoint-every 20 --eval-episodes 0".split(),
    ]


SIMBA = (  # the humanoid of the README, up to the million frames that SimBa's scores are given for
    "--env-id envpool::HumanoidWalk-v1 --block-type simba --norm-obs --actor-hidden-size 128 "
    "--actor-num-blocks 1 --critic-hidden-size 512 --num-critics 1 --policy-lr 1e-4 --q-lr 1e-4 "
    "--weight-decay 1e-2 --updates-per-step 2 --target-entropy-scale 0.5 --alpha 0.01 "
    "--buffer-size 1000000 --learning-starts 5000 --total-timesteps 500000 --eval-episodes 10 "
    """--num-steps 250 --env-kwargs '{"frame_skip": 10, "max_episode_steps": 500}'"""
)
LEARNING = {  # name: the largest return there is, script and flags
    # After 1e9 steps, of the maximum: published 18.3 %; modrax, with an LSTM, says 19.5 %.
    "craftax_learning": (
        CRAFTAX_MAXIMUM,
        learning(
            "ppo_gtrxl.py", "--memory-length 128 --window-length 64 --embed-dim 256 --num-heads 8"
        ),
    ),
    "craftax_learning_lstm": (CRAFTAX_MAXIMUM, learning("ppo_lstm.py", "--hidden-size 512")),
    # A reward of at most 1 for each of 500 actions, which count twice in published scores.
    "humanoid_simba": (500, ["sac.py", *shlex.split(SIMBA)]),
}


def timed(script: str, fields: dict, limits: dict[str, int]) -> dict:
    """A case in this process: it compiles, waits for its turn, runs up to where it learns, then for some seconds."""
    signal.alarm(limits["compile"])  # not handled, it ends the process, within XLA too
    import jax

    module, start = our_script(script), time.perf_counter()
    args = module.Args(**{"total_timesteps": 10**9} | fields)
    train, state = our_training(module, args, args.num_seeds)
    compiled = time.perf_counter()
    signal.alarm(0)
    print("compiled", flush=True)
    input()
    signal.alarm(limits["be timed"])
    unlearned = getattr(args, "learning_starts", 0) // (args.num_envs * args.num_steps)
    state = jax.block_until_ready(train(state, 1 + unlearned))
    begun = time.perf_counter()
    state = jax.block_until_ready(train(state, 1))
    calls = max(1, min(1000, int(SECONDS / (time.perf_counter() - begun))))
    begun = time.perf_counter()
    jax.block_until_ready(train(state, calls))
    seconds = time.perf_counter() - begun
    steps = calls * args.num_envs * args.num_steps * args.num_seeds
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    row = {
        "compile_seconds": round(compiled - start, 1),
        "steps_per_second": round(steps / seconds),
    }
    return row | {"peak_gib": round(peak / 2**30, 2), "note": ""}


def measure(cases: list[tuple[str, dict]]) -> Iterator[dict]:
    """The same in a process for each, which may fail: all compile, then they are timed in turn."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for number, (script, fields) in enumerate(cases):
            command = [sys.executable, __file__, "case", script, json.dumps([fields, LIMITS])]
            environment = without_xla_settings() | {
                "JAX_TRACEBACK_FILTERING": "off"
            }  # the error last
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with (Path(folder) / str(number)).open("w") as errors:
                processes.append(subprocess.Popen(command, stderr=errors, env=environment, **pipes))
        ready = [process.stdout.readline() for process in processes]
        for number, process in enumerate(processes):
            answer, _ = process.communicate("go\n" if ready[number] else None)
            errors = (Path(folder) / str(number)).read_text()
            if process.returncode == 0:
                yield json.loads(answer.splitlines()[-1])
            elif process.returncode == -signal.SIGALRM:
                phase = "be timed" if ready[number] else "compile"
                yield {"note": f"took longer than {LIMITS[phase]} s to {phase}"}
            elif "RESOURCE_EXHAUSTED" in errors or OUT_OF_MEMORY in errors.lower():
                yield {"note": OUT_OF_MEMORY}
            else:
                lines = errors.strip().splitlines() or [f"status {process.returncode}"]
                yield {"note": lines[-1][:200]}


def run_parts(names: list[str], until: float, again: bool, at_once: int) -> None:
    device = machine()
    final = [row for row in read("accelerator") if row["note"] in ("", OUT_OF_MEMORY)]
    known = {(row["device"], row["script"], row["flags"]) for row in final}
    flags = lambda case: json.dumps(case[1], sort_keys=True)
    cases = [(name, *case) for name in names for case in PARTS[name]]
    cases = [x for x in cases if again or (device, x[1], flags(x[1:])) not in known]
    for some in (cases[at : at + at_once] for at in range(0, len(cases), at_once)):
        if time.time() > until:
            print(f"out of minutes; the same command goes on with {some[0]}")
            return
        results = measure([case[1:] for case in some])
        for (part, script, fields), result in zip(some, results, strict=True):
            key = {"device": device, "script": script, "flags": flags((script, fields))}
            write("accelerator", [key | {"part": part} | result], *key)
            show({"script": script, **fields} | measured_of(result), heading=True)


def measured_of(row: dict) -> dict:
    return {x: row.get(x, "") for x in ("compile_seconds", "steps_per_second", "peak_gib", "note")}


def learn(name: str, until: float) -> None:
    """A slice of a long run: from its checkpoint, if there is one, to the last minute."""
    (maximum, (script, *flags)), run = LEARNING[name], RUNS / name
    resumed = ["--resume", run] if (run / "config.json").exists() else [*flags, "--run-dir", run]
    process = subprocess.Popen(
        [sys.executable, ROOT / script, *resumed], env=without_xla_settings()
    )
    try:
        process.wait(max(1.0, until - time.time()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it saves, and ends with status 130
        process.wait()
    if process.returncode not in (0, 130):
        sys.exit(f"{name}: {script} ended with status {process.returncode}, nothing is written")
    origin = {"device": machine(), "part": name}
    curve = curve_of(metrics_of(run), maximum)
    if curve:
        write("long_runs", [origin | point for point in curve], *origin)
        last = {x: curve[-1][x] for x in ("step", "return", "percent")}
        row = origin | {"script": script, "flags": " ".join(flags), "note": json.dumps(last)}
        row |= {"steps_per_second": curve[-1]["steps_per_second"]}
        write("accelerator", [row], "device", "script", "flags")
        print(f"{name}: {last}")


def curve_of(metrics: list[dict], maximum: float) -> list[dict]:
    """Every n-th row up to the last, at most POINTS; seconds are those of all slices."""
    curve = []
    for row in metrics[:: -(1 + len(metrics) // POINTS)][::-1]:
        value = float(row["charts/episodic_return"])
        point = {"step": int(row["step"]), "return": round(value, 3)}
        point |= {"percent": round(100 * value / maximum, 2), "seconds": row["seconds"]}
        curve.append(point | {"steps_per_second": row["charts/SPS"]})
    return curve


def parse(words: list[str]):
    formatter, known = argparse.RawDescriptionHelpFormatter, [*PARTS, *LEARNING]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "parts", nargs="+", choices=["all", *known], metavar="PART", help=str(known)
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for each part")
    half = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--at-once", type=int, default=half, help="cases that compile side by side")
    parser.add_argument("--again", action="store_true", help="measure what is known, too")
    args = parser.parse_args(words or ["--help"])
    args.parts = known if "all" in args.parts else args.parts
    return args


def files(words: list[str]) -> set[str]:
    """The raw files that a command line writes."""
    learns = set(parse(words).parts) & set(LEARNING)
    return {"accelerator.csv"} | ({"long_runs.csv"} if learns else set())


def main(words: list[str]) -> None:
    args = parse(words)
    parts = [part for part in args.parts if part in PARTS]
    until = time.time() + 60 * args.minutes * len(parts)
    run_parts(parts, until, args.again, args.at_once)
    for name in args.parts:
        if name in LEARNING:
            learn(name, time.time() + 60 * args.minutes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others wait beside it
        print(json.dumps(timed(sys.argv[2], *json.loads(sys.argv[3]))))
    else:
        main(sys.argv[1:])
