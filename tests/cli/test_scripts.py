"""Action scripts and given frames."""

import io
from itertools import islice

import numpy as np
import pytest

from vidar.cli.scripts import action_ticks, action_track, given_frames, parse_script
from vidar.data.video import write_video
from vidar.errors import ConfigError, DataError
from vidar.models.layers import ContinuousActions, DiscreteActions


def test_scripts_are_parsed_and_repeated():
    assert parse_script("1*3, 2,0*2", 3) == [1, 1, 1, 2, 0, 0]
    track = action_track(DiscreteActions(3), "1,2", 6)
    assert track.tolist() == [[0, 1, 2, 1, 2, 1]]
    ticks = action_ticks(DiscreteActions(3), "1,2,0", 2, None, io.StringIO())
    assert [tick.tolist() for tick in islice(ticks, 3)] == [[[1, 2]], [[0, 1]], [[2, 0]]]
    assert list(action_ticks(None, None, 1, 2, io.StringIO())) == [None, None]
    assert action_track(None, None, 4) is None


@pytest.mark.parametrize(
    "script", ["5", "left", "1*0", "1*x", "-1", "", "²", "1*²", "1*99999999999", "1*600000,2*600000"]
)
def test_wrong_scripts_are_refused(script):
    with pytest.raises(ConfigError, match="--actions"):
        parse_script(script, 5)


@pytest.mark.parametrize("line", ["1,2", "1*3"])
def test_a_line_of_standard_input_is_one_action(line):
    ticks = action_ticks(DiscreteActions(3), "-", 1, None, io.StringIO(f"1\n{line}\n"))
    assert next(ticks).tolist() == [[1]]
    with pytest.raises(ConfigError, match="one action number a line, 0 to 2"):
        next(ticks)


def test_scripts_are_for_discrete_actions_only():
    with pytest.raises(ConfigError, match="continuous"):
        action_track(ContinuousActions(2), "1", 4)


def test_given_frames_are_reduced_by_a_whole_factor(tmp_path):
    path = tmp_path / "first.png"
    from PIL import Image

    pixels = np.repeat(np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16, 2, 0), 2, 1)
    Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(path)
    given = given_frames(path, 1, 4, 4)
    np.testing.assert_array_equal(given[0, 0, :, :, 0], np.arange(16).reshape(4, 4) * 16)
    with pytest.raises(DataError, match="whole multiple"):
        given_frames(path, 1, 5, 5)
    with pytest.raises(DataError, match="has 1 frames"):
        given_frames(path, 2, 4, 4)
    with pytest.raises(DataError, match="a directory; give an image or video"):
        given_frames(tmp_path, 1, 4, 4)
    write_video(tmp_path / "v.mp4", np.zeros((3, 16, 16, 3), np.uint8), fps=4, scale=1)
    assert given_frames(tmp_path / "v.mp4", 3, 16, 16).shape == (1, 3, 16, 16, 3)
