"""From a card to the runs that it means: stages, cells and seeds, each composed and checked before anything runs.

This module merges cards and overrides and counts steps; it must not know disks' layouts, processes or results.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import vidar
from vidar.ablation.card import AblationConfig, Budget, Combination, Control, Variant, WorldData
from vidar.ablation.measures import Evaluation
from vidar.ablation.rollouts import stream_sampler
from vidar.config import load as load_card
from vidar.config import to_dict
from vidar.errors import ConfigError, VidarError
from vidar.models.codecs.pixel import PixelCodec
from vidar.system import compose, system_config
from vidar.training.experiment import RunConfig

STAGE = "stage:"
_WORLD = "vidar_world/"
# A budget in seconds ends a run long before; objectives are asked for the phases of each step.
_MOST_STEPS = 200_000


@dataclass(frozen=True)
class Trained:
    """One training run that a card means, with places still by name.

    Attributes:
        name: Name of the stage or cell.
        config: Its whole config; sources may be `"stage:NAME"`.
        stages: Names of the stages that it starts from.
    """

    name: str
    config: RunConfig
    stages: tuple[str, ...]

    @property
    def document(self) -> dict[str, Any]:
        """The config as plain values."""
        return json.loads(json.dumps(to_dict(self.config)))

    def placed(self, stages: Path, data: Path | None) -> RunConfig:
        """The config with directories for names: of the stages, and of the data that the ablation made, if it did."""
        document = _substituted(self.document, stages)
        if data is not None and (document["data"]["tfds"] or "").startswith(_WORLD):
            document["data"]["directory"] = str(data)
        return system_config(document, RunConfig)


@dataclass(frozen=True)
class Cell:
    """One combination of levels, or an extra one.

    Attributes:
        name: Its name.
        levels: Level by factor; none for an extra cell.
        run: What is trained, with the card's own seeds.
    """

    name: str
    levels: Mapping[str, str]
    run: Trained

    def seeded(self, seed: int) -> Trained:
        """The run with a seed, which draws initial weights, noise and the order of the data."""
        config = self.run.config
        return replace(
            self.run,
            name=f"{self.name}-seed{seed}",
            config=replace(config, training=replace(config.training, seed=seed), data=replace(config.data, seed=seed)),
        )


@dataclass(frozen=True)
class Grid:
    """All that an ablation trains.

    Attributes:
        ablation: Its card.
        stages: By name, in an order in which each follows those that it starts from.
        cells: Those of the grid, then the extra ones.
    """

    ablation: AblationConfig
    stages: Mapping[str, Trained]
    cells: tuple[Cell, ...]

    @property
    def units(self) -> tuple[tuple[Cell, int], ...]:
        """Each cell with each seed; all cells of a seed follow each other, so that a part of them is comparable."""
        return tuple((cell, seed) for seed in self.ablation.seeds for cell in self.cells)

    def needed(self, runs: Iterable[Trained]) -> tuple[str, ...]:
        """Names of the stages that runs start from, directly or not, in order."""
        wanted = {stage for run in runs for stage in run.stages}
        for name in reversed(list(self.stages)):
            if name in wanted:
                wanted |= set(self.stages[name].stages)
        return tuple(name for name in self.stages if name in wanted)

    def document(self) -> dict[str, Any]:
        """Plain values that determine the whole ablation."""
        ablation = to_dict(self.ablation)
        kept = ("name", "budget", "evaluation", "contrast", "control", "seeds", "world")
        cells = {cell.name: {"levels": dict(cell.levels), "run": cell.run.document} for cell in self.cells}
        stages = {name: run.document for name, run in self.stages.items()}
        return {name: ablation[name] for name in kept} | {"stages": stages, "cells": cells}

    def unit_document(self, cell: Cell, seed: int) -> dict[str, Any]:
        """Plain values that determine one cell with one seed."""
        run, ablation = cell.seeded(seed), to_dict(self.ablation)
        kept = {name: ablation[name] for name in ("budget", "evaluation", "world")}
        stages = {name: self.stages[name].document for name in self.needed([run])}
        return kept | {"control": self.control_of(cell), "run": run.document, "stages": stages}

    def stage_document(self, name: str) -> dict[str, Any]:
        """Plain values that determine one stage."""
        before = {other: self.stages[other].document for other in self.needed([self.stages[name]])}
        return {"run": self.stages[name].document, "stages": before, "world": to_dict(self.ablation.world)}

    def control_of(self, cell: Cell) -> dict[str, Any] | None:
        """The positive control of a cell as plain values; None where it has none."""
        control = self.ablation.control
        return None if control is None or not _controlled(control, cell) else to_dict(control) | {"cells": None}


def completed(document: Any) -> Any:
    """A document of any `Grid` as this version writes it: options that its runs did not know are their defaults."""
    if not isinstance(document, dict):  # a damaged one
        return document
    whole = dict(document)
    if "run" in whole:
        whole["run"] = _completed_run(whole["run"])
    if "stages" in whole:
        whole["stages"] = {name: _completed_run(run) for name, run in whole["stages"].items()}
    if "cells" in whole:
        whole["cells"] = {name: completed(cell) for name, cell in whole["cells"].items()}
    return whole


def _completed_run(document: Mapping[str, Any]) -> Any:
    try:
        return Trained("", system_config(document, RunConfig), ()).document
    except ConfigError:  # of another version: what differs is said by whoever compares
        return document


def expand(ablation: AblationConfig, card: str | Path) -> Grid:
    """Composes every stage and cell.

    Args:
        ablation: The ablation.
        card: File of its card; experiment cards are looked for beside it, then in the repository.

    Returns:
        The grid.

    Raises:
        ConfigError: A card, an override or a combination cannot be; one line says which and where.
    """
    places = (Path(card).resolve().parent, Path(vidar.__file__).resolve().parent.parent)
    stages = _ordered({name: _stage(ablation, name, places) for name in sorted(ablation.stages)})
    factors = {name: sorted(ablation.factors[name]) for name in sorted(ablation.factors)}
    cells = []
    for levels in itertools.product(*factors.values()):
        where = dict(zip(factors, levels, strict=True))
        changes: list[Variant | Combination] = [ablation.factors[factor][level] for factor, level in where.items()]
        changes += [entry for entry in ablation.combinations if entry.where.items() <= where.items()]
        cells.append(Cell("-".join(levels), where, _cell(ablation, "-".join(levels), changes, places)))
    for name in sorted(ablation.extra):
        cells.append(Cell(name, {}, _cell(ablation, name, [ablation.extra[name]], places)))
    grid = Grid(ablation, stages, tuple(cells))
    _check(grid)
    return grid


def steps_for(objective: Any, budget: Budget) -> int:
    """Counts the steps after which a role has had exactly its updates.

    Args:
        objective: Names the phases of every step.
        budget: In updates.

    Returns:
        The smallest such number of steps.

    Raises:
        ConfigError: The role is never updated, or never has exactly so many.
    """
    wanted, done = int(budget.amount), 0
    for step in range(_MOST_STEPS):
        done += sum(phase.role == budget.role for phase in objective.phases(step))
        if done == wanted:
            return step + 1
        if done > wanted:
            raise ConfigError(f"has {done} updates of {budget.role} after {step + 1} steps, never {wanted}")
    raise ConfigError(f"updates {budget.role} {done} times in {_MOST_STEPS} steps, not {wanted}")


def merged(card: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Puts overrides over a card's values: sections key by key, or whole where they name another kind."""
    result = dict(card)
    for key, value in overrides.items():
        old = result.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            value = merged(old, value)
        result[key] = value
    return result


