"""Solvers: one step of one chunk from a level to the next, as small frozen dataclasses.

A solver owns its grid of levels, from 1 (pure noise) to 0 (clean), and says how many arrays of the latents' shape it
remembers from step to step; the chunks in flight carry them, each its own. This room must not know networks or plans.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vidar.diffusion import flow
from vidar.errors import ConfigError, check_range


@dataclass(frozen=True)
class Euler:
    """Deterministic Euler steps on the velocity.

    Attributes:
        steps: Solver steps.
        shift: Time shift of the uniform grid.
    """

    kind: ClassVar[str] = "euler"
    stochastic: ClassVar[bool] = False
    remembered: ClassVar[int] = 0
    steps: int = 50
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_range("solver.steps", self.steps, least=1)
        check_range("solver.shift", self.shift, above=0)

    @property
    def levels(self) -> np.ndarray:
        """The grid, `[steps + 1]`, from 1 to 0."""
        return flow.level_grid(self.steps, self.shift)

    def step(
        self,
        prediction_kind: str,
        prediction: Float[Array, "b f h w c"],
        x: Float[Array, "b f h w c"],
        progress: Int[Array, " f"],
        noise: Float[Array, "b f h w c"] | None,
        history: Float[Array, "b f k h w c"],
    ) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f k h w c"]]:
        """Moves each frame one step along the velocity.

        Args:
            prediction_kind: What the prediction is, one of `flow.KINDS`.
            prediction: The network's prediction.
            x: Noisy frames.
            progress: Steps that each frame has taken.
            noise: None.
            history: Empty.

        Returns:
            The frames at their next levels, and what is remembered.
        """
        level, next_level = _levels(self, progress, len(x))
        velocity = flow.to_velocity(prediction_kind, prediction, x, level)
        return x + flow.per_frame(next_level - level, x) * velocity, history


@dataclass(frozen=True)
class FewStep:
    """Stochastic few-step sampler of consistency and DMD students: predict clean, re-noise to the next level.

    Source: CausVid (arXiv 2412.07772) and Self Forcing (arXiv 2506.08009), with the warped grid of the latter.

    Attributes:
        times: Descending times in (0, 1000], before the warp.
        shift: Time shift that warps them.
    """

    kind: ClassVar[str] = "few_step"
    stochastic: ClassVar[bool] = True
    remembered: ClassVar[int] = 0
    times: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0

    def __post_init__(self) -> None:
        check_range("solver.shift", self.shift, above=0)
        flow.few_step_levels(self.times, self.shift)

    @property
    def steps(self) -> int:
        """Solver steps."""
        return len(self.times)

    @property
    def levels(self) -> np.ndarray:
        """The grid, `[steps + 1]`, ending in 0."""
        return flow.few_step_levels(self.times, self.shift)

    def step(
        self,
        prediction_kind: str,
        prediction: Float[Array, "b f h w c"],
        x: Float[Array, "b f h w c"],
        progress: Int[Array, " f"],
        noise: Float[Array, "b f h w c"] | None,
        history: Float[Array, "b f k h w c"],
    ) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f k h w c"]]:
        """Predicts the clean frames and noises them afresh to their next levels; arguments as `Euler.step`."""
        if noise is None:
            raise ConfigError("the few-step solver needs fresh noise at every step")
        level, next_level = _levels(self, progress, len(x))
        clean = flow.to_x0(prediction_kind, prediction, x, level)
        return flow.interpolate(clean, noise, next_level), history


@dataclass(frozen=True)
class _Multistep(ABC):
    """Deterministic solvers that remember clean predictions: each step is a weighted sum of what there is.

    Attributes:
        steps: Solver steps.
        shift: Time shift of the grid.
        start: Level at which sampling starts, before the shift; the frames are pure noise all the same.
    """

    stochastic: ClassVar[bool] = False
    remembered: ClassVar[int]
    steps: int = 50
    shift: float = 5.0
    start: float = 1.0

    def __post_init__(self) -> None:
        check_range("solver.steps", self.steps, least=1)
        check_range("solver.shift", self.shift, above=0)
        check_range("solver.start", self.start, above=0, most=1)

    @property
    def levels(self) -> np.ndarray:
        """The grid, `[steps + 1]`, ending in 0."""
        return flow.time_shift(np.linspace(self.start, 0.0, self.steps + 1), self.shift)

    @cached_property
    def weights(self) -> np.ndarray:
        """How each step makes the next frames and what is remembered.

        Returns:
            float64 `[steps, 1 + remembered, 2 + remembered]`: of the next frames and each remembered array, weights of
            the frames, their clean prediction and the arrays remembered before.
        """
        levels = self.levels
        # Log signal-to-noise ratios are finite up to just below pure noise.
        inner = np.minimum(levels[:-1], 1.0 - 1e-6)
        return self._weights(levels, np.append(np.log1p(-inner) - np.log(inner), np.inf))

    @abstractmethod
    def _weights(self, level: np.ndarray, ratio: np.ndarray) -> np.ndarray: ...

    def step(
        self,
        prediction_kind: str,
        prediction: Float[Array, "b f h w c"],
        x: Float[Array, "b f h w c"],
        progress: Int[Array, " f"],
        noise: Float[Array, "b f h w c"] | None,
        history: Float[Array, "b f k h w c"],
    ) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f k h w c"]]:
        """Moves each frame one step; arguments as `Euler.step`, with what the solver remembers in `history`."""
        level, _ = _levels(self, progress, len(x))
        clean = flow.to_x0(prediction_kind, prediction, x, level)
        terms = jnp.concatenate([x[:, :, None], clean[:, :, None], history], axis=2)
        weights = jnp.asarray(self.weights.astype(np.float32))[jnp.minimum(progress, self.steps - 1)]
        # Sums of a few terms, exact in fp32 on every device, which a matrix product need not be.
        parts = [
            jnp.sum(jnp.broadcast_to(row[None, :, :, None, None, None], terms.shape) * terms, axis=2)
            for row in jnp.unstack(weights, axis=1)
        ]
        return parts[0], jnp.stack(parts[1:], axis=2)


@dataclass(frozen=True)
class DPMPlusPlus(_Multistep):
    """DPM-Solver++ (2M): second order from the last two clean predictions (arXiv 2211.01095, algorithm 2)."""

    kind: ClassVar[str] = "dpm++"
    remembered: ClassVar[int] = 1

    def _weights(self, level: np.ndarray, ratio: np.ndarray) -> np.ndarray:
        table = np.zeros((self.steps, 2, 3))
        for step in range(self.steps):
            width = ratio[step + 1] - ratio[step]
            slope = 0.0
            if 0 < step < self.steps - 1:  # the first and the last step are of first order
                slope = 0.5 * width / (ratio[step] - ratio[step - 1])
            gain = -(1 - level[step + 1]) * np.expm1(-width)
            table[step, 0] = level[step + 1] / level[step], gain * (1 + slope), -gain * slope
            table[step, 1, 1] = 1.0
        return table


@dataclass(frozen=True)
class UniPC(_Multistep):
    """UniPC of second order: predictor, and corrector by the next prediction (arXiv 2302.04867, B₂(h) = eʰ − 1).

    The corrector changes what the next step starts from, not what the network was shown.
    """

    kind: ClassVar[str] = "unipc"
    remembered: ClassVar[int] = 3  # two clean predictions, and the corrected frames
    start: float = 0.999

    def _weights(self, level: np.ndarray, ratio: np.ndarray) -> np.ndarray:
        # Terms: frames, clean prediction, the two before it, corrected frames before it.
        x, now, last, older, corrected = np.eye(5)
        table = np.zeros((self.steps, 4, 5))
        for step in range(self.steps):
            base = x
            if step:
                width, keep, gain = _exponential(level, ratio, step - 1)
                # The last predictor's order is the corrector's.
                base = keep * corrected + gain * last
                if step == 1:
                    base = base + gain * 0.5 * (now - last)
                else:
                    reach = (ratio[step - 2] - ratio[step - 1]) / width
                    first, second = _unified(width)
                    # Of the line through both points that has the right first two moments.
                    outer = (second - reach * first) / (1 - reach)
                    base = base + gain * ((first - outer) * (older - last) / reach + outer * (now - last))
            width, keep, gain = _exponential(level, ratio, step)
            update = keep * base + gain * now
            if 0 < step < self.steps - 1:
                reach = (ratio[step - 1] - ratio[step]) / width
                update = update + gain * 0.5 * (last - now) / reach
            table[step] = update, now, last, base
        return table


def _exponential(level: np.ndarray, ratio: np.ndarray, step: int) -> tuple[float, float, float]:
    """Width of a step in log signal-to-noise ratio, and its weights of frames and clean prediction."""
    width = ratio[step + 1] - ratio[step]
    return width, level[step + 1] / level[step], -(1 - level[step + 1]) * np.expm1(-width)


def _unified(width: float) -> tuple[float, float]:
    """The first two moments that UniPC's corrector matches, over B(h)."""
    # phi_2 and 2 phi_3 of -h, over phi_1.
    first = np.expm1(-width) / -width - 1
    second = first / -width - 0.5
    return first / np.expm1(-width), 2 * second / np.expm1(-width)


Solver = Euler | FewStep | UniPC | DPMPlusPlus


def level_table(solver: Solver) -> np.ndarray:
    """The solver's levels as fp32, indexed by progress."""
    return np.asarray(solver.levels, np.float32)


def _levels(solver: "Solver | _Multistep", progress: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Levels `[b, f]` before and after the next step."""
    table = jnp.asarray(np.asarray(solver.levels, np.float32))
    now, after = table[progress], table[jnp.minimum(progress + 1, solver.steps)]
    return jnp.broadcast_to(now[None], (rows, len(now))), jnp.broadcast_to(after[None], (rows, len(after)))
