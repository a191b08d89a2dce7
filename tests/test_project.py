"""What the project says of itself is true: packages, copies, headers, the README and its numbers."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import copies
import jax
import numpy as np
import pytest
import tyro
from conftest import ROOT

# === test_project.py ===

SCRIPTS = copies.scripts(ROOT)
LOCAL = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]}
PACKAGE_OF = {
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
}  # where the import's name is not the package's
OPTIONAL = {"tensorboardX", "wandb"}  # imported only when asked for, and named if missing


def requirements(lines):
    """Lines like "gymnasium[box2d]>=1.3,<1.4" -> {"gymnasium": the line}."""
    lines = [line.split("#")[0].strip() for line in lines]
    return {re.match(r"[\w-]+", line)[0]: line for line in lines if line}


def script_metadata(path):
    """The PEP 723 block of a script."""
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", path.read_text(), re.MULTILINE)
    return tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))


def imported(path):
    """Packages outside the standard library that a script imports, by statement or by import_module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            if isinstance(node.args[0], ast.Constant):
                names.add(node.args[0].value)
    names = {name.partition(".")[0] for name in names}
    return {PACKAGE_OF.get(name, name) for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_requirements_script_metadata_and_imports_agree(path):
    everything = requirements((ROOT / "requirements.txt").read_text().splitlines())
    own = requirements(script_metadata(path)["dependencies"])
    assert {name: everything.get(name) for name in own} == own
    # numpy and scipy come with jax, which needs them itself; gymnax needs six and jax.export flatbuffers,
    # and they do not say so.
    assert imported(path) - OPTIONAL - {"numpy", "scipy"} == set(own) - {"six", "flatbuffers"}
    assert imported(path) <= set(everything) | {"numpy", "scipy"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_no_file_of_the_project(path):
    assert not imported(path) & LOCAL


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_header_tells_what_a_reader_wants_to_know(path):
    header = ast.get_docstring(ast.parse(path.read_text()))
    assert len(header.splitlines()) <= 25
    assert "arXiv:" in header and f"python {path.name}" in header and "Differs from" in header


def test_the_tests_need_nothing_that_is_not_declared():
    files = [ROOT / "requirements.txt", ROOT / "requirements-suites.txt"]
    everything = requirements([line for file in files for line in file.read_text().splitlines()])
    for path in (ROOT / "tests").glob("*.py"):
        needed = imported(path) - LOCAL - {"numpy", "scipy"}
        assert needed <= set(everything), f"{path.name}: {needed - set(everything)}"


# === test_copies.py ===

ROOT_SCRIPT = '''
LIMIT = 3


def shared(x):
    """The text that counts."""
    return x + LIMIT


class Args:
    seed = 1


def make_train():
    return shared(1)
'''

SIBLING = """
LIMIT = 4


def own():
    return 0


@staticmethod
def shared(x):
    return x + LIMIT + 1


class Args:
    seed = 2


def make_train():
    return shared(2)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ppo.py").write_text(ROOT_SCRIPT)
    (tmp_path / "a_sibling.py").write_text(SIBLING)
    (tmp_path / "plot.py").write_text("LIMIT = 5\n")  # no script of the collection: no make_train
    return tmp_path


def test_differences_are_found_and_names_that_vary_are_not(folder):
    assert sorted(copies.compare(folder)) == [
        "a_sibling.py: LIMIT differs from ppo.py",
        "a_sibling.py: shared differs from ppo.py",
    ]


def test_fix_copies_the_root_text_and_nothing_else(folder):
    copies.compare(folder, fix=True)
    mended = (folder / "a_sibling.py").read_text()
    assert copies.compare(folder) == []
    assert "LIMIT = 3" in mended and '"""The text that counts."""' in mended
    assert "@staticmethod" not in mended
    assert "seed = 2" in mended and "return shared(2)" in mended and "def own" in mended
    assert (folder / "ppo.py").read_text() == ROOT_SCRIPT
    assert (folder / "plot.py").read_text() == "LIMIT = 5\n"


def test_missing_plumbing_is_found_and_put_in_its_place(folder):
    plumbing = (
        "\n\n# --- Environment ---\n\n\ndef one():\n    return 1\n\n\ndef two():\n    return 2\n"
    )
    (folder / "ppo.py").write_text(ROOT_SCRIPT + plumbing)
    sibling = SIBLING + "\n\ndef one():\n    return 1\n\n\ndef three():\n    return 3\n"
    (folder / "a_sibling.py").write_text(sibling)
    assert "a_sibling.py: two is missing" in copies.compare(folder, fix=True)
    assert copies.compare(folder) == []
    mended = (folder / "a_sibling.py").read_text()
    assert mended.index("def one") < mended.index("def two") < mended.index("def three")


def test_the_real_scripts_agree():
    command = [sys.executable, str(Path(copies.__file__))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# === test_readme.py ===

sys.path.insert(0, str(ROOT / "benchmarks"))
import record
import tables
import tasks

README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_results_and_the_line_counts_those_of_the_files():
    assert tables.fill(README) == README, "run: python benchmarks/tables.py --write"


@pytest.mark.parametrize(
    "number",
    [r"(\d)\.\d ± \d", r"\| [\d,]*(\d) \(\d+\) \|", r"in (\d+)\.\d s \(", r"(\d) of \d+ ≥"],
)
def test_a_number_that_was_changed_by_hand_is_noticed(number):
    start, end = re.search(number, README).span(1)
    changed = README[:start] + str(int(README[start:end]) + 1) + README[end:]
    assert tables.fill(changed) == README


def header_of(path):
    return ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("script", tasks.SCRIPTS)
def test_headers_are_held_to_the_results(script):
    """Also when a single number is another one: of a return, its spread, steps, seeds or seconds."""
    header = header_of(ROOT / f"{script}.py")
    assert not tables.false_claims(f"{script}.py", header)
    kinds = [r"-?(\d+) \+- ", r"\+- (\d+)", r"after (\d+)[kM]", r"(\d+) seeds", r"(\d+) s\b"]
    for kind in [*kinds, r"([\d.]+) thousand steps/s", r"\w\.py: (\d+)"]:
        for match in re.finditer(kind, header):
            start, end = match.span(1)
            changed = header[:start] + f"{float(match[1]) + 1000:g}" + header[end:]
            assert tables.false_claims(f"{script}.py", changed), match[0]


def test_a_header_may_not_say_what_was_not_measured(monkeypatch):
    score = lambda mean, steps: [
        {"seed": f"{k}", "mean": f"{mean + 4 * (-1) ** k}", "steps": f"{steps}"}
        for k in range(1, 5)
    ]
    raw = {
        "scores_ppo_lunarlander": [
            *score(279, 1_000_000),
            {"seed": "77", "mean": "0"},
        ],  # not asked
        "curves_ppo_lunarlander": [{"seed": "1.0", "seconds": "17.6"}],
        "time_to_solve_ppo_lunarlander": [{"seconds": "8.1"}] * 10,
        "steps_per_second": [{"task": "ppo_lunarlander", "steps_per_second": "74950"}],
        "scores_ppo_masked_cartpole": score(43, 500_000)[:2],
        "scores_a2c_lunarlander": score(212, 1_500_000),
    }
    monkeypatch.setattr(tables, "read", lambda name: raw.get(name, []))
    says = lambda text: tables.false_claims("ppo.py", text)
    assert not says("greedy return 279 +- 4\nafter 1M steps (4 seeds), 75 thousand steps/s")
    assert not says("279 +- 4 after 1M, ends 8 s after the launch (10 seeds), or 18 s; a2c.py: 212")
    assert not says("the control 43 +- 4 after 500k (2 seeds)")
    assert says("279 +- 5 after 1M") == ["279 +- 5 after 1M"]
    assert says("279 +- 4 after 2M") and says("279 +- 4") and says("280 after 1M")
    assert says("43 +- 4 after 1M") and says("212 +- 4 after 1.5M")  # of another task or script
    assert says("279 +- 4 after 1M (2 seeds)") == ["2 seeds"]  # the control's, not quoted here
    assert says("279 +- 4 after 1M, 18 or 8 s after the launch") == ["18 s after the launch"]
    assert says("279 +- 4 after 1M in 8 s") == ["8 s"]
    assert says("43 +- 4 after 500k, 75 thousand steps/s") and says("a2c.py: 211")


def test_a_launch_that_missed_its_target_counts_as_the_slowest(monkeypatch):
    raw = {"time_to_solve_ppo_lunarlander": [{"seconds": x} for x in ("8.0", "nan", "9.0")]}
    monkeypatch.setattr(tables, "read", lambda name: raw.get(name, []))
    assert tables.cells_of("ppo_lunarlander")[4] == "200 in 9.0 s (not always)"
    raw["time_to_solve_ppo_lunarlander"].pop(1)
    assert tables.cells_of("ppo_lunarlander")[4] == "200 in 8.5 s (9.0)"


def test_replay_flags_are_compared_within_a_round_and_over_the_same_seeds(monkeypatch):
    speed = lambda flags, steps: {
        "buffer_size": "1000",
        "flags": flags,
        "gradient_steps_per_second": steps,
    }
    pairs = [("100", "90"), ("50", "40"), ("80", "40")]
    names = "none", "prioritized_replay"
    rows = [speed(*x) for pair in pairs for x in zip(names, pair, strict=True)]
    score = lambda means: [{"seed": s, "mean": x, "steps": "200000"} for s, x in means.items()]
    raw = {
        "replay_speed": rows,
        "scores_sac_halfcheetah": score({"1": "100", "2": "200", "3": "900"}),
        "scores_sac_halfcheetah_prioritized_replay": score({"1": "140", "2": "180", "9": "0"}),
    }
    monkeypatch.setattr(tables, "read", lambda name: raw.get(name, []))
    assert "| --prioritized-replay | 0.80 |" in tables.replay_table()
    row = (
        "sac.py | HalfCheetah-v5 | 200k | `--prioritized-replay` | 2 | 150 ± 50 | 160 ± 20 | 1 of 2"
    )
    assert row in tables.replayed_table()


def commands(text):
    """Script and flags of each "python script.py ..." that has a line of its own."""
    text = text.replace("\\\n", " ")
    for name, flags in re.findall(r"^[^`\n]*python (\w+)\.py\b(.*)$", text, re.MULTILINE):
        if (ROOT / f"{name}.py").exists() and not re.search(r"\.\.\.|--help", flags):
            yield name, shlex.split(flags.partition("  #")[0])


def test_every_command_of_the_readme_and_of_the_headers_parses():
    texts = [README, *map(header_of, ROOT.glob("*.py"))]
    found = [command for text in texts for command in commands(text)]
    assert len(found) > 50
    for name, flags in found:
        tyro.cli(importlib.import_module(name).Args, args=flags)


@pytest.mark.parametrize("name", [*tasks.TASKS, *tasks.CHAIN])
def test_the_flags_of_every_task_parse(name):
    task = (tasks.TASKS | tasks.CHAIN)[name]
    args = importlib.import_module(Path(task.script).stem).Args
    tyro.cli(args, args=shlex.split(task.scored_flags))


@pytest.mark.parametrize("task", tasks.MEMORY_TASKS)
def test_the_flags_of_every_memory_task_parse(task):
    flags = importlib.import_module("memories").flags_of("s5", task, 1e-3)
    assert tyro.cli(importlib.import_module("rppo").Args, args=shlex.split(flags)).memory == "s5"


BENCHMARKS = {
    path.stem: importlib.import_module(path.stem) for path in (ROOT / "benchmarks").glob("*.py")
}


def test_a_step_size_is_the_best_over_two_tasks(monkeypatch):
    memories = BENCHMARKS["memories"]
    scores = {"repeat_previous": (0.3, 0.5), "cartpole": (500, 490)}
    rows = [
        {"memory": "gru", "task": task, "step_size": size, "score": score}
        for task, two in scores.items()
        for size, score in zip(("0.004", "0.002"), two, strict=True)
    ]
    monkeypatch.setattr(memories, "read", lambda name: rows)
    assert memories.chosen("gru") == 0.002  # 1.48 against 1.3
    rows.append(rows[1] | {"score": 0.0})  # a further seed: 1.23, and a sum would not have fallen
    assert memories.chosen("gru") == 0.004
    with pytest.raises(SystemExit, match="rates lstm"):
        memories.chosen("lstm")


def test_a_run_of_less_than_a_minute_has_five_seeds_and_a_longer_one_three(monkeypatch):
    memories, rows = BENCHMARKS["memories"], []
    seconds = {"cartpole": 59.0, "chain": 61.0}

    def measure(memory, task, seed, size):
        outlier = 100 * (seed == 1)  # the first run compiles
        return {
            "memory": memory,
            "task": task,
            "seed": seed,
            "step_size": size,
            "seconds": seconds[task] + outlier,
        }

    monkeypatch.setattr(memories, "MEMORY_TASKS", seconds)
    monkeypatch.setattr(memories, "read", lambda name: rows)
    monkeypatch.setattr(memories, "measure", measure)
    monkeypatch.setattr(memories, "chosen", lambda memory: 1e-3)
    for row in memories.scores("gru"):
        rows.append(row)
    assert [row["seed"] for row in rows] == [1, 2, 3, 4, 5, 1, 2, 3]
    assert not list(memories.scores("gru"))  # what the file has is not run again


def test_the_table_of_memories_has_the_step_sizes_that_were_best():
    rows = record.read("memories")
    used = {(row["memory"], float(row["step_size"])) for row in rows}
    assert len(used) >= 12
    assert used == {(memory, BENCHMARKS["memories"].chosen(memory)) for memory, _ in used}


ACCELERATOR = BENCHMARKS["accelerator"]


@pytest.mark.parametrize("part", ACCELERATOR.PARTS)
def test_the_flags_of_every_case_for_an_accelerator_are_flags(part):
    for script, fields in ACCELERATOR.PARTS[part]:
        module = importlib.import_module(script)
        module.check_args(module.Args(**{"total_timesteps": 10**9} | fields))


@pytest.mark.parametrize("name", ACCELERATOR.LEARNING)
def test_the_flags_of_a_long_run_are_flags(name):
    _, (script, *flags) = ACCELERATOR.LEARNING[name]
    module = importlib.import_module(Path(script).stem)
    module.check_args(tyro.cli(module.Args, args=flags))
    assert ACCELERATOR.files([name]) == {"accelerator.csv", "long_runs.csv"}


def test_the_maximum_of_craftax_is_that_of_its_achievements():
    from craftax.craftax.constants import ACHIEVEMENT_REWARD_MAP

    assert int(ACHIEVEMENT_REWARD_MAP.sum()) == ACCELERATOR.CRAFTAX_MAXIMUM


@pytest.mark.parametrize("rows, points", [(0, 0), (1, 1), (99, 99), (250, 84), (7629, 100)])
def test_a_curve_has_at_most_a_hundred_points_and_the_last(rows, points):
    row = lambda step: {"step": step, "seconds": "1", "charts/episodic_return": "22.6"}
    metrics = [row(str(step)) | {"charts/SPS": "9"} for step in range(rows)]
    curve = ACCELERATOR.curve_of(metrics, 226)
    assert len(curve) == points and curve == sorted(curve, key=lambda point: point["step"])
    assert not rows or (curve[-1]["step"], curve[-1]["percent"]) == (rows - 1, 10)


@pytest.mark.thorough
def test_a_part_for_an_accelerator_runs_goes_on_and_tells_what_failed(
    tmp_path, monkeypatch, capsys
):
    """On the CPU, with tiny sizes; each case in a process of its own."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    small = {"env_id": "gymnax::CartPole-v1", "num_steps": 8, "total_timesteps": 1024}
    cases = [("ppo", small | {"num_envs": 32, "num_seeds": n}) for n in (1, 2)]
    wrong = ("ppo", small | {"num_envs": 32, "num_minibatches": 7})
    monkeypatch.setattr(ACCELERATOR, "PARTS", {"tiny": [*cases, wrong]})
    main = lambda *words: ACCELERATOR.main(["tiny", *words])
    main("--minutes", "0")
    assert "out of minutes" in capsys.readouterr().out and not record.read("accelerator")
    main()
    rows = record.read("accelerator")
    (failed,) = [row for row in rows if row["note"]]
    assert "num_minibatches" in failed["flags"] and len(rows) == 3
    for row in rows:
        if row == failed:
            continue
        assert int(row["steps_per_second"]) > 100 and float(row["compile_seconds"]) > 0


def test_of_a_part_only_what_failed_is_tried_again(tmp_path, monkeypatch):
    """What was measured is known, and what is too large for the device."""
    notes = {1: "", 2: "out of memory", 3: "took longer than 1 s to compile", 4: "KeyError: 'x'"}
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "machine", lambda: "this one")
    monkeypatch.setattr(ACCELERATOR, "machine", record.machine)
    cases, tried = [("ppo", {"num_envs": number}) for number in notes], []
    monkeypatch.setattr(ACCELERATOR, "PARTS", {"tiny": cases})

    def measure(cases):
        for _, fields in cases:
            tried.append(fields["num_envs"])
            yield {"note": notes[fields["num_envs"]]}

    monkeypatch.setattr(ACCELERATOR, "measure", measure)
    for words in ([], [], ["--again"]):
        ACCELERATOR.main(["tiny", *words])
    assert tried == [1, 2, 3, 4] + [3, 4] + [1, 2, 3, 4]
    assert len(record.read("accelerator")) == 4


@pytest.mark.thorough
@pytest.mark.parametrize("phase", ACCELERATOR.LIMITS)
def test_a_case_for_an_accelerator_that_takes_too_long_is_ended(phase, monkeypatch):
    monkeypatch.setitem(ACCELERATOR.LIMITS, phase, 1)
    wide = {"env_id": "gymnax::CartPole-v1", "num_envs": 256, "total_timesteps": 10**6}
    (row,) = ACCELERATOR.measure([("ppo", wide)])
    assert row == {"note": f"took longer than 1 s to {phase}"}


@pytest.mark.thorough
def test_a_long_run_goes_on_in_slices(tmp_path, monkeypatch):
    """On the CPU, with a tiny run. A slice's last minute comes when there are two new rows."""
    flags = "--env-id gymnax::CartPole-v1 --num-envs 4 --total-timesteps 1000000000".split()
    monkeypatch.setattr(ACCELERATOR, "LEARNING", {"tiny": (500, ["ppo.py", *flags])})
    monkeypatch.setattr(ACCELERATOR, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    run, wait = tmp_path / "runs/tiny", subprocess.Popen.wait

    def wait_for_rows(process, timeout=None):
        known = len(record.metrics_of(run))
        while timeout and process.poll() is None:
            time.sleep(0.05)
            if len(record.metrics_of(run)) >= known + 2:
                raise subprocess.TimeoutExpired(process.args, timeout)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_rows)
    other = {"device": record.machine(), "part": "other"}
    record.write("long_runs", [other | {"step": 1}, other | {"step": 2}], *other)
    steps = [[]]
    for _ in range(2):
        ACCELERATOR.main(["tiny"])
        parts = {"tiny": [], "other": []}
        for row in record.read("long_runs"):
            parts[row["part"]].append(int(row["step"]))
        assert parts["other"] == [1, 2]
        steps.append(parts["tiny"])
        assert steps[-1][: len(steps[-2])] == steps[-2] and len(steps[-1]) >= len(steps[-2]) + 2
        (row,) = record.read("accelerator")
        assert json.loads(row["note"])["step"] == steps[-1][-1] and row["part"] == "tiny"
    assert steps[-1] == sorted(set(steps[-1]))


def test_a_slice_of_a_long_run_that_crashes_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ACCELERATOR, "LEARNING", {"tiny": (500, ["ppo.py"])})
    monkeypatch.setattr(ACCELERATOR, "RUNS", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    run = tmp_path / "tiny"
    run.mkdir()
    (run / "config.json").write_text('{"args": {"num_envs": 0}}')
    (run / "metrics.csv").write_text("step,seconds,charts/SPS,charts/episodic_return\n1,1,1,1\n")
    with pytest.raises(SystemExit, match="tiny: ppo.py ended with status [12],"):  # exit status 1
        ACCELERATOR.main(["tiny"])
    assert not list(tmp_path.glob("*.csv"))


def test_the_origin_of_a_file_tells_that_several_commands_wrote_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "machine", lambda: "")
    noted = []
    for task in ("a", "a", "b", "b"):  # a command writes row by row
        monkeypatch.setattr(sys, "argv", ["without.py", task])
        record.write("some", [{"run": len(noted)}], "run")
        noted.append(record.read("measured")[0]["noted"])
    alone, among = "when measured", "when measured, others wrote rows before"
    assert noted == [alone, alone, among, among]
    record.write("some", [{"run": 0}])
    assert record.read("measured")[0]["noted"] == alone  # in place of all rows


