"""The tables of the README, from the scripts and the raw results: a test holds the README to them,
and the headers of the scripts to the same results.

python benchmarks/tables.py           # prints the README with the tables as they should be
python benchmarks/tables.py --write   # writes it
"""

import ast
import json
import re
import sys
from collections.abc import Iterable
from math import inf, isnan
from statistics import median

import numpy as np
from peers import GFLOP_PER_STEP
from record import PACKAGES, ROOT, read
from tasks import MEMORY, MEMORY_TASKS, REPLAY, RESULTS, SCRIPTS, SUITES, TASKS, Task

sys.path.insert(0, str(ROOT))
from plot import bootstrap, interquartile_mean


def markdown(heading: list[str], rows: Iterable[list[str]]) -> str:
    line = lambda cells: "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
    return "\n".join([line(heading), "|---" * len(heading) + "|", *map(line, rows)])


# --- What a task's raw results say ----------------------------------------------------------------


def scores_of(name: str) -> list[dict]:
    """The rows of the seeds that are reported."""
    return [row for row in read(f"scores_{name}") if int(row["seed"]) in TASKS[name].seeds]


def mean_of(name: str, digits: int, sign: str = "±") -> str:
    """Mean and spread over seeds; of a single one, no spread."""
    means = np.array([float(row["mean"]) for row in scores_of(name)])
    spread = f" {sign} {means.std():.{digits}f}" if len(means) > 1 else ""
    return f"{means.mean():.{digits}f}{spread}" if len(means) else ""


def counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def steps_of(name: str) -> str:
    steps = [int(row.get("steps") or 1_000_000) for row in scores_of(name)]
    if not steps:
        return ""
    steps = round(max(steps), -4)
    return f"{steps / 1e6:g}M" if steps >= 1e6 else f"{steps // 1000}k"


def launches_of(name: str) -> list[float]:
    """Seconds to the target; a seed that missed it took longer than any that did not."""
    seconds = [float(row["seconds"]) for row in read(f"time_to_solve_{name}")]
    return [inf if isnan(x) else x for x in seconds]


def speed_of(name: str) -> int | None:
    """Steps/s, to the two digits that are certain."""
    rows = [row for row in read("steps_per_second") if row["task"] == name]
    if not rows:
        return None
    speed = round(median(int(row["steps_per_second"]) for row in rows))
    return round(speed, 2 - len(str(speed)))


def run_seconds_of(name: str) -> float | None:
    """Median seconds from the launch of a whole run to its last step."""
    ends = {row["seed"]: float(row["seconds"]) for row in read(f"curves_{name}")}
    ends = [seconds for seed, seconds in ends.items() if float(seed) in TASKS[name].seeds]
    return median(ends) if ends else None


# --- The tables of tasks --------------------------------------------------------------------------


