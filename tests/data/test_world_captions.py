"""Captions say what a clip shows."""

import numpy as np
import pytest

from vidar.data.world import (
    COLOURS,
    Clause,
    States,
    WorldConfig,
    caption,
    clauses,
    parse,
    sample_actions,
    simulate,
)
from vidar.errors import DataError

BALL, SQUARE, TRIANGLE = range(3)
RED, BLUE = 0, 4


def clip(paths, kinds, colours, appear=None):
    position = np.stack([np.asarray(path, np.float64) for path in paths], axis=1)
    frames = np.arange(len(position))
    present = np.stack([frames >= start for start in appear or [0] * len(paths)], axis=1)
    return States(position, np.array(kinds), np.array(colours), present)


def line(start, move, frames=9):
    return np.asarray(start) + np.arange(frames)[:, None] * np.asarray(move)


def test_the_example_of_the_readme():
    states = clip([line([8, 4], [0, 1]), line([-4, 20], [2, 0])], [BALL, SQUARE], [RED, BLUE], appear=[0, 3])
    assert caption(states) == "a red ball falls, then a blue square enters"


@pytest.mark.parametrize(
    ("move", "verb"),
    [
        ([0, 1], "falls"),
        ([0, -1], "rises"),
        ([-1, 0.5], "moves left"),
        ([1, 0], "moves right"),
        ([0.05, 0], "stays"),
    ],
)
def test_verbs(move, verb):
    assert caption(clip([line([8, 8], move)], [TRIANGLE], [RED])) == f"a red triangle {verb}"


def test_a_free_shape_bounces_but_an_obedient_one_turns():
    there_and_back = np.concatenate([line([8, 8], [1, 0], 5), line([11, 8], [-1, 0], 6)])
    other = line([20, 20], [0, 0], 11)
    assert caption(clip([other, there_and_back], [BALL, SQUARE], [RED, BLUE])) == (
        "a red ball stays and a blue square bounces"
    )
    assert caption(clip([there_and_back, other], [BALL, SQUARE], [RED, BLUE])) == (
        "a red ball moves left and a blue square stays"
    )


def test_the_top_of_an_arc_is_no_bounce():
    frames = np.arange(11)
    arc = np.stack([8 + 0.2 * frames, 20 - 3.1 * frames + 0.3 * frames**2], axis=1)
    other = line([20, 20], [0, 0], 11)
    assert caption(clip([other, arc], [BALL, SQUARE], [RED, BLUE])).endswith("a blue square moves right")
    fall = np.stack([8 + 0.2 * frames, 20 - np.abs(frames - 6.0)], axis=1)
    assert caption(clip([other, fall], [BALL, SQUARE], [RED, BLUE])).endswith("a blue square bounces")


def test_every_shape_that_is_seen_is_named_once():
    config = WorldConfig(size=32, shapes=3)
    entering = 0
    for seed in range(40):
        states = simulate(config, seed, sample_actions(config, seed, 16))
        text = caption(states)
        entering += "enters" in text
        for index, name in enumerate(COLOURS):
            seen = index in states.colour[states.present.any(axis=0)]
            assert text.count(name) == seen
    assert entering > 5


def test_a_caption_is_read_back_clause_by_clause():
    config = WorldConfig(size=32, shapes=3)
    for seed in range(60):
        states = simulate(config, seed, sample_actions(config, seed, 16))
        assert parse(caption(states)) == clauses(states)
    wanted = (Clause(RED, BALL, "moves left"), Clause(BLUE, SQUARE, "stays"), Clause(5, TRIANGLE, "enters"))
    assert parse("a red ball moves left and a blue square stays, then a magenta triangle enters") == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red ball falls",
        "a pink ball falls",
        "a red cube falls",
        "a red ball",
        "a red ball enters and a blue ball stays",
        "a red ball falls, then a blue ball stays",
    ],
)
def test_what_is_no_caption_is_refused(text):
    with pytest.raises(DataError, match="caption"):
        parse(text)
