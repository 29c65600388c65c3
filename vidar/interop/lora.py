"""Low-rank adapters (LoRA) merged into the weights that they were trained beside.

An adapter adds `alpha / rank · B A` to a weight `W [o, i]`, with `A [rank, i]` and `B [o, rank]` (Hu et al., 2021,
arXiv:2106.09685, section 4.1). It knows how LongLive, PEFT, diffusers, ComfyUI and Kohya's trainers name these; which
tensors a network has is told by the checkpoint that they are merged into.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vidar.errors import CheckpointError, check_range
from vidar.interop import tables
from vidar.interop.networks import Network
from vidar.interop.sources import TORCH_SUFFIXES, Stored, Tensors, open_tensors
from vidar.interop.torch_file import read_torch_file

_PART = "generator_lora"  # LongLive's, beside `critic_lora`
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
_FLAT = "lora_unet_"  # before names with underscores for dots
# Ends of names: what the tensor is, and the end of the name of what it changes.
_ENDS = {
    ".lora_A.weight": ("down", ".weight"),
    ".lora_A.default.weight": ("down", ".weight"),
    ".lora_down.weight": ("down", ".weight"),
    ".lora_B.weight": ("up", ".weight"),
    ".lora_B.default.weight": ("up", ".weight"),
    ".lora_up.weight": ("up", ".weight"),
    ".alpha": ("alpha", ".weight"),
    ".diff": ("difference", ".weight"),
    ".diff_b": ("difference", ".bias"),
    ".diff_m": ("difference", ".modulation"),
}


@dataclass(frozen=True)
class _Change:
    """What is added to one tensor: a product of `up` and `down`, a difference as it stands, or both."""

    down: Stored | None = None
    up: Stored | None = None
    alpha: Stored | None = None
    difference: Stored | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is a change of a tensor of this shape; the rank may be any."""
        fits = self.difference is None or self.difference.shape == shape
        fits = fits and (self.alpha is None or math.prod(self.alpha.shape) == 1)
        if self.down is None or self.up is None:
            return fits
        down, up = self.down.shape, self.up.shape
        rank = down[0] if down else 0
        return fits and rank > 0 and down[1:] == shape[1:] and up == (*shape[:1], rank, *[1] * (len(shape) - 2))

    def added(self, base: np.ndarray, scale: float) -> np.ndarray:
        """The tensor with it, in fp32 until the end."""
        total = base.astype(np.float32)
        if self.down is not None and self.up is not None:
            rank = self.down.shape[0]
            alpha = float(rank if self.alpha is None else self.alpha.read().item())
            down, up = (part.read().astype(np.float32).reshape(part.shape[0], -1) for part in (self.down, self.up))
            product = up @ down
            product *= np.float32(scale * alpha / rank)
            total += product.reshape(base.shape)
        if self.difference is not None:
            total += np.float32(scale) * self.difference.read().astype(np.float32)
        return total.astype(base.dtype)


def open_adapter(path: str | Path) -> Tensors:
    """Opens an adapter.

    Args:
        path: A file or directory as `open_tensors` takes it; of several networks in a PyTorch file, LongLive's
            `generator_lora`.

    Returns:
        Its tensors. Where PEFT or diffusers keeps alpha beside them, in `adapter_config.json` or the file's header,
        they have it for each weight.

    Raises:
        CheckpointError: There is nothing to open, a file is damaged, or it is an adapter of a kind that is no sum.
    """
    path = Path(path)
    part = None
    if path.is_file() and path.suffix in TORCH_SUFFIXES:
        content = read_torch_file(path)
        part = _PART if isinstance(content, dict) and isinstance(content.get(_PART), dict) else None
    tensors = dict(open_tensors(path, part))
    settings = _settings(path)
    if settings.get("use_dora") or settings.get("alpha_pattern") or settings.get("rank_pattern"):
        raise CheckpointError(f"{path}: DoRA, and an alpha or a rank of its own for each layer, are not merged here")
    if settings.get("lora_alpha") is None:
        return tensors
    alpha = float(settings["lora_alpha"])
    for name, stored in list(tensors.items()):
        module, kind, _ = _parsed(name)
        if kind == "down" and f"{module}.alpha" not in tensors:
            # PEFT's rank-stabilised adapters divide by the root of the rank.
            own = alpha * math.sqrt(stored.shape[0]) if settings.get("use_rslora") else alpha
            tensors[f"{module}.alpha"] = Stored((), np.dtype(np.float32), lambda own=own: np.asarray(own, np.float32))
    return tensors


