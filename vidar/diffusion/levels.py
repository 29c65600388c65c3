"""Training levels: how noisy each chunk of a training clip is, which chunks are clean context, which carry loss.

A `LevelsConfig` is three choices: a *base* that couples the chunks of a clip, the *marginal* that each level follows,
and *context* modifiers that turn chunks into clean or nearly clean context. Bases draw quantiles and the marginal maps
them to levels, so that every base goes with every marginal. This module must know neither networks nor losses.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vidar.diffusion.flow import time_shift
from vidar.errors import ConfigError


class Levels(NamedTuple):
    """Levels of a batch of clips (or, without the first dimension, of one clip).

    Attributes:
        level_bu: Level of each chunk, float32 in [0, 1].
        clean_bu: Whether the chunk is context, boolean; its level is 0, or small under `HistoryNoise`.
        loss_bu: Whether the chunk carries loss, boolean.
    """

    level_bu: jax.Array
    clean_bu: jax.Array
    loss_bu: jax.Array


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name}={value}: must be positive")


# ---- marginals: the law of one level, as its quantile function ------------------------------------------------------


@dataclass(frozen=True)
class Uniform:
    """Levels uniform on [0, 1], then shifted.

    Attributes:
        shift: Time shift, positive.
    """

    kind: ClassVar[str] = "uniform"
    shift: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("shift", self.shift)

    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Maps probabilities in [0, 1] to levels, monotonically."""
        return time_shift(u, self.shift)


