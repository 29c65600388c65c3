"""Scores of rollouts of the procedural world, against rollouts whose errors are known."""

import numpy as np

from vidar.data import world
from vidar.evaluation.world import held_out, score, standing_still


def test_the_truth_scores_perfectly():
    truth = held_out(4, 12)
    result = score(truth.pixels, truth)
    assert result.error.max() < 0.15
    assert result.identity.all()
    assert result.colour.all()
    summary = result.summary()
    assert summary["identity kept"] == (1.0, 1.0, 1.0)
    assert summary["position error"][0] < 0.1


def test_standing_still_errs_by_the_distance_walked():
    truth = held_out(6, 10)
    result = score(standing_still(truth), truth)
    walked = np.stack([np.linalg.norm(s.position[:, 0] - s.position[:1, 0], axis=-1) for s in truth.states])
    np.testing.assert_allclose(result.error, walked, atol=0.15)
    assert walked.max() > 2


def test_a_vanished_or_recoloured_shape_is_noticed():
    truth = held_out(3, 6)
    video = truth.pixels.copy()
    video[0, 3] = video[0, 3].reshape(-1, 3)[0]
    states = truth.states[1]
    other = world.States(states.position, states.kind, (states.colour + 1) % len(world.COLOURS), states.present)
    video[1, 4] = world.render(truth.config, other)[4]
    result = score(video, truth)
    assert result.error[0, 3] == truth.config.size
    assert not result.identity[0, 3]
    assert not result.colour[0, 3]
    assert result.identity[0, :3].all()
    assert not result.identity[1, 4]
    part = result.part(4, 6)
    assert part.error.shape == (3, 2)


def test_another_kind_of_the_same_colour_loses_identity_but_not_colour():
    truth = held_out(8, 5)
    video = truth.pixels.copy()
    for index, states in enumerate(truth.states):
        other = world.States(states.position, (states.kind + 1) % len(world.KINDS), states.colour, states.present)
        video[index] = world.render(truth.config, other)
    result = score(video, truth)
    assert result.colour.all()
    assert result.identity.mean() < 0.05


def test_held_out_sequences_are_deterministic_and_differ():
    first, again, other = held_out(2, 6), held_out(2, 6), held_out(2, 6, seed=2)
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert (first.pixels != other.pixels).any()
    assert (first.actions[:, 0] == 0).all()
