"""Causal consistency distillation: a few-step causal student from an autoregressive teacher, without trajectories.

Two neighbouring levels of the teacher's ODE must lead to one clean prediction: the student's at the noisier level is
pulled to its own at the cleaner one, which the teacher's step reaches; the past of each chunk is clean data. Sources:
consistency models (arXiv 2303.01469) on flow matching, with the clean past of Causal Forcing's distillation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from vidar.attention.visibility import CLEAN
from vidar.diffusion import flow
from vidar.errors import check_range
from vidar.models.frames import Batch, Frames, repeat_rows
from vidar.objectives import targets
from vidar.objectives.forcing import solver_indices
from vidar.objectives.protocol import Aux, Metrics, Networks, OneUpdate, Role, check_average
from vidar.sampling.axes import Axes
from vidar.sampling.guidance import UNGUIDED, Guidance, combine, fold


@dataclass(frozen=True)
class Consistency(OneUpdate):
    """Match the student's clean predictions along the teacher's ODE.

    Attributes:
        beside: Clean clips stand beside noisy ones.
        student: Trained weights that the student starts from, usually the teacher's.
        teacher: Weights of the frozen autoregressive teacher, such as one trained by teacher forcing.
        steps: Levels between noise and clean at which the ODE is cut.
        shift: Time shift of these levels.
        guidance: Branches of the teacher.
        given: First chunks that carry no loss.
        ema: Decay of the student's average, or None.
        ema_start: Step at which the average starts.
    """

    kind: ClassVar[str] = "consistency"
    beside: ClassVar[bool] = True
    student: str = "init"
    teacher: str = "init"
    steps: int = 48
    shift: float = 5.0
    guidance: Guidance = UNGUIDED
    given: int = 0
    ema: float | None = 0.99
    ema_start: int = 0

    def __post_init__(self) -> None:
        check_range("objective.steps", self.steps, least=1)
        check_range("objective.shift", self.shift, above=0)
        check_range("objective.given", self.given, least=0)
        check_average(self.ema, self.ema_start)

    @property
    def roles(self) -> Mapping[str, Role]:
        """The student is trained, the teacher is frozen."""
        return {
            "student": Role(source=self.student, optimizer="student", ema=self.ema, ema_start=self.ema_start),
            "teacher": Role(source=self.teacher),
        }

    def loss(
        self, phase: str, networks: Networks, aux: Aux, axes: Axes, batch: Batch, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Aux]]:
        """Squared distance between the student's clean predictions before and after one step of the teacher."""
        frames = batch.latents.shape[1]
        layout, past = axes.layout(frames), axes.layout(frames, CLEAN)
        clean = Frames(batch.latents, jnp.zeros(batch.latents.shape[:2], jnp.float32), past)
        keys = targets.clip_keys(key, batch.index)
        index = solver_indices(targets.fold_each(keys, 0), layout, self.steps)
        table = jnp.asarray(flow.level_grid(self.steps, self.shift), jnp.float32)
        level, cleaner = table[index], table[index + 1]
        noise = targets.clip_noise(targets.fold_each(keys, 1), batch.latents.shape[1:])
        noisy = Frames(flow.interpolate(batch.latents, noise, level), level, layout)

        teacher, student = networks["teacher"], networks["student"]
        times = len(self.guidance)
        streams = repeat_rows((clean, noisy), times)
        output = teacher(streams, fold(batch.conditions, self.guidance), visibility=axes.visibility)
        prediction = combine(output.predictions[1], self.guidance)
        velocity = flow.to_velocity(teacher.config.prediction, prediction, noisy.latents, level)
        stepped = Frames(noisy.latents + flow.per_frame(cleaner - level, velocity) * velocity, cleaner, layout)

        def predict(network, noisy: Frames) -> jax.Array:
            output = network((clean, noisy), batch.conditions, visibility=axes.visibility)
            return flow.to_x0(network.config.prediction, output.predictions[1], noisy.latents, noisy.level)

        goal = jax.lax.stop_gradient(predict(student, stepped))
        # At the last cut the ODE has arrived: the teacher's step itself is the clean end.
        goal = jnp.where(flow.per_frame(cleaner, goal) == 0, stepped.latents, goal)
        error = targets.frame_error(predict(student, noisy), jax.lax.stop_gradient(goal))
        chunk_of = jnp.asarray(layout.chunks, jnp.int32)
        mask = jnp.broadcast_to((chunk_of >= self.given)[None], error.shape)
        return targets.masked_mean(error, mask), (targets.level_buckets(error, level, mask), aux)
