"""Recorded episodes: frames and actions of variable length in ArrayRecord shards, with a manifest written last.

An episode is stored as consecutive *segments* of a fixed number of frames, so that a short clip out of a long episode
costs little to read. It knows bytes, counts and checksums; who recorded the episodes, and which clips are cut out of
them, is decided elsewhere.
"""

import hashlib
import io
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vidar.config import differences
from vidar.data.video import decode_video, encode_video
from vidar.errors import ConfigError, DataError, make_directory

SCHEMA = "vidar.episodes.1"
MANIFEST = "manifest.json"
UNFINISHED = "manifest.partial.json"
# numpy parses the header of an array as Python, which CPython 3.11 cannot do in two threads at once (cpython 106905).
_PARSING = threading.Lock()


@dataclass(frozen=True)
class ActionSpec:
    """What an action is.

    Attributes:
        kind: `discrete` (int32, one of the names), `binary` (bool, one flag per name) or `continuous` (float32, one
            axis per name). The no-op is 0, all False, or all zeros.
        names: Names of the choices, flags or axes.
    """

    kind: Literal["discrete", "binary", "continuous"]
    names: tuple[str, ...]

    def empty(self, frames: int) -> np.ndarray:
        """No-ops.

        Args:
            frames: How many frames, ≥ 0.

        Returns:
            int32 `[f]`, bool `[f, k]` or float32 `[f, k]`.
        """
        if self.kind == "discrete":
            return np.zeros(frames, np.int32)
        return np.zeros((frames, len(self.names)), np.bool_ if self.kind == "binary" else np.float32)


@dataclass(frozen=True)
class Format:
    """How a set of episodes lies on disk.

    Attributes:
        size: Height and width of a frame in pixels.
        actions: What its actions are.
        encoding: `raw` (lossless) or `h264` (each segment is a small video file; for large frames).
        segment: Frames of a segment, ≥ 1.
        fps: Frames per second at which the episodes play, > 0.
    """

    size: tuple[int, int]
    actions: ActionSpec
    encoding: Literal["raw", "h264"] = "raw"
    segment: int = 64
    fps: float = 10.0

    def __post_init__(self):
        if self.encoding not in ("raw", "h264"):
            raise ConfigError(f"encoding: {self.encoding!r} is unknown; known are raw, h264")