def lines_of(script: str) -> tuple[int, int]:
    """-> all lines, and those from the heading Networks to the heading Evaluation."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    heading = lambda name: next(n for n, x in enumerate(lines) if x.startswith(f"# --- {name}"))
    return len(lines), heading("Evaluation") - heading("Networks")


def scripts_table() -> str:
    rows = []
    for name, what in SCRIPTS.items():
        total, algorithm = lines_of(name)
        rows.append([f"[{name}.py]({name}.py)", what, f"{total:,} ({algorithm})"])
    return markdown(["script", "what", "lines (algorithm)"], rows)


def cells_of(name: str) -> list[str]:
    """Steps, mean and spread over seeds, interquartile mean with its interval, seeds at the bar,
    launches, speed, seconds of a whole run; "" for what was not measured."""
    task, means = TASKS[name], np.array([float(row["mean"]) for row in scores_of(name)])  # [S]
    middle, interval, bar, launch = "", "", "", ""
    if len(means) >= 5 and means.std() > 0:
        low, high = bootstrap(means[:, None])
        interval = f" [{low[0]:.1f}, {high[0]:.1f}]"
    if len(means):
        middle, bar = f"{interquartile_mean(means[:, None])[0]:.1f}", counted(len(means), "seed")
    if len(means) and task.bar is not None:
        bar = f"{sum(x >= task.bar for x in means)} of {len(means)} ≥ {task.bar:g}"
    if seconds := launches_of(name):
        worst = "not always" if inf in seconds else f"{max(seconds):.1f}"
        launch = f"{task.target:g} in {median(seconds):.1f} s ({worst})"
    speed = f"{speed_of(name):,}" if speed_of(name) else ""
    seconds = run_seconds_of(name)
    whole = f"{float(f'{seconds:.2g}'):,g}" if seconds else ""
    cells = [steps_of(name), mean_of(name, 1), middle + interval, bar, launch, speed, whole]
    return [re.sub(r"(?<![\d(])-(?=\d)", "−", cell) for cell in cells]


def results_table(tasks: dict[str, Task]) -> str:
    """A row for each task that was measured."""
    heading = "script, task, steps, mean ± std over seeds, IQM [95 % interval], seeds at the bar"
    heading = [*heading.split(", "), "launch to target: median (worst)", "steps/s", "a run, s"]
    rows = [[task.script, task.label, *cells_of(name)] for name, task in tasks.items()]
    return markdown(heading, [row for row in rows if any(row[2:])])


def replayed_table() -> str:
    """Scores with a flag of the replay and without it, over the seeds that have both; "" if there
    are none."""
    heading = "script, task, steps, flag, seeds, without, with, seeds that gained".split(", ")
    rows = []
    for name, task in REPLAY.items():
        base = next(x for x in RESULTS if name.startswith(f"{x}_"))
        means = [{row["seed"]: float(row["mean"]) for row in scores_of(x)} for x in (base, name)]
        pairs = np.array([[x[seed] for x in means] for seed in means[1] if seed in means[0]])
        if len(pairs):
            spread = lambda x: f" ± {x.std():,.0f}" if len(x) > 1 else ""
            cells = [f"{x.mean():,.0f}{spread(x)}" for x in pairs.T]
            flag = f"`{task.flags.split()[-1]}`"
            gained = f"{sum(with_ > without for without, with_ in pairs)} of {len(pairs)}"
            rows.append([task.script, task.label, steps_of(name), flag, len(pairs), *cells, gained])
    return markdown(heading, rows) if rows else ""


def suites_table() -> str:
    """The simulators beside those of the other tables, "" if none was measured."""
    rows = []
    for name, task in SUITES.items():
        steps, score, *_, speed, _ = cells_of(name)
        if steps or speed:
            suite = re.search(r"(\w+)::", task.flags)[1]
            rows.append([suite, task.label, steps, score, speed, f"`{task.command}`"])
    return (
        markdown(["suite", "task", "steps", "return", "steps/s", "command"], rows) if rows else ""
    )


def commands() -> str:
    """What the rows were run with, but for --seed and --run-dir."""
    measured = [task.command for name, task in (RESULTS | MEMORY).items() if any(cells_of(name))]
    return "\n".join(["```", *dict.fromkeys(measured), "```"])


# --- The tables of speed --------------------------------------------------------------------------


def columns_of(rows: list[dict], *names: str) -> list[list[float]]:
    """Numbers, round by round."""
    return [[float(row[name]) for row in rows if row.get(name)] for name in names]


def middle_ratio(ours: list[float], theirs: list[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=False))


def programs_table(name: str) -> str:
    rows = []
    for program in dict.fromkeys(row["program"] for row in read(name)):
        own = [row for row in read(name) if row["program"] == program]
        seconds, speed = map(median, columns_of(own, "seconds", "steps_per_second"))
        rows.append([program, f"{seconds:.1f}", f"{speed:,.0f}"])
    return markdown(["", "whole process, s", "steady state, steps/s"], rows)


def two_programs(name: str, ours: str, theirs: str, label: str) -> str:
    """Ours beside theirs: seconds of the whole process and steps/s in steady state."""
    own, other = [[row for row in read(name) if row["program"] == x] for x in (ours, theirs)]
    rows = []
    columns = {"whole process, s": "seconds", "steady state, steps/s": "steps_per_second"}
    for what, column in columns.items():
        (one,), (two,) = columns_of(own, column), columns_of(other, column)
        ratio = middle_ratio(one, two)
        rows.append([what, f"{median(one):,.1f}", f"{median(two):,.1f}", f"{ratio:.2f}"])
    return markdown(["", ours, label, "ratio"], rows)


def pairs_table(name: str) -> str:
    """Programs, and what memorax makes of the same: medians, and the middle of the rounds' ratios."""
    rows = []
    for program in dict.fromkeys(row["program"].partition(" by ")[0] for row in read(name)):
        cells = [program]
        for column, digits in ("seconds", 1), ("steps_per_second", 0):
            ours, theirs = [
                columns_of([row for row in read(name) if row["program"] == x], column)[0]
                for x in (program, f"{program} by memorax")
            ]
            cells += [f"{median(x):,.{digits}f}" for x in (ours, theirs)]
            cells.append(f"{middle_ratio(ours, theirs):.2f}")
        rows.append(cells)
    heading = "script, whole process: s, memorax, ratio, steady state: steps/s, memorax, ratio"
    return markdown(heading.split(", "), rows)


