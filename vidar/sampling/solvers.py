"""Solvers: one step of one chunk from a level to the next, as small frozen dataclasses.

A solver owns its grid of levels, from 1 (pure noise) to 0 (clean). This room must not know networks or plans.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

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
        level: Float[Array, "b f"],
        next_level: Float[Array, "b f"],
        noise: Float[Array, "b f h w c"] | None,
    ) -> Float[Array, "b f h w c"]:
        """Moves `x` from `level` to `next_level` along the velocity."""
        velocity = flow.to_velocity(prediction_kind, prediction, x, level)
        return x + flow.per_frame(next_level - level, x) * velocity


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
        level: Float[Array, "b f"],
        next_level: Float[Array, "b f"],
        noise: Float[Array, "b f h w c"] | None,
    ) -> Float[Array, "b f h w c"]:
        """Predicts the clean frames and noises them afresh to `next_level`."""
        if noise is None:
            raise ConfigError("the few-step solver needs fresh noise at every step")
        clean = flow.to_x0(prediction_kind, prediction, x, level)
        return flow.interpolate(clean, noise, next_level)


Solver = Euler | FewStep


def level_table(solver: Solver) -> jax.Array | np.ndarray:
    """The solver's levels as fp32, indexed by progress."""
    return np.asarray(solver.levels, np.float32)
