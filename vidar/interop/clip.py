"""CLIP's image encoder in two layouts: the original, in the file that Wan comes with, and that of transformers.

The table describes tensors as transformers has them. The original packs queries, keys and values in one tensor, and
its file holds a text encoder beside the vision tower: `unpacked` comes before everything that reads by the table, and
`packed` after what is written.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from vidar.errors import CheckpointError
from vidar.interop.sources import Stored, Tensors
from vidar.interop.tables import Row, Table
from vidar.models.clip import CLIP, EPS, CLIPConfig
from vidar.models.layers import Precision

# Beside the vision tower: the text encoder of the original and its temperature; the projections of the class token
# into the space that image and text share; and positions counted out, which older versions of transformers wrote.
UNUSED_PREFIXES = ("textual.",)
UNUSED = ("log_scale", "visual.head", "visual_projection.weight", "vision_model.embeddings.position_ids")

_PACKED = (".attn.to_qkv.weight", ".attn.to_qkv.bias")
_PARTS = ("[query]", "[key]", "[value]")
_LEADING = {"visual.cls_embedding": 2, "visual.pos_embedding": 1}  # axes of size 1 before the tensor itself
# A tensor by which the encoder and its layout are known.
MARKS = {"original": "visual.patch_embedding.weight", "diffusers": "vision_model.embeddings.patch_embedding.weight"}
_PREFIX = "vision_model."


def clip_table(config: CLIPConfig) -> Table:
    """Every tensor of the encoder, as `unpacked` names and forms them."""
    return tuple(_rows(config))


def clip_template(config: CLIPConfig) -> CLIP:
    """The encoder with `jax.ShapeDtypeStruct` leaves."""
    return jax.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0)))


def clip_config(tensors: Tensors, head_dim: int = 80, precision: Precision | None = None) -> tuple[CLIPConfig, str]:
    """Reads off a checkpoint which encoder it is of.

    Args:
        tensors: The checkpoint, unpacked.
        head_dim: Channels of a head, which no shape tells; ViT-H/14's have 80.
        precision: Types of the network; None stores parameters as the checkpoint does and computes in bf16.

    Returns:
        The network's config, and the layout: `original` or `diffusers`.

    Raises:
        CheckpointError: It is no image encoder of CLIP's.
    """
    layout = next((layout for layout, mark in MARKS.items() if mark in tensors), None)
    if layout is None:
        marks, first = " nor ".join(MARKS.values()), ", ".join(list(tensors)[:3])
        raise CheckpointError(f"no image encoder of CLIP's: it has neither {marks}, but {first} …")
    names = {row.ours: row.theirs[layout] for row in clip_table(CLIPConfig())}

    def shape(ours: str, rank: int) -> tuple[int, ...]:
        stored = tensors.get(names[ours].format(0))
        if stored is None or len(stored.shape) != rank:
            raise CheckpointError(f"{names[ours].format(0)} is missing or has another shape than CLIP's")
        return stored.shape

    (width, _, patch, _), (mlp, _), (tokens, _) = (
        shape(ours, rank) for ours, rank in (("patch.kernel", 4), ("blocks.up.kernel", 2), ("positions", 2))
    )
    side = round((tokens - 1) ** 0.5)
    if side < 1 or side**2 + 1 != tokens:
        raise CheckpointError(f"{names['positions']} has {tokens} positions, not one more than a square of patches has")
    if width % head_dim:
        raise CheckpointError(f"the encoder is {width} wide, which heads of {head_dim} channels do not fill")
    layers = 0
    while names["blocks.up.kernel"].format(layers) in tensors:
        layers += 1
    config = CLIPConfig(
        width=width,
        layers=layers,
        heads=width // head_dim,
        mlp=mlp,
        patch=patch,
        size=side * patch,
        precision=precision or Precision(params=tensors[MARKS[layout]].dtype.name),
    )
    return config, layout


def clip_transformers_config(config: CLIPConfig) -> dict[str, Any]:
    """What transformers keeps beside the weights, in `config.json`."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "image_size": config.size,
        "patch_size": config.patch,
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
        "attention_dropout": 0.0,
    }


