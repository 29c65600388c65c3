"""What a benchmark says: one record a measurement, a table for people, one JSON file a device.

A throughput without its conditions is no number, so a record holds them all. This module must know neither how anything
was measured nor what a network is.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vidar.config import build, to_dict
from vidar.errors import ConfigError, DataError
from vidar.evaluation.writing import replaced


@dataclass(frozen=True)
class Percentiles:
    """The distribution of measured times.

    Attributes:
        p50: Median, milliseconds.
        p90: 90th percentile, milliseconds.
        p99: 99th percentile, milliseconds.
        count: Number of times measured.
    """

    p50: float
    p90: float
    p99: float
    count: int


@dataclass(frozen=True)
class Record:
    """One measurement under its conditions.

    Attributes:
        bench: What was timed: a tick of a stream or a training step.
        device: Kind of device, as jax reports it, and how many.
        preset: Name of the network's shape.
        resolution: Height and width in pixels.
        batch: Sessions of a stream, or clips of a training step.
        window: Latent frames that a query sees at most; for training, those of a clip.
        steps: Solver steps and passes of the commit, such as `"4+1"`; for training, the objective.
        precision: Type of the matrix products.
        backend: Attention back end.
        decoder: Whether decoding to pixels is in the measured time.
        warmup: Ticks or steps before the measurement.
        time: Time of one tick or step; None when it was only lowered.
        frames: Pixel frames that one tick or step makes or consumes, over the whole batch.
        flops: Counted FLOPs of one tick or step.
        roofline: The time that the device needs for that at the least, milliseconds; None where its peaks are unknown.
        first_frame: Time to the first visible frame, milliseconds; None for training.
        software: Versions that matter, such as jax's.
    """

    bench: Literal["stream", "train"]
    device: str
    preset: str
    resolution: tuple[int, int]
    batch: int
    window: int
    steps: str
    precision: str
    backend: str
    decoder: bool
    warmup: int
    time: Percentiles | None
    frames: int
    flops: float
    roofline: float | None = None
    first_frame: float | None = None
    software: str = ""

    @property
    def conditions(self) -> tuple[object, ...]:
        """What makes two records measurements of the same thing: the newer one replaces the older."""
        network = (self.bench, self.preset, self.resolution, self.batch, self.window, self.steps)
        return (*network, self.precision, self.backend, self.decoder, self.time is None)

    @property
    def frames_per_second(self) -> float | None:
        """Pixel frames per second at the median time."""
        return None if self.time is None else 1e3 * self.frames / self.time.p50

    @property
    def percent_of_roofline(self) -> float | None:
        """How much of what the device could do was done, at the median time."""
        return None if self.time is None or self.roofline is None else 100 * self.roofline / self.time.p50


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """Summarises measured times.

    Args:
        seconds: One time for each tick or step, at least one.

    Returns:
        Their percentiles in milliseconds.

    Raises:
        ConfigError: Nothing was measured.
    """
    if not len(seconds):
        raise ConfigError("no times were measured: ask for at least one tick or step after the warm-up")
    p50, p90, p99 = (1e3 * np.quantile(np.asarray(seconds, np.float64), [0.5, 0.9, 0.99])).tolist()
    return Percentiles(p50, p90, p99, len(seconds))


def table(records: Sequence[Record]) -> str:
    """Formats records for people.

    Args:
        records: Any number of records.

    Returns:
        A Markdown table that is aligned as plain text too; `–` stands for what was not measured.
    """
    header = ("bench", "device", "preset", "pixels", "batch", "window", "steps", "precision", "backend")
    times = ("decoder", "warm-up", "p50 ms", "p90 ms", "p99 ms", "first frame ms", "frames/s", "TFLOP", "% of roofline")
    rows = [(*header, *times), *(_cells(record) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def merge(records: Sequence[Record], directory: str | Path) -> tuple[Path, ...]:
    """Writes records into one JSON file a device, in place of older ones under the same conditions.

    Args:
        records: New records.
        directory: Directory of the results, such as `tests/benchmarks/results`.

    Returns:
        The files written, one for each device among the records.

    Raises:
        DataError: A file that is already there cannot be read.
    """
    written = []
    for device in dict.fromkeys(record.device for record in records):
        path = Path(directory) / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
        known = {record.conditions: record for record in (read(path) if path.exists() else ())}
        known |= {record.conditions: record for record in records if record.device == device}
        ordered = sorted(known.values(), key=lambda record: tuple(map(str, record.conditions)))
        with replaced(path) as unfinished:
            unfinished.write_text(json.dumps([to_dict(record) for record in ordered], indent=2) + "\n")
        written.append(path)
    return tuple(written)


def read(path: str | Path) -> tuple[Record, ...]:
    """Reads the records of one device.

    Args:
        path: A file that `merge` wrote.

    Returns:
        Its records.

    Raises:
        DataError: The file is missing, damaged or of another format.
    """
    try:
        entries = json.loads(Path(path).read_text())
        return tuple(build(Record, entry, f"{path}[{index}]") for index, entry in enumerate(entries))
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise DataError(f"{path}: not a file of benchmark results ({error}); move it away or measure again") from error


def _cells(record: Record) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}"

    time = record.time
    conditions = (record.bench, record.device, record.preset, "×".join(map(str, record.resolution)), str(record.batch))
    network = (str(record.window), record.steps, record.precision, record.backend, "in" if record.decoder else "out")
    measured = (None, None, None) if time is None else (time.p50, time.p90, time.p99)
    rates = (record.first_frame, record.frames_per_second)
    work = (f"{record.flops / 1e12:.4g}", number(record.percent_of_roofline))
    return (*conditions, *network, str(record.warmup), *map(number, (*measured, *rates)), *work)
