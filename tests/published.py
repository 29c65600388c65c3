"""Folders of published models, tiny and of random weights, in both layouts."""

import shutil
from dataclasses import replace

import numpy as np

from tests.golden import clip as clip_golden
from tests.golden.prompts import FOLDER as TOKENIZER
from tests.golden.wan import weight
from tests.interop.test_wan import DITS
from vidar.interop import clip, tables
from vidar.interop.networks import KINDS
from vidar.interop.sources import Stored
from vidar.interop.targets import save_tensors, write_json
from vidar.models.clip import CLIPConfig
from vidar.models.codecs.taehv import TAEHVConfig
from vidar.models.codecs.wan_vae import WanVAEConfig
from vidar.models.dit import DiTConfig
from vidar.models.layers import Precision
from vidar.models.umt5 import UMT5Config

FP32 = Precision("float32", "float32")
SMALL = clip_golden.SMALL
CONFIGS = {
    "vae": WanVAEConfig(width=4),
    "text_encoder": UMT5Config(
        width=32, layers=2, heads=4, head_dim=8, mlp=48, vocabulary=704, precision=FP32
    ),
    "image_encoder": CLIPConfig(
        width=SMALL["hidden_size"],
        layers=SMALL["num_hidden_layers"],
        heads=SMALL["num_attention_heads"],
        mlp=SMALL["intermediate_size"],
        patch=SMALL["patch_size"],
        size=SMALL["image_size"],
        precision=FP32,
    ),
    "tiny_vae": TAEHVConfig(width=4, widths=(8, 4, 4, 4)),
}  # fmt: skip
_ORIGINAL = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "Wan2.1_VAE.safetensors",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.safetensors",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
}


def transformer_config(image: bool) -> DiTConfig:
    """The transformer's config."""
    config = DITS["i2v" if image else "t2v"]
    return replace(config, image=replace(config.image, width=SMALL["hidden_size"])) if image else config


def network_tensors(kind: str, config, layout: str, seed: str = "") -> dict[str, Stored]:
    """A network's tensors by name, of seeded weights."""
    template, table = KINDS[kind].template(config), KINDS[kind].table(config)
    first = "original" if kind == "tiny_vae" else "diffusers"

    def stored(name: str, shape: tuple[int, ...]) -> Stored:
        return Stored(shape, np.dtype(np.float32), lambda: weight(name + seed, shape))

    tensors = {name: stored(name, shape) for name, shape in tables.shapes(template, table, first).items()}
    if layout != first:
        tensors = tables.renamed(tensors, template, table, first, layout)
    return dict(clip.packed(tensors) if kind == "image_encoder" else tensors)


def make_folder(path, *, image: bool = False, layout: str = "diffusers"):
    """Writes a model's folder.

    Args:
        path: The folder.
        image: Whether it is an image-to-video model.
        layout: `diffusers` or `original`.

    Returns:
        The folder.
    """
    configs = {"transformer": transformer_config(image), **CONFIGS}
    for kind in ("transformer", "vae", "text_encoder", *(["image_encoder"] if image else [])):
        tensors = network_tensors(kind, configs[kind], layout)
        if layout == "diffusers":
            save_tensors(path / kind, tensors, stem=KINDS[kind].stem)
            write_json(path / kind / "config.json", KINDS[kind].settings(configs[kind]))
        else:
            save_tensors(path / _ORIGINAL[kind], tensors)
    tokenizer = "tokenizer"
    if layout == "original":
        heads = {"num_heads": configs["transformer"].heads, "dim": configs["transformer"].width}
        write_json(path / "config.json", heads | {"hidden_size": SMALL["hidden_size"], "num_attention_heads": 2})
        tokenizer = "google/umt5-xxl"
    (path / tokenizer).mkdir(parents=True)
    for name in ("tokenizer.json", "spiece.model"):
        shutil.copy(TOKENIZER / name, path / tokenizer / name)
    return path
