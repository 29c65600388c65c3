"""Flow matching: conversions are exact and finite, and the schedules are those of the published recipes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidar import ConfigError
from vidar.diffusion import flow

CONVERSIONS = ("to_x0", "to_velocity", "to_eps")
LEVELS = np.array([[0.0, 1e-3, 0.3], [0.5, 0.98, 1.0]], np.float32)


@pytest.fixture
def frames():
    """Clean frames, noise and levels `[b=2, f=3]`, with levels 0 and 1 among them."""
    x0, eps = jax.random.normal(jax.random.key(0), (2, 2, 3, 2, 2, 4), jnp.float32)
    return x0, eps, jnp.asarray(LEVELS)


def test_interpolation_is_exact_at_both_ends(frames):
    x0, eps, level = frames
    x = flow.interpolate(x0, eps, level)
    np.testing.assert_array_equal(x[0, 0], x0[0, 0])
    np.testing.assert_array_equal(x[1, 2], eps[1, 2])
    np.testing.assert_allclose(x[1, 0], (x0 + eps)[1, 0] / 2, rtol=1e-6)


@pytest.mark.parametrize("kind", flow.KINDS)
def test_a_perfect_prediction_gives_back_what_it_was_made_of(frames, kind):
    x0, eps, level = frames
    x = flow.interpolate(x0, eps, level)
    prediction = flow.target(kind, x0, eps)
    # A prediction of x0 does not say what noise a clean frame could have had, nor one of eps what pure noise hides.
    open_at = {"v": None, "x0": (0, 0), "eps": (1, 2)}[kind]
    for convert, expected in ((flow.to_x0, x0), (flow.to_velocity, eps - x0), (flow.to_eps, eps)):
        result = np.array(convert(kind, prediction, x, level))
        known = np.ones(level.shape, bool)
        if open_at and flow.target(kind, x0, eps) is not expected:
            known[open_at] = False
        np.testing.assert_allclose(result[known], np.asarray(expected)[known], atol=5e-4, err_msg=convert.__name__)


@pytest.mark.parametrize("kind", flow.KINDS)
def test_conversions_of_any_prediction_agree_with_each_other_at_every_level(frames, kind):
    x0, eps, level = frames
    x = flow.interpolate(x0, eps, level)
    prediction = jax.random.normal(jax.random.key(1), x.shape, jnp.float32)
    as_x0, as_v, as_eps = (f(kind, prediction, x, level) for f in (flow.to_x0, flow.to_velocity, flow.to_eps))
    np.testing.assert_allclose(as_v, as_eps - as_x0, rtol=1e-4, atol=1e-4)
    inside = (LEVELS > 0) & (LEVELS < 1)
    rebuilt = flow.interpolate(as_x0, as_eps, level)
    np.testing.assert_allclose(np.asarray(rebuilt)[inside], np.asarray(x)[inside], rtol=1e-3, atol=1e-4)


def test_conversions_at_the_ends_have_their_documented_values(frames):
    x0, eps, _ = frames
    zero, one = jnp.zeros((2, 3)), jnp.ones((2, 3))
    np.testing.assert_array_equal(flow.to_x0("v", eps, x0, zero), x0)
    np.testing.assert_array_equal(flow.to_x0("eps", eps, x0, zero), x0)
    np.testing.assert_array_equal(flow.to_x0("eps", eps, x0, one), 0 * x0)
    np.testing.assert_array_equal(flow.to_velocity("x0", eps, x0, zero), 0 * x0)
    np.testing.assert_array_equal(flow.to_velocity("x0", eps, x0, one), x0 - eps)
    np.testing.assert_array_equal(flow.to_velocity("eps", eps, x0, one), eps)
    np.testing.assert_array_equal(flow.to_eps("x0", eps, x0, zero), eps)
    np.testing.assert_array_equal(flow.to_eps("v", eps, x0, one), x0)


@pytest.mark.parametrize(("kind", "convert"), list(itertools.product(flow.KINDS, CONVERSIONS)))
def test_gradients_are_finite_at_both_ends(frames, kind, convert):
    x0, eps, level = frames
    x = flow.interpolate(x0, eps, level)

    def total(prediction, x, level):
        return jnp.sum(getattr(flow, convert)(kind, prediction, x, level))

    for gradient in jax.grad(total, argnums=(0, 1, 2))(eps, x, level):
        assert np.isfinite(gradient).all()


def test_low_precision_predictions_are_converted_in_the_type_of_the_levels(frames):
    x0, eps, level = frames
    result = flow.to_x0("v", (eps - x0).astype(jnp.bfloat16), flow.interpolate(x0, eps, level), level)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, x0, atol=0.02)


def test_unknown_parametrisations_are_refused(frames):
    x0, eps, level = frames
    with pytest.raises(ConfigError, match="one of v, x0, eps"):
        flow.target("velocity", x0, eps)
    for convert in CONVERSIONS:
        with pytest.raises(ConfigError, match="'velocity'"):
            getattr(flow, convert)("velocity", x0, eps, level)


def test_time_shift_has_its_fixed_points_and_its_inverse():
    level = np.linspace(0, 1, 101)
    for shift in (0.3, 1.0, 5.0, 8.0):
        shifted = flow.time_shift(level, shift)
        assert shifted[0] == 0
        assert shifted[-1] == 1
        assert (np.diff(shifted) > 0).all()
        np.testing.assert_allclose(flow.inverse_time_shift(shifted, shift), level, atol=1e-12)
    np.testing.assert_array_equal(flow.time_shift(level, 1.0), level)
    assert flow.time_shift(0.5, 3.0) == 0.75


def test_grids_descend_from_noise_to_clean():
    np.testing.assert_allclose(flow.level_grid(4), [1, 0.75, 0.5, 0.25, 0])
    grid = flow.level_grid(48, 5.0)
    assert grid.shape == (49,)
    assert (grid[0], grid[-1]) == (1, 0)
    # The levels of the 48-step teacher that the few-step student of shift 5 was initialised from.
    np.testing.assert_allclose(grid[[0, 12, 24, 36]], [1, 0.9375, 5 / 6, 0.625], rtol=1e-12)


def test_few_step_levels_are_the_published_constants():
    np.testing.assert_allclose(flow.few_step_levels(), [1, 0.9375, 0.83333, 0.625, 0], atol=5e-6)
    np.testing.assert_allclose(flow.few_step_levels(shift=8.0), [1, 0.96, 0.88889, 0.72727, 0], atol=5e-6)
    np.testing.assert_allclose(flow.few_step_levels((1000, 500), 1.0), [1, 0.5, 0])


@pytest.mark.parametrize("times", [(), (500, 750), (1001,), (1000, 0), (1000, 1000)])
def test_few_step_times_must_descend(times):
    with pytest.raises(ConfigError, match="descend within"):
        flow.few_step_levels(times)


def test_grids_of_no_steps_or_no_shift_are_refused():
    with pytest.raises(ConfigError, match="steps=0"):
        flow.level_grid(0)
    for build in (lambda: flow.level_grid(4, 0.0), lambda: flow.few_step_levels(shift=-1.0)):
        with pytest.raises(ConfigError, match="shift"):
            build()


def test_bump_weight_has_mean_one_over_its_grid_and_the_published_peak():
    grid = flow.level_grid(1000, 5.0)[:-1]
    weight = flow.bump_weight(jnp.asarray(grid, jnp.float32))
    assert np.mean(weight) == pytest.approx(1, abs=1e-5)
    assert flow.bump_weight(jnp.float32(1.0)) == pytest.approx(0, abs=1e-6)
    assert flow.bump_weight(jnp.float32(0.5)) == pytest.approx(2.08, abs=5e-3)
    assert np.argmax(weight) == np.argmin(np.abs(grid - 0.5))
    assert np.min(weight) >= -1e-6


def test_random_levels_are_shifted_clamped_and_not_snapped():
    level = np.asarray(flow.random_level(jax.random.key(0), (200_000,), 5.0, 0.02, 0.98), np.float64)
    assert np.mean(level == np.float32(0.98)) == pytest.approx(0.0926, abs=3e-3)
    assert np.mean(level == np.float32(0.02)) == pytest.approx(0.0041, abs=1e-3)
    inside = level[(level > 0.02) & (level < 0.98)]
    unshifted = flow.inverse_time_shift(inside, 5.0)
    assert np.median(unshifted) == pytest.approx((0.0041 + 0.9074) / 2, abs=5e-3)
    assert np.abs(unshifted * 1000 - np.round(unshifted * 1000)).mean() == pytest.approx(0.25, abs=0.01)
