"""What a run tells while it runs: rows of metrics, throughput, and a progress bar.

Metrics stay on the device until a row is due, and are fetched in one transfer that is not waited for. This module knows
windows of sums; it must not know what is trained.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from vidar import devices
from vidar.errors import DivergenceError
from vidar.training.config import TrainingConfig
from vidar.training.health import Health
from vidar.training.logging import MetricWriter, window_means
from vidar.training.state import TrainState, report_of

_logger = logging.getLogger("vidar")
_LINE_EVERY = 30.0


class Reporter:
    """Keeps the clock and the latest report of each phase; writes a row when one is due.

    Args:
        training: Rhythm and limits.
        names: Metric names by phase.
        writer: Receives the rows.
        mesh: Mesh, for the utilisation.
        flops_per_step: Counted FLOPs of one step, or None.
        tokens_per_step: Tokens of one step, or None.
        start: Steps already done.
    """

    def __init__(
        self,
        training: TrainingConfig,
        names: Mapping[str, Sequence[str]],
        writer: MetricWriter,
        mesh: Mesh,
        flops_per_step: float | None,
        tokens_per_step: float | None,
        start: int,
    ):
        self._training = training
        self._names = names
        self._writer = writer
        self._per_step = {"tokens": tokens_per_step, "flops": flops_per_step}
        peak = devices.peak(mesh.devices.flat[0].device_kind)
        self._peak_flops = None if peak is None else peak.flops * mesh.size
        self._health = Health()
        for row in writer.earlier:
            self._health.remember(row)
        self._reports: dict[str, Any] = {}
        self._without: dict[str, int] = {}
        self._due: tuple[int, dict[str, Any], dict[str, float]] | None = None
        # Only a person's terminal shows a bar; a log file would be filled by it, and gets a line now and then.
        silent = True if jax.process_index() else None
        self._bar = tqdm(total=training.steps, initial=start, unit="step", disable=silent, dynamic_ncols=True)
        self._lines, self._next_line = self._bar.disable and not silent, 0.0
        self._start_window(start)

    def continue_from(self, state: TrainState) -> None:
        """Takes up the windows of a state: a row may stand for steps on both sides of a restart."""
        for phase in self._names:
            self.phase_done(phase, jax.device_get(report_of(state, phase)))

    def phase_done(self, phase: str, report: Any) -> None:
        """Keeps the latest report of a phase; the arrays are not read."""
        self._reports[phase] = report

    def step_done(self, done: int, final: bool) -> None:
        """Counts a step; where a row is due, starts to fetch it and writes the row before.

        Args:
            done: Completed steps.
            final: Whether the loop ends here, so that no further step will write what is due.

        Raises:
            DivergenceError: The row before holds too many skipped updates in a row.
        """
        self._bar.update()
        if done % self._training.log_every == 0:
            self.flush()
            number = (done - 1) // self._training.log_every
            for report in self._reports.values():
                for leaf in jax.tree.leaves(report):
                    if isinstance(leaf, jax.Array):
                        leaf.copy_to_host_async()
            self._due = (number, dict(self._reports), self._rates(done) | {"step": done})
            self._start_window(done)
        if final:
            self._next_line = 0.0
        if final or (self._due is not None and done > self._due[2]["step"]):
            self.flush()

    def flush(self) -> None:
        """Writes the row that is due, if any.

        Raises:
            DivergenceError: It holds too many skipped updates in a row.
        """
        if self._due is None:
            return
        (number, fetched, rates), self._due = self._due, None
        with self.waiting_for_device():
            reports = jax.device_get(fetched)
        step = int(rates.pop("step"))
        row: dict[str, float] = {}
        worst = 0
        for phase, report in reports.items():
            window = report["window"]
            if window.number == number:
                means = window_means(self._names[phase], window.sums, int(window.count))
                row |= {f"{phase}/{name}": value for name, value in means.items()}
                # Updates of other phases in between do not make up for those of this one.
                alone = 0 if int(window.count) else self._without.get(phase, 0) + int(window.skipped)
                self._without[phase] = alone
                worst = max(worst, int(window.most_in_a_row), alone)
        latest = max(reports.values(), key=lambda report: sum(map(int, report["updates"].values())))
        row |= {f"updates/{phase}": int(count) for phase, count in latest["updates"].items()}
        row |= {f"ema_updates/{role}": int(count) for role, count in latest["ema_updates"].items()}
        row["skipped"] = max(int(report["skipped"]) for report in reports.values())
        row |= self._health.look(step, row)
        self._writer.scalars(step, row | rates)
        losses = {name: f"{value:.4g}" for name, value in row.items() if name.endswith("/loss")}
        self._bar.set_postfix(losses)
        if self._lines and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY
            words = [f"step {step} of {self._training.steps}", *(f"{name} {value}" for name, value in losses.items())]
            _logger.info("%s, %.3g steps/s", ", ".join(words), rates["time/steps_per_second"])
        if worst >= self._training.max_nonfinite:
            raise DivergenceError(
                f"step {step}: {worst} updates in a row had a loss or gradient that is not finite "
                f"(training.max_nonfinite={self._training.max_nonfinite}); lower the learning rate or clip more"
            )

    def waited_for_data(self, seconds: float) -> None:
        """Adds time spent waiting for a batch."""
        self._data += seconds

    @contextmanager
    def waiting_for_device(self) -> Iterator[None]:
        """Measures a wait for the device, which is not host time."""
        started = time.perf_counter()
        yield
        self._device += time.perf_counter() - started

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Leaves what runs inside (an evaluation, a checkpoint, a compilation) out of the rates."""
        started, device = time.perf_counter(), self._device
        yield
        self._excluded += time.perf_counter() - started
        self._device = device

    @contextmanager
    def compiling(self, phase: str) -> Iterator[None]:
        """Says how long a phase's compilation took."""
        started = time.perf_counter()
        with self.outside():
            yield
        _logger.info("phase %s compiled in %.1f s", phase, time.perf_counter() - started)

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def _start_window(self, done: int) -> None:
        self._window_start, self._window_step = time.perf_counter(), done
        self._data = self._device = self._excluded = 0.0

    def _rates(self, done: int) -> dict[str, float]:
        """Returns the measured entries of a row."""
        steps = done - self._window_step
        seconds = max(time.perf_counter() - self._window_start - self._excluded, 1e-9)
        rate = steps / seconds
        rates = {
            "time/steps_per_second": rate,
            "time/data_wait_ms": 1e3 * self._data / steps,
            "time/data_wait_fraction": self._data / seconds,
            "time/host_ms": 1e3 * max(seconds - self._data - self._device, 0.0) / steps,
        }
        if self._per_step["tokens"] is not None:
            rates["time/tokens_per_second"] = rate * self._per_step["tokens"]
        if self._per_step["flops"] is not None and self._peak_flops is not None:
            rates["time/model_flop_utilisation"] = rate * self._per_step["flops"] / self._peak_flops
        return rates
