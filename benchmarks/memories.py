"""rppo.py with every memory of memories/ on every task, 64 wide.

    python benchmarks/memories.py rates gru s5    # four step sizes, on seeds that are not reported
    python benchmarks/memories.py scores all

A row for each run: the mean return of 100 greedy episodes, the seconds of the whole process and the
steps/s of the second half of its training; what the file has is not run again. A memory has five seeds
on a task, or three where a run takes a minute or more. `rates` runs half of
RepeatPrevious, k = 4, and CartPole on two seeds. A memory has one step size for all tasks: that with the
largest sum of the two means there, a return of 500 in CartPole counting as 1; the smaller one of two
that are equal.
"""

import sys
from collections import defaultdict
from itertools import product
from math import prod
from statistics import mean, median

import jax
from flax import nnx
from record import ROOT, parse_tasks, read, run_script, show, write
from tasks import MEMORY_TASKS

sys.path.insert(0, str(ROOT))
import rppo

SEEDS = 1, 2, 3, 4, 5  # the last two where a run takes less than a minute
STEP_SIZES = (3e-4, 1e-3, 2e-3, 4e-3)
CHOSEN_ON = {  # task: seeds that are not reported, the largest score, more flags
    "repeat_previous": ((21,), 1.0, "--total-timesteps 500000"),
    "cartpole": ((21, 22), 500.0, ""),
}
MEMORIES = "gru lstm slstm mlstm xlstm s5 lru ffm shm gpt2 gtrxl dnc framestack none".split()


def chosen(memory: str) -> float:
    """The step size that is best in memory_rates.csv."""
    found = defaultdict(list)  # step size, task: shares of the largest score
    for row in read("memory_rates"):
        if row["memory"] == memory:
            share = float(row["score"]) / CHOSEN_ON[row["task"]][1]
            found[float(row["step_size"]), row["task"]].append(share)
    if not found:
        sys.exit(
            f"memories.py: no step size yet, run: python benchmarks/memories.py rates {memory}"
        )
    sums = defaultdict(float)
    for (size, _), shares in found.items():
        sums[size] += mean(shares)
    return max(sorted(sums), key=sums.get)


def flags_of(memory: str, task: str, step_size: float) -> str:
    return f"{MEMORY_TASKS[task][1]} --memory {memory} --learning-rate {step_size}"


def sizes_of(memory: str) -> tuple[int, int]:
    """-> numbers in its parameters, and in its state for one environment."""
    made = rppo.load_memory(memory, "{}", 64)(rngs=nnx.Rngs(0))
    count = lambda tree: sum(prod(x.shape) for x in jax.tree.leaves(tree))
    return count(nnx.state(made, nnx.Param)), count(made.initial_memory(1))


def measure(memory: str, task: str, seed: int, step_size: float, more: str = "") -> dict:
    """A whole run -> its row."""
    run = run_script("rppo.py", f"{flags_of(memory, task, step_size)} --seed {seed} {more}")
    points = [(int(row["step"]), float(row["seconds"])) for row in run.metrics]
    (first, begun), (last, end) = points[len(points) // 2], points[-1]
    row = {"memory": memory, "task": task, "seed": seed, "step_size": step_size}
    row |= dict(zip(("parameters", "state"), sizes_of(memory), strict=True))
    row |= {"score": round(run.evaluation[0]["mean"], 3), "seconds": round(run.seconds, 1)}
    return row | {"steps_per_second": round((last - first) / (end - begun))}


def rates(memory: str):
    known = known_in("memory_rates", memory)
    for task, (seeds, _, more) in CHOSEN_ON.items():
        for seed, size in product(seeds, STEP_SIZES):
            if (task, seed, size) not in known:
                yield measure(memory, task, seed, size, more)


def scores(memory: str):
    known, size = known_in("memories", memory), chosen(memory)
    for task, seed in product(MEMORY_TASKS, SEEDS):
        wanted = seed <= 3 or seconds_of(memory, task) < 60
        if wanted and (task, seed, size) not in known:
            yield measure(memory, task, seed, size)


def seconds_of(memory: str, task: str) -> float:
    """The median time of a memory's first three runs of a task, by memories.csv."""
    own = [row for row in read("memories") if (row["memory"], row["task"]) == (memory, task)]
    return median(float(row["seconds"]) for row in own if int(row["seed"]) <= 3)


def known_in(name: str, memory: str) -> set[tuple]:
    """The runs of a memory that a raw file has: task, seed, step size."""
    rows = [row for row in read(name) if row["memory"] == memory]
    return {(row["task"], int(row["seed"]), float(row["step_size"])) for row in rows}


MEASUREMENTS = {  # name: what gives the rows of a memory, file, keys
    "rates": (rates, "memory_rates", ("memory", "task", "seed", "step_size")),
    "scores": (scores, "memories", ("memory", "task", "seed")),
}


def files(words: list[str]) -> set[str]:
    """The raw files that a command line writes."""
    parse_tasks(__doc__, MEMORIES, words[1:])
    return {f"{MEASUREMENTS[words[0]][1]}.csv"}


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] not in MEASUREMENTS:
        sys.exit(__doc__)
    memories = parse_tasks(__doc__, MEMORIES, sys.argv[2:]).tasks
    measurement, name, keys = MEASUREMENTS[sys.argv[1]]
    for number, row in enumerate(row for memory in memories for row in measurement(memory)):
        write(name, [row], *keys)
        show(row, heading=number == 0)
