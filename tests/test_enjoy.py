"""enjoy.py plays what the run has learned: the very episodes of its evaluation, and pictures of one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import ROOT
from PIL import Image, ImageSequence

import enjoy
import ppo

RUNS = {  # a memory and two seeds; a normaliser and Gymnasium; actors and EnvPool
    "ppo_lstm": "--env-id gymnax::CartPole-v1 --mask-obs 1 3 --num-envs 16 --num-steps 32 "
    "--num-minibatches 4 --num-seeds 2",
    "ppo_continuous": "--env-id gymnasium::Pendulum-v1 --num-envs 4 --num-steps 128 --norm-obs "
    "--num-minibatches 4",
    "impala": "--env-id envpool::CartPole-v1 --num-envs 16 --num-steps 32 --num-minibatches 4 "
    "--num-actor-threads 2",
}


def run(script, *flags, cwd):
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def frames(path):
    with Image.open(path) as image:
        return [np.asarray(x.convert("RGB")) for x in ImageSequence.Iterator(image)]


@pytest.mark.parametrize("name", RUNS)
def test_the_returns_are_those_of_the_evaluation_and_an_episode_is_drawn(tmp_path, name):
    flags = [*RUNS[name].split(), "--total-timesteps", 512 * 8, "--eval-episodes", 5]
    done = run(f"{name}.py", *flags, "--run-dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "here/evaluation.json").read_text())
    for seed in evaluation["seeds"]:
        draw = "--draw" if seed == evaluation["seeds"][-1] else "--no-draw"
        done = run("enjoy.py", "here", "--seed", seed["seed"], draw, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        numbers = re.search(r"over 5 episodes: (\S+) \+- (\S+), (\S+) to (\S+),", done.stdout)
        for number, key in zip(numbers.groups(), ("mean", "std", "min", "max"), strict=True):
            assert float(number) == pytest.approx(seed[key], abs=0.06), key
    pictures, total = re.search(r"gif: (\d+) pictures .* return (\S+)", done.stdout).groups()
    drawn = frames(tmp_path / "here/episode.gif")
    assert drawn[0].shape[1] == 320 and drawn[0].std() > 5  # not blank
    moves = [np.abs(x.astype(int) - y).sum() > 0 for x, y in zip(drawn, drawn[1:], strict=False)]
    assert np.mean(moves) > 0.3
    if (
        "CartPole" in RUNS[name]
    ):  # a reward of 1 for each step; EnvPool's last picture is the next episode's
        assert int(pictures) == float(total) - ("envpool" in RUNS[name])
    if "Pendulum" in RUNS[name]:  # the steps within a repeated action too
        assert int(pictures) == 200 + 1


def test_bad_input_is_one_clear_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ppo", ppo)  # enjoy.py loads its own; put this one back

    def refused(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            enjoy.main(tyro.cli(enjoy.Args, args=list(map(str, flags))))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.splitlines()) == 1, error
        return error

    flags = "--env-id gymnax::MemoryChain-bsuite --num-envs 4 --num-steps 16 --num-minibatches 4"
    flags = [*flags.split(), "--total-timesteps", 64, "--eval-episodes", 2, "--run-dir", "here"]
    assert run("ppo.py", *flags, cwd=tmp_path).returncode == 0
    assert "holds no config.json of a run" in refused("nowhere")
    assert "--seed 7 is not in this run, whose seeds are 1 to 1" in refused("here", "--seed", 7)
    assert "must end in .gif" in refused("here", "--out", "film.mov")
    assert "no pictures of MemoryChain-bsuite: --no-draw prints" in refused("here")
    enjoy.main(enjoy.Args(Path("here"), draw=False))
    config = tmp_path / "here/config.json"
    config.write_text(config.read_text().replace('"ppo.py"', '"mine.py"'))
    assert "a run of mine.py: put that script beside enjoy.py" in refused("here")
    shutil.rmtree(tmp_path / "here/checkpoints")
    config.write_text(config.read_text().replace('"mine.py"', '"ppo.py"'))
    assert "no checkpoint" in refused("here")
