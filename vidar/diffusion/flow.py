"""Flow matching in numbers: interpolation, conversions between predictions, time shift, grids, loss weight.

A level is the amount of noise in a frame, 0 clean and 1 pure noise: `x = (1 - level) * x0 + level * eps`, with velocity
`v = eps - x0`. All conversions between what a network may predict happen here and nowhere else. This module must know
neither networks nor samplers nor where a level came from.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vidar.errors import ConfigError

Kind = Literal["v", "x0", "eps"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Level = TypeVar("Level", float, np.ndarray, jax.Array)


def per_frame(level: Float[Array, "b f"], x: Float[Array, "b f ..."]) -> Float[Array, "b f ..."]:
    """Gives levels as many dimensions as the frames that they belong to, so that the two broadcast.

    Args:
        level: One number a frame.
        x: Frames, for the number of dimensions only.

    Returns:
        `level` with a dimension of size one for each dimension of `x` after the second.
    """
    return level.reshape(level.shape + (1,) * (x.ndim - level.ndim))


def interpolate(
    x0: Float[Array, "b f ..."], eps: Float[Array, "b f ..."], level: Float[Array, "b f"]
) -> Float[Array, "b f ..."]:
    """Noises clean frames: `(1 - level) * x0 + level * eps`.

    Args:
        x0: Clean frames.
        eps: Standard normal noise.
        level: Level of each frame, in [0, 1].

    Returns:
        Frames at `level`, in the type of `level`; exactly `x0` at level 0 and exactly `eps` at level 1.
    """
    level, x0, eps = _aligned(level, x0, eps)
    return (1 - level) * x0 + level * eps


def target(kind: str, x0: Float[Array, "b f ..."], eps: Float[Array, "b f ..."]) -> Float[Array, "b f ..."]:
    """What a network of the given parametrisation should predict.

    Args:
        kind: Parametrisation of the prediction, one of `KINDS`.
        x0: Clean frames.
        eps: The noise that was added to them.

    Returns:
        `eps - x0`, `x0` or `eps`.

    Raises:
        ConfigError: Unknown `kind`.
    """
    match kind:
        case "v":
            return eps - x0
        case "x0":
            return x0
        case "eps":
            return eps
    raise _unknown(kind)


def to_x0(
    kind: str, prediction: Float[Array, "b f ..."], x: Float[Array, "b f ..."], level: Float[Array, "b f"]
) -> Float[Array, "b f ..."]:
    """Converts a prediction to clean frames.

    At level 1 a noise prediction says nothing about `x0`: the result there is 0, the mean of normalised latents.

    Args:
        kind: Parametrisation of the prediction, one of `KINDS`.
        prediction: What the network returned.
        x: The frames that it was given.
        level: Their levels, in [0, 1].

    Returns:
        The predicted clean frames, in the type of `level`.

    Raises:
        ConfigError: Unknown `kind`.
    """
    level, prediction, x = _aligned(level, prediction, x)
    match kind:
        case "v":
            return x - level * prediction
        case "x0":
            return prediction
        case "eps":
            return _divide(x - level * prediction, 1 - level, jnp.zeros_like(x))
    raise _unknown(kind)


def to_velocity(
    kind: str, prediction: Float[Array, "b f ..."], x: Float[Array, "b f ..."], level: Float[Array, "b f"]
) -> Float[Array, "b f ..."]:
    """Converts a prediction to the velocity `eps - x0`.

    Where the prediction leaves the velocity open it agrees with `to_eps` and `to_x0`: 0 for `x0` at level 0 (a clean
    frame does not move), the prediction itself for `eps` at level 1.

    Args:
        kind: Parametrisation of the prediction, one of `KINDS`.
        prediction: What the network returned.
        x: The frames that it was given.
        level: Their levels, in [0, 1].

    Returns:
        The predicted velocity, in the type of `level`.

    Raises:
        ConfigError: Unknown `kind`.
    """
    level, prediction, x = _aligned(level, prediction, x)
    match kind:
        case "v":
            return prediction
        case "x0":
            return _divide(x - prediction, level, jnp.zeros_like(x))
        case "eps":
            return _divide(prediction - x, 1 - level, prediction)
    raise _unknown(kind)


def to_eps(
    kind: str, prediction: Float[Array, "b f ..."], x: Float[Array, "b f ..."], level: Float[Array, "b f"]
) -> Float[Array, "b f ..."]:
    """Converts a prediction to the noise in the frames.

    At level 0 a prediction of `x0` says nothing about the noise: the result there is the prediction itself, so that
    the velocity is 0.

    Args:
        kind: Parametrisation of the prediction, one of `KINDS`.
        prediction: What the network returned.
        x: The frames that it was given.
        level: Their levels, in [0, 1].

    Returns:
        The predicted noise, in the type of `level`.

    Raises:
        ConfigError: Unknown `kind`.
    """
    level, prediction, x = _aligned(level, prediction, x)
    match kind:
        case "v":
            return x + (1 - level) * prediction
        case "x0":
            return _divide(x - (1 - level) * prediction, level, prediction)
        case "eps":
            return prediction
    raise _unknown(kind)


def time_shift(level: Level, shift: float) -> Level:
    """Moves levels towards noise: `shift * level / (1 + (shift - 1) * level)`.

    Args:
        level: Levels in [0, 1]; 0 and 1 stay where they are.
        shift: Positive; 1 changes nothing, 5 and 8 are usual for video.

    Returns:
        The shifted levels (Stable Diffusion 3, arXiv 2403.03206, eq. 23).
    """
    # Written so that 1 stays exactly 1: a frame of pure noise is recognised by it.
    return shift * level / (shift * level + (1 - level))


def inverse_time_shift(level: Level, shift: float) -> Level:
    """Undoes `time_shift`.

    Args:
        level: Shifted levels in [0, 1].
        shift: The shift that they were given, positive.

    Returns:
        The levels before the shift.
    """
    return time_shift(level, 1 / shift)


def level_grid(steps: int, shift: float = 1.0) -> np.ndarray:
    """Levels that a sampler visits: evenly spaced from noise to clean, then shifted.

    Args:
        steps: Number of solver steps, at least 1.
        shift: Time shift, positive.

    Returns:
        float64 `[steps + 1]`, descending from exactly 1 to exactly 0.

    Raises:
        ConfigError: `steps` below 1 or `shift` not positive.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps}: a sampler needs at least 1")
    if not shift > 0:
        raise ConfigError(f"shift={shift}: a time shift is positive (1 changes nothing)")
    return time_shift(np.linspace(1.0, 0.0, steps + 1), shift)


