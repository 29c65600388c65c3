"""Recorded gameplay: what the actions do is seen, and interruptions leave no trace."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, subprocess_environment
from vidar.data import doom
from vidar.data.doom import record
from vidar.data.records import Episodes
from vidar.errors import ConfigError, DataError

SMALL = {"frames": 900, "size": 16, "shard_frames": 300, "seed": 5}


def test_mistakes_are_told_before_anything_starts(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'e1m1' is unknown; known are health_gathering_supreme"):
        record(tmp_path, scenario="e1m1")
    with pytest.raises(ConfigError, match="more than 2000"):
        record(tmp_path, frames=2_000)
    with pytest.raises(ConfigError, match="size: 4"):
        record(tmp_path, size=4)
    with pytest.raises(ConfigError, match="frame_skip=0"):
        record(tmp_path, frame_skip=0)
    monkeypatch.setattr(doom.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="seed=-1 must be at least 0"):
        record(tmp_path, seed=-1)
    monkeypatch.setattr(doom.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[doom\]'"):
        record(tmp_path)
    assert not list(tmp_path.iterdir())


def test_pictures_are_averaged_over_areas():
    rows = np.arange(120)[:, None, None] // 15 * 10
    picture = np.broadcast_to(rows, (120, 160, 3)).astype(np.uint8)
    np.testing.assert_array_equal(doom._shrink(picture, 8)[:, 3, 1], np.arange(8) * 10)
    np.testing.assert_allclose(doom._areas(160, 32).sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(doom._areas(7, 3)[1], np.array([0, 0, 2 / 3, 1, 2 / 3, 0, 0]) * 3 / 7, atol=1e-6)


def test_the_player_turns_to_the_open_side():
    depth = np.full((120, 160), 2.0)
    depth[:, 107:] = 30.0
    player = doom._Wanderer(np.random.default_rng(0))
    assert [player.act(depth) for _ in range(4)] == [doom.RIGHT] * 4
    player = doom._Wanderer(np.random.default_rng(0))
    assert player.act(depth[:, ::-1]) == doom.LEFT
    free = [doom._Wanderer(np.random.default_rng(seed)).act(np.full((120, 160), 30.0)) for seed in range(200)]
    np.testing.assert_allclose(np.bincount(free, minlength=4) / 200, doom._Wanderer.PROBABILITIES, atol=0.1)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    pytest.importorskip("vizdoom")
    directory = tmp_path_factory.mktemp("doom")
    record(directory, **SMALL)
    return directory


def shift(before, after):
    """Horizontal motion in pixels, by the best match of column profiles."""
    columns = [frame.astype(float).mean(axis=(0, 2)) for frame in (before, after)]
    errors = {}
    for move in range(-3, 4):
        first, second = columns[0][max(0, -move) : 16 - max(0, move)], columns[1][max(0, move) : 16 + min(0, move)]
        errors[move] = np.mean((first - second) ** 2)
    return min(errors, key=errors.get)


def test_turning_moves_the_picture_the_other_way(recording):
    moves = {doom.LEFT: [], doom.RIGHT: []}
    for split in ("train", "validation"):
        episodes = Episodes(recording, split)
        for index in range(len(episodes)):
            frames, actions = episodes.read(index)
            assert actions[0] == doom.NONE
            for frame in range(1, len(actions)):
                if actions[frame] in moves:
                    moves[actions[frame]].append(shift(frames[frame - 1], frames[frame]))
    assert min(len(found) for found in moves.values()) > 50
    assert np.mean(np.array(moves[doom.LEFT]) > 0) > 0.8
    assert np.mean(np.array(moves[doom.RIGHT]) < 0) > 0.8


def test_the_recording_is_as_asked(recording):
    train, validation = Episodes(recording), Episodes(recording, "validation")
    assert (train.lengths.sum(), validation.lengths.sum()) == (600, 300)
    assert train.form.size == (16, 16)
    assert train.form.actions == doom.ACTIONS
    assert train.form.fps == 35 / 4
    _, actions = train.read(0)
    assert 0.6 < (actions[2:] == actions[1:-1]).mean() < 0.95


def children(pid):
    return [child for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the engine's process in /proc")
def test_a_killed_recording_goes_on_with_the_same_data(recording, tmp_path):
    command = f"from vidar.data.doom import record; record({str(tmp_path)!r}, **{SMALL!r})"
    process = subprocess.Popen([sys.executable, "-c", command], env=subprocess_environment(1), cwd=ROOT)
    wait_for(lambda: (tmp_path / "manifest.partial.json").exists() and children(process.pid))
    engines = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{engine}").exists() for engine in engines))
    with pytest.raises(DataError, match="unfinished"):
        Episodes(tmp_path)
    first = (tmp_path / "validation-00000.array_record").stat().st_mtime_ns
    record(tmp_path, **SMALL)
    assert (tmp_path / "validation-00000.array_record").stat().st_mtime_ns == first
    shards = [json.loads((place / "manifest.json").read_text())["shards"] for place in (recording, tmp_path)]
    assert shards[0] == shards[1]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_recording_can_be_extended_but_not_changed(recording, tmp_path):
    pytest.importorskip("vizdoom")
    record(tmp_path, **{**SMALL, "frames": 600})
    record(tmp_path, **SMALL)
    shards = [json.loads((place / "manifest.json").read_text())["shards"] for place in (recording, tmp_path)]
    assert shards[0] == shards[1]
    with pytest.raises(DataError, match="seed=5 instead of 6"):
        record(tmp_path, **{**SMALL, "seed": 6})
