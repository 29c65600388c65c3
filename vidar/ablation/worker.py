"""Makes what a grid means: data, stages, cells; each once, whole, and by one process at a time.

What is killed goes on at its last checkpoint; what is done is never touched again. This module must not know how
results are summed up or shown.
"""

import gc
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vidar
from vidar.ablation.card import Budget, Control
from vidar.ablation.cost import phase_flops, steps_within, total_flops
from vidar.ablation.grid import Cell, Grid
from vidar.ablation.measures import VIDEO, Truth
from vidar.ablation.records import (
    RECORD,
    alone,
    claimed,
    compare,
    damaged,
    fingerprint,
    read_arrays,
    read_json,
    settle,
    settle_made,
    write_arrays,
    write_json,
)
from vidar.ablation.rollouts import harmed, streamer
from vidar.checkpoint import Checkpoints
from vidar.config import build
from vidar.data.world.builder import prepare
from vidar.errors import CheckpointError, ConfigError, DivergenceError, VidarError
from vidar.evaluation.metrics import first_of
from vidar.system import compose, load
from vidar.training.experiment import RunConfig, make_run
from vidar.training.loop import Run, train
from vidar.training.state import phases_of

_logger = logging.getLogger("vidar")
DONE, FAILED, METRICS, ROLLOUTS, TRAINED = "done.json", "failed.json", "metrics.json", "rollouts.npz", "trained.json"
_CELL = (RECORD, TRAINED, ROLLOUTS, METRICS, DONE)
CIRCUMSTANCES = ("device", "jax", "code")
# What may be added to an ablation that has begun: nothing that is done depends on it.
_GROWING = ("seeds", "stages", "cells")
_COST = ("steps", "seconds", "updates", "skipped", "flops of an update", "flops")


@dataclass(frozen=True)
class Layout:
    """Where everything of an ablation lies.

    Attributes:
        root: The output directory.
    """

    root: Path

    @property
    def record(self) -> Path:
        """What the directory is for."""
        return self.root / "ablation.json"

    @property
    def data(self) -> Path:
        """Data that the ablation made."""
        return self.root / "data"

    @property
    def stages(self) -> Path:
        """Shared pre-training runs."""
        return self.root / "stages"

    @property
    def truth(self) -> Path:
        """The clips that every cell continues."""
        return self.root / "truth.npz"

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / "report"

    def cell(self, cell: Cell, seed: int) -> Path:
        """One cell with one seed."""
        return self.root / "cells" / f"{cell.name}-seed{seed}"


def work(grid: Grid, output: Path, part: tuple[int, int] = (0, 1)) -> None:
    """Makes this process's cells, and the stages that they need.

    Args:
        grid: The grid.
        output: Directory of the ablation.
        part: Which cells: `(i, n)` makes every n-th from the i-th on.

    Raises:
        VidarError: Something cannot be made; what was made stays, and starting again goes on.
        KeyboardInterrupt: SIGTERM or Ctrl-C; starting again goes on.
    """
    layout = Layout(output.resolve())
    with alone(layout.root, "the ablation's record"):
        settle(layout.record, grid.document(), "an ablation", _GROWING)
    units = grid.units[part[0] :: part[1]]
    _prepare(grid, layout)
    free = [cell for cell in grid.cells if not cell.run.stages]
    _try_out(grid, layout, free)
    needed = grid.needed([cell.run for cell, _ in units])
    for number, name in enumerate(needed, start=1):
        _logger.info("── stage %d of %d: %s", number, len(needed), name)
        _make_stage(grid, layout, name)
    _try_out(grid, layout, [cell for cell in grid.cells if cell not in free and set(cell.run.stages) <= set(needed)])
    progress = _Progress(len(units))
    for cell, seed in units:
        with claimed(layout.cell(cell, seed)) as mine:
            if not mine:
                _logger.info("%s, seed %d: another process is at it", cell.name, seed)
                progress.passed()
            elif is_done(grid, layout, cell, seed):
                progress.passed()
            else:
                progress.begins(cell.name, seed)
                _make_cell(grid, layout, cell, seed)
                progress.done()
                # The next cell needs none of what this one compiled.
                jax.clear_caches()
                gc.collect()


