"""What breaks without a line: a script as it is and with that line changed, five seeds each.

    python benchmarks/without.py broadcast layer_norm
    python benchmarks/without.py all

Writes the training returns of every run, at some twenty steps, and its greedy score to
results/without.csv; docs/build.py draws them beside the code. Runs that are there are not run again.
"""

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from record import ROOT, parse_tasks, read, run_script, show, write

SEEDS, POINTS = range(1, 6), 20


class Change(NamedTuple):
    script: str
    part: str  # function or class that the line belongs to
    what: str  # for the figure's legend: "without ..."
    replaced: dict[str, str]  # text, once in the script: what stands there instead
    flags: str = ""


CHANGES = {
    "broadcast": Change(
        "ppo",
        "ppo_loss",
        "values of shape [M, 1] in the value loss",
        {"v_error = (value - returns) ** 2\n": "v_error = (value[:, None] - returns) ** 2\n"},
    ),
    "clip": Change(
        "ppo",
        "ppo_loss",
        "without the clipped ratio",
        {"-jnp.minimum(ratio * advantages, clipped_ratio * advantages)": "-(ratio * advantages)"},
    ),
    "target_network": Change(
        "dqn",
        "update",
        "targets by the online network",
        {
            "compute_targets(agent, target, batch, args)\n": "compute_targets(agent, agent, batch, args)\n"
        },
    ),
    "reset": Change(
        "ppo_lstm",
        "LSTM",
        "without the reset before the cell",
        {"h, c = [jnp.where(reset[:, None], 0.0, x) for x in carry]": "h, c = carry"},
        "--env-id memory::RepeatFirstEasy --total-timesteps 500000 --reward-scale 1",
    ),
    "layer_norm": Change(
        "pqn",
        "Agent",
        "without the two LayerNorms",
        {
            "nnx.relu(self.norm_1(self.hidden_1(x)))": "nnx.relu(self.hidden_1(x))",
            "nnx.relu(self.norm_2(self.hidden_2(x)))": "nnx.relu(self.hidden_2(x))",
        },
    ),
}


def changed(change: Change) -> str:
    """The script's text with the change in it."""
    text = (ROOT / f"{change.script}.py").read_text()
    for old, new in change.replaced.items():
        assert text.count(old) == 1, f"{change.script}.py has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


def unchanged(change: Change) -> str:
    """What the runs of the script as it is are called: changes of it share them."""
    return f"{change.script} {change.flags}".strip()


def run(name: str, change: Change, seed: int) -> list[dict]:
    """A whole run -> rows of its curve, and one of its greedy score."""
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / f"{change.script}.py"
        if name in CHANGES:
            script = Path(folder) / script.name
            script.write_text(changed(change))
            (script.parent / "envs").symlink_to(ROOT / "envs")
        done = run_script(str(script), f"{change.flags} --seed {seed}")
    points = [(row["step"], row["charts/episodic_return"]) for row in done.metrics]
    points = [(step, f"{float(x):.5g}") for step, x in points if x not in ("", "nan")]
    points = points[len(points) - 1 :: -max(1, len(points) // POINTS)][::-1]
    scores = [("greedy", f"{row['mean']:.5g}") for row in done.evaluation]
    return [{"run": name, "seed": seed, "step": step, "return": x} for step, x in points + scores]


def files(words: list[str]) -> set[str]:
    """The raw files that a command line writes."""
    parse_tasks(__doc__, CHANGES, words)
    return {"without.csv"}


if __name__ == "__main__":
    heading = True
    for task in parse_tasks(__doc__, CHANGES, sys.argv[1:]).tasks:
        for name in (unchanged(CHANGES[task]), task):
            known = {row["seed"] for row in read("without") if row["run"] == name}
            for seed in [seed for seed in SEEDS if str(seed) not in known]:
                rows = run(name, CHANGES[task], seed)
                write("without", rows, "run", "seed", "step")
                show(rows[-1], heading)
                heading = False
