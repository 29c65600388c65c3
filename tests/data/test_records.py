"""Recorded episodes come back exactly, survive interruptions, and damage is noticed and named."""

import gc
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vidar.data.records import ActionSpec, Episodes, EpisodeWriter, Format
from vidar.errors import ConfigError, DataError

DISCRETE = ActionSpec("discrete", ("none", "left", "right"))
FORM = Format((6, 8), DISCRETE, segment=16)
LENGTHS = ((5, 40), (16, 33, 1))


def episode(length, seed, form=FORM):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (length, *form.size, 3), dtype=np.uint8)
    if form.actions.kind == "discrete":
        return frames, rng.integers(0, 3, length, dtype=np.int32)
    actions = rng.normal(size=(length, len(form.actions.names)))
    return frames, actions > 0 if form.actions.kind == "binary" else actions.astype(np.float32)


def write(directory, form=FORM, finish=True):
    writer = EpisodeWriter(directory, form, {"seed": 1})
    for number, lengths in enumerate(LENGTHS):
        writer.write_shard("train", number, [episode(length, length, form) for length in lengths])
    if finish:
        writer.finish()


@pytest.mark.parametrize(
    "actions",
    [DISCRETE, ActionSpec("binary", ("jump", "run", "fire")), ActionSpec("continuous", ("steer", "gas"))],
    ids=lambda spec: spec.kind,
)
def test_any_part_of_any_episode_comes_back(tmp_path, actions):
    form = Format((6, 8), actions, segment=16)
    write(tmp_path, form)
    episodes = pickle.loads(pickle.dumps(Episodes(tmp_path)))
    assert episodes.form == form
    np.testing.assert_array_equal(episodes.lengths, [5, 40, 16, 33, 1])
    for index, length in enumerate([5, 40, 16, 33, 1]):
        frames, pressed = episode(length, length, form)
        for start in range(0, length, 3):
            for stop in range(start + 1, length + 1, 5):
                got_frames, got_actions = episodes.read(index, start, stop - start)
                np.testing.assert_array_equal(got_frames, frames[start:stop])
                np.testing.assert_array_equal(got_actions, pressed[start:stop])
                assert got_actions.dtype == pressed.dtype
        np.testing.assert_array_equal(episodes.read(index)[0], frames)
    episodes.verify()


class Cycle:
    """Garbage whose finalizer runs Python, wherever a thread happens to be when it is collected."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        for _ in range(50):
            pass


def test_threads_read_at_once(tmp_path):
    """Without a lock, parsing an array's header fails in one read of a few hundred."""
    write(tmp_path)
    episodes = Episodes(tmp_path)
    expected = episodes.read(0)[0]

    def read(_):
        Cycle()
        return episodes.read(0)[0]

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(10)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(read, range(3000)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
    assert all((frames == expected).all() for frames in found)


def test_encoded_video_comes_back_nearly_and_with_its_own_size(tmp_path):
    form = Format((33, 47), DISCRETE, encoding="h264", segment=16)
    down, right = np.mgrid[:33, :47]
    frames = np.stack([np.stack([4 * down + f, 4 * right, 0 * down + 90], axis=-1) for f in range(40)]).astype(np.uint8)
    writer = EpisodeWriter(tmp_path, form, {})
    writer.write_shard("train", 0, [(frames, np.zeros(40, np.int32))])
    writer.finish()
    read, _ = Episodes(tmp_path).read(0, 10, 20)
    assert read.shape == (20, 33, 47, 3)
    assert np.abs(read.astype(int) - frames[10:30]).mean() < 3


def test_an_unfinished_recording_is_no_recording(tmp_path):
    write(tmp_path, finish=False)
    with pytest.raises(DataError, match="unfinished"):
        Episodes(tmp_path)
    writer = EpisodeWriter(tmp_path, FORM, {"seed": 1})
    assert [writer.frames("train", number) for number in range(3)] == [45, 50, 0]
    writer.finish()
    assert len(Episodes(tmp_path)) == 5


def test_a_shard_that_breaks_off_leaves_nothing_behind(tmp_path):
    write(tmp_path)

    def breaks_off():
        yield episode(5, 0)
        raise KeyboardInterrupt

    writer = EpisodeWriter(tmp_path, FORM, {"seed": 1})
    with pytest.raises(KeyboardInterrupt):
        writer.write_shard("train", 1, breaks_off())
    Episodes(tmp_path).verify()
    writer = EpisodeWriter(tmp_path, FORM, {"seed": 1})
    assert [writer.frames("train", number) for number in range(2)] == [45, 50]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("form", "source", "said"),
    [
        (Format((8, 8), DISCRETE, segment=16), {"seed": 1}, "size"),
        (FORM, {"seed": 2}, "seed=1 instead of 2"),
    ],
)
def test_other_settings_do_not_mix(tmp_path, form, source, said):
    write(tmp_path)
    with pytest.raises(DataError, match=said):
        EpisodeWriter(tmp_path, form, source)


def test_a_truncated_shard_is_named(tmp_path):
    write(tmp_path)
    shard = tmp_path / "train-00001.array_record"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-00001\.array_record: truncated"):
        Episodes(tmp_path)
    assert EpisodeWriter(tmp_path, FORM, {"seed": 1}).frames("train", 1) == 0


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "train-00000.array_record").unlink()
    with pytest.raises(DataError, match=r"train-00000\.array_record: missing"):
        Episodes(tmp_path)


def test_flipped_bytes_are_noticed_when_read(tmp_path):
    write(tmp_path)
    shard = tmp_path / "train-00000.array_record"
    content = bytearray(shard.read_bytes())
    start = content.find(b"NUMPY")
    for place in range(start + 100, start + 200):
        content[place] ^= 0xFF
    shard.write_bytes(content)
    episodes = Episodes(tmp_path)
    with pytest.raises(DataError, match=r"train-00000\.array_record: damaged"):
        episodes.read(0)
    with pytest.raises(DataError, match=r"train-00000\.array_record: checksum"):
        episodes.verify()
    np.testing.assert_array_equal(episodes.read(2)[0], episode(16, 16)[0])


@pytest.mark.parametrize(
    ("content", "said"), [("{", "damaged"), ('{"schema": "other"}', "not a manifest"), ("[]", "not a manifest")]
)
def test_a_damaged_manifest_is_named(tmp_path, content, said):
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=rf"manifest\.json: {said}"):
        Episodes(tmp_path)


def test_missing_directories_and_splits_are_named(tmp_path):
    with pytest.raises(DataError, match="no recorded episodes"):
        Episodes(tmp_path / "nowhere")
    write(tmp_path)
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        Episodes(tmp_path, "test")


def test_the_manifest_counts(tmp_path):
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [shard["lengths"] for shard in manifest["shards"]] == [list(lengths) for lengths in LENGTHS]
    assert manifest["format"]["actions"] == {"kind": "discrete", "names": ["none", "left", "right"]}


def test_unknown_encodings_are_refused():
    with pytest.raises(ConfigError, match="raw, h264"):
        Format((8, 8), DISCRETE, encoding="png")