def check_same(grid: Grid, output: Path) -> None:
    """Refuses a directory that holds no ablation, or another one; seeds and cells may have been added.

    Raises:
        ConfigError: It does; the message names the first difference.
    """
    layout = Layout(output.resolve())
    if not layout.record.exists():
        raise ConfigError(f"{output}: holds no ablation; run it first, or give its --output")
    compare(layout.record, grid.document(), "an ablation", _GROWING)


def is_done(grid: Grid, layout: Layout, cell: Cell, seed: int) -> bool:
    """Whether a cell is complete; a file that was deleted is made again from those that it comes from.

    Raises:
        ConfigError: Its directory holds a cell of another config.
    """
    directory = layout.cell(cell, seed)
    if (directory / RECORD).exists():
        settle(directory / RECORD, grid.unit_document(cell, seed), "a cell")
    return all((directory / name).exists() for name in _CELL)


def read_cell(directory: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Metrics, training cost and circumstances of a complete cell.

    Raises:
        CheckpointError: A file is damaged.
    """
    return (
        read_json(directory / METRICS, ["as trained/spans", "as trained/curves", "control"]),
        read_json(directory / TRAINED, _COST),
        read_json(directory / DONE, CIRCUMSTANCES),
    )


def read_stage(directory: Path) -> dict[str, Any] | None:
    """Training cost and circumstances of a stage; None for one that is not done.

    Raises:
        CheckpointError: The file is damaged.
    """
    done = directory / DONE
    return read_json(done, [*_COST, *CIRCUMSTANCES]) if done.exists() else None


def read_truth(layout: Layout) -> Truth:
    """The clips that every cell continues.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    arrays = read_arrays(layout.truth, ["pixels", "actions"])
    return Truth(arrays["pixels"], arrays["actions"], arrays.get("label"))


def read_rollouts(directory: Path, truth: Truth) -> dict[str, np.ndarray]:
    """Everything that a cell rolled out, uint8 videos by name.

    Raises:
        CheckpointError: The file is missing or damaged, or continues other clips than the truth's.
    """
    path = directory / ROLLOUTS
    rollouts = read_arrays(path, [VIDEO])
    if rollouts[VIDEO].shape != truth.pixels.shape:
        raise CheckpointError(
            f"{path}: holds a video {list(rollouts[VIDEO].shape)}, the truth is {list(truth.pixels.shape)}: "
            "delete this file, and run again to make it anew"
        )
    return rollouts


def recompute(grid: Grid, output: Path) -> int:
    """Measures the stored rollouts of every finished cell again.

    Args:
        grid: The grid.
        output: Directory of the ablation.

    Returns:
        How many cells there were.

    Raises:
        CheckpointError: A cell's metrics are not those of its rollouts.
    """
    layout, count = Layout(output.resolve()), 0
    truth = read_truth(layout)
    for cell, seed in grid.units:
        if is_done(grid, layout, cell, seed):
            directory = layout.cell(cell, seed)
            metrics = _measured(grid, cell, truth, read_rollouts(directory, truth))
            if metrics != read_json(directory / METRICS):
                raise CheckpointError(f"{directory / METRICS}: is not what {ROLLOUTS} says: delete the wrong one")
            count += 1
    return count


# ------------------------------------------------------------------------------------------------------- stages


def _prepare(grid: Grid, layout: Layout) -> None:
    """Makes the data and the held-out clips, once for all processes."""
    world = grid.ablation.world
    with alone(layout.data, "the data"):
        if world is not None:
            prepare(layout.data, world.config, world.clips, world.validation_clips, world.frames, world.seed)
        if not layout.truth.exists():
            truth = grid.ablation.evaluation.truth()
            arrays = {"pixels": truth.pixels, "actions": truth.actions, "label": truth.label}
            write_arrays(layout.truth, {name: array for name, array in arrays.items() if array is not None})


def _placed(grid: Grid, layout: Layout, run: Any) -> RunConfig:
    return run.placed(layout.stages, None if grid.ablation.world is None else layout.data)


def _try_out(grid: Grid, layout: Layout, cells: list[Cell]) -> None:
    """Composes runs up to their data and weights, so that what does not fit is said before the first cell trains."""
    for cell in cells:
        try:
            make_run(_placed(grid, layout, cell.run))
        except VidarError as error:
            raise type(error)(f"cell {cell.name}: {error}") from error


def _make_stage(grid: Grid, layout: Layout, name: str) -> None:
    directory = layout.stages / name
    with alone(directory, f"stage {name}"):
        document = grid.stage_document(name)
        settle_made(directory, document, "a stage", DONE)
        if not (directory / DONE).exists():
            try:
                record = _train(_placed(grid, layout, grid.stages[name]), directory, None)
                _check_spent(record)
            except DivergenceError as error:
                raise DivergenceError(f"stage {name}: {error}") from error
            write_json(directory / DONE, record | _circumstances() | {"of": fingerprint(document)})
            jax.clear_caches()


# ------------------------------------------------------------------------------------------------------- cells


def _make_cell(grid: Grid, layout: Layout, cell: Cell, seed: int) -> None:
    directory = layout.cell(cell, seed)
    document = grid.unit_document(cell, seed)
    settle_made(directory, document, "a cell", TRAINED)
    (directory / FAILED).unlink(missing_ok=True)
    rolled_out, trained = (directory / ROLLOUTS).exists(), (directory / TRAINED).exists()
    if not trained or not (rolled_out or (directory / "run").exists()):
        try:
            record = _train(_placed(grid, layout, cell.seeded(seed)), directory / "run", grid.ablation.budget)
            _check_spent(record, grid.ablation.budget, cell)
        except DivergenceError as error:
            # A result like any other: the rest of the grid goes on.
            _logger.warning("%s, seed %d: %s", cell.name, seed, error)
            write_json(directory / FAILED, {"error": str(error)})
            return
        write_json(directory / TRAINED, record | {"of": fingerprint(document)})
    truth = read_truth(layout)
    if not rolled_out:
        write_arrays(directory / ROLLOUTS, _rollouts(grid, cell, directory / "run", truth))
    write_json(directory / METRICS, _measured(grid, cell, truth, read_rollouts(directory, truth)))
    write_json(directory / DONE, _circumstances())


def _check_spent(record: Mapping[str, Any], budget: Budget | None = None, cell: Cell | None = None) -> None:
    """Refuses a training that never updated something, or skipped updates which its budget counts."""
    updates = record["updates"]
    idle = [phase for phase, count in updates.items() if not count]
    if idle:
        raise DivergenceError(
            f"{idle[0]} was never updated: {record['skipped']} of {record['steps']} steps had an update that was not "
            "finite, or the budget ends before its first"
        )
    if budget is None or cell is None or budget.unit != "updates":
        return
    phases = phases_of(compose(cell.run.config).objective, record["steps"])
    done = sum(count for phase, count in updates.items() if phases[phase].role == budget.role)
    if done < budget.amount:
        raise DivergenceError(
            f"{budget.amount - done:g} updates were skipped, since they were not finite: the budget of "
            f"{budget.amount:g} of {budget.role} is not spent"
        )


def _circumstances() -> dict[str, Any]:
    """What results depend on beside their config: machine, software, and vidar's own sources."""
    package = Path(vidar.__file__).resolve().parent
    sources = {str(file.relative_to(package)): file.read_text() for file in sorted(package.rglob("*.py"))}
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "code": fingerprint(sources)}


