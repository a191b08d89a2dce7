"""plot.py draws what stands in the runs: no more seeds than there are, and no further than they go."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

import plot

METRIC = "charts/episodic_return"


def make_run(folder, script="ppo.py", task="gymnax::CartPole-v1", seeds=(1,), steps=11, **flags):
    """Seed s has the return 100 s + step / 10, and nan in the first row."""
    folder.mkdir()
    args = {"env_id": task, "seed": seeds[0], "num_seeds": len(seeds)} | flags
    (folder / "config.json").write_text(json.dumps({"script": script, "args": args}))
    with (folder / "metrics.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "seconds", "seed", METRIC])
        for step in range(0, 10 * steps, 10):
            for seed in seeds:
                value = 100 * seed + step / 10 if step else np.nan
                writer.writerow([step, 5 + step / seed, seed, value])
    return folder


def test_a_line_is_the_interquartile_mean_and_its_interval(tmp_path):
    folders = [make_run(tmp_path / f"{seed}", seeds=(seed,)) for seed in (1, 2, 3, 40)]
    runs = [plot.read_run(folder, METRIC) for folder in folders]
    ((label, curves),) = plot.lines_of(runs).items()
    assert label == "ppo.py" and len(curves) == 4
    grid, middle, low, high = plot.summarize(curves, "steps")
    assert (grid[0], grid[-1]) == (10, 100)  # nan is no value
    np.testing.assert_allclose(middle, 250 + grid / 10)  # of 100, 200, 300, 4000
    ends = np.array([[100.0], [200.0], [300.0], [4000.0]])
    iqm = lambda x, axis: stats.trim_mean(x, 0.25, axis=axis)
    expected = stats.bootstrap((ends[:, 0],), iqm, method="percentile", rng=1, axis=0)
    expected = expected.confidence_interval
    assert low[0] - 1 == pytest.approx(expected.low, abs=1)
    assert high[0] - 1 == pytest.approx(expected.high, rel=0.05)


def test_a_line_ends_with_its_shortest_seed_and_counts_from_the_launch(tmp_path):
    runs = [make_run(tmp_path / "a", seeds=(1,)), make_run(tmp_path / "b", seeds=(2,), steps=6)]
    curves = [plot.read_run(folder, METRIC).curves[0] for folder in runs]
    assert plot.summarize(curves, "steps")[0][-1] == 50
    seconds, middle, *_ = plot.summarize(curves, "seconds")
    assert (seconds[0], seconds[-1]) == (15, 30)  # 5 + 10 / 1, 5 + 50 / 2
    np.testing.assert_allclose(middle[-1], np.mean([100 + 2.5, 200 + 5]))


def test_seeds_of_one_run_and_of_many_are_the_same_line(tmp_path):
    together = make_run(tmp_path / "one", seeds=(1, 2, 3))
    apart = [make_run(tmp_path / f"{seed}", seeds=(seed,)) for seed in (1, 2, 3)]
    lines = [plot.lines_of([plot.read_run(x, METRIC) for x in xs]) for xs in ([together], apart)]
    for one, other in zip(lines[0]["ppo.py"], lines[1]["ppo.py"], strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_what_differs_has_a_line_of_its_own(tmp_path):
    runs = [
        make_run(tmp_path / "a", learning_rate=0.1),
        make_run(tmp_path / "b", learning_rate=0.2),
        make_run(tmp_path / "c", learning_rate=0.2, seeds=(2,)),
        make_run(tmp_path / "d", script="dqn.py", learning_rate=0.3),
    ]
    lines = plot.lines_of([plot.read_run(folder, METRIC) for folder in runs])
    assert {label: len(curves) for label, curves in lines.items()} == {
        "ppo.py --learning-rate 0.1": 1,
        "ppo.py --learning-rate 0.2": 2,
        "dqn.py": 1,
    }


def draw(*flags, cwd):
    command = [sys.executable, str(ROOT / "plot.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)


def test_the_picture_has_a_row_for_each_task_and_names_each_line(tmp_path):
    make_run(tmp_path / "a", seeds=(1, 2))
    make_run(tmp_path / "b", script="dqn.py", task="gymnax::Acrobot-v1")
    done = draw("a", "b", "--out", "pictures/both", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 seeds of 2 runs" in done.stdout
    assert (tmp_path / "pictures/both.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    svg = (tmp_path / "pictures/both.svg").read_text()
    for text in ("ppo.py (2 seeds)", "dqn.py (1 seed)", "CartPole-v1", "Acrobot-v1"):
        assert text in svg
    assert svg.count("environment steps") == svg.count("seconds since the launch") == 2


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("", "name the folders of runs"),
        ("broken", "broken is no run: it needs a config.json and a metrics.csv"),
        ("a b", "ppo.py has seed 1 twice; leave one of the runs out"),
        ("a --metric losses/nothing", "has no losses/nothing, but charts/episodic_return"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(tmp_path, flags, hint):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    (make_run(tmp_path / "broken") / "config.json").write_text("{}")
    done = draw(*flags.split(), cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert hint in done.stderr and {x.name for x in tmp_path.iterdir()} == {"a", "b", "broken"}


def test_a_folder_in_which_nothing_has_begun_is_left_out(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "begun").mkdir()
    done = draw("a", "begun", cwd=tmp_path)
    assert done.returncode == 0 and "begun is left out" in done.stderr
    assert "1 seed of 1 run" in done.stdout
