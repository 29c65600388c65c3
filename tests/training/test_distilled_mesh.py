"""A distillation of three networks on eight virtual devices ends where it ends on one."""

import numpy as np

from tests.networks import network
from tests.training.test_roles import MODEL, built
from vidar.training.experiment import make_run, portable_dict
from vidar.training.loop import train
from vidar.training.state import by_path
from vidar.weights import save_weights

# Heads that split in two; plain gradient descent, so that rounding is not amplified where a gradient is almost zero.
SHAPE = MODEL | {"width": 32, "heads": 2}
FIELDS = {"model": SHAPE, "visibility": {"kind": "chunk_causal"}, "plan": {}, "solver": {"kind": "few_step"}}


def distilled(weights, mesh):
    """Two steps, both with an update of the student and of the critic."""
    start = {role: str(weights) for role in ("student", "teacher")}
    optimizer = {"name": "sgd", "learning_rate": 0.5, "beta1": 0.9}
    return built(
        **FIELDS,
        objective={"kind": "distillation", "generator_every": 1, "ema": 0.5, "ema_start": 0, **start},
        data={"frames": 4, "batch": 8},
        optimizers=dict.fromkeys(("student", "critic"), optimizer),
        training={"steps": 2, "log_every": 1, "tensorboard": False},
        mesh=mesh,
    )


def run(weights, workdir, **mesh):
    """Trains, and keeps all networks and averages as numpy arrays."""
    state = train(make_run(distilled(weights, mesh)), workdir)
    trees = {**state.networks, "average": state.ema["student"]}
    found = {f"{name}{path}": np.asarray(leaf) for name, tree in trees.items() for path, leaf in by_path(tree).items()}
    np.savez(workdir / "networks.npz", **found)
    return found


def test_a_run_on_eight_devices_equals_that_on_one(tmp_path, run_python):
    config = built(**FIELDS)
    weights = tmp_path / "start.safetensors"
    networks = {"student": network(config.model, 0), "teacher": network(config.model, 1)}
    systems = {"student": portable_dict(config), "teacher": portable_dict(built(model=SHAPE))}
    save_weights(weights, networks, {"systems": systems})
    one = run(weights, tmp_path / "one")
    (tmp_path / "eight").mkdir()
    code = f"""
        from pathlib import Path
        from tests.training.test_distilled_mesh import run
        run(Path({str(weights)!r}), Path({str(tmp_path / "eight")!r}), data=2, fsdp=2, tensor=2)
    """
    run_python(code, devices=8, timeout=900)
    eight = np.load(tmp_path / "eight" / "networks.npz")
    start = by_path(networks["student"])
    assert max(np.abs(one[f"student{path}"] - np.asarray(leaf)).max() for path, leaf in start.items()) > 1e-3
    for path, array in one.items():
        size = max(float(np.linalg.norm(array)), 1e-6)
        assert np.linalg.norm(eight[path] - array) / size <= 1e-5, path