def _rollouts(grid: Grid, cell: Cell, workdir: Path, truth: Truth) -> dict[str, np.ndarray]:
    """Streams a trained cell, and again with each harm of the positive control."""
    evaluation = grid.ablation.evaluation
    system, model = load(workdir)
    common = (system, model, evaluation.given, first_of(evaluation.seed))
    rollouts = evaluation.rollouts(streamer(*common), truth)
    control = grid.control_of(cell)
    if control is not None:
        choice = build(Control, {**control, "cells": ()})
        for amount in choice.amounts:
            generate = harmed(*common, choice, amount)
            rollouts[_control(amount)] = generate(truth.pixels[:, : evaluation.given], truth.actions, truth.label)
    return rollouts


def _measured(grid: Grid, cell: Cell, truth: Truth, rollouts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Metrics of everything that a cell rolled out, as plain values."""
    evaluation, control = grid.ablation.evaluation, grid.control_of(cell)
    harms = () if control is None else control["amounts"]
    metrics = {
        "as trained": evaluation.measure(rollouts, truth),
        "control": [evaluation.measure({VIDEO: rollouts[_control(amount)]}, truth) for amount in harms],
    }
    return json.loads(json.dumps(metrics))


def _control(amount: float) -> str:
    return f"control {amount:g}"


# ---------------------------------------------------------------------------------------------------- training


def _train(config: RunConfig, workdir: Path, budget: Budget | None) -> dict[str, Any]:
    """Trains within a budget, from where it stopped; returns what it cost.

    A stage has no budget of its own: it trains as long as its card says.
    """
    run = make_run(config)
    batch = run.prepare_batch(next(run.batches[_main(run)]()))
    flops = phase_flops(config, batch)
    training = config.training
    if budget is not None and budget.unit == "flops":
        steps = steps_within(run.objective, flops, budget.amount)
        if not steps:
            raise ConfigError(
                f"budget.amount={budget.amount:g} FLOPs: one step takes {total_flops(run.objective, flops, 1):.3g}"
            )
        training = replace(training, steps=steps)
    clock = _Clock(workdir)
    if budget is not None and budget.unit == "seconds":
        left = budget.amount - clock.before
        training = replace(training, max_seconds=left) if left > 0 else replace(training, steps=clock.step)
    state = train(replace(run, training=training, saving=clock.note), workdir)
    done, seconds = int(state.step), clock.seconds()
    if done < training.steps and (budget is None or budget.unit != "seconds" or seconds < budget.amount):
        raise KeyboardInterrupt
    return {
        "steps": done,
        "seconds": seconds,
        "updates": {phase: int(count) for phase, count in state.updates.items()},
        "skipped": int(state.skipped),
        "flops of an update": flops,
        "flops": total_flops(run.objective, flops, done),
    }


def _main(run: Run) -> str:
    return "main" if "main" in run.batches else next(iter(run.batches))


class _Clock:
    """Wall time of a training over all its attempts: what was lost by a kill is not counted twice.

    Args:
        workdir: The run's directory.

    Attributes:
        step: Step that the training goes on from.
        before: Seconds that it took until there.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / "clock.json"
        saved = Checkpoints(workdir / "checkpoints", keep=1).latest()
        noted = read_json(self._path) if self._path.exists() else {}
        self.step = saved or 0
        try:
            self._noted = {int(step): float(seconds) for step, seconds in noted.items() if int(step) <= self.step}
        except (TypeError, ValueError) as error:
            raise damaged(self._path, error) from error
        self.before = max(self._noted.values(), default=0.0)
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Seconds so far."""
        return self.before + time.monotonic() - self._start

    def note(self, step: int) -> None:
        """Writes down the time at a step that is about to be saved."""
        self._noted[step] = self.seconds()
        write_json(self._path, self._noted)


class _Progress:
    """Says which cell is at work, and how long the others will take if they are like those before.

    Args:
        total: Cells of this process.
    """

    def __init__(self, total: int):
        self._total, self._number, self._times, self._start = total, 0, [], 0.0

    def passed(self) -> None:
        """A cell that is not made here."""
        self._number += 1

    def begins(self, name: str, seed: int) -> None:
        """A cell that is made now."""
        self._number += 1
        self._start = time.monotonic()
        left = ""
        if self._times:
            minutes = np.mean(self._times) * (self._total - self._number + 1) / 60
            left = f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"
        _logger.info("── cell %d of %d: %s, seed %d%s", self._number, self._total, name, seed, left)

    def done(self) -> None:
        """The cell is complete."""
        self._times.append(time.monotonic() - self._start)
