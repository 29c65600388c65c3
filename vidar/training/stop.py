"""Stopping between two steps when the scheduler asks for it.

This module knows signals; it must not know what is stopped.
"""

import logging
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

_logger = logging.getLogger("vidar")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """While entered, turns SIGTERM, Ctrl-C, or the end of a time limit, into a request that `at` reports.

    After Ctrl-C, leaving raises KeyboardInterrupt, so that nothing goes on; a second Ctrl-C does not wait. With several
    processes, JAX's preemption service takes the signal, and `at` is true on all of them at one step; a
    time limit is for a single process.

    Args:
        seconds: Time limit from entering on; None for none.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._requested = threading.Event()
        self._previous: dict[int, Any] = {}
        self._interrupted = False
        self._own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopSignal":
        if self._own:
            self._previous = {number: signal.signal(number, self._request) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        if self._interrupted and kind is None:
            raise KeyboardInterrupt

    def at(self, step: int) -> bool:
        """Whether to stop after a step; every process asks at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested.is_set() or (self._end is not None and time.monotonic() >= self._end)

    @property
    def reason(self) -> str:
        """What asked for the stop."""
        if self._interrupted:
            return "interrupted"
        return "SIGTERM" if self._requested.is_set() or jax.process_count() > 1 else "time limit"

    def _request(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupted = True
            signal.signal(number, self._previous[number])
            _logger.warning("stopping with a checkpoint after this step; Ctrl-C again stops at once")
        self._requested.set()
