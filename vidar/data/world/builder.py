"""The procedural world as a TFDS data set, `vidar_world`, in ArrayRecord files and without TensorFlow.

Importing this module imports `tensorflow_datasets`; nothing else in the package does. A prepared set is read like any
other, by name (`vidar/data/pipeline.py`).
"""

import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from vidar.config import differences
from vidar.data.world import captioned
from vidar.data.world.captions import caption
from vidar.data.world.rendering import render
from vidar.data.world.simulation import ACTIONS, KINDS, WorldConfig, sample_actions, simulate
from vidar.errors import ConfigError, DataError, check_range, make_directory

NAME = "vidar_world"
WORLDS = {"one_shape": WorldConfig(), "shapes": WorldConfig(size=32, shapes=3), "captioned": captioned.CAPTIONED}
SPLITS = ("train", "validation")
CLIPS = {"train": 4_000, "validation": 200}


class VidarWorld(tfds.core.GeneratorBasedBuilder):
    """Clips of coloured shapes that move, collide and enter, with actions on one of them, captions and true states.

    A clip's label is the kind of the shape that the actions move.

    Args:
        clips: Number of clips of each split.
        frames: Frames of a clip.
        seed: Seed of the whole set.
        **kwargs: As for any TFDS builder: `config`, `data_dir`, `file_format`.
    """

    name = NAME
    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in WORLDS]

    def __init__(self, clips: dict[str, int] | None = None, frames: int = 16, seed: int = 0, **kwargs: Any):
        self._clips = clips or CLIPS
        self._frames = frames
        self._seed = seed
        super().__init__(**kwargs)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the data depend on, as plain values."""
        return {"world": dataclasses.asdict(self._world), "clips": self._clips, "seed": self._seed}

    @property
    def _world(self) -> WorldConfig:
        return dataclasses.replace(WORLDS[self.builder_config.name], frames=self._frames)

    def _info(self) -> tfds.core.DatasetInfo:
        world = self._world
        features = {
            "video": tfds.features.Tensor(shape=(None, world.size, world.size, 3), dtype=np.uint8),
            "actions": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "caption": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=KINDS),
            "index": np.int64,
            "position": tfds.features.Tensor(shape=(None, world.shapes, 2), dtype=np.float32),
            "present": tfds.features.Tensor(shape=(None, world.shapes), dtype=np.bool_),
            "kind": tfds.features.Tensor(shape=(world.shapes,), dtype=np.int32),
            "colour": tfds.features.Tensor(shape=(world.shapes,), dtype=np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(
                settings=json.dumps(self.settings, sort_keys=True), actions=json.dumps(ACTIONS)
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        seeds: Iterator[int] = map(partial(clip_seed, self._seed, split), itertools.count())
        if self.builder_config.name == "captioned":
            seeds = captioned.chosen(self._world, seeds, held_out=split == "validation")
        count = self._clips[split]
        progress = tqdm(total=count, desc=f"{self.builder_config.name} {split}", unit="clip")
        for number, seed in enumerate(itertools.islice(seeds, count)):
            yield number, _example(self._world, seed)
            progress.update()
        progress.close()


def prepare(
    directory: str | Path,
    config: str = "one_shape",
    clips: int = CLIPS["train"],
    validation_clips: int = CLIPS["validation"],
    frames: int = 16,
    seed: int = 0,
) -> Path:
    """Generates the procedural world; does nothing if the same set is there already.

    Args:
        directory: TFDS data directory; the set appears in `<directory>/vidar_world/<config>/1.1.0` when it is complete.
        config: `one_shape` (16 × 16 pixels), `shapes` (32 × 32, one to three shapes) or `captioned` (20 × 20, one or
            two shapes; the validation split shows combinations of colours and kinds that training never does).
        clips: Clips of the training split.
        validation_clips: Clips of the validation split, whose seeds occur nowhere in training.
        frames: Frames of a clip, ≥ 2.
        seed: Seed of the whole set, in [0, 2³¹).

    Returns:
        Directory of the set.

    Raises:
        ConfigError: Unknown config, or impossible numbers.
        DataError: The directory holds a set of other settings, or cannot be written.
    """
    if config not in WORLDS:
        raise ConfigError(f"{NAME}/{config}: no such config; known are {', '.join(WORLDS)}")
    for name, count in (("clips", clips), ("validation_clips", validation_clips)):
        check_range(name, count, least=1, most=2**31)
    check_range("seed", seed, least=0, below=2**31)
    builder = VidarWorld(
        clips={"train": clips, "validation": validation_clips},
        frames=frames,
        seed=seed,
        config=config,
        data_dir=str(directory),
        file_format="array_record",
    )
    target = Path(builder.data_dir)
    make_directory(target.parent)
    given = json.loads(json.dumps(builder.settings))
    for path, theirs, ours in differences(json.loads(builder.info.metadata["settings"]), given):
        raise DataError(
            f"{target}: holds a set made with {path}={theirs!r} instead of {ours!r}; choose another directory, or "
            "delete this one"
        )
    tfds.disable_progress_bar()  # its bars count splits and shuffles; the one that matters is in _generate_examples
    try:
        # Its standard output would announce a download of unknown size.
        with _alone(target), contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError as error:
        raise DataError(f"{target}: cannot write: {error.strerror}") from error
    finally:
        tfds.enable_progress_bar()
    return target


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keeps other processes from making the same set, and removes what killed ones left of it."""
    lock = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left_over in target.parent.glob(f"incomplete.*_{target.name}"):
            shutil.rmtree(left_over)
        yield
    except BlockingIOError as error:
        raise DataError(f"{target}: another process is making this set; wait for it") from error
    finally:
        os.close(lock)


def clip_seed(seed: int, split: str, number: int) -> int:
    """Seed of one clip, which is also its `index`: `simulate(world, index, actions)` is its truth.

    Args:
        seed: Seed of the whole set, in [0, 2³¹).
        split: `train` or `validation`.
        number: Number of the clip within the split, in [0, 2³¹).

    Returns:
        A seed that no other clip shares.
    """
    return (seed << 32) + (SPLITS.index(split) << 31) + number


def _example(world: WorldConfig, seed: int) -> dict[str, Any]:
    actions = sample_actions(world, seed, world.frames)
    states = simulate(world, seed, actions)
    missing = world.shapes - len(states.kind)
    return {
        "video": render(world, states),
        "actions": actions,
        "caption": caption(states),
        "label": int(states.kind[0]),
        "index": seed,
        "position": np.pad(states.position, ((0, 0), (0, missing), (0, 0))).astype(np.float32),
        "present": np.pad(states.present, ((0, 0), (0, missing))),
        "kind": np.pad(states.kind, (0, missing)).astype(np.int32),
        "colour": np.pad(states.colour, (0, missing)).astype(np.int32),
    }
