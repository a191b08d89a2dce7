"""One picture of all learning curves, from the raw data that scores.py has written.

    python benchmarks/curves.py

Reads benchmarks/results/curves_*.csv and draws assets/learning_curves.png: a thin line for each
seed, a thick one for their interquartile mean.
"""

import sys

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from record import ROOT, read
from scores import TASKS
from tables import TABLES, script_of

sys.path.insert(0, str(ROOT))
from plot import COLORS, Curve, summarize


def curves_of(task: str) -> list[Curve]:
    rows = read(f"curves_{task}")
    curves = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if row["seed"] == seed]
        columns = [[float(row[name]) for row in own] for name in ("step", "seconds", "return")]
        known = np.isfinite(columns[2])
        curves.append(Curve(seed, *(np.array(column)[known] for column in columns)))
    return curves


def main() -> None:
    rows = TABLES["results"] + TABLES["memory"]
    rows = [row for row in rows if read(f"curves_{row[0]}")]
    columns = 4
    figure = Figure(figsize=(13, 2.2 * -(-len(rows) // columns)), layout="constrained")
    grid = list(figure.subplots(-(-len(rows) // columns), columns, squeeze=False).flat)
    for axes, (name, task, _) in zip(grid, rows, strict=False):
        curves, bar = curves_of(name), TASKS[name][3]
        for curve in curves:
            axes.plot(curve.steps, curve.values, color=COLORS[0], alpha=0.35, linewidth=0.7)
        steps, middle, *_ = summarize(curves, "steps")
        axes.plot(steps, middle, color=COLORS[0], linewidth=2)
        if bar:
            axes.axhline(bar, color="gray", linestyle="--", linewidth=0.8)
        task = task.partition(",")[0].partition(" (")[0]
        axes.set_title(f"{script_of(name)}.py, {len(curves)} seeds\n{task}", fontsize=8)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in grid[len(rows) :]:
        axes.axis("off")
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("return of the last 100 training episodes", fontsize=9)
    figure.savefig(ROOT / "assets" / "learning_curves.png", dpi=110)


if __name__ == "__main__":
    main()