def unpacked(tensors: Tensors) -> Tensors:
    """The vision tower of a checkpoint, with a tensor each for queries, keys and values.

    Args:
        tensors: The checkpoint, in either layout; names may lack the `vision_model.` that transformers dropped in its
            version 5. Without effect on one that is unpacked.

    Returns:
        Its tensors as the table has them, without those that are `UNUSED`; unknown ones stay, for loading to refuse.

    Raises:
        CheckpointError: A packed tensor does not hold three of the same size.
    """
    bare = MARKS["diffusers"].removeprefix(_PREFIX) in tensors
    found: dict[str, Stored] = {}
    for name, stored in tensors.items():
        name = f"{_PREFIX}{name}" if bare else name
        if name in UNUSED or name.startswith(UNUSED_PREFIXES):
            continue
        leading = _LEADING.get(name, 0)
        if name.endswith(_PACKED):
            found |= {f"{name}{part}": third for part, third in zip(_PARTS, _thirds(name, stored), strict=True)}
        elif leading and stored.shape[:leading] == (1,) * leading:
            found[name] = _reshaped(stored, stored.shape[leading:])
        else:
            found[name] = stored
    return found


def packed(tensors: Tensors) -> Tensors:
    """The inverse of `unpacked`, but for what it left out; without effect on the layout of transformers.

    Wan's own code loads a file as a whole, with the text encoder: to use the result there, put it in place of the
    tensors of the same names.

    Args:
        tensors: A checkpoint as the table has it.

    Returns:
        The checkpoint as its own project has it.
    """
    found: dict[str, Stored] = {}
    for name, stored in tensors.items():
        whole = next((name.removesuffix(part) for part in _PARTS if name.endswith(part)), None)
        if whole is None:
            found[name] = _reshaped(stored, (1,) * _LEADING.get(name, 0) + stored.shape)
        elif whole not in found:
            found[whole] = _joined([tensors[f"{whole}{part}"] for part in _PARTS])
    return found


def _thirds(name: str, stored: Stored) -> list[Stored]:
    if not stored.shape or stored.shape[0] % 3:
        raise CheckpointError(f"{name} is {list(stored.shape)}, which is not three tensors of the same size")
    shape = (stored.shape[0] // 3, *stored.shape[1:])
    return [
        replace(stored, shape=shape, read=lambda part=part: stored.read().reshape(3, *shape)[part]) for part in range(3)
    ]


def _joined(parts: list[Stored]) -> Stored:
    first = parts[0]
    shape = (3 * first.shape[0], *first.shape[1:])
    return replace(first, shape=shape, read=lambda: np.concatenate([part.read() for part in parts]))


def _reshaped(stored: Stored, shape: tuple[int, ...]) -> Stored:
    return replace(stored, shape=shape, read=lambda: stored.read().reshape(shape))


def _rows(config: CLIPConfig) -> Iterator[Row]:
    def row(ours: str, original: str, transformers: str, pattern: str = "c -> c", **sizes: int) -> Row:
        names = {"original": f"visual.{original}", "diffusers": f"{_PREFIX}{transformers}"}
        return Row(ours, names, pattern, sizes)

    sides = {"p": config.patch, "q": config.patch}
    patch = "patch_embedding.weight", "embeddings.patch_embedding.weight"
    yield row("patch.kernel", *patch, "m c p q -> (p q c) m", **sides)
    yield row("class_token", "cls_embedding", "embeddings.class_embedding")
    yield row("positions", "pos_embedding", "embeddings.position_embedding.weight", "t m -> t m")
    block, layer = "transformer.{}", "encoder.layers.{}"
    for ours, original, transformers in (
        ("first_norm", "pre_norm", "pre_layrnorm"),  # the spelling of transformers
        ("last_norm", "post_norm", "post_layernorm"),
        ("blocks.norm", f"{block}.norm1", f"{layer}.layer_norm1"),
        ("blocks.mlp_norm", f"{block}.norm2", f"{layer}.layer_norm2"),
    ):
        for name in ("weight", "bias"):
            yield row(*(f"{module}.{name}" for module in (ours, original, transformers)))
    for ours, original, part, transformers in (
        ("attention.query", "attn.to_qkv", _PARTS[0], "self_attn.q_proj"),
        ("attention.key", "attn.to_qkv", _PARTS[1], "self_attn.k_proj"),
        ("attention.value", "attn.to_qkv", _PARTS[2], "self_attn.v_proj"),
        ("attention.output", "attn.proj", "", "self_attn.out_proj"),
        ("up", "mlp.0", "", "mlp.fc1"),
        ("down", "mlp.2", "", "mlp.fc2"),
    ):
        original, transformers = f"{block}.{original}", f"{layer}.{transformers}"
        names = f"blocks.{ours}.kernel", f"{original}.weight{part}", f"{transformers}.weight"
        yield row(*names, "o i -> i o")
        yield row(f"blocks.{ours}.bias", f"{original}.bias{part}", f"{transformers}.bias")
