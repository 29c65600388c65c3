"""What a student's videos are compared with: a teacher's score (DMD, SiD) or data through a discriminator (GAN).

Each matching gives the student's loss on generated videos, and that of the critic that follows the student. It must not
know where the videos come from. Sources: DMD (arXiv 2311.18828), SiD (arXiv 2404.04057), as Self Forcing uses them.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vidar.attention.visibility import Bidirectional, chunk_layout
from vidar.diffusion import flow
from vidar.errors import ConfigError, check_range
from vidar.models.discriminator import DiscriminatorConfig
from vidar.models.frames import Batch, Conditions, Frames, repeat_rows
from vidar.objectives import targets
from vidar.objectives.forcing import Generated
from vidar.objectives.protocol import Metrics, Networks
from vidar.sampling.guidance import UNGUIDED, Guidance, combine, fold


@dataclass(frozen=True)
class NoiseLaw:
    """At which levels videos are compared: uniform, shifted, clamped; one level for a whole clip.

    Attributes:
        low: Smallest level.
        high: Largest level.
        shift: Time shift.
    """

    low: float = 0.02
    high: float = 0.98
    shift: float = 5.0

    def __post_init__(self) -> None:
        check_range("noise.low", self.low, least=0, below=1)
        check_range("noise.high", self.high, above=self.low, most=1)
        check_range("noise.shift", self.shift, above=0)

    def draw(self, generated: Generated, key_b: jax.Array) -> jax.Array:
        """Levels `[b, f]`: given frames stay clean."""
        level = jax.vmap(lambda key: flow.random_level(key, (), self.shift, self.low, self.high))(key_b)
        return jnp.where(generated.counts[None], level[:, None], 0.0)


@dataclass(frozen=True)
class _Scores:
    """What matchings by scores share: a teacher, and a critic that denoises the student's videos.

    Attributes:
        noise: Levels of comparison.
        guidance: Branches of the teacher. The field writes `r + w (r - r_null)`, which is a scale of 1 + w here.
        guided_below: Above this level the teacher is not guided, after the guidance interval (arXiv 2404.07724): where
            there is much noise, guidance also decides when and how often what is named appears.
    """

    noise: NoiseLaw = field(default_factory=NoiseLaw)
    guidance: Guidance = UNGUIDED
    guided_below: float = 1.0

    def __post_init__(self) -> None:
        check_range("matching.guided_below", self.guided_below, least=0, most=1)
        if self.guided_below < 1 and all(branch.drops for branch in self.guidance):
            raise ConfigError("matching.guided_below: needs a branch of the guidance that drops nothing")

    @property
    def needs_teacher(self) -> bool:
        """The teacher's score is what is matched."""
        return True

    def critic_loss(
        self, networks: Networks, generated: Generated, batch: Batch, key_b: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Mean squared velocity error of the critic on generated videos, over the frames that count."""
        critic = networks["critic"]
        frames, noise = self._noised(generated.video, generated, key_b)
        prediction = critic((frames,), generated.conditions, visibility=Bidirectional()).predictions[0]
        velocity = flow.to_velocity(critic.config.prediction, prediction, frames.latents, frames.level)
        error = targets.frame_error(velocity, noise - generated.video)
        mask = jnp.broadcast_to(generated.counts[None], error.shape)
        return targets.masked_mean(error, mask), targets.level_buckets(error, frames.level, mask)

    def _noised(self, video: jax.Array, generated: Generated, key_b: jax.Array) -> tuple[Frames, jax.Array]:
        level = self.noise.draw(generated, targets.fold_each(key_b, 1))
        return noised(video, level, targets.fold_each(key_b, 2))

    def _predicted(
        self, networks: Networks, video: jax.Array, generated: Generated, key_b: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Clean predictions of critic and teacher on a video that is noised, and how far they are apart by level."""
        frames, _ = self._noised(video, generated, key_b)
        fake = predict_clean(networks["critic"], frames, generated.conditions, UNGUIDED)
        real = predict_clean(networks["teacher"], frames, generated.conditions, self.guidance, self.guided_below)
        return fake, real, disagreement(fake, real, frames.level, generated.counts)


@dataclass(frozen=True)
class DMD(_Scores):
    """Distribution matching: the difference of the critic's and the guided teacher's clean predictions is the gradient.

    Attributes:
        noise: Levels of comparison.
        guidance: Branches of the teacher.
        guided_below: Above this level the teacher is not guided.
    """

    kind: ClassVar[str] = "dmd"

    def student_loss(
        self, networks: Networks, generated: Generated, batch: Batch, key_b: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The surrogate whose gradient with respect to the video is the direction over its size."""
        fixed = jax.lax.stop_gradient(generated.video)
        fake, real, metrics = self._predicted(networks, fixed, generated, key_b)
        direction = jax.lax.stop_gradient(targets.dmd_direction(fixed, fake, real, generated.counts))
        count = targets.counted(generated.video, generated.counts)
        size = jnp.sqrt(jnp.sum(jnp.square(direction)) / count)
        return targets.pull(generated.video, direction, count), {**metrics, "dmd_gradient": size}


@dataclass(frozen=True)
class SiD(_Scores):
    """Score identity distillation: both scores are differentiated with respect to the noised video.

    Attributes:
        noise: Levels of comparison.
        guidance: Branches of the teacher.
        guided_below: Above this level the teacher is not guided.
        alpha: Weight of the squared difference of scores that is taken off.
    """

    kind: ClassVar[str] = "sid"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("matching.alpha", self.alpha)

    def student_loss(
        self, networks: Networks, generated: Generated, batch: Batch, key_b: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """`mean (r - f) ((r - x) - alpha (r - f)) / mean|x - r|` over the frames that count."""
        fake, real, metrics = self._predicted(networks, generated.video, generated, key_b)
        return targets.sid_loss(generated.video, fake, real, generated.counts, self.alpha), metrics


@dataclass(frozen=True)
class GAN:
    """A discriminator on the critic's features of noised videos, against data.

    Attributes:
        noise: Levels at which it looks; data and generated clip share theirs.
        heads: The discriminator's heads.
        relativistic: Whether it judges the generated clip relative to the clip of data, or each by itself.
        penalty_real: Weight of R1, the squared slope at data.
        penalty_fake: Weight of R2, the squared slope at generated clips.
        step: Size of the step over which slopes are taken (finite differences).
        warmup: Steps during which the heads alone are trained, before the student and the features.
    """

    kind: ClassVar[str] = "gan"
    noise: NoiseLaw = field(default_factory=NoiseLaw)
    heads: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    relativistic: bool = True
    penalty_real: float = 0.0
    penalty_fake: float = 0.0
    step: float = 0.01
    warmup: int = 0

    def __post_init__(self) -> None:
        for name in ("penalty_real", "penalty_fake", "warmup"):
            check_range(f"matching.{name}", getattr(self, name), least=0)
        check_range("matching.step", self.step, above=0)

    @property
    def needs_teacher(self) -> bool:
        """Data are what is matched."""
        return False

    def student_loss(
        self, networks: Networks, generated: Generated, batch: Batch, key_b: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The generator's loss."""
        fake, real = self._logits(networks["critic"], generated, batch, key_b)
        loss = targets.generator_loss(fake, real if self.relativistic else None)
        return loss, {"logit_fake": jnp.mean(fake), "logit_real": jnp.mean(real)}

    def critic_loss(
        self, networks: Networks, generated: Generated, batch: Batch, key_b: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The discriminator's loss, with its penalties."""
        critic = networks["critic"]
        fake, real = self._logits(critic, generated, batch, key_b)
        loss = targets.discriminator_loss(fake, real, relativistic=self.relativistic)
        metrics = {"logit_fake": jnp.mean(fake), "logit_real": jnp.mean(real)}
        metrics["accuracy"] = jnp.mean(jnp.concatenate([real > 0, fake < 0]).astype(jnp.float32))
        penalties = {"penalty_fake": self.penalty_fake, "penalty_real": self.penalty_real}
        for index, (name, weight) in enumerate(penalties.items()):
            if weight:
                moved = self._logits(critic, generated, batch, key_b, moved=index)[index]
                metrics[name] = jnp.mean(jnp.square((moved - (fake, real)[index]) / self.step))
                loss = loss + 0.5 * weight * metrics[name]
        return loss, metrics

    def _logits(
        self, critic: Any, generated: Generated, batch: Batch, key_b: jax.Array, moved: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Logits `[b]` of generated clips (0) and of data (1) at shared levels, one of them moved by a random step."""
        video = generated.video
        level = self.noise.draw(generated, targets.fold_each(key_b, 1))
        # Data as long as the rollout are needed only where conditions go along with frames, and cut as these are.
        start = generated.start if batch.latents.shape[1] > video.shape[1] else None
        data = jax.lax.dynamic_slice_in_dim(batch.latents, 0 if start is None else start, video.shape[1], axis=1)
        away = self.step * targets.clip_noise(targets.fold_each(key_b, 3), video.shape[1:])
        parts = []
        for index, clip in enumerate((video, data)):
            frames, _ = noised(clip, level, targets.fold_each(targets.fold_each(key_b, 2), index))
            parts.append(frames.latents + away if index == moved else frames.latents)
        both = Frames(jnp.concatenate(parts), jnp.concatenate([level, level]), frames.layout)
        logits = critic.logits(both, repeat_rows(generated.conditions, 2))
        return logits[: len(video)], logits[len(video) :]


Matching = DMD | SiD | GAN


def noised(video: jax.Array, level: jax.Array, key_b: jax.Array) -> tuple[Frames, jax.Array]:
    """A video at levels `[b, f]`, as one chunk for a bidirectional network, and the noise in it."""
    frames = video.shape[1]
    noise = targets.clip_noise(key_b, video.shape[1:])
    return Frames(flow.interpolate(video, noise, level), level, chunk_layout(frames, frames)), noise


def disagreement(fake: jax.Array, real: jax.Array, level: jax.Array, counts: jax.Array) -> dict[str, jax.Array]:
    """How far critic and teacher are apart, by level: the distance that the student still has to go."""
    error = jax.lax.stop_gradient(targets.frame_error(fake, real))
    mask = jnp.broadcast_to(counts[None], error.shape)
    buckets = targets.level_buckets(error, level, mask)
    return {name.replace("loss_level", "disagreement_level"): value for name, value in buckets.items()}


def predict_clean(
    network: Any, frames: Frames, conditions: Conditions, guidance: Guidance, guided_below: float = 1.0
) -> jax.Array:
    """Guided clean prediction of a bidirectional network.

    Args:
        network: The network.
        frames: Noisy frames.
        conditions: Their conditions.
        guidance: Branches.
        guided_below: Above this level, the prediction of the branch that drops nothing.

    Returns:
        Clean latents `[b, f, h, w, c]`.
    """
    times = len(guidance)
    output = network((repeat_rows(frames, times),), fold(conditions, guidance), visibility=Bidirectional())
    prediction = combine(output.predictions[0], guidance)
    if guided_below < 1:
        plain = [not branch.drops for branch in guidance].index(True)
        alone = output.predictions[0].reshape(times, *prediction.shape)[plain]
        prediction = jnp.where(flow.per_frame(frames.level, prediction) > guided_below, alone, prediction)
    return flow.to_x0(network.config.prediction, prediction, frames.latents, frames.level)
