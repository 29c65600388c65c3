"""One phase of a training step: gradients, update, average and metrics, as one pure function of the state.

It is written for one program over the whole mesh. It must not know what the loss computes, nor which hosts there are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from vidar.errors import ConfigError
from vidar.objectives.protocol import Objective, Phase
from vidar.sharding import Rules, constrain
from vidar.training.optimizers import Optimizer
from vidar.training.state import TrainState, Window, by_path, from_paths, joined, parameter_of, report_of

_OWN_METRICS = ("loss", "gradient_norm", "parameter_norm", "update_norm", "learning_rate")


@dataclass(frozen=True)
class StepSettings:
    """What is the same for all phases.

    Attributes:
        accumulate: Microbatches per batch.
        log_every: Steps per window of metrics.
        rules: Logical names to mesh axes.
    """

    accumulate: int
    log_every: int
    rules: Rules


def metric_names(
    objective: Objective, axes: Any, phase: Phase, frozen: Any, networks: Any, aux: Any, batch: Any
) -> tuple[str, ...]:
    """Returns the names of a phase's metrics, sorted, from shapes alone.

    Args:
        objective: Objective.
        axes: The system's axes, handed to the loss.
        phase: Phase.
        frozen: Frozen networks, or their shapes.
        networks: Shapes of what is trained, by role.
        aux: Abstract auxiliary state.
        batch: Abstract batch.

    Returns:
        The driver's own metrics and the objective's.

    Raises:
        ConfigError: The loss or a metric is not a scalar.
    """
    step, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))

    def loss(frozen: Any, networks: Any, aux: Any, batch: Any, step: Any, key: Any) -> Any:
        return objective.loss(phase.name, joined(frozen, networks), aux, axes, batch, step, key)

    returned = jax.eval_shape(loss, dict(frozen), networks, aux, batch, step, key)
    try:
        value, (metrics, _) = returned
        shape = value.shape
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(
            f"loss of phase {phase.name!r} should return (loss, (metrics, aux)), not {returned}"
        ) from None
    if shape:
        raise ConfigError(f"loss of phase {phase.name!r} has shape {shape}; it should be a scalar")
    for name, metric in metrics.items():
        if metric.shape:
            raise ConfigError(f"metric {name!r} of phase {phase.name!r} has shape {metric.shape}; metrics are scalars")
    return tuple(sorted({*metrics, *_OWN_METRICS}))


def make_phase_step(
    objective: Objective,
    axes: Any,
    phase: Phase,
    optimizer: Optimizer,
    names: Sequence[str],
    placements: TrainState,
    settings: StepSettings,
) -> Callable[[TrainState, Mapping[str, Any], Any, jax.Array, jax.Array], tuple[TrainState, dict[str, Any]]]:
    """Builds the update of one phase.

    A loss, gradient or update that is not finite leaves parameters, optimizer, average and auxiliary state as they
    were, and is counted.

    Args:
        objective: Objective.
        axes: The system's axes, handed to the loss.
        phase: Phase.
        optimizer: Optimizer of the phase's role.
        names: Metric names of the phase.
        placements: Shardings of the state.
        settings: Common to all phases.

    Returns:
        A function of state, frozen networks, batch, the steps to advance by (1 for the last phase of a step, else 0)
        and the seed of everything drawn, to the next state and a report of small arrays: the phase's window and
        counters.
    """
    role = objective.roles[phase.role]

    def phase_step(
        state: TrainState, frozen: Mapping[str, Any], batch: Any, advance: jax.Array, seed: jax.Array
    ) -> tuple[TrainState, dict[str, Any]]:
        network = state.networks[phase.role]
        parameters = by_path(network)
        trainable = {path: phase.trainable is None or phase.trainable(path) for path in parameters}

        loss = _loss(objective, axes, phase, state, frozen, trainable)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        value, metrics, aux, gradients = _accumulated(loss, parameters, state.aux, batch, key, settings)
        gradients = jax.lax.with_sharding_constraint(gradients, by_path(placements.networks[phase.role]))

        old = state.optimizer[phase.role]
        start = optimizer.init(parameters) if phase.reset_optimizer else old
        updates, moved, rate = optimizer.update(gradients, start, parameters)
        updates = {path: update * float(trainable[path]) for path, update in updates.items()}
        moved = _only_trainable(moved, start, trainable)
        norms = [global_norm(tree) for tree in (gradients, parameters, updates)]
        applied = jnp.isfinite(value) & jnp.isfinite(norms[0]) & jnp.isfinite(norms[2])

        def chosen(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(applied, x, y), new, old)

        parameters = chosen({path: _add(leaf, updates[path]) for path, leaf in parameters.items()}, parameters)
        own = dict(zip(_OWN_METRICS, (value, *norms, rate), strict=True))
        state = replace(
            state,
            step=state.step + advance,
            networks={**state.networks, phase.role: from_paths(network, parameters)},
            optimizer={**state.optimizer, phase.role: chosen(moved, old)},
            aux=chosen(aux, state.aux),
            **_averaged(state, phase.role, role, parameters, applied, placements.networks[phase.role]),
            **_counted(state, phase.name, names, {**metrics, **own}, applied, settings.log_every),
        )
        return state, report_of(state, phase.name)

    return phase_step


def global_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm over all leaves, summed in float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def _loss(
    objective: Objective,
    axes: Any,
    phase: Phase,
    state: TrainState,
    frozen: Mapping[str, Any],
    trainable: Mapping[str, bool],
) -> Callable[..., Any]:
    """Returns the phase's loss as a function of its role's parameters, of which some are held."""
    network = state.networks[phase.role]

    def loss(leaves: Any, aux: Any, microbatch: Any, key: jax.Array) -> Any:
        free = {path: leaf if trainable[path] else jax.lax.stop_gradient(leaf) for path, leaf in leaves.items()}
        networks = joined(frozen, {**state.networks, phase.role: from_paths(network, free)})
        return objective.loss(phase.name, networks, aux, axes, microbatch, state.step, key)

    return loss


def _accumulated(loss: Any, parameters: Any, aux: Any, batch: Any, key: jax.Array, settings: StepSettings) -> Any:
    """Returns mean loss, mean metrics, last auxiliary state and mean gradients over the microbatches."""
    count = settings.accumulate

    def one(aux: Any, microbatch: Any, index: jax.Array | int) -> Any:
        graded = jax.value_and_grad(loss, has_aux=True)
        (value, (metrics, aux)), gradients = graded(parameters, aux, microbatch, jax.random.fold_in(key, index))
        scalars = {name: metric.astype(jnp.float32) for name, metric in metrics.items()}
        return aux, (value.astype(jnp.float32), scalars, gradients)

    if count == 1:
        aux, (value, metrics, gradients) = one(aux, batch, 0)
        return value, metrics, aux, gradients

    def body(carry: Any, entry: Any) -> Any:
        aux, sums = carry
        aux, terms = one(aux, *entry)
        return (aux, jax.tree.map(jnp.add, sums, terms)), None

    microbatches = jax.tree.map(lambda leaf: _split(leaf, count, settings.rules), batch)
    first = jax.tree.map(lambda leaf: leaf[0], microbatches)
    shapes = jax.eval_shape(one, aux, first, 0)[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    indices = jnp.arange(count, dtype=jnp.int32)
    (aux, sums), _ = jax.lax.scan(body, (aux, zeros), (microbatches, indices))
    value, metrics, gradients = jax.tree.map(lambda leaf: leaf / count, sums)
    return value, metrics, aux, gradients


def _split(leaf: jax.Array, count: int, rules: Rules) -> jax.Array:
    """Splits rows into microbatches, by stride: so every device keeps the rows it holds."""
    rows = leaf.shape[0]
    if rows % count:
        raise ConfigError(f"training.accumulate={count} does not divide the batch of {rows}")
    split = jnp.swapaxes(leaf.reshape(rows // count, count, *leaf.shape[1:]), 0, 1)
    return constrain(split, None, "batch", *(None,) * (leaf.ndim - 1), rules=rules)


def _add(leaf: jax.Array, update: jax.Array) -> jax.Array:
    return (leaf.astype(jnp.float32) + update.astype(jnp.float32)).astype(leaf.dtype)


def _only_trainable(moved: Any, old: Any, trainable: Mapping[str, bool]) -> Any:
    """Returns the new optimizer state, with the old one's leaves for parameters that the phase does not train."""

    def choose(path: Any, new: Any, kept: Any) -> Any:
        name = parameter_of(path, trainable)
        return new if name is None or trainable[name] else kept

    return jax.tree_util.tree_map_with_path(choose, moved, old)


