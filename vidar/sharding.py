"""Meshes, and the one table from logical axis names to mesh axes.

Model code names its dimensions (`tokens`, `heads`, …) and calls `constrain`; parameters are named by a path → axes
table; `Rules` alone says which mesh axis each name lies on. This module must not know any network.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vidar.errors import ConfigError

AXES = ("data", "fsdp", "sequence", "tensor")

MeshAxes = str | tuple[str, ...] | None


def _flat(entry: MeshAxes) -> tuple[str, ...]:
    """Returns the mesh axes of one partition entry."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the four mesh axes; one of them may be -1 and takes the remaining devices.

    Attributes:
        data: Copies of the whole model; the batch is split over them.
        fsdp: Shards of the parameters along `embed`; the batch is split over them, too.
        sequence: Shards of a clip's tokens, and of the parameters along `embed`.
        tensor: Shards of the heads and of the hidden width.
    """

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ConfigError(f"mesh sizes {sizes} must be positive, at most one of them -1 (the remaining devices)")


@dataclass(frozen=True)
class Rules:
    """Where each logical axis lies: a mesh axis, several, or None for replicated.

    Attributes:
        batch: Clips or sessions.
        frames: Frames of a clip.
        tokens: Query tokens.
        embed: Model width of a parameter; over `sequence`, too, whose devices would hold copies otherwise.
        heads: Attention heads.
        mlp: Hidden width.
        layers: Stacked blocks.
        keys: Keys and values of a cache.
        attended: Heads inside attention and of the caches, where `sequence` holds heads instead of tokens.
        rows: Rows of a codec's frames.
    """

    batch: MeshAxes = ("data", "fsdp")
    frames: MeshAxes = None
    tokens: MeshAxes = "sequence"
    embed: MeshAxes = ("fsdp", "sequence")
    heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    layers: MeshAxes = None
    keys: MeshAxes = None
    attended: MeshAxes = ("tensor", "sequence")
    rows: MeshAxes = "sequence"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for axis in _flat(value):
                if axis not in AXES:
                    raise ConfigError(f"rule {field.name}={value!r}: {axis!r} is none of the mesh axes {AXES}")

    def spec(self, logical_axes: Sequence[str | None]) -> PartitionSpec:
        """Translates the logical axes of one array.

        Args:
            logical_axes: One name, or None for replicated, per dimension.

        Returns:
            The partition over mesh axes.

        Raises:
            ConfigError: A name has no rule, or two dimensions lie on one mesh axis.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in logical_axes:
            if name is not None and name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
                raise ConfigError(f"logical axis {name!r} has no sharding rule; {hint}")
        entries = [None if name is None else getattr(self, name) for name in logical_axes]
        used = [axis for entry in entries for axis in _flat(entry)]
        if len(used) != len(set(used)):
            raise ConfigError(
                f"logical axes {tuple(logical_axes)} collide: two of them lie on one mesh axis, {entries}"
            )
        return PartitionSpec(*entries)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices in the four-axis mesh, with `Auto` axes.

    Args:
        config: Sizes of the axes.
        devices: Devices to use; all by default.

    Returns:
        The mesh with axes `AXES`.

    Raises:
        ConfigError: The sizes do not multiply to the number of devices; the message says what would fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, dataclasses.astuple(config), strict=True))
    named = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest, remainder = divmod(len(devices), fixed)
    if remainder or (-1 not in sizes.values() and rest != 1):
        fits = [size for size in range(1, len(devices) + 1) if len(devices) % size == 0]
        raise ConfigError(
            f"mesh {named} needs {fixed if -1 not in sizes.values() else f'a multiple of {fixed}'} devices, "
            f"there are {len(devices)}; the sizes must multiply to {len(devices)} (axis sizes that fit: {fits}), "
            "or one axis may be -1"
        )
    shape = tuple(rest if size == -1 else size for size in sizes.values())
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def check_split(mesh: Any, logical_axis: str, what: str, size: int, rules: Rules = Rules()) -> None:
    """Refuses a size that its mesh axes do not divide, before anything is traced.

    Args:
        mesh: A mesh, or anything with a `shape` from axis names to sizes.
        logical_axis: Logical name of the dimension.
        what: What a person calls it, such as `model.heads`.
        size: Its size.
        rules: Logical names to mesh axes.

    Raises:
        ConfigError: It does not divide; the message says which shard counts would fit.
    """
    axes = _flat(getattr(rules, logical_axis))
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if size % shards:
        named = " × ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        fits = [count for count in range(1, size + 1) if size % count == 0]
        raise ConfigError(
            f"{what}={size} does not split over the {shards} shards of mesh {named}: use a multiple of {shards}, "
            f"or shards that fit: {fits}"
        )


