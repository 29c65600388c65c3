"""Counted work of a transformer over video tokens: FLOPs, bytes moved, and the time that a device needs at the least.

Everything is counted from plain numbers, before anything is built or measured; a multiplication and an addition are two
FLOPs. Work on one vector a frame (time embedding, modulation) and elementwise work count as bytes alone. Of the network
this module knows the configuration; it must know neither its arrays nor how they are computed.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from vidar.devices import Peak
from vidar.errors import ConfigError
from vidar.models.dit import DiTConfig
from vidar.models.text import ByteEncoderConfig

PATTERNS = ("bidirectional", "chunk_causal", "teacher_forcing")


@dataclass(frozen=True)
class Shape:
    """The numbers of a DiT that its work depends on.

    Attributes:
        width: Model width.
        mlp: Hidden width of the MLP.
        layers: Number of blocks.
        heads: Attention heads; they divide `width`, and the FLOPs do not depend on them.
        tokens_per_frame: Tokens of one latent frame.
        channels_in: Latent channels that enter (with concatenated conditions).
        channels_out: Latent channels that are predicted.
        patch: Latent frames, rows and columns that make one token.
        text_tokens: Text tokens that each block attends to; 0 for no cross-attention.
        text_width: Width of the text encoder's states.
        layer_modulation: Whether each block projects the time embedding itself (adaLN-zero); Wan's blocks share one.
        time_channels: Channels of the sinusoidal time embedding.
        text_encoder: The text encoder where it is part of the network and trained with it, or None.
    """

    width: int
    mlp: int
    layers: int
    heads: int
    tokens_per_frame: int
    channels_in: int
    channels_out: int
    patch: tuple[int, int, int] = (1, 2, 2)
    text_tokens: int = 0
    text_width: int = 0
    layer_modulation: bool = False
    time_channels: int = 256
    text_encoder: ByteEncoderConfig | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"heads={self.heads} do not divide width={self.width}")

    @property
    def parameters(self) -> int:
        """Number of parameters without biases, norm scales and the embeddings of actions, classes and bytes."""
        d, patch = self.width, math.prod(self.patch)
        text = self.text_tokens > 0
        block = 4 * d * d + 2 * d * self.mlp + (4 * d * d if text else 0) + 6 * d
        modulations = 6 * self.layers + 2 if self.layer_modulation else 6
        time = self.time_channels * d + d * d + modulations * d * d
        ends = (self.channels_in + self.channels_out) * patch * d
        encoder = 0 if self.text_encoder is None else _encoder_parameters(self.text_encoder, self.text_width)
        return self.layers * block + time + ends + (self.text_width * d + d * d if text else 0) + encoder


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by where they are spent.

    Attributes:
        linear: Matrix products of the blocks.
        attention: Scores and weighted sums of self-attention.
        cross_attention: The same of cross-attention; text keys and values are cached, so they are not in `linear`.
        ends: Patch embedding and head.
        text: Encoding text to keys and values, where the network does it itself and while training.
    """

    linear: float
    attention: float
    cross_attention: float
    ends: float
    text: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.cross_attention + self.ends + self.text

    def times(self, factor: float) -> "Flops":
        """The work of `factor` repetitions."""
        return Flops(*(factor * part for part in astuple(self)))


def shape_of(config: DiTConfig, height: int, width: int) -> Shape:
    """Describes a DiT at one resolution.

    Args:
        config: The network.
        height: Latent height.
        width: Latent width.

    Returns:
        Its numbers.

    Raises:
        ConfigError: The patch does not divide the latents.
    """
    return Shape(
        width=config.width,
        mlp=config.mlp,
        layers=config.layers,
        heads=config.heads,
        tokens_per_frame=config.tokens(height, width),
        channels_in=config.channels,
        channels_out=config.channels,
        patch=(1, config.patch, config.patch),
        text_tokens=config.text.length if config.text else 0,
        text_width=config.text.width if config.text else 0,
        text_encoder=config.text.encoder if config.text else None,
        layer_modulation=config.modulation == "adaln_zero",
        time_channels=config.time_channels,
    )


def forward_flops(shape: Shape, query_tokens: int, key_tokens: float) -> Flops:
    """Counts one forward.

    Args:
        shape: The network.
        query_tokens: Tokens that enter.
        key_tokens: Keys that each of them sees, itself among them; the mean where that differs.

    Returns:
        FLOPs of one forward for one clip.
    """
    d, layers = shape.width, shape.layers
    block = 4 * d * d + 2 * d * shape.mlp + (2 * d * d if shape.text_tokens else 0)
    return Flops(
        linear=2 * query_tokens * layers * block,
        attention=4 * query_tokens * key_tokens * d * layers,
        cross_attention=4 * query_tokens * shape.text_tokens * d * layers,
        ends=2 * query_tokens * (shape.channels_in + shape.channels_out) * math.prod(shape.patch) * d,
    )


