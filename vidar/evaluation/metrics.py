"""Metrics of videos as plain arrays, and the statistics that say how sure a mean is.

Videos are uint8 `[..., h, w, 3]` with any leading dimensions; each metric of an image returns one number for each. This
module runs on the host in numpy and must know neither models nor data sets nor files.
"""

import math
import statistics
from collections.abc import Callable

import numpy as np

# Weights of red, green and blue in perceived lightness (ITU-R BT.709).
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
_BEST_PSNR = 100.0
_PIXELS_AT_ONCE = 1 << 16


def psnr(video: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each frame.

    Args:
        video: uint8 `[..., h, w, 3]`.
        truth: uint8, the same shape.

    Returns:
        Decibels, float64 `[...]`; 100 for frames that are equal.
    """
    difference = video.astype(np.float64) - truth.astype(np.float64)
    error = np.mean((difference / 255) ** 2, axis=(-3, -2, -1))
    return -10 * np.log10(np.maximum(error, 10 ** (-_BEST_PSNR / 10)))


def luminance(video: np.ndarray) -> np.ndarray:
    """Mean lightness of each frame, in [0, 1].

    Args:
        video: uint8 `[..., h, w, 3]`.

    Returns:
        float64 `[...]`.
    """
    return _luma(video).mean(axis=(-2, -1), dtype=np.float64)


def saturation(video: np.ndarray) -> np.ndarray:
    """Mean HSV saturation of each frame, in [0, 1]: `(max - min) / max` over the colours of a pixel, 0 for black.

    Args:
        video: uint8 `[..., h, w, 3]`.

    Returns:
        float64 `[...]`.
    """
    largest = video.max(axis=-1).astype(np.float64)
    return ((largest - video.min(axis=-1)) / np.maximum(largest, 1)).mean(axis=(-2, -1))


def sharpness(video: np.ndarray) -> np.ndarray:
    """Variance of the Laplacian of each frame's lightness, where 1 is white; blur lowers it, noise raises it.

    Args:
        video: uint8 `[..., h, w, 3]`, at least 3 by 3 pixels.

    Returns:
        float64 `[...]`.
    """
    luma = _luma(video).astype(np.float64)
    around = luma[..., :-2, 1:-1] + luma[..., 2:, 1:-1] + luma[..., 1:-1, :-2] + luma[..., 1:-1, 2:]
    return (around - 4 * luma[..., 1:-1, 1:-1]).var(axis=(-2, -1))


def distance_to_first(video: np.ndarray) -> np.ndarray:
    """Root mean squared difference of each frame from the first of its video, where 1 is black against white.

    Args:
        video: uint8 `[..., f, h, w, 3]`.

    Returns:
        float64 `[..., f]`; 0 at the first frame.
    """
    difference = video.astype(np.float64) - video[..., :1, :, :, :].astype(np.float64)
    return np.sqrt(np.mean((difference / 255) ** 2, axis=(-3, -2, -1)))


def horizontal_flow(before: np.ndarray, after: np.ndarray, reach: int = 8, window: int = 9) -> np.ndarray:
    """Mean horizontal motion between two frames, by dense block matching.

    Each pixel's neighbourhood is looked for in the second frame, to the fraction of a pixel; the mean over pixels is
    weighted by how much horizontal detail a neighbourhood has and by how much better its best match is than a typical
    one, so that plain walls and content that left the frame do not vote.

    Args:
        before: uint8 `[..., h, w, 3]`.
        after: uint8, the same shape.
        reach: Largest motion looked for, in pixels to either side, and a quarter of it up and down.
        window: Side of the neighbourhood in pixels, odd.

    Returns:
        Pixels, float64 `[...]`, positive when the content moves right (as it does when a viewer turns left); 0 where
        nothing in the frame can be followed.
    """
    first, second = _luma(before), _luma(after)
    height, width = first.shape[-2:]
    shape, first, second = first.shape[:-2], first.reshape(-1, height, width), second.reshape(-1, height, width)
    # In parts, because the costs of all motions are held at once.
    size = max(1, _PIXELS_AT_ONCE // (height * width))
    parts = [slice(start, start + size) for start in range(0, len(first), size)]
    return np.concatenate([_pair_flow(first[part], second[part], reach, window) for part in parts]).reshape(shape)


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda sample: sample.mean(axis=0),
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of a statistic over independent samples.

    Args:
        values: Samples along the first dimension, `[n, ...]`.
        statistic: Maps resampled values `[n, ...]` to the quantity of interest; the mean by default.
        confidence: Probability that the interval covers the truth, in (0, 1).
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end, each of the shape of the statistic.
    """
    values = np.asarray(values)
    rng = np.random.default_rng(seed)
    drawn = np.stack([statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)])
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def share_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of independent trials by Wilson's score, which has a width at 0 and 1, too.

    Args:
        share: The share, in [0, 1].
        count: Number of trials, ≥ 1.

    Returns:
        Lower and upper end.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    centre, weight = share + z**2 / (2 * count), 1 + z**2 / count
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, (centre - half) / weight), min(1.0, (centre + half) / weight)