# ------------------------------------------------------------------------------------------------------ one run


def _stage(ablation: AblationConfig, name: str, places: tuple[Path, ...]) -> Trained:
    stage = ablation.stages[name]
    # A stage with a card of its own shares nothing with the cells.
    changes = [stage] if stage.card else [ablation.base, stage]
    config = _config(f"stages.{name}", changes, places)
    return Trained(name, config, _stages_of(config, ablation, f"stages.{name}"))


def _cell(
    ablation: AblationConfig, name: str, changes: list[Variant | Combination], places: tuple[Path, ...]
) -> Trained:
    config = _config(f"cell {name}", [ablation.base, *changes], places)
    if ablation.budget.unit == "updates":
        try:
            steps = steps_for(config.objective, ablation.budget)
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from error
        config = replace(config, training=replace(config.training, steps=steps))
    if ablation.budget.unit == "seconds":
        config = replace(config, training=replace(config.training, steps=_MOST_STEPS))
    return Trained(name, config, _stages_of(config, ablation, f"cell {name}"))


def _config(where: str, changes: Iterable[Variant | Combination], places: tuple[Path, ...]) -> RunConfig:
    """Merges a card and its changes into a config that trains and does nothing else, and composes it."""
    changes = list(changes)
    cards = [change.card for change in changes if change.card is not None]
    if not cards:
        raise ConfigError(f"{where}: no experiment card; set base.card")
    try:
        values = to_dict(load_card(_found(cards[-1], places)))
        for change in changes:
            values = merged(values, to_dict(change.overrides))
        config: RunConfig = system_config(values, RunConfig)
        quiet = {"eval_every": None, "sample_every": None, "max_seconds": None, "tensorboard": False}
        config = replace(config, training=replace(config.training, **quiet))
        compose(config)
    except VidarError as error:
        raise ConfigError(f"{where}: {error}") from error
    return config


def _found(card: str, places: tuple[Path, ...]) -> Path:
    for place in places:
        if (place / card).is_file():
            return place / card
    raise ConfigError(f"card={card!r}: no such file below {places[0]} or {places[-1]}")


def _sources(value: Any) -> set[str]:
    if isinstance(value, str):
        return {value.removeprefix(STAGE)} if value.startswith(STAGE) else set()
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*(_sources(entry) for entry in entries))


