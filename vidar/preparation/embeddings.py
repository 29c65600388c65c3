"""Text states, computed once and kept on disk.

A shard is a safetensors file of a few hundred prompts, written whole under a name of its own, so that any number of
processes may fill one directory and each may be killed at any moment. A prompt is known by the hash of its cleaned
text; of its states only the rows up to its end are stored. This room must not know videos.
"""

import hashlib
import json
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vidar.errors import ConfigError, DataError, check_range, make_directory
from vidar.models.umt5 import UMT5
from vidar.preparation.tokenizer import Tokenizer, check_prompts, clean
from vidar.weights import whole_file

SCHEMA = "vidar.embeddings.1"
SUFFIX = ".safetensors"
ABANDONED = 3600.0  # seconds after which an unfinished shard belongs to nobody: writing one takes a fraction of that

Progress = Callable[[Sequence[Any]], Iterable[Any]]


@jax.jit
def _encode(network: UMT5, token_bs: jax.Array, length_b: jax.Array) -> jax.Array:
    return network(token_bs, length_b)


@dataclass(frozen=True)
class TextEncoder:
    """Prompts to text states.

    Attributes:
        network: The encoder; its weights may lie on several devices.
        tokenizer: The tokenizer that came with it.
        length: Tokens of a prompt, ≥ 1; Wan's are 512.
        rows: Prompts that are encoded at once, ≥ 1; fewer if fewer are asked for.
    """

    network: UMT5
    tokenizer: Tokenizer
    length: int = 512
    rows: int = 8

    def __post_init__(self) -> None:
        check_range("length", self.length, least=1)
        check_range("rows", self.rows, least=1)
        self.tokenizer.check_vocabulary(self.network.config.vocabulary)

    @property
    def identity(self) -> str:
        """Names it for an `EmbeddingCache`: a digest of its tokenizer and settings, and of some of every parameter."""
        digest = hashlib.sha256(self.tokenizer.path.read_bytes())
        digest.update(f"{self.network.config} {self.length}".encode())
        for leaf in jax.tree.leaves(self.network):
            digest.update(np.asarray(leaf.reshape(-1)[:64]).tobytes())
        return digest.hexdigest()[:32]

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Encodes prompts; each distinct one once.

        Args:
            prompts: The prompts.

        Returns:
            States `[b, length, c]` in the network's compute type, zero after each prompt's end.

        Raises:
            ConfigError: There are none, or one is no text.
        """
        check_prompts(prompts)
        if not prompts:
            raise ConfigError("prompts: none were given")
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        token_bs, length_b = self.tokenizer(list(distinct), self.length)
        rows = min(self.rows, len(distinct))
        # The last batch is filled up with empty prompts of one token, so that all of them run one executable.
        missing = -len(distinct) % rows
        token_bs = np.pad(token_bs, ((0, missing), (0, 0)))
        length_b = np.pad(length_b, (0, missing), constant_values=1)
        states = [
            np.asarray(_encode(self.network, token_bs[start : start + rows], length_b[start : start + rows]))
            for start in range(0, len(token_bs), rows)
        ]
        return np.concatenate(states)[[distinct[prompt] for prompt in prompts]]


class Embeddings:
    """Reads text states from disk, from any number of threads and processes.

    Args:
        directory: Where an `EmbeddingCache` wrote them.
        identity: Which encoder made them; None for whichever one did.

    Raises:
        DataError: There is no such directory, or a shard is damaged or another encoder's.
    """

    def __init__(self, directory: str | Path, identity: str | None = None):
        self.directory = Path(directory)
        self.identity = identity
        self._shards: set[str] = set()
        self._shard_of: dict[str, str] = {}
        self._length: int | None = None
        if not self.directory.is_dir():
            raise DataError(f"{self.directory}: no such directory; prepare the embeddings first")
        self.refresh()

    def __contains__(self, prompt: str) -> bool:
        return _key(prompt) in self._shard_of

    def __len__(self) -> int:
        return len(self._shard_of)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Prompts that are not there.

        Args:
            prompts: The prompts.

        Returns:
            Those whose states must be computed, in order; of prompts that clean alike, the first.
        """
        distinct: dict[str, str] = {}
        for prompt in dict.fromkeys(prompts):
            distinct.setdefault(_key(prompt), prompt)
        return [prompt for key, prompt in distinct.items() if key not in self._shard_of]

    def refresh(self) -> None:
        """Learns of the shards that were written since.

        Raises:
            DataError: A shard is damaged, or another encoder's.
        """
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            if path.name in self._shards:
                continue
            header = _header(path)
            self.identity = self.identity or header["identity"]
            if header["identity"] != self.identity:
                raise DataError(
                    f"{path}: holds the text states of {header['identity']!r}, not of {self.identity!r}; choose "
                    "another directory, or delete this one"
                )
            if self._length not in (None, header["length"]):
                raise DataError(
                    f"{path}: its prompts have {header['length']} tokens, those of the other shards {self._length}; "
                    "choose one directory for each length"
                )
            self._length = header["length"]
            self._shard_of.update(dict.fromkeys(header["checksums"], path.name))
            self._shards.add(path.name)

    def read(self, prompt: str) -> np.ndarray:
        """Reads one prompt's states.

        Args:
            prompt: The prompt; it is cleaned here.

        Returns:
            States `[length, c]` in the type in which they were computed, zero after the prompt's end.

        Raises:
            DataError: The prompt's states were never computed, or its shard is damaged.
        """
        from safetensors import SafetensorError, safe_open

        key = _key(prompt)
        if key not in self._shard_of:
            raise DataError(f"{self.directory}: no text states of {prompt[:60]!r}; prepare the embeddings first")
        assert self._length is not None
        path = self.directory / self._shard_of[key]
        # Opened for each read: that costs a fraction of a millisecond, and no handle needs to cross threads or forks.
        try:
            with safe_open(path, framework="numpy") as file:
                stored_tc = file.get_tensor(key)
                checksum = _description(path, file.metadata())["checksums"][key]
        except (OSError, KeyError, SafetensorError) as error:
            raise _damaged(path, error) from error
        if _checksum(stored_tc) != checksum:
            raise _damaged(path, "a checksum differs")
        states_tc = np.zeros((self._length, stored_tc.shape[1]), stored_tc.dtype)
        states_tc[: len(stored_tc)] = stored_tc
        return states_tc


