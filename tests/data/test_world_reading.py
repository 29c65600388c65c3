"""What is drawn is read back: positions, colours, kinds; and what is wrong is seen to be wrong."""

import dataclasses
import time

import numpy as np
import pytest

from vidar.data.world import WorldConfig, compare, read, render, sample_actions, simulate
from vidar.data.world.rendering import PALETTE, coverage
from vidar.data.world.simulation import BALL, SQUARE, TRIANGLE, States

ONE = WorldConfig()
MANY = WorldConfig(size=32, shapes=3)
RED, YELLOW, GREEN, CYAN, BLUE, MAGENTA = range(6)


def clips(config, count=40):
    for seed in range(count):
        states = simulate(config, seed, sample_actions(config, seed, 16))
        yield states, render(config, states)


def still(position, kind, colour):
    """One frame of shapes."""
    return States(np.array([position], np.float64), np.array(kind), np.array(colour), np.ones((1, len(kind)), bool))


def noisy(frames, sigma):
    noise = np.random.default_rng(0).normal(0, sigma, frames.shape)
    return np.clip(np.round(frames + noise), 0, 255).astype(np.uint8)


def softened(frames):
    wide = np.pad(frames.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    tall = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    return np.round((tall[:, :, :-2] + 2 * tall[:, :, 1:-1] + tall[:, :, 2:]) / 4).astype(np.uint8)


@pytest.mark.parametrize("config", [ONE, MANY], ids=["one", "many"])
@pytest.mark.parametrize(
    ("change", "largest", "kinds"),
    [
        (lambda x: x, 0.1, 1),
        (lambda x: noisy(x, 10), 0.15, 1),
        (softened, 0.15, 1),
        (lambda x: noisy(softened(x), 10), 0.3, 0.998),
    ],
    ids=["clean", "noise", "soft", "soft and noise"],
)
def test_everything_is_read_back(config, change, largest, kinds):
    counted, errors, kept = 0, [], []
    for states, frames in clips(config):
        result = compare(read(change(frames), config), states, config)
        counted += result.counted.sum()
        errors.append(result.error[result.counted])
        assert result.found[result.counted].all()
        assert result.colour[result.counted].all()
        kept.append(result.kind[result.counted])
    assert counted > 600
    assert np.concatenate(kept).mean() >= kinds
    assert np.concatenate(errors).max() < largest
    assert np.concatenate(errors).mean() < largest / 3


def test_what_is_absent_is_not_seen():
    states, frames = next(clips(ONE))
    reading = read(frames, ONE)
    others = np.arange(6) != states.colour[0]
    assert not reading.present[:, others].any()
    assert np.isnan(reading.position[:, others]).all()
    assert (reading.kind[:, others] == -1).all()
    np.testing.assert_allclose(reading.area[:, ~others], 1, atol=0.03)
    empty = np.full((1, 16, 16, 3), 20, np.uint8)
    assert not read(noisy(empty, 10), ONE).present.any()


def test_a_position_is_a_pixel_coordinate():
    reading = read(render(ONE, still([[5.0, 9.5]], [BALL], [GREEN])), ONE)
    np.testing.assert_allclose(reading.position[0, GREEN], [5.0, 9.5], atol=0.02)
    frame = render(ONE, still([[5.5, 9.5]], [BALL], [GREEN]))[0]
    np.testing.assert_array_equal(frame[9, 5], PALETTE[GREEN])
    np.testing.assert_array_equal(frame[9, 5 - 4 : 5 + 5], frame[9, 5 - 4 : 5 + 5][::-1])


def test_a_changed_colour_is_found_but_not_kept():
    truth = still([[8.0, 8.0]], [SQUARE], [RED])
    seen = still([[9.0, 8.0]], [SQUARE], [CYAN])
    result = compare(read(render(ONE, seen), ONE), truth, ONE)
    assert result.found.all()
    assert result.kind.all()
    assert not result.colour.any()
    np.testing.assert_allclose(result.error, 1.0, atol=0.05)


def test_a_changed_kind_is_not_kept():
    truth = still([[8.0, 8.0]], [TRIANGLE], [RED])
    result = compare(read(render(ONE, dataclasses.replace(truth, kind=np.array([BALL]))), ONE), truth, ONE)
    assert result.colour.all()
    assert not result.kind.any()


def test_a_vanished_shape_has_the_largest_error():
    truth = still([[8.0, 8.0]], [BALL], [RED])
    result = compare(read(np.full((1, 16, 16, 3), 20, np.uint8), ONE), truth, ONE)
    assert not (result.found | result.colour | result.kind).any()
    np.testing.assert_array_equal(result.error, 16.0)


def test_two_lost_shapes_do_not_share_one_substitute():
    truth = still([[8.0, 8.0], [24.0, 24.0]], [BALL, BALL], [RED, YELLOW])
    seen = still([[23.0, 24.0]], [BALL], [BLUE])
    result = compare(read(render(MANY, seen), MANY), truth, MANY)
    assert result.found.sum() == 1


def test_a_second_shape_of_another_colour_loses_the_colour_if_it_is_larger():
    truth = still([[8.0, 8.0]], [BALL], [RED])
    frame = render(MANY, still([[8.0, 8.0], [20.0, 20.0]], [BALL, BALL], [RED, BLUE]))
    frame[0, 14:27, 14:27] = PALETTE[BLUE]
    assert not compare(read(frame, MANY), truth, MANY).colour.any()


def test_shapes_partly_outside_are_not_counted():
    truth = still([[1.0, 8.0]], [BALL], [RED])
    assert not compare(read(render(ONE, truth), ONE), truth, ONE).counted.any()


@pytest.mark.parametrize("kind", [BALL, SQUARE, TRIANGLE])
def test_coverage_adds_up_to_the_area_around_the_centre(kind):
    offset = np.array([[5.3, 5.6], [5.0, 5.9]])
    cover = coverage(ONE, kind, offset)
    along = np.arange(cover.shape[1]) + 0.5
    area = cover.sum(axis=(1, 2))
    np.testing.assert_allclose(area, np.pi * 9, rtol=0.005)
    np.testing.assert_allclose(cover.sum(axis=1) @ along / area, offset[:, 0], atol=0.02)
    np.testing.assert_allclose(cover.sum(axis=2) @ along / area, offset[:, 1], atol=0.02)


@pytest.mark.timing
def test_thousands_of_frames_a_second():
    frames = np.concatenate([frames for _, frames in clips(ONE, 64)])
    read(frames[:1], ONE)
    start = time.perf_counter()
    read(frames, ONE)
    assert len(frames) / (time.perf_counter() - start) > 2_000