class EpisodeWriter:
    """Writes episodes shard by shard; a shard that is complete survives any interruption.

    Shards are written under a temporary name and renamed; only then are they noted in `manifest.partial.json`, which
    `finish` renames to `manifest.json`. Opened on a directory that holds shards already, the writer goes on with it.

    Args:
        directory: The directory to write to; it is created.
        form: How the episodes lie on disk.
        source: What made the episodes, as plain values: settings that must be the same to go on with the directory.

    Raises:
        DataError: The directory cannot be written, or holds episodes of another format or source.
    """

    def __init__(self, directory: str | Path, form: Format, source: Mapping[str, Any]):
        self.directory = Path(directory)
        self.form = form
        self._header = json.loads(json.dumps({"schema": SCHEMA, "format": asdict(form), "source": dict(source)}))
        try:
            make_directory(self.directory)
            self._shards = self._resume()
            for left_over in self.directory.glob("*.tmp"):
                left_over.unlink()
        except OSError as error:
            raise DataError(f"{self.directory}: cannot write episodes: {error.strerror}") from error

    def frames(self, split: str, number: int) -> int:
        """How many frames the shard of that split and number holds; 0 if it is not complete."""
        shard = self._shards.get(_shard_name(split, number))
        return sum(shard["lengths"]) if shard else 0

    def write_shard(self, split: str, number: int, episodes: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Writes one shard.

        Args:
            split: Name of the split that it belongs to.
            number: Number of the shard within the split, ≥ 0.
            episodes: Pairs of frames (uint8 `[f, H, W, 3]`) and actions (`[f]` or `[f, k]`, as `form.actions` says;
                `actions[i]` led from frame i - 1 into frame i).

        Raises:
            DataError: The disk is full or the directory is not writable.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        name = _shard_name(split, number)
        temporary = self.directory / f"{name}.tmp"
        lengths = []
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1,zstd:1")
            for frames_fhwc, actions in episodes:
                self._check(frames_fhwc, actions)
                for start in range(0, len(actions), self.form.segment):
                    piece = slice(start, start + self.form.segment)
                    writer.write(_pack(frames_fhwc[piece], actions[piece], self.form))
                lengths.append(len(actions))
            writer.close()
            shard = {"file": name, "split": split, "lengths": lengths, "bytes": temporary.stat().st_size}
            shard["sha256"] = _checksum(temporary)
            _sync(temporary)
            os.replace(temporary, self.directory / name)
            self._shards[name] = shard
            self._write_manifest(UNFINISHED)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.directory / name}: cannot write: {_one_line(error)}") from error

    def finish(self) -> None:
        """Declares the set of episodes complete: from now on `Episodes` reads it."""
        self._write_manifest(MANIFEST)
        (self.directory / UNFINISHED).unlink(missing_ok=True)

    def _resume(self) -> dict[str, dict[str, Any]]:
        shards = {}
        for name in (MANIFEST, UNFINISHED):
            path = self.directory / name
            if not path.exists():
                continue
            manifest = _read_manifest(path)
            stored = {key: manifest[key] for key in self._header}
            for place, theirs, ours in differences(stored, self._header):
                raise DataError(
                    f"{self.directory}: holds episodes with {place}={theirs!r} instead of {ours!r}; choose another "
                    "directory, or delete this one"
                )
            shards |= {shard["file"]: shard for shard in manifest["shards"]}
        sizes = {path.name: path.stat().st_size for path in self.directory.glob("*.array_record")}
        return {name: shard for name, shard in shards.items() if sizes.get(name) == shard["bytes"]}

    def _check(self, frames_fhwc: np.ndarray, actions: np.ndarray) -> None:
        expected = self.form.actions.empty(len(frames_fhwc))
        if frames_fhwc.dtype != np.uint8 or frames_fhwc.shape[1:] != (*self.form.size, 3):
            raise ValueError(f"frames {frames_fhwc.dtype} {frames_fhwc.shape} do not fit {self.form.size}")
        if actions.dtype != expected.dtype or actions.shape != expected.shape:
            raise ValueError(f"actions {actions.dtype} {actions.shape} are not {expected.dtype} {expected.shape}")

    def _write_manifest(self, name: str) -> None:
        temporary = self.directory / f"{name}.tmp"
        shards = [self._shards[key] for key in sorted(self._shards)]
        temporary.write_text(json.dumps({**self._header, "shards": shards}, indent=1))
        _sync(temporary)
        os.replace(temporary, self.directory / name)