def test_seeds_at_once_each_have_their_own_part_of_the_pool():
    """In Pendulum, where an action leads tells whether it was this seed's, and what it was."""
    at_once, seeds, envs = BENCHMARKS["at_once"], 3, 4
    sac = importlib.import_module("sac")
    where = "envpool::Pendulum-v1", envs, 1
    env = at_once.pooled_env(sac.make_env, sac.call_host, seeds, *where)
    assert env.obs_shape == (3,) and not env.hosted

    def rollout(acting, key):
        def step(acting, key):
            action = jax.random.uniform(key, (envs, 1), minval=-2.0, maxval=2.0)
            token, timestep = env.step(key, acting[0], action)
            return (token, timestep.obs), (acting[1], action, timestep)

        return jax.lax.scan(step, acting, jax.random.split(key, 250))

    keys = jax.random.split(jax.random.key(0), seeds)
    first = jax.lax.map(env.reset, keys)
    (_, last), (obs, action, timestep) = jax.device_get(jax.jit(jax.vmap(rollout))(first, keys))
    assert len(np.unique(first[1][..., 0])) == seeds * envs  # no two begin at the same angle
    assert timestep.truncated.sum() == seeds * envs and timestep.truncated[:, 199].all()
    np.testing.assert_array_equal(obs[:, 0], first[1])
    np.testing.assert_array_equal(np.concatenate([obs[:, 1:], last[:, None]], 1), timestep.obs)
    goes_on = ~timestep.truncated
    np.testing.assert_array_equal(timestep.obs[goes_on], timestep.next_obs[goes_on])
    cos, sin, velocity = np.moveaxis(obs, -1, 0)
    angle, torque = np.arctan2(sin, cos), action[..., 0]
    cost = angle**2 + 0.1 * velocity**2 + 0.001 * torque**2
    np.testing.assert_allclose(timestep.reward, -cost, rtol=1e-3, atol=1e-3)
    velocity = np.clip(velocity + (15 * sin + 3 * torque) * 0.05, -8, 8)
    np.testing.assert_allclose(timestep.next_obs[..., 2], velocity, atol=1e-3)


