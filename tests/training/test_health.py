"""Signs of collapse are noticed when they last, once, with what to try; healthy runs stay quiet."""

import logging

import numpy as np
import pytest

from vidar.training.health import Health

HEALTHY = {
    "student/contrast": 1.0,
    "student/colour_shift": 0.05,
    "student/dmd_gradient": 0.4,
    "student/loss": 0.1,
    "critic/loss": 0.3,
    "critic/accuracy": 0.7,
}


def watched(caplog, rows):
    health = Health()
    with caplog.at_level(logging.WARNING, "vidar"):
        added = [health.look(10 * number, HEALTHY | row) for number, row in enumerate(rows)]
    return [record.getMessage() for record in caplog.records], added


def test_a_healthy_run_is_left_alone(caplog):
    noise = np.random.default_rng(0).uniform(0.8, 1.2, 40)
    messages, added = watched(caplog, [{name: value * factor for name, value in HEALTHY.items()} for factor in noise])
    assert messages == []
    assert added[0] == pytest.approx({"health/critic_to_student": 3.0})


@pytest.mark.parametrize(
    "metric, bad, text",
    [
        ("student/contrast", 0.4, "collapses"),
        ("student/contrast", 1.8, "over-saturated"),
        ("student/colour_shift", 0.8, "colours have moved"),
        ("student/dmd_gradient", 2.0, "runs away"),
        ("critic/loss", 0.9, "no longer follows"),
        ("critic/accuracy", 1.0, "gives no direction"),
    ],
)
def test_a_sign_that_lasts_is_named_once_with_a_remedy(caplog, metric, bad, text):
    messages, _ = watched(caplog, [{}] * 5 + [{metric: bad}] * 6)
    assert len(messages) == 1
    assert text in messages[0]
    assert messages[0].startswith(f"step 70: {metric}=")
    assert "try: " in messages[0]


def test_what_passes_is_noise(caplog):
    messages, _ = watched(caplog, [{}, {"student/contrast": 0.3}, {"student/contrast": 0.3}, {}] * 5)
    assert messages == []


def test_what_comes_back_is_named_again(caplog):
    bad = [{"student/contrast": 0.3}] * 4
    messages, _ = watched(caplog, [*bad, {}, *bad])
    assert len(messages) == 2


def test_rows_without_a_critic_have_no_ratio():
    assert Health().look(1, {"student/loss": 1.0}) == {}


def test_while_the_critic_is_still_the_teacher_nothing_is_a_sign(caplog):
    grows = [{"updates/critic": 5 * number, "student/dmd_gradient": 0.01 * number} for number in range(1, 20)]
    assert watched(caplog, grows)[0] == []
    runs = [{"updates/critic": 100 + number, "student/dmd_gradient": 0.4 if number < 5 else 2.0} for number in range(9)]
    assert "runs away" in watched(caplog, grows + runs)[0][0]


def test_rows_of_before_a_restart_are_remembered(caplog):
    rows = [{"student/dmd_gradient": 0.4}, {"student/dmd_gradient": 2.0}, {"student/dmd_gradient": 2.0}]
    health = Health()
    for row in rows:
        assert health.remember(row) == []
    with caplog.at_level(logging.WARNING, "vidar"):
        health.look(40, {"student/dmd_gradient": 2.0})
    assert "runs away" in caplog.text