def _averaged(
    state: TrainState, name: str, role: Any, parameters: Any, applied: jax.Array, placements: Any
) -> dict[str, Any]:
    """Returns the moved average of one role; with a decay of 0 before its start, it is a copy until then."""
    if name not in state.ema:
        return {}
    started = state.step >= role.ema_start
    decay = jnp.where(started, jnp.float32(role.ema), jnp.float32(0.0))

    def move(average: jax.Array, leaf: jax.Array) -> jax.Array:
        mixed = decay * average.astype(jnp.float32) + (1.0 - decay) * leaf.astype(jnp.float32)
        return jnp.where(applied, mixed.astype(average.dtype), average)

    average = state.ema[name] if role.ema_memory == "device" else jax.device_put(state.ema[name], placements)
    old = by_path(average)
    average = from_paths(state.ema[name], {path: move(leaf, parameters[path]) for path, leaf in old.items()})
    moves = state.ema_updates[name] + (applied & started).astype(jnp.int32)
    return {"ema": {**state.ema, name: average}, "ema_updates": {**state.ema_updates, name: moves}}


def _counted(
    state: TrainState, phase: str, names: Sequence[str], metrics: Any, applied: jax.Array, log_every: int
) -> dict[str, Any]:
    """Returns the counters, and the phase's window of metrics: begun anew in the first step after a row of the log."""
    window, number = state.windows[phase], state.step // log_every
    same = window.number == number
    hit, missed = applied.astype(jnp.int32), (~applied).astype(jnp.int32)
    in_a_row = (state.skipped_in_a_row + missed) * missed
    values = jnp.stack([jnp.asarray(metrics[name], jnp.float32) for name in names])
    window = Window(
        number=number,
        count=jnp.where(same, window.count, 0) + hit,
        sums=jnp.where(same, window.sums, 0.0) + jnp.where(applied, values, 0.0),
        skipped=jnp.where(same, window.skipped, 0) + missed,
        most_in_a_row=jnp.maximum(jnp.where(same, window.most_in_a_row, 0), in_a_row),
    )
    return {
        "updates": {**state.updates, phase: state.updates[phase] + hit},
        "skipped": state.skipped + missed,
        "skipped_in_a_row": in_a_row,
        "windows": {**state.windows, phase: window},
    }
