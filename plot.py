# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "matplotlib>=3.9,<4",
#   "numpy>=2",
#   "scipy>=1.14",
#   "tyro>=1.0,<1.1",
# ]
# ///
"""Learning curves of many runs, over steps and over seconds: a row for each task, a line for each
script.

    python plot.py runs/*                                     # learning_curves.png and .svg
    python plot.py runs/ppo__* --out ppo --metric losses/entropy

A line is the interquartile mean over seeds, its band the 95 % bootstrap interval
(arXiv:2108.13264). Runs of the same script and task that differ in flags have lines of their own,
named after what differs. A line ends where the first of its seeds ends: an average over those that
are left would be another one.
"""

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, NamedTuple, NoReturn

import numpy as np
import tyro

# Okabe and Ito's colours, told apart by colour-blind readers, each with a dash and a marker of its own
# for print. Yellow is left out: it is too bright for lines on white.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
MARKERS = "osD^vXP*"
POINTS = 200  # of a line
NO_OPTION = {
    "seed",
    "num_seeds",
    "run_dir",
    "resume",
    "track",
    "tensorboard",
    "checkpoint_every",
}
NO_OPTION |= {"env_id", "env_kwargs", "mask_obs", "eval_env_id", "eval_episodes", "target_return"}


@dataclasses.dataclass(frozen=True)
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders of runs
    out: Path = Path("learning_curves")  # the pictures, without .png and .svg
    metric: str = "charts/episodic_return"  # column of metrics.csv


class Curve(NamedTuple):
    """One seed."""

    seed: str
    steps: np.ndarray  # [N]
    seconds: np.ndarray  # [N], since the launch
    values: np.ndarray  # [N]


class Run(NamedTuple):
    script: str
    task: str
    flags: dict  # what may tell its line from another's
    curves: list[Curve]


def fail(message: str) -> NoReturn:
    """Ends the program with status 2 and one line on stderr that says what to change."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def count(number: int, what: str) -> str:
    """1 seed, 2 seeds."""
    return f"{number} {what}{'s' * (number != 1)}"


def read_run(folder: Path, metric: str) -> Run:
    try:
        config = json.loads((folder / "config.json").read_text())
        flags = dict(config["args"])
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{folder} is no run: it needs a config.json and a metrics.csv")
    if not rows:
        fail(f"{folder}/metrics.csv is empty")
    if metric not in rows[0]:
        fail(f"{folder}/metrics.csv has no {metric}, but {', '.join(list(rows[0])[3:])}")
    curves = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if row["seed"] == seed]
        columns = [[float(row[name]) for row in own] for name in ("step", "seconds", metric)]
        steps, seconds, values = np.array(columns)
        known = np.isfinite(values)  # no episode has ended at first
        if known.any():
            curves.append(Curve(seed, steps[known], seconds[known], values[known]))
    task = flags["env_id"]
    if flags.get("env_kwargs") not in (None, "{}"):
        task += f" {flags['env_kwargs']}"
    if flags.get("mask_obs"):
        task += f" without {', '.join(map(str, flags['mask_obs']))}"
    flags = {name: x for name, x in flags.items() if name not in NO_OPTION}
    return Run(config["script"], task, flags, curves)


def lines_of(runs: list[Run]) -> dict[str, list[Curve]]:
    """Runs of one task -> label: curves."""
    lines = {}
    for run in runs:
        alike = [other.flags for other in runs if other.script == run.script]
        names = sorted(set().union(*alike))
        differ = [x for x in names if len({repr(flags.get(x)) for flags in alike}) > 1]
        label = " ".join(
            [run.script, *[f"--{x.replace('_', '-')} {run.flags.get(x)}" for x in differ]]
        )
        line = lines.setdefault(label, [])
        again = {curve.seed for curve in line} & {curve.seed for curve in run.curves}
        if again:
            fail(f"{run.task}: {label} has seed {min(again)} twice; leave one of the runs out")
        line.extend(run.curves)
    return dict(sorted(lines.items()))


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """[..., S, N] over seeds -> [..., N], without the lowest and the highest quarter."""
    from scipy import stats

    return stats.trim_mean(values, 0.25, axis=-2)


def bootstrap(values: np.ndarray, samples: int = 2_000) -> tuple[np.ndarray, np.ndarray]:
    """[S, N] -> the 95 % interval of the interquartile mean, seeds drawn with replacement, both [N]."""
    drawn = np.random.default_rng(0).integers(len(values), size=(samples, len(values)))
    means = interquartile_mean(values[drawn])  # [samples, N]
    return np.quantile(means, 0.025, axis=0), np.quantile(means, 0.975, axis=0)


def summarize(curves: list[Curve], axis: str) -> tuple[np.ndarray, ...]:
    """-> positions on the axis, interquartile mean and its interval's low and high ends, all [N]."""
    places = [getattr(curve, axis) for curve in curves]
    start, end = max(x[0] for x in places), min(x[-1] for x in places)
    if end < start:
        fail(f"the seeds of a line share no {axis}: plot their runs apart")
    grid = np.linspace(start, end, POINTS)
    values = [np.interp(grid, x, curve.values) for x, curve in zip(places, curves, strict=True)]
    values = np.array(values)  # [S, N]
    return grid, interquartile_mean(values), *bootstrap(values)


def draw(runs: list[Run], args: Args) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    tasks = sorted({run.task for run in runs})
    lines = {task: lines_of([run for run in runs if run.task == task]) for task in tasks}
    labels = list(dict.fromkeys(label for task in tasks for label in lines[task]))
    figure = Figure(figsize=(9, 3.2 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for row, task in zip(grid, tasks, strict=True):
        for axes, axis in zip(row, ("steps", "seconds"), strict=True):
            for label, curves in lines[task].items():
                number = labels.index(label)
                x, middle, low, high = summarize(curves, axis)
                style = {"color": COLORS[number % len(COLORS)], "ls": DASHES[number % len(DASHES)]}
                style |= {"marker": MARKERS[number % len(MARKERS)], "markevery": POINTS // 8}
                name = f"{label} ({count(len(curves), 'seed')})"
                axes.plot(x, middle, label=name, markersize=4, linewidth=1.5, **style)
                if len(curves) > 1:
                    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
            words = {"steps": "environment steps", "seconds": "seconds since the launch"}
            axes.set(xlabel=words[axis], title=task)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(alpha=0.3)
        row[0].set_ylabel(args.metric.removeprefix("charts/").replace("_", " "))
        row[0].legend(fontsize="small")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "unroll"}):
        for suffix in (".png", ".svg"):
            figure.savefig(args.out.with_name(args.out.name + suffix), dpi=150)


def main(args: Args) -> None:
    if not args.runs:
        fail("name the folders of runs, like runs/*")
    begun = [folder for folder in args.runs if (folder / "metrics.csv").exists()]
    for folder in set(args.runs) - set(begun):
        print(f"{folder} is left out: it has no metrics.csv", file=sys.stderr)
    if not begun:
        fail("none of these folders holds a run")
    runs = [read_run(folder, args.metric) for folder in begun]
    runs = [run for run in runs if run.curves]
    if not runs:
        fail(f"no run has a value of {args.metric}: no episode has ended")
    draw(runs, args)
    seeds = count(sum(len(run.curves) for run in runs), "seed")
    print(f"{args.out}.png and {args.out}.svg: {seeds} of {count(len(runs), 'run')}")


if __name__ == "__main__":
    main(tyro.cli(Args))
