"""What an ablation is: grid, budget, evaluation, and the one contrast that is named beforehand.

A card is a Python file whose `get_config()` returns a `ConfigDict` of these fields (`configs/ablations/*.py`). This
module holds plain values and checks what needs no network; it must not know how anything is run.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vidar.ablation.measures import DoomEvaluation, WorldEvaluation
from vidar.config import build
from vidar.config import load as load_card
from vidar.errors import ConfigError, check_range

_NAME = re.compile(r"[A-Za-z0-9_+]+")


@dataclass(frozen=True)
class Variant:
    """A change of an experiment card.

    Attributes:
        card: Experiment card to start from, relative to the ablation's card or to the repository; of several changes
            that apply to one cell, the last one that names a card decides. None leaves it.
        overrides: Nested values that replace the card's. A section is merged key by key, unless it names another
            `kind` than the card's: then it replaces the section. The text `"stage:NAME"` stands for the directory of a
            stage's run wherever a path is wanted (`objective.teacher`, `objective.start`).
    """

    card: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Combination:
    """A change for some combinations of levels, applied after those of the levels themselves.

    Attributes:
        where: Level by factor; cells that have all of them are meant.
        card: As in `Variant`.
        overrides: As in `Variant`.
    """

    where: Mapping[str, str]
    card: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WorldData:
    """A data set of the procedural world, made below the output directory; runs with a `vidar_world/…` set read it.

    Attributes:
        clips: Clips of the training split.
        validation_clips: Clips of the validation split.
        config: `one_shape` or another of the world's.
        frames: Frames of a clip.
        seed: Seed of the set.
    """

    clips: int
    validation_clips: int = 64
    config: str = "one_shape"
    frames: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Budget:
    """What every cell may spend on its own training; stages are shared and counted beside it.

    Attributes:
        unit: `"updates"`: the network of `role` gets exactly `amount` updates, however many steps that takes.
            `"flops"`: as many steps as fit into `amount` counted matrix FLOPs of all phases, those of teacher and
            critic included (`vidar/ablation/cost.py`). `"seconds"`: wall time of the training, compilation included.
        amount: How much.
        role: Role whose updates are counted.
    """

    unit: Literal["updates", "flops", "seconds"]
    amount: float
    role: str = "student"

    def __post_init__(self) -> None:
        check_range("amount", self.amount, above=0)
        if self.unit == "updates" and self.amount != int(self.amount):
            raise ConfigError(f"amount={self.amount} updates: give a whole number")


@dataclass(frozen=True)
class Contrast:
    """The one comparison that is named before anything runs: `better` is expected to beat `worse`.

    Attributes:
        metric: Metric of the evaluation.
        span: Name of one of the evaluation's spans, whose frames are averaged.
        better: Names of cells; several are averaged.
        worse: As many cells, each compared with the one of `better` at its place.
    """

    metric: str
    span: str
    better: tuple[str, ...]
    worse: tuple[str, ...]

    def __post_init__(self) -> None:
        both = sorted(set(self.better) & set(self.worse))
        if both:
            raise ConfigError(f"cell {both[0]!r} stands in better and in worse; it cannot beat itself")


@dataclass(frozen=True)
class Control:
    """The positive control: cells are evaluated again with a known harm done to their context while sampling.

    It shows how small an effect metric and clips are able to see in one and the same network; how much networks that
    are trained with other seeds differ is not in it.

    Attributes:
        corrupt: `"commit"`: finished chunks enter the context with real noise up to a level. `"given"`: the given
            frames are blended with noise by a share.
        amounts: Levels or shares, ascending, in (0, 1].
        cells: Names of cells; none for all of the grid.
    """

    corrupt: Literal["commit", "given"]
    amounts: tuple[float, ...]
    cells: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.amounts or list(self.amounts) != sorted(set(self.amounts)):
            raise ConfigError(f"amounts={self.amounts} must be one or more, ascending")
        for amount in self.amounts:
            check_range("amounts", amount, above=0, most=1)


@dataclass(frozen=True)
class AblationConfig:
    """A grid of configs and seeds under equal budgets. Names are sorted: the order in a card does not matter.

    Attributes:
        name: Name of the ablation.
        evaluation: What every trained cell is measured by.
        budget: What every cell may spend.
        contrast: The comparison named beforehand.
        factors: By factor and level, the level's change; the cells of the grid are their product, named by their
            levels in the order of the factors' names, such as `one-self_forcing`.
        seeds: Each cell is trained once with each, as seed of `training` and of `data`: the independent units.
        base: Change that comes before all others, usually the common card.
        combinations: Changes for some combinations of levels.
        extra: Cells outside the grid by name, made from `base` and their own change; reported separately.
        stages: Pre-training runs by name, from `base` and their own change unless they name a card; each runs once, as
            long as its card says, and is shared by all cells and later stages that name it (`"stage:NAME"`).
        control: The positive control.
        world: Data set that is made on the spot.
        text: What the ablation asks, for the report.
    """

    name: str
    evaluation: WorldEvaluation | DoomEvaluation
    budget: Budget
    contrast: Contrast
    factors: Mapping[str, Mapping[str, Variant]]
    seeds: tuple[int, ...] = (0, 1, 2)
    base: Variant = Variant()
    combinations: tuple[Combination, ...] = ()
    extra: Mapping[str, Variant] = field(default_factory=dict)
    stages: Mapping[str, Variant] = field(default_factory=dict)
    control: Control | None = None
    world: WorldData | None = None
    text: str = ""

    def __post_init__(self) -> None:
        if not self.factors or not all(self.factors.values()):
            raise ConfigError("factors: give one or more, each with one or more levels")
        levels = [level for factor in self.factors.values() for level in factor]
        for name in (self.name, *self.factors, *levels, *self.extra, *self.stages):
            if not _NAME.fullmatch(name):
                raise ConfigError(f"name {name!r}: use letters, digits, _ and +; it becomes part of a path")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds={self.seeds} must be one or more, each once")
        for seed in self.seeds:
            check_range("seeds", seed, least=0)
        for number, entry in enumerate(self.combinations):
            for factor, level in entry.where.items():
                known = sorted(self.factors.get(factor, self.factors))
                if factor not in self.factors or level not in self.factors[factor]:
                    raise ConfigError(f"combinations[{number}].where: no {factor}={level}; known: {', '.join(known)}")
        self._check_contrast()

    def _check_contrast(self) -> None:
        directions = self.evaluation.directions
        contrast = self.contrast
        if contrast.span not in self.evaluation.measured:
            raise ConfigError(
                f"contrast.span={contrast.span!r} is not among evaluation.spans: "
                f"{', '.join(sorted(self.evaluation.measured))}"
            )
        if contrast.metric not in directions or contrast.metric not in self.evaluation.metrics_of(contrast.span):
            known = [name for name in self.evaluation.metrics_of(contrast.span) if name in directions]
            raise ConfigError(
                f"contrast.metric={contrast.metric!r}: over {contrast.span!r} there are {', '.join(sorted(known))}"
            )
        if not contrast.better or len(contrast.better) != len(contrast.worse):
            raise ConfigError("contrast: give as many cells as better as there are as worse, at least one")


def load_ablation(path: str | Path, overrides: Sequence[str] = ()) -> AblationConfig:
    """Reads an ablation's card with overrides such as `--config.budget.amount=10`.

    Args:
        path: Python file with `get_config()`.
        overrides: Flags; see `vidar.config.load`.

    Returns:
        The ablation.

    Raises:
        ConfigError: The file is not such a card, or its choices contradict each other.
    """
    return build(AblationConfig, load_card(path, overrides), "ablation")
