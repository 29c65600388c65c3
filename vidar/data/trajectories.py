"""Trajectories of a teacher on disk: states of each clip at a few levels between noise and clean latents.

A directory holds a manifest, written first, and shards: safetensors files of some clips each, written whole under the
name that their number gives. So any number of processes may fill a directory, each its own shards, and each may be
killed at any moment. Every shard carries the manifest's identity, so that what different settings made is never mixed.
It knows arrays and checksums; who integrated the trajectories is decided elsewhere.
"""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vidar.config import differences
from vidar.data.records import ActionSpec
from vidar.errors import DataError, check_range, make_directory

SCHEMA = "vidar.trajectories.1"
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
ABANDONED = 3600.0  # seconds after which an unfinished file belongs to nobody: writing one takes a fraction of that


@dataclass(frozen=True)
class TrajectoryFormat:
    """What a directory of trajectories holds.

    Attributes:
        levels: Levels of the states that are kept, descending to 0, each a float32.
        latent: Shape of a clip's latents, `(f, h, w, c)`.
        clips: Number of clips.
        rows: Clips of a shard; the last one may hold fewer.
        given: First frames of each clip that were given: they are clean in every state.
        actions: What the clips' actions are, or None.
        precision: Type that latents are stored in.
        source: What made them, as plain values.
    """

    levels: tuple[float, ...]
    latent: tuple[int, int, int, int]
    clips: int
    rows: int
    given: int = 0
    actions: ActionSpec | None = None
    precision: Literal["float16", "float32"] = "float16"
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_range("clips", self.clips, least=1)
        check_range("rows", self.rows, least=1)
        check_range("given", self.given, least=0, below=self.latent[0])

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.clips // self.rows)

    def numbers(self, shard: int) -> range:
        """Numbers of a shard's clips."""
        return range(shard * self.rows, min(self.clips, (shard + 1) * self.rows))

    @property
    def plain(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        return json.loads(json.dumps({"schema": SCHEMA, **asdict(self)}))

    @property
    def identity(self) -> str:
        """Digest of everything."""
        return hashlib.sha256(json.dumps(self.plain, sort_keys=True).encode()).hexdigest()[:32]


class TrajectoryWriter:
    """Writes trajectories shard by shard; a shard that is complete survives any interruption.

    Args:
        directory: The directory to write to; it is created.
        form: What it will hold.

    Raises:
        DataError: It cannot be written, or holds trajectories of other settings.
    """

    def __init__(self, directory: str | Path, form: TrajectoryFormat):
        self.directory, self.form = make_directory(directory), form
        path = self.directory / MANIFEST
        if not path.exists():
            _publish(path, (json.dumps(form.plain, indent=1) + "\n").encode())
        for place, theirs, ours in differences(_read_manifest(self.directory), form.plain):
            raise DataError(
                f"{self.directory}: holds trajectories made with {place}={theirs!r} instead of {ours!r}; choose "
                "another directory, or delete this one"
            )
        for part in self.directory.glob("*.part"):
            with suppress(OSError):  # its writer, or another process like this one, may be faster
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()

    def missing(self, part: int = 0, parts: int = 1) -> list[int]:
        """Numbers of the shards that are still to be written, of every `parts`-th shard from `part` on."""
        return [number for number in range(part, self.form.shards, parts) if not self._path(number).exists()]

    def write(self, shard: int, arrays: Mapping[str, Any]) -> None:
        """Writes one shard.

        Args:
            shard: Its number, in [0, shards).
            arrays: `latents` `[b, k, f, h, w, c]`, for the b clips of this shard; and what they were made from, as far
                as there is: `actions` `[b, f]` or `[b, f, k]`, `label` int `[b]`, `caption` (b texts), and `clip` int
                `[b]`, the number of the data set's clip.

        Raises:
            DataError: A state is not finite in the stored type, or the disk is full.
        """
        from safetensors.numpy import save

        form, numbers = self.form, self.form.numbers(shard)
        latents = np.asarray(arrays["latents"])
        wanted = (len(numbers), len(form.levels), *form.latent)
        if latents.shape != wanted:
            raise ValueError(f"trajectories of shape {latents.shape} in a shard of {wanted}")
        with np.errstate(over="ignore"):
            latents = np.ascontiguousarray(latents.astype(form.precision))
        for number, row in zip(numbers, latents, strict=True):
            if not np.isfinite(row).all():
                raise DataError(f"{self.directory}: the trajectory of clip {number} is not finite in {form.precision}")
        stored = {name: np.ascontiguousarray(arrays[name]) for name in ("actions", "label", "clip") if name in arrays}
        header = {"identity": form.identity, "checksums": [zlib.crc32(row.tobytes()) for row in latents]}
        if "caption" in arrays:
            header["captions"] = [str(caption) for caption in arrays["caption"]]
        _publish(self._path(shard), save({"latents": latents, **stored}, {"vidar": json.dumps(header)}))

    def _path(self, shard: int) -> Path:
        return self.directory / _shard_name(shard)


class Trajectories:
    """Reads the trajectories of a complete directory, any of them at random.

    Args:
        directory: Directory that a `TrajectoryWriter` filled.

    Attributes:
        form: What it holds.

    Raises:
        DataError: No trajectories are there, or shards are missing.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        values = dict(_read_manifest(self.directory))
        values.pop("schema")
        if values["actions"] is not None:
            values["actions"] = ActionSpec(values["actions"]["kind"], tuple(values["actions"]["names"]))
        values |= {name: tuple(values[name]) for name in ("levels", "latent")}
        self.form = TrajectoryFormat(**values)
        self._identity = self.form.identity
        shards = self.form.shards
        missing = [number for number in range(shards) if not (self.directory / _shard_name(number)).is_file()]
        if missing:
            raise DataError(
                f"{self.directory}: unfinished, {len(missing)} of {shards} shards are missing "
                f"({_shard_name(missing[0])} is the first); run the command that makes them again"
            )

    def __len__(self) -> int:
        return self.form.clips

    @property
    def levels(self) -> np.ndarray:
        """Levels of the states, float32 `[k]`."""
        return np.asarray(self.form.levels, np.float32)

    def read(self, number: int) -> dict[str, Any]:
        """Reads one clip.

        Args:
            number: Which, in [0, len).

        Returns:
            `trajectory` `[k, f, h, w, c]` in the stored type, from the noisiest state to the clean latents; and as far
            as there is `actions`, `label` (int) and `caption` (bytes).

        Raises:
            DataError: Its shard is damaged, or was made with other settings.
        """
        from safetensors import SafetensorError, safe_open

        shard, row = divmod(number, self.form.rows)
        path = self.directory / _shard_name(shard)
        # Opened for each read: that costs a fraction of a millisecond, and no handle needs to cross threads or forks.
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads(file.metadata()["vidar"])
                clip: dict[str, Any] = {"trajectory": file.get_slice("latents")[row]}
                for name in {"actions", "label"} & set(file.keys()):
                    clip[name] = file.get_tensor(name)[row]
            checksum = header["checksums"][row]
        except (OSError, KeyError, IndexError, TypeError, ValueError, SafetensorError) as error:
            raise _damaged(path, error) from error
        if header["identity"] != self._identity:
            raise DataError(f"{path}: made with other settings than {MANIFEST} beside it says; delete it and go on")
        if zlib.crc32(clip["trajectory"].tobytes()) != checksum:
            raise _damaged(path, f"the checksum of clip {number} differs")
        if "label" in clip:
            clip["label"] = int(clip["label"])
        if "captions" in header:
            clip["caption"] = header["captions"][row].encode()
        return clip


def _shard_name(number: int) -> str:
    return f"clips-{number:06d}{SUFFIX}"


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{directory}: no trajectories here ({MANIFEST} is missing); `vidar data trajectories` makes them"
        )
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise DataError(f"{path}: not a manifest of schema {SCHEMA}")
    return manifest


def _publish(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all, whoever else writes it at the same time."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _damaged(path: Path, reason: object) -> DataError:
    words = " ".join(str(reason).split()) or type(reason).__name__
    return DataError(f"{path}: damaged ({words}); delete the file and run the command that made it again")
