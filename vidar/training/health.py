"""Whether a distillation goes well: signs of collapse in the rows of the log, and what to try.

It reads the metrics that objectives report, by name, and speaks up when one of them has been out of bounds for several
rows. The remedies are those that the users of Self Forcing and CausVid found. It must not know networks or losses.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_logger = logging.getLogger("vidar")

PATIENCE = 3
"""Rows in a row that a sign must last: one is noise."""

SETTLED = 100
"""Updates of the critic before which nothing is a sign: until it follows the student, what it says grows by itself."""

Row = Mapping[str, float]


@dataclass(frozen=True)
class Sign:
    """One sign of trouble.

    Attributes:
        metric: The metric that shows it.
        shown: Whether a value shows it, given the smallest and the first value so far.
        meaning: What it means.
        remedy: What to try.
    """

    metric: str
    shown: Callable[[float, float, float], bool]
    meaning: str
    remedy: str


SIGNS = (
    Sign(
        "student/contrast",
        lambda value, least, first: value < 0.6,
        "generated latents have lost their contrast: the student collapses",
        "lower the student's learning rate, raise objective.generator_every, or start from better weights (ODE, CD)",
    ),
    Sign(
        "student/contrast",
        lambda value, least, first: value > 1.5,
        "generated latents are over-saturated",
        "lower the teacher's guidance, stop earlier, or take the average of the weights",
    ),
    Sign(
        "student/colour_shift",
        lambda value, least, first: value > 0.5,
        "colours have moved away from the data",
        "lower the teacher's guidance and the student's learning rate; check codec.mean and codec.deviation",
    ),
    Sign(
        "student/dmd_gradient",
        lambda value, least, first: value > 3.0 * least and value > 1.5 * first,
        "the student's gradient grows again: it runs away from its critic",
        "raise objective.generator_every or the critic's learning rate, lower the student's",
    ),
    Sign(
        "critic/loss",
        lambda value, least, first: value > 2.0 * least and value > 1.2 * first,
        "the critic no longer follows the student",
        "raise objective.generator_every, or lower the student's learning rate",
    ),
    Sign(
        "critic/accuracy",
        lambda value, least, first: value > 0.98,
        "the discriminator tells every clip apart and gives no direction",
        "raise matching.penalty_real and penalty_fake, or lower the critic's learning rate",
    ),
)


class Health:
    """Watches the rows of one run."""

    def __init__(self) -> None:
        self._recent: list[deque[bool]] = [deque(maxlen=PATIENCE) for _ in SIGNS]
        self._least: dict[str, float] = {}
        self._first: dict[str, float] = {}

    def remember(self, row: Row) -> list[tuple[Sign, float]]:
        """Takes in one row; returns the signs that have lasted just now, with their values."""
        early = row.get("updates/critic", SETTLED) < SETTLED
        lasting = []
        for sign, recent in zip(SIGNS, self._recent, strict=True):
            value = row.get(sign.metric)
            if value is None or early:
                continue
            first = self._first.setdefault(sign.metric, value)
            least = self._least[sign.metric] = min(value, self._least.get(sign.metric, value))
            lasted = len(recent) == PATIENCE and all(recent)
            recent.append(sign.shown(value, least, first))
            if all(recent) and len(recent) == PATIENCE and not lasted:
                lasting.append((sign, value))
        return lasting

    def look(self, step: int, row: Row) -> dict[str, float]:
        """Looks at one row, and warns of a sign when it has lasted.

        Args:
            step: Step of the row.
            row: Metrics by name.

        Returns:
            Further metrics for the row: `health/critic_to_student`, the ratio of the losses, where there are both.
        """
        for sign, value in self.remember(row):
            _logger.warning(
                "step %d: %s=%.3g, for %d rows of the log: %s; try: %s",
                *(step, sign.metric, value, PATIENCE, sign.meaning, sign.remedy),
            )
        critic, student = row.get("critic/loss"), row.get("student/loss")
        return {} if critic is None or not student else {"health/critic_to_student": critic / student}
