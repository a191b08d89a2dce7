"""The figures of the README, from the raw results.

python benchmarks/figures.py learning_curves   # draws assets/learning_curves.png
python benchmarks/figures.py all               # the others, too
"""

import sys
from collections.abc import Iterable
from statistics import mean

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from record import ROOT, parse_tasks, read
from tasks import (
    CHAIN_SCRIPTS,
    CONTROL,
    FAULT_STEPS,
    LENGTHS,
    MEMORY,
    MEMORY_TASKS,
    MINATAR,
    RESULTS,
)

sys.path.insert(0, str(ROOT))
from plot import COLORS, Curve, summarize


def curves_of(name: str, seeds: Iterable[int]) -> list[Curve]:
    """A learning curve for each of the seeds that was measured."""
    rows, curves = read(f"curves_{name}"), []
    for seed in seeds:
        own = [row for row in rows if float(row["seed"]) == seed]
        columns = [[float(row[name]) for row in own] for name in ("step", "seconds", "return")]
        known = np.isfinite(columns[2])
        if known.any():
            curves.append(Curve(str(seed), *(np.array(column)[known] for column in columns)))
    return curves


def learning_curves() -> Figure:
    """A thin line for each seed, a thick one for their interquartile mean; controls learn nothing."""
    tasks = [(task, curves_of(name, task.seeds)) for name, task in (RESULTS | MEMORY).items()]
    tasks = [(task, curves) for task, curves in tasks if curves and CONTROL not in task.label]
    columns = 4
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(13, 1.9 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (task, curves) in zip(grid, tasks, strict=False):
        for curve in curves:
            axes.plot(curve.steps, curve.values, color=COLORS[0], alpha=0.35, linewidth=0.7)
        steps, middle, *_ = summarize(curves, "steps")
        axes.plot(steps, middle, color=COLORS[0], linewidth=2)
        if task.bar is not None:
            axes.axhline(task.bar, color="gray", linestyle="--", linewidth=0.8)
        label = task.label.partition(",")[0].partition(" (")[0]
        axes.set_title(
            f"{task.script}, {len(curves)} seed{'s' * (len(curves) > 1)}\n{label}", fontsize=8
        )
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in grid[len(tasks) :]:
        axes.axis("off")
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("return of the last 100 training episodes", fontsize=9)
    return figure


def memory_length() -> Figure:
    """A line for the mean of each script, a dot for each seed."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    styles = zip(CHAIN_SCRIPTS.items(), "osD^", ("--", "-.", "-", ":"), strict=True)
    for (name, (label, _)), marker, line in styles:
        own = [row for row in read("memory_length") if row["script"] == name]
        points = [(int(row["length"]), float(row["success"])) for row in own]
        lengths = sorted({x for x, _ in points})
        means = [np.mean([y for x, y in points if x == length]) for length in lengths]
        (drawn,) = axes.plot(lengths, means, line, marker=marker, label=label)
        axes.plot(*zip(*points, strict=True), marker, color=drawn.get_color(), alpha=0.3, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, LENGTHS)
    axes.set(xlabel="steps between the bit and the question", ylabel="right answers")
    axes.axhline(0.5, color="gray", linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=len(CHAIN_SCRIPTS), fontsize="x-small")
    return figure


def growth() -> Figure:
    """Steps per second over what grows."""
    figure, rows = Figure(figsize=(12, 2.8), layout="constrained"), read("growth")
    names = list(dict.fromkeys(row["axis"] for row in rows))
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        own = [row for row in rows if row["axis"] == name]
        values, speeds = [[int(x[key]) for x in own] for key in ("value", "steps_per_second")]
        axes.loglog(values, speeds, "o-", base=2)
        axes.set_yscale("log", base=10)
        axes.set_xticks(values, values, fontsize=7)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("steps/s")
    return figure


def memories() -> Figure:
    """A panel for each task, a row for each memory: a dot for each seed, a line for the mean."""
    rows, figure, means = read("memories"), Figure(figsize=(12, 3.4), layout="constrained"), {}
    for row in rows:
        best = 500 if row["task"] == "cartpole" else 1
        means.setdefault(row["memory"], []).append(float(row["score"]) / best)
    names = sorted(means, key=lambda name: mean(means[name]))
    panels = figure.subplots(1, len(MEMORY_TASKS), sharey=True)
    for axes, (task, (label, _)) in zip(panels, MEMORY_TASKS.items(), strict=True):
        for place, name in enumerate(names):
            scores = [float(x["score"]) for x in rows if (x["memory"], x["task"]) == (name, task)]
            axes.plot(scores, [place] * len(scores), "o", ms=4, alpha=0.5, color="C0")
            if scores:
                axes.plot([mean(scores)] * 2, [place - 0.3, place + 0.3], color="C1", lw=2)
        axes.set_title(label, fontsize=8)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    return figure


def pqn_fault() -> Figure:
    """With the right targets and with the published ones: means, and their standard errors."""
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    for axes, game in zip(figure.subplots(1, len(MINATAR)), MINATAR, strict=True):
        rows = read(f"pqn_fault_{game.lower()}")
        for name, color in zip(("right", "published"), COLORS, strict=False):
            own = [row["curve"].split() for row in rows if row["targets"] == name]
            curves = np.array(own, float)
            steps = np.linspace(0, FAULT_STEPS, curves.shape[1] + 1)[1:]
            middle, error = curves.mean(axis=0), curves.std(axis=0, ddof=1) / len(curves) ** 0.5
            axes.plot(steps, middle, color=color, label=f"{name} targets, {len(curves)} seeds")
            axes.fill_between(steps, middle - error, middle + error, color=color, alpha=0.25, lw=0)
        axes.set_title(f"{game}-MinAtar", fontsize=9)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("return", fontsize=9)
    figure.axes[0].legend(fontsize=7)
    return figure


FIGURES = {  # name: drawn by, dots per inch
    "learning_curves": (learning_curves, 100),
    "memory_length": (memory_length, 130),
    "growth": (growth, 110),
    "pqn_fault": (pqn_fault, 110),
    "memories": (memories, 100),
}


if __name__ == "__main__":
    for name in parse_tasks(__doc__, FIGURES, sys.argv[1:]).tasks:
        draw, dpi = FIGURES[name]
        draw().savefig(ROOT / "assets" / f"{name}.png", dpi=dpi)
