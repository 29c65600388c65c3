"""Presets: published shapes as data.

`tiny` is for tests; `small` and `nfd_310m` follow Next-Frame Diffusion (arXiv 2506.01380; depth and width derived from
its parameter counts), `wan_1_3b` and `wan_14b` are Wan 2.1 text-to-video.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidar.errors import ConfigError
from vidar.models.dit import DiTConfig, TextConfig
from vidar.models.layers import DiscreteActions, MultiBinaryActions


@dataclass(frozen=True)
class Preset:
    """A network and the video it was made for.

    Attributes:
        model: The network.
        height: Latent height.
        width: Latent width.
        frames: Latent frames of a training clip.
        chunk: Latent frames a chunk.
        pixels: Pixel height and width.
        frames_per_latent: Pixel frames of a latent frame in the steady state.
    """

    model: DiTConfig
    height: int
    width: int
    frames: int
    chunk: int
    pixels: tuple[int, int]
    frames_per_latent: int


def _wan(width: int, mlp: int, heads: int, layers: int) -> Preset:
    model = DiTConfig(width=width, mlp=mlp, heads=heads, layers=layers, channels=16, patch=2, text=TextConfig())
    return Preset(model, 60, 104, 21, 3, (480, 832), 4)


def _next_frame(width: int, layers: int) -> Preset:
    model = DiTConfig(
        width=width,
        mlp=4 * width,
        heads=width // 64,
        layers=layers,
        channels=16,
        modulation="adaln_zero",
        qk_norm="head",
        actions=MultiBinaryActions(25),
    )
    return Preset(model, 14, 24, 32, 1, (224, 384), 1)


PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(DiTConfig(actions=DiscreteActions(5)), 4, 4, 8, 1, (16, 16), 1),
    "small": _next_frame(768, 12),
    "nfd_310m": _next_frame(1024, 16),
    "wan_1_3b": _wan(1536, 8960, 12, 30),
    "wan_14b": _wan(5120, 13824, 40, 40),
}


def preset(name: str) -> Preset:
    """Looks a preset up.

    Args:
        name: One of `PRESETS`.

    Returns:
        The preset.

    Raises:
        ConfigError: There is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is unknown: use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def model_fields(name: str) -> dict[str, Any]:
    """Fields of a preset's network, for a config to override."""
    model = preset(name).model
    return {field: getattr(model, field) for field in model.__dataclass_fields__}
