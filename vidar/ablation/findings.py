"""What a grid has shown so far: numbers of cells and levels over seeds, the contrast, the control, and what it cost.

Reads the directories of finished cells and sums them up; it must not know how cells are made or findings shown.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vidar.ablation.grid import Cell, Grid
from vidar.ablation.measures import VIDEO
from vidar.ablation.records import read_json
from vidar.ablation.statistics import Estimate, Paired, estimate, paired
from vidar.ablation.worker import FAILED, Layout, is_done, read_cell, read_rollouts, read_stage, read_truth

Key = tuple[str, int]
"""Name of a cell, and seed."""


@dataclass(frozen=True)
class Harm:
    """What one amount of the positive control did.

    Attributes:
        amount: Level or share of the corruption.
        effect: Harmed minus as trained, in the contrast's metric and span, over all controlled cells.
    """

    amount: float
    effect: Paired


@dataclass(frozen=True)
class Findings:
    """A grid's results.

    Attributes:
        grid: The grid.
        layout: Where it lies.
        metrics: Metrics of each finished cell and seed.
        trained: What the training of each took.
        done: Under which circumstances each was made.
        stages: What the stages took, by name; those that are done.
        missing: Cells and seeds that are not done, with the reason where it is known.
        grown: What was added to the ablation after it was begun, names of seeds, stages and cells, each time.
        left_out: What of the ablation is not in this grid, names of seeds and cells.
        contrast: The contrast named beforehand, better minus worse; None until a seed has all its cells.
        harms: The positive control, by amount.
    """

    grid: Grid
    layout: Layout
    metrics: Mapping[Key, Any]
    trained: Mapping[Key, Any]
    done: Mapping[Key, Any]
    stages: Mapping[str, Any]
    missing: Mapping[Key, str]
    grown: tuple[Mapping[str, Any], ...]
    left_out: Mapping[str, Any]
    contrast: Paired | None
    harms: tuple[Harm, ...]

    @property
    def levels(self) -> dict[str, tuple[Cell, ...]]:
        """Cells of each level of each factor, by `factor: level`."""
        factors = self.grid.ablation.factors
        return {
            f"{factor}: {level}": tuple(cell for cell in self.grid.cells if cell.levels.get(factor) == level)
            for factor in sorted(factors)
            for level in sorted(factors[factor])
        }

    def seeds(self, cells: tuple[Cell, ...]) -> tuple[int, ...]:
        """Seeds of which all of these cells are done."""
        return tuple(
            seed for seed in self.grid.ablation.seeds if all((one.name, seed) in self.metrics for one in cells)
        )

    def by_seed(self, cells: tuple[Cell, ...], read: Callable[[Any], Any]) -> np.ndarray:
        """A number, or an array, of each seed, averaged over cells; `[s, ...]`."""
        return np.array(
            [np.mean([read(self.metrics[one.name, seed]) for one in cells], axis=0) for seed in self.seeds(cells)]
        )

    def estimate(self, cells: tuple[Cell, ...], span: str, metric: str) -> Estimate | None:
        """Mean over clips and cells, then over seeds; None where no seed is complete."""
        values = self.by_seed(cells, lambda metrics: np.mean(metrics["as trained"]["spans"][span][metric]))
        return estimate(values.tolist()) if len(values) else None

    def drift(self, cells: tuple[Cell, ...], metric: str, part: str) -> Estimate | None:
        """As `estimate`, of a curve's `change` from its first to its last 15 % of frames, or its `slope` per frame."""
        values = self.by_seed(cells, lambda metrics: metrics["as trained"]["curves"][metric][part]["mean"])
        return estimate(values.tolist()) if len(values) else None

    def curves(self, cells: tuple[Cell, ...], metric: str) -> np.ndarray:
        """Mean over clips and cells of a metric at each frame after the given ones, `[s, f]`."""
        return self.by_seed(cells, lambda metrics: np.asarray(metrics["as trained"]["curves"][metric]["mean"]))

    @cached_property
    def repeated(self) -> dict[str, dict[str, float]]:
        """Metrics of repeating the last given frame, by span and metric."""
        evaluation, truth = self.grid.ablation.evaluation, read_truth(self.layout)
        video = truth.pixels.copy()
        video[:, evaluation.given :] = video[:, evaluation.given - 1 : evaluation.given]
        spans = evaluation.measure({VIDEO: video}, truth)["spans"]
        return {span: {name: float(np.mean(value)) for name, value in values.items()} for span, values in spans.items()}


