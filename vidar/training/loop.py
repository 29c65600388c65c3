"""The driver's loop: mesh, data, state, restore, steps.

It knows the objective's contract, batch iterators and networks by role, and nothing of video. What stops it early
(SIGTERM, a kill, a full disk) costs at most the steps since the last checkpoint, and nothing of their outcome.
"""

import json
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vidar.checkpoint import Checkpoints
from vidar.config import differences
from vidar.errors import CheckpointError, ConfigError
from vidar.objectives.protocol import Objective, Phase
from vidar.sharding import MeshConfig, Rules, make_mesh, shardings
from vidar.training.batches import Batches, BatchIterator
from vidar.training.config import TrainingConfig
from vidar.training.distributed import only_process
from vidar.training.logging import MetricWriter
from vidar.training.optimizers import Optimizer, OptimizerConfig, make_optimizer
from vidar.training.report import Reporter
from vidar.training.state import (
    LogicalAxes,
    TrainState,
    abstract_networks,
    by_path,
    empty_window,
    fingerprint,
    initial_networks,
    initial_state,
    joined,
    phases_of,
    place,
    state_shardings,
)
from vidar.training.step import StepSettings, make_phase_step, metric_names
from vidar.training.stop import StopSignal

_logger = logging.getLogger("vidar")

# Steps that may be under way on the device before the host waits: enough to hide the host, few enough to bound memory.
_IN_FLIGHT = 2
# What a state has for each phase.
_BY_PHASE = ("updates", "windows")

Callback = Callable[[int, Mapping[str, Any], MetricWriter], Mapping[str, float]]


@dataclass(frozen=True)
class Run:
    """Everything that one training run is made of.

    Attributes:
        objective: Names roles, phases and losses.
        axes: The system's axes, handed to the loss.
        build: By trained role, from a key to a random network.
        logical_axes: From a parameter's path and array to its logical axes, for every network.
        batches: By batch name, what creates the iterator of this process's batches (dictionaries of NumPy arrays).
        prepare_batch: From such a dictionary to the pytree of NumPy arrays that the loss takes, batch first.
        training: Length and rhythm.
        optimizers: By the name that roles use.
        frozen: By frozen role, or one with adapters, its network with its weights.
        initial: By role, weights to start from; None or absent for a random start or a copy of the role's source.
        evaluate: From step, networks by role (averages where there are any) and writer to numbers for the log.
        sample: Likewise, for sample sheets.
        saving: Told of every step that is about to be saved.
        mesh: Sizes of the mesh axes.
        rules: Logical axes to mesh axes.
        meta: Saved with every checkpoint; JSON. What changed under `run` when the run goes on is logged.
        identity: From the meta of a checkpoint to those of its settings that must be the same when the run goes on.
        flops_per_step: Counted FLOPs of one step on all devices, for the utilisation.
        tokens_per_step: Tokens of one step, for the throughput.
    """

    objective: Objective
    axes: Any
    build: Mapping[str, Callable[[jax.Array], Any]]
    logical_axes: LogicalAxes
    batches: Mapping[str, Callable[[], BatchIterator]]
    prepare_batch: Callable[[Any], Any]
    training: TrainingConfig
    optimizers: Mapping[str, OptimizerConfig]
    frozen: Mapping[str, Any] = field(default_factory=dict)
    initial: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Callback | None = None
    sample: Callback | None = None
    saving: Callable[[int], None] = lambda step: None
    mesh: MeshConfig = MeshConfig()
    rules: Rules = Rules()
    meta: Mapping[str, Any] = field(default_factory=dict)
    identity: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda meta: {}
    flops_per_step: float | None = None
    tokens_per_step: float | None = None


