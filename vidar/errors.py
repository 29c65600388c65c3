"""The errors that a person can cause.

Every message is one line that says what was wrong, where, and what would be right; the command line prints it and exits
with code 2. This module knows nothing else of vidar.
"""

import math
from pathlib import Path


class VidarError(Exception):
    """Base of all errors that vidar raises on purpose."""


class ConfigError(VidarError):
    """A configuration that cannot be run: an unknown key, a wrong type, or choices that exclude each other."""


class DataError(VidarError):
    """Data that is missing, truncated or not what the configuration says."""


class CheckpointError(VidarError):
    """A checkpoint, or another file of a run, that cannot be written or read."""


class DivergenceError(VidarError):
    """Too many non-finite training steps in a row."""


def check_range(
    name: str,
    value: float | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Refuses a number outside its bounds, and NaN and infinity always.

    Args:
        name: What it is called where a person gives it.
        value: The number; None, for an option left out, passes.
        least: Smallest value.
        above: Bound that it must exceed.
        most: Largest value.
        below: Bound that it must stay under.

    Raises:
        ConfigError: It is outside; the message names the bounds.
    """
    if value is None:
        return
    finite = not isinstance(value, float) or math.isfinite(value)
    inside = (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )
    if finite and inside:
        return
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    words = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
    raise ConfigError(f"{name}={value} must be {' and '.join(words if finite else ['finite', *words])}")


def make_directory(path: str | Path, error: type[VidarError] = DataError) -> Path:
    """Makes a directory with those above it, if it is not there.

    Args:
        path: The directory.
        error: What is raised.

    Returns:
        The directory.

    Raises:
        VidarError: A file is in the way, or the directory cannot be made; of the class `error`.
    """
    path = Path(path)
    try:
        nearest = next((place for place in (path, *path.parents) if place.exists()), path)
        if nearest.exists() and not nearest.is_dir():
            raise error(f"{path}: {nearest} is a file, not a directory; choose another path")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise error(f"{path}: cannot make this directory: {failure.strerror or failure}") from failure
    return path
