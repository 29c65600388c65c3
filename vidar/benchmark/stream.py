"""Measures streaming: ticks of a preset's network with random weights, through its cache, in a steady state.

The clock runs over the two executables of a stream, tick and decode, dispatched as the streaming engine does. This room
must not know command lines or files.
"""

import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vidar.benchmark.clock import check_counts, intervals
from vidar.benchmark.report import Record, percentiles
from vidar.benchmark.workload import Workload, describe


def measure(workload: Workload, mesh: Mesh, ticks: int, warmup: int | None = None) -> Record:
    """Measures the time of a tick and the time to the first frame.

    Args:
        workload: What to measure.
        mesh: Devices to measure it on.
        ticks: Ticks measured.
        warmup: Ticks before them; None for enough to fill the window.

    Returns:
        The measurement. The first frame's time is that from the opening of a session, everything compiled, to its first
        chunk on the host (on the device where it is not decoded); text is projected before.

    Raises:
        ConfigError: The workload does not fit the mesh, or there is nothing to measure.
    """
    warmup = max(3, workload.seen // workload.preset.chunk) if warmup is None else warmup
    check_counts(ticks, warmup)
    stream = _Stream(workload, mesh)
    times = intervals(stream.dispatch, stream.finish, ticks, warmup)
    # Again from the start, with everything compiled and warm.
    started = time.perf_counter()
    stream.open()
    stream.finish(stream.dispatch())
    first = time.perf_counter() - started
    return describe(workload, mesh, warmup, percentiles(times), 1e3 * first)


class _Stream:
    """One batch of sessions on a mesh."""

    def __init__(self, workload: Workload, mesh: Mesh):
        program = workload.program(mesh)
        self._model, _, self._conditions = program.arguments(mesh)
        self._tick = program.lower(mesh).compile()
        with jax.set_mesh(mesh):
            self._fresh = jax.jit(workload.first_state, out_shardings=program.places[1]).lower().compile()
        codec = workload.codec
        self._decode = None if codec is None else jax.jit(codec.decode)
        self.open()

    def open(self) -> None:
        """Starts all sessions anew."""
        self._state = self._fresh()

    def dispatch(self) -> Any:
        """Starts a tick, and the decoding of what it emits."""
        self._state, latents = self._tick(self._model, self._state, self._conditions)
        return latents if self._decode is None else self._decode(latents)

    def finish(self, frames: Any) -> Any:
        """Waits for a chunk: on the host where it is decoded, else on the device."""
        return jax.block_until_ready(frames) if self._decode is None else np.asarray(frames)