def train(run: Run, workdir: str | Path) -> TrainState:
    """Trains to the last step, from the newest checkpoint in `workdir` if there is one.

    SIGTERM or Ctrl-C ends it after the running step with a checkpoint.

    Args:
        run: What to train.
        workdir: Receives `checkpoints/`, `metrics.jsonl` and `tensorboard/`.

    Returns:
        The state after the last step done.

    Raises:
        ConfigError: The run cannot work as configured, or another process trains in `workdir`.
        CheckpointError: Checkpoints cannot be written or read.
        DataError: The batches ended or are broken.
        DivergenceError: Too many updates in a row were not finite.
        KeyboardInterrupt: Ctrl-C, after the checkpoint.
    """
    workdir = Path(workdir)
    _check_roles(run)

    # ---------------------------------------------------------------- Mesh
    mesh = make_mesh(run.mesh)
    _logger.info("mesh %s over %d %s", dict(mesh.shape), mesh.size, mesh.devices.flat[0].device_kind)
    with jax.set_mesh(mesh), only_process(workdir), StopSignal(run.training.max_seconds) as stop:
        # ------------------------------------------------------------ Data
        batches = Batches(run.batches, run.prepare_batch, mesh, run.rules)

        # ------------------------------------------------------------ State: shapes, placements, then values
        phases = phases_of(run.objective, run.training.steps)
        frozen = _place_frozen(run, mesh)
        inputs = {name: batches.abstract(name) for name in {phase.batch for phase in phases.values()}}
        program = make_program(run, phases, frozen, inputs, mesh)
        checkpoints = Checkpoints(workdir / "checkpoints", run.training.keep, run.training.keep_every)
        meta = _meta(run, phases, frozen)
        state = _restored(run, checkpoints, program, batches, meta) or program.initialise()
        start = int(state.step)
        if start >= run.training.steps:
            _logger.info("nothing to do: step %d of %d is done", start, run.training.steps)

        # ------------------------------------------------------------ Steps
        writer = MetricWriter(workdir, after=start, tensorboard=run.training.tensorboard)
        reporter = Reporter(run.training, program.names, writer, mesh, run.flops_per_step, run.tokens_per_step, start)
        reporter.continue_from(state)
        loop = _Loop(run, program, mesh, batches, frozen, checkpoints, meta, writer, reporter)
        try:
            return loop.run(state, start, stop)
        finally:
            batches.close()
            reporter.close()
            writer.close()


def is_complete(run: Run, state: TrainState) -> bool:
    """Whether a training ended by itself, and not by SIGTERM before its last step."""
    return int(state.step) >= run.training.steps or run.training.max_seconds is not None


@dataclass(frozen=True)
class Program:
    """What is compiled.

    Attributes:
        abstract: Shapes and placements of the state.
        placements: Where each of its leaves lies.
        names: Metric names by phase.
        steps: By phase, and whether it resets its optimizer, a function of the state's leaves, those of the frozen
            networks, a batch, the steps to advance by and a seed; the first are donated.
        initialise: Creates the first state.
    """

    abstract: TrainState
    placements: TrainState
    names: Mapping[str, tuple[str, ...]]
    steps: Mapping[tuple[str, bool], Callable[..., Any]]
    initialise: Callable[[], TrainState]


