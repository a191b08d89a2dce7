"""The tables of the README, from the scripts and the raw results: a test holds the README to them.

python benchmarks/tables.py           # prints the README with the tables as they should be
python benchmarks/tables.py --write   # writes it
"""

import re
import shlex
import sys
from math import inf, isnan
from statistics import median

import numpy as np
from cartpole_speed import GFLOP_PER_STEP
from record import PACKAGES, ROOT, read
from scores import TASKS

sys.path.insert(0, str(ROOT))
from plot import bootstrap, interquartile_mean

SCRIPTS = {
    "ppo": "proximal policy optimisation, discrete actions; the root of the collection",
    "ppo_continuous": "the same for continuous actions, with running normalisation by flag",
    "ppo_lstm": "PPO with a long short-term memory",
    "rppo_continuous": "the same for continuous actions, with sequences and burn-in",
    "ppo_trxl": "PPO with a Transformer-XL memory: relative positions, cached keys and values",
    "ppo_gtrxl": "the same with GRU gates",
    "ppo_trxl_pmap": "ppo_trxl.py on many devices and many machines",
    "a2c": "advantage actor-critic",
    "impala": "actor threads, a learner and V-trace; actors and learners on different devices by flag",
    "dqn": "(double) deep Q-network; the replay buffer is part of the compiled loop",
    "sac": "soft actor-critic with automatic temperature; SimBa's networks by flag",
}
LANDER, CARTPOLE, MASKED = "LunarLander-v3", "CartPole-v1", "CartPole-v1 without velocities"
TABLES = {  # rows: name in the results, task, target of the timed launch
    "results": [
        ("ppo_lunarlander", LANDER, "200"),
        ("ppo_cartpole", CARTPOLE, "475"),
        ("ppo_continuous_pendulum", "Pendulum-v1", "-200"),
        ("ppo_continuous_halfcheetah", "HalfCheetah-v5", None),
        ("a2c_lunarlander", LANDER, "200"),
        ("impala_lunarlander", LANDER, "200"),
        ("dqn_cartpole", CARTPOLE, None),
        ("dqn_lunarlander", LANDER, None),
        ("dqn_breakout", "Breakout-MinAtar", None),
        ("sac_pendulum", "Pendulum-v1", None),
        ("sac_halfcheetah", "HalfCheetah-v5", None),
    ],
    "memory": [
        ("ppo_lstm_cartpole", MASKED, "475"),
        ("ppo_trxl_cartpole", MASKED, None),
        ("ppo_gtrxl_cartpole", MASKED, None),
        ("ppo_masked_cartpole", f"{MASKED}, the control", None),
        ("rppo_continuous_pendulum", "Pendulum-v1 without velocity", "-200"),
        (
            "rppo_continuous_mountaincar",
            "MountainCarContinuous-v0 without velocity (an action is 8 steps)",
            None,
        ),
        ("ppo_lstm_lunarlander", LANDER, "200"),
        ("ppo_trxl_lunarlander", LANDER, "200"),
        ("ppo_gtrxl_lunarlander", LANDER, "200"),
        ("ppo_trxl_memorychain", "MemoryChain-bsuite, 100 steps", None),
        ("ppo_gtrxl_memorychain", "MemoryChain-bsuite, 100 steps", None),
    ],
}


