"""Times between completed units of work, one of them always dispatched ahead: the device never waits for the host."""

import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from vidar.errors import ConfigError


def intervals(dispatch: Callable[[], Any], finish: Callable[[Any], Any], count: int, warmup: int) -> list[float]:
    """Measures a steady state.

    Args:
        dispatch: Starts one unit and returns at once with something of it.
        finish: Waits for what `dispatch` returned.
        count: Units to measure, at least 1.
        warmup: Units before them, at least 1.

    Returns:
        Seconds between the completions of consecutive units, one for each measured unit.

    Raises:
        ConfigError: There is nothing to measure, or no warm-up.
    """
    check_counts(count, warmup)
    running: deque[Any] = deque([dispatch()])
    completed = []
    for _ in range(warmup + count):
        running.append(dispatch())
        finish(running.popleft())
        completed.append(time.perf_counter())
    finish(running.popleft())
    times = completed[warmup - 1 :]
    return [after - before for before, after in itertools.pairwise(times)]


def check_counts(count: int, warmup: int) -> None:
    """Raises ConfigError where there is nothing to measure, or no warm-up; call it before anything is compiled."""
    if count < 1 or warmup < 1:
        raise ConfigError(f"{count} measured and {warmup} warm-up ticks or steps: both must be at least 1")