def constrain(x: jax.Array, *logical_axes: str | None, rules: Rules = Rules()) -> jax.Array:
    """Pins an intermediate array to the mesh set by `jax.set_mesh`; without a mesh it does nothing.

    Mesh axes that a surrounding `shard_map` already took are left out.

    Args:
        x: Any array.
        *logical_axes: One name, or None for replicated, per dimension of `x`.
        rules: Logical names to mesh axes.

    Returns:
        The same values.

    Raises:
        ConfigError: The number of names is not the rank of `x`, or its mesh axes do not divide a dimension.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if len(logical_axes) != x.ndim:
        raise ConfigError(f"{len(logical_axes)} logical axes {logical_axes} for an array of shape {x.shape}")
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = {axis: mesh.shape[axis] for axis, kind in kinds.items() if kind != AxisType.Manual}
    if not free:
        return x
    entries = [_keep(entry, free) for entry in rules.spec(logical_axes)]
    for size, entry, name in zip(x.shape, entries, logical_axes, strict=True):
        shards = math.prod(free[axis] for axis in _flat(entry))
        if size % shards:
            fits = [count for count in range(1, size + 1) if size % count == 0]
            raise ConfigError(
                f"{name} of size {size} does not split over {shards} shards of {entry!r}; shard counts that fit: {fits}"
            )
    spec = PartitionSpec(*entries)
    if AxisType.Explicit in kinds.values():
        return jax.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_divisible(x: jax.Array, *logical_axes: str | None, rules: Rules = Rules()) -> jax.Array:
    """As `constrain`, but dimensions that their mesh axes do not divide are left whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    counts = [math.prod(mesh.shape[axis] for axis in _flat(entry)) for entry in rules.spec(logical_axes)]
    names = [None if size % count else name for size, count, name in zip(x.shape, counts, logical_axes, strict=True)]
    return constrain(x, *names, rules=rules)


def shardings(
    tree: Any, axes_of: Callable[[str, Any], Sequence[str | None]], mesh: Mesh | AbstractMesh, rules: Rules = Rules()
) -> Any:
    """Derives the placement of parameters from their names.

    Of a dimension's mesh axes, those that divide it are used, from the first on; over the others it is replicated.

    Args:
        tree: Pytree of arrays or `jax.ShapeDtypeStruct`.
        axes_of: From path string (`.blocks.mlp.up.kernel.value`) and leaf to one logical name per dimension.
        mesh: Mesh to place on.
        rules: Logical names to mesh axes.

    Returns:
        A tree of `NamedSharding` of the same structure.

    Raises:
        ConfigError: The number of names is not the rank of a leaf, or names collide.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path)
        axes = axes_of(name, leaf)
        shape = np.shape(leaf)
        if len(axes) != len(shape):
            raise ConfigError(f"{name}: {len(axes)} logical axes {tuple(axes)} for shape {shape}")
        entries = [_keep(entry, mesh.shape) for entry in rules.spec(axes)]
        kept = [_dividing(entry, size, mesh.shape) for entry, size in zip(entries, shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree_util.tree_map_with_path(place, tree)


def _keep(entry: MeshAxes, axes: Any) -> MeshAxes:
    """Returns a partition entry without the mesh axes that are not in `axes`."""
    kept = tuple(axis for axis in _flat(entry) if axis in axes)
    if not kept:
        return None
    return kept[0] if len(kept) == 1 else kept


def _dividing(entry: MeshAxes, size: int, axes: Any) -> MeshAxes:
    """Returns the leading mesh axes of a partition entry that together divide a dimension of `size`."""
    names = _flat(entry)
    while size % math.prod(axes[name] for name in names):
        names = names[:-1]
    return entry if names == _flat(entry) else _keep(names, axes)
