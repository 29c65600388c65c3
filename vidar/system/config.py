"""What a system is composed from: one choice on each axis."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from vidar.attention.cache import ContextConfig
from vidar.attention.visibility import Bidirectional, ChunkCausal, Identity, KeyRange, TeacherForcing
from vidar.config import build, to_dict
from vidar.diffusion.levels import LevelsConfig
from vidar.diffusion.plan import Commit
from vidar.errors import ConfigError, check_range
from vidar.models.codecs.pixel import PixelCodec
from vidar.models.codecs.taehv import TAEHVConfig
from vidar.models.codecs.wan_vae import WanVAEConfig
from vidar.models.dit import DiTConfig
from vidar.models.layers import FLOATS
from vidar.models.lora import LoraConfig
from vidar.models.presets import preset
from vidar.objectives import consistency, diffusion, distillation, ode_regression, teacher_forcing
from vidar.objectives.protocol import Role
from vidar.sampling.guidance import UNGUIDED, Guidance
from vidar.sampling.solvers import Euler, Solver
from vidar.sharding import Rules

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
