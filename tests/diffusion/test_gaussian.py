"""The Gaussian oracle reproduces its published table, so that it may judge the real sampler."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion import gaussian
from vidar.diffusion.flow import level_grid
from vidar.diffusion.plan import staircase


def assert_agrees(found: float, published: float) -> None:
    """Within 5 % where the table has three digits, below 1e-3 where the sampler is nearly exact."""
    if published >= 0.01:
        assert found == pytest.approx(published, rel=0.05)
    else:
        assert 0 < found < 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_velocity_is_the_posterior_mean(causal):
    rng = np.random.default_rng(0)
    level = np.array([0.0, 0.2, 0.9, 0.5, 1.0, 0.3, 0.0, 0.7])
    x = rng.normal(size=(5, 8))
    truth = gaussian.covariance()
    expected = np.zeros_like(x)
    for i in range(8):
        seen = np.arange(i + 1 if causal else 8)
        gain = 1 - level[seen]
        observed = gain[:, None] * truth[np.ix_(seen, seen)] * gain + np.diag(level[seen] ** 2)
        cross = level[i] * (seen == i) - truth[i, seen] * gain
        expected[:, i] = x[:, seen] @ np.linalg.solve(observed, cross)
    np.testing.assert_allclose(gaussian.velocity(x, level, causal), expected, atol=1e-10)
    level_bf = jnp.broadcast_to(jnp.asarray(level, jnp.float32), (5, 8))
    traced = gaussian.oracle(causal)(jnp.asarray(x, jnp.float32), level_bf)
    np.testing.assert_allclose(traced, expected, atol=2e-4)


def test_the_causal_oracle_does_not_see_the_future():
    level = np.linspace(0.1, 0.9, 8)
    x = np.ones((1, 8))
    changed = x.copy()
    changed[:, 5:] = 3.0
    before, after = (gaussian.velocity(value, level, causal=True) for value in (x, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(gaussian.velocity(x, level, False) - gaussian.velocity(changed, level, False)).min() > 1e-3


@pytest.mark.parametrize(("lag", "published"), gaussian.CAUSAL.items())
def test_causal_divergence_by_lag(lag, published):
    assert_agrees(gaussian.divergence(gaussian.reference_map(256, lag, causal=True)), published)


@pytest.mark.parametrize(("lag", "published"), gaussian.BIDIRECTIONAL.items())
def test_bidirectional_divergence_by_lag(lag, published):
    found = gaussian.divergence(gaussian.reference_map(256, lag, causal=False))
    assert_agrees(found, published)
    assert found == pytest.approx(published, abs=5.1e-5)


@pytest.mark.parametrize(("steps", "published"), gaussian.SEQUENTIAL.items())
def test_sequential_divergence_by_steps(steps, published):
    found = gaussian.divergence(gaussian.reference_map(steps, steps, causal=True))
    assert found == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(("steps", "lag", "causal"), [(64, 64, True), (64, 16, True), (64, 0, False)])
def test_single_precision_is_enough(steps, lag, causal):
    """What the real sampler will do: the traced oracle and fp32 states."""
    grid = level_grid(steps).astype(np.float32)
    plan, oracle = staircase(8, steps, lag), gaussian.oracle(causal)
    x = jnp.eye(8, dtype=jnp.float32)
    for before, after in zip(plan.before, plan.after, strict=True):
        level = jnp.broadcast_to(jnp.asarray(grid[before]), (8, 8))
        x = x + jnp.asarray(grid[after] - grid[before])[None] * oracle(x, level)
    exact = gaussian.divergence(gaussian.reference_map(steps, lag, causal))
    assert gaussian.divergence(np.asarray(x).T) == pytest.approx(exact, rel=0.01, abs=2e-5)


def test_divergence_is_that_of_two_gaussians():
    truth = np.linalg.cholesky(gaussian.covariance())
    assert gaussian.divergence(truth) == pytest.approx(0, abs=1e-12)
    assert gaussian.divergence(2 * truth) == pytest.approx(0.5 * 8 * (4 - 1 - np.log(4)))