@pytest.mark.parametrize("seeds", [["1", "3"], ["1"]])
def test_seeds_at_once_follow_each_other(seeds, capsys):
    with pytest.raises(SystemExit, match="2"):
        BENCHMARKS["at_once"].parse(["sac_halfcheetah_1m", "--seeds", *seeds])
    (line,) = capsys.readouterr().err.splitlines()
    assert "--seeds must be a row" in line
    assert BENCHMARKS["at_once"].parse(["sac_halfcheetah_1m", "--seeds", "3", "2"]).seeds == [3, 2]


@pytest.mark.thorough
def test_seeds_at_once_are_scored_as_single_runs_are(tmp_path, monkeypatch):
    flags = "--env-id envpool::Pendulum-v1 --total-timesteps 800 --learning-starts 100 --num-envs 2"
    task = tasks.Task("td3.py", "tiny", f"{flags} --updates-per-step 0.1 --eval-episodes 2")
    monkeypatch.setitem(tasks.TASKS, "td3_lunarlander", task)  # a name that the command line takes
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["at_once.py", "td3_lunarlander"])
    BENCHMARKS["at_once"].main(["td3_lunarlander", "--seeds", "4", "5"])
    assert [row["seed"] for row in record.read("scores_td3_lunarlander")] == ["4", "5"]
    curves = record.read("curves_td3_lunarlander")
    assert {(row["seed"], row["step"]) for row in curves} == {
        (seed, step) for seed in ("4.0", "5.0") for step in ("400.0", "800.0")
    }
    first, second = [[row["return"] for row in curves if row["seed"] == x] for x in ("4.0", "5.0")]
    assert first != second and "nan" not in first + second
    assert record.read("measured")[0]["command"] == "python benchmarks/at_once.py td3_lunarlander"