class Episodes:
    """Reads the episodes of one split, any part of any of them at random.

    Args:
        directory: Directory that an `EpisodeWriter` finished.
        split: Name of the split.

    Attributes:
        form: How the episodes lie on disk.
        lengths: int64 `[e]`, frames of each episode.

    Raises:
        DataError: The directory or a shard is missing or truncated, or there is no such split.
    """

    def __init__(self, directory: str | Path, split: str = "train"):
        self.directory = Path(directory)
        manifest = _read_manifest(self.directory / MANIFEST)
        shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        if not shards:
            known = ", ".join(sorted({shard["split"] for shard in manifest["shards"]}))
            raise DataError(f"{self.directory}: no split {split!r}; it has {known or 'none'}")
        values = manifest["format"]
        actions = ActionSpec(values["actions"]["kind"], tuple(values["actions"]["names"]))
        self.form = Format(**{**values, "size": tuple(values["size"]), "actions": actions})
        self.lengths = np.concatenate([np.asarray(shard["lengths"], np.int64) for shard in shards])
        self._shards = shards
        self._shard_of_episode = np.repeat(np.arange(len(shards)), [len(shard["lengths"]) for shard in shards])
        segments = -(-self.lengths // self.form.segment)
        first = np.cumsum(segments) - segments
        shard_start = np.flatnonzero(np.diff(self._shard_of_episode, prepend=-1))
        self._first_record = first - first[shard_start][self._shard_of_episode]
        self._readers: dict[int, Any] = {}
        for shard in shards:
            self._check_size(shard)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}  # a reader is an open file: it cannot go to another process

    def read(self, episode: int, start: int = 0, frames: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Reads a part of an episode.

        Args:
            episode: Which episode, in [0, len).
            start: Its first frame.
            frames: How many frames; None reads to the end.

        Returns:
            Frames uint8 `[f, H, W, 3]`, and actions `[f]` or `[f, k]` as recorded: `actions[0]` led into the first
            of these frames.

        Raises:
            DataError: The shard is damaged; the message names it.
        """
        stop = int(self.lengths[episode]) if frames is None else start + frames
        if not 0 <= start < stop <= self.lengths[episode]:
            raise ValueError(f"frames {start}..{stop} of an episode of {self.lengths[episode]}")
        segment = self.form.segment
        first, last = start // segment, (stop - 1) // segment
        shard = int(self._shard_of_episode[episode])
        path = self.directory / self._shards[shard]["file"]
        records = (int(self._first_record[episode]) + index for index in range(first, last + 1))
        try:
            reader = self._reader(shard)
            pieces = [_unpack(reader.read([record])[0], self.form, str(path)) for record in records]
        except (RuntimeError, IndexError, ValueError, OSError, EOFError) as error:
            raise DataError(f"{path}: damaged ({_one_line(error)}); record or download it again") from error
        part = slice(start - first * segment, stop - first * segment)
        frames_fhwc, actions = (np.concatenate(arrays)[part] for arrays in zip(*pieces, strict=True))
        return frames_fhwc, actions

    def verify(self) -> None:
        """Compares every shard with its checksum.

        Raises:
            DataError: A shard is not what was written; the message names it.
        """
        for shard in self._shards:
            if _checksum(self.directory / shard["file"]) != shard["sha256"]:
                raise DataError(f"{self.directory / shard['file']}: checksum differs; record or download it again")

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        if shard not in self._readers:
            self._readers[shard] = ArrayRecordReader(str(self.directory / self._shards[shard]["file"]))
        return self._readers[shard]

    def _check_size(self, shard: Mapping[str, Any]) -> None:
        path = self.directory / shard["file"]
        if not path.is_file():
            raise DataError(f"{path}: missing, though the manifest lists it; record or download it again")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise DataError(f"{path}: truncated ({size} of {shard['bytes']} bytes); record or download it again")


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.array_record"


def _pack(frames_fhwc: np.ndarray, actions: np.ndarray, form: Format) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, actions, allow_pickle=False)
    if form.encoding == "raw":
        np.save(buffer, frames_fhwc, allow_pickle=False)
    else:
        buffer.write(encode_video(frames_fhwc, form.fps))
    return buffer.getvalue()


def _unpack(record: bytes, form: Format, where: str) -> tuple[np.ndarray, np.ndarray]:
    buffer = io.BytesIO(record)
    with _PARSING:
        actions = np.load(buffer, allow_pickle=False)
        if form.encoding == "raw":
            return np.load(buffer, allow_pickle=False), actions
    height, width = form.size
    return decode_video(buffer.read(), where)[:, :height, :width], actions


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if (path.parent / UNFINISHED).is_file():
            raise DataError(f"{path.parent}: an unfinished recording; run the command that records it again")
        raise DataError(
            f"{path.parent}: no recorded episodes here ({path.name} is missing; `vidar data doom` records some)"
        )
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: damaged ({_one_line(error)}); record or download it again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise DataError(f"{path}: not a manifest of schema {SCHEMA}")
    return manifest


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
