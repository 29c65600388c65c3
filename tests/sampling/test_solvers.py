"""Multistep solvers against diffusers' schedulers, and what they remember."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import solvers as golden
from vidar.errors import ConfigError
from vidar.sampling import solvers
from vidar.sampling.solvers import UniPC


def solve(solver, velocity, x):
    """Frames after every step; the two frames of a row go through the same steps."""
    x = jnp.asarray(x)
    history = jnp.zeros((*x.shape[:2], solver.remembered, *x.shape[2:]), jnp.float32)
    frames = []
    for step in range(solver.steps):
        progress = jnp.full((x.shape[1],), step, jnp.int32)
        prediction = jnp.asarray(velocity(np.asarray(x), float(solver.levels[step])), jnp.float32)
        x, history = solver.step("v", prediction, x, progress, None, history)
        frames.append(np.asarray(x))
    return np.stack(frames)


def trajectory(name):
    kind, steps, start = golden.CASES[name]
    return solve(getattr(solvers, kind)(steps, golden.SHIFT, start), golden.velocity, golden.noise())


@pytest.fixture(scope="module")
def arrays():
    with np.load(golden.ARRAYS) as file:
        return dict(file)


@pytest.mark.parametrize("name", golden.CASES)
def test_trajectories_are_those_of_diffusers(name, arrays):
    expected = arrays[name]
    assert len(arrays) == len(golden.CASES)
    np.testing.assert_allclose(golden.thinned(trajectory(name)), expected, atol=1e-5 * np.abs(expected).max())


def test_frames_at_different_steps_do_not_know_of_each_other():
    """Each frame has its own weights and its own memory, whatever the one beside it does."""
    solver, rng = UniPC(5), np.random.default_rng(3)
    x, prediction = (jnp.asarray(rng.normal(size=golden.SHAPE), jnp.float32) for _ in range(2))
    history = jnp.asarray(rng.normal(size=(1, 2, 3, *golden.SHAPE[2:])), jnp.float32)
    together = solver.step("v", prediction, x, jnp.asarray([1, 3]), None, history)
    for frame, progress in ((0, 1), (1, 3)):
        part = slice(frame, frame + 1)
        alone = solver.step(
            "v", prediction[:, part], x[:, part], jnp.asarray([progress]), None, history[:, part]
        )  # fmt: skip
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_array_equal(one[:, part], other)


def test_what_is_remembered():
    """Two clean predictions and the corrected frames, the newest first."""
    solver, rng = UniPC(5), np.random.default_rng(3)
    x, clean = (jnp.asarray(rng.normal(size=golden.SHAPE), jnp.float32) for _ in range(2))
    history = jnp.asarray(rng.normal(size=(1, 2, 3, *golden.SHAPE[2:])), jnp.float32)
    _, after = solver.step("x0", clean, x, jnp.asarray([0, 0]), None, history)
    np.testing.assert_array_equal(after[:, :, 0], clean)
    np.testing.assert_array_equal(after[:, :, 1], history[:, :, 0])
    np.testing.assert_array_equal(after[:, :, 2], x)


@pytest.mark.parametrize("fields", [dict(steps=0), dict(shift=0.0), dict(start=0.0), dict(start=1.5)])
def test_impossible_settings_are_refused(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=f"solver.{name}"):
        UniPC(**fields)
