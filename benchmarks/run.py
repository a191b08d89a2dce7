"""Measures our scripts on the tasks of tasks.py.

    python benchmarks/run.py scores ppo_lunarlander a2c_lunarlander
    python benchmarks/run.py scores ppo_lunarlander --seeds 11 12 13
    python benchmarks/run.py launches ppo_lunarlander
    python benchmarks/run.py speed all
    python benchmarks/run.py memory_length ppo_lstm_8 ppo_lstm_32

Prints Markdown and writes benchmarks/results/ after each seed: its rows take the place of those of
the same seed, the others stay. tables.py shows the scores of the seeds that tasks.py names;
hyperparameters are to be chosen on others (in another folder, see record.py).
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from inspect import getdoc
from math import inf, isnan
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from record import (
    Run,
    command_of,
    metrics_of,
    parse_tasks,
    run_script,
    show,
    without_xla_settings,
    write,
)
from tasks import CHAIN, TASKS, TEN, Task

SECONDS = 6  # of training, to time steps/s


def of_seed(run: Run, seed: int) -> tuple[dict, list[dict]]:
    """A finished run -> what evaluation.json says of the seed, and its learning curve."""
    metrics = [row for row in run.metrics if row["seed"] == str(seed)]
    every = max(1, len(metrics) // 200)  # points enough for a picture
    names = {"step": "step", "seconds": "seconds", "return": "charts/episodic_return"}
    curve = [
        {"seed": float(seed)} | {short: float(row[name]) for short, name in names.items()}
        for row in [*metrics[:-1:every], metrics[-1]]
    ]
    (result,) = [row for row in run.evaluation if row["seed"] == seed]
    row = {"seed": seed} | {name: result[name] for name in ("mean", "std", "min", "max")}
    last = {"steps": int(curve[-1]["step"]), "training_return": curve[-1]["return"]}
    return row | last, curve


def scores_of(run: Run, seed: int) -> tuple[list[dict], list[dict]]:
    """The same, to be written."""
    row, curve = of_seed(run, seed)
    return [{key: round(value, 1) for key, value in row.items()}], curve


def whole_run(task: Task, seed: int) -> Run:
    return run_script(task.script, f"{task.scored_flags} --seed {seed}")


def scores(name: str, seed: int) -> tuple[list[dict], list[dict]]:
    """Greedy return over 100 episodes after a whole run, a process for each seed; nothing is timed."""
    return scores_of(whole_run(TASKS[name], seed), seed)


def launches(name: str, seed: int) -> tuple[list[dict]]:
    """Seconds from typing the command to the last line of progress (nan if the target is missed),
    with an empty compilation cache: imports and compilation count."""
    task = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{task.flags} --target-return {task.target} --seed {seed} --eval-episodes 0"
        command = command_of(task.script, flags, f"{folder}/run")
        environment = without_xla_settings() | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        start = time.time()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for line in process.stdout:
            if "steps/s" in line:
                seconds = round(time.time() - start, 2)
        if process.wait():
            raise SystemExit(f"{command} failed")
        last = metrics_of(Path(folder) / "run")[-1]
    row = {"seed": seed, "seconds": float("nan"), "steps": float("nan")}
    if float(last["charts/episodic_return"]) >= task.target:
        row |= {"seconds": seconds, "steps": int(last["step"])}
    return ([row],)


def speed(name: str, number: int) -> tuple[list[dict]]:
    """Steps/s of the second half of some seconds of training: no launch, no compilation, no
    evaluation, but logging. The run is stopped by Ctrl-C's signal. Two rounds over the tasks."""
    task = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = command_of(task.script, f"{task.flags} --eval-episodes 0", run_dir)
        options = {"stdout": subprocess.DEVNULL, "env": without_xla_settings()}
        process = subprocess.Popen(command, **options)
        while process.poll() is None:
            if metrics_of(run_dir):
                try:
                    process.wait(SECONDS)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGINT)
                    process.wait()
            time.sleep(0.05)
        if process.returncode not in (0, 130, -signal.SIGINT):  # -SIGINT: it was about to end
            raise SystemExit(f"{command} ended with status {process.returncode}")
        points = [(int(row["step"]), float(row["seconds"])) for row in metrics_of(run_dir)]
    (_, start), (last, end) = points[0], points[-1]
    middle = [x for x in points if x[1] >= (start + end) / 2][0]
    first, begun = middle if middle != points[-1] else points[0]
    speed = round((last - first) / (end - begun))
    return ([{"task": name, "round": number, "steps_per_second": speed}],)


