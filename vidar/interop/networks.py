"""The networks that vidar takes from other projects: which one a checkpoint holds, and loading it.

One entry for each kind of network; how its tensors are named is `wan.py`'s, `clip.py`'s and `taehv.py`'s business.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vidar.errors import CheckpointError, ConfigError
from vidar.interop import clip, tables, taehv, wan
from vidar.interop.folders import Folder
from vidar.interop.sources import TORCH_SUFFIXES, Tensors, open_tensors
from vidar.interop.tables import Progress, Table
from vidar.models.clip import CLIPConfig
from vidar.models.dit import DiTConfig
from vidar.models.layers import Precision
from vidar.models.placement import logical_axes

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Network:
    """What a checkpoint turned out to be.

    Attributes:
        kind: One of `KINDS`.
        config: Its config.
        layout: `original` or `diffusers`.
        template: The network with `jax.ShapeDtypeStruct` leaves.
        table: Its rows.
        tensors: The checkpoint as the table has it.
        where: Where it lies, for messages.
    """

    kind: str
    config: Any
    layout: str
    template: Any
    table: Table
    tensors: Tensors
    where: str = "the checkpoint"

    def load(self, progress: Progress = iter) -> Any:
        """Loads it onto the current mesh; as `tables.load`."""
        with _naming(self.where):
            return tables.load(self.tensors, self.template, self.table, self.layout, logical_axes, progress)

    def converted(self, layout: str) -> Tensors:
        """Its tensors as another layout has them; as `tables.renamed`."""
        with _naming(self.where):
            found = tables.renamed(self.tensors, self.template, self.table, self.layout, layout)
        return clip.packed(found) if self.kind == "image_encoder" else found

    @property
    def settings(self) -> dict[str, Any]:
        """What diffusers (or transformers) keeps beside the weights, in `config.json`."""
        return KINDS[self.kind].settings(self.config)


@dataclass(frozen=True)
class Kind:
    """One kind of network.

    Attributes:
        marks: Names of tensors that no other network has.
        config: Tensors, settings, types → config and layout.
        template: Config → the network with abstract leaves.
        table: Config → rows.
        settings: Config → what diffusers keeps in `config.json`.
        stem: What diffusers calls its files.
    """

    marks: tuple[str, ...]
    config: Callable[[Tensors, Settings, Precision | None], tuple[Any, str]]
    template: Callable[[Any], Any]
    table: Callable[[Any], Table]
    settings: Callable[[Any], dict[str, Any]]
    stem: str = "diffusion_pytorch_model"


def _head_dim(settings: Settings, width: str, heads: str) -> int | None:
    """Channels of a head, which no shape tells; in the original layout, one `config.json` lies beside all networks."""
    if "attention_head_dim" in settings:
        return int(settings["attention_head_dim"])
    return int(settings[width]) // int(settings[heads]) if settings.get(width) and settings.get(heads) else None


def _dit_config(tensors: Tensors, settings: Settings, precision: Precision | None) -> tuple[DiTConfig, str]:
    return wan.dit_config(tensors, _head_dim(settings, "dim", "num_heads") or 128, precision)


def _clip_config(tensors: Tensors, settings: Settings, precision: Precision | None) -> tuple[CLIPConfig, str]:
    return clip.clip_config(tensors, _head_dim(settings, "hidden_size", "num_attention_heads") or 80, precision)


KINDS: Mapping[str, Kind] = {
    "transformer": Kind(
        tuple(wan.DIT_MARKS.values()),
        _dit_config,
        wan.dit_template,
        wan.dit_table,
        wan.dit_settings,
    ),
    "vae": Kind(
        tuple(wan.VAE_MARKS.values()), wan.vae_config, wan.vae_template, wan.vae_table, wan.vae_settings
    ),
    "text_encoder": Kind(
        tuple(wan.UMT5_MARKS.values()), wan.umt5_config, wan.umt5_template, wan.umt5_table, wan.umt5_settings, "model"
    ),
    "image_encoder": Kind(
        tuple(clip.MARKS.values()),
        _clip_config,
        clip.clip_template,
        clip.clip_table,
        clip.clip_transformers_config,
        "model",
    ),
    "tiny_vae": Kind(
        ("decoder.1.weight",),
        lambda tensors, settings, types: (taehv.taehv_config(tensors, types), "original"),
        taehv.taehv_template,
        taehv.taehv_table,
        lambda config: {},
    ),
}  # fmt: skip


def open_network(
    path: Path,
    part: str | None = None,
    precision: Precision | None = None,
    beside: Path | None = None,
    head_dim: int | None = None,
) -> Network:
    """Opens a checkpoint, and finds out which network it is of.

    Args:
        path: As `open_tensors` takes it.
        part: Which of several networks in a PyTorch file.
        precision: Types of the network; None for the kind's own.
        beside: Where `config.json` lies; None for beside the checkpoint.
        head_dim: Channels of a head; None for what `config.json` says, or as published.

    Returns:
        The network.

    Raises:
        CheckpointError: It is damaged or none that is known.
        ConfigError: What `config.json` says is impossible.
    """
    settings = read_settings(beside or path) | ({} if head_dim is None else {"attention_head_dim": head_dim})
    tensors = open_tensors(path, part)
    with _naming(str(path)):
        try:
            return replace(recognise(tensors, settings, precision), where=str(path))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"its shapes or its config.json are of no network ({error})") from error


def published(source: str) -> tuple[Path, str | None] | None:
    """Takes apart how a config names a published transformer.

    Args:
        source: A model's folder, a checkpoint as `open_tensors` takes it, or `FILE.pt:PART`.

    Returns:
        Path and part; None where no such thing is there.
    """
    name, _, part = source.rpartition(":")
    path, chosen = (Path(name), part) if name.endswith(TORCH_SUFFIXES) else (Path(source), None)
    there = Folder.is_one(path) if path.is_dir() else path.is_file()
    return (path, chosen) if there else None


def open_transformer(source: str, precision: Precision | None = None, head_dim: int | None = None) -> Network:
    """Opens a published transformer by one text, as a config names it.

    Args:
        source: As in `published`.
        precision: As in `open_network`.
        head_dim: Channels of a head, where no `config.json` tells; None for as published.

    Returns:
        The network.

    Raises:
        CheckpointError: It is damaged, or no transformer that is known.
    """
    path, part = published(source) or (Path(source), None)
    where = Folder.find(path).transformer if path.is_dir() else path
    told = _head_dim(read_settings(where), "dim", "num_heads")
    found = open_network(where, part, precision, head_dim=head_dim if told is None else None)
    if found.kind != "transformer":
        raise CheckpointError(f"{source}: holds a {found.kind}, a transformer is wanted here")
    return found


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Says in errors which of several checkpoints they are about."""
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error


def recognise(tensors: Tensors, settings: Settings | None = None, precision: Precision | None = None) -> Network:
    """Finds out which network a checkpoint is of.

    Args:
        tensors: The checkpoint.
        settings: What stands beside it in `config.json`, for what no shape tells; None for nothing.
        precision: Types of the network; None for the kind's own.

    Returns:
        The network; whether all of its tensors are there is asked when they are loaded.

    Raises:
        CheckpointError: It is none of them.
    """
    tensors = clip.unpacked(tensors)
    for name, kind in KINDS.items():
        if any(mark in tensors for mark in kind.marks):
            config, layout = kind.config(tensors, settings or {}, precision)
            return Network(name, config, layout, kind.template(config), kind.table(config), tensors)
    first = ", ".join(list(tensors)[:3])
    raise CheckpointError(f"no network that is known here ({', '.join(KINDS)}): it has {first} …")


def read_settings(path: Path) -> dict[str, Any]:
    """What `config.json` beside the weights says; nothing where there is none.

    Args:
        path: The weights, or their folder.

    Raises:
        CheckpointError: It is damaged.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON ({error}); download it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: holds no settings; download it again")
    return settings
