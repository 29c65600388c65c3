"""Networks to and from the names and forms that other projects give their tensors.

A table has one row for every tensor of a network: its path here, its name in each layout, and an einops pattern that
says how it lies there. From the table follow the shapes that a checkpoint must have, how one is loaded and how one is
written. This room knows no particular network; files are `sources.py`'s.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

from vidar.errors import CheckpointError, ConfigError
from vidar.interop.sources import Stored, Tensors
from vidar.sharding import shardings


@dataclass(frozen=True)
class Row:
    """One tensor.

    Attributes:
        ours: Its path in vidar's network, without `.value`.
        theirs: Its name by layout; `{}` stands for the number of the block where blocks are stacked here.
        pattern: From its form there, which is that of all layouts, to its form here (of one block), for
            `einops.rearrange`.
        sizes: Sizes that the pattern needs.
    """

    ours: str
    theirs: Mapping[str, str]
    pattern: str = "c -> c"
    sizes: Mapping[str, int] | None = None

    def here(self, array: Any) -> Any:
        """From its form there."""
        return rearrange(array, self.pattern, **self.sizes or {})

    def there(self, array: Any) -> Any:
        """From its form here."""
        theirs, ours = self.pattern.split("->")
        return rearrange(array, f"{ours} -> {theirs}", **self.sizes or {})


Table = tuple[Row, ...]
Progress = Callable[[Iterable[Any]], Iterable[Any]]


def shapes(network: Any, table: Table, layout: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint; the network may be one of `jax.ShapeDtypeStruct`s.

    Raises:
        ConfigError: The table has no such layout, or lacks a tensor of the network.
    """
    return {name: stored.shape for name, stored in tensors_of(network, table, layout).items()}


def tensors_of(network: Any, table: Table, layout: str) -> Tensors:
    """A network as a checkpoint that others can load; arrays come to the host when they are read.

    Args:
        network: The network.
        table: Its rows.
        layout: One of the table's.

    Returns:
        Tensors by name, as `load` takes them.

    Raises:
        ConfigError: The table has no such layout, or lacks a tensor of the network.
    """
    found = {}

    def stored(entry: _Entry, leaf: jax.Array, block: int) -> Stored:
        def read() -> np.ndarray:
            part = np.asarray(leaf[block] if entry.stacked else leaf)
            return np.ascontiguousarray(entry.row.there(part))

        form = jax.eval_shape(entry.row.there, entry.form)
        return Stored(form.shape, np.dtype(form.dtype), read)

    for entry, leaf in zip(_entries(network, table, layout), jax.tree.leaves(network), strict=True):
        found |= {name: stored(entry, leaf, block) for block, name in enumerate(entry.names)}
    return found


def renamed(tensors: Tensors, template: Any, table: Table, source: str, target: str) -> Tensors:
    """A checkpoint under the names of another layout; the tensors lie there as they do in their own.

    Args:
        tensors: The checkpoint.
        template: The network with `jax.ShapeDtypeStruct` leaves.
        table: Its rows.
        source: The checkpoint's layout.
        target: The layout that is wanted.

    Returns:
        The same tensors by their new names.

    Raises:
        CheckpointError: Tensors are missing, left over, or have other shapes.
        ConfigError: The table has no such layout, or lacks a tensor of the network.
    """
    _compare(tensors, shapes(template, table, source))
    entries = zip(_entries(template, table, source), _entries(template, table, target), strict=True)
    pairs = (pair for one, other in entries for pair in zip(one.names, other.names, strict=True))
    return {new: tensors[name] for name, new in pairs}


def load(
    tensors: Tensors,
    template: Any,
    table: Table,
    layout: str,
    logical_axes: Callable[[str, Any], tuple[str | None, ...]] | None = None,
    progress: Progress = iter,
) -> Any:
    """Loads a checkpoint, tensor by tensor: host memory holds one of them beside the network's own arrays.

    Args:
        tensors: The checkpoint.
        template: The network with `jax.ShapeDtypeStruct` leaves, whose types the arrays get.
        table: Its rows.
        layout: One of the table's.
        logical_axes: Places the arrays on the current mesh; None replicates them.
        progress: Wraps the list of leaves, such as `tqdm`.

    Returns:
        The network.

    Raises:
        CheckpointError: Tensors are missing, left over, or have other shapes.
        ConfigError: The table has no such layout, or lacks a tensor of the network.
    """
    _compare(tensors, shapes(template, table, layout))
    mesh = jax.sharding.get_mesh()
    placed = [None] * len(jax.tree.leaves(template))
    if logical_axes is not None and not mesh.empty:
        placed = jax.tree.leaves(shardings(template, logical_axes, mesh))
    work = list(zip(_entries(template, table, layout), placed, strict=True))
    leaves = [_leaf(entry, tensors, place) for entry, place in progress(work)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


@dataclass(frozen=True)
class _Entry:
    """One leaf of a network: its row, the form of one block's part, and its names, one a block."""

    row: Row
    form: jax.ShapeDtypeStruct
    names: list[str]
    stacked: bool


def _entries(network: Any, table: Table, layout: str) -> Iterator[_Entry]:
    rows = {row.ours: row for row in table}
    for path, leaf in jax.tree_util.tree_flatten_with_path(network)[0]:
        ours = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        if ours not in rows:
            raise ConfigError(f"the network has {ours}, for which other projects have no name")
        row = rows[ours]
        if layout not in row.theirs:
            raise ConfigError(f"layout {layout!r} is unknown: use one of {', '.join(row.theirs)}")
        stacked = "{}" in row.theirs[layout]
        shape, blocks = (leaf.shape[1:], leaf.shape[0]) if stacked else (leaf.shape, 1)
        names = [row.theirs[layout].format(block) for block in range(blocks)]
        yield _Entry(row, jax.ShapeDtypeStruct(shape, leaf.dtype), names, stacked)


def _compare(found: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> None:
    for title, names in (("lacks", wanted.keys() - found.keys()), ("has beside them", found.keys() - wanted.keys())):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise CheckpointError(f"the checkpoint {title} {len(names)} tensors of this network, such as {first}")
    for name, shape in wanted.items():
        if not jnp.issubdtype(found[name].dtype, jnp.floating):
            raise CheckpointError(
                f"{name} is {found[name].dtype}; weights are floats, quantized ones are not read here"
            )
        if found[name].shape != shape:
            given = list(found[name].shape)
            raise CheckpointError(f"{name} is {given} in the checkpoint, this network's is {list(shape)}")


def _leaf(entry: _Entry, tensors: Tensors, place: Any) -> jax.Array:
    """One leaf, filled block by block in place where blocks are stacked."""

    def read(name: str) -> np.ndarray:
        return entry.row.here(tensors[name].read()).astype(entry.form.dtype)

    if not entry.stacked:
        return jax.device_put(read(entry.names[0]), place)
    shape = (len(entry.names), *entry.form.shape)
    inner = None if place is None else NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    stack = jax.jit(lambda: jnp.zeros(shape, entry.form.dtype), out_shardings=place)()
    for block, name in enumerate(entry.names):
        stack = _fill(stack, jax.device_put(read(name), inner), np.int32(block))
    return stack


@partial(jax.jit, donate_argnums=0)
def _fill(stack: jax.Array, part: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, part, block, 0)
