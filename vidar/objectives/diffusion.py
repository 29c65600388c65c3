"""Denoising of whole clips: bidirectional diffusion, and diffusion forcing.

One loss serves both; they differ in their axes only. Bidirectional visibility with one shared level trains a teacher;
chunk-causal visibility with independent levels per chunk is diffusion forcing (arXiv 2407.01392).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax

from vidar.diffusion import flow
from vidar.errors import ConfigError, check_range
from vidar.models.frames import Batch, Frames
from vidar.objectives import targets
from vidar.objectives.protocol import Aux, Metrics, Networks, OneUpdate, Role, check_average
from vidar.sampling.axes import Axes

WEIGHTS = ("uniform", "bump")


def loss_weight(name: str, shift: float, level_bf: jax.Array) -> jax.Array:
    """Weight of each frame's error: `uniform`, or the `bump` around level 1/2 of the field's baselines."""
    return flow.bump_weight(level_bf, shift) if name == "bump" else jax.numpy.ones_like(level_bf)


def check_weight(name: str, shift: float) -> None:
    """Raises ConfigError where there is no such loss weight."""
    if name not in WEIGHTS:
        raise ConfigError(f"objective.weight={name!r} is unknown: use one of {', '.join(WEIGHTS)}")
    check_range("objective.shift", shift, above=0)


@dataclass(frozen=True)
class Diffusion(OneUpdate):
    """Denoise every frame of a clip, each at its chunk's level.

    Attributes:
        weight: Loss weight by level: `"uniform"` or `"bump"`.
        shift: Time shift of the bump's grid.
        ema: Decay of the student's average, or None.
        ema_start: Step at which the average starts.
        start: Trained weights to start from, a run or a `.safetensors` file, or `"init"`.
    """

    kind: ClassVar[str] = "diffusion"
    weight: str = "uniform"
    shift: float = 1.0
    ema: float | None = 0.999
    ema_start: int = 0
    start: str = "init"

    def __post_init__(self) -> None:
        check_weight(self.weight, self.shift)
        check_average(self.ema, self.ema_start)

    @property
    def roles(self) -> Mapping[str, Role]:
        """One trained network."""
        return {"student": Role(source=self.start, optimizer="student", ema=self.ema, ema_start=self.ema_start)}

    def loss(
        self, phase: str, networks: Networks, aux: Aux, axes: Axes, batch: Batch, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Aux]]:
        """Regression of the network's prediction at drawn levels."""
        student = networks["student"]
        layout = axes.layout(batch.latents.shape[1])
        keys = targets.clip_keys(key, batch.index)
        levels = targets.frame_levels(axes.levels, targets.fold_each(keys, 0), layout)
        noise = targets.clip_noise(targets.fold_each(keys, 1), batch.latents.shape[1:])
        conditions = targets.drop_some(batch.conditions, targets.fold_each(keys, 2), axes.drop)
        noisy = Frames(flow.interpolate(batch.latents, noise, levels.level_bu), levels.level_bu, layout)
        output = student((noisy,), conditions, visibility=axes.visibility)
        target = flow.target(student.config.prediction, batch.latents, noise)
        error = targets.frame_error(output.predictions[0], target)
        weight = loss_weight(self.weight, self.shift, levels.level_bu)
        loss = targets.masked_mean(error * weight, levels.loss_bu)
        return loss, (targets.level_buckets(error, levels.level_bu, levels.loss_bu), aux)