def gather(grid: Grid, output: Path) -> Findings:
    """Reads what is done.

    Args:
        grid: The grid.
        output: Directory of the ablation.

    Returns:
        The findings so far.

    Raises:
        ConfigError: A directory holds cells of another config.
        CheckpointError: A file of a finished cell is damaged.
    """
    layout = Layout(output.resolve())
    metrics, trained, done, missing = {}, {}, {}, {}
    for cell, seed in grid.units:
        key, directory = (cell.name, seed), layout.cell(cell, seed)
        if is_done(grid, layout, cell, seed):
            metrics[key], trained[key], done[key] = read_cell(directory)
        elif (directory / FAILED).exists():
            missing[key] = read_json(directory / FAILED, ["error"])["error"]
        else:
            missing[key] = "begun" if directory.exists() else "not begun"
    stages = {name: read_stage(layout.stages / name) for name in grid.stages}
    costs = {name: stage for name, stage in stages.items() if stage is not None}
    record, document = read_json(layout.record, ["config"]), grid.document()
    grown = tuple(record.get("grown", ()))
    whole = {name: record["config"][name] for name in ("seeds", "cells")}
    left_out = {name: [entry for entry in whole[name] if entry not in document[name]] for name in whole}
    contrast, harms = _contrast(grid, metrics), _harms(grid, metrics)
    return Findings(grid, layout, metrics, trained, done, costs, missing, grown, left_out, contrast, harms)


def videos(findings: Findings, key: Key) -> tuple[np.ndarray, np.ndarray]:
    """Truth and rollout of a finished cell, each uint8 `[b, f, h, w, 3]`."""
    cell = next(cell for cell in findings.grid.cells if cell.name == key[0])
    truth = read_truth(findings.layout)
    return truth.pixels, read_rollouts(findings.layout.cell(cell, key[1]), truth)[VIDEO]


def _clips(measured: Any, grid: Grid) -> np.ndarray:
    """The contrast's metric of each clip."""
    contrast = grid.ablation.contrast
    return np.asarray(measured["spans"][contrast.span][contrast.metric], np.float64)


def _contrast(grid: Grid, metrics: Mapping[Key, Any]) -> Paired | None:
    contrast, rows = grid.ablation.contrast, []
    for seed in grid.ablation.seeds:
        arms = [[(name, seed) for name in names] for names in (contrast.better, contrast.worse)]
        if all(key in metrics for arm in arms for key in arm):
            better, worse = (np.mean([_clips(metrics[key]["as trained"], grid) for key in arm], axis=0) for arm in arms)
            rows.append(better - worse)
    return paired(np.stack(rows)) if rows else None


def _harms(grid: Grid, metrics: Mapping[Key, Any]) -> tuple[Harm, ...]:
    control = grid.ablation.control
    if control is None or grid.ablation.contrast.span not in grid.ablation.evaluation.spans:
        return ()
    cells = [cell.name for cell in grid.cells if grid.control_of(cell) is not None]
    seeds = [seed for seed in grid.ablation.seeds if all((name, seed) in metrics for name in cells)]
    if not seeds:
        return ()

    def effect(key: Key, number: int) -> np.ndarray:
        return _clips(metrics[key]["control"][number], grid) - _clips(metrics[key]["as trained"], grid)

    return tuple(
        Harm(amount, paired(np.stack([np.mean([effect((name, seed), number) for name in cells], 0) for seed in seeds])))
        for number, amount in enumerate(control.amounts)
    )