def memories_table() -> str:
    """A row for each memory: means over seeds, "–" for what was not measured."""
    tasks, rows = {task: label for task, (label, _) in MEMORY_TASKS.items()}, []
    for memory in dict.fromkeys(row["memory"] for row in read("memories")):
        own = [row for row in read("memories") if row["memory"] == memory]
        parameters, state = [f"{int(own[0][name]):,}" for name in ("parameters", "state")]
        cells = [f"[{memory}](memories/{memory}.py)", parameters, state, own[0]["step_size"]]
        for task in tasks:
            scores = [float(row["score"]) for row in own if row["task"] == task]
            digits = 0 if task == "cartpole" else 2
            cells.append(f"{np.mean(scores):.{digits}f}" if scores else "–")
            if scores and max(scores) - min(scores) >= 0.1 * 10 ** (2 - digits):
                cells[-1] += f" ({min(scores):.{digits}f})"
        timed = [row for row in own if row["task"] == "repeat_previous"]
        speeds, seconds = columns_of(timed, "steps_per_second", "seconds") if timed else ([], [])
        cells.append(f"{round(median(speeds), -2):,.0f}" if timed else "–")
        rows.append([*cells, f"{median(seconds):.0f}" if timed else "–"])
    heading = ["memory", "parameters", "state", "step size", *tasks.values(), "steps/s", "s"]
    return markdown(heading, rows).replace(" -0.", " −0.").replace("(-0.", "(−0.")


def cartpole_table() -> str:
    heading = "environments, ppo.py, share of the peak, rejax 0.1.3, ratio, with our XLA flag"
    heading = [*heading.split(", "), "with jax 0.12", "8 seeds cost"]
    rows = []
    for size in dict.fromkeys(row["num_envs"] for row in read("cartpole_speed")):
        own, newer = [
            [row for row in read(name) if row["num_envs"] == size]
            for name in ("cartpole_speed", "cartpole_speed_jax012")
        ]
        ours, rejax, alike, seeds, peak = columns_of(
            own, "ppo", "rejax", "rejax_same_flag", "ppo_8_seeds", "peak_gflops"
        )
        share = 100 * median(ours) * GFLOP_PER_STEP / median(peak)
        cells = [size, f"{median(ours):,.0f}", f"{share:.0f} %", f"{median(rejax):,.0f}"]
        cells += [f"{middle_ratio(ours, x):.2f}" for x in (rejax, alike)]
        cells += [f"{middle_ratio(*columns_of(newer, 'ppo', 'rejax')):.2f}"]
        rows.append([*cells, f"{middle_ratio(ours, seeds):.1f} x one"])
    return markdown(heading, rows)


def dqn_table() -> str:
    names = ["ours_64_64_double", "rejax_64_64_double", "ours_120_84_double", "ours_120_84"]
    ours, rejax, double, single = columns_of(read("dqn_speed"), *names)
    newer = middle_ratio(*columns_of(read("dqn_speed_jax012"), *names[:2]))
    cells = [f"{median(rejax):,.0f}", f"{middle_ratio(ours, rejax):.2f}", f"{newer:.2f}"]
    rows = [["64 x 64, double", f"{median(ours):,.0f}", *cells]]
    for label, speeds in (
        ("120 x 84, double", double),
        ("120 x 84 (PureJaxRL's configuration)", single),
    ):
        rows.append([label, f"{median(speeds):,.0f}", "", "", ""])
    return markdown(["networks", "dqn.py", "rejax 0.1.3", "ratio", "with jax 0.12"], rows)


def pqn_table() -> str:
    ours, rejax, alike = columns_of(read("pqn_speed"), "pqn", "rejax", "rejax_same_settings")
    speeds = [f"{median(x):,.0f}" for x in (ours, rejax)]
    cells = [*speeds, *[f"{middle_ratio(ours, x):.2f}" for x in (rejax, alike)]]
    return markdown(["pqn.py", "rejax 0.1.3", "ratio", "with our XLA settings"], [cells])


