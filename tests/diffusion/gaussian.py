"""A video whose best denoiser is known: eight scalar frames of a stationary AR(1) Gaussian process.

The posterior mean of a Gaussian is linear in what was seen, so a deterministic sampler driven by it is one linear map
of its noise. That map, extracted by feeding basis vectors, gives the covariance of what the sampler draws and its exact
divergence from the truth: a test of plan, solver and visibility without any training. Used here with a loop over the
staircase in numpy, and elsewhere through the real sampler.
"""

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.scipy.linalg import solve_triangular

from vidar.diffusion.flow import level_grid
from vidar.diffusion.plan import staircase

FRAMES = 8
CORRELATION = 0.95

# Divergence of 256 Euler steps a frame by lag in steps (survey_systems.md, Fact 2), in nats.
CAUSAL = {0: 3.04, 8: 2.03, 16: 1.38, 32: 0.68, 64: 0.187, 128: 0.015, 256: 4e-4}
BIDIRECTIONAL = {0: 6e-4, 8: 6e-4, 16: 6e-4, 32: 6e-4, 64: 5e-4, 128: 4e-4, 256: 4e-4}
# Divergence of sequential causal sampling by the number of steps.
SEQUENTIAL = {4: 1.422, 8: 0.367, 16: 0.0964, 64: 0.00633}


def covariance(frames: int = FRAMES, correlation: float = CORRELATION) -> np.ndarray:
    """Covariance of the true video, `correlation ** |i - j|`, float64 `[frames, frames]`."""
    index = np.arange(frames)
    return correlation ** np.abs(index[:, None] - index)


def velocity(x, level, causal: bool):
    """The exact posterior-mean velocity `E[eps - x0 | noisy frames]` in numpy.

    Args:
        x: Noisy frames, `[..., f]`.
        level: Level of each frame in [0, 1], `[f]`.
        causal: Whether frame `i` sees the frames up to `i` alone, each at its own level, or all of them.

    Returns:
        The velocity of each frame, `[..., f]`.
    """
    truth = covariance(len(level))
    gain = 1 - level
    factor = np.linalg.cholesky(gain[:, None] * truth * gain + np.diag(level**2))
    # Cov(eps - x0, x) times the inverse factor: its lower triangle is what the past of each frame says about it.
    response = scipy.linalg.solve_triangular(factor, (np.diag(level) - truth * gain).T, lower=True).T
    seen = np.tril(response) if causal else response
    return scipy.linalg.solve_triangular(factor, x.T, lower=True).T @ seen.T


def oracle(causal: bool, frames: int = FRAMES):
    """The same denoiser for the real sampler.

    Args:
        causal: Whether frame `i` sees the frames up to `i` alone, or all of them.
        frames: Frames of the video.

    Returns:
        A function of `x_bf` and `level_bf` that returns `v_bf`, in the type of `x_bf`; traceable by jax.
    """
    truth_ff = covariance(frames)

    def predict(x_bf, level_bf):
        truth = jnp.asarray(truth_ff, x_bf.dtype)[None]
        gain = 1 - level_bf
        noise = jnp.eye(frames, dtype=x_bf.dtype)[None] * level_bf[:, None]
        factor = jnp.linalg.cholesky(gain[:, :, None] * truth * gain[:, None] + noise * level_bf[:, None])
        cross = jnp.swapaxes(noise - truth * gain[:, None], 1, 2)
        response = jnp.swapaxes(solve_triangular(factor, cross, lower=True), 1, 2)
        seen = jnp.tril(response) if causal else response
        return (seen @ solve_triangular(factor, x_bf[..., None], lower=True))[..., 0]

    return predict


def divergence(linear_map: np.ndarray) -> float:
    """KL divergence of the sampler's distribution from the truth, in nats.

    Args:
        linear_map: The sampler as a matrix `[frames, noises]`: column `j` is what it makes of the noise that is 1 at
            place `j` and 0 elsewhere.

    Returns:
        `KL(sampled ‖ true)` of the two zero-mean Gaussians.
    """
    linear_map = np.asarray(linear_map, np.float64)
    sampled, truth = linear_map @ linear_map.T, covariance(len(linear_map))
    ratio = np.linalg.solve(truth, sampled)
    return float(0.5 * (np.trace(ratio) - len(truth) - np.linalg.slogdet(ratio)[1]))


def reference_map(steps: int, lag: int, causal: bool, frames: int = FRAMES) -> np.ndarray:
    """The linear map of Euler steps along the staircase, in float64 `[frames, frames]`."""
    grid, plan = level_grid(steps), staircase(frames, steps, lag)
    x = np.eye(frames)  # a batch of basis vectors
    for before, after in zip(plan.before, plan.after, strict=True):
        x = x + (grid[after] - grid[before]) * velocity(x, grid[before], causal)
    return x.T
