"""What cells are measured by says what it should on videos that are known."""

import numpy as np
import pytest

from vidar.ablation.measures import TURNING, VIDEO, DoomEvaluation, WorldEvaluation
from vidar.data.records import ActionSpec, EpisodeWriter, Format
from vidar.errors import ConfigError, DataError

WORLD = WorldEvaluation(spans={"early": (1, 4), "late": (8, 12)}, clips=4, frames=12)


def test_the_truth_of_the_world_has_no_errors():
    truth = WORLD.truth()
    assert truth.pixels.shape == (4, 12, 16, 16, 3)
    measured = WORLD.measure({VIDEO: truth.pixels}, truth)
    late = {name: np.mean(values) for name, values in measured["spans"]["late"].items()}
    assert late["position_error"] < 0.1
    assert (late["identity_kept"], late["colour_kept"], late["psnr"]) == (1, 1, 100)
    assert late["saturation_error"] == late["sharpness_error"] == late["luminance_error"] == 0
    assert set(WORLD.directions) <= set(late)
    assert len(measured["curves"]["psnr"]["mean"]) == 11


def test_harms_show_where_they_are():
    truth = WORLD.truth()
    video = truth.pixels.copy()
    video[1, 8:] = 0  # the shape of one clip vanishes
    spans = WORLD.measure({VIDEO: video}, truth)["spans"]
    np.testing.assert_array_equal(np.asarray(spans["late"]["position_error"]) >= 16, [False, True, False, False])
    assert spans["late"]["identity_kept"] == [1, 0, 1, 1]
    assert np.mean(spans["early"]["identity_kept"]) == 1
    darker = WORLD.measure({VIDEO: truth.pixels // 2}, truth)
    assert max(darker["spans"]["early"]["luminance_shift"]) < 0
    np.testing.assert_array_equal(
        darker["spans"]["early"]["luminance_error"], -np.asarray(darker["spans"]["early"]["luminance_shift"])
    )
    assert max(darker["curves"]["luminance_shift"]["mean"]) < 0


def test_clips_depend_on_the_evaluations_seed_alone():
    again, other = WORLD.truth(), WorldEvaluation(spans=WORLD.spans, clips=4, frames=12, seed=9).truth()
    np.testing.assert_array_equal(again.pixels, WORLD.truth().pixels)
    assert (again.pixels != other.pixels).any()


def test_spans_outside_the_rollout_are_refused():
    for span in ((0, 4), (4, 4), (8, 13)):
        with pytest.raises(ConfigError, match="spans.x"):
            WorldEvaluation(spans={"x": span}, clips=1, frames=12)


# ------------------------------------------------------------------------------------------------------- gameplay


def recorded(directory, names=("none", "turn_left", "turn_right")):
    """Episodes of moving stripes with random actions."""
    rng = np.random.default_rng(0)
    writer = EpisodeWriter(directory, Format((16, 16), ActionSpec("discrete", names)), {"test": 1})
    for split, count in (("train", 1), ("validation", 6)):
        episodes = []
        for _ in range(count):
            episodes.append(
                (rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), rng.integers(0, len(names), 40, dtype=np.int32))
            )
        writer.write_shard(split, 0, episodes)
    writer.finish()
    return DoomEvaluation(spans={"late": (5, 10)}, clips=4, frames=10, given=2, records=str(directory), turns=6)


def rolling(given, actions, label):
    """Continues by moving the last frame right for action 1 and left for action 2."""
    frames = list(np.moveaxis(given, 1, 0))
    for frame in range(given.shape[1], actions.shape[1]):
        shift = np.where(actions[:, frame] == 1, 1, np.where(actions[:, frame] == 2, -1, 0))
        frames.append(np.stack([np.roll(image, s, axis=1) for image, s in zip(frames[-1], shift, strict=True)]))
    return np.stack(frames, axis=1)


def test_gameplay_is_continued_under_its_own_actions_and_turned(tmp_path):
    evaluation = recorded(tmp_path / "doom")
    truth = evaluation.truth()
    assert truth.pixels.shape == (4, 10, 16, 16, 3)
    assert truth.label is None
    rollouts = evaluation.rollouts(rolling, truth)
    assert rollouts[TURNING].shape == (8, 6, 16, 16, 3)
    measured = evaluation.measure(rollouts, truth)
    assert measured["spans"][TURNING] == {"right_sign": [1.0] * 4}
    assert np.mean(measured["spans"]["late"]["psnr"]) < 20
    backwards = evaluation.measure(rollouts | {TURNING: rollouts[TURNING][[4, 5, 6, 7, 0, 1, 2, 3]]}, truth)
    assert backwards["spans"][TURNING] == {"right_sign": [0.0] * 4}
    exact = evaluation.measure({VIDEO: truth.pixels}, truth)
    assert exact["spans"]["late"]["psnr"] == [100.0] * 4
    assert TURNING not in exact["spans"]
    assert evaluation.metrics_of(TURNING) == ("right_sign",)


def test_recordings_without_turns_are_refused(tmp_path):
    evaluation = recorded(tmp_path / "walk", ("none", "forward", "back"))
    with pytest.raises(DataError, match="no action turn_left"):
        evaluation.rollouts(rolling, evaluation.truth())
