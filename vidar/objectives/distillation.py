"""Distillation of a teacher, or of data, into a few-step causal student.

Two choices make a method: where the student's videos come from (`forcing`) and what they are compared with
(`matching`). Self Forcing (arXiv 2506.08009) is self forcing with DMD, SiD or GAN; CausVid (arXiv 2412.07772) is
diffusion forcing with DMD. The critic follows the student, on its own videos.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
from flax import nnx

from vidar.errors import check_range
from vidar.models.discriminator import Discriminator
from vidar.models.frames import Batch
from vidar.objectives import targets
from vidar.objectives.forcing import Forcing, SelfForcing, TeacherForcing
from vidar.objectives.matching import DMD, GAN, Matching
from vidar.objectives.protocol import Aux, Metrics, Networks, Phase, Role, check_average
from vidar.sampling.axes import Axes


@dataclass(frozen=True)
class Distillation:
    """Match the distribution of a student's videos.

    Attributes:
        forcing: Where the student's videos come from.
        matching: What they are compared with.
        student: Trained weights that the student starts from, or `"init"`.
        teacher: Weights of the frozen bidirectional teacher.
        critic: Weights that the critic starts from; None for the teacher's.
        generator_every: The student is updated every this many steps, the critic at every step.
        one_batch: Whether student and critic of a step learn from one batch (CausVid) or each from its own.
        ema: Decay of the student's average, or None.
        ema_start: Step at which the average starts.
    """

    kind: ClassVar[str] = "distillation"
    forcing: Forcing = field(default_factory=SelfForcing)
    matching: Matching = field(default_factory=DMD)
    student: str = "init"
    teacher: str = "init"
    critic: str | None = None
    generator_every: int = 5
    one_batch: bool = False
    ema: float | None = 0.99
    ema_start: int = 200

    def __post_init__(self) -> None:
        check_range("objective.generator_every", self.generator_every, least=1)
        check_average(self.ema, self.ema_start)

    @property
    def beside(self) -> bool:
        """Whether clean clips stand beside noisy ones in a training pass."""
        return isinstance(self.forcing, TeacherForcing)

    @property
    def needs_clips(self) -> bool:
        """Whether clips of data are needed beside their conditions."""
        return self.forcing.needs_clips or not self.matching.needs_teacher

    @property
    def frames(self) -> int | None:
        """Frames of a clip of data, where they are not those of a training clip."""
        return getattr(self.forcing, "frames", None)

    @property
    def roles(self) -> Mapping[str, Role]:
        """Student and critic are trained; the teacher is frozen, where there is one."""
        wrap = partial(_with_heads, self.matching) if isinstance(self.matching, GAN) else None
        roles = {
            "student": Role(source=self.student, optimizer="student", ema=self.ema, ema_start=self.ema_start),
            "critic": Role(source=self.critic or self.teacher, optimizer="critic", wrap=wrap),
        }
        return roles | ({"teacher": Role(source=self.teacher)} if self.matching.needs_teacher else {})

    def init_aux(self) -> Aux:
        """No auxiliary state."""
        return ()

    def phases(self, step: int) -> tuple[Phase, ...]:
        """The critic at every step, the student before it at every `generator_every`-th."""
        warmup = self.matching.warmup if isinstance(self.matching, GAN) else 0
        batch = "main" if self.one_batch else "critic"
        if step < warmup:
            return (Phase("heads", "critic", trainable=_of_heads, batch=batch),)
        critic = Phase("critic", "critic", batch=batch, reset_optimizer=bool(warmup) and step == warmup)
        student = (Phase("student", "student"),) if (step - warmup) % self.generator_every == 0 else ()
        return (*student, critic)

    def loss(
        self, phase: str, networks: Networks, aux: Aux, axes: Axes, batch: Batch, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Aux]]:
        """The student's loss, or the critic's on fresh videos of the student."""
        # Student and critic of one step learn from videos of their own.
        key = jax.random.fold_in(key, int(phase != "student"))
        keys = targets.clip_keys(key, batch.index)
        learns = phase == "student"
        student = networks["student"] if learns else jax.lax.stop_gradient(networks["student"])
        generated = self.forcing.generate(student, batch, axes, key, targets.fold_each(keys, 0))
        if learns:
            loss, metrics = self.matching.student_loss(networks, generated, batch, keys)
            if batch.latents is not None:
                metrics = {**metrics, **targets.shift_against_data(generated.video, batch.latents, generated.counts)}
        else:
            generated = jax.lax.stop_gradient(generated)
            loss, metrics = self.matching.critic_loss(networks, generated, batch, keys)
        return loss, ({**metrics, **generated.metrics}, aux)


def _with_heads(matching: GAN, network: Any, key: jax.Array) -> Discriminator:
    return Discriminator(network, matching.heads, rngs=nnx.Rngs(key))


def _of_heads(path: str) -> bool:
    return not path.startswith(".network.")
