"""Caption accuracy: of true clips, of clips whose captions are another's, and of clips with one known mistake."""

from dataclasses import replace

import numpy as np
import pytest

from vidar.data.world import CAPTIONED, States, caption, render
from vidar.errors import DataError
from vidar.evaluation import world
from vidar.evaluation.captions import Accuracy, accuracy, held_out, seen

BALL, SQUARE, TRIANGLE = range(3)
RED, GREEN, BLUE = 0, 2, 4


@pytest.fixture(scope="module")
def truth():
    return held_out(300)


def test_true_clips_say_what_their_captions_say(truth):
    result = accuracy(truth.pixels, truth.captions)
    assert result.all.all()
    assert result.verbs.mean() > 0.97
    summary = result.summary()
    assert summary["all"][::2] == pytest.approx((1.0, 1.0))
    assert list(summary) == ["count", "colours", "kinds", "order", "all", "verbs"]


def test_another_clips_captions_are_met_by_chance_alone(truth):
    order = np.random.default_rng(0).permutation(300)
    summary = accuracy(truth.pixels[order], truth.captions).summary()
    # Half of the captions name one shape, of four kinds and colours; the others are of many.
    assert summary["all"][0] < 0.15
    assert 0.4 < summary["count"][0] < 0.6
    assert summary["all"][1] < summary["all"][0] < summary["all"][2] < 0.2


def test_noise_and_nothing_show_no_caption(truth):
    noise = np.random.default_rng(0).integers(0, 256, truth.pixels.shape, dtype=np.uint8)
    assert accuracy(noise, truth.captions).all.mean() < 0.02
    assert not accuracy(np.full_like(truth.pixels, 18), truth.captions).count.any()


def two_shapes():
    """A red ball that moves right, and a blue square that enters from the right in frame 4."""
    frames = np.arange(8)[:, None]
    ball = np.array([[4.0, 4.0]]) + frames * [1.0, 0.0]
    square = np.array([[27.0, 14.0]]) - frames * [2.0, 0.0]
    position = np.stack([ball, square], axis=1)
    present = np.all((position >= 0) & (position <= CAPTIONED.size), axis=-1)
    return States(position, np.array([BALL, SQUARE]), np.array([RED, BLUE]), present)


WRONG = {
    "count": ("count", "colours", "kinds", "order"),
    "twice": ("count",),
    "colours": ("colours", "kinds", "order"),
    "kinds": ("kinds",),
    "order": ("order",),
    "verbs": ("verbs",),
}


@pytest.mark.parametrize("mistake", [None, *WRONG])
def test_each_fact_is_judged_by_itself(mistake):
    states = two_shapes()
    text = caption(states)
    assert text == "a red ball moves right, then a blue square enters"
    position = states.position.copy()
    if mistake == "count":
        position[:, 1] = 99.0
    if mistake == "order":
        position[:, 1] = 14.0
    if mistake == "verbs":
        position[:, 0] = position[::-1, 0]
    changes = {
        "colours": {"colour": np.array([RED, GREEN])},
        "kinds": {"kind": np.array([BALL, TRIANGLE])},
    }.get(mistake, {})
    shown = replace(states, position=position, **changes)
    if mistake == "twice":  # a second ball of the same red, for two frames
        there = np.isin(np.arange(8), (2, 3))
        ball = np.where(there[:, None], [14.0, 6.0], 99.0)
        shown = States(
            np.concatenate([position, ball[:, None]], axis=1),
            np.array([BALL, SQUARE, BALL]),
            np.array([RED, BLUE, RED]),
            np.concatenate([states.present, there[:, None]], axis=1),
        )
    result = accuracy(render(CAPTIONED, shown)[None], [text])
    for name in ("count", "colours", "kinds", "order", "verbs"):
        assert bool(getattr(result, name)[0]) == (name not in WRONG.get(mistake, ())), name
    assert bool(result.all[0]) == (mistake in (None, "verbs"))


def test_one_spoilt_frame_changes_nothing():
    states = two_shapes()
    video = render(CAPTIONED, states)
    video[2] = 18
    video[5] = render(CAPTIONED, replace(states, colour=np.array([GREEN, BLUE])))[5]
    found = seen(video)
    assert [(clause.colour, clause.kind, clause.verb) for clause in found] == [
        (RED, BALL, "moves right"),
        (BLUE, SQUARE, "enters"),
    ]


def test_the_order_of_entering_counts():
    yes = np.array([True])
    same = Accuracy(yes, yes, yes, ~yes, yes)
    assert not same.all[0]
    with pytest.raises(DataError, match="'a hot dog'"):
        accuracy(render(CAPTIONED, two_shapes())[None], ["a hot dog"])


def test_seeds_beside_each_other_share_no_caption_list():
    lists = [held_out(40, seed).captions for seed in (0, 1)]
    shifts = (np.mean([one == other for one, other in zip(lists[0][by:], lists[1], strict=False)]) for by in range(20))
    assert max(shifts) < 0.3
    clips = [world.held_out(8, 8, seed).pixels for seed in (0, 1)]
    assert not any((one == other).all() for one in clips[0] for other in clips[1])
