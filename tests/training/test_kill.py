"""kill -9 at random instants, restart, and the outcome is that of an uninterrupted run, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from tests.conftest import ROOT, subprocess_environment
from vidar.cli.main import main

TOY = """
import sys, time
from tests.training.toy import Numbers, Regression, Toy
from vidar.training import TrainingConfig, train

toy = Toy(
    objective=Regression(noise=0.3, ema_start=50),
    training=TrainingConfig(steps={steps}, log_every=7, save_every=10, keep=3),
    numbers=lambda: Numbers(on_read=lambda position: time.sleep(0.004)),
)
train(toy.run(), sys.argv[1])
"""


def start(command: list[str]) -> subprocess.Popen:
    """Starts a Python process."""
    return subprocess.Popen(
        [sys.executable, *command],
        env=subprocess_environment(1),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def half_written(workdir: Path) -> bool:
    """Whether a save is under way: a step's directory without its manifest."""
    steps = (workdir / "checkpoints").glob("0*")
    return any(not (step / "manifest.0.json").exists() for step in steps)


def size(path: Path) -> int:
    """Bytes of a file; 0 before there is one."""
    return path.stat().st_size if path.exists() else 0


def kill(command: list[str], workdir: Path, inside_a_save: bool, generator: random.Random) -> bool:
    """Kills a run at a random instant after it logs; returns whether that was inside a save."""
    log = workdir / "metrics.jsonl"
    before, process = size(log), start(command)
    while (now := size(log)) <= before:  # a run that goes on first cuts the log back to its checkpoint
        if process.poll() is not None:
            pytest.fail(process.communicate()[1])
        before = now
        time.sleep(0.002)
    time.sleep(generator.uniform(0.05, 1.0))
    deadline = time.time() + 20.0
    while inside_a_save and not half_written(workdir) and time.time() < deadline:
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return half_written(workdir)


def outcome(workdir: Path, steps: int) -> tuple[dict[str, np.ndarray], list[dict]]:
    """The last checkpoint's arrays by path, and the log without its times."""
    checkpoints = workdir / "checkpoints"
    assert max(int(step.name) for step in checkpoints.glob("0*")) == steps
    saved = ocp.load_checkpointables(checkpoints / f"{steps:08d}" / "arrays")
    leaves = jax.tree_util.tree_leaves_with_path(saved)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [{name: value for name, value in json.loads(line).items() if "time/" not in name} for line in lines]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, rows


def compare(tmp_path, command, steps, kills, least_inside, seed):
    """One run through, and one that is killed again and again; returns the log's rows."""
    generator = random.Random(seed)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(command(whole)).wait() == 0
    inside = [kill(command(parts), parts, number % 2 == 0, generator) for number in range(kills)]
    assert sum(inside) >= least_inside
    last = start(command(parts))
    assert last.wait() == 0, last.communicate()
    expected, expected_rows = outcome(whole, steps)
    found, rows = outcome(parts, steps)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for path, array in found.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    assert rows == expected_rows
    return rows


def test_two_kills(tmp_path):
    steps = 500
    code = TOY.format(steps=steps)
    rows = compare(tmp_path, lambda workdir: ["-c", code, str(workdir)], steps, kills=2, least_inside=1, seed=1)
    assert len(rows) == steps // 7


@pytest.mark.slow
def test_twenty_kills_of_self_forcing(tmp_path):
    """The command on real data, rollouts, teacher and critic; costs about five minutes: twenty restarts."""
    data, steps = tmp_path / "data", 600
    assert main(["data", "world", "--directory", str(data), "--clips", "64", "--frames", "8"]) == 0
    small = ["width=32", "layers=1", "mlp=32"]

    def command(card: str, workdir: Path, *overrides: str) -> list[str]:
        values = [*(f"model.{part}" for part in small), f"data.directory={data}", "data.batch=4", *overrides]
        every = ["log_every=1", "save_every=5", "eval_every=100000", "sample_every=100000", "tensorboard=False"]
        values += [f"training.{part}" for part in every]
        given = ["-m", "vidar.cli.main", "train", "--config", f"configs/{card}.py", "--workdir", str(workdir)]
        return given + [f"--config.{value}" for value in values]

    for card in ("teacher_forcing", "teacher"):
        assert start(command(f"world/{card}", tmp_path / card, "training.steps=5")).wait() == 0
    sources = [f"objective.student={tmp_path / 'teacher_forcing'}", f"objective.teacher={tmp_path / 'teacher'}"]
    rows = compare(
        tmp_path,
        lambda workdir: command("systems/self_forcing_dmd", workdir, *sources, f"training.steps={steps}"),
        steps,
        kills=20,
        least_inside=5,
        seed=0,
    )
    assert [row["step"] for row in rows if "critic/loss" in row] == list(range(1, steps + 1))
