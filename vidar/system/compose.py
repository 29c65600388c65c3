"""A composed system, and how it comes from its config."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vidar.attention.cache import ContextConfig
from vidar.attention.visibility import ChunkCausal, TeacherForcing, Visibility, Window
from vidar.errors import DataError
from vidar.models.codecs.pixel import PixelCodec
from vidar.models.dit import DiT, DiTConfig
from vidar.models.frames import Batch, Conditions
from vidar.models.lora import init_adapters
from vidar.objectives.protocol import Aux, Metrics, Networks, Objective, Phase, Role
from vidar.sampling.axes import Axes
from vidar.sampling.rollout import Sampler
from vidar.system.checks import check_choices, check_parts
from vidar.system.config import RoleConfig, SystemConfig


@dataclass(frozen=True)
class System:
    """A composed system.

    Attributes:
        config: What it was composed from.
        objective: The objective.
        axes: The axes, for the objective.
    """

    config: SystemConfig
    objective: Objective
    axes: Axes

    @property
    def sampler(self) -> Sampler:
        """How the student generates."""
        return self.axes.sampler

    def model_config(self, role: str) -> DiTConfig:
        """Network of a role: teacher and critic may differ from the student."""
        config = self.config
        teacher = config.teacher or config.model
        return {"teacher": teacher, "critic": config.critic or teacher}.get(role, config.model)

    @property
    def roles(self) -> Mapping[str, Role]:
        """Roles of the objective, each with what the config says of it."""
        none = RoleConfig()
        return {name: self.config.roles.get(name, none).apply(role) for name, role in self.objective.roles.items()}

    def build(self, role: str, key: jax.Array) -> DiT:
        """Creates a role's network.

        Args:
            role: `student`, `teacher` or `critic`.
            key: Source of the initial values.

        Returns:
            The network.
        """
        return DiT(self.model_config(role), rngs=nnx.Rngs(key))

    def wrapped(self, role: str, network: Any, key: jax.Array) -> Any:
        """A role's network with what is trained around it, which is new."""
        wrap = self.roles[role].wrap
        return network if wrap is None else wrap(network, key)

    def trainable(self, role: str, key: jax.Array) -> Any:
        """What is trained of a role, with random values: adapters, or the network with all around it."""
        lora = self.roles[role].lora
        if lora is not None:
            return init_adapters(jax.eval_shape(partial(self.build, role), key), lora, key)
        return self.wrapped(role, self.build(role, key), jax.random.fold_in(key, 1))

    def prepare(self, batch: Mapping[str, Any]) -> Batch:
        """Turns a batch of arrays as data pipelines yield them into what objectives see; runs inside a compiled step.

        Args:
            batch: `pixels` uint8 `[b, f, h, w, 3]` (or `latents`), `index`, and conditions that the network uses;
                `text` holds states `[b, s, c]`, or tokens `[b, s]` for a network with a text encoder; `negative` those
                that stand for dropped text, if zeros do not.

        Returns:
            The batch, with pixels encoded; without latents where there are prompts alone.

        Raises:
            DataError: A condition that the network uses is missing, or pixels need a codec that has weights.
        """
        codec = self.config.codec
        if "latents" in batch or "pixels" not in batch:
            latents = batch.get("latents")
        elif isinstance(codec, PixelCodec):
            latents = codec.encode(batch["pixels"])
        else:
            raise DataError(f"the batches hold pixels, which codec {codec.kind} does not encode while training")
        model = self.config.model
        used = {"text": model.text, "actions": model.actions, "label": model.classes}
        missing = [name for name, wanted in used.items() if wanted and name not in batch]
        if missing:
            raise DataError(f"the network needs {' and '.join(missing)}, which the batches lack: {sorted(batch)}")
        known = {name: batch[name] for name, wanted in used.items() if wanted}
        conditions = Conditions(**known, negative=batch.get("negative"))
        return Batch(latents, conditions, batch["index"].astype(jnp.int32), batch.get("trajectory"))


@dataclass(frozen=True)
class OnData:
    """An objective on batches as pipelines yield them: pixels are encoded inside the compiled step.

    Attributes:
        system: The system whose objective it is.
    """

    system: System

    @property
    def roles(self) -> Mapping[str, Role]:
        """Roles of the objective."""
        return self.system.roles

    def init_aux(self) -> Aux:
        """Auxiliary state of the objective."""
        return self.system.objective.init_aux()

    def phases(self, step: int) -> tuple[Phase, ...]:
        """Phases of the objective."""
        return self.system.objective.phases(step)

    def loss(
        self, phase: str, networks: Networks, aux: Aux, axes: Axes, batch: Any, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Aux]]:
        """Loss of the objective on the prepared batch."""
        return self.system.objective.loss(phase, networks, aux, axes, self.system.prepare(batch), step, key)


def compose(config: SystemConfig) -> System:
    """Composes a system and checks that its choices fit together.

    Args:
        config: One choice on each axis.

    Returns:
        The system.

    Raises:
        ConfigError: Choices contradict each other; one line says which and what would be right.
    """
    video, model = config.video, config.model
    height, width = config.codec.latent_size(video.height, video.width)
    check_parts(config)
    sampler = Sampler(
        visibility=_generation(config),
        latent=(height, width, config.codec.channels),
        tokens=model.tokens(height, width),
        frames=video.frames,
        chunk=video.chunk,
        solver=config.solver,
        lag=config.plan.lag,
        commit=config.plan.commit,
        context=config.context,
        guidance=config.guidance,
        first=video.independent_first_frame,
        cache_dtype=model.precision.compute,
    )
    check_choices(config, sampler)
    axes = Axes(config.levels, windowed(config.visibility, config.context), sampler, config.drop)
    return System(config, config.objective, axes)


def streaming_sampler(
    system: System,
    window: int | None = None,
    sink: int | None = None,
    positions: str | None = None,
    first: bool = False,
) -> Sampler:
    """The system's sampler with a context for endless video.

    Args:
        system: The system.
        window: Frames a chunk may see; None takes the trained window, or the training length where there was none.
        sink: First frames that stay in view; None takes the trained sink.
        positions: `"absolute"` or `"relative"`; None takes the trained choice.
        first: Whether a first frame, which is given, is a chunk of its own although none was in training.

    Returns:
        The sampler.

    Raises:
        ConfigError: The ring does not align with the chunks.
    """
    trained, video = system.config.context, system.config.video
    alone = first and not video.independent_first_frame
    # A frame of its own stays in view unless said otherwise, beside what was in view in training.
    head = 1 % video.chunk if alone else 0
    context = ContextConfig(
        (trained.window or video.frames) + head if window is None else window,
        trained.sink + head if sink is None else sink,
        positions or trained.positions,
    )
    first = first or video.independent_first_frame
    context.check(video.chunk, first)
    visibility = _generation(replace(system.config, context=context))
    return replace(system.sampler, context=context, visibility=visibility, first=first)


def windowed(visibility: Visibility, context: ContextConfig) -> Visibility:
    """The visibility within the context's window."""
    return visibility if context.window is None else visibility & Window(context.window, context.sink)


def _generation(config: SystemConfig) -> Visibility:
    """Visibility of generation: the training pattern without its clean half."""
    pattern = config.visibility
    return windowed(ChunkCausal() if isinstance(pattern, TeacherForcing) else pattern, config.context)
