"""What a person gives on the command line: action scripts such as `1*8,2*4`, first frames, and prompts."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vidar.errors import ConfigError, DataError
from vidar.models.layers import Actions, DiscreteActions

_LONGEST = 1_000_000
"""Frames that a script may have."""


def parse_script(script: str, count: int) -> list[int]:
    """Parses an action script.

    Args:
        script: Comma-separated `action` or `action*frames`; actions are numbers from 0 (none).
        count: Number of actions that the model knows.

    Returns:
        One action per frame.

    Raises:
        ConfigError: An action is unknown, a count is not a positive number, or the script is too long.
    """
    actions: list[int] = []
    for part in script.split(","):
        action, star, frames = part.strip().partition("*")
        number, times = _number(action), _number(frames) if star else 1
        if number is None or number >= count:
            raise ConfigError(
                f"--actions: {part.strip()!r} is no action of this model; use 0 to {count - 1}, as in '1*8,0*4'"
            )
        if not times or len(actions) + times > _LONGEST:
            raise ConfigError(
                f"--actions: {part.strip()!r}: after * comes a number of frames, at least 1, and {_LONGEST} in all"
            )
        actions += [number] * times
    return actions


def _number(text: str) -> int | None:
    """A whole number as people write it; None for anything else, and for more digits than are of use."""
    return int(text) if text.isdecimal() and len(text) <= len(str(_LONGEST)) else None


def action_track(kind: Actions | None, script: str | None, frames: int) -> np.ndarray | None:
    """Actions `[1, frames]` of a whole clip; None for models without actions.

    Args:
        kind: The model's actions.
        script: Action script, repeated; None for no action.
        frames: Frames of the clip; frame 0 has no past, so its action is none.

    Returns:
        int32 `[1, frames]`, or zeros `[1, frames, k]` for models with several buttons.
    """
    _check_kind(kind, script)
    if kind is None:
        return None
    if not isinstance(kind, DiscreteActions):
        return np.zeros((1, frames, kind.count), np.float32 if kind.kind == "continuous" else np.bool_)
    parsed = parse_script(script, kind.count) if script else [0]
    track = [parsed[(frame - 1) % len(parsed)] if frame else 0 for frame in range(frames)]
    return np.asarray([track], np.int32)


def action_ticks(
    kind: Actions | None, script: str | None, chunk: int, ticks: int | None, stdin: TextIO
) -> Iterator[Any]:
    """Actions tick by tick.

    Args:
        kind: The model's actions.
        script: Action script, repeated; `-` reads one action a tick from `stdin`; None for no action.
        chunk: Frames a tick.
        ticks: Number of ticks; None for ever.
        stdin: Where `-` reads from; the stream ends with it.

    Returns:
        int32 `[1, chunk]` or None for no action, one after the other.

    Raises:
        ConfigError: The script has a mistake; or, when its line is read, stdin has one.
    """
    _check_kind(kind, script)
    if not isinstance(kind, DiscreteActions) or script is None:
        return itertools.repeat(None) if ticks is None else itertools.repeat(None, ticks)
    if script == "-":
        return _live_ticks(kind, chunk, ticks, stdin)
    return _script_ticks(parse_script(script, kind.count), chunk, ticks)


def _script_ticks(parsed: list[int], chunk: int, ticks: int | None) -> Iterator[np.ndarray]:
    for tick in itertools.count() if ticks is None else range(ticks):
        frames = range(tick * chunk, (tick + 1) * chunk)
        yield np.asarray([[parsed[frame % len(parsed)] for frame in frames]], np.int32)


def _live_ticks(kind: DiscreteActions, chunk: int, ticks: int | None, stdin: TextIO) -> Iterator[np.ndarray]:
    for _ in itertools.count() if ticks is None else range(ticks):
        line = stdin.readline()
        if not line:
            return
        word = line.strip() or "0"
        if "," in word or "*" in word:
            raise ConfigError(f"--actions: line {word!r}: write one action number a line, 0 to {kind.count - 1}")
        yield np.full((1, chunk), parse_script(word, kind.count)[0], np.int32)


def given_frames(
    path: Path, count: int, height: int, width: int, exact: bool = True, option: str = "--given"
) -> np.ndarray:
    """Reads the first frames of an image or video, as the model takes them.

    Args:
        path: Image or video.
        count: Frames to take.
        height: The model's pixel height.
        width: The model's pixel width.
        exact: Whether every pixel matters: larger pictures of the same shape are reduced by a whole factor, others
            refused. Else their middle is cut out and resized.
        option: Name of the option that says the count.

    Returns:
        uint8 `[1, count, height, width, 3]`.

    Raises:
        DataError: The file cannot be read, is too short, or has another shape.
    """
    from vidar.data.video import read_video
    from vidar.pipeline import fitted

    if count < 1:
        raise ConfigError(f"{option}={count} must be at least 1")
    pixels = read_video(path)[:count]
    if len(pixels) < count:
        raise DataError(f"{path} has {len(pixels)} frames, {option}={count} needs more")
    if not exact:
        return np.stack([fitted(frame, height, width) for frame in pixels])[None]
    factor = pixels.shape[1] // height
    if factor < 1 or pixels.shape[1:3] != (factor * height, factor * width):
        raise DataError(
            f"{path} is {pixels.shape[2]}×{pixels.shape[1]}, the model needs {width}×{height} or a whole multiple"
        )
    blocks = pixels.reshape(count, height, factor, width, factor, 3).astype(np.float32)
    return np.round(blocks.mean(axis=(2, 4))).astype(np.uint8)[None]


def _check_kind(kind: Actions | None, script: str | None) -> None:
    if script is not None and kind is None:
        raise ConfigError("--actions: this model takes no actions; leave it out")
    if script is not None and not isinstance(kind, DiscreteActions):
        raise ConfigError(f"--actions: this model takes {kind.kind} actions, which a script cannot write; leave it out")
