"""TAEHV for Wan 2.1 (`taew2_1`): a tiny autoencoder of the VAE's normalised latents, for streams that cannot wait.

Frames are `[b, f, h, w, c]`. All convolutions are within frames; the only view of the past is that of the memory
blocks, each of which sees the frame before the present one at its own input. A stream keeps that one frame a block,
zeros before the first. Every latent frame becomes four pixel frames; of the first four of a stream, the last alone is
shown. Source: the facts of github.com/madebyollin/taehv.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vidar.errors import ConfigError, check_range
from vidar.models.codecs.geometry import Geometry
from vidar.models.codecs.wan_vae import Conv, to_uint8
from vidar.models.layers import Precision

BLOCKS = 3
"""Memory blocks of each stage."""

Past = tuple[jax.Array, ...]
"""The last frame that each memory block saw, `[b, 1, h, w, c]`, in the order of the pass."""


@dataclass(frozen=True)
class TAEHVConfig(Geometry):
    """Shape of the autoencoder.

    Attributes:
        channels: Latent channels.
        width: Channels of the encoder.
        widths: Channels of the decoder's stages from latents up, and behind the last.
        growth: Frames that each of the decoder's stages makes of one; the encoder's stages merge as many, from pixels
            down.
        precision: Types.
    """

    kind: ClassVar[str] = "taehv"
    channels: int = 16  # pyright: ignore[reportIncompatibleMethodOverride]
    width: int = 64
    widths: tuple[int, ...] = (256, 128, 64, 64)
    growth: tuple[int, ...] = (1, 2, 2)
    precision: Precision = Precision(params="float32", compute="float32")

    def __post_init__(self) -> None:
        for name in ("channels", "width"):
            check_range(f"codec.{name}", getattr(self, name), least=1)
        for name in ("widths", "growth"):
            for value in getattr(self, name):
                check_range(f"codec.{name}", value, least=1)
        if len(self.widths) != len(self.growth) + 1:
            raise ConfigError(
                f"codec.widths={self.widths} should have one number more than codec.growth={self.growth}: a number "
                "for each stage and one behind the last"
            )

    @property
    def patch(self) -> int:
        """Pixels of a latent's side."""
        return 2 ** len(self.growth)

    @property
    def frames_per_latent(self) -> int:
        """Pixel frames of a latent frame but the first, which is one."""
        return math.prod(self.growth)


# ------------------------------------------------------------------------------------------------------------ layers


