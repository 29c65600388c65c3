"""Sources of clips: what a prepared set, recorded episodes or a teacher's trajectories offer, one clip at a time.

A source is random access and holds no position; order, shuffling and batches are made in `pipeline.py`.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vidar.data.records import ActionSpec, Episodes
from vidar.data.trajectories import Trajectories
from vidar.errors import DataError

T = TypeVar("T")

Clip = dict[str, Any]


class ClipSource(ABC):
    """Clips of one length.

    Attributes:
        frames: Frames of every clip; latent ones of trajectories.
        size: Height and width in pixels; of the latents of trajectories.
        actions: What the actions are, or None if clips have none; `names` is empty where they are not known.
    """

    frames: int
    size: tuple[int, int]
    actions: ActionSpec | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def clip(self, index: int, place: float) -> Clip:
        """Reads one clip.

        Args:
            index: Which, in [0, len).
            place: Where to cut it out of an example that is longer, in [0, 1): 0 is its beginning.

        Returns:
            `pixels` uint8 `[f, H, W, 3]`, and where the set has them `actions` (`[f]` or `[f, k]`; the first is always
            the no-op, because frame 0 has no past), `caption` (bytes) and `label` (int). Trajectories have no pixels;
            in their place stands `trajectory` float32 `[k, f, h, w, c]`, the last state the clean latents.

        Raises:
            DataError: What is stored is damaged, or shorter than a clip.
        """


class EpisodeClips(ClipSource):
    """All windows of recorded episodes.

    Args:
        directory: Directory of the recording.
        split: Name of the split.
        frames: Frames of a clip, ≥ 1.
        stride: Frames from the beginning of one window to that of the next.
        cache_bytes: Decoded episodes stay in memory if all of them fit into this.

    Raises:
        DataError: No such recording or split, a truncated shard, or no episode is as long as a clip.
    """

    def __init__(self, directory: str | Path, split: str, frames: int, stride: int, cache_bytes: int):
        self._episodes = Episodes(directory, split)
        self.frames, self.size, self.actions = frames, self._episodes.form.size, self._episodes.form.actions
        self._stride = stride
        lengths = self._episodes.lengths
        if lengths.max() < frames:
            raise DataError(f"{directory}: clips of {frames} frames are longer than every episode (≤ {lengths.max()})")
        windows = np.maximum(0, (lengths - frames) // stride + 1)
        self._ends = np.cumsum(windows)
        self._memory = _Memory(int(lengths.sum()) * math.prod(self.size) * 3 <= cache_bytes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def clip(self, index: int, place: float) -> Clip:
        """As `ClipSource.clip`; `place` has no effect, because every window is a clip of its own."""
        del place
        episode = int(np.searchsorted(self._ends, index, side="right"))
        start = self._stride * (index - int(self._ends[episode - 1] if episode else 0))
        if self._memory.keeps:
            frames_fhwc, actions = self._memory.get(episode, self._episodes.read)
            frames_fhwc, actions = frames_fhwc[start : start + self.frames], actions[start : start + self.frames]
        else:
            frames_fhwc, actions = self._episodes.read(episode, start, self.frames)
        return {"pixels": frames_fhwc, "actions": _without_past(actions)}


class TfdsClips(ClipSource):
    """The examples of a prepared TFDS set, each one clip; longer examples are cut.

    The features used are `video` (or `pixels`, `frames`), uint8 `[f, H, W, 3]`; `actions`; `caption` (or `text`); and
    `label`.

    Args:
        name: `name`, `name/config` or `name/config:version`.
        directory: TFDS data directory; None is TFDS's own default.
        split: Name of the split, or a slice of it as `train[:10%]`.
        frames: Frames of a clip, ≥ 1.
        cache_bytes: Decoded examples stay in memory if all of them fit into this.

    Raises:
        DataError: No such set or split, a truncated file, no video in it, or its first example is shorter than a clip.
    """

    def __init__(self, name: str, directory: str | None, split: str, frames: int, cache_bytes: int):
        builder = _builder(name, directory)
        self._where = str(builder.data_dir)
        _check_files(builder.info.splits, self._where)
        try:
            self._examples = builder.as_data_source(split)
        except ValueError as error:
            known = ", ".join(builder.info.splits)
            raise DataError(f"{self._where}: no split {split!r}; it has {known}") from error
        except NotImplementedError as error:
            raise DataError(f"{self._where}: not stored as ArrayRecord; prepare it in that file_format") from error
        if not len(self._examples):
            raise DataError(f"{self._where}: split {split!r} is empty")
        self.frames = frames
        self._memory = _Memory(False)
        first = self._read(0)
        self._video = _feature(first, "video", "pixels", "frames") or "video"
        self._caption = _feature(first, "caption", "text")
        video = np.asarray(first.get(self._video))
        if video.dtype != np.uint8 or video.shape[3:] != (3,):
            raise DataError(f"{self._where}: no feature `video` of uint8 [f, H, W, 3]; it has {', '.join(first)}")
        self.size = video.shape[1:3]
        self.actions = _action_spec(first.get("actions"), builder.info.metadata)
        self._memory = _Memory(video.nbytes * len(self._examples) <= cache_bytes)
        self.clip(0, 0.0)

    def __len__(self) -> int:
        return len(self._examples)

    def clip(self, index: int, place: float) -> Clip:
        """As `ClipSource.clip`."""
        example = self._memory.get(index, self._read)
        video_fhwc = example[self._video]
        length = len(video_fhwc)
        if length < self.frames:
            raise DataError(f"{self._where}: clips of {self.frames} frames are longer than example {index} ({length})")
        start = int(place * (length - self.frames + 1))
        window = slice(start, start + self.frames)
        clip: Clip = {"pixels": video_fhwc[window]}
        if self.actions is not None:
            clip["actions"] = _without_past(example["actions"][window].astype(self.actions.empty(0).dtype))
        if self._caption is not None:
            clip["caption"] = example[self._caption]
        if "label" in example:
            clip["label"] = int(example["label"])
        return clip

    def _read(self, index: int) -> Mapping[str, Any]:
        try:
            return self._examples[index]
        except (RuntimeError, IndexError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self._where}: example {index} is damaged ({reason}); prepare the set again") from error


class TrajectoryClips(ClipSource):
    """The trajectories of a teacher (`vidar data trajectories`), each one clip.

    Args:
        directory: Directory of the trajectories.
        cache_bytes: What was read stays in memory if all of it fits into this.

    Raises:
        DataError: No trajectories are there, or they are unfinished.
    """

    def __init__(self, directory: str | Path, cache_bytes: int):
        self._trajectories = Trajectories(directory)
        form = self._trajectories.form
        self.frames, self.size, self.actions = form.latent[0], form.latent[1:3], form.actions
        values = form.clips * len(form.levels) * math.prod(form.latent)
        self._memory = _Memory(values * np.dtype(form.precision).itemsize <= cache_bytes)

    def __len__(self) -> int:
        return len(self._trajectories)

    def clip(self, index: int, place: float) -> Clip:
        """As `ClipSource.clip`; `place` has no effect, because a trajectory is not cut."""
        del place
        stored = self._memory.get(index, self._trajectories.read)
        return {**stored, "trajectory": stored["trajectory"].astype(np.float32)}


class PromptClips(ClipSource):
    """Prompts alone, one a line of a text file: for objectives that generate all that they learn from.

    Args:
        path: The file.

    Raises:
        DataError: It cannot be read, or holds no prompt.
    """

    def __init__(self, path: str | Path):
        self.frames, self.size, self.actions = 0, (0, 0), None
        self._prompts = prompt_lines(Path(path))

    @property
    def digest(self) -> str:
        """Tells sets of prompts apart."""
        return hashlib.sha256(repr(self._prompts).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._prompts)

    def clip(self, index: int, place: float) -> Clip:
        """As `ClipSource.clip`, but a caption is all there is."""
        del place
        return {"caption": self._prompts[index].encode()}


def prompt_lines(path: Path) -> list[str]:
    """Reads a file with a prompt on each line; empty lines are left out.

    Raises:
        DataError: It cannot be read, or holds none.
    """
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); give a prompt on each line") from error
    if not any(prompts):
        raise DataError(f"{path}: holds no prompt; give one on each line")
    return [prompt for prompt in prompts if prompt]


def captions(name: str, directory: str | None) -> list[str]:
    """The captions of a prepared TFDS set, each distinct one once, over all splits.

    Args:
        name: `name`, `name/config` or `name/config:version`.
        directory: TFDS data directory; None is TFDS's own default.

    Returns:
        The captions, in the order of their first examples.

    Raises:
        DataError: No such set, or its examples have no captions.
    """
    builder = _builder(name, directory)
    found: dict[str, None] = {}
    for split in builder.info.splits:
        for example in builder.as_data_source(split):
            feature = _feature(example, "caption", "text")
            if feature is None:
                raise DataError(f"{builder.data_dir}: its examples have no captions; they have {', '.join(example)}")
            found[example[feature].decode()] = None
    return list(found)


def _builder(name: str, directory: str | None) -> Any:
    from tensorflow_datasets.core import read_only_builder, registered

    try:
        return read_only_builder.builder_from_files(name, data_dir=directory)
    except registered.DatasetNotFoundError as error:
        place = directory or "the default TFDS directory"
        made = "; `vidar data world` makes it" if name.startswith("vidar_world/") else "; prepare it first"
        raise DataError(f"{name}: no prepared data set of that name in {place}{made}") from error
    except ValueError as error:
        raise DataError(f"tfds={name!r} is no name of a set: give name, name/config or name/config:1.2.3") from error


class _Memory:
    """Keeps what was read once, or does not."""

    def __init__(self, keeps: bool):
        self.keeps = keeps
        self._items: dict[int, Any] = {}

    def get(self, key: int, read: Callable[[int], T]) -> T:
        if key in self._items:
            return self._items[key]
        item = read(key)
        if self.keeps:
            self._items[key] = item
        return item

    def __getstate__(self) -> dict[str, Any]:
        return {"keeps": self.keeps, "_items": {}}  # another process reads for itself


def _check_files(splits: Mapping[str, Any], where: str) -> None:
    """Every shard must hold as many records as the set's description says: a truncated ArrayRecord looks empty."""
    from array_record.python.array_record_module import ArrayRecordReader

    for split in splits.values():
        for path, expected in zip(split.filepaths, split.shard_lengths, strict=True):
            if not Path(path).is_file():
                raise DataError(f"{path}: missing; prepare {where} again")
            found = ArrayRecordReader(str(path)).num_records() if ".array_record" in path.name else expected
            if found != expected:
                raise DataError(f"{path}: truncated ({found} of {expected} records); prepare {where} again")


def _feature(example: Mapping[str, Any], *names: str) -> str | None:
    return next((name for name in names if name in example), None)


def _action_spec(actions: np.ndarray | None, metadata: Mapping[str, Any] | None) -> ActionSpec | None:
    if actions is None:
        return None
    names = tuple(json.loads((metadata or {}).get("actions", "[]")))
    if np.issubdtype(actions.dtype, np.integer):
        return ActionSpec("discrete", names)
    unnamed = tuple(str(axis) for axis in range(actions.shape[1]))
    return ActionSpec("binary" if actions.dtype == np.bool_ else "continuous", names or unnamed)


def _without_past(actions: np.ndarray) -> np.ndarray:
    actions = actions.copy()
    actions[0] = 0
    return actions
