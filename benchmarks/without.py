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
    both: dict[str, str] = {}  # replaced in the script as it is, too


# Trained in short episodes, judged in those that the environment has by itself.
JUDGED_AS_USUAL = {"args.seed + 2**30, args.env_kwargs,": 'args.seed + 2**30, "{}",'}
CHANGES = {
    "time_limit": Change(
        "ppo",
        "rollout",
        "the time limit as an end",
        {
            "value_beyond = lambda: jnp.where(cut, agent(timestep.next_obs)[1], 0.0)\n": (
                "value_beyond = lambda: jnp.zeros_like(value)\n"
            )
        },
        "--env-id gymnax::CartPole-v1 --env-kwargs '{\"max_steps_in_episode\": 30}' "
        "--total-timesteps 500000 --gamma 0.99",
        JUDGED_AS_USUAL,
    ),
    "norm_adv": Change(
        "ppo",
        "ppo_loss",
        "advantages not normalised",
        {"if args.norm_adv:  # detail 7\n": "if not args.norm_adv:\n"},
        "--reward-scale 1",
    ),
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
    "same_step_reset": Change(
        "sac",
        "step_and_learn",
        "the observation after the reset as the next one",
        {"timestep.reward, timestep.next_obs, timestep": "timestep.reward, timestep.obs, timestep"},
        "--env-kwargs '{\"max_steps_in_episode\": 20}'",
        JUDGED_AS_USUAL,
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


def text_of(change: Change, replaced: dict[str, str]) -> str:
    """The script's text with these changes in it."""
    text = (ROOT / f"{change.script}.py").read_text()
    for old, new in (change.both | replaced).items():
        assert text.count(old) == 1, f"{change.script}.py has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


def unchanged(change: Change) -> str:
    """What the runs of the script as it is are called: changes of it share them."""
    return f"{change.script} {change.flags}".strip()


def run(name: str, change: Change, seed: int) -> list[dict]:
    """A whole run -> rows of its curve, and one of its greedy score."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / f"{change.script}.py"
        script.write_text(text_of(change, change.replaced if name in CHANGES else {}))
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