@dataclass(frozen=True)
class ShiftedLogitNormal:
    """Levels whose logit is normal, then shifted (Stable Diffusion 3, arXiv 2403.03206; MAGI-1: std .5, shift 3).

    Attributes:
        mean: Mean of the logit.
        std: Standard deviation of the logit, positive.
        shift: Time shift, positive.
    """

    kind: ClassVar[str] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("std", self.std)
        _require_positive("shift", self.shift)

    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Maps probabilities in [0, 1] to levels, monotonically."""
        return time_shift(jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u)), self.shift)


Marginal = Uniform | ShiftedLogitNormal


# ---- bases: how the chunks of one clip depend on each other ---------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """One level for the whole clip (bidirectional diffusion)."""

    kind: ClassVar[str] = "shared"

    def draw(self, key: PRNGKeyArray, chunks: int, marginal: Marginal) -> Float[Array, " u"]:
        """Draws the levels of one clip."""
        return marginal.quantile(jnp.broadcast_to(jax.random.uniform(key, (), jnp.float32), (chunks,)))


@dataclass(frozen=True)
class Independent:
    """A level of its own for each chunk (Diffusion Forcing, arXiv 2407.01392)."""

    kind: ClassVar[str] = "independent"

    def draw(self, key: PRNGKeyArray, chunks: int, marginal: Marginal) -> Float[Array, " u"]:
        """Draws the levels of one clip."""
        return marginal.quantile(jax.random.uniform(key, (chunks,), jnp.float32))


@dataclass(frozen=True)
class Grid:
    """For each chunk, independently, one of the levels of a few-step sampler (CausVid, arXiv 2412.07772).

    Attributes:
        levels: The levels to choose from, each in [0, 1], equally likely; see `flow.few_step_levels`.
    """

    kind: ClassVar[str] = "grid"
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.levels or not all(0 <= level <= 1 for level in self.levels):
            raise ConfigError(f"levels={self.levels}: a grid is one or more levels in [0, 1]")

    def draw(self, key: PRNGKeyArray, chunks: int, marginal: Marginal) -> Float[Array, " u"]:
        """Draws the levels of one clip; the grid is its own marginal."""
        del marginal
        return jax.random.choice(key, jnp.asarray(self.levels, jnp.float32), (chunks,))


@dataclass(frozen=True)
class FoPP:
    """Levels that never decrease from chunk to chunk (frame-oriented probability propagation, AR-Diffusion).

    An anchor chunk and its level are uniform; the other chunks are uniform over all non-decreasing completions. So each
    level keeps at least `1 / chunks` of its mass at every chunk, where drawing uniformly over all non-decreasing
    vectors would starve the first chunks of noise (AR-Diffusion, arXiv 2503.07418, section 3.3).

    Attributes:
        steps: Number of discrete levels `1/steps, 2/steps, …, 1` before the marginal; None for the continuous limit.
    """

    kind: ClassVar[str] = "fopp"
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps={self.steps}: FoPP needs at least one level, or None for continuous levels")

    def draw(self, key: PRNGKeyArray, chunks: int, marginal: Marginal) -> Float[Array, " u"]:
        """Draws the levels of one clip."""
        if self.steps is None:
            return marginal.quantile(_fopp_continuous(key, chunks))
        return marginal.quantile((fopp_discrete(key, chunks, self.steps) + 1).astype(jnp.float32) / self.steps)


Base = Shared | Independent | Grid | FoPP


# ---- context: which chunks are history ------------------------------------------------------------------------------


@dataclass(frozen=True)
class StochasticCleanContext:
    """Makes each chunk clean, and free of loss, with a probability of its own (FAR, arXiv 2503.19325).

    Attributes:
        probability: Probability that a chunk is clean, in [0, 1).
    """

    kind: ClassVar[str] = "stochastic_clean"
    probability: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1:
            raise ConfigError(f"probability={self.probability}: that of a clean chunk is in [0, 1)")

    def apply(self, key: PRNGKeyArray, levels: Levels) -> Levels:
        """Modifies the levels of one clip."""
        return _make_clean(levels, jax.random.bernoulli(key, self.probability, levels.level_bu.shape))


@dataclass(frozen=True)
class CleanPrefix:
    """Makes the first chunks clean, and free of loss: image-to-video and continuation (MAGI-1, LanDiff, FAR-Long).

    Attributes:
        probabilities: `probabilities[n]` is the probability that the first `n` chunks are clean; they sum to 1.
    """

    kind: ClassVar[str] = "clean_prefix"
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(p < 0 for p in self.probabilities) or not math.isclose(sum(self.probabilities), 1.0, abs_tol=1e-6):
            raise ConfigError(f"probabilities={self.probabilities}: those of a clean prefix are ≥ 0 and sum to 1")

    def apply(self, key: PRNGKeyArray, levels: Levels) -> Levels:
        """Modifies the levels of one clip."""
        chunks = levels.level_bu.shape[-1]
        if len(self.probabilities) > chunks:
            raise ConfigError(
                f"a clean prefix of up to {len(self.probabilities) - 1} chunks leaves none to learn in a clip of "
                f"{chunks}: give at most {chunks} probabilities"
            )
        length = jax.random.choice(key, len(self.probabilities), p=jnp.asarray(self.probabilities, jnp.float32))
        return _make_clean(levels, jnp.arange(chunks) < length)


@dataclass(frozen=True)
class HistoryNoise:
    """Noises each clean chunk a little, so that the model learns to mistrust its context (MAGI-1: up to .05).

    It acts on the chunks that are clean when its turn comes: list it after the modifiers that make them so. A chunk
    stays flagged as clean, without loss.

    Attributes:
        maximum: The level of a clean chunk is uniform on [0, maximum), with maximum in [0, 1].
    """

    kind: ClassVar[str] = "history_noise"
    maximum: float

    def __post_init__(self) -> None:
        if not 0 <= self.maximum <= 1:
            raise ConfigError(f"maximum={self.maximum}: the largest level of noised history is in [0, 1]")

    def apply(self, key: PRNGKeyArray, levels: Levels) -> Levels:
        """Modifies the levels of one clip."""
        noise = jax.random.uniform(key, levels.level_bu.shape, jnp.float32, 0.0, self.maximum)
        return levels._replace(level_bu=jnp.where(levels.clean_bu, noise, levels.level_bu))


Context = StochasticCleanContext | CleanPrefix | HistoryNoise


# ---- all together ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LevelsConfig:
    """The training levels of a system.

    Attributes:
        base: How the chunks of a clip depend on each other.
        marginal: The law of each level; not for `Grid`, which has its own.
        context: Modifiers, applied in this order.
    """

    base: Base = Independent()
    marginal: Marginal = Uniform()
    context: tuple[Context, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.base, Grid) and self.marginal != Uniform():
            raise ConfigError("a grid of levels has no other marginal: leave `marginal` out")

    @property
    def one_for_all(self) -> bool:
        """Whether all frames of a clip are always at one level, so that none is ever clean beside noisy ones."""
        return isinstance(self.base, Shared) and not self.context

    def sample(self, key: PRNGKeyArray, b: int, u: int) -> Levels:
        """Draws the levels of a batch; the draw of a clip depends on `key` and its row alone, not on `b` or sharding.

        Args:
            key: Random key of this step.
            b: Number of clips.
            u: Chunks per clip.

        Returns:
            Levels, clean flags and loss flags, each `[b, u]`.

        Raises:
            ConfigError: A clean prefix as long as the clip.
        """
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(b))
        return jax.vmap(partial(self._sample_clip, chunks=u))(keys)

    def _sample_clip(self, key: PRNGKeyArray, chunks: int) -> Levels:
        level = self.base.draw(jax.random.fold_in(key, 0), chunks, self.marginal)
        levels = Levels(level, jnp.zeros((chunks,), jnp.bool_), jnp.ones((chunks,), jnp.bool_))
        for index, modifier in enumerate(self.context, start=1):
            levels = modifier.apply(jax.random.fold_in(key, index), levels)
        return levels


def fopp_weights(chunks: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts the non-decreasing completions after and before each chunk and level.

    Args:
        chunks: Chunks per clip, `F`.
        steps: Number of discrete levels, `T`.

    Returns:
        Two float64 arrays `[chunks, steps]`: the logarithms of `C((T-1-t) + (F-1-f), F-1-f)`, the number of ways to go
        on from chunk `f` at level `t`, and of `C(t + f, f)`, the number of ways to get there.
    """
    log_factorial = np.append(0.0, np.cumsum(np.log(np.arange(1, chunks + steps))))
    f, t = np.arange(chunks)[:, None], np.arange(steps)
    before = log_factorial[t + f] - log_factorial[f] - log_factorial[t]
    return before[::-1, ::-1], before