class _Loop:
    """The steps of one run; the state lives as a flat list, because rebuilding modules costs host time every step."""

    def __init__(
        self,
        run: Run,
        program: Program,
        mesh: Mesh,
        batches: Batches,
        frozen: Mapping[str, Any],
        checkpoints: Checkpoints,
        meta: Mapping[str, Any],
        writer: MetricWriter,
        reporter: Reporter,
    ):
        self._run = run
        self._program = program
        self._batches = batches
        self._frozen = frozen
        self._frozen_leaves = jax.tree.leaves(dict(frozen))
        self._checkpoints = checkpoints
        self._meta = meta
        self._writer = writer
        self._reporter = reporter
        replicated = NamedSharding(mesh, PartitionSpec())
        self._advance = tuple(jax.device_put(jnp.int32(last), replicated) for last in (0, 1))
        # An argument, not a constant: runs that differ in their seed share an executable in the compilation cache.
        self._seed = jax.device_put(jnp.uint32(run.training.seed % 2**32), replicated)
        self._compiled: dict[tuple[str, bool], Any] = {}
        self._leaves: list[jax.Array] = []

    def run(self, state: TrainState, start: int, stop: StopSignal) -> TrainState:
        """Runs the steps that are left and returns the last state."""
        training = self._run.training
        self._leaves = jax.tree.leaves(state)
        del state
        running: deque[jax.Array] = deque()
        for step in range(start, training.steps):
            running.append(self._step(step))
            if len(running) > _IN_FLIGHT:
                with self._reporter.waiting_for_device():
                    running.popleft().block_until_ready()
            done = step + 1
            last, stopped = done == training.steps, stop.at(done)
            self._reporter.step_done(done, last or stopped)
            self._call_back(self._run.evaluate, training.eval_every, done, last)
            self._call_back(self._run.sample, training.sample_every, done, last)
            if done % training.save_every == 0 or last or stopped:
                self._run.saving(done)
                self._save(done)
            if stopped and not last:
                _logger.warning("%s: stopped after step %d, which is saved", stop.reason, done)
                break
        self._checkpoints.wait()
        return self._state()

    def _step(self, step: int) -> jax.Array:
        """Dispatches the phases of one step; returns an array that is ready when they are done."""
        phases = self._run.objective.phases(step)
        drawn: dict[str, Any] = {}
        report: dict[str, Any] = {}
        for index, phase in enumerate(phases):
            if phase.batch not in drawn:
                drawn[phase.batch], waited = self._batches.next(phase.batch)
                self._reporter.waited_for_data(waited)
            batch = drawn[phase.batch]
            inputs = batch, self._advance[index == len(phases) - 1], self._seed
            compiled = self._compile(phase, inputs)
            with jax.transfer_guard("disallow"):
                self._leaves, report = compiled(self._leaves, self._frozen_leaves, *inputs)
            self._reporter.phase_done(phase.name, report)
        return report["skipped"]

    def _compile(self, phase: Phase, inputs: tuple[Any, ...]) -> Any:
        """Returns the phase's executable, compiled at its first use."""
        key = (phase.name, phase.reset_optimizer)
        if key not in self._compiled:
            with self._reporter.compiling(phase.name):
                lowered = self._program.steps[key].lower(self._leaves, self._frozen_leaves, *inputs)
                self._compiled[key] = lowered.compile()
        return self._compiled[key]

    def _state(self) -> TrainState:
        return jax.tree.unflatten(jax.tree.structure(self._program.abstract), self._leaves)

    def _call_back(self, function: Callback | None, every: int | None, done: int, last: bool) -> None:
        """Evaluates or samples, where it is due, with the averaged networks."""
        if function is None or every is None or not (done % every == 0 or last):
            return
        with self._reporter.outside():
            state = self._state()
            networks = joined(self._frozen, {**state.networks, **state.ema})
            values = function(done, networks, self._writer)
            if values:
                self._writer.scalars(done, values)
                _logger.info("step %d: %s", done, ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def _save(self, done: int) -> None:
        """Starts a checkpoint; rows of the log up to it are on the disk first."""
        with self._reporter.outside():
            self._reporter.flush()
            self._writer.synchronize()
            state = self._state()
            items = {"state": replace(state, ema={}), "ema": state.ema, "data": self._batches, "meta": self._meta}
            self._checkpoints.save(done, {name: item for name, item in items.items() if name != "ema" or state.ema})


def make_program(
    run: Run, phases: Mapping[str, Phase], frozen: Mapping[str, Any], inputs: Mapping[str, Any], mesh: Mesh
) -> Program:
    """Derives shapes and placements of the state, and the functions to compile; nothing is computed.

    Args:
        run: What to train.
        phases: Phases of all steps, by name.
        frozen: Frozen networks, or their shapes.
        inputs: Shapes of the batches, by name.
        mesh: Mesh; its devices need not exist.

    Returns:
        The program.
    """
    objective, training = run.objective, run.training
    networks = abstract_networks(run.build)
    aux = jax.eval_shape(objective.init_aux)
    names = {
        name: metric_names(objective, run.axes, phase, frozen, networks, aux, inputs[phase.batch])
        for name, phase in phases.items()
    }
    optimizers = {role: _optimizer(run, role, network) for role, network in networks.items()}

    def initialise(given: Mapping[str, Any], key: jax.Array) -> TrainState:
        starts = {role: module for role, module in given.items() if role not in adapted}
        trained = initial_networks(objective.roles, run.build, starts, key)
        return initial_state(trained, objective.roles, optimizers, objective.init_aux(), names)

    given = {role: module for role, module in {**run.frozen, **run.initial}.items() if module is not None}
    given = {role: module for role, module in given.items() if _starts_some(objective.roles, role, run.build)}
    adapted = {role for role, choice in objective.roles.items() if choice.lora is not None}
    abstract = jax.eval_shape(initialise, given, jax.random.key(0))
    placements = state_shardings(abstract, objective.roles, run.logical_axes, mesh, run.rules)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, placements
    )
    settings = StepSettings(training.accumulate, training.log_every, run.rules)
    make = partial(make_phase_step, objective, run.axes, placements=placements, settings=settings)
    steps = {}
    for name, phase in phases.items():
        for reset in (False, True):
            variant = replace(phase, reset_optimizer=reset)
            function = make(phase=variant, optimizer=optimizers[phase.role], names=names[name])
            steps[name, reset] = _flat(function, abstract, frozen, placements, mesh)

    def first_state() -> TrainState:
        placed = {
            role: place(module, shardings(module, run.logical_axes, mesh, run.rules)) for role, module in given.items()
        }
        return jax.jit(initialise, out_shardings=placements)(placed, jax.random.key(training.seed))

    return Program(abstract, placements, names, steps, first_state)


def _flat(function: Any, abstract: TrainState, frozen: Any, placements: TrainState, mesh: Mesh) -> Any:
    """Returns a jitted phase that takes and gives the state as a donated list of arrays."""
    treedef, frozen_treedef = jax.tree.structure(abstract), jax.tree.structure(dict(frozen))

    def flat(leaves: list[jax.Array], frozen_leaves: list[jax.Array], *inputs: Any) -> Any:
        state = jax.tree.unflatten(treedef, leaves)
        state, report = function(state, jax.tree.unflatten(frozen_treedef, frozen_leaves), *inputs)
        return jax.tree.leaves(state), report

    outputs = (jax.tree.leaves(placements), NamedSharding(mesh, PartitionSpec()))
    return jax.jit(flat, donate_argnums=0, out_shardings=outputs)


