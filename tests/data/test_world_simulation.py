"""The procedural world's rules: determinism, actions, collisions, entries."""

import dataclasses
import hashlib

import numpy as np
import pytest

from vidar.data.world import WorldConfig, initial_state, render, sample_actions, simulate, step
from vidar.data.world.simulation import BALL, SQUARE, TRIANGLE, State, bounds, reach
from vidar.errors import ConfigError

ONE = WorldConfig()
MANY = WorldConfig(size=32, shapes=3)
NONE, LEFT, RIGHT, UP, DOWN = range(5)


def state(position, velocity, kind, gravity=0.0):
    count = len(kind)
    return State(
        np.array(position, np.float64),
        np.array(velocity, np.float64),
        np.array(kind),
        np.arange(count),
        np.zeros(count, np.int64),
        np.zeros(count, bool),
        gravity,
        0,
    )


@pytest.mark.parametrize(
    ("config", "seed", "golden"),
    [(ONE, 7, "4484a6db9816e158"), (MANY, 2, "b652b357861ef5f1")],
)
def test_a_seed_gives_the_same_pixels_everywhere(config, seed, golden):
    actions = sample_actions(config, seed, 24)
    frames = render(config, simulate(config, seed, actions))
    assert hashlib.sha256(actions.tobytes() + frames.tobytes()).hexdigest()[:16] == golden


def test_one_shape_moves_by_position_and_action_alone():
    directions = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])
    at_wall = 0
    for seed in range(20):
        actions = sample_actions(ONE, seed, 40)
        states = simulate(ONE, seed, actions)
        low, high = bounds(ONE, states.kind)
        expected = np.clip(states.position[:-1, 0] + directions[actions[1:]], low, high)
        np.testing.assert_array_equal(states.position[1:, 0], expected)
        at_wall += (states.position[:, 0] == low).sum() + (states.position[:, 0] == high).sum()
    assert at_wall > 20


def test_actions_are_sticky_and_begin_with_none():
    actions = np.stack([sample_actions(ONE, seed, 100) for seed in range(200)])
    assert actions.dtype == np.int32
    assert (actions[:, 0] == NONE).all()
    assert 0.7 < (actions[:, 1:-1] == actions[:, 2:]).mean() < 0.9
    np.testing.assert_allclose(np.bincount(actions[:, 1:].ravel()) / actions[:, 1:].size, 0.2, atol=0.02)


def test_first_action_has_no_effect():
    actions = sample_actions(ONE, 3, 12)
    changed = np.concatenate([[RIGHT], actions[1:]])
    np.testing.assert_array_equal(simulate(ONE, 3, actions).position, simulate(ONE, 3, changed).position)


@pytest.mark.parametrize("offset", [0.0, 2.0, -3.5])
def test_equal_masses_keep_momentum_and_energy(offset):
    before = state([[4, 28], [10, 14], [20, 14 + offset]], [[0, 0], [1.1, 0.2], [-0.9, 0.1]], [BALL, BALL, BALL])
    after = before
    for _ in range(8):
        after = step(MANY, after, NONE)
    assert not np.allclose(after.velocity, before.velocity)
    np.testing.assert_allclose(after.velocity.sum(axis=0), before.velocity.sum(axis=0), atol=1e-12)
    np.testing.assert_allclose((after.velocity**2).sum(), (before.velocity**2).sum(), rtol=1e-12)


def test_head_on_collision_exchanges_velocities():
    after = state([[4, 28], [10, 14], [17, 14]], [[0, 0], [1.0, 0], [-0.5, 0]], [BALL, BALL, BALL])
    for _ in range(3):
        after = step(MANY, after, NONE)
    np.testing.assert_allclose(after.velocity[1:], [[-0.5, 0], [1.0, 0]], atol=1e-12)
    assert after.position[2, 0] - after.position[1, 0] >= 6 - 1e-9


def test_walls_return_a_shape_as_a_mirror_does():
    after = state([[4, 28], [28.5, 10]], [[0, 0], [1.0, 0.25]], [BALL, BALL])
    after = step(MANY, after, NONE)
    np.testing.assert_allclose(after.position[1], [28.5, 10.25])
    np.testing.assert_allclose(after.velocity[1], [-1.0, 0.25])


def test_energy_stays_under_gravity():
    config = dataclasses.replace(MANY, gravity=0.08)
    now = state([[4, 28], [20, 8]], [[0, 0], [0, 0]], [SQUARE, BALL], gravity=0.08)
    heights = []
    for _ in range(400):
        now = step(config, now, NONE)
        heights.append(now.position[1, 1])
    assert max(heights) > 27
    np.testing.assert_allclose([min(heights[:100]), min(heights[300:])], 8, atol=0.05)


def test_the_controlled_shape_pushes_and_is_held_up_at_the_wall():
    now = state([[10, 16], [18, 16]], [[0, 0], [0, 0]], [BALL, BALL])
    for _ in range(4):
        now = step(MANY, now, RIGHT)
    np.testing.assert_allclose(now.position, [[14, 16], [20, 16]])
    for _ in range(20):
        now = step(MANY, now, RIGHT)
    np.testing.assert_allclose(now.position, [[23, 16], [29, 16]])


def test_shapes_do_not_overlap_and_stay_inside():
    deepest = 0.0
    for seed in range(60):
        now, actions = initial_state(MANY, seed), sample_actions(MANY, seed, 40)
        assert (np.diff(now.colour) > 0).all()
        reaches = reach(MANY, now.kind)
        low, high = bounds(MANY, now.kind)
        for action in actions[1:]:
            now = step(MANY, now, action)
            settled = (now.start <= now.frame) & ~now.entering
            assert ((now.position >= low - 1e-9) & (now.position <= high + 1e-9))[settled].all()
            distance = np.linalg.norm(now.position[:, None] - now.position, axis=-1)
            overlap = (reaches[:, None] + reaches - distance)[settled][:, settled]
            deepest = max(deepest, np.triu(overlap, 1).max(initial=0.0))
    assert deepest < 0.5


def test_late_shapes_enter_once_and_then_stay():
    entered = 0
    for seed in range(60):
        states = simulate(MANY, seed, np.zeros(40, np.int32))
        appeared = np.diff(states.present.astype(int), axis=0)
        assert (appeared >= 0).all()
        entered += int(appeared.sum())
        assert states.present[0, 0]
        assert states.present[-1].all()
    assert 15 < entered < 60


def test_kinds_have_the_area_of_the_ball():
    low, high = bounds(ONE, np.array([BALL, SQUARE, TRIANGLE]))
    widths = ONE.size - (high - low)
    np.testing.assert_allclose(widths[SQUARE].prod(), np.pi * 9)
    np.testing.assert_allclose(widths[TRIANGLE].prod() / 2, np.pi * 9)
    np.testing.assert_allclose(widths[BALL], 6)


@pytest.mark.parametrize("wrong", [{"shapes": 4}, {"shapes": 0}, {"shapes": 2}, {"radius": 5.0}, {"frames": 1}])
def test_impossible_worlds_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)) + "|size"):
        WorldConfig(**wrong)