def fopp_discrete(key: PRNGKeyArray, chunks: int, steps: int) -> jax.Array:
    """Draws discrete non-decreasing levels with a uniform anchor (AR-Diffusion, arXiv 2503.07418, section 3.3).

    Args:
        key: Random key.
        chunks: Chunks per clip.
        steps: Number of discrete levels.

    Returns:
        int32 `[chunks]`, non-decreasing, each in `0 … steps - 1`.
    """
    anchor_key, level_key, noise_key = jax.random.split(key, 3)
    anchor = jax.random.randint(anchor_key, (), 0, chunks, jnp.int32)
    anchor_level = jax.random.randint(level_key, (), 0, steps, jnp.int32)
    # The largest of logits with Gumbel noise is a categorical draw. A chunk lies on one side of the anchor, so both
    # passes can use its noise.
    noise = jax.random.gumbel(noise_key, (chunks, steps), jnp.float32)
    after, before = (jnp.asarray(weights, jnp.float32) + noise for weights in fopp_weights(chunks, steps))
    chunk, grid = jnp.arange(chunks), jnp.arange(steps)

    def later(level, row):
        chunk, scores = row
        drawn = jnp.argmax(jnp.where(grid >= level, scores, -jnp.inf)).astype(jnp.int32)
        level = jnp.where(chunk > anchor, drawn, anchor_level)
        return level, level

    def earlier(level, row):
        chunk, scores, level_later = row
        drawn = jnp.argmax(jnp.where(grid <= level, scores, -jnp.inf)).astype(jnp.int32)
        level = jnp.where(chunk < anchor, drawn, anchor_level)
        return level, jnp.where(chunk < anchor, level, level_later)

    _, levels = jax.lax.scan(later, anchor_level, (chunk, after))
    _, levels = jax.lax.scan(earlier, anchor_level, (chunk, before, levels), reverse=True)
    return levels


def _fopp_continuous(key: PRNGKeyArray, chunks: int) -> jax.Array:
    """Draws non-decreasing quantiles: a uniform anchor, and uniform order statistics below and above it."""
    anchor_key, level_key, gap_key = jax.random.split(key, 3)
    anchor = jax.random.randint(anchor_key, (), 0, chunks)
    anchor_level = jax.random.uniform(level_key, (), jnp.float32)
    # Normalised sums of exponentials are uniform order statistics: `anchor` + 1 gaps fill [0, anchor level], the other
    # `chunks - anchor` fill the rest.
    reached = jnp.cumsum(jax.random.exponential(gap_key, (chunks + 1,), jnp.float32))
    at_anchor, tiny = reached[anchor], float(np.finfo(np.float32).tiny)  # a sum of gaps may round to 0
    below = anchor_level * (reached[:-1] / jnp.maximum(at_anchor, tiny))
    above = anchor_level + (1 - anchor_level) * (
        (reached[:-1] - at_anchor) / jnp.maximum(reached[-1] - at_anchor, tiny)
    )
    return jnp.where(jnp.arange(chunks) <= anchor, below, above)


def _make_clean(levels: Levels, chosen: jax.Array) -> Levels:
    return Levels(jnp.where(chosen, 0.0, levels.level_bu), levels.clean_bu | chosen, levels.loss_bu & ~chosen)