def memory_length(name: str, seed: int) -> tuple[list[dict]]:
    """MemoryChain by its length: right answers after a whole run, and the steps until the last 100
    training episodes averaged 0.95 (empty if they never did). All of it takes hours."""
    result, curve = of_seed(whole_run(CHAIN[name], seed), seed)
    script, length = name.rsplit("_", 1)
    row = {"script": script, "length": int(length), "seed": seed}
    row |= {"success": round((result["mean"] + 1) / 2, 3), "steps": result["steps"]}
    learned = (int(point["step"]) for point in curve if point["return"] >= 0.95)
    return ([row | {"learned_after": next(learned, "")}],)


class Measurement(NamedTuple):
    measure: Callable  # of a task's name and a seed -> the rows of each of its files
    tasks: list[str]
    files: str  # {} for the task
    keys: str  # of a row
    value: str  # what is summed up


SCORED, TIMED = [[x for x in TASKS if getattr(TASKS[x], key)] for key in ("seeds", "target")]
MEASUREMENTS = {
    "scores": Measurement(scores, SCORED, "scores_{} curves_{}", "seed", "mean"),
    "launches": Measurement(launches, TIMED, "time_to_solve_{}", "seed", "seconds"),
    "speed": Measurement(speed, [*TASKS], "steps_per_second", "task round", "steps_per_second"),
    "memory_length": Measurement(
        memory_length, [*CHAIN], "memory_length", "script length seed", "success"
    ),
}


def parse(words: list[str]) -> tuple:
    """-> the name of a measurement, tasks and seeds."""
    if not words or words[0] not in MEASUREMENTS:
        about = [f"{name}: {getdoc(x.measure)}" for name, x in MEASUREMENTS.items()]
        sys.exit("\n\n".join([__doc__, *about]))
    doc = MEASUREMENTS[words[0]].measure.__doc__
    args = parse_tasks(doc, MEASUREMENTS[words[0]].tasks, words[1:], seeds=True)
    return words[0], args.tasks, args.seeds


def files(words: list[str]) -> set[str]:
    """The raw files that a command line writes."""
    name, tasks, _ = parse(words)
    patterns = MEASUREMENTS[name].files.split()
    return {f"{pattern.format(task)}.csv" for task in tasks for pattern in patterns}


def main(name: str, tasks: list[str], seeds: list[int] | None) -> None:
    measurement, values = MEASUREMENTS[name], []
    own = {"launches": TEN, "speed": range(2)}.get(name)  # "seeds" of speed are rounds
    turns = [(task, x) for task in tasks for x in seeds or own or (TASKS | CHAIN)[task].seeds]
    if name == "speed":
        turns.sort(key=lambda turn: turn[1])  # round by round
    for number, (task, seed) in enumerate(turns):
        files = measurement.measure(task, seed)
        for pattern, rows in zip(measurement.files.split(), files, strict=True):
            write(pattern.format(task), rows, *measurement.keys.split())
        show({"task": task} | files[0][0], heading=number == 0)
        values.append((task, files[0][0][measurement.value]))
    for task in tasks:
        # A seed that missed the target took longer than any that did not.
        own = [inf if isnan(value) else value for x, value in values if x == task]
        print(f"\n{task}: mean {mean(own):,.2f}, median {median(own):,.2f} of {len(own)}")


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
