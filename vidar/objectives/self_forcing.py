"""Self forcing with distribution matching: the student learns from its own rollouts through the cache.

The rollout is the same tick that serves offline sampling and streaming; a random exit row, shared by all chunks, is the
only differentiated pass, and the context is re-encoded clean and cut. The teacher (frozen, guided) and the critic
(trained on the student's rollouts) are bidirectional. Source: Self Forcing (arXiv 2506.08009); DMD (arXiv 2311.18828).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vidar.attention.visibility import Bidirectional, chunk_layout
from vidar.diffusion import flow
from vidar.errors import check_range
from vidar.models.frames import Batch, Conditions, Frames, repeat_rows
from vidar.objectives import targets
from vidar.objectives.protocol import Aux, Metrics, Networks, Phase, Role, check_average
from vidar.sampling.axes import Axes
from vidar.sampling.guidance import UNGUIDED, Guidance, combine, fold


@dataclass(frozen=True)
class SelfForcing:
    """Self-rollout with the DMD loss.

    Attributes:
        student: Checkpoint that the student starts from, or `"init"`.
        teacher: Checkpoint of the frozen bidirectional teacher, from which the critic starts, too.
        given: First chunks of each clip that are taken from data instead of generated; teacher and critic see them
            clean, so a teacher trained with a `clean_prefix` knows what they promise.
        generator_every: The student is updated every this many steps, the critic at every step.
        low: Smallest level at which teacher and critic are compared.
        high: Largest level.
        shift: Time shift of that level's law.
        guidance: Branches of the teacher.
        ema: Decay of the student's average, or None.
        ema_start: Step at which the average starts.
    """

    kind: ClassVar[str] = "self_forcing"
    student: str = "init"
    teacher: str = "init"
    given: int = 0
    generator_every: int = 5
    low: float = 0.02
    high: float = 0.98
    shift: float = 5.0
    guidance: Guidance = UNGUIDED
    ema: float | None = 0.99
    ema_start: int = 200

    def __post_init__(self) -> None:
        check_range("objective.given", self.given, least=0)
        check_range("objective.generator_every", self.generator_every, least=1)
        check_range("objective.low", self.low, least=0, below=1)
        check_range("objective.high", self.high, above=self.low, most=1)
        check_range("objective.shift", self.shift, above=0)
        check_average(self.ema, self.ema_start)

    @property
    def roles(self) -> Mapping[str, Role]:
        """Student and critic are trained, the teacher is frozen."""
        return {
            "student": Role(source=self.student, optimizer="student", ema=self.ema, ema_start=self.ema_start),
            "critic": Role(source=self.teacher, optimizer="critic"),
            "teacher": Role(source=self.teacher),
        }

    def init_aux(self) -> Aux:
        """No auxiliary state."""
        return ()

    def phases(self, step: int) -> tuple[Phase, ...]:
        """The critic at every step, the student before it at every `generator_every`-th, each on its own batch."""
        critic = Phase("critic", "critic", batch="critic")
        return (Phase("student", "student"), critic) if step % self.generator_every == 0 else (critic,)

    def loss(
        self, phase: str, networks: Networks, aux: Aux, axes: Axes, batch: Batch, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Aux]]:
        """The student's DMD loss, or the critic's denoising loss on a fresh rollout."""
        # Student and critic of one step learn from rollouts of their own.
        key = jax.random.fold_in(key, int(phase == "critic"))
        keys = targets.clip_keys(key, batch.index)
        # One exit row for all chunks and all devices: folded before anything that depends on the clip.
        exit_row = jax.random.randint(jax.random.fold_in(key, 2**31 - 1), (), 0, axes.sampler.solver.steps)
        if phase == "student":
            video = self.rollout(networks["student"], batch, axes, targets.fold_each(keys, 0), exit_row)
            loss, metrics = self._distribution_matching(networks, video, batch.conditions, keys, axes)
        else:
            student = jax.lax.stop_gradient(networks["student"])
            video = jax.lax.stop_gradient(self.rollout(student, batch, axes, targets.fold_each(keys, 0), exit_row))
            loss, metrics = self._denoising(networks["critic"], video, batch.conditions, keys, axes)
        return loss, ({**metrics, "exit_row": exit_row.astype(jnp.float32)}, aux)

    def rollout(self, student: Any, batch: Batch, axes: Axes, key_b: jax.Array, exit_row: jax.Array) -> jax.Array:
        """Generates each clip through the cache; given chunks come from the batch.

        Args:
            student: The network.
            batch: Conditions, and data for the given chunks.
            axes: The system's axes.
            key_b: Session keys.
            exit_row: Solver step whose clean prediction counts, int32 scalar.

        Returns:
            Video `[b, f, h, w, c]`, differentiable in the student.
        """
        sampler = axes.sampler
        frames = batch.latents.shape[1]
        given = self._given(axes)
        conditions = sampler.encode(student, batch.conditions)
        state = sampler.init(student, key_b, actions=conditions.actions, in_step=True)
        if given:
            state = sampler.prefill(
                jax.lax.stop_gradient(student), state, batch.latents[:, :given], conditions.frames(0, given)
            )
        chunks = (frames - given) // sampler.chunk
        _, video = sampler.rollout(student, state, conditions.frames(given, frames), chunks, exit_row=exit_row)
        return jnp.concatenate([batch.latents[:, :given], video], axis=1)

    def _given(self, axes: Axes) -> int:
        """Frames taken from data."""
        sampler = axes.sampler
        if sampler.first:
            return 1 + max(0, self.given - 1) * sampler.chunk
        return self.given * sampler.chunk

    def _compared(self, video: jax.Array, keys: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, Frames]:
        """The video for teacher and critic: given frames clean, the others noised to one drawn level per clip."""
        frames = video.shape[1]
        draw = jax.vmap(lambda key: flow.random_level(key, (), self.shift, self.low, self.high))
        level = jnp.where(mask[None], draw(targets.fold_each(keys, 1))[:, None], 0.0)
        noise = targets.clip_noise(targets.fold_each(keys, 2), video.shape[1:])
        return level, noise, Frames(flow.interpolate(video, noise, level), level, chunk_layout(frames, frames))

    def _distribution_matching(
        self, networks: Networks, video: jax.Array, conditions: Conditions, keys: jax.Array, axes: Axes
    ) -> tuple[jax.Array, Metrics]:
        fixed = jax.lax.stop_gradient(video)
        mask = jnp.arange(video.shape[1]) >= self._given(axes)
        _, _, frames = self._compared(fixed, keys, mask)
        fake = predict_clean(networks["critic"], frames, conditions, UNGUIDED)
        real = predict_clean(networks["teacher"], frames, conditions, self.guidance)
        direction = jax.lax.stop_gradient(targets.dmd_direction(fixed, fake, real, mask))
        count = video[:, :1].size * (video.shape[1] - self._given(axes))
        size = jnp.sqrt(jnp.sum(jnp.square(direction)) / count)
        return targets.pull(video, direction, count), {"dmd_gradient": size}

    def _denoising(
        self, critic: Any, video: jax.Array, conditions: Conditions, keys: jax.Array, axes: Axes
    ) -> tuple[jax.Array, Metrics]:
        generated = jnp.arange(video.shape[1]) >= self._given(axes)
        level, noise, frames = self._compared(video, keys, generated)
        prediction = critic((frames,), conditions, visibility=Bidirectional()).predictions[0]
        velocity = flow.to_velocity(critic.config.prediction, prediction, frames.latents, level)
        error = targets.frame_error(velocity, noise - video)
        mask = jnp.broadcast_to(generated[None], error.shape)
        return targets.masked_mean(error, mask), targets.level_buckets(error, level, mask)


def predict_clean(network: Any, frames: Frames, conditions: Conditions, guidance: Guidance) -> jax.Array:
    """Guided clean prediction of a bidirectional network.

    Args:
        network: The network.
        frames: Noisy frames.
        conditions: Their conditions.
        guidance: Branches.

    Returns:
        Clean latents `[b, f, h, w, c]`.
    """
    times = len(guidance)
    output = network((repeat_rows(frames, times),), fold(conditions, guidance), visibility=Bidirectional()).predictions[
        0
    ]
    return flow.to_x0(network.config.prediction, combine(output, guidance), frames.latents, frames.level)
