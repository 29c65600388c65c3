"""The captioned world: which clips it takes, and that what is held out is new and yet made of what is known."""

import itertools
from collections import Counter

import numpy as np
import pytest

from vidar.data.sources import TfdsClips
from vidar.data.world import (
    CAPTIONED,
    COLOURS,
    KINDS,
    States,
    caption,
    draw_held_out,
    read,
    render,
    sample_actions,
    simulate,
)
from vidar.data.world.builder import clip_seed, prepare
from vidar.data.world.captioned import chosen, is_clear, is_held_out
from vidar.data.world.simulation import bounds


def still(colours, kinds):
    position = np.full((8, len(colours), 2), 8.0)
    return States(position, np.array(kinds), np.array(colours), np.ones((8, len(colours)), bool))


def test_a_fifth_of_the_combinations_is_held_out_and_each_shape_is_known():
    pairs = itertools.combinations(range(len(COLOURS)), 2)
    kinds = list(itertools.product(range(len(KINDS)), repeat=2))
    combinations = [(colours, kind) for colours in pairs for kind in kinds]
    held = [one for one in combinations if is_held_out(still(*one))]
    known = [one for one in combinations if not is_held_out(still(*one))]
    assert len(held) == len(combinations) / 5
    shapes = Counter((colour, kind) for one in known for colour, kind in zip(*one, strict=True))
    assert len(shapes) == len(COLOURS) * len(KINDS)
    assert min(shapes.values()) >= 9
    assert {colours for colours, _ in known} == {colours for colours, _ in held}
    alone = [is_held_out(still([colour], [kind])) for colour in range(6) for kind in range(3)]
    assert sum(alone) == 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("captioned")
    prepare(directory, "captioned", clips=150, validation_clips=40, frames=8)
    return directory


def clips(directory, split):
    source = TfdsClips("vidar_world/captioned", str(directory), split, 8, 2**30)
    return [source.clip(index, 0.0) for index in range(len(source))]


def test_captions_of_the_validation_split_occur_in_no_training_clip(prepared):
    train, validation = ({clip["caption"].decode() for clip in clips(prepared, split)} for split in SPLITS)
    assert len(train) > 50
    assert len(validation) > 20
    assert not train & validation


SPLITS = ("train", "validation")


@pytest.mark.parametrize("split", SPLITS)
def test_clips_are_those_of_the_chosen_seeds(prepared, split):
    found = clips(prepared, split)
    assert len(found) == (150 if split == "train" else 40)
    candidates = (clip_seed(0, split, number) for number in itertools.count())
    seeds = itertools.islice(chosen(CAPTIONED, candidates, split == "validation"), len(found))
    for clip, seed in zip(found, seeds, strict=True):
        states = simulate(CAPTIONED, seed, sample_actions(CAPTIONED, seed, 8))
        assert clip["caption"].decode() == caption(states)
        np.testing.assert_array_equal(clip["pixels"], render(CAPTIONED, states))


def test_every_shape_is_whole_in_the_last_frames_and_read_as_what_it_is():
    truths = draw_held_out(60, 2**30)
    late = 0
    for states in truths:
        low, high = bounds(CAPTIONED, states.kind)
        assert np.all((states.position[-2:] >= low - 1e-6) & (states.position[-2:] <= high + 1e-6))
        assert is_clear(CAPTIONED, states)
        assert is_held_out(states)
        late += caption(states).count("enters")
        reading = read(render(CAPTIONED, states)[-2:], CAPTIONED)
        np.testing.assert_array_equal(reading.present.sum(axis=1), len(states.kind))
        np.testing.assert_array_equal(reading.kind[:, states.colour], [states.kind] * 2)
    assert 10 < late < 30


def test_clips_in_which_a_shape_is_not_whole_in_the_end_are_left_out():
    seeds = (37, 108, 465, 635, 838)
    states = [simulate(CAPTIONED, seed, sample_actions(CAPTIONED, seed, 8)) for seed in seeds]
    assert [is_held_out(one) for one in states] == [False, False, True, False, True]
    for one in states:
        low, high = bounds(CAPTIONED, one.kind)
        assert np.any((one.position[-2:] < low) | (one.position[-2:] > high))
        assert not is_clear(CAPTIONED, one)
    for held_out in (False, True):
        assert not list(chosen(CAPTIONED, iter(seeds), held_out))
    assert sum(len(list(chosen(CAPTIONED, range(30), held_out))) for held_out in (False, True)) == 30
