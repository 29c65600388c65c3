"""kill -9 at random instants, restart, and the outcome is that of an uninterrupted run, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT, subprocess_environment

pytestmark = pytest.mark.usefixtures("compiled_once")

WORKER = """
    import sys, time, numpy as np
    from tests.training.toy import Numbers, Regression, Toy, arrays
    from vidar.training import TrainingConfig, train

    def on_read(position):
        time.sleep(0.004)
        print(position, flush=True)

    toy = Toy(
        objective=Regression(noise=0.3, ema_start=50),
        training=TrainingConfig(steps={steps}, log_every=7, save_every=10, keep=3),
        numbers=lambda: Numbers(on_read=on_read),
    )
    workdir = sys.argv[1]
    state = train(toy.run(), workdir)
    np.savez(workdir + "/final.npz", **arrays(state))
"""


def start(workdir, steps):
    code = "\n".join(line[4:] for line in WORKER.format(steps=steps).splitlines())
    return subprocess.Popen(
        [sys.executable, "-c", code, str(workdir)],
        env=subprocess_environment(1),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def half_written(workdir):
    """Whether a save is under way: a step's directory without its manifest."""
    steps = (workdir / "checkpoints").glob("0*")
    return any(not (step / "manifest.0.json").exists() for step in steps)


def kill(process, workdir, inside_a_save, generator):
    """Kills a run at a random instant after its first batch; returns whether that was inside a save."""
    assert process.stdout is not None
    if not process.stdout.readline():
        pytest.fail(process.communicate()[1])
    time.sleep(generator.uniform(0.05, 1.0))
    deadline = time.time() + 5.0
    while inside_a_save and not half_written(workdir) and time.time() < deadline:
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return half_written(workdir)


def outcome(workdir):
    with np.load(workdir / "final.npz") as file:
        arrays = dict(file)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [{name: value for name, value in json.loads(line).items() if "time/" not in name} for line in lines]
    return arrays, rows


def compare(tmp_path, steps, kills, least_inside, generator):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole, steps).wait() == 0
    inside = [kill(start(parts, steps), parts, number % 2 == 0, generator) for number in range(kills)]
    assert sum(inside) >= least_inside
    assert not (parts / "final.npz").exists(), "the run was over before the last kill"
    last = start(parts, steps)
    assert last.wait() == 0, last.communicate()
    expected, expected_rows = outcome(whole)
    found, rows = outcome(parts)
    assert found.keys() == expected.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    assert len(rows) == steps // 7
    assert rows == expected_rows


def test_two_kills(tmp_path):
    compare(tmp_path, steps=500, kills=2, least_inside=1, generator=random.Random(1))


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    """Costs about three minutes: twenty restarts."""
    compare(tmp_path, steps=5000, kills=20, least_inside=5, generator=random.Random(0))