SEEDS = 2**13
"""Seeds of evaluations are below."""


def first_of(seed: int) -> int:
    """Where clips and noise of an evaluation's seed begin to count: far from those of the seeds beside it."""
    return seed << 16


def sign_test(wins: int, trials: int) -> float:
    """Exact two-sided sign test.

    Args:
        wins: Trials with the expected sign, in `0 … trials`; ties are left out of both.
        trials: Number of trials.

    Returns:
        Probability of a split at least as uneven under a fair coin.
    """
    uneven = min(wins, trials - wins)
    tail = sum(math.comb(trials, k) for k in range(uneven + 1)) / 2**trials
    return min(1.0, 2 * tail)


def _pair_flow(first: np.ndarray, second: np.ndarray, reach: int, window: int) -> np.ndarray:
    """Weighted mean horizontal motion between images of lightness `[n, h, w]`."""
    horizontal, vertical = range(-reach, reach + 1), range(-(reach // 4), reach // 4 + 1)
    # The best vertical offset for each horizontal one: only horizontal motion is asked for.
    cost = np.stack([np.min([_mismatch(first, second, dy, dx, window) for dy in vertical], 0) for dx in horizontal])
    best = np.argmin(cost, axis=0)
    offset = best - reach + _vertex(cost, best)
    lowest, typical = np.take_along_axis(cost, best[None], 0)[0], np.median(_finite(cost), axis=0)
    confidence = np.maximum(1 - lowest / np.maximum(typical, 1e-9), 0) ** 2
    slope = np.zeros_like(first)
    slope[..., 1:-1] = (first[..., 2:] - first[..., :-2]) / 2
    weight = confidence * _box(slope**2, window)
    total = weight.sum(axis=(-2, -1))
    # Detail below a millionth of the contrast is rounding.
    return np.where(total > 1e-6, (weight * offset).sum(axis=(-2, -1)) / np.maximum(total, 1e-6), 0.0)


def _luma(video: np.ndarray) -> np.ndarray:
    return (video.astype(np.float32) / 255) @ _LUMA


def _mismatch(first: np.ndarray, second: np.ndarray, dy: int, dx: int, window: int) -> np.ndarray:
    """Mean squared difference of neighbourhoods when the second image is moved back; infinite outside of it."""
    height, width = first.shape[-2:]
    rows, columns = slice(max(0, -dy), height - max(0, dy)), slice(max(0, -dx), width - max(0, dx))
    moved_rows, moved_columns = slice(max(0, dy), height + min(0, dy)), slice(max(0, dx), width + min(0, dx))
    squared, inside = np.zeros_like(first), np.zeros((1, height, width), np.float32)
    squared[:, rows, columns] = (first[:, rows, columns] - second[:, moved_rows, moved_columns]) ** 2
    inside[:, rows, columns] = 1
    # A neighbourhood of which half has left the image may match anything.
    seen = _box(inside, window) / _box(np.ones_like(inside), window)
    return np.where(seen > 0.5, _box(squared, window) / np.maximum(seen, 0.5), np.inf)


def _box(image: np.ndarray, window: int) -> np.ndarray:
    """Mean over a square neighbourhood, with zeros around the image."""
    for axis in (-2, -1):
        padding = [(0, 0)] * image.ndim
        padding[axis] = (window // 2 + 1, window // 2)
        sums = np.cumsum(np.pad(image, padding), axis=axis, dtype=np.float64)
        size = image.shape[axis]
        image = np.take(sums, np.arange(window, window + size), axis) - np.take(sums, np.arange(size), axis)
    return image / window**2


def _vertex(cost: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Where between two candidates the parabola through the best one and its neighbours is lowest, in [-1/2, 1/2]."""
    left, centre, right = (
        np.take_along_axis(cost, np.clip(best + step, 0, len(cost) - 1)[None], 0)[0] for step in (-1, 0, 1)
    )
    inner = (best > 0) & (best < len(cost) - 1) & np.isfinite(left) & np.isfinite(right)
    left, right = np.where(inner, left, centre), np.where(inner, right, centre)
    return np.clip((left - right) / np.maximum(2 * (left - 2 * centre + right), 1e-12), -0.5, 0.5)


def _finite(cost: np.ndarray) -> np.ndarray:
    """Infinite costs replaced by the largest finite one of their pixel."""
    return np.where(np.isfinite(cost), cost, np.max(np.where(np.isfinite(cost), cost, 0.0), axis=0))