def merged(tensors: Tensors, adapter: Tensors, scale: float = 1.0) -> Tensors:
    """Merges an adapter into a checkpoint whose names it has.

    Args:
        tensors: The checkpoint.
        adapter: The adapter. `lora_A` and `lora_B` (or `lora_down` and `lora_up`) for each weight, with `alpha` where
            it is not the rank; tensors to add as they are (`diff`, `diff_b`, `diff_m`).
        scale: Strength, times alpha / rank; 0 leaves the checkpoint as it is.

    Returns:
        The checkpoint by the same names and in the same types; sums are formed in fp32 when a tensor is read.

    Raises:
        CheckpointError: A tensor of the adapter belongs to none of the checkpoint, has another shape, lacks its
            partner, or is of an unknown kind.
        ConfigError: The scale is not finite.
    """
    check_range("scale", float(scale))
    changes = _changes(tensors, adapter)

    def changed(name: str, change: _Change) -> Stored:
        stored = tensors[name]
        return replace(stored, read=lambda: change.added(stored.read(), scale))

    if not scale:
        return tensors
    return {**tensors, **{name: changed(name, change) for name, change in changes.items()}}


def merged_into(network: Network, adapter: Tensors, scale: float = 1.0) -> Network:
    """Merges an adapter into a network, whichever of the layouts each of them has.

    Args:
        network: The network.
        adapter: The adapter.
        scale: Strength, as `merged` has it.

    Returns:
        The network in the layout of the adapter.

    Raises:
        CheckpointError: As `merged`; or the network's own tensors are not all there.
        ConfigError: The scale is not finite.
    """
    layouts = sorted(network.table[0].theirs, key=lambda layout: layout != network.layout)
    known = {
        layout: tables.renamed(network.tensors, network.template, network.table, network.layout, layout)
        for layout in layouts
    }
    layout = max(
        layouts, key=lambda layout: sum(target in known[layout] for target in _targets(known[layout], adapter))
    )
    return replace(network, layout=layout, tensors=merged(known[layout], adapter, scale))


def _targets(tensors: Tensors, adapter: Tensors) -> list[str]:
    """What each tensor of an adapter changes; where a checkpoint lacks it, the name that it would have."""
    flat = {}
    for name in tensors:
        module = name.rpartition(".")[0]
        flat[f"{_FLAT}{module.replace('.', '_')}"] = module
    targets = []
    for name in adapter:
        module, _, end = _parsed(name)
        for prefix in _PREFIXES:
            module = module.removeprefix(prefix)
        targets.append(f"{flat.get(module, module)}{end}")
    return targets


def _parsed(name: str) -> tuple[str, str, str]:
    """The module that a tensor of an adapter belongs to, what it is, and the end of the name of what it changes."""
    for end, (kind, target) in _ENDS.items():
        if name.endswith(end):
            return name.removesuffix(end), kind, target
    raise CheckpointError(f"{name} is no tensor of an adapter that is known here; names end in {', '.join(_ENDS)}")


def _changes(tensors: Tensors, adapter: Tensors) -> dict[str, _Change]:
    targets = _targets(tensors, adapter)
    strange = [target for target in targets if target not in tensors]
    if strange:
        raise CheckpointError(
            f"the adapter is of another network: {len(strange)} of its {len(adapter)} tensors change what this one "
            f"lacks, such as {strange[0]}"
        )
    parts: dict[str, dict[str, Stored]] = {}
    for (name, stored), target in zip(adapter.items(), targets, strict=True):
        held, kind = parts.setdefault(target, {}), _parsed(name)[1]
        if kind in held:
            raise CheckpointError(f"{name}: the adapter changes {target} twice")
        held[kind] = stored
    changes = {target: _Change(**held) for target, held in parts.items()}
    for target, change in changes.items():
        if (change.down is None) != (change.up is None) or (change.alpha is not None and change.down is None):
            raise CheckpointError(
                f"the adapter has only {' and '.join(parts[target])} for {target}; down and up belong together"
            )
        if not change.fits(tensors[target].shape):
            shapes = ", ".join(f"{kind} {list(stored.shape)}" for kind, stored in parts[target].items())
            raise CheckpointError(
                f"the adapter is of another network: {target} is {list(tensors[target].shape)}, its change is {shapes}"
            )
    return changes


def _settings(path: Path) -> Mapping[str, Any]:
    """What PEFT says beside an adapter, and diffusers in its file's header."""
    beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
    said: Any = {}
    try:
        if beside.is_file() and (path.is_dir() or path.stem == "adapter_model"):
            said = json.loads(beside.read_text())
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="np") as file:
                said = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            said = {name.removeprefix("transformer."): value for name, value in said.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the settings of the adapter are not JSON ({error}); download it again"
        ) from error
    if not isinstance(said, dict):
        raise CheckpointError(f"{beside}: holds no settings; download it again")
    return said