def few_step_levels(times: Sequence[float | int] = (1000, 750, 500, 250), shift: float = 5.0) -> np.ndarray:
    """Levels of a distilled few-step sampler, from the list of unshifted times that its recipe gives.

    Args:
        times: Descending times in (0, 1000]; a final 0 is not listed.
        shift: Time shift of the generator, positive.

    Returns:
        float64 `[len(times) + 1]`, ending in 0: `[1, .9375, .83333, .625, 0]` for the default list at shift 5
        (Self Forcing, arXiv 2506.08009, "warped" denoising steps).

    Raises:
        ConfigError: `times` is empty, not descending or outside (0, 1000], or `shift` is not positive.
    """
    descending = all(before > after for before, after in itertools.pairwise((*times, 0)))
    if not times or not descending or times[0] > 1000:
        raise ConfigError(
            f"times={tuple(times)}: few-step times descend within (0, 1000], such as (1000, 750, 500, 250)"
        )
    if not shift > 0:
        raise ConfigError(f"shift={shift}: a time shift is positive (1 changes nothing)")
    return time_shift(np.append(np.asarray(times, np.float64), 0.0) / 1000, shift)


def bump_weight(level: Float[Array, "*shape"], shift: float = 5.0) -> Float[Array, "*shape"]:
    """Loss weight of the diffusion baselines: a bump around level 1/2.

    `exp(-2 * (level - 1/2)**2)` minus its smallest value on the shifted grid of 1000 levels, scaled to mean one over
    that grid. It is taken at the exact level, not at the nearest level of the grid.

    Args:
        level: Levels in [0, 1].
        shift: Time shift of the grid, positive.

    Returns:
        Weights: 0 at level 1, and for shift 5 about 2.08 at level 1/2 (Self Forcing, `CausalDiffusion`).
    """
    smallest, mean = _bump_constants(shift)
    return (jnp.exp(-2 * (level - 0.5) ** 2) - smallest) / mean


def random_level(
    key: PRNGKeyArray, shape: tuple[int, ...], shift: float = 1.0, low: float = 0.0, high: float = 1.0
) -> Float[Array, "..."]:
    """Draws levels uniformly, shifts them and clamps them; none is snapped to a grid.

    Args:
        key: Random key.
        shape: Shape of the result.
        shift: Time shift, positive.
        low: Smallest level returned, in [0, 1].
        high: Largest level returned, in [0, 1] (Self Forcing clamps its critics' levels to [.02, .98]).

    Returns:
        float32 levels.
    """
    return jnp.clip(time_shift(jax.random.uniform(key, shape, jnp.float32), shift), low, high)


def _aligned(level: jax.Array, *frames: jax.Array) -> tuple[jax.Array, ...]:
    """Casts frames to the type of the levels, so that bf16 predictions are converted in fp32, and aligns the levels."""
    return per_frame(level, frames[0]), *(x.astype(level.dtype) for x in frames)


def _divide(numerator: jax.Array, denominator: jax.Array, at_zero: jax.Array) -> jax.Array:
    """Divides, and returns `at_zero` where the denominator is 0; gradients stay finite there."""
    zero = denominator == 0
    return jnp.where(zero, at_zero, numerator / jnp.where(zero, jnp.ones_like(denominator), denominator))


@functools.cache
def _bump_constants(shift: float) -> tuple[float, float]:
    """Smallest value of the bump on the shifted grid, and the mean of what is above it."""
    bump = np.exp(-2 * (level_grid(1000, shift)[:-1] - 0.5) ** 2)
    return float(bump.min()), float(math.fsum(bump - bump.min()) / len(bump))


def _unknown(kind: str) -> ConfigError:
    return ConfigError(f"prediction={kind!r}: unknown parametrisation; one of {', '.join(KINDS)}")