class PlainConv(nnx.Module):
    """Convolution over height and width without bias; `kernel` is `[h, w, i, o]`."""

    def __init__(self, inputs: int, outputs: int, side: int, *, rngs: nnx.Rngs, dtype: str):
        shape = (side, side, inputs, outputs)
        deviation = (side * side * inputs) ** -0.5
        self.kernel = nnx.Param((deviation * jax.random.normal(rngs.params(), shape)).astype(dtype))

    def __call__(self, x_bfhwc: jax.Array, stride: int = 1) -> jax.Array:
        """Convolves each frame, with zeros around it on all sides."""
        kernel = self.kernel[...].astype(x_bfhwc.dtype)
        around = kernel.shape[0] // 2
        flat = rearrange(x_bfhwc, "b f h w c -> (b f) h w c")
        output = jax.lax.conv_general_dilated(
            flat, kernel, (stride, stride), [(around, around)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return rearrange(output, "(b f) h w c -> b f h w c", b=x_bfhwc.shape[0])


class Memory:
    """What the memory blocks of one pass saw last: gives out the old frames, collects the new ones.

    Attributes:
        past: New last frames by block, in the order of the pass.
    """

    def __init__(self, past: Past):
        self._old = past
        self.past: Past = ()

    def before(self, x_bfhwc: jax.Array) -> jax.Array:
        """The frame before each of the given ones."""
        old = self._old[len(self.past)]
        self.past += (x_bfhwc[:, -1:],)
        return jnp.concatenate([old, x_bfhwc[:, :-1]], axis=1)


class MemoryBlock(nnx.Module):
    """Three convolutions over a frame and the one before it, beside a shortcut."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: str):
        self.inner = Conv(2 * channels, channels, (1, 3, 3), rngs=rngs, dtype=dtype)
        self.middle = Conv(channels, channels, (1, 3, 3), rngs=rngs, dtype=dtype)
        self.outer = Conv(channels, channels, (1, 3, 3), rngs=rngs, dtype=dtype)

    def __call__(self, x_bfhwc: jax.Array, memory: Memory) -> jax.Array:
        """Adds the block's update."""
        pair = jnp.concatenate([x_bfhwc, memory.before(x_bfhwc)], axis=-1)
        hidden = jax.nn.relu(self.middle(jax.nn.relu(self.inner(pair))))
        return jax.nn.relu(x_bfhwc + self.outer(hidden))


class Down(nnx.Module):
    """Merges neighbouring frames, halves height and width, and passes memory blocks."""

    def __init__(self, channels: int, frames: int, *, rngs: nnx.Rngs, dtype: str):
        self.time = PlainConv(frames * channels, channels, 1, rngs=rngs, dtype=dtype)
        self.space = PlainConv(channels, channels, 3, rngs=rngs, dtype=dtype)
        self.blocks = nnx.List([MemoryBlock(channels, rngs=rngs, dtype=dtype) for _ in range(BLOCKS)])

    def __call__(self, x_bfhwc: jax.Array, memory: Memory) -> jax.Array:
        """Encodes by a stage."""
        frames = self.time.kernel.shape[2] // x_bfhwc.shape[-1]
        x_bfhwc = self.time(rearrange(x_bfhwc, "b (f k) h w c -> b f h w (k c)", k=frames))
        x_bfhwc = self.space(x_bfhwc, stride=2)
        for block in self.blocks:
            x_bfhwc = block(x_bfhwc, memory)
        return x_bfhwc


class Up(nnx.Module):
    """Passes memory blocks, makes several frames of each, and doubles height and width."""

    def __init__(self, inputs: int, outputs: int, frames: int, *, rngs: nnx.Rngs, dtype: str):
        self.blocks = nnx.List([MemoryBlock(inputs, rngs=rngs, dtype=dtype) for _ in range(BLOCKS)])
        self.time = PlainConv(inputs, frames * inputs, 1, rngs=rngs, dtype=dtype)
        self.space = PlainConv(inputs, outputs, 3, rngs=rngs, dtype=dtype)

    def __call__(self, x_bfhwc: jax.Array, memory: Memory) -> jax.Array:
        """Decodes by a stage."""
        for block in self.blocks:
            x_bfhwc = block(x_bfhwc, memory)
        # The original repeats pixels first; as this convolution mixes none of them, a quarter of the work does.
        frames = self.time.kernel.shape[3] // x_bfhwc.shape[-1]
        x_bfhwc = rearrange(self.time(x_bfhwc), "b f h w (k c) -> b (f k) h w c", k=frames)
        return self.space(jnp.repeat(jnp.repeat(x_bfhwc, 2, axis=2), 2, axis=3))


# ------------------------------------------------------------------------------------------------------------- codec


class Encoder(nnx.Module):
    """Pixels in [0, 1] to latents."""

    def __init__(self, config: TAEHVConfig, *, rngs: nnx.Rngs):
        dtype, width = config.precision.params, config.width
        self.enter = Conv(3, width, (1, 3, 3), rngs=rngs, dtype=dtype)
        self.stages = nnx.List([Down(width, frames, rngs=rngs, dtype=dtype) for frames in reversed(config.growth)])
        self.leave = Conv(width, config.channels, (1, 3, 3), rngs=rngs, dtype=dtype)

    def __call__(self, x_bfhwc: jax.Array, memory: Memory) -> jax.Array:
        """Encodes as many frames as make whole latents."""
        x_bfhwc = jax.nn.relu(self.enter(x_bfhwc))
        for stage in self.stages:
            x_bfhwc = stage(x_bfhwc, memory)
        return self.leave(x_bfhwc)


class Decoder(nnx.Module):
    """Latents to pixels around [0, 1]."""

    def __init__(self, config: TAEHVConfig, *, rngs: nnx.Rngs):
        dtype, widths = config.precision.params, config.widths
        self.enter = Conv(config.channels, widths[0], (1, 3, 3), rngs=rngs, dtype=dtype)
        steps = zip(widths[:-1], widths[1:], config.growth, strict=True)
        self.stages = nnx.List([Up(*step, rngs=rngs, dtype=dtype) for step in steps])
        self.leave = Conv(widths[-1], 3, (1, 3, 3), rngs=rngs, dtype=dtype)

    def __call__(self, x_bfhwc: jax.Array, memory: Memory) -> jax.Array:
        """Decodes a chunk."""
        x_bfhwc = jax.nn.relu(self.enter(x_bfhwc))
        for stage in self.stages:
            x_bfhwc = stage(x_bfhwc, memory)
        return self.leave(jax.nn.relu(x_bfhwc))


class TAEHV(nnx.Module):
    """The tiny autoencoder of Wan 2.1's latents."""

    def __init__(self, config: TAEHVConfig, *, rngs: nnx.Rngs):
        """Creates the parameters.

        Args:
            config: Shape.
            rngs: Source of the initial values.
        """
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, pixels_bfhwc: jax.Array) -> jax.Array:
        """Encodes whole clips, a latent frame at a time.

        The encoder takes its frames in fours from the first one on, so that a latent frame knows the three pixel
        frames that follow those which it decodes to; behind the end of the clip, the last one is repeated.

        Args:
            pixels_bfhwc: uint8 `[b, 1 + 4 n, h, w, 3]`.

        Returns:
            As `encode_floats`.
        """
        return self.encode_floats(pixels_bfhwc.astype(jnp.float32) / 127.5 - 1.0)

    def encode_floats(self, frames_bfhwc: jax.Array) -> jax.Array:
        """As `encode`, of frames in [-1, 1].

        Args:
            frames_bfhwc: fp32 `[b, 1 + 4 n, h, w, 3]`.

        Returns:
            fp32 latents `[b, 1 + n, h / 8, w / 8, c]`, of mean 0 and deviation 1.

        Raises:
            ConfigError: The clip's length or size does not fit.
        """
        step = self.config.frames_per_latent
        rows, count, height, width = frames_bfhwc.shape[:4]
        self.config.latent_frames(count)
        self.config.latent_size(height, width)
        whole = jnp.pad(frames_bfhwc, ((0, 0), (0, step - 1), (0, 0), (0, 0), (0, 0)), mode="edge")

        def chunk(past: Past, part: jax.Array) -> tuple[Past, jax.Array]:
            memory = Memory(past)
            latents = self.encoder((part * 0.5 + 0.5).astype(self.config.precision.compute), memory)
            return memory.past, latents.astype(jnp.float32)

        sizes = [(2**stage, self.config.width) for stage in range(1, len(self.config.growth) + 1)]
        past = self._past(rows, [(height // factor, width // factor, channels) for factor, channels in sizes])
        return _streamed(chunk, past, whole, step)

    def decode(self, latents_bfhwc: jax.Array) -> jax.Array:
        """Decodes whole clips, a latent frame at a time.

        Args:
            latents_bfhwc: `[b, 1 + n, h, w, c]`, of mean 0 and deviation 1.

        Returns:
            uint8 pixels `[b, 1 + 4 n, 8 h, 8 w, 3]`.
        """
        return to_uint8(self.decode_floats(latents_bfhwc))

    def decode_floats(self, latents_bfhwc: jax.Array) -> jax.Array:
        """As `decode`, before rounding: fp32 in [-1, 1]."""
        past = self.init_state(latents_bfhwc.shape[0], *latents_bfhwc.shape[2:4])["past"]
        return _streamed(self._decode, past, latents_bfhwc, 1)[:, self.config.frames_per_latent - 1 :]

    def init_state(self, rows: int, height: int, width: int) -> Any:
        """Streaming state of `rows` sessions whose latents are `height` × `width`."""
        sizes = [(height * 2**stage, width * 2**stage, c) for stage, c in enumerate(self.config.widths[:-1])]
        return {"past": self._past(rows, sizes), "started": jnp.zeros((rows,), bool)}

    def decode_chunk(self, state: Any, latents_bfhwc: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """Decodes one chunk of a stream.

        Args:
            state: From `init_state` or the previous chunk; a session begins anew where its `started` is false.
            latents_bfhwc: Latents of the chunk, `[b, n, h, w, c]`.

        Returns:
            Next state; uint8 frames `[b, 4 n, 8 h, 8 w, 3]`; and how many of them are valid, int32 `[b]`: all, or all
            but the first three where the session begins. The valid ones are the last.
        """
        first = ~state["started"]
        forget = first[:, None, None, None, None]
        past = tuple(jnp.where(forget, jnp.zeros((), frame.dtype), frame) for frame in state["past"])
        past, frames = self._decode(past, latents_bfhwc)
        count = frames.shape[1]
        valid = jnp.where(first, count - self.config.frames_per_latent + 1, count).astype(jnp.int32)
        return {"past": past, "started": jnp.ones_like(first)}, to_uint8(frames), valid

    def _decode(self, past: Past, latents_bfhwc: jax.Array) -> tuple[Past, jax.Array]:
        bounded = 3.0 * jnp.tanh(latents_bfhwc.astype(jnp.float32) / 3.0)
        memory = Memory(past)
        frames = self.decoder(bounded.astype(self.config.precision.compute), memory)
        return memory.past, 2.0 * jnp.clip(frames.astype(jnp.float32), 0.0, 1.0) - 1.0

    def _past(self, rows: int, sizes: list[tuple[int, int, int]]) -> Past:
        """Before the first frame: a zero for every memory block, given height, width and channels of each stage."""
        dtype = self.config.precision.compute
        return tuple(jnp.zeros((rows, 1, *size), dtype) for size in sizes for _ in range(BLOCKS))


def _streamed(
    chunk: Callable[[Past, jax.Array], tuple[Past, jax.Array]], past: Past, x_bfhwc: jax.Array, step: int
) -> jax.Array:
    """Runs a chunk function over a clip, `step` frames at a time."""
    parts = rearrange(x_bfhwc, "b (n f) h w c -> n b f h w c", f=step)
    _, parts = jax.lax.scan(chunk, past, parts)
    return rearrange(parts, "n b f h w c -> b (n f) h w c")