def test_every_benchmark_of_the_readme_parses():
    found = re.findall(r"python benchmarks/(\w+)\.py(.*?)[`\n]", README)
    assert {name for name, _ in found} == set(BENCHMARKS) - {"record", "tasks"}
    for name, words in found:
        if hasattr(BENCHMARKS[name], "files"):
            assert BENCHMARKS[name].files(words.replace("TASK ...", "all").split())


def test_every_script_and_benchmark_is_listed():
    for path in [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert path.name in README or path.name == "record.py", path.name
    assert set(tasks.SCRIPTS) == {path.stem for path in ROOT.glob("*.py")} - {
        "enjoy",
        "plot",
        "run_policy",
    }


def test_every_raw_file_says_where_it_comes_from():
    """measured.csv: its command writes that file; versions and machine are there."""
    rows = {row["file"]: row for row in record.read("measured")}
    files = {path.name for path in record.RESULTS.glob("*.csv")}
    assert set(rows) == files - {"measured.csv"}
    for row in rows.values():
        python, path, *words = row["command"].split()
        assert python == "python" and (ROOT / path).is_file(), row
        assert row["file"] in BENCHMARKS[Path(path).stem].files(words), row
        # EnvPool, which simulates on the CPU, was not installed beside the GPU.
        needed = {"day", "machine", "python", *record.PACKAGES} - (
            {"envpool"} if "NVIDIA" in row["machine"] else set()
        )
        assert all(row[name] for name in needed), row


def test_links_lead_somewhere_and_the_page_is_light():
    links = re.findall(r"\]\(([^)]+)\)", README)
    local = {link for link in links if not link.startswith(("http", "#"))}
    missing = [link for link in local if not (ROOT / link).is_file()]
    assert not missing
    headings = {
        re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-")
        for x in re.findall(r"^#+ (.*)", README, re.M)
    }
    assert {link[1:] for link in links if link.startswith("#")} <= headings
    pictures = {link for link in local if link.startswith("assets/")}
    assert {f"assets/{path.name}" for path in (ROOT / "assets").iterdir()} == pictures
    sizes = [(ROOT / link).stat().st_size for link in pictures]
    assert max(sizes) < 1_000_000 and sum(sizes) + len(README) < 5_000_000


# === docs/ ===

sys.path.insert(0, str(ROOT / "docs"))
import build


@pytest.mark.parametrize("script", tasks.SCRIPTS)
def test_a_page_speaks_of_every_part_of_its_script_and_is_light(script):
    page = build.script_page(script)
    assert len(page.encode()) < 300_000 and "<math" in page
    for part in build.parts_of((ROOT / f"{script}.py").read_text()):
        assert f'id="{part.name}"' in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    shown = re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bsrc=|<link|<script|@import|url\(", shown)  # nothing is fetched
    assert re.findall(r'href="(http[^"]+)/\d+\.\d+"', page)
    assert set(re.findall(r'href="(http[^"]+)/\d+\.\d+"', page)) == {"https://arxiv.org/abs"}


def test_commentary_on_what_is_not_there_and_a_part_without_any_are_refused(
    tmp_path, monkeypatch, capsys
):
    parts = build.parts_of((ROOT / "ppo.py").read_text())
    assert {"ppo_loss", "compute_gae", "evaluate", "Agent"} <= {part.name for part in parts}
    assert not {"make_env", "main", "Args"} & {part.name for part in parts}
    text = (ROOT / "docs/ppo.md").read_text()
    monkeypatch.setattr(build, "SCRIPTS", ["ppo"])
    monkeypatch.setattr(build, "DOCS", tmp_path)
    for changed, says in [
        (text.replace("## ppo_loss", "## ppo_lost"), "speaks of ppo_lost"),
        (re.sub(r"## ppo_loss.*?## ", "## ", text, flags=re.DOTALL), "says nothing of ppo_loss"),
    ]:
        (tmp_path / "ppo.md").write_text(changed)
        build.texts_of.cache_clear()
        with pytest.raises(SystemExit) as stop:
            build.commentary_of("ppo")
        assert stop.value.code == 2 and says in capsys.readouterr().err
    build.texts_of.cache_clear()


def test_the_same_part_of_another_script_has_its_words_and_a_changed_one_has_not(
    monkeypatch, capsys
):
    words = build.commentary_of("ppo_lstm")
    assert words["compute_gae"].startswith(build.texts_of("ppo")["compute_gae"].strip())
    assert "ppo.html#compute_gae" in words["compute_gae"]
    texts = {name: dict(build.texts_of(name)) for name in tasks.SCRIPTS}
    for name in set(texts) - {"ppo"}:
        texts[name].pop("ppo_loss", None)
    monkeypatch.setattr(build, "texts_of", texts.get)
    with pytest.raises(SystemExit):
        build.commentary_of("ppo_lstm")  # ppo.py's loss is another
    assert "says nothing of ppo_loss" in capsys.readouterr().err


@pytest.mark.parametrize("name", build.CHANGES)
def test_what_is_left_out_is_there_once_in_the_part_that_it_is_drawn_beside(name):
    change = build.CHANGES[name]
    part = build.codes_of(change.script)[change.part]
    assert all(old in part for old in change.replaced)
    changed = BENCHMARKS["without"].text_of(change, change.replaced)
    assert all(new in changed for new in (change.both | change.replaced).values())
    compile(changed, change.script, "exec")
    tyro.cli(importlib.import_module(change.script).Args, args=shlex.split(change.flags))


def test_the_figure_has_a_line_for_each_seed_and_the_mean_scores():
    without, as_it_is = [
        [
            {"seed": seed, "step": step, "return": number}
            for seed in "12"
            for step in ("1000", "2000", "greedy")
        ]
        for number in (1, 5)
    ]
    drawn = build.figure(without, as_it_is, "without <it>", "- it\n+ a < b", "--seed 1")
    assert drawn.count('<polyline class="with"') == drawn.count('<polyline class="without"') == 2
    assert "as it is: 5, without &lt;it&gt;: 1" in drawn and "of 2 seeds" in drawn
    assert drawn.count('<circle class="with"') == drawn.count('<circle class="without"') == 2


@pytest.mark.parametrize("name", build.CHANGES)
def test_every_change_was_run_with_five_seeds_and_has_a_figure_with_the_changed_lines(name):
    change = build.CHANGES[name]
    for run in (name, build.unchanged(change)):
        rows = [row for row in record.read("without") if row["run"] == run]
        assert {row["seed"] for row in rows} == set("12345"), f"run: benchmarks/without.py {name}"
        assert sum(row["step"] == "greedy" for row in rows) == 5
    figures = build.figures_of(change.script, change.part)
    assert f'<b class="without">{change.what}</b>' in figures
    lines = build.changed_lines(change).splitlines()
    assert [x[0] for x in lines] in (["-", "+"] * len(change.replaced), ["-", "-", "+", "+"]), lines


@pytest.mark.thorough
def test_every_script_has_a_page_and_the_index_leads_there(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SITE", tmp_path / "site")
    build.main([])
    pages = {path.name: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert set(pages) == {"index.html", *[f"{script}.html" for script in tasks.SCRIPTS]}
    places = {
        name: [name, *[f"{name}#{x}" for x in re.findall(r'\bid="([^"]+)"', page)]]
        for name, page in pages.items()
    }
    known = set(sum(places.values(), []))
    for name, page in pages.items():
        assert len(page.encode()) < 300_000 and len(places[name]) == len(set(places[name])), name
        links = {x if x[0] != "#" else name + x for x in re.findall(r'href="([^"]+)"', page)}
        assert {x for x in links if not x.startswith("https://arxiv.org/abs/")} <= known, name
        assert name == "index.html" or f'href="{name}"' in pages["index.html"]


@pytest.mark.thorough
def test_the_notebook_runs_and_learns(tmp_path):
    """Its cells one after the other; what they find is checked, not only that they run."""
    cells = json.loads((ROOT / "docs/notebook.ipynb").read_text())["cells"]
    program = "\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "code")
    program += "\nprint(total, returns[0], returns[-1], walked, len(plt.gca().lines))\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT / "docs",
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    total, first, last, walked, lines = map(float, done.stdout.split())
    assert total >= 300 and first < last and 0.85 < last <= 0.911 and lines == 1
    assert walked == pytest.approx(0.91, abs=1e-3)
