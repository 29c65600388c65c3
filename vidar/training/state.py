"""The training state: what it holds, how it comes to be, where it lies.

Shapes first, then placements, then values: nothing is ever whole on one device. This module knows roles and
phases; it must not know losses or disks.
"""

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vidar.errors import ConfigError
from vidar.models.lora import attach
from vidar.objectives.protocol import Phase, Role
from vidar.sharding import Rules, shardings
from vidar.training.optimizers import Optimizer

LogicalAxes = Callable[[str, Any], Sequence[str | None]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step.

    Attributes:
        step: Completed global steps.
        networks: Trained networks, by role.
        optimizer: Optimizer states, by role.
        ema: Exponential moving averages, by role that has one; until its `ema_start` an average equals its network.
        aux: The objective's auxiliary state.
        updates: Applied updates, by phase.
        ema_updates: Moves of an average since its start, by role.
        skipped: Updates skipped because the loss or the gradient was not finite.
        skipped_in_a_row: The last of them without an applied update in between.
        windows: Sums of metrics since the last row of the log, by phase.
    """

    step: Any
    networks: Any
    optimizer: Any
    ema: Any
    aux: Any
    updates: Any
    ema_updates: Any
    skipped: Any
    skipped_in_a_row: Any
    windows: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """Sums of one phase's metrics over the steps that one row of the log stands for.

    Attributes:
        number: Which row: completed steps, divided by `log_every`.
        count: Applied updates.
        sums: Sum of each metric over them, in the order of the phase's metric names.
        skipped: Skipped updates.
        most_in_a_row: Longest run of skipped updates seen.
    """

    number: Any
    count: Any
    sums: Any
    skipped: Any
    most_in_a_row: Any


def by_path(module: Any) -> dict[str, Any]:
    """Flattens a module to its arrays by path string (`.blocks.mlp.up.kernel.value`)."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(module)[0]}


def from_paths(module: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns a module with the arrays that `by_path` named; the inverse of it."""
    return jax.tree.unflatten(jax.tree.structure(module), [leaves[path] for path in by_path(module)])


def report_of(state: TrainState, phase: str) -> dict[str, Any]:
    """Returns what the log needs of a state after a phase: its window of metrics, and the counters."""
    return {
        "window": state.windows[phase],
        "skipped": state.skipped,
        "updates": state.updates,
        "ema_updates": state.ema_updates,
    }


def phases_of(objective: Any, steps: int) -> dict[str, Phase]:
    """Returns the phases of all steps by name, in the order of their first appearance.

    Args:
        objective: Objective.
        steps: Number of global steps.

    Returns:
        The phases; one name is one role and one batch.

    Raises:
        ConfigError: A step has no phase, a phase's role is unknown or frozen, or one name stands for two.
    """
    found: dict[str, Phase] = {}
    for step in range(steps):
        phases = objective.phases(step)
        if not phases:
            raise ConfigError(f"objective: it has no phase at step {step}")
        for phase in phases:
            known = found.setdefault(phase.name, phase)
            if (known.role, known.batch) != (phase.role, phase.batch):
                raise ConfigError(f"phase {phase.name!r} stands for two roles or batches: {known} and {phase}")
    for phase in found.values():
        role = objective.roles.get(phase.role)
        if role is None or role.optimizer is None:
            trained = sorted(name for name, role in objective.roles.items() if role.optimizer is not None)
            raise ConfigError(f"phase {phase.name!r} updates {phase.role!r}, which is not trained; trained: {trained}")
    return found


def abstract_networks(build: Mapping[str, Callable[[jax.Array], Any]]) -> dict[str, Any]:
    """Returns the networks' shapes, without computing anything."""
    return {role: jax.eval_shape(function, jax.random.key(0)) for role, function in build.items()}


def initial_state(
    networks: Mapping[str, Any],
    roles: Mapping[str, Role],
    optimizers: Mapping[str, Optimizer],
    aux: Any,
    metric_names: Mapping[str, Sequence[str]],
) -> TrainState:
    """Assembles the state of step 0; meant to be traced.

    Args:
        networks: Trained networks, by role.
        roles: All roles.
        optimizers: By trained role.
        aux: The objective's initial auxiliary state.
        metric_names: By phase.

    Returns:
        The state.
    """
    zero = jnp.int32(0)
    averaged = [role for role in networks if roles[role].ema is not None]
    return TrainState(
        step=zero,
        networks=dict(networks),
        optimizer={role: optimizers[role].init(by_path(network)) for role, network in networks.items()},
        # A copy, not the same buffers: both are donated to the next step.
        ema={role: jax.tree.map(jnp.copy, networks[role]) for role in averaged},
        aux=aux,
        updates=dict.fromkeys(metric_names, zero),
        ema_updates=dict.fromkeys(averaged, zero),
        skipped=zero,
        skipped_in_a_row=zero,
        windows={phase: empty_window(len(names)) for phase, names in metric_names.items()},
    )


def empty_window(metrics: int) -> Window:
    """The window of a phase, with so many metrics, that has not begun."""
    zero = jnp.int32(0)
    return Window(zero - 1, zero, jnp.zeros((metrics,), jnp.float32), zero, zero)


def joined(frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all networks by role; of a role in both, the adapters are trained and the network is frozen."""
    both = {role: attach(frozen[role], tree) if role in frozen else tree for role, tree in trained.items()}
    return {**frozen, **both}


def state_shardings(
    state: TrainState, roles: Mapping[str, Role], logical_axes: LogicalAxes, mesh: Mesh, rules: Rules
) -> TrainState:
    """Derives where every leaf of an abstract state lies: networks by their axes, all that mirrors them likewise.

    Args:
        state: Abstract state.
        roles: All roles, which may have rules of their own.
        logical_axes: From parameter path and leaf to logical axes.
        mesh: Mesh.
        rules: Logical names to mesh axes.

    Returns:
        A state of `NamedSharding`.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    networks = {
        role: shardings(network, logical_axes, mesh, roles[role].rules or rules)
        for role, network in state.networks.items()
    }

    def of_optimizer(role: str) -> Any:
        parameters, places = by_path(state.networks[role]), by_path(networks[role])

        def place(path: Any, leaf: Any) -> NamedSharding:
            name = parameter_of(path, parameters)
            return places[name] if name is not None and parameters[name].shape == leaf.shape else replicated

        return jax.tree_util.tree_map_with_path(place, state.optimizer[role])

    everywhere = jax.tree.map(lambda _: replicated, state)
    return TrainState(
        **vars(everywhere)
        | {
            "networks": networks,
            "optimizer": {role: of_optimizer(role) for role in state.optimizer},
            "ema": {role: _waiting(networks[role], roles[role]) for role in state.ema},
        }
    )


def _waiting(placements: Any, role: Role) -> Any:
    """Where an average lies between its updates."""
    if role.ema_memory == "device":
        return placements
    return jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), placements)


def parameter_of(path: Sequence[Any], parameters: Mapping[str, Any]) -> str | None:
    """Returns the parameter that a leaf of an optimizer's state belongs to, or None (a count, for one)."""
    keys = (entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey))
    return next((key for key in keys if key in parameters), None)


