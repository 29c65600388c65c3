"""Two processes with two virtual devices each train, save, are stopped, and resume."""

import json
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, subprocess_environment
from tests.training.toy import Regression, Toy, arrays
from vidar.training import TrainingConfig, train


def together(workdir, steps, term_at=-1):
    """Runs both processes to their end and returns the step that each stopped at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.multihost.worker", str(workdir), str(steps), str(term_at)],
            env=subprocess_environment(2)
            | {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            pytest.fail(f"exit code {process.returncode}\n" + "\n".join(outputs), pytrace=False)
        assert "stopped at" in output, output
    return [int(re.search(r"stopped at (\d+)", output).group(1)) for output in outputs]


def networks(workdir):
    with np.load(workdir / "networks.npz") as file:
        return dict(file)


def rows(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in lines]


def test_two_processes_train_stop_together_and_resume(tmp_path):
    assert together(tmp_path / "whole", 10) == [10, 10]

    toy = Toy(
        objective=Regression(every=2, noise=0.3, ema_start=1),
        training=TrainingConfig(steps=10, log_every=2, save_every=100, tensorboard=False),
    )
    alone = arrays(train(toy.run(), tmp_path / "alone").networks)
    for path, leaf in networks(tmp_path / "whole").items():
        np.testing.assert_allclose(leaf, alone[path], atol=2e-3 * np.abs(alone[path]).max(), err_msg=path)
    losses = [[row["critic/loss"] for row in rows(tmp_path / name)] for name in ("whole", "alone")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)

    # SIGTERM reaches one process; both stop at one step, which is saved.
    first, second = together(tmp_path / "parts", 10, term_at=5)
    assert first == second
    assert 3 <= first < 10
    assert (tmp_path / "parts" / "checkpoints" / f"{first:08d}" / "manifest.1.json").exists()
    assert together(tmp_path / "parts", 10) == [10, 10]
    whole = networks(tmp_path / "whole")
    for path, leaf in networks(tmp_path / "parts").items():
        np.testing.assert_array_equal(leaf, whole[path], err_msg=path)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