def replay_table() -> str:
    """What flags of sac.py cost: ratios to a run without any in the same round, by buffer size."""
    rounds = {}
    for row in read("replay_speed"):
        of_case = rounds.setdefault((row["buffer_size"], row["flags"]), [])
        of_case.append(float(row["gradient_steps_per_second"]))
    sizes, cases = [list(dict.fromkeys(x)) for x in zip(*rounds, strict=True)]
    cells = []
    for case in cases[1:]:
        name = "--" + case.replace("_", "-") if case != "all" else "all three"
        ratios = [middle_ratio(rounds[size, case], rounds[size, "none"]) for size in sizes]
        cells.append([name, *[f"{ratio:.2f}" for ratio in ratios]])
    return markdown(["sac.py", *[f"{int(size):,} transitions" for size in sizes]], cells)


def threads_table() -> str:
    """What one thread of XLA does to the steps/s, as the ratio to those with one for each core."""
    rounds = {}
    for row in read("one_thread"):
        of_case = rounds.setdefault((row["task"], row["flags"]), {})
        of_case.setdefault(row["threads"], []).append(float(row["steps_per_second"]))
    cells = []
    for (name, more), speeds in rounds.items():
        one, all_cores = speeds.values()
        label = f"{TASKS[name].script}, {TASKS[name].label}" + (f", `{more}`" if more else "")
        cells.append([label, *[f"{median(x):,.0f}" for x in (all_cores, one)]])
        cells[-1].append(f"{middle_ratio(one, all_cores):.2f}")
    return markdown(["", "a thread for each core", "one thread", "ratio"], cells)


def halfcheetah_table() -> str:
    raw, training = columns_of(read("halfcheetah_speed"), "raw", "training")
    cells = [
        f"{median(raw):,.0f}",
        f"{median(training):,.0f}",
        f"{middle_ratio(training, raw):.2f}",
    ]
    return markdown(["the simulator alone", "while training", "ratio"], [cells])


def trxl_table() -> str:
    heading = ["", "steps/s", "s per iteration", "rollout, s", "its share"]
    rows = []
    for case in dict.fromkeys(row["case"] for row in read("trxl_speed")):
        times = {}
        for row in read("trxl_speed"):
            if row["case"] == case:
                times.setdefault(row["part"], []).append(float(row["seconds"]))
        whole, acting, uncached = [median(x) for x in times.values()]
        cells = [case, f"{512 * 128 / whole:,.0f}", f"{whole:.1f}", f"{acting:.1f}"]
        rows.append([*cells, f"{100 * acting / whole:.0f} %", f"{8 * uncached:.1f}"])
    return markdown([*heading, "rollout without cache, s (8 x 16 steps)"], rows)


def accelerator_table() -> str:
    """A row for each case: what is not given is the script's default."""
    rows = []
    for row in read("accelerator"):
        if not row["flags"].startswith("{"):
            continue  # the long run
        flags = json.loads(row["flags"])
        task = flags.get("env_id", default_of(row["script"], "env_id")).rpartition("::")[2]
        sizes = [flags.get(x, default_of(row["script"], x)) for x in ("num_envs", "num_seeds")]
        label = f"{row['script']}.py" + (
            f" --memory {flags['memory']}" if "memory" in flags else ""
        )
        label += " --compute-dtype bfloat16" * (flags.get("compute_dtype") == "bfloat16")
        speed = f"{int(row['steps_per_second']):,}" if row["steps_per_second"] else row["note"]
        cells = [label, task, *[f"{x:,}" for x in sizes], speed]
        rows.append([*cells, row["compile_seconds"], row["peak_gib"]])
    heading = "script, task, environments, seeds, steps/s, s to compile, GiB"
    return markdown(heading.split(", "), rows)


def default_of(script: str, flag: str):
    """The default of a flag, as it stands in the script."""
    found = re.search(
        rf"^    {flag}: \w+ = (.*?)(?:  #|$)", (ROOT / f"{script}.py").read_text(), re.M
    )
    return ast.literal_eval(found[1])


def growth_tables() -> str:
    rows, tables = read("growth"), []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        own = [row for row in rows if row["axis"] == axis]
        speeds = [f"{int(row['steps_per_second']):,}" for row in own]
        tables.append(markdown([axis, *[row["value"] for row in own]], [["steps/s", *speeds]]))
    return "\n\n".join(tables)


def phases_table() -> str:
    """The phases of `python ppo.py`; simulating, acting and updating are parts of training."""
    rows = read("where_time_goes")
    parts = [row for row in rows if row["phase"].startswith(" ")]
    rows = [row for row in rows if row not in parts]
    total = sum(float(row["seconds"]) for row in rows)
    train = 1 + next(n for n, row in enumerate(rows) if row["phase"] == "train")
    cells = []
    for row in [*rows[:train], *parts, *rows[train:]]:
        phase, seconds = row["phase"].replace("  of that: ", "... "), float(row["seconds"])
        cells.append([phase, f"{seconds:.1f}", f"{100 * seconds / total:.0f} %"])
    return markdown(["phase of `python ppo.py`", "seconds", "share"], cells)