def initial_networks(
    roles: Mapping[str, Role],
    build: Mapping[str, Callable[[jax.Array], Any]],
    given: Mapping[str, Any],
    key: jax.Array,
) -> dict[str, Any]:
    """Returns the trained networks of step 0; meant to be traced.

    Args:
        roles: All roles.
        build: By trained role, from a key to a random network.
        given: Weights to start from, by role; of frozen roles those that others may start as copies of.
        key: Root key.

    Returns:
        By trained role: the given weights, a copy of the role that its `source` names, or a random network.
    """

    def network(role: str, chain: tuple[str, ...] = ()) -> Any:
        if given.get(role) is not None:
            return given[role]
        source = roles[role].source
        if source in chain:
            raise ConfigError(f"roles {chain} start as copies of each other; one of them must have weights of its own")
        if source in roles:
            return network(source, (*chain, role))
        return build[role](jax.random.fold_in(key, zlib.crc32(role.encode())))

    def as_built(path: Any, template: Any, leaf: Any) -> jax.Array:
        if leaf.shape != template.shape:
            name = jax.tree_util.keystr(path)
            raise ConfigError(
                f"initial weights {name} have shape {leaf.shape}, the configuration says {template.shape}"
            )
        # A copy: the state is donated, and these weights may serve another role, too.
        return jnp.copy(leaf.astype(template.dtype))

    trained = {}
    for role, template in abstract_networks(build).items():
        start = network(role)
        if jax.tree.structure(start) != jax.tree.structure(template):
            unlike = sorted(set(by_path(start)) ^ set(by_path(template)))
            raise ConfigError(f"initial weights of role {role!r} are of another network; they differ in {unlike[:3]}")
        trained[role] = jax.tree_util.tree_map_with_path(as_built, template, start)
    return trained


def place(tree: Any, placements: Any) -> Any:
    """Puts arrays that every process holds in full on a mesh; arrays that already lie on it are moved."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, placements)


def fingerprint(tree: Any) -> str:
    """Returns 16 hexadecimal digits that tell weights apart, equal on any mesh.

    Args:
        tree: Pytree of arrays.

    Returns:
        Digest of names, shapes, types and exact bits.
    """

    @jax.jit
    def sums(leaves: list[jax.Array]) -> list[jax.Array]:
        return [_weighted_bits(leaf) for leaf in leaves]

    leaves = by_path(tree)
    named = [
        f"{path} {leaf.shape} {leaf.dtype} {int(total)}"
        for (path, leaf), total in zip(leaves.items(), jax.device_get(sums(list(leaves.values()))), strict=True)
    ]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]


def _weighted_bits(leaf: jax.Array) -> jax.Array:
    """Sums an array's bits, each times its position, modulo 2^32: exact in any order of summation."""
    width = leaf.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")) if width in (8, 16, 32) else leaf
    weight = jnp.ones(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        weight = weight * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * weight + 1), dtype=jnp.uint32)
