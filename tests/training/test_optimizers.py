"""Optimizers against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from vidar.errors import ConfigError
from vidar.training.optimizers import OptimizerConfig, make_optimizer, make_schedule

AXES = {
    "enter": ("embed", "mlp"),
    "kernel": ("layers", "embed", "mlp"),
    "heads": ("layers", "embed", "heads", None),
    "bias": ("layers", "mlp"),
}


def parameters(scale=1.0):
    random = np.random.default_rng(0)
    shapes = {"enter": (4, 6), "kernel": (2, 4, 6), "heads": (2, 4, 3, 2), "bias": (2, 6)}
    return {path: jnp.asarray(scale * random.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}


def run(config, gradients, values, count=1):
    optimizer = make_optimizer(config, AXES)
    state = optimizer.init(values)
    for _ in range(count):
        updates, state, rate = optimizer.update(gradients, state, values)
    assert int(state["count"]) == count
    return updates, rate


def test_adamw_first_update_is_the_sign_and_decays_matrices_only():
    config = OptimizerConfig("adamw", learning_rate=0.1, weight_decay=0.5, clip=None, eps=1e-12)
    values, gradients = parameters(), parameters(3.0)
    updates, rate = run(config, gradients, values)
    assert float(rate) == pytest.approx(0.1)
    for path, update in updates.items():
        decay = 0.0 if path == "bias" else 0.5
        expected = -0.1 * (np.sign(gradients[path]) + decay * np.asarray(values[path]))
        np.testing.assert_allclose(update, expected, rtol=1e-4, err_msg=path)


def test_sgd_with_momentum():
    config = OptimizerConfig("sgd", learning_rate=0.1, beta1=0.5, weight_decay=0.2, clip=None)
    values, gradients = parameters(), parameters(2.0)
    updates, _ = run(config, gradients, values, count=3)
    for path, update in updates.items():
        decay = 0.0 if path == "bias" else 0.2
        expected = -0.1 * (1.75 * np.asarray(gradients[path]) + decay * np.asarray(values[path]))
        np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=path)


def test_muon_orthogonalises_each_stacked_matrix_and_leaves_the_rest_to_adam():
    config = OptimizerConfig("muon", learning_rate=0.1, clip=None, eps=1e-12)
    gradients = parameters()
    updates, _ = run(config, gradients, parameters())
    for layer in range(2):
        singular = np.linalg.svd(np.asarray(updates["kernel"][layer]) / 0.1, compute_uv=False)
        assert singular.max() / singular.min() < 2.0
        assert np.ptp(np.linalg.svd(np.asarray(gradients["kernel"][layer]), compute_uv=False)) > 1.0
    # The first update of Adam with Nesterov momentum: the sign, times b1 (1 - b1) / (1 - b1²) + 1.
    size = 0.1 * (0.9 * 0.1 / (1 - 0.81) + 1.0)
    for path in ("enter", "heads", "bias"):
        np.testing.assert_allclose(updates[path], -size * np.sign(gradients[path]), rtol=1e-4, err_msg=path)


def test_clipping_bounds_the_global_norm():
    config = OptimizerConfig("sgd", learning_rate=1.0, beta1=0.0, clip=0.5)
    updates, _ = run(config, parameters(10.0), parameters())
    norm = np.sqrt(sum(np.sum(np.square(update)) for update in updates.values()))
    assert norm == pytest.approx(0.5, rel=1e-5)


def test_schedules():
    constant = make_schedule(OptimizerConfig(learning_rate=2.0, warmup=4))
    assert [float(constant(count)) for count in (0, 1, 3, 4, 100)] == pytest.approx([0.5, 1.0, 2.0, 2.0, 2.0])
    cosine = make_schedule(
        OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup=10, decay_steps=110, final_fraction=0.1)
    )
    assert [float(cosine(count)) for count in (4, 10, 60, 110, 500)] == pytest.approx([1.0, 2.0, 1.1, 0.2, 0.2])


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"schedule": "cosine"}, "decay_steps=None"),
        ({"schedule": "cosine", "warmup": 5, "decay_steps": 5}, "decay_steps=5"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be finite"),
        ({"beta1": 1.0}, "beta1=1.0 must be at least 0 and below 1"),
        ({"beta2": 2.0}, "beta2=2.0 must be"),
        ({"warmup": -1}, "warmup=-1 must be"),
        ({"final_fraction": 1.5}, "final_fraction=1.5 must be"),
        ({"eps": 0.0}, "eps=0.0 must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be"),
    ],
)
def test_impossible_choices(choices, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**choices)
