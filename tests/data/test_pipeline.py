"""Batches: order, restoring, processes, and what is said when data are missing or damaged."""

import dataclasses
import fcntl
import os
import time

import numpy as np
import pytest

from vidar.data.pipeline import DataConfig, SyntheticConfig, make_dataset, open_source
from vidar.data.records import ActionSpec, EpisodeWriter, Format
from vidar.data.world import WorldConfig, caption, render, sample_actions, simulate
from vidar.data.world.builder import VidarWorld, clip_seed, prepare
from vidar.errors import ConfigError, DataError

LENGTHS = (12, 5, 30, 8, 3)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Episodes in which pixel (0, 0) tells episode and frame, and the action the frame."""
    directory = tmp_path_factory.mktemp("recorded")
    writer = EpisodeWriter(directory, Format((4, 6), ActionSpec("discrete", ("none", "go")), segment=8), {})
    episodes = []
    for number, length in enumerate(LENGTHS):
        frames = np.zeros((length, 4, 6, 3), np.uint8)
        frames[:, 0, 0, 0], frames[:, 0, 0, 1] = number, np.arange(length)
        episodes.append((frames, np.arange(100, 100 + length, dtype=np.int32)))
    writer.write_shard("train", 0, episodes[:3])
    writer.write_shard("train", 1, episodes[3:])
    writer.finish()
    return directory


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    prepare(directory, clips=96, validation_clips=8, frames=12)
    return directory


@pytest.fixture(params=["records", "tfds", "synthetic"])
def config(request, recorded, world):
    base = DataConfig(frames=5, batch=6, seed=3)
    if request.param == "records":
        return dataclasses.replace(base, records=str(recorded))
    if request.param == "tfds":
        return dataclasses.replace(base, tfds="vidar_world/one_shape", directory=str(world))
    return base


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_batches_are_as_promised(config):
    batch = next(iter(make_dataset(config)))
    size = open_source(config).size
    assert batch["pixels"].shape == (6, 5, *size, 3)
    assert batch["pixels"].dtype == np.uint8
    assert batch["actions"].shape == (6, 5)
    assert batch["actions"].dtype == np.int32
    assert (batch["actions"][:, 0] == 0).all()
    np.testing.assert_array_equal(batch["index"], np.arange(6, dtype=np.int64))


def test_the_same_seed_gives_the_same_order_and_another_does_not(config):
    first, again = (take(iter(make_dataset(config)), 8) for _ in range(2))
    assert_equal(first, again)
    other = take(iter(make_dataset(dataclasses.replace(config, seed=4))), 8)
    assert not all((one["pixels"] == two["pixels"]).all() for one, two in zip(first, other, strict=True))


def test_a_restored_iterator_goes_on_exactly(config):
    dataset = make_dataset(config)
    whole = take(iter(dataset), 30)
    iterator = iter(dataset)
    take(iterator, 13)
    state = iterator.get_state()
    fresh = iter(make_dataset(config))
    fresh.set_state(state)
    assert_equal(take(fresh, 17), whole[13:])
    iterator.set_state(state)
    assert_equal(take(iterator, 17), whole[13:])


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_global_batches(config, count):
    whole = take(iter(make_dataset(config)), 20)
    parts = [take(iter(make_dataset(config, process, count)), 20) for process in range(count)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


def test_processes_must_divide_the_batch(config):
    with pytest.raises(ConfigError, match="6 is not divisible by 4"):
        make_dataset(config, 0, 4)


@pytest.mark.parametrize("cache", [0, 512])
def test_every_window_of_every_episode_comes_once_an_epoch(recorded, cache):
    config = DataConfig(records=str(recorded), frames=5, batch=1, repeat=False, cache_megabytes=cache)
    seen = []
    for batch in make_dataset(config):
        pixels, actions = batch["pixels"][0], batch["actions"][0]
        episode, start = pixels[0, 0, 0, :2]
        assert (pixels[:, 0, 0, 0] == episode).all()
        np.testing.assert_array_equal(pixels[:, 0, 0, 1], start + np.arange(5))
        np.testing.assert_array_equal(actions, [0, *range(101 + start, 105 + start)])
        seen.append((int(episode), int(start)))
    expected = [(episode, start) for episode, length in enumerate(LENGTHS) for start in range(length - 4)]
    assert seen != sorted(seen)
    assert sorted(seen) == expected


def test_windows_can_be_set_apart_and_stay_in_order(recorded):
    config = DataConfig(records=str(recorded), frames=5, stride=5, batch=2, repeat=False, shuffle=False)
    starts = [tuple(pixels[0, 0, 0, :2]) for batch in make_dataset(config) for pixels in batch["pixels"]]
    assert starts == [(0, 0), (0, 5), (1, 0), (2, 0), (2, 5), (2, 10), (2, 15), (2, 20), (2, 25), (3, 0)]


def test_epochs_are_shuffled_anew(recorded):
    config = DataConfig(records=str(recorded), frames=5, batch=39, seed=1)
    assert len(open_source(config)) == 39
    first, second = (
        [tuple(row[0, 0, 0, :2]) for row in batch["pixels"]] for batch in take(iter(make_dataset(config)), 2)
    )
    assert first != second
    assert sorted(first) == sorted(second)


def test_a_prepared_world_holds_the_truth(world):
    source = open_source(DataConfig(tfds="vidar_world/one_shape", directory=str(world), frames=12, split="validation"))
    assert source.actions == ActionSpec("discrete", ("none", "left", "right", "up", "down"))
    rules = WorldConfig(frames=12)
    for number in range(8):
        seed = clip_seed(0, "validation", number)
        actions = sample_actions(rules, seed, 12)
        states = simulate(rules, seed, actions)
        clip = source.clip(number, 0.0)
        np.testing.assert_array_equal(clip["pixels"], render(rules, states))
        np.testing.assert_array_equal(clip["actions"], actions)
        assert clip["caption"].decode() == caption(states)
        assert clip["label"] == states.kind[0]


def test_long_examples_are_cut_anywhere_in_training_and_at_the_beginning_otherwise(world):
    config = DataConfig(tfds="vidar_world/one_shape", directory=str(world), frames=5, batch=32)
    whole = open_source(dataclasses.replace(config, frames=12))
    clips = np.stack([whole.clip(number, 0.0)["pixels"] for number in range(len(whole))])
    windows = np.stack([clips[:, start : start + 5] for start in range(8)])
    starts = []
    for batch in take(iter(make_dataset(config)), 9):
        for pixels in batch["pixels"]:
            starts += np.argwhere((windows == pixels).all(axis=(2, 3, 4, 5)))[:1, 0].tolist()
    assert len(starts) == 9 * 32
    assert set(starts) == set(range(8))
    ordered = next(iter(make_dataset(dataclasses.replace(config, shuffle=False))))
    np.testing.assert_array_equal(ordered["pixels"], clips[:32, :5])


def test_neither_tensorflow_nor_the_readers_are_imported_unasked(world, run_python):
    printed = run_python(
        f"""
        import sys
        import vidar.data.doom, vidar.data.pipeline, vidar.data.video, vidar.data.world
        from vidar.data.pipeline import DataConfig, make_dataset

        next(iter(make_dataset(DataConfig())))
        print([name for name in ("grain", "tensorflow_datasets", "av", "vizdoom", "tqdm") if name in sys.modules])

        from vidar.data.world.builder import prepare
        prepare({str(world / "again")!r}, "shapes", clips=8, validation_clips=2)
        config = DataConfig(tfds="vidar_world/shapes", directory={str(world / "again")!r}, batch=4)
        print(next(iter(make_dataset(config)))["pixels"].shape, "tensorflow" in sys.modules)
        """,
        devices=1,
    )
    assert printed.splitlines() == ["[]", "(4, 8, 32, 32, 3) False"]


def test_preparing_again_does_nothing_or_refuses(world):
    files = {path: path.stat().st_mtime_ns for path in world.rglob("*.array_record*")}
    prepare(world, clips=96, validation_clips=8, frames=12)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with pytest.raises(DataError, match="clips.train=96 instead of 97"):
        prepare(world, clips=97, validation_clips=8, frames=12)
    with pytest.raises(ConfigError, match="known are one_shape, shapes"):
        prepare(world, "no_shape")
    with pytest.raises(ConfigError, match="seed=99999999999 must be at least 0 and below 2147483648"):
        prepare(world, seed=99999999999)
    with pytest.raises(ConfigError, match="clips=0 must be at least 1"):
        prepare(world, clips=0)


def test_what_killed_runs_left_is_removed_and_two_do_not_make_one_set(tmp_path):
    shapes = tmp_path / "vidar_world" / "shapes"
    for name in (f"incomplete.ABCDEF_{VidarWorld.VERSION}", "incomplete.ABCDEF_2.0.0"):
        (shapes / name).mkdir(parents=True)
    lock = os.open(shapes, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is making this set"):
        prepare(tmp_path, "shapes", clips=2, validation_clips=1)
    os.close(lock)
    prepare(tmp_path, "shapes", clips=2, validation_clips=1)
    assert sorted(path.name for path in shapes.iterdir()) == [str(VidarWorld.VERSION), "incomplete.ABCDEF_2.0.0"]


@pytest.mark.parametrize("choice", ["cache_megabytes", "seed"])
def test_negative_choices_are_refused(choice):
    with pytest.raises(ConfigError, match=f"{choice}=-1 must be at least 0"):
        DataConfig(**{choice: -1})


@pytest.mark.timing
def test_the_quickstart_waits_for_no_data(tmp_path):
    prepare(tmp_path, clips=512, validation_clips=1)
    config = DataConfig(tfds="vidar_world/one_shape", directory=str(tmp_path), frames=8, batch=32)
    iterator = iter(make_dataset(config))
    take(iterator, 40)
    start = time.perf_counter()
    take(iterator, 200)
    assert 200 / (time.perf_counter() - start) > 100


def test_synthetic_clips_have_the_asked_shape():
    config = DataConfig(synthetic=SyntheticConfig(height=4, width=6, actions=0), frames=3, batch=2)
    batch = next(iter(make_dataset(config)))
    assert batch["pixels"].shape == (2, 3, 4, 6, 3)
    assert "actions" not in batch
    actions = next(iter(make_dataset(dataclasses.replace(config, synthetic=SyntheticConfig(), batch=64))))["actions"]
    assert set(actions.ravel()) == set(range(5))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"records": "nowhere"}, "no recorded episodes"),
        ({"split": "test"}, "no split 'test'; it has train"),
        ({"frames": 31}, r"31 frames are longer than every episode \(≤ 30\)"),
        ({"batch": 64, "repeat": False}, "39 clips, fewer than one batch of 64"),
    ],
)
def test_missing_recordings_are_told(recorded, change, said):
    with pytest.raises(DataError, match=said):
        make_dataset(DataConfig(**{"records": str(recorded), "frames": 5, **change}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"directory": "nowhere"}, "no prepared data set of that name in nowhere"),
        ({"tfds": "vidar_world/two_shapes"}, "no prepared data set"),
        ({"tfds": ""}, "tfds='' is no name of a set: give name"),
        ({"tfds": "Foo Bar"}, "tfds='Foo Bar' is no name of a set: give name"),
        ({"split": "test"}, "no split 'test'; it has train, validation"),
        ({"frames": 13}, r"13 frames are longer than example 0 \(12\)"),
    ],
)
def test_missing_sets_are_told(world, change, said):
    with pytest.raises(DataError, match=said) as error:
        make_dataset(DataConfig(**{"tfds": "vidar_world/one_shape", "directory": str(world), **change}))
    assert "\n" not in str(error.value)


def test_a_truncated_set_is_told(tmp_path):
    directory = prepare(tmp_path, clips=40, validation_clips=2, frames=8)
    config = DataConfig(tfds="vidar_world/one_shape", directory=str(tmp_path), batch=40)
    path = next(directory.glob("*train*"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"vidar_world-train\.array_record-\S+: truncated \(0 of 40 records\)"):
        make_dataset(config)
    path.unlink()
    with pytest.raises(DataError, match="missing; prepare"):
        make_dataset(config)


def test_damage_found_while_reading_is_told_through_the_threads(tmp_path):
    directory = prepare(tmp_path, clips=40, validation_clips=2, frames=8)
    path = next(directory.glob("*train*"))
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    used = np.flatnonzero(content)
    content[used[len(used) // 2 :][:500]] ^= 0xFF
    path.write_bytes(content.tobytes())
    config = DataConfig(tfds="vidar_world/one_shape", directory=str(tmp_path), batch=40)
    with pytest.raises(DataError, match=r"example \d+ is damaged"):
        next(iter(make_dataset(config)))


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"batch": 0}, {"stride": 0}, {"tfds": "a", "records": "b"}])
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DataConfig(**wrong)