def _check_roles(run: Run) -> None:
    """Refuses a run whose networks are not those that its objective names."""
    roles = run.objective.roles
    trained = {name for name, role in roles.items() if role.optimizer is not None}
    frozen = {name for name, role in roles.items() if role.optimizer is None or role.lora is not None}
    for given, wanted, how in ((run.build, trained, "built"), (run.frozen, frozen, "given as frozen")):
        if set(given) != wanted:
            raise ConfigError(f"roles {sorted(wanted)} must be {how}, not {sorted(given)}")


def _optimizer(run: Run, role: str, network: Any) -> Optimizer:
    """Builds the optimizer of a role."""
    name = run.objective.roles[role].optimizer
    if name is None or name not in run.optimizers:
        raise ConfigError(f"role {role!r} wants optimizer {name!r}; configured: {sorted(run.optimizers)}")
    axes = {path: tuple(run.logical_axes(path, leaf)) for path, leaf in by_path(network).items()}
    return make_optimizer(run.optimizers[name], axes)


def _starts_some(roles: Mapping[str, Any], role: str, build: Mapping[str, Any]) -> bool:
    """Whether a role's given weights are needed to start a trained role: itself, or one that copies it."""
    return role in build or any(roles[other].source == role for other in build)


def _place_frozen(run: Run, mesh: Mesh) -> dict[str, Any]:
    """Puts the frozen networks on the mesh in their storage types."""
    placed = {}
    for role, module in run.frozen.items():
        dtype = jnp.dtype(run.objective.roles[role].dtype)
        placements = shardings(module, run.logical_axes, mesh, run.objective.roles[role].rules or run.rules)
        cast = jax.jit(lambda module, dtype=dtype: jax.tree.map(lambda leaf: leaf.astype(dtype), module))
        placed[role] = cast(place(module, placements))
    return placed


def _meta(run: Run, phases: Iterable[str], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what every checkpoint says about itself."""
    return {
        **run.meta,
        "phases": list(phases),
        "frozen": {
            role: {"source": run.objective.roles[role].source, "fingerprint": fingerprint(module)}
            for role, module in frozen.items()
        },
        "versions": {"jax": jax.__version__, "flax": flax.__version__},
    }


def _restored(run: Run, checkpoints: Checkpoints, program: Program, batches: Batches, meta: Any) -> TrainState | None:
    """Restores the newest whole checkpoint and moves the batches to it; None where there is none."""
    if checkpoints.latest() is None:
        return None
    given = json.loads(json.dumps(meta))

    def templates(saved: Mapping[str, Any]) -> dict[str, Any]:
        for path, before, now in differences(run.identity(saved), run.identity(given)):
            raise ConfigError(
                f"this directory holds a run with {path}={before}, now {now}: go on with the same card, or start in "
                "another directory (as objective.start, if its weights are wanted)"
            )
        known = saved.get("phases", given["phases"])
        items = {"state": _part(replace(program.abstract, ema={}), known), "data": batches, "meta": None}
        return items | ({"ema": program.abstract.ema} if program.abstract.ema else {})

    step, items = checkpoints.restore(None, templates)
    saved = items["meta"]
    for role, frozen in meta["frozen"].items():
        trained = saved["frozen"].get(role)
        if trained is None or trained["fingerprint"] != frozen["fingerprint"]:
            raise CheckpointError(
                f"frozen role {role!r} is not the network that step {step} was trained with; "
                f"give the same weights ({trained and trained['source']}), or start in another directory"
            )
    _logger.info("continuing after step %d", step)
    for path, before, now in differences(saved.get("run"), given.get("run")):
        _logger.info("changed: %s=%s, was %s", path, now, before)
    return _with_new_phases(replace(items["state"], ema=items.get("ema", {})), program)


def _part(state: TrainState, phases: Collection[str]) -> TrainState:
    """A state without the counters of phases that a shorter run did not come to."""
    kept = {name: {key: entry for key, entry in getattr(state, name).items() if key in phases} for name in _BY_PHASE}
    return replace(state, **kept)


def _with_new_phases(state: TrainState, program: Program) -> TrainState:
    """A state with counters of all phases: those that are new have not begun."""
    new = [name for name in program.names if name not in state.windows]
    if not new:
        return state

    def counters() -> dict[str, Any]:
        windows = {name: empty_window(len(program.names[name])) for name in new}
        return {"updates": {name: jnp.int32(0) for name in new}, "windows": windows}

    places = {entry: {name: getattr(program.placements, entry)[name] for name in new} for entry in _BY_PHASE}
    begun = jax.jit(counters, out_shardings=places)()
    return replace(state, **{entry: getattr(state, entry) | begun[entry] for entry in _BY_PHASE})
