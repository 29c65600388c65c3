"""The turning test, on generators whose obedience is known."""

import numpy as np
import pytest

from vidar.evaluation.control import turning

LEFT, RIGHT = 1, 2


def textured(count: int = 12, size: int = 32) -> np.ndarray:
    """Smooth random wide textures `[b, h, w, 3]`."""
    noise = np.random.default_rng(0).normal(size=(count, size, 4 * size, 3))
    for axis in (1, 2):
        noise = sum(np.roll(noise, shift, axis) for shift in (-2, -1, 0, 1, 2))
    return (128 + 40 * noise / noise.std()).clip(0, 255).astype(np.uint8)


def panorama(obeys: bool = True, inverted: bool = False):
    """Generates by panning over the textures: left moves the content right."""
    scenes = np.concatenate([textured()] * 2)

    def generate(given, actions):
        rng = np.random.default_rng(1)
        turn = np.where(actions == LEFT, -1, np.where(actions == RIGHT, 1, 0))
        if not obeys:
            turn = np.where(actions > 0, rng.choice([-1, 1], (len(actions), 1)), 0)
        place = 48 + 2 * np.cumsum(-turn if inverted else turn, axis=1)
        return np.stack([
            np.stack([scene[:, x : x + 32] for x in track]) for scene, track in zip(scenes, place, strict=True)
        ])  # fmt: skip

    return generate


def test_an_obedient_generator_passes_and_the_control_is_at_chance():
    starts = textured()[:, None, :, 48:80]
    result = turning(panorama(), starts, 6, LEFT, RIGHT)
    assert result.share == 1.0
    assert result.low == pytest.approx(0.757, abs=1e-3)  # twelve of twelve starts
    assert result.probability == pytest.approx(2 / 2**12)
    assert result.flow_left.mean() == pytest.approx(2.0, abs=0.4)
    assert result.flow_right.mean() == pytest.approx(-2.0, abs=0.4)
    assert result.videos.shape == (24, 6, 32, 32, 3)
    control = turning(panorama(), starts, 6, LEFT, RIGHT, np.random.default_rng(0))
    assert 0.2 < control.share < 0.8


def test_disobedient_and_inverted_generators_fail():
    starts = textured()[:, None, :, 48:80]
    assert 0.2 < turning(panorama(obeys=False), starts, 6, LEFT, RIGHT).share < 0.8
    assert turning(panorama(inverted=True), starts, 6, LEFT, RIGHT).share == 0.0
