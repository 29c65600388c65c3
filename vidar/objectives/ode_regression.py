"""ODE regression: a few-step student learns where a teacher's deterministic trajectories end.

From a state of a trajectory at one of its own levels the student predicts the clean latents; so its first prediction
from pure noise is already one of the teacher's videos. It prepares a causal student for distribution matching.
Source: CausVid (arXiv 2412.07772, section 4.3), Self Forcing (arXiv 2506.08009); with clean context and trajectories of
an autoregressive teacher, Causal Forcing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vidar.attention.visibility import CLEAN, Layout
from vidar.diffusion import flow
from vidar.errors import ConfigError, check_range
from vidar.models.frames import Batch, Frames
from vidar.objectives import targets
from vidar.objectives.protocol import Aux, Metrics, Networks, OneUpdate, Role, check_average
from vidar.sampling.axes import Axes
from vidar.sampling.solvers import level_table

CONTEXTS = ("noisy", "clean")


@dataclass(frozen=True)
class OdeRegression(OneUpdate):
    """Regression on the ends of teacher trajectories, which `data.trajectories` names.

    Attributes:
        context: What a chunk sees of the chunks before it: `"noisy"`, their states at levels of their own (CausVid);
            `"clean"`, their clean latents (Causal Forcing), with visibility `teacher_forcing`.
        given: First chunks of each clip that were given to the teacher, and stay clean.
        ema: Decay of the student's average, or None.
        ema_start: Step at which the average starts.
        start: Trained weights to start from, a run or a `.safetensors` file, or `"init"`.
    """

    kind: ClassVar[str] = "ode_regression"
    context: str = "noisy"
    given: int = 0
    ema: float | None = 0.999
    ema_start: int = 0
    start: str = "init"

    def __post_init__(self) -> None:
        if self.context not in CONTEXTS:
            raise ConfigError(f"objective.context={self.context!r} is unknown: use one of {', '.join(CONTEXTS)}")
        check_range("objective.given", self.given, least=0)
        check_average(self.ema, self.ema_start)

    @property
    def roles(self) -> Mapping[str, Role]:
        """One trained network."""
        return {"student": Role(source=self.start, optimizer="student", ema=self.ema, ema_start=self.ema_start)}

    @property
    def beside(self) -> bool:
        """Whether clean clips stand beside noisy ones in a training pass."""
        return self.context == "clean"

    def given_frames(self, layout: Layout) -> int:
        """Frames of the given chunks."""
        return sum(chunk < self.given for chunk in layout.chunks)

    def loss(
        self, phase: str, networks: Networks, aux: Aux, axes: Axes, batch: Batch, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Aux]]:
        """Squared error of the clean prediction, over the frames that are not clean already."""
        if batch.trajectory is None:
            raise ConfigError("ode_regression needs trajectories: set data.trajectories")
        student, layout = networks["student"], axes.layout(batch.latents.shape[1])
        table = jnp.asarray(level_table(axes.sampler.solver))
        if batch.trajectory.shape[1] != len(table):
            raise ConfigError(f"trajectories of {batch.trajectory.shape[1]} states for the {len(table)} of the solver")
        keys = targets.clip_keys(key, batch.index)
        index = self._states(targets.fold_each(keys, 0), layout, len(table))
        conditions = targets.drop_some(batch.conditions, targets.fold_each(keys, 1), axes.drop)
        level = table[index]
        streams = (Frames(targets.trajectory_states(batch.trajectory, index), level, layout),)
        if self.context == "clean":
            roles = axes.layout(layout.frames, CLEAN)
            streams = (Frames(batch.latents, jnp.zeros_like(level), roles), *streams)
        output = student(streams, conditions, visibility=axes.visibility)
        noisy = streams[-1]
        clean = flow.to_x0(student.config.prediction, output.predictions[-1], noisy.latents, level)
        error = targets.frame_error(clean, batch.latents)
        mask = level > 0
        return targets.masked_mean(error, mask), (targets.level_buckets(error, level, mask), aux)

    def _states(self, key_b: jax.Array, layout: Layout, states: int) -> jax.Array:
        """Draws a state for each chunk, `[b, f]`; the clean one only where later chunks may learn from seeing it."""
        choices = states if self.context == "noisy" else states - 1
        chunks = np.asarray(layout.chunks)
        draw = jax.vmap(lambda key: jax.random.randint(key, (chunks[-1] + 1,), 0, choices, jnp.int32))
        return jnp.where(jnp.asarray(chunks < self.given)[None], states - 1, draw(key_b)[:, chunks])
