"""How sure a finding is. Trainings with other seeds are the independent units; clips are the same for all of them.

Arrays in, numbers out; this module must not know where they come from.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from vidar.evaluation.metrics import sign_test

_RESAMPLES = 4000
_EXACT = 16


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval (Student's t).

    Attributes:
        mean: The mean.
        low: Lower end; None where there is one seed only, which says nothing of others.
        high: Upper end.
        seeds: Number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class Paired:
    """A difference between two arms with the same seeds and clips.

    Attributes:
        mean: Mean difference.
        low: Lower end of the 95 % interval; None with one seed.
        high: Upper end.
        seeds: Number of seeds.
        clips: Number of clips.
        seed_means: Mean difference of each seed.
        seed_probability: Exact two-sided sign-flip test over the seeds' means: of all seeds that might be drawn.
        smallest_probability: The smallest value that test can take with so many seeds.
        clip_probability: Exact two-sided sign test over clips, each averaged over seeds: of other clips, these
            trained networks given.
        clips_above: Clips whose difference is positive.
        clips_equal: Clips without any difference, in every seed.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    clips: int
    seed_means: tuple[float, ...]
    seed_probability: float
    smallest_probability: float
    clip_probability: float
    clips_above: int
    clips_equal: int

    @property
    def equal(self) -> bool:
        """Whether both arms have the same value everywhere, as where a metric is at its limit."""
        return self.clips_equal == self.clips

    @property
    def over_seeds(self) -> Estimate:
        """The mean with the interval of its seeds' means alone, which is honest with few seeds."""
        return estimate(self.seed_means)

    @property
    def shown(self) -> bool:
        """Whether both intervals lie on one side of zero."""
        return excludes_zero(self.low, self.high) and excludes_zero(self.over_seeds.low, self.over_seeds.high)


def excludes_zero(low: float | None, high: float | None) -> bool:
    """Whether an interval lies on one side of zero; one that is not known does not."""
    return low is not None and high is not None and (low > 0 or high < 0)


def estimate(values_s: Sequence[float]) -> Estimate:
    """A mean over seeds.

    Args:
        values_s: One number for each seed.

    Returns:
        Mean and interval. With few seeds it is wide, as it must be: 4.3 standard errors with three.
    """
    values = np.asarray(values_s, np.float64)
    count = len(values)
    if count < 2:
        return Estimate(float(values.mean()), None, None, count)
    half = float(stdtrit(count - 1, 0.975) * values.std(ddof=1) / np.sqrt(count))
    return Estimate(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half, count)


def paired(difference_sc: np.ndarray, seed: int = 0) -> Paired:
    """A paired difference over seeds and clips.

    The interval comes from a bootstrap that draws seeds and then clips, one draw of clips for all drawn seeds because
    they share them (the pigeonhole bootstrap of Owen, 2007): it counts both as random, and is rather too wide in clips
    than too narrow. With fewer than about five seeds it is still too narrow in seeds; the exact test beside it is not.

    Args:
        difference_sc: Difference of each seed and clip, `[s, c]`.
        seed: Seed of the resampling.

    Returns:
        Mean, interval and exact tests.
    """
    difference = np.asarray(difference_sc, np.float64)
    seeds, clips = difference.shape
    low, high = (None, None) if seeds == 1 else _bootstrap(difference, seed)
    of_seeds, of_clips = difference.mean(axis=1), difference.mean(axis=0)
    above, below = int((of_clips > 0).sum()), int((of_clips < 0).sum())
    return Paired(
        mean=float(difference.mean()),
        low=low,
        high=high,
        seeds=seeds,
        clips=clips,
        seed_means=tuple(of_seeds.tolist()),
        seed_probability=sign_flip_test(of_seeds),
        smallest_probability=min(1.0, 2.0 ** (1 - min(seeds, _EXACT))),
        clip_probability=sign_test(above, above + below),
        clips_above=above,
        clips_equal=int((difference == 0).all(axis=0).sum()),
    )


def _bootstrap(difference_sc: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the mean over drawn seeds and drawn clips."""
    rng = np.random.default_rng(seed)
    # How often each seed, and each clip, is drawn.
    of_seeds, of_clips = (rng.multinomial(n, np.full(n, 1 / n), _RESAMPLES) / n for n in difference_sc.shape)
    drawn = ((of_seeds @ difference_sc) * of_clips).sum(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def sign_flip_test(values: np.ndarray) -> float:
    """Two-sided permutation test that paired differences are symmetric around zero.

    Args:
        values: Independent differences, `[n]`.

    Returns:
        Share of all sign flips whose mean is at least as far from zero; exact up to 16 values, beyond which random
        flips are drawn.
    """
    values = np.asarray(values, np.float64)
    if len(values) <= _EXACT:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), (2**_EXACT, len(values)))
        signs[0] = 1.0
    # Equal sums in another order may differ in the last bit.
    least = abs(values.sum()) * (1 - 1e-12)
    return float((np.abs(signs @ values) >= least).mean())
