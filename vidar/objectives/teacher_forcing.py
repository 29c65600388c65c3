"""Teacher forcing: noisy chunks attend to the clean chunks before them, all in one pass over clean ‖ noisy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from vidar.attention.visibility import CLEAN
from vidar.diffusion import flow
from vidar.errors import check_range
from vidar.models.frames import Batch, Frames
from vidar.objectives import targets
from vidar.objectives.diffusion import check_weight, loss_weight
from vidar.objectives.protocol import Aux, Metrics, Networks, OneUpdate, Role, check_average
from vidar.sampling.axes import Axes


@dataclass(frozen=True)
class TeacherForcing(OneUpdate):
    """Denoise every chunk given the clean chunks before it (the baseline of Self Forcing, arXiv 2506.08009).

    Attributes:
        beside: Clean clips stand beside noisy ones.
        context_noise: Largest level of the noise on the clean half but for the sink, drawn uniformly per clip (as in
            GameNGen, arXiv 2408.14837); it teaches the network to mistrust its context.
        weight: Loss weight by level: `"uniform"` or `"bump"`.
        shift: Time shift of the bump's grid.
        ema: Decay of the student's average, or None.
        ema_start: Step at which the average starts.
        start: Trained weights to start from, a run or a `.safetensors` file, or `"init"`.
    """

    kind: ClassVar[str] = "teacher_forcing"
    beside: ClassVar[bool] = True
    context_noise: float = 0.0
    weight: str = "uniform"
    shift: float = 1.0
    ema: float | None = 0.999
    ema_start: int = 0
    start: str = "init"

    def __post_init__(self) -> None:
        check_range("objective.context_noise", self.context_noise, least=0, most=1)
        check_weight(self.weight, self.shift)
        check_average(self.ema, self.ema_start)

    @property
    def roles(self) -> Mapping[str, Role]:
        """One trained network."""
        return {"student": Role(source=self.start, optimizer="student", ema=self.ema, ema_start=self.ema_start)}

    def loss(
        self, phase: str, networks: Networks, aux: Aux, axes: Axes, batch: Batch, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Aux]]:
        """Regression on the noisy half; the clean half carries no loss."""
        student = networks["student"]
        frames = batch.latents.shape[1]
        layout = axes.layout(frames)
        keys = targets.clip_keys(key, batch.index)
        levels = targets.frame_levels(axes.levels, targets.fold_each(keys, 0), layout)
        noise = targets.clip_noise(targets.fold_each(keys, 1), batch.latents.shape[1:])
        conditions = targets.drop_some(batch.conditions, targets.fold_each(keys, 2), axes.drop)
        clean = self._context(batch.latents, targets.fold_each(keys, 3), axes, frames)
        noisy = Frames(flow.interpolate(batch.latents, noise, levels.level_bu), levels.level_bu, layout)
        output = student((clean, noisy), conditions, visibility=axes.visibility)
        target = flow.target(student.config.prediction, batch.latents, noise)
        error = targets.frame_error(output.predictions[1], target)
        weight = loss_weight(self.weight, self.shift, levels.level_bu)
        loss = targets.masked_mean(error * weight, levels.loss_bu)
        return loss, (targets.level_buckets(error, levels.level_bu, levels.loss_bu), aux)

    def _context(self, latents: jax.Array, key_b: jax.Array, axes: Axes, frames: int) -> Frames:
        layout = axes.layout(frames, CLEAN)
        level = jnp.zeros(latents.shape[:2], jnp.float32)
        if self.context_noise:
            draw = jax.vmap(lambda key: jax.random.uniform(key, (1,), jnp.float32, 0.0, self.context_noise))
            # The sink is what generation was given: it stays clean, so that identity is worth reading from it.
            generated = jnp.arange(frames) >= axes.sampler.context.sink
            level = draw(targets.fold_each(key_b, 0)) * generated.astype(jnp.float32)[None]
            noise = targets.clip_noise(targets.fold_each(key_b, 1), latents.shape[1:])
            latents = flow.interpolate(latents, noise, level)
        return Frames(latents, level, layout)
