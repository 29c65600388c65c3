"""Measures training: the driver's own compiled step for teacher forcing, on clips of random latents.

What the driver does between steps (data, logs, checkpoints) is not in it. This room must not know command lines or
files.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from vidar.benchmark.clock import check_counts, intervals
from vidar.benchmark.report import Record, percentiles
from vidar.benchmark.workload import Workload, describe


def measure(workload: Workload, mesh: Mesh, steps: int, warmup: int | None = None) -> Record:
    """Measures the time of a training step.

    Args:
        workload: What to measure.
        mesh: Devices to measure it on.
        steps: Steps measured.
        warmup: Steps before them; None for 3.

    Returns:
        The measurement; its percentage of the roofline is the model FLOP utilisation.

    Raises:
        ConfigError: The workload does not fit the mesh, or there is nothing to measure.
    """
    warmup = 3 if warmup is None else warmup
    check_counts(steps, warmup)
    program = workload.program(mesh)
    state, batch = program.arguments(mesh)
    update = program.lower(mesh).compile()

    def dispatch() -> Any:
        nonlocal state
        state, report = update(state, batch)
        return report["skipped"]

    times = intervals(dispatch, jax.block_until_ready, steps, warmup)
    return describe(workload, mesh, warmup, percentiles(times), None)
