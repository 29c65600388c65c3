"""Batches: read ahead in threads, placed on the mesh, and resumable at the last one that was used.

This module knows iterators and placements; it must not know what a batch contains.
"""

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
        self._shards = self._sharding.num_devices // len(self._sharding.device_set - self._sharding.device_set or {0})
        self._positions = {name: iterator.get_state() for name, iterator in self._iterators.items()}
        self._queues: dict[str, queue.Queue[Any]] = {}
        self._stopped = threading.Event()

    def abstract(self, name: str) -> Any:
        """Returns the shapes and placements of a stream's batches, from its next batch, which it does not use up."""
        iterator = self._iterators[name]
        placed = self._place(next(iterator), name)
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
            threading.Thread(target=self._read, args=(name,), name=f"batches {name}", daemon=True).start()
        started = time.perf_counter()
        entry = self._queues[name].get()
        waited = time.perf_counter() - started
        if isinstance(entry, BaseException):
            raise entry
        batch, self._positions[name] = entry
        return batch, waited
