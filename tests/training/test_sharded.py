"""Training on meshes of virtual devices equals training on one device, to rounding."""

import json

import numpy as np
import pytest

from tests.training.toy import Regression, Toy, arrays, assert_close
from vidar.training import OptimizerConfig, TrainingConfig, train

SHARDED = """
    import sys, jax, numpy as np
    from tests.training.test_sharded import toy
    from tests.training.toy import arrays
    from vidar.sharding import MeshConfig
    from vidar.training import train

    workdir = {workdir!r}
    state = train(toy({steps}).run(mesh=MeshConfig({mesh})), workdir)
    np.savez(workdir + "/networks.npz", **arrays(state.networks))
    print(state.networks["critic"].blocks["kernel"][...].sharding.spec)
"""


def toy(steps):
    """Plain gradient descent, so that rounding is not amplified where a gradient is almost zero."""
    return Toy(
        objective=Regression(every=1, noise=0.3, ema_start=1),
        training=TrainingConfig(steps=steps, log_every=1, save_every=100, tensorboard=False),
        optimizer=OptimizerConfig("sgd", learning_rate=0.05, beta1=0.9),
    )


def curve(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("critic/loss", "critic/gradient_norm", "generator/loss", "generator/gradient_norm", "generator/even")
    return np.array([[row[name] for name in names] for row in rows])


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    return train(toy(4).run(), workdir), workdir


@pytest.mark.parametrize(
    "devices, mesh, spec",
    [
        (8, "data=2, fsdp=4", "(None, ('fsdp', 'sequence'), 'tensor')"),
        (8, "sequence=4, tensor=2", "(None, ('fsdp', 'sequence'), 'tensor')"),
        (16, "data=2, fsdp=2, sequence=2, tensor=2", "(None, ('fsdp', 'sequence'), 'tensor')"),
    ],
)
def test_a_mesh_computes_what_one_device_does_and_its_checkpoint_moves(
    tmp_path, run_python, one_device, devices, mesh, spec
):
    """Two steps on the mesh; then two more on one device, from the mesh's checkpoint."""
    expected, workdir = one_device
    code = SHARDED.format(workdir=str(tmp_path), steps=2, mesh=mesh)
    assert spec in run_python(code, devices=devices)
    np.testing.assert_allclose(curve(tmp_path), curve(workdir)[:2], rtol=1e-5)
    moved = train(toy(4).run(), tmp_path)
    np.testing.assert_allclose(curve(tmp_path), curve(workdir), rtol=1e-5)
    assert_close(moved.networks, expected.networks)
    assert_close(moved.ema, expected.ema)


def test_the_comparison_can_fail(one_device):
    """Another seed's noise moves every loss by more than the tolerance."""
    expected, workdir = one_device
    other = train(toy(1).run(training=TrainingConfig(steps=1, log_every=1, seed=1)), workdir / "other")
    assert (np.abs(curve(workdir / "other")[0] / curve(workdir)[0] - 1.0) > 1e-3).all()
    assert arrays(other.networks).keys() == arrays(expected.networks).keys()