def text_flops(shape: Shape) -> float:
    """Counts the encoding of one text to the keys and values of all blocks by the network's own encoder.

    Args:
        shape: The network.

    Returns:
        FLOPs; 0 where text is encoded elsewhere, once and for all.
    """
    config, d, width, tokens = shape.text_encoder, shape.width, shape.text_width, shape.text_tokens
    if config is None:
        return 0.0
    linear = _encoder_parameters(config, width) + width * d + d * d + 2 * d * d * shape.layers
    return 2 * tokens * linear + 4 * tokens * tokens * width * config.layers


def _encoder_parameters(config: ByteEncoderConfig, width: int) -> int:
    """Parameters of the encoder's matrix products."""
    return config.layers * (4 * width * width + 2 * width * config.mlp)


def chunk_flops(shape: Shape, chunk_frames: int, window: int, passes: int) -> Flops:
    """Counts the generation of one chunk through the cache.

    Args:
        shape: The network.
        chunk_frames: Latent frames of the chunk.
        window: Latent frames that it sees, itself among them.
        passes: Forwards of the chunk: solver steps and commit.

    Returns:
        FLOPs of the chunk for one session.
    """
    tokens = shape.tokens_per_frame
    return forward_flops(shape, chunk_frames * tokens, window * tokens).times(passes)


def forward_bytes(
    shape: Shape,
    query_tokens: int,
    key_tokens: int,
    weight_bytes: int = 2,
    cache_bytes: int = 2,
    activation_passes: int = 26,
) -> float:
    """Counts the memory traffic of one forward.

    Args:
        shape: The network.
        query_tokens: Tokens that enter.
        key_tokens: Keys and values that are read from the cache, the chunk's own among them.
        weight_bytes: Bytes of a parameter.
        cache_bytes: Bytes of a number in the cache.
        activation_passes: Reads and writes per layer of a bf16 array `[query_tokens, width]`; 26 is a reasonably fused
            implementation.

    Returns:
        Bytes: parameters once, keys and values once, activations.
    """
    keys_and_values = 2 * key_tokens * shape.width * cache_bytes * shape.layers
    activations = query_tokens * shape.width * 2 * shape.layers * activation_passes
    return shape.parameters * weight_bytes + keys_and_values + activations


def chunk_bytes(shape: Shape, chunk_frames: int, window: int, passes: int) -> float:
    """Counts the memory traffic of generating one chunk in bf16; arguments as for `chunk_flops`."""
    tokens = shape.tokens_per_frame
    return passes * forward_bytes(shape, chunk_frames * tokens, window * tokens)


def roofline_seconds(flops: float, moved: float, peak: Peak) -> float:
    """The time below which no implementation can get.

    Args:
        flops: FLOPs of the work.
        moved: Bytes that it moves.
        peak: The device's peaks; see `vidar.devices.peak`.

    Returns:
        Seconds: the longer of computing at full throughput and moving at full bandwidth.
    """
    return max(flops / peak.flops, moved / peak.bandwidth)


def visible_pairs(
    pattern: str,
    chunks: Sequence[int],
    window: int | None = None,
) -> tuple[int, int]:
    """Counts who sees whom in a training forward, in frames.

    Args:
        pattern: `"bidirectional"`: all see all. `"chunk_causal"`: a chunk sees itself and the past.
            `"teacher_forcing"`: a clean copy is chunk-causal, and each noisy chunk sees itself and the clean past.
        chunks: Frames of each chunk.
        window: Frames that a chunk sees at most, counting sink, past and itself; None for all.

    Returns:
        The number of frames that enter, and the number of (query, key) pairs of frames that see each other.

    Raises:
        ConfigError: Unknown pattern.
    """
    if pattern not in PATTERNS:
        raise ConfigError(f"pattern={pattern!r}: visible pairs are counted for {', '.join(PATTERNS)}")
    frames = sum(chunks)
    if pattern == "bidirectional":
        return frames, frames * frames
    causal, end = 0, 0
    for size in chunks:
        end += size
        causal += size * min(end, window or end)
    # A noisy chunk sees as many frames as its clean twin: its own in place of the twin's.
    return (2 * frames, 2 * causal) if pattern == "teacher_forcing" else (frames, causal)


def training_flops(
    shape: Shape,
    pattern: str,
    chunks: Sequence[int],
    window: int | None = None,
) -> Flops:
    """Counts a training step on one clip as three forwards; recomputation under remat is not useful work.

    Args:
        shape: The network.
        pattern: Who sees whom; see `visible_pairs`.
        chunks: Frames of each chunk.
        window: Frames that a chunk sees at most; None for all.

    Returns:
        FLOPs of forward and backward over the visible pairs alone.
    """
    frames, pairs = visible_pairs(pattern, chunks, window)
    tokens = shape.tokens_per_frame
    forward = forward_flops(shape, frames * tokens, pairs * tokens / frames)
    return replace(forward, text=text_flops(shape)).times(3)
