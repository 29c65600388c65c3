"""Batches: read ahead in threads, placed on the mesh, and resumable at the last one that was used.

This module knows iterators and placements; it must not know what a batch contains.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vidar.errors import ConfigError, DataError
from vidar.sharding import Rules

_AHEAD = 2


class BatchIterator(Protocol):
    """An endless source of batches that can say, and be told, where it stands (Grain's iterators are such)."""

    def __next__(self) -> Any:
        """Returns the next batch of this process: a dictionary of NumPy arrays."""
        ...

    def get_state(self) -> Any:
        """Returns the position, as something that JSON can hold (or bytes)."""
        ...

    def set_state(self, state: Any) -> None:
        """Moves to a position."""
        ...


class Batches:
    """Named batch streams of a run, each read by a thread of its own.

    Args:
        factories: By batch name, what creates the iterator.
        prepare: From what the iterator yields to a pytree of NumPy arrays, batch first.
        mesh: Mesh on which batches are placed.
        rules: Says over which mesh axes the batch is split.
    """

    def __init__(
        self,
        factories: Mapping[str, Callable[[], BatchIterator]],
        prepare: Callable[[Any], Any],
        mesh: Mesh,
        rules: Rules,
    ):
        self._iterators = {name: factory() for name, factory in factories.items()}
        self._prepare = prepare
        self._sharding = NamedSharding(mesh, rules.spec(("batch",)))
        self._shards = _shards_of_this_process(self._sharding)
        self._positions = {name: iterator.get_state() for name, iterator in self._iterators.items()}
        self._queues: dict[str, queue.Queue[Any]] = {}
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()

    def abstract(self, name: str) -> Any:
        """Returns the shapes and placements of a stream's batches, from its next batch, which it does not use up."""
        iterator = self._iterators[name]
        placed = self._place(next(iterator))
        iterator.set_state(self._positions[name])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), placed)

    def next(self, name: str) -> tuple[Any, float]:
        """Takes the next batch of a stream.

        Args:
            name: Batch name.

        Returns:
            The placed batch, and the seconds waited for it.

        Raises:
            DataError: The stream ended, or its iterator raised it.
        """
        if name not in self._queues:
            self._queues[name] = queue.Queue(maxsize=_AHEAD)
            thread = threading.Thread(target=self._read, args=(name,), name=f"batches {name}", daemon=True)
            thread.start()
            self._threads.append(thread)
        started = time.perf_counter()
        entry = self._queues[name].get()
        waited = time.perf_counter() - started
        if isinstance(entry, Exception):
            raise entry
        batch, self._positions[name] = entry
        return batch, waited

    def get_state(self) -> dict[str, Any]:
        """Returns the position of every stream just after the last batch that was taken."""
        return dict(self._positions)

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves every stream to its saved position, only before the first `next`; a new one stays at its beginning."""
        for name in self._iterators.keys() & state.keys():
            self._iterators[name].set_state(state[name])
            self._positions[name] = state[name]

    def close(self) -> None:
        """Ends the threads; one that is left inside the runtime when the interpreter ends would abort the process."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=10.0)

    def _read(self, name: str) -> None:
        """In a thread: reads ahead, with each batch the position after it; hands on what goes wrong."""
        iterator = self._iterators[name]
        entry: Any = None
        while not (self._stopped.is_set() or isinstance(entry, Exception)):
            try:
                entry = (self._place(next(iterator)), iterator.get_state())
            except StopIteration:
                entry = DataError(f"the batches {name!r} ended; training needs a source that repeats")
            except Exception as error:
                entry = error
            self._put(name, entry)

    def _put(self, name: str, entry: Any) -> None:
        """Puts an entry into a stream's queue, unless the threads are to end."""
        while not self._stopped.is_set():
            try:
                return self._queues[name].put(entry, timeout=0.1)
            except queue.Full:
                continue

    def _place(self, raw: Any) -> Any:
        """Prepares a batch and places this process's share of it."""
        return jax.tree.map(self._place_leaf, self._prepare(raw))

    def _place_leaf(self, leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] % self._shards:
            raise ConfigError(
                f"a batch entry of shape {leaf.shape} does not split over the {self._shards} batch shards "
                f"(data × fsdp) of this process; its first dimension must be a multiple of {self._shards}"
            )
        return jax.make_array_from_process_local_data(self._sharding, leaf)


def _shards_of_this_process(sharding: NamedSharding) -> int:
    """Returns into how many parts this process's rows are split; each process must have rows of its own."""
    entry = sharding.spec[0]
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    shards = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if shards % jax.process_count():
        raise ConfigError(
            f"{shards} batch shards (data × fsdp) do not split over {jax.process_count()} processes, each of which "
            f"reads data of its own; make data × fsdp a multiple of {jax.process_count()}"
        )
    return shards // jax.process_count()
