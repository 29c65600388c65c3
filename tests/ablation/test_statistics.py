"""A known difference is found, none is not, and intervals cover as often as they say."""

import numpy as np
import pytest

from vidar.ablation.statistics import estimate, paired, sign_flip_test


def drawn(rng, effect, seeds, clips, of_seeds=0.3, of_clips=0.5, noise=1.0):
    """Differences with an effect of their own for each seed and each clip."""
    rows = of_seeds * rng.normal(size=(seeds, 1)) + of_clips * rng.normal(size=(1, clips))
    return effect + rows + noise * rng.normal(size=(seeds, clips))


def test_the_mean_over_seeds_has_students_interval():
    found = estimate([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    half = 4.302653 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)  # 97.5 % quantile with two degrees of freedom
    assert (found.low, found.high) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-6)
    assert estimate([2.0]) == type(found)(2.0, None, None, 1)


def test_the_sign_flip_test_is_exact():
    assert sign_flip_test(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    assert sign_flip_test(np.array([3.0, -1.0, 1.0])) == pytest.approx(6 / 8)  # all but ±(3, -1, -1) reach 3
    assert sign_flip_test(np.zeros(4)) == 1.0
    assert sign_flip_test(np.ones(20)) < 1e-3


def test_a_known_difference_is_found():
    found = paired(drawn(np.random.default_rng(0), -2.0, seeds=5, clips=32))
    assert found.shown
    assert found.mean == pytest.approx(-2.0, abs=0.4)
    assert found.high < -1.2
    assert found.seed_probability == pytest.approx(2 / 32)
    assert found.smallest_probability == pytest.approx(2 / 32)
    assert found.clip_probability < 1e-6
    assert found.clips_above <= 1
    assert (found.seeds, found.clips, len(found.seed_means)) == (5, 32, 5)


def test_no_difference_is_not_found():
    rng = np.random.default_rng(1)
    shown = [paired(drawn(rng, 0.0, seeds=5, clips=16)).shown for _ in range(100)]
    assert np.mean(shown) <= 0.08


def test_a_metric_at_its_limit_is_no_tie():
    same = paired(np.zeros((2, 8)))
    assert (same.equal, same.clips_equal, same.clips_above) == (True, 8, 0)
    opposite = paired(np.array([[1.0, 0.0], [-1.0, 0.0]]))
    assert (opposite.equal, opposite.clips_equal) == (False, 1)


def test_few_seeds_are_not_oversold():
    # The clips all agree, and still three trainings say little: the t interval over them decides.
    difference = np.array([[0.2], [1.0], [2.5]]) + 0.01 * np.random.default_rng(2).normal(size=(3, 64))
    found = paired(difference)
    assert found.low > 0
    assert not found.shown
    assert found.seed_probability == pytest.approx(0.25)
    assert found.clip_probability < 1e-10


def test_one_seed_has_no_interval():
    found = paired(np.ones((1, 8)))
    assert (found.low, found.high, found.shown, found.smallest_probability) == (None, None, False, 1.0)


def test_the_bootstrap_covers():
    rng = np.random.default_rng(3)
    covered = [
        found.low <= 0.7 <= found.high for found in (paired(drawn(rng, 0.7, seeds=8, clips=12)) for _ in range(60))
    ]
    assert np.mean(covered) >= 0.88


def test_clips_are_resampled_together():
    # A difference that is one clip's doing in every seed: only a joint draw of clips sees how unsure it is.
    difference = np.zeros((6, 5))
    difference[:, 0] = 5.0
    found = paired(difference)
    assert found.mean == pytest.approx(1.0)
    assert found.low == 0.0
    assert not found.shown