def machines() -> str:
    """What measured the raw results, one line for each machine and set of versions."""
    found = {}
    for row in read("measured"):
        versions = " ".join(f"{x} {row[x]}," for x in ("python", *PACKAGES) if row[x])
        found.setdefault(f"- {row['machine']}: {versions.rstrip(',')}", []).append(row["file"])
    return "\n".join(f"{line} ({len(files)} files)" for line, files in found.items())


def fill(text: str) -> str:
    """The README's text with the tables as the files say they are."""
    tables = {"scripts": scripts_table(), "results": results_table(RESULTS)}
    tables |= {"memory": results_table(MEMORY), "suites": suites_table(), "commands": commands()}
    tables |= {"ppo speed": programs_table("ppo_speed"), "cartpole speed": cartpole_table()}
    tables |= {"dqn speed": dqn_table(), "pqn speed": pqn_table()}
    tables |= {"trxl speed": trxl_table(), "growth": growth_tables()}
    tables |= {"phases": phases_table(), "machines": machines()}
    tables |= {"halfcheetah speed": halfcheetah_table(), "replay speed": replay_table()}
    tables |= {"one thread": threads_table()}
    tables["replayed"] = replayed_table()
    for script, task in (("sac", "pendulum"), ("sac", "halfcheetah"), ("td3", "halfcheetah")):
        name = f"{script}_speed_{task}"
        tables[name.replace("_", " ")] = two_programs(name, f"{script}.py", "sbx", "SBX")
    tables |= {f"{name} speed": pairs_table(f"{name}_speed") for name in ("memory", "sequence")}
    if read("accelerator"):
        tables["accelerator"] = accelerator_table()
    if read("memories"):
        tables["memories"] = memories_table()
    for name, table in tables.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert mark.search(text), f"README.md has no marks for {name}"
        text = mark.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    return text


# --- What the headers of the scripts say ----------------------------------------------------------

CLAIMS = (
    r"-?[\d.,]+ \+- [\d.,]+ after [\d.]+[kM]\b",  # mean, std and steps go together
    r"-?[\d.,]+ \+- [\d.,]*\d",
    r"-?[\d.,]+ after [\d.]+[kM]\b",
    r"\w+\.py: -?[\d.]*\d",  # the mean of another script
    r"\d+ seeds?\b",
    r"[\d.]+(?: thousand)? steps/s",
    r"(?:\d+(?:, | and | or ))*\d+ s\b(?: after the launch)?",  # a whole run, or up to the target
)


def claims_of(docstring: str) -> list[str]:
    """What a script's header says of its results; "8 or 17 s" are two."""
    claims = []
    for claim in re.findall("|".join(CLAIMS), " ".join(docstring.split())):
        times, what = re.fullmatch(r"(.*?)( s(?: after the launch)?)?", claim).groups()
        claims += [f"{number}{what}" for number in re.findall(r"\d+", times)] if what else [claim]
    return claims


def facts_of(script: str, claims: list[str]) -> set[str]:
    """What may be said of a script: seeds, seconds and speed are those of the tasks whose scores the
    claims quote, and of those without scores."""
    facts = set()
    for name, task in TASKS.items():
        score, launches, speed = mean_of(name, 0, "+-"), launches_of(name), speed_of(name) or 0
        facts.add(f"{task.script}: {score.partition(' ')[0]}")
        score = f"{score} after {steps_of(name)}" if score else ""
        if task.script != script or score not in ["", *claims]:
            continue
        facts |= {
            score,
            counted(len(scores_of(name)), "seed"),
            f"{run_seconds_of(name) or 0:.0f} s",
        }
        facts |= {f"{speed} steps/s", f"{speed / 1000:g} thousand steps/s"}
        launch = f"{median(launches):.0f} s after the launch" if launches else ""
        facts |= {launch, f"{len(launches)} seeds"} if launch in claims else set()
    return facts


def false_claims(script: str, docstring: str) -> list[str]:
    """What its header says of its results and they do not."""
    claims = claims_of(docstring)
    return [claim for claim in claims if claim not in facts_of(script, claims)]


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--write"]):
        sys.exit("usage: python benchmarks/tables.py [--write]")
    readme = ROOT / "README.md"
    text = fill(readme.read_text())
    if sys.argv[1:]:
        readme.write_text(text)
    else:
        print(text)
