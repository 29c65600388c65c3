"""Named items on disk, written asynchronously and read back only when every byte is as it was written.

Orbax writes and reads the arrays; this module adds what a run that is killed at any instant needs: a manifest of sizes
and checksums, written after everything else, without which a checkpoint does not count. A step looks like this:

    <directory>/00000030/arrays/<item>/…          Orbax, one sub-directory per pytree
                         meta.json                any JSON
                         <item>.<process>.json    state of an iterator, one file per process
                         manifest.<process>.json  sizes and checksums of this process's share of the files above

It must not know what the items mean.
"""

import base64
import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from vidar.errors import CheckpointError

_logger = logging.getLogger("vidar")
_STALE = ".stale-"


class Checkpoints:
    """The checkpoints of one run: saved asynchronously, restored from the newest step that is whole.

    Args:
        directory: Where the steps lie; shared by all processes.
        keep: How many of the newest steps are kept.
        every: Steps divisible by this are kept for good; None keeps none of them.
    """

    def __init__(self, directory: os.PathLike[str] | str, keep: int, every: int | None = None):
        if keep < 1:
            raise CheckpointError(f"keep={keep}: at least one checkpoint must be kept")
        self._directory = _absolute(directory)
        self._keep = keep
        self._every = every
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._written: set[int] = set()
        self._course_starts_at = -1
        self._tidy = False

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Starts to save a step; returns as soon as the arrays may be donated.

        A save still under way is waited for. A step that this object saved or restored is not saved again; older
        directories of this and later steps (damaged, or left by an abandoned course) are removed once it is complete.

        Args:
            step: Global step.
            items: By name: a pytree of arrays; an iterator with `get_state`; under "meta" anything that JSON can hold.

        Raises:
            CheckpointError: This save or the previous one cannot be written.
        """
        self.wait()
        if step in self._written:
            return
        # What is not a pytree is read now, in the caller's thread: the caller moves on while the arrays are written.
        texts = {
            f"{name}.json" if name == "meta" else f"{name}.{jax.process_index()}.json": _to_json(item)
            for name, item in items.items()
            if name == "meta" or hasattr(item, "get_state")
        }
        trees = {
            name: _named_leaves(item)
            for name, item in items.items()
            if name != "meta" and not hasattr(item, "get_state")
        }
        path = self._directory / _step_name(step)
        try:
            stale = self._set_aside()
            path.mkdir(parents=True, exist_ok=True)
            _check_space(path, trees)
            response = _orbax().save_checkpointables_async(path / "arrays", trees) if trees else None
        except (OSError, ValueError, RuntimeError) as error:
            raise _write_error(path, error) from error
        described = {
            name: {key: [list(np.shape(leaf)), str(leaf.dtype)] for key, leaf in tree.items()}
            for name, tree in trees.items()
        }
        self._pending = self._worker.submit(self._finish, step, response, texts, described, stale)

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
            CheckpointError: It could not be written (the disk is full, say).
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def latest(self) -> int | None:
        """Returns the newest step that was completely written, or None."""
        steps = _steps(self._directory)
        complete = next((step for step in steps if _is_complete(self._directory / _step_name(step))), None)
        if steps and complete is None:
            _logger.warning("all checkpoints in %s are half-written and ignored: %s", self._directory, sorted(steps))
        return complete

    def restore(
        self, step: int | None, templates: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]
    ) -> tuple[int, dict[str, Any]]:
        """Restores a step, or the newest that is whole.

        Args:
            step: Global step; None tries the newest first and goes back over half-written and damaged ones, saying so.
            templates: By name: a pytree of `jax.ShapeDtypeStruct` (with shardings where arrays are to be placed); an
                iterator with `set_state`; anything for "meta". Or what makes these of the decoded "meta" of the step.

        Returns:
            The step, and by name: the pytree, the same iterator at its saved position, or the decoded JSON.

        Raises:
            CheckpointError: There is none, all are damaged, or what is saved does not fit the templates.
        """
        for candidate, path in _whole_checkpoints(self._directory, step):
            wanted = templates(_read(path, "meta", None, exact=True)) if callable(templates) else templates
            restored = {name: _read(path, name, template, exact=True) for name, template in wanted.items()}
            self._written.add(candidate)
            self._course_starts_at = candidate
            return candidate, restored
        raise CheckpointError(
            f"{self._directory}: no whole checkpoint; remove the directory to start from the beginning"
        )

    def _set_aside(self) -> list[epath.Path]:
        """Before the first save: renames later steps and those that are damaged, and deletes older leftovers."""
        if self._tidy:
            return []
        self._tidy = True
        stale = []
        if jax.process_index() == 0 and self._directory.exists():
            for path in self._directory.glob(f"{_STALE}*"):
                path.rmtree()
            for step in _steps(self._directory):
                path = self._directory / _step_name(step)
                if step > self._course_starts_at:
                    stale.append(path.rename(self._directory / f"{_STALE}{path.name}"))
        _barrier("vidar_checkpoint_set_aside")
        return stale

    def _finish(self, step: int, response: Any, texts: dict[str, str], described: Any, stale: list[epath.Path]) -> None:
        """In the worker: waits for Orbax, writes the manifest, removes old steps."""
        path = self._directory / _step_name(step)
        process, processes = jax.process_index(), jax.process_count()
        try:
            if response is not None:
                response.result()
            own = []
            for name, text in texts.items():
                if name != "meta.json" or process == 0:
                    _write_atomically(path / name, text)
                    own.append(path / name)
            shared = _files(path / "arrays")[process::processes] if described else []
            manifest = {"processes": processes, "arrays": described, "files": _checksums(path, own + shared)}
            _write_atomically(path / f"manifest.{process}.json", json.dumps(manifest))
            self._written.add(step)
            if process == 0:
                for old in stale + self._expired():
                    _remove(old)
        except (OSError, ValueError, RuntimeError) as error:
            raise _write_error(path, error) from error

    def _expired(self) -> list[epath.Path]:
        """Returns the steps that need not be kept: old ones, and what half-written ones left before the newest."""
        steps = _steps(self._directory)
        complete = [step for step in steps if _is_complete(self._directory / _step_name(step))]
        kept = set(complete[: self._keep]) | {step for step in complete if self._every and step % self._every == 0}
        newest = max(complete, default=-1)
        return [self._directory / _step_name(step) for step in steps if step < newest and step not in kept]


def load_item(directory: os.PathLike[str] | str, name: str, template: Any, step: int | None = None) -> Any:
    """Loads one item of a run's checkpoints, for inference; it never writes.

    Args:
        directory: The run's checkpoint directory.
        name: Name of the item (`ema`, `meta`).
        template: Pytree of `jax.ShapeDtypeStruct`; it may name a part of what is saved. Ignored for "meta".
        step: Global step; None takes the newest whole one.

    Returns:
        The pytree, or the decoded JSON.

    Raises:
        CheckpointError: There is none, all are damaged, or what is saved does not fit the template.
    """
    directory = _absolute(directory)
    for _, path in _whole_checkpoints(directory, step, only=name):
        return _read(path, name, template, exact=False)
    raise CheckpointError(f"{directory}: no whole checkpoint")


def _whole_checkpoints(
    directory: epath.Path, step: int | None, only: str | None = None
) -> Iterator[tuple[int, epath.Path]]:
    """Yields (step, path) of checkpoints whose files are all as they were written, newest first."""
    steps = _steps(directory)
    if not steps:
        raise CheckpointError(f"{directory}: no checkpoint here; give a run's checkpoint directory")
    if step is not None and step not in steps:
        raise CheckpointError(f"{directory}: no checkpoint of step {step}; there are {sorted(steps)}")
    for candidate in steps if step is None else [step]:
        path = directory / _step_name(candidate)
        damage = _agreed(_damage(path, only))
        if damage is None:
            yield candidate, path
        elif step is not None:
            raise CheckpointError(f"{path}: {damage}; use another step of {sorted(steps)}")
        else:
            _logger.warning("checkpoint %s is damaged (%s); going back to the one before", path, damage)


def _damage(path: epath.Path, only: str | None) -> str | None:
    """Returns what is wrong with a checkpoint, or None; each process checks its share of the files."""
    try:
        manifests = _manifests(path)
        if manifests is None:
            return "half-written: it has no complete manifest"
        listed = {name: entry for manifest in manifests for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable manifest: {error}"
    if only is not None:
        listed = {name: entry for name, entry in listed.items() if _belongs(name, only)}
    share = sorted(listed)[jax.process_index() :: jax.process_count()]
    for name in share:
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        size = file.stat().length
        if size != listed[name][0]:
            return f"{name} has {size} bytes instead of {listed[name][0]}"
    try:
        found = _checksums(path, [path / name for name in share])
    except OSError as error:
        return f"unreadable: {error}"
    changed = next((name for name in share if found[name][1] != listed[name][1]), None)
    return None if changed is None else f"the content of {changed} has changed"


def _read(path: epath.Path, name: str, template: Any, exact: bool) -> Any:
    """Reads one item of a checkpoint that is known to be whole."""
    if name == "meta":
        return json.loads((path / "meta.json").read_text())
    if hasattr(template, "set_state"):
        template.set_state(_iterator_state(path, name))
        return template
    described = (_manifests(path) or [{}])[0].get("arrays", {})
    if name not in described:
        raise CheckpointError(f"{path}: there is no item {name!r}; there are {sorted(described)}")
    saved, wanted = described[name], _named_leaves(template)
    missing, unknown = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    if missing or (exact and unknown):
        wrong = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the configuration does not"
        raise CheckpointError(f"{path}: item {name!r} {wrong}; restore it with the configuration it was saved with")
    for key, leaf in wanted.items():
        if tuple(saved[key][0]) != tuple(leaf.shape):
            raise CheckpointError(
                f"{path}: {name}/{key} has shape {tuple(saved[key][0])}, the configuration says {tuple(leaf.shape)}"
            )
    ocp = _orbax()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            loaded = ocp.load_checkpointables(path / "arrays", {name: _placed(wanted)})[name]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: item {name!r} cannot be read: {_first_line(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(template), [loaded[key] for key in wanted])


def _iterator_state(path: epath.Path, name: str) -> Any:
    """Returns this process's saved iterator state; with another number of processes, the one that all of them share."""
    texts = [file.read_text() for file in sorted(path.glob(f"{name}.*.json"))]
    if not texts:
        raise CheckpointError(f"{path}: there is no item {name!r}")
    if len(texts) != jax.process_count() and len(set(texts)) > 1:
        raise CheckpointError(
            f"{path}: {name!r} was saved by {len(texts)} processes at different positions and cannot continue on "
            f"{jax.process_count()}"
        )
    own = path / f"{name}.{jax.process_index()}.json"
    return json.loads(own.read_text() if len(texts) == jax.process_count() else texts[0], object_hook=_from_json)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Flattens a pytree to leaves by path, such as `networks/generator/blocks/mlp/up/kernel/value`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _placed(leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns abstract leaves, each with a sharding: Orbax would else put arrays where they were saved."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    here = jax.sharding.SingleDeviceSharding(chosen if isinstance(chosen, jax.Device) else jax.local_devices()[0])
    return {
        key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
        for key, leaf in leaves.items()
    }


def _absolute(directory: os.PathLike[str] | str) -> epath.Path:
    """Returns an absolute path, which Orbax needs; paths with a scheme (`gs://`) are so already."""
    return epath.Path(directory) if "://" in str(directory) else epath.Path(Path(directory).expanduser().resolve())


def _step_name(step: int) -> str:
    return f"{step:08d}"


def _steps(directory: epath.Path) -> list[int]:
    """Returns the steps that have a directory, newest first."""
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: a file, not a directory of checkpoints; move it away")
    return sorted((int(path.name) for path in directory.iterdir() if path.name.isdigit()), reverse=True)


def _manifests(path: epath.Path) -> list[dict[str, Any]] | None:
    """Returns the manifests of all processes, or None where they are not complete."""
    first = path / "manifest.0.json"
    if not first.exists():
        return None
    manifests = [json.loads(first.read_text())]
    for process in range(1, manifests[0]["processes"]):
        file = path / f"manifest.{process}.json"
        if not file.exists():
            return None
        manifests.append(json.loads(file.read_text()))
    return manifests


def _is_complete(path: epath.Path) -> bool:
    """Whether all manifests are there; a manifest that cannot be read counts, and is found damaged later."""
    try:
        return _manifests(path) is not None
    except (ValueError, KeyError, TypeError):
        return True


def _files(path: epath.Path) -> list[epath.Path]:
    """Returns all files below a directory, in a fixed order."""
    found = []
    for entry in sorted(path.iterdir()):
        found += _files(entry) if entry.is_dir() else [entry]
    return found


def _belongs(file: str, item: str) -> bool:
    """Whether a file of a checkpoint is needed to read one item."""
    parts = file.split("/")
    return len(parts) == 2 or parts[1] == item if parts[0] == "arrays" else file.startswith(f"{item}.")


def _checksums(path: epath.Path, files: list[epath.Path]) -> dict[str, list[int]]:
    """Returns size and CRC-32 of each file, by its path below the checkpoint."""

    def measure(file: epath.Path) -> tuple[str, list[int]]:
        size, checksum = 0, 0
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
        return str(file.relative_to(path)), [size, checksum]

    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(pool.map(measure, files))


def _write_atomically(path: epath.Path, text: str) -> None:
    """Writes a file so that it is either complete or absent."""
    temporary = path.parent / f"{path.name}.tmp"
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        # Object stores have no descriptor to synchronise: there a file appears only when it is complete.
        if hasattr(stream, "fileno"):
            os.fsync(stream.fileno())
    temporary.replace(path)


def _remove(path: epath.Path) -> None:
    """Deletes a step; renamed first, so that one half deleted is never taken for a checkpoint."""
    if not path.name.startswith(_STALE):
        path = path.rename(path.parent / f"{_STALE}{path.name}")
    path.rmtree()


def _to_json(item: Any) -> str:
    """Encodes meta data or an iterator's state."""
    state = item.get_state() if hasattr(item, "get_state") else item

    def encode(value: Any) -> Any:
        if isinstance(value, bytes):
            return {"__bytes__": base64.b64encode(value).decode()}
        if isinstance(value, (np.ndarray, np.generic)):
            return value.tolist()
        raise CheckpointError(f"meta data must be JSON, not {type(value).__name__} {value!r}")

    return json.dumps(state, default=encode)


def _from_json(value: dict[str, Any]) -> Any:
    """Decodes what `_to_json` wrote for bytes."""
    return base64.b64decode(value["__bytes__"]) if set(value) == {"__bytes__"} else value


def _agreed(damage: str | None) -> str | None:
    """Makes all processes find the same: damage that any of them sees counts for all."""
    if jax.process_count() == 1:
        return damage
    from jax.experimental import multihost_utils

    anywhere = bool(np.any(multihost_utils.process_allgather(np.asarray([damage is not None]))))
    return (damage or "another process found it damaged") if anywhere else None


def _barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _check_space(path: epath.Path, trees: dict[str, dict[str, Any]]) -> None:
    """Raises where a local disk cannot hold the arrays: Orbax would find out half-way, in several threads."""
    if "://" in str(path):
        return
    needed = sum(leaf.nbytes for tree in trees.values() for leaf in tree.values())
    if shutil.disk_usage(path).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_error(path: epath.Path, error: Exception) -> CheckpointError:
    """Returns one line that says why a checkpoint could not be written, and frees what was written of it."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)
    if jax.process_index() == 0 and path.exists():
        path.rmtree(missing_ok=True)
    if full:
        return CheckpointError(
            f"{path}: the disk is full; free some space and start again: the run goes on from its last checkpoint"
        )
    return CheckpointError(f"{path}: cannot be written: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _orbax() -> Any:
    """Imports Orbax when it is first needed, without its own log: its errors reach the caller as CheckpointError."""
    from orbax.checkpoint import v1

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return v1
