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
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vidar.errors import CheckpointError, make_directory

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

    Attributes:
        earlier: Rows that are there already, up to `after`.

    Raises:
        CheckpointError: Nothing can be written there; so do all methods.
    """

    def __init__(self, directory: str | os.PathLike[str], after: int = 0, tensorboard: bool = True):
        self.directory = Path(directory)
        self._path = self.directory / "metrics.jsonl"
        self.earlier: list[dict[str, Any]] = []
        self._file = None
        self._events = None
        if jax.process_index() != 0:
            return
        with self._writing():
            make_directory(self.directory, CheckpointError)
            self.earlier = _drop_rows(self._path, after)
            self._file = self._path.open("a")
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
        with self._writing():
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
            if self._events is not None:
                self._events.scalars(step, values)

    def image(self, step: int, name: str, pixels_hwc: np.ndarray) -> None:
        """Writes one image to TensorBoard.

        Args:
            step: Global step.
            name: Its tag.
            pixels_hwc: uint8 `[H, W, 3]`.
        """
        if self._events is not None:
            with self._writing():
                self._events.image(step, name, pixels_hwc)

    def synchronize(self) -> None:
        """Forces the rows to the disk; called before a checkpoint, whose run must find them."""
        if self._file is not None:
            with self._writing():
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the files; what a full disk has kept from being written is dropped."""
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
            if self._events is not None:
                self._events.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the system's errors into one line."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be written: {error.strerror or error}") from error


class _Events:
    """TensorBoard events, written at once: the library's own thread would be left waiting by a full disk."""

    def __init__(self, directory: Path, after: int):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        messages: Any = event_pb2
        self._event, self._summary = messages.Event, summary
        self._file = event_file_writer.EventsWriter(str(directory / "events"), f".{os.getpid()}")
        if after:
            # Tells the viewer to hide what an interrupted run wrote later.
            start = messages.SessionLog(status=messages.SessionLog.START)
            self._file.write_event(self._event(step=after + 1, file_version="brain.Event:2"))
            self._file.write_event(self._event(step=after + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(step, self._summary.scalar(name, value))

    def image(self, step: int, name: str, pixels_hwc: np.ndarray) -> None:
        self._write(step, self._summary.image(name, pixels_hwc, dataformats="HWC"))

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, summary: Any) -> None:
        self._file.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
        self._file.flush()


def _drop_rows(path: Path, after: int) -> list[dict[str, Any]]:
    """Rewrites a file of rows without those past a step, or torn by a kill; returns the others."""
    if not path.exists():
        return []
    kept, rows = [], []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= after:
                kept.append(line)
                rows.append(row)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return rows


def _tensorboard(directory: Path, after: int) -> _Events | None:
    """Opens TensorBoard events where tensorboardX is installed."""
    path = directory / "tensorboard"
    path.mkdir(exist_ok=True)
    try:
        return _Events(path, after)
    except ImportError:
        _logger.info("tensorboardX is not installed (pip install -e '.[log]'): metrics go to metrics.jsonl only")
        return None
