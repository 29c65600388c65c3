"""Composes a system from a config: networks, codec, axes and objective, with every check across axes.

A config names one choice per axis; `compose` turns it into a `System` or says in one line why it cannot be. This room
knows all axes and nothing of drivers, disks or servers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidar.attention.cache import ContextConfig
from vidar.attention.visibility import (
    Bidirectional,
    ChunkCausal,
    Identity,
    KeyRange,
    TeacherForcing,
    Visibility,
    Window,
    chunk_layout,
    leaks,
)
from vidar.checkpoint import load_item
from vidar.config import build, to_dict
from vidar.diffusion.levels import LevelsConfig
from vidar.diffusion.plan import Commit
from vidar.errors import CheckpointError, ConfigError, DataError, check_range
from vidar.models.codecs.pixel import PixelCodec
from vidar.models.codecs.taehv import TAEHVConfig
from vidar.models.codecs.wan_vae import WanVAEConfig
from vidar.models.dit import DiT, DiTConfig
from vidar.models.frames import Batch, Conditions
from vidar.models.layers import FLOATS
from vidar.models.lora import LoraConfig, init_adapters, merge
from vidar.models.presets import preset
from vidar.objectives import consistency, diffusion, distillation, ode_regression, teacher_forcing
from vidar.objectives.matching import GAN
from vidar.objectives.protocol import Aux, Metrics, Networks, Objective, Phase, Role
from vidar.sampling.axes import Axes
from vidar.sampling.guidance import UNGUIDED, Guidance
from vidar.sampling.rollout import Sampler
from vidar.sampling.solvers import Euler, FewStep, Solver
from vidar.sharding import Rules
from vidar.weights import SUFFIX, load_weights, read_meta

Objectives = (
    diffusion.Diffusion
    | teacher_forcing.TeacherForcing
    | distillation.Distillation
    | consistency.Consistency
    | ode_regression.OdeRegression
)
Codec = PixelCodec | WanVAEConfig | TAEHVConfig
Pattern = Bidirectional | ChunkCausal | TeacherForcing | Identity | KeyRange


@dataclass(frozen=True)
class VideoConfig:
    """The clips that a system is trained on.

    Attributes:
        height: Pixel height.
        width: Pixel width.
        frames: Latent frames of a clip.
        chunk: Latent frames a chunk.
        independent_first_frame: Whether the first frame is a chunk of its own.
    """

    height: int = 16
    width: int = 16
    frames: int = 8
    chunk: int = 1
    independent_first_frame: bool = False

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "chunk"):
            check_range(f"video.{name}", getattr(self, name), least=1)


@dataclass(frozen=True)
class PlanConfig:
    """How the student generates.

    Attributes:
        lag: Solver steps between the starts of two chunks; None for one chunk after the other, 0 for all at once.
        commit: How finished chunks enter the context.
    """

    lag: int | None = None
    commit: Commit = field(default_factory=lambda: Commit("extra_pass"))


@dataclass(frozen=True)
class RoleConfig:
    """What one role's network takes of the machine; what is None stays as the objective has it.

    Attributes:
        dtype: Storage type of frozen parameters.
        rules: Logical axes of its parameters to mesh axes.
        lora: Low-rank adapters that are trained in place of its parameters.
        ema_memory: Where its average waits: `"device"` or `"host"`.
    """

    dtype: str | None = None
    rules: Rules | None = None
    lora: LoraConfig | None = None
    ema_memory: Literal["device", "host"] | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in FLOATS:
            raise ConfigError(f"dtype={self.dtype!r} must be one of {', '.join(FLOATS)}")

    def apply(self, role: Role) -> Role:
        """The role with these choices."""
        chosen = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return replace(role, **{name: value for name, value in chosen.items() if value is not None})


@dataclass(frozen=True)
class SystemConfig:
    """One choice on each axis.

    Attributes:
        objective: The loss and its networks; a `kind` of the form `package.module:Class` names one defined elsewhere.
        video: Clips.
        codec: Pixels to latents.
        model: The student's network.
        teacher: The teacher's network; None for the student's.
        critic: The critic's network; None for the teacher's.
        roles: What each role's parameters cost: types, placement, adapters; by role.
        visibility: Who sees whom in training; the window is added from `context`.
        levels: Training levels.
        solver: Solver of generation.
        plan: Plan of generation.
        context: Window, sink and positions.
        guidance: Branches of generation.
        drop: Probability that a training clip's conditions are dropped.
    """

    objective: Objectives
    video: VideoConfig = field(default_factory=VideoConfig)
    codec: Codec = field(default_factory=PixelCodec)
    model: DiTConfig = field(default_factory=DiTConfig)
    teacher: DiTConfig | None = None
    critic: DiTConfig | None = None
    roles: Mapping[str, RoleConfig] = field(default_factory=dict)
    visibility: Pattern = field(default_factory=ChunkCausal)
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    solver: Solver = field(default_factory=Euler)
    plan: PlanConfig = field(default_factory=PlanConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    guidance: Guidance = UNGUIDED
    drop: float = 0.0


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
                `text` holds states `[b, s, c]`, or tokens `[b, s]` for a network with a text encoder.

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
        conditions = Conditions(**{name: batch[name] for name, wanted in used.items() if wanted})
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


def load(source: str | Path, role: str = "student") -> tuple[System, DiT]:
    """Loads a trained network with its system, from a run's directory or a weights file.

    Args:
        source: Directory of a run (with `checkpoints/`), or a `.safetensors` file.
        role: Which network; its average is taken where there is one.

    Returns:
        The system that it was trained in, and the network.

    Raises:
        CheckpointError: There is nothing to load, or it does not fit its own config.
    """
    source = Path(source)
    if source.suffix == SUFFIX:
        systems = read_meta(source).get("systems")
        if not isinstance(systems, dict):
            raise CheckpointError(f"{source}: not a weights file of vidar's (its header has no systems)")
        _check_role(source, role, systems)
        system = compose(system_config(systems[role]))
        template = jax.eval_shape(partial(system.build, role), jax.random.key(0))
        return system, load_weights(source, role, template)
    directory = source / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(f"{source}: neither a {SUFFIX} file nor the directory of a run (no checkpoints/ in it)")
    meta = load_item(directory, "meta", None)
    if "config" not in meta:
        raise CheckpointError(f"{source}: its checkpoints do not say what they were trained with (meta has no config)")
    system = compose(system_config(meta["config"]))
    _check_role(source, role, [name for name, one in system.objective.roles.items() if one.optimizer is not None])
    template = jax.eval_shape(partial(system.trainable, role), jax.random.key(0))
    choice = system.roles[role]
    if choice.ema is not None:
        trained = load_item(directory, "ema", {role: template})[role]
    else:
        trained = load_item(directory, "state", {"networks": {role: template}})["networks"][role]
    if choice.lora is None:
        return system, trained
    return system, merge(load(choice.source, stored_role(choice.source, role))[1], trained)


def stored_role(source: str, role: str) -> str:
    """Under which role a source keeps what a role starts from: files name their roles, of a run it is the student."""
    return "teacher" if role in ("teacher", "critic") and source.endswith(SUFFIX) else "student"


def _check_role(source: Path, role: str, known: Collection[str]) -> None:
    if role not in known:
        raise CheckpointError(f"{source}: holds no network {role!r}; it has {', '.join(known) or 'none'}")


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
    _check_video(video)
    check_range("drop", config.drop, least=0, most=1)
    config.context.check(video.chunk, video.independent_first_frame)
    for role, network in (("model", model), ("teacher", config.teacher), ("critic", config.critic)):
        if network is not None and network.channels != config.codec.channels:
            raise ConfigError(
                f"{role}.channels={network.channels}, but the codec gives {config.codec.channels} channels"
            )
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
    _check_objective(config, sampler)
    _check_plan(config, sampler)
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


def system_config(mapping: Mapping[str, Any], cls: type = SystemConfig) -> Any:
    """Builds a config dataclass from a dictionary, filling presets in.

    Args:
        mapping: Dictionary or `ConfigDict`; `model`, `teacher` and `critic` may name a `preset`, whose fields they
            override.
        cls: `SystemConfig` or a subclass.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: Unknown key or preset, wrong type.
    """
    entries = {key: mapping[key] for key in mapping}
    for role in ("model", "teacher", "critic"):
        given = entries.get(role)
        if given is not None and hasattr(given, "keys") and "preset" in given:
            given = {key: given[key] for key in given}
            entries[role] = to_dict(preset(given.pop("preset")).model) | given
    return build(cls, entries)


def _generation(config: SystemConfig) -> Visibility:
    """Visibility of generation: the training pattern without its clean half."""
    pattern = config.visibility
    return windowed(ChunkCausal() if isinstance(pattern, TeacherForcing) else pattern, config.context)


def _check_video(video: VideoConfig) -> None:
    head = 1 if video.independent_first_frame else 0
    if (video.frames - head) % video.chunk:
        fits = head + video.chunk * max(1, round((video.frames - head) / video.chunk))
        raise ConfigError(
            f"video.frames={video.frames} is not a whole number of chunks of {video.chunk}"
            f"{' after the first frame' if head else ''}; {fits} would be"
        )


def _check_plan(config: SystemConfig, sampler: Sampler) -> None:
    program = sampler.program
    if not program.lag:
        return
    frames = config.video.frames
    if config.context.window is not None:
        frames = max(frames, 2 * config.context.window)
    layout = chunk_layout(frames, config.video.chunk, independent_first_frame=config.video.independent_first_frame)
    if leaks(sampler.visibility, layout):
        raise ConfigError(
            f"visibility {type(config.visibility).__name__} lets frames see later chunks, so cached keys would be "
            "wrong: use chunk_causal, or plan.lag=0 to generate the whole clip at once"
        )
    if config.context.window is None and config.context.positions == "relative":
        raise ConfigError("context.positions='relative' needs a window: set context.window")
    fused = config.plan.commit.kind == "fused"
    if fused and config.plan.commit.drops:
        raise ConfigError(
            f"plan.commit.drops={config.plan.commit.drops} needs a pass of its own, since a fused row shares its "
            "conditions with the next chunk: use plan.commit.kind='extra_pass'"
        )
    if config.context.positions == "relative" and config.context.sink and (program.width > 1 or fused):
        raise ConfigError(
            "context.positions='relative' with a sink runs one chunk at a time, because each chunk sees the sink "
            "elsewhere: use plan.lag=None and an extra_pass commit, or context.sink=0"
        )
    if config.model.backend != "xla" and (program.width > 1 or fused):
        raise ConfigError(
            f"model.backend={config.model.backend!r} runs one chunk at a time: use backend='xla' for "
            f"lag={program.lag} of {program.steps} steps with a {config.plan.commit.kind} commit"
        )


def _check_objective(config: SystemConfig, sampler: Sampler) -> None:
    objective, pattern = config.objective, config.visibility
    beside = getattr(objective, "beside", False)
    if isinstance(objective, Objectives) and beside != isinstance(pattern, TeacherForcing):
        raise ConfigError(
            f"objective {type(objective).__name__} and visibility {type(pattern).__name__} do not go together: "
            "visibility teacher_forcing is for objectives with clean clips beside noisy ones, which need it"
        )
    if isinstance(objective, distillation.Distillation):
        _check_distillation(config, objective, sampler)
    if isinstance(objective, ode_regression.OdeRegression):
        _check_ode_regression(config, objective, sampler)
    levels = getattr(config.levels.base, "levels", None)
    if levels is not None and not np.all(np.diff(levels) < 0):
        raise ConfigError(f"levels.base.levels={levels} must descend")


def _check_ode_regression(config: SystemConfig, objective: ode_regression.OdeRegression, sampler: Sampler) -> None:
    video = config.video
    chunks = chunk_layout(video.frames, video.chunk, independent_first_frame=sampler.first).chunks[-1] + 1
    if objective.given >= chunks:
        raise ConfigError(
            f"objective.given={objective.given} of {chunks} chunks leaves none to learn: give 0 … {chunks - 1}"
        )


def _check_distillation(config: SystemConfig, objective: distillation.Distillation, sampler: Sampler) -> None:
    forcing, video = objective.forcing, config.video
    if config.plan.lag not in (None, config.solver.steps) or config.plan.commit.kind != "extra_pass":
        raise ConfigError("distillation rolls out one chunk at a time: use plan.lag=None and an extra_pass commit")
    if not isinstance(config.solver, FewStep):
        raise ConfigError(
            f"distillation makes a few-step student: use solver.kind='few_step', not {config.solver.kind!r}"
        )
    chunks = chunk_layout(video.frames, video.chunk, independent_first_frame=sampler.first).chunks
    if not 0 <= forcing.given <= chunks[-1]:
        raise ConfigError(
            f"objective.forcing.given={forcing.given} of {chunks[-1] + 1} chunks leaves none to generate: "
            f"give 0 … {chunks[-1]}"
        )
    if video.independent_first_frame and not forcing.given:
        raise ConfigError("distillation with an independent first frame needs it given: set objective.forcing.given=1")
    frames = objective.frames
    if frames is not None and (frames < video.frames or (frames - video.frames) % video.chunk):
        raise ConfigError(
            f"objective.forcing.frames={frames} must be video.frames={video.frames} "
            f"and whole chunks of {video.chunk} more"
        )
    if isinstance(objective.matching, GAN):
        objective.matching.heads.blocks((config.critic or config.teacher or config.model).layers)