def _substituted(value: Any, stages: Path) -> Any:
    if isinstance(value, dict):
        return {key: _substituted(entry, stages) for key, entry in value.items()}
    if isinstance(value, list):
        return [_substituted(entry, stages) for entry in value]
    if isinstance(value, str) and value.startswith(STAGE):
        return str(stages / value.removeprefix(STAGE))
    return value


def _stages_of(config: RunConfig, ablation: AblationConfig, where: str) -> tuple[str, ...]:
    names = _sources(to_dict(config))
    unknown = sorted(names - set(ablation.stages))
    if unknown:
        known = ", ".join(sorted(ablation.stages)) or "none"
        raise ConfigError(f"{where}: starts from {STAGE}{unknown[0]}, which is no stage; known: {known}")
    return tuple(sorted(names))


def _ordered(stages: Mapping[str, Trained]) -> dict[str, Trained]:
    """Stages after those that they start from."""
    done: dict[str, Trained] = {}
    while len(done) < len(stages):
        ready = [name for name in stages if name not in done and set(stages[name].stages) <= set(done)]
        if not ready:
            raise ConfigError(f"stages {', '.join(sorted(set(stages) - set(done)))} start from each other")
        done[ready[0]] = stages[ready[0]]
    return done


# ------------------------------------------------------------------------------------------------------- checks


def _check(grid: Grid) -> None:
    """Checks what needs all cells, and that each can be evaluated and controlled."""
    ablation = grid.ablation
    names = [cell.name for cell in grid.cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two cells are named {twice[0]!r}: name levels or extra cells otherwise")
    asked = {"contrast": ablation.contrast.better + ablation.contrast.worse}
    if ablation.control is not None:
        asked["control"] = ablation.control.cells
    for where, cells in asked.items():
        unknown = sorted(set(cells) - set(names))
        if unknown:
            raise ConfigError(f"{where}: no cell {unknown[0]!r}; the cells are {', '.join(names)}")
    if ablation.world is not None:
        for name, stage in grid.stages.items():
            _check_world(f"stages.{name}", stage.config, ablation.world)
        for cell in grid.cells:
            _check_world(f"cell {cell.name}", cell.run.config, ablation.world)
    for cell in grid.cells:
        _check_evaluation(cell, ablation.evaluation)
        control, commit = ablation.control, cell.run.config.plan.commit
        noised = control is not None and control.corrupt == "commit" and _controlled(control, cell)
        if noised and commit.kind == "last_step":
            raise ConfigError(f"cell {cell.name}: a last_step commit takes no noise: use control.corrupt='given'")
        _check_starts(grid, cell)


def _check_world(name: str, config: RunConfig, world: WorldData) -> None:
    """Runs on a procedural world must fit the data that the ablation makes."""
    wanted = config.data.tfds or ""
    if not wanted.startswith(_WORLD):
        return
    if wanted != f"{_WORLD}{world.config}":
        raise ConfigError(f"{name}: trains on {wanted}, but world.config={world.config!r} is made")
    if config.data.frames > world.frames:
        raise ConfigError(f"{name}: data.frames={config.data.frames}, but world.frames={world.frames} are made")


def _check_evaluation(cell: Cell, evaluation: Evaluation) -> None:
    config = cell.run.config
    video = config.video
    if config.plan.lag == 0:
        raise ConfigError(f"cell {cell.name}: makes whole clips at once and cannot go on from a frame (plan.lag=0)")
    if not isinstance(config.codec, PixelCodec):
        raise ConfigError(f"cell {cell.name}: codec {config.codec.kind} has weights of its own; use a pixel codec")
    if config.model.text is not None:
        raise ConfigError(f"cell {cell.name}: needs text, which the evaluation has none of")
    if evaluation.form is not None:
        evaluation.form.check(f"cell {cell.name}", (video.height, video.width), config.model)
    try:
        stream_sampler(compose(config), evaluation.given)
    except ConfigError as error:
        raise ConfigError(f"cell {cell.name}: cannot be streamed: {error}") from error
    head = 1 if video.independent_first_frame or evaluation.given == 1 else 0
    if (evaluation.given - head) % video.chunk:
        raise ConfigError(
            f"cell {cell.name}: evaluation.given={evaluation.given} is not a whole number of chunks of {video.chunk}"
            f"{' after the first frame' if head else ''}; 1 always is"
        )


def _check_starts(grid: Grid, cell: Cell) -> None:
    """Networks that start from a stage must be its network."""
    system = compose(cell.run.config)
    for role, choice in system.roles.items():
        if not choice.source.startswith(STAGE):
            continue
        stage = grid.stages[choice.source.removeprefix(STAGE)]
        own = system.model_config(role)
        theirs = compose(stage.config).model_config("student")
        for name in ("width", "layers", "heads", "mlp", "channels", "patch"):
            if getattr(own, name) != getattr(theirs, name):
                raise ConfigError(
                    f"cell {cell.name}: objective.{role} starts from {choice.source} with {name}="
                    f"{getattr(theirs, name)}, but has {name}={getattr(own, name)}"
                )


def _controlled(control: Control, cell: Cell) -> bool:
    return cell.name in control.cells if control.cells else bool(cell.levels)
