"""Metrics on disk: one JSON row per logged step, and the same numbers as TensorBoard events.

A run that is resumed continues the file as if it had never stopped: rows after the restored step are dropped first.
Names that begin with `time/` are measured and differ from run to run; all others are determined by the configuration.

A row holds the mean of every metric over the updates since the row before. A metric that is itself a ratio of sums is
logged as two: `<name>:sum` and `<name>:count` become one entry `<name>`, the quotient of the totals, which is left out
where the count is zero. So is the loss per level bucket made: `loss_bucket/3:sum`, `loss_bucket/3:count`.

This module must not know what the metrics mean.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

_logger = logging.getLogger("vidar")


def window_means(names: Sequence[str], sums: Sequence[float], count: int) -> dict[str, float]:
    """Turns one window's sums into the entries of a row.

    Args:
        names: Metric names.
        sums: Sum of each over `count` updates.
        count: Updates in the window.

    Returns:
        Means by name, and the quotient of each `:sum` and `:count` pair; nothing where there was no update.
    """
    if count == 0:
        return {}
    totals = dict(zip(names, map(float, sums), strict=True))
    entries = {}
    for name, total in totals.items():
        if name.endswith(":sum") and name.removesuffix("sum") + "count" in totals:
            divisor = totals[name.removesuffix("sum") + "count"]
            if divisor:
                entries[name.removesuffix(":sum")] = total / divisor
        elif not (name.endswith(":count") and name.removesuffix("count") + "sum" in totals):
            entries[name] = total / count
    return entries


class MetricWriter:
    """Writes rows of metrics and images of one run; only the first process writes.

    Args:
        directory: Where `metrics.jsonl` and the TensorBoard events lie.
        after: Step that the run continues from; later rows are dropped.
        tensorboard: Whether to write TensorBoard events, too.
    """

    def __init__(self, directory: str | os.PathLike[str], after: int = 0, tensorboard: bool = True):
        self.directory = Path(directory)
        self._file = None
        self._events: Any = None
        if jax.process_index() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "metrics.jsonl"
        _drop_rows(path, after)
        self._file = path.open("a")
        if tensorboard:
            self._events = _tensorboard(self.directory, after)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row.

        Args:
            step: Global step.
            values: Python numbers by name; what is not finite is written as null.
        """
        if self._file is None:
            return
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels_hwc: np.ndarray) -> None:
        """Writes one image to TensorBoard.

        Args:
            step: Global step.
            name: Its tag.
            pixels_hwc: uint8 `[H, W, 3]`.
        """
        if self._events is not None:
            self._events.add_image(name, pixels_hwc, step, dataformats="HWC")

    def synchronize(self) -> None:
        """Forces the rows to the disk; called before a checkpoint, whose run must find them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def _drop_rows(path: Path, after: int) -> None:
    """Rewrites a file of rows without those past a step, or torn by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= after:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _tensorboard(directory: Path, after: int) -> Any:
    """Opens TensorBoard events where tensorboardX is installed; they hide what was written after `after`."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        _logger.info("tensorboardX is not installed (pip install 'vidar[log]'): metrics go to metrics.jsonl only")
        return None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=after + 1 if after else None)
