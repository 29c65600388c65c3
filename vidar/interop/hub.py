"""Checkpoints by path or by their name on the Hugging Face hub, from where they are downloaded when first used."""

import re
from pathlib import Path
from typing import Any

from vidar.errors import CheckpointError, ConfigError
from vidar.interop.sources import TORCH_SUFFIXES

# What is read here, of the much else that repositories hold.
PATTERNS = ("*.json", "*.safetensors", "*.pth", "*.pt", "*spiece.model", "*tokenizer.model", "google/*")
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)((?:/[\w-][\w.+-]*)*)(?:@([\w./-]+))?")
_HINTS = {
    "GatedRepoError": "its owner grants access: ask for it on its page, then log in with `hf auth login`",
    "RevisionNotFoundError": "it has no such revision; give one of its branches, tags or commits",
    "RepositoryNotFoundError": "no such path here and no such repository there; if it is private, log in with "
    "`hf auth login`",
    "LocalEntryNotFoundError": "it is not on this machine, and the hub cannot be reached; connect, or give a path",
    "OfflineModeIsEnabled": "it is not on this machine, and HF_HUB_OFFLINE is set; unset it, or give a path",
}


def local_folder(source: str | Path) -> Path:
    """Finds a checkpoint on this machine, or brings it here.

    Args:
        source: A path; or, where there is no such path, a repository of the hub as `owner/name`, a file or folder in
            it as `owner/name/transformer`, each at a revision as `owner/name@revision`. Of a repository, the files
            that are read here are downloaded, and kept in the hub's own cache.

    Returns:
        The path itself, or where the download lies.

    Raises:
        CheckpointError: There is no such path, and it is no repository or cannot be downloaded.
        ConfigError: It names a repository, and the hub's client is not installed.
    """
    if Path(source).exists():
        return Path(source)
    found = _NAME.fullmatch(str(source))
    here = _is_file(str(source)) and Path(source).parent.is_dir()
    if found is None or here or (not found[2] and _is_file(found[1])):
        raise CheckpointError(f"{source}: no such file or folder; give a path, or owner/name of the Hugging Face hub")
    name, inside, revision = found[1], found[2].removeprefix("/"), found[3]
    folder = Path(_downloaded(source, name, revision, _patterns(inside)))
    if not (folder / inside).exists():
        raise CheckpointError(f"{source}: {name} on the Hugging Face hub has no {inside} that can be read here")
    return folder / inside


def _is_file(name: str) -> bool:
    """Whether a name is rather a file's than a repository's."""
    return name.endswith((".safetensors", ".json", *TORCH_SUFFIXES))


def _patterns(inside: str) -> list[str]:
    if not inside:
        return list(PATTERNS)
    return [inside] if _is_file(inside) else [f"{inside}/{pattern}" for pattern in PATTERNS]


def _downloaded(source: str | Path, name: str, revision: str | None, patterns: list[str]) -> Any:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{source}: no such file or folder; to download it from the Hugging Face hub: pip install -e '.[hub]'"
        ) from error
    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:  # of the hub, of HTTP, and of the disk: its client raises many kinds
        kinds = [kind.__name__ for kind in type(error).__mro__]
        reason = next((_HINTS[kind] for kind in kinds if kind in _HINTS), None)
        reason = reason or " ".join(str(error).split())[:300] or kinds[0]
        raise CheckpointError(f"{source}: cannot be downloaded from the Hugging Face hub: {reason}") from error