def lines_of(script: str) -> tuple[int, int]:
    """-> all lines, and those from the heading Networks to the heading Evaluation."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    heading = lambda name: next(n for n, x in enumerate(lines) if x.startswith(f"# --- {name}"))
    return len(lines), heading("Evaluation") - heading("Networks")


def script_of(name: str) -> str:
    """ppo_lstm_cartpole -> ppo_lstm."""
    if name in TASKS:
        return TASKS[name][0].removesuffix(".py")
    return max((x for x in SCRIPTS if name.startswith(f"{x}_")), key=len)


def scripts_table() -> str:
    table = ["| script | what | lines (algorithm) |", "|---|---|---|"]
    for name, what in SCRIPTS.items():
        total, algorithm = lines_of(name)
        table.append(f"| [{name}.py]({name}.py) | {what} | {total:,} ({algorithm}) |")
    return "\n".join(table)


def in_words(steps: int) -> str:
    return f"{steps / 1e6:g}M" if steps >= 1e6 else f"{round(steps, -3) // 1000}k"


def score_cells(name: str) -> list[str]:
    """Steps, mean and spread over seeds, interquartile mean with its interval, seeds at the bar."""
    rows = read(f"scores_{name}")
    if not rows:
        return [""] * 4
    means, bar = np.array([float(row["mean"]) for row in rows]), TASKS[name][3]  # [S]
    steps = max(int(row.get("steps") or 1_000_000) for row in rows)
    cells = [in_words(round(steps, -4)), f"{means.mean():.1f} ± {means.std():.1f}"]
    interval = ""
    if len(means) >= 5 and means.std() > 0:
        low, high = bootstrap(means[:, None])
        interval = f" [{low[0]:.1f}, {high[0]:.1f}]"
    cells.append(f"{interquartile_mean(means[:, None])[0]:.1f}{interval}")
    good = f"{sum(x >= bar for x in means)} of {len(means)} ≥ {bar}"
    return [*cells, good if bar else f"{len(means)} seeds"]


def launch_cell(name: str, target: str | None) -> str:
    rows = read(f"time_to_solve_{name}")
    if not rows:
        return ""
    seconds = [float(row["seconds"]) for row in rows]
    seconds = [inf if isnan(x) else x for x in seconds]
    return f"{target} in {median(seconds):.1f} s ({max(seconds):.1f})"


def speed_cell(name: str) -> str:
    rows = [row for row in read("steps_per_second") if row["task"] == name]
    if not rows:
        return ""
    speed = median(int(row["steps_per_second"]) for row in rows)
    return f"{round(speed, 2 - len(str(int(speed)))):,.0f}"  # two digits are what is certain


def results_table(rows: list[tuple]) -> str:
    table = [
        "| script | task | steps | mean ± std over seeds | IQM [95 % interval] | seeds at the bar "
        "| launch to target: median (worst) | steps/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, task, target in rows:
        cells = [f"{script_of(name)}.py", task, *score_cells(name)]
        cells += [launch_cell(name, target), speed_cell(name)]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(re.sub(r"(?<=[ \[≥])-(?=\d)", "−", line) for line in table)


def of_program(name: str, program: str, column: str) -> float:
    """The median over rounds."""
    return median(float(x[column]) for x in read(name) if x["program"] == program)


def two_programs(name: str, ours: str, theirs: str, label: str) -> str:
    """Ours beside theirs: seconds of the whole process and steps/s in steady state."""
    if not read(name):
        return ""
    table = [f"| | {ours} | {label} | ratio |", "|---|---|---|---|"]
    for what, column in (
        ("whole process, s", "seconds"),
        ("steady state, steps/s", "steps_per_second"),
    ):
        pairs = [
            [float(x[column]) for x in read(name) if x["program"] == program]
            for program in (ours, theirs)
        ]
        ratio = median(a / b for a, b in zip(*pairs, strict=True))
        one, other = map(median, pairs)
        table.append(f"| {what} | {one:,.1f} | {other:,.1f} | {ratio:.2f} |")
    return "\n".join(table)


def cartpole_table() -> str:
    table = [
        "| environments | ppo.py | share of the peak | rejax 0.1.3 | ratio | with our XLA flag | with jax 0.12 "
        "| 8 seeds cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = read("cartpole_speed")
    for size in dict.fromkeys(row["num_envs"] for row in rows):
        own = [{k: float(v) for k, v in x.items() if v} for x in rows if x["num_envs"] == size]
        ours, theirs = [round(median(row[name] for row in own)) for name in ("ppo", "rejax")]
        ratio = median(row["ppo"] / row["rejax"] for row in own)
        seeds = median(x["ppo"] / x["ppo_8_seeds"] for x in own if "ppo_8_seeds" in x)
        alike, share = "", ""
        if all("rejax_same_flag" in row for row in own):
            alike = f"{median(row['ppo'] / row['rejax_same_flag'] for row in own):.2f}"
            share = f"{100 * ours * GFLOP_PER_STEP / own[0]['peak_gflops']:.0f} %"
        newer = [row for row in read("cartpole_speed_jax012") if row["num_envs"] == size]
        newer = median(int(row["ppo"]) / int(row["rejax"]) for row in newer)
        cells = [f"{ours:,}", share, f"{theirs:,}", f"{ratio:.2f}", alike, f"{newer:.2f}"]
        table.append(f"| {size} | {' | '.join(cells)} | {seeds:.1f} x one |")
    return "\n".join(table)


def dqn_table() -> str:
    rows = read("dqn_speed")
    middle = {name: median(float(row[name]) for row in rows) for name in rows[0]}
    ratio = median(float(x["ours_64_64_double"]) / float(x["rejax_64_64_double"]) for x in rows)
    newer = [
        (row["ours_64_64_double"], row["rejax_64_64_double"]) for row in read("dqn_speed_jax012")
    ]
    newer = median(int(ours) / int(theirs) for ours, theirs in newer)
    both = [middle["ours_64_64_double"], middle["rejax_64_64_double"]]
    return f"""| networks | dqn.py | rejax 0.1.3 | ratio | with jax 0.12 |
