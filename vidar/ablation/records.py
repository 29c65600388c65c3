"""Directories that several processes share: what they hold is written whole, claimed by one, and never mixed.

A lock ends with the process that holds it, however that ends. This module must not know what is computed.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vidar.ablation.grid import completed
from vidar.config import differences
from vidar.errors import CheckpointError, ConfigError, make_directory
from vidar.evaluation.writing import replaced

_logger = logging.getLogger("vidar")
RECORD = "fingerprint.json"


def write_json(path: Path, value: Any) -> None:
    """Writes plain values; the file is whole or absent."""
    with replaced(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """Reads plain values by name.

    Args:
        path: The file.
        keys: Names that it must have; `a/b` is `b` inside `a`.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        return _with(keys, json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays, compressed; the file is whole or absent."""
    with replaced(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def read_arrays(path: Path, keys: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Reads named arrays.

    Args:
        path: The file.
        keys: Names that it must have.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        with np.load(path) as stored:
            return _with(keys, dict(stored))
    # A damaged archive fails in as many ways as it has layers.
    except Exception as error:
        raise damaged(path, error) from error


def fingerprint(document: Any) -> str:
    """16 hexadecimal digits that tell plain values apart."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def settle(path: Path, document: Any, what: str, growing: Iterable[str] = ()) -> None:
    """Writes down what a directory is for, or refuses one that is for something else.

    Args:
        path: File that says it, and under `grown` what was added to it since, in order.
        document: Plain values that determine everything in the directory, as a `Grid` writes them.
        what: What it is, for the message.
        growing: Names of lists and dictionaries in it that may grow: entries that only one of both has are no
            difference, and the file keeps those of all.

    Raises:
        ConfigError: The file says something else; the message names the first difference.
        CheckpointError: The file is damaged.
    """
    document = json.loads(json.dumps(document))
    if not path.exists():
        make_directory(path.parent)
        write_json(path, {"fingerprint": fingerprint(document), "config": document, "grown": []})
        return
    added = compare(path, document, what, growing)
    if added:
        record = read_json(path)
        for name, entries in added.items():
            old, new = record["config"][name], document[name]
            record["config"][name] = (
                old | {key: new[key] for key in entries} if isinstance(old, dict) else old + entries
            )
        grown = [*record.get("grown", []), added]
        write_json(path, record | {"fingerprint": fingerprint(record["config"]), "grown": grown})


def settle_made(directory: Path, document: Any, what: str, made: str) -> None:
    """As `settle`, of a directory whose record may be lost: what was made in it must then be of the same document.

    Args:
        directory: The directory.
        document: As in `settle`.
        what: As in `settle`.
        made: Name of a file in it that says, once it is there, under `of` what document it was made of.

    Raises:
        ConfigError: The record or that file says something else.
        CheckpointError: One of them is damaged.
    """
    path = directory / RECORD
    known = not path.exists() and (directory / made).exists()
    if known and read_json(directory / made).get("of") != fingerprint(document):
        raise ConfigError(
            f"{directory}: its {RECORD} is lost, and its {made} is not of this config: "
            "delete the directory, and run again to make it anew"
        )
    settle(path, document, what)


def compare(path: Path, document: Any, what: str, growing: Iterable[str] = ()) -> dict[str, list[Any]]:
    """What a directory is to be for, and was not when its record was written.

    Args:
        path: The record.
        document: As in `settle`.
        what: As in `settle`.
        growing: As in `settle`.

    Returns:
        By name, the entries (or their keys) that are new; names without any are left out.

    Raises:
        ConfigError: Anything else differs; the message names the first difference.
        CheckpointError: The record is damaged.
    """
    before = completed(read_json(path, ["config"])["config"])
    document = json.loads(json.dumps(document))
    added: dict[str, list[Any]] = {}
    for name in growing:
        old, new = (before.get(name) if isinstance(before, dict) else None), document[name]
        if isinstance(old, type(new)) and (not old or not new or any(entry in old for entry in new)):
            added[name] = [entry for entry in new if entry not in old]
            before[name], document[name] = _common(old, new), _common(new, old)
    for place, was, now in differences(before, document):
        raise ConfigError(
            f"{path}: holds {what} with {place}={_short(was)}, now {_short(now)}: "
            "go on with the same card, or give another --output"
        )
    return {name: entries for name, entries in added.items() if entries}


def _common(entries: Any, others: Any) -> Any:
    """A dictionary or list without what others lack; a list is sorted, since its order means nothing."""
    if isinstance(entries, dict):
        return {key: value for key, value in entries.items() if key in others}
    return sorted(entry for entry in entries if entry in others)


@contextmanager
def claimed(directory: Path) -> Iterator[bool]:
    """Claims a directory for this process; gives False where a live process has it."""
    lock = _open(directory)
    try:
        yield _locked(lock, wait=False)
    finally:
        os.close(lock)


@contextmanager
def alone(directory: Path, what: str) -> Iterator[None]:
    """Waits until this process is the only one at work in a directory."""
    lock = _open(directory)
    try:
        if not _locked(lock, wait=False):
            _logger.info("waiting for another process, which makes %s", what)
            _locked(lock, wait=True)
        yield
    finally:
        os.close(lock)


def _with(keys: Iterable[str], value: Any) -> Any:
    """A dictionary that has these keys."""
    if not isinstance(value, dict):
        raise ValueError(f"not a dictionary but {_short(value)}")
    for key in keys:
        inside = value
        for part in key.split("/"):
            if not isinstance(inside, dict) or part not in inside:
                raise ValueError(f"no {key!r} in it")
            inside = inside[part]
    return value


def damaged(path: Path, error: Exception) -> CheckpointError:
    """The error of a file that cannot be read, and can be made anew."""
    reason = " ".join(str(error).split())
    return CheckpointError(f"{path}: cannot be read ({reason}): delete this file, and run again to make it anew")


def _open(directory: Path) -> int:
    make_directory(directory)
    try:
        return os.open(directory / ".claim", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error.strerror}") from error


def _locked(lock: int, wait: bool) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        # Anything else is a file system without locks, where each process must be given cells of its own.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
