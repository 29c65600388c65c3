"""Inference plans: which chunk is at which progress at each iteration, and the work between two emitted chunks.

Progress counts solver steps done: 0 is pure noise, `steps` is clean. Nearly every schedule of the field is one
staircase, `progress_u(n) = clip(n - u * lag, 0, steps)`: chunk after chunk (`lag = steps`), a pipeline
(`0 < lag < steps`), or the whole clip at once (`lag = 0`). A tick program is the part of that table which repeats, with
the commit of finished chunks. Everything here is built once, in numpy and plain tuples; this module must know neither
networks nor caches.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vidar.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Plan:
    """The whole table of one clip's generation.

    Attributes:
        before: Progress of each chunk before each iteration, int32 `[n, u]`.
        after: Progress of each chunk after it, int32 `[n, u]`; chunks with `after > before` take a solver step.
        width: The most chunks in flight at one iteration.
    """

    before: np.ndarray
    after: np.ndarray
    width: int

    @property
    def iterations(self) -> int:
        """Number of iterations."""
        return len(self.before)


@dataclass(frozen=True)
class Commit:
    """How a finished chunk's keys and values enter the context cache.

    Attributes:
        kind: `"extra_pass"`: by a row of its own. `"fused"`: in the next chunk's first row. `"last_step"`: by no pass
            at all, the keys and values of the last solver step serve (at that step's level).
        level: Level at which the chunk is committed, in [0, 1].
        noise: Whether noise is really added to reach that level, or the network is merely told so.
        time: The time that the network is told; None for `1000 * level`.
        drops: Names of the conditions that are dropped in the committing pass.
    """

    kind: str
    level: float = 0.0
    noise: bool = False
    time: float | None = None
    drops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("extra_pass", "fused", "last_step"):
            raise ConfigError(f"commit kind {self.kind!r}: unknown; one of extra_pass, fused, last_step")
        if not 0 <= self.level <= 1:
            raise ConfigError(f"commit level {self.level}: a level is in [0, 1]")
        if self.noise and self.level == 0:
            raise ConfigError("commit with noise at level 0 adds none: give its level, or noise=False")
        if self.kind == "last_step" and (self.level, self.noise, self.time, self.drops) != (0.0, False, None, ()):
            raise ConfigError("a last_step commit has no pass of its own: it takes no level, noise, time or drops")


@dataclass(frozen=True)
class RowGroup:
    """Rows of one shape, to be scanned: each row is one forward of the network over some slots.

    Attributes:
        kind: `"denoise"`: the chunks in flight take a step. `"commit"`: the finished chunk is written. `"fused"`: both
            in one forward, where the first slot is the chunk that the previous tick finished.
        before: Progress of each slot before each row, `[rows][slots]`, oldest slot first.
        after: Progress of each slot after it; slots with `after == before` do not move.
        write: Whether the first slot's keys and values enter the context cache.
    """

    kind: Literal["denoise", "commit", "fused"]
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    write: bool = False


@dataclass(frozen=True)
class TickProgram:
    """The work between two emitted chunks; hashable, so that it can be a static argument of a compiled function.

    The chunks in flight sit in `width` slots, oldest first. A tick brings one new chunk of noise in as the newest slot,
    runs the groups in order, emits the oldest slot, and moves the others up. Slots whose chunk does not exist, at the
    beginning and at the end of a clip, are masked.

    Attributes:
        steps: Solver steps per chunk.
        lag: Solver steps between the starts of two chunks; 0 when all start together.
        width: Chunks in flight.
        emits: Chunks that one tick emits: 1, or the whole clip when `lag` is 0.
        delay: Ticks before the first one that emits: `width - 1`, or 0 when `lag` is 0.
        groups: The rows of a tick.
        commit: How emitted chunks enter the context cache; None when `lag` is 0.
    """

    steps: int
    lag: int
    width: int
    emits: int
    delay: int
    groups: tuple[RowGroup, ...]
    commit: Commit | None

    @property
    def rows(self) -> int:
        """Forwards of the network in one tick."""
        return sum(len(group.before) for group in self.groups)


def staircase(chunks: int, steps: int, lag: int) -> Plan:
    """Builds the table `progress_u(n) = clip(n - u * lag, 0, steps)`.

    AR-Diffusion's AD scheduler, SkyReels-V2's `ar_step`, MAGI-1's pipeline (`lag = steps / 4`), FIFO (`lag = 1`) and
    diagonal decoding (chunks are rows of an image, steps its columns) are all this table.

    Args:
        chunks: Chunks of the clip, at least 1.
        steps: Solver steps per chunk, at least 1.
        lag: Solver steps between the starts of two chunks, in `0 … steps`.

    Returns:
        The plan, with `steps + (chunks - 1) * lag` iterations.

    Raises:
        ConfigError: An argument is out of range.
    """
    _check(steps, lag)
    _check_chunks(chunks)
    iteration = np.arange(steps + (chunks - 1) * lag + 1, dtype=np.int32)[:, None]
    progress = np.clip(iteration - np.arange(chunks, dtype=np.int32) * lag, 0, steps)
    return Plan(progress[:-1], progress[1:], min(chunks, _in_flight(steps, lag)) if lag else chunks)


def tick_program(steps: int, lag: int, commit: Commit | None, chunks: int | None = None) -> TickProgram:
    """Builds the rows of one tick; unrolled over ticks, they are the staircase.

    Args:
        steps: Solver steps per chunk, at least 1.
        lag: Solver steps between the starts of two chunks, in `0 … steps`.
        commit: How finished chunks enter the context cache; None exactly when `lag` is 0.
        chunks: Chunks of the clip; needed when `lag` is 0, where they are all in flight, and unused otherwise.

    Returns:
        The tick program.

    Raises:
        ConfigError: An argument is out of range, or the commit does not go with the lag.
    """
    _check(steps, lag)
    if lag == 0:
        if commit is not None:
            raise ConfigError(f"lag=0 denoises the whole clip at once and commits nothing: leave {commit.kind!r} out")
        if chunks is None:
            raise ConfigError("lag=0 denoises the whole clip at once: give its number of chunks")
        _check_chunks(chunks)
        group = _denoise([[row] * chunks for row in range(steps)], steps)
        return TickProgram(steps, lag, chunks, chunks, 0, (group,), None)
    if commit is None:
        raise ConfigError(f"lag={lag}: later chunks attend to finished ones, so give a commit, such as extra_pass")
    width = _in_flight(steps, lag)
    starts = [(width - 1 - slot) * lag for slot in range(width)]
    rows = [[min(steps, start + row) for start in starts] for row in range(lag)]
    return TickProgram(steps, lag, width, 1, width - 1, _committed(rows, steps, commit), commit)


def _committed(rows: list[list[int]], steps: int, commit: Commit) -> tuple[RowGroup, ...]:
    """Places the commit among the denoising rows of a tick."""
    match commit.kind:
        case "extra_pass":
            return _denoise(rows, steps), RowGroup("commit", ((steps,),), ((steps,),), write=True)
        case "fused":
            first = _denoise([[steps, *rows[0]]], steps)
            groups = (RowGroup("fused", first.before, first.after, write=True),)
            return (*groups, _denoise(rows[1:], steps)) if rows[1:] else groups
        case _:  # last_step
            if rows[-1][0] != steps - 1:
                raise ConfigError(
                    f"last_step commits in a chunk's last step, which must be the last row of a tick: "
                    f"lag={len(rows)} does not divide steps={steps}"
                )
            last = (_denoise(rows[-1:], steps, write=True),)
            return (_denoise(rows[:-1], steps), *last) if rows[:-1] else last


def _denoise(rows: list[list[int]], steps: int, write: bool = False) -> RowGroup:
    """A group in which every unfinished slot takes a step in each row."""
    before = tuple(tuple(row) for row in rows)
    return RowGroup("denoise", before, tuple(tuple(min(steps, slot + 1) for slot in row) for row in rows), write)


def _in_flight(steps: int, lag: int) -> int:
    """Chunks in flight at once: `ceil(steps / lag)`."""
    return -(-steps // lag)


def _check(steps: int, lag: int) -> None:
    if steps < 1:
        raise ConfigError(f"steps={steps}: a chunk needs at least 1 solver step")
    if not 0 <= lag <= steps:
        raise ConfigError(f"lag={lag}: must be in 0 … {steps} (0: all chunks at once, {steps}: one after the other)")


def _check_chunks(chunks: int) -> None:
    if chunks < 1:
        raise ConfigError(f"chunks={chunks}: a clip has at least 1")
