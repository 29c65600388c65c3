"""Trajectories that others made: ODE pairs in LMDB, the layout that the public few-step recipes train from.

An LMDB maps `latents_{i}_data` to the fp16 bytes of a clip's states `[k, f, c, h, w]`, from noise to clean, and
`prompts_{i}_data` to its prompt; `latents_shape` and `prompts_shape` hold the shapes of all of them as text. A set is
one LMDB or a directory of many. Source: CausVid and Self Forcing, `utils/lmdb.py`.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from vidar.errors import ConfigError, DataError


class LmdbPairs:
    """Reads ODE pairs; of several with the same prompt, the first.

    Args:
        directory: One LMDB, or a directory of several.

    Attributes:
        prompts: Prompt of each pair.
        states: States of each.
        latent: Shape of a clip's latents, `(f, h, w, c)`.

    Raises:
        ConfigError: The `lmdb` package is not installed.
        DataError: There are no pairs, or they are damaged or of several shapes.
    """

    def __init__(self, directory: str | Path):
        self._environments = [_open(path) for path in _places(Path(directory))]
        shapes = {_shape(environment, "latents")[1:] for environment in self._environments}
        if len(shapes) != 1 or len(next(iter(shapes))) != 5:
            raise DataError(
                f"{directory}: its latents have the shapes {sorted(shapes)}; one of [k, f, c, h, w] is wanted"
            )
        self._shape = shapes.pop()
        self.states, frames, channels, height, width = self._shape
        self.latent = frames, height, width, channels
        found: dict[str, tuple[int, int]] = {}
        for number, environment in enumerate(self._environments):
            for row in range(_shape(environment, "prompts")[0]):
                prompt = _get(environment, f"prompts_{row}_data")
                try:
                    found.setdefault(prompt.decode(), (number, row))
                except UnicodeDecodeError as error:
                    raise DataError(f"{environment.path()}: prompts_{row}_data is no text ({error})") from error
        if not found:
            raise DataError(f"{directory}: holds no pairs")
        self.prompts, self._places = list(found), list(found.values())

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def identity(self) -> str:
        """Digest of which pairs there are, and of some of every trajectory."""
        digest = hashlib.sha256(f"{self._shape}".encode())
        for prompt, (number, row) in zip(self.prompts, self._places, strict=True):
            digest.update(f"{prompt}\n".encode())
            digest.update(_get(self._environments[number], f"latents_{row}_data")[:64])
        return digest.hexdigest()[:32]

    def read(self, pair: int) -> np.ndarray:
        """Reads one trajectory.

        Args:
            pair: Which, in [0, len).

        Returns:
            States float16 `[k, f, h, w, c]`.

        Raises:
            DataError: It is damaged.
        """
        number, row = self._places[pair]
        environment, name = self._environments[number], f"latents_{row}_data"
        data, wanted = _get(environment, name), 2 * math.prod(self._shape)
        if len(data) != wanted:
            raise DataError(
                f"{environment.path()}: {name} holds {len(data)} bytes, not the {wanted} of fp16 {list(self._shape)}; "
                "copy the set again"
            )
        return rearrange(np.frombuffer(data, np.float16).reshape(self._shape), "k f c h w -> k f h w c")

    def shard(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Reads several, as `TrajectoryWriter.write` takes them."""
        return {
            "latents": np.stack([self.read(number) for number in numbers]),
            "caption": [self.prompts[number] for number in numbers],
        }


def _places(directory: Path) -> list[Path]:
    places = sorted(
        {path.parent for path in directory.glob("data.mdb")} | {p.parent for p in directory.glob("*/data.mdb")}
    )
    if not places:
        raise DataError(f"{directory}: no LMDB (data.mdb) in it or one level below")
    return places


def _open(path: Path) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ConfigError("reading LMDB needs the lmdb package: pip install -e '.[lmdb]'") from error
    try:
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise DataError(f"{path}: cannot be read as LMDB ({error}); copy it again") from error


def _shape(environment: Any, name: str) -> tuple[int, ...]:
    text = _get(environment, f"{name}_shape")
    try:
        shape = tuple(int(word) for word in text.decode().split())
    except ValueError:
        shape = ()
    if not shape:
        raise DataError(f"{environment.path()}: {name}_shape is {text[:40]!r}, not numbers; copy it again")
    return shape


def _get(environment: Any, key: str) -> bytes:
    with environment.begin() as transaction:
        value = transaction.get(key.encode())
    if value is None:
        raise DataError(f"{environment.path()}: has no {key}; it is no set of ODE pairs, or damaged")
    return value