class EmbeddingCache:
    """Text states from disk; those that are not there are computed and written.

    Args:
        directory: Where they are kept; it is created.
        encoder: Prompts to states `[b, length, c]`, zero after each prompt's end.
        identity: Names the encoder: whatever changes its states, such as the hash of its weights, its tokenizer and
            the length. States of another are refused.
        shard: Prompts of a file, ≥ 1: what an interruption costs, and what is in memory at once (4 MiB each for Wan).

    Attributes:
        embeddings: Reads what there is; it can go to another process, unlike the encoder.

    Raises:
        DataError: The directory cannot be made, or holds damaged states or another encoder's.
    """

    def __init__(
        self,
        directory: str | Path,
        encoder: Callable[[Sequence[str]], Any],
        identity: str,
        shard: int = 256,
    ):
        check_range("shard", shard, least=1)
        self.directory = make_directory(directory)
        self.embeddings = Embeddings(directory, identity)
        self._encoder = encoder
        self._shard = shard
        _remove_abandoned(self.directory)

    def prepare(self, prompts: Sequence[str], progress: Progress = iter) -> None:
        """Computes what is not on disk yet; each distinct prompt once.

        Processes that share a directory should each be given a part of the prompts: what two of them compute at the
        same time is stored twice, which does no harm.

        Args:
            prompts: The prompts.
            progress: Wraps the list of shards to be written, such as `tqdm`.

        Raises:
            ConfigError: A prompt is no text.
            DataError: The directory holds damaged states or another encoder's.
            CheckpointError: A shard cannot be written.
        """
        check_prompts(prompts)
        self.embeddings.refresh()
        work = self.embeddings.missing(prompts)
        for group in progress([work[start : start + self._shard] for start in range(0, len(work), self._shard)]):
            # Meanwhile another process may have written them.
            self.embeddings.refresh()
            if missing := self.embeddings.missing(group):
                self._write(missing)
        self.embeddings.refresh()

    def states(self, prompts: Sequence[str], progress: Progress = iter) -> np.ndarray:
        """Reads the states of prompts, and computes those that are not on disk.

        Args:
            prompts: At least one.
            progress: Wraps the list of shards to be written, such as `tqdm`.

        Returns:
            States `[b, length, c]`, zero after each prompt's end.

        Raises:
            ConfigError: There are no prompts, or one is no text.
            DataError: The directory holds damaged states or another encoder's.
            CheckpointError: A shard cannot be written.
        """
        self.prepare(prompts, progress)
        if not prompts:
            raise ConfigError("prompts: none were given")
        return np.stack([self.embeddings.read(prompt) for prompt in prompts])

    def _write(self, prompts: list[str]) -> None:
        from safetensors.numpy import save

        states_btc = np.asarray(self._encoder(prompts))
        stored = {
            _key(prompt): _without_padding(states_tc) for prompt, states_tc in zip(prompts, states_btc, strict=True)
        }
        header = {
            "schema": SCHEMA,
            "identity": self.embeddings.identity,
            "length": states_btc.shape[1],
            "checksums": {key: _checksum(states_tc) for key, states_tc in stored.items()},
        }
        with whole_file(self.directory / f"{uuid.uuid4().hex}{SUFFIX}") as file:
            file.write(save(stored, {"vidar": json.dumps(header)}))


def _key(prompt: str) -> str:
    return hashlib.sha256(clean(prompt).encode()).hexdigest()[:32]


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.tobytes())


def _without_padding(states_tc: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(states_tc.any(axis=1))
    return np.ascontiguousarray(states_tc[: rows[-1] + 1 if len(rows) else 1])


def _header(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return _description(path, file.metadata())
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _description(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    try:
        header = json.loads((metadata or {}).get("vidar", "null"))
    except ValueError as error:
        raise _damaged(path, error) from error
    known = isinstance(header, dict) and {"identity", "length", "checksums"} <= header.keys()
    if not known or header.get("schema") != SCHEMA:
        raise DataError(f"{path}: no text states of schema {SCHEMA}; choose a directory that holds nothing else")
    return header


def _damaged(path: Path, reason: object) -> DataError:
    words = " ".join(str(reason).split()) or type(reason).__name__
    return DataError(f"{path}: damaged ({words}); delete the file and prepare its prompts again")


def _remove_abandoned(directory: Path) -> None:
    for path in directory.glob(f"*{SUFFIX}.part"):
        # Its writer, or another process like this one, may be faster.
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