|---|---|---|---|---|
| 64 x 64, double | {both[0]:,.0f} | {both[1]:,.0f} | {ratio:.2f} | {newer:.2f} |
| 120 x 84, double | {middle["ours_120_84_double"]:,.0f} | | | |
| 120 x 84 (PureJaxRL's configuration) | {middle["ours_120_84"]:,.0f} | | | |"""


def halfcheetah_table() -> str:
    rows = read("halfcheetah_speed")
    raw, training = [median(int(row[name]) for row in rows) for name in ("raw", "training")]
    ratio = median(int(row["training"]) / int(row["raw"]) for row in rows)
    return f"""| the simulator alone | while training | ratio |
|---|---|---|
| {raw:,.0f} | {training:,.0f} | {ratio:.2f} |"""


def trxl_table() -> str:
    table = [
        "| | steps/s | s per iteration | rollout, s | its share | rollout without cache, s (8 x 16 steps) |"
    ]
    table.append("|---|---|---|---|---|---|")
    rows = read("trxl_speed")
    for case in dict.fromkeys(row["case"] for row in rows):
        times = {}
        for row in rows:
            if row["case"] == case:
                times.setdefault(row["part"], []).append(float(row["seconds"]))
        whole, acting, uncached = [median(x) for x in times.values()]
        cells = [f"{512 * 128 / whole:,.0f}", f"{whole:.1f}", f"{acting:.1f}"]
        cells += [f"{acting / whole:.0%}".replace("%", " %"), f"{8 * uncached:.1f}"]
        table.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(table)


def programs_table(name: str) -> str:
    table = ["| | whole process, s | steady state, steps/s |", "|---|---|---|"]
    for program in dict.fromkeys(row["program"] for row in read(name)):
        seconds, speed = [of_program(name, program, x) for x in ("seconds", "steps_per_second")]
        table.append(f"| {program} | {seconds:.1f} | {speed:,.0f} |")
    return "\n".join(table)


def growth_tables() -> str:
    rows, tables = read("growth"), []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        own = [row for row in rows if row["axis"] == axis]
        table = [
            f"| {axis} | {' | '.join(row['value'] for row in own)} |",
            "|---" * (len(own) + 1) + "|",
        ]
        speeds = [f"{int(row['steps_per_second']):,}" for row in own]
        tables.append("\n".join([*table, f"| steps/s | {' | '.join(speeds)} |"]))
    return "\n\n".join(tables)


def phases_table() -> str:
    """The phases of `python ppo.py`; simulating, acting and updating are parts of training."""
    rows = read("where_time_goes")
    parts = [row for row in rows if row["phase"].startswith(" ")]
    rows = [row for row in rows if row not in parts]
    total = sum(float(row["seconds"]) for row in rows)
    train = 1 + next(n for n, row in enumerate(rows) if row["phase"] == "train")
    rows[train:train] = parts
    table = ["| phase of `python ppo.py` | seconds | share |", "|---|---|---|"]
    for row in rows:
        phase, seconds = row["phase"].replace("  of that: ", "... "), float(row["seconds"])
        table.append(f"| {phase} | {seconds:.1f} | {100 * seconds / total:.0f} % |")
    return "\n".join(table)


def machines() -> str:
    """What measured the raw results, one line for each machine and set of versions."""
    found = {}
    for row in read("measured"):
        versions = " ".join(f"{name} {row[name]}," for name in ("python", *PACKAGES))
        found.setdefault(f"- {row['machine']}: {versions.rstrip(',')}", []).append(row["file"])
    return "\n".join(f"{line} ({len(files)} files)" for line, files in found.items())


def commands() -> str:
    """What the rows were run with, but for --seed and --run-dir."""
    lines = []
    for name, *_ in TABLES["results"] + TABLES["memory"]:
        if name in TASKS:
            script, flags, *_ = TASKS[name]
            lines.append(f"    python {script} {shlex.join(flags.split())}".rstrip())
    return "\n".join(["```", *dict.fromkeys(line.strip() for line in lines), "```"])


def fill(text: str) -> str:
    """The README's text with the tables as the files say they are."""
    tables = {name: results_table(rows) for name, rows in TABLES.items()}
    tables |= {"scripts": scripts_table(), "commands": commands()}
    tables |= {"ppo speed": programs_table("ppo_speed"), "cartpole speed": cartpole_table()}
    tables |= {"dqn speed": dqn_table(), "trxl speed": trxl_table(), "growth": growth_tables()}
    tables |= {"phases": phases_table(), "machines": machines()}
    tables |= {"halfcheetah speed": halfcheetah_table()}
    for task in ("pendulum", "halfcheetah"):
        name = f"sac_speed_{task}"
        tables[name.replace("_", " ")] = two_programs(name, "sac.py", "sbx", "SBX")
    ours = "rppo_continuous.py"
    tables["recurrent speed"] = two_programs("recurrent_speed", ours, "memorax", "memorax 1.0.1")
    for name, table in tables.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert mark.search(text), f"README.md has no marks for {name}"
        text = mark.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    return text


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--write"]):
        sys.exit("usage: python benchmarks/tables.py [--write]")
    readme = ROOT / "README.md"
    text = fill(readme.read_text())
    if sys.argv[1:]:
        readme.write_text(text)
    else:
        print(text)
