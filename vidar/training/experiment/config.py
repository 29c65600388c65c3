"""What an experiment card says: a system, its data and its training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vidar.config import load
from vidar.data.pipeline import DataConfig
from vidar.errors import ConfigError, check_range
from vidar.sharding import MeshConfig
from vidar.system import SystemConfig, system_config
from vidar.training.config import TrainingConfig
from vidar.training.optimizers import OptimizerConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """What is generated from held-out clips while training.

    Attributes:
        split: Split of the data.
        clips: Clips that are generated.
        given: Frames of each clip that are given; may be 0 where a text says what is to be seen.
        frames: Frames of each generated clip, given ones included; None for the training length.
        rows: Clips shown on a sample sheet.
    """

    split: str = "validation"
    clips: int = 16
    given: int = 1
    frames: int | None = None
    rows: int = 4

    def __post_init__(self) -> None:
        for name, least in (("clips", 1), ("given", 0), ("rows", 1)):
            check_range(f"evaluation.{name}", getattr(self, name), least=least)


@dataclass(frozen=True)
class RunConfig(SystemConfig):
    """A system with its data and its training.

    Attributes:
        data: Clips and batches.
        training: Length and rhythm.
        optimizers: By the name that roles use.
        mesh: Sizes of the mesh axes.
        evaluation: Generation from held-out clips.
        embeddings: Directory of the text states of all captions (`vidar data embeddings`), for models with text.
        negative: Text that stands for dropped text, such as a negative prompt or `""`; its states are there, too. None
            for zeros.
    """

    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=1000))
    optimizers: Mapping[str, OptimizerConfig] = field(default_factory=dict)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    embeddings: str | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        if self.negative is not None and self.embeddings is None:
            raise ConfigError("negative: is looked up in embeddings, which is not set")


def load_run_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Reads an experiment card with overrides such as `--config.training.steps=10`."""
    return system_config(load(path, overrides), RunConfig)
