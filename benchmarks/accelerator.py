"""Our scripts on the accelerator that JAX finds (on the CPU too, to try it out).

    python benchmarks/accelerator.py ppo_cartpole trxl     # parts, each of at most eight minutes
    python benchmarks/accelerator.py all --minutes 4
    python benchmarks/accelerator.py craftax_learning      # goes on from its checkpoint each time

Writes a row of results/accelerator.csv for each case: seconds to trace and compile, environment
steps/s of all seeds in steady state, peak memory. Each case has a process of its own, so one that
needs more memory than there is says "out of memory" and the next begins. --at-once compile side by
side (by default half as many as there are cores, and each then has more seconds of compiling than
alone); when all of them have, they are timed one after the other. Cases measured on this device are
not run again; with --again they are. What is not begun in these minutes is for the next time.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from peers import our_script, our_training
from record import ROOT, machine, metrics_of, read, show, without_xla_flags, write

SECONDS = 3  # of training that are timed
RUN = ROOT / "runs" / "craftax_learning"
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
        *over("dqn", "num_seeds", (1, 64, 512), {}),
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
LEARNING = [  # the configuration that transformerXL_PPO_JAX publishes Craftax's scores with
    "ppo_gtrxl.py",
    *"--env-id craftax::Craftax-Symbolic-v1 --num-envs 1024 --num-steps 128 --num-minibatches 8".split(),
    *"--update-epochs 4 --memory-length 128 --window-length 64 --embed-dim 256 --num-heads 8".split(),
    *"--learning-rate 2e-4 --gamma 0.999 --gae-lambda 0.8 --ent-coef 0.002 --max-grad-norm 1".split(),
    *"--reward-scale 1 --total-timesteps 1000000000 --checkpoint-every 20 --eval-episodes 0".split(),
]


def timed(script: str, fields: dict) -> dict:
    """A case in this process: it compiles, waits for its turn, runs up to where it learns, then for some seconds."""
    import jax

    module, start = our_script(script), time.perf_counter()
    args = module.Args(**{"total_timesteps": 10**9} | fields)
    train, state = our_training(module, args, args.num_seeds)
    compiled = time.perf_counter()
    print("compiled", flush=True)
    input()
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
            command = [sys.executable, __file__, "case", script, json.dumps(fields)]
            environment = without_xla_flags() | {"JAX_TRACEBACK_FILTERING": "off"}  # the error last
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with (Path(folder) / str(number)).open("w") as errors:
                processes.append(subprocess.Popen(command, stderr=errors, env=environment, **pipes))
        ready = [process.stdout.readline() for process in processes]
        for number, process in enumerate(processes):
            answer, _ = process.communicate("go\n" if ready[number] else None)
            if process.returncode == 0:
                yield json.loads(answer.splitlines()[-1])
                continue
            errors = (Path(folder) / str(number)).read_text()
            lines = errors.strip().splitlines() or [f"status {process.returncode}"]
            memory = "RESOURCE_EXHAUSTED" in errors or "out of memory" in errors.lower()
            yield {"note": "out of memory" if memory else lines[-1][:200]}


def run_parts(names: list[str], until: float, again: bool, at_once: int) -> None:
    device = machine()
    known = {(row["device"], row["script"], row["flags"]) for row in read("accelerator")}
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


def craftax_learning(until: float) -> None:
    """A slice of a run of 1e9 steps: from its checkpoint, if there is one, to the last minute."""
    script, *flags = LEARNING
    resumed = ["--resume", RUN] if (RUN / "config.json").exists() else [*flags, "--run-dir", RUN]
    process = subprocess.Popen([sys.executable, ROOT / script, *resumed], env=without_xla_flags())
    try:
        process.wait(max(1.0, until - time.time()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it saves, and ends with status 130
        process.wait()
    rows = metrics_of(RUN)
    if rows:
        last = {"step": rows[-1]["step"], "return": rows[-1]["charts/episodic_return"]}
        row = {"device": machine(), "part": "craftax_learning", "script": script}
        row |= {"flags": " ".join(flags), "steps_per_second": rows[-1]["charts/SPS"]}
        write("accelerator", [row | {"note": json.dumps(last)}], "device", "script", "flags")
        print(f"craftax_learning: {last}")


def parse(words: list[str]):
    formatter, known = argparse.RawDescriptionHelpFormatter, [*PARTS, "craftax_learning"]
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
    parse(words)
    return {"accelerator.csv"}


def main(words: list[str]) -> None:
    args = parse(words)
    parts = [part for part in args.parts if part in PARTS]
    until = time.time() + 60 * args.minutes * len(parts)
    run_parts(parts, until, args.again, args.at_once)
    if "craftax_learning" in args.parts:
        craftax_learning(time.time() + 60 * args.minutes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others wait beside it
        print(json.dumps(timed(sys.argv[2], json.loads(sys.argv[3]))))
    else:
        main(sys.argv[1:])
