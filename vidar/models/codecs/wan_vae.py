"""Wan 2.1's video VAE: causal in time, so that clips of any length stream through it a chunk at a time.

Frames are `[b, f, h, w, c]`. Every layer with a view of the past keeps what it needs of it in a state; whole clips are
streams from an empty one. The very first frame is latent 0 alone and passes the layers that change the frame rate
untouched; where frames come in fours, three that do not *exist* stand before it. They are zeros wherever a layer looks
at the past, and nobody looks at what becomes of them. So sessions at different ticks share one executable.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidar.errors import ConfigError, check_range
from vidar.models.codecs.geometry import Geometry
from vidar.models.layers import Precision
from vidar.sharding import constrain_divisible

# Statistics of the latents (Wan 2.1).
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
DEVIATION = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
DEVIATION += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

State = dict[str, jax.Array]


@dataclass(frozen=True)
class WanVAEConfig(Geometry):
    """Shape of the VAE.

    Attributes:
        width: Channels of the widest frames.
        multipliers: Channels of each resolution, times `width`.
        blocks: Residual blocks of each resolution in the encoder; the decoder has one more.
        temporal: Which of the changes of resolution halve the frame rate, too, from full resolution down.
        mean: Mean of the latents by channel.
        deviation: Standard deviation of the latents by channel.
        precision: Types.
    """

    kind: ClassVar[str] = "wan_vae"
    width: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = MEAN
    deviation: tuple[float, ...] = DEVIATION
    precision: Precision = Precision(params="float32", compute="float32")

    def __post_init__(self) -> None:
        for name in ("width", "blocks"):
            check_range(f"codec.{name}", getattr(self, name), least=1)
        if len(self.temporal) != len(self.multipliers) - 1:
            raise ConfigError(
                f"codec.temporal={self.temporal} should say for each of {len(self.multipliers) - 1} changes of "
                "resolution whether it changes the frame rate"
            )
        if len(self.mean) != len(self.deviation):
            raise ConfigError("codec.mean and codec.deviation have different lengths")
        for mean, deviation in zip(self.mean, self.deviation, strict=True):
            check_range("codec.mean", mean)
            check_range("codec.deviation", deviation, above=0)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return len(self.mean)

    @property
    def patch(self) -> int:
        """Pixels of a latent's side."""
        return 2 ** len(self.temporal)

    @property
    def frames_per_latent(self) -> int:
        """Pixel frames of a latent frame but the first, which is one."""
        return 2 ** sum(self.temporal)


# ------------------------------------------------------------------------------------------------------------ layers


class Conv(nnx.Module):
    """Convolution over height and width, and causally over time; `kernel` is `[t, h, w, i, o]`."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int, int], *, rngs: nnx.Rngs, dtype: str):
        shape = (*size, inputs, outputs)
        deviation = float(np.prod(shape[:-1])) ** -0.5
        self.kernel = nnx.Param((deviation * jax.random.normal(rngs.params(), shape)).astype(dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype))

    @property
    def past(self) -> int:
        """Frames of the past that it looks at."""
        return self.kernel.shape[0] - 1

    def __call__(self, x_bfhwc: jax.Array, stride: int = 1, time_stride: int = 1, padding: Any = "SAME") -> jax.Array:
        """Convolves; of the frames, all but the last are past only as far as the kernel reaches.

        Args:
            x_bfhwc: Frames, those of the past before them.
            stride: Steps over height and width.
            time_stride: Steps over time.
            padding: Of height and width.

        Returns:
            `[b, (f - past) / time_stride, h / stride, w / stride, o]` in the type of `x_bfhwc`.
        """
        kernel, bias = self.kernel[...].astype(x_bfhwc.dtype), self.bias[...].astype(x_bfhwc.dtype)
        rows, frames = x_bfhwc.shape[:2]
        count = (frames - self.past - 1) // time_stride + 1

        # A few two-dimensional convolutions: on CPUs nearly twice as fast as a three-dimensional one.
        def tap(number: int) -> jax.Array:
            part = x_bfhwc[:, number : number + (count - 1) * time_stride + 1 : time_stride]
            flat = part.reshape(-1, *part.shape[2:])
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                flat, kernel[number], (stride, stride), padding, dimension_numbers=numbers
            )

        total = tap(0)
        for number in range(1, kernel.shape[0]):
            total = total + tap(number)
        total = total + jnp.broadcast_to(bias, total.shape)
        return total.reshape(rows, count, *total.shape[1:])


class ChannelNorm(nnx.Module):
    """Scales every position's channels to a length of √c, times a weight; in fp32."""

    def __init__(self, channels: int, *, dtype: str):
        self.weight = nnx.Param(jnp.ones((channels,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x`, keeping its type."""
        wide = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(wide * wide, axis=-1, keepdims=True))
        weight = jnp.broadcast_to(self.weight[...].astype(jnp.float32) * x.shape[-1] ** 0.5, x.shape)
        return (wide / jnp.maximum(length, 1e-12) * weight).astype(x.dtype)


class Stream:
    """What the layers of one pass see of the past: reads the old state, collects the new one.

    Attributes:
        state: Past frames by layer, in the order of the pass; None for none yet.
        exists: Frames of the current rate that exist, bool `[b, f]`.
        first: Rows that begin with this chunk, bool `[b]`.
    """

    def __init__(self, state: State | None, exists: jax.Array, first: jax.Array):
        self._old = state
        self.exists = exists
        self.first = first
        self.state: State = {}

    def with_past(self, x_bfhwc: jax.Array, past: int) -> jax.Array:
        """Frames with those before them, zeros where there are none."""
        zero = jnp.zeros((), x_bfhwc.dtype)
        x_bfhwc = jnp.where(self.exists[:, :, None, None, None], x_bfhwc, zero)
        name = str(len(self.state))
        if self._old is None:
            before = jnp.zeros((x_bfhwc.shape[0], past, *x_bfhwc.shape[2:]), x_bfhwc.dtype)
        else:
            before = jnp.where(self.first[:, None, None, None, None], zero, self._old[name])
        whole = jnp.concatenate([before, x_bfhwc], axis=1)
        self.state[name] = whole[:, whole.shape[1] - past :]
        return whole


class Residual(nnx.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: str):
        self.norm = ChannelNorm(inputs, dtype=dtype)
        self.inner = Conv(inputs, outputs, (3, 3, 3), rngs=rngs, dtype=dtype)
        self.inner_norm = ChannelNorm(outputs, dtype=dtype)
        self.outer = Conv(outputs, outputs, (3, 3, 3), rngs=rngs, dtype=dtype)
        self.shortcut = Conv(inputs, outputs, (1, 1, 1), rngs=rngs, dtype=dtype) if inputs != outputs else None

    def __call__(self, x_bfhwc: jax.Array, stream: Stream) -> jax.Array:
        """Adds the block's update."""
        hidden = self.inner(stream.with_past(jax.nn.silu(self.norm(x_bfhwc)), 2))
        hidden = self.outer(stream.with_past(jax.nn.silu(self.inner_norm(hidden)), 2))
        return hidden + (x_bfhwc if self.shortcut is None else self.shortcut(x_bfhwc))


class Attention(nnx.Module):
    """Single-head attention within each frame."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: str):
        self.norm = ChannelNorm(channels, dtype=dtype)
        self.inner = Conv(channels, 3 * channels, (1, 1, 1), rngs=rngs, dtype=dtype)
        self.outer = Conv(channels, channels, (1, 1, 1), rngs=rngs, dtype=dtype)

    def __call__(self, x_bfhwc: jax.Array, stream: Stream) -> jax.Array:
        """Adds the attention's output."""
        del stream
        b, f, h, w, c = x_bfhwc.shape
        mixed = self.inner(self.norm(x_bfhwc)).reshape(b * f, h * w, 1, 3, c)
        query, key, value = (mixed[..., part, :] for part in range(3))
        with jax.numpy_dtype_promotion("standard"):
            output = jax.nn.dot_product_attention(query, key, value)
        return x_bfhwc + self.outer(output.reshape(b, f, h, w, c))


class Down(nnx.Module):
    """Halves height and width, and the frame rate if `temporal`."""

    def __init__(self, channels: int, temporal: bool, *, rngs: nnx.Rngs, dtype: str):
        self.space = Conv(channels, channels, (1, 3, 3), rngs=rngs, dtype=dtype)
        self.time = Conv(channels, channels, (3, 1, 1), rngs=rngs, dtype=dtype) if temporal else None

    def __call__(self, x_bfhwc: jax.Array, stream: Stream) -> jax.Array:
        """Halves; the first frame of all keeps its place in time."""
        x_bfhwc = self.space(x_bfhwc, stride=2, padding=((0, 1), (0, 1)))
        if self.time is None:
            return x_bfhwc
        whole = stream.with_past(x_bfhwc, 1)
        halved = self.time(whole, time_stride=2)
        stream.exists = stream.exists[:, 1::2]
        return jnp.where(_begins(stream), x_bfhwc[:, 1::2], halved)


class Up(nnx.Module):
    """Doubles height and width and halves the channels; doubles the frame rate first if `temporal`."""

    def __init__(self, channels: int, temporal: bool, *, rngs: nnx.Rngs, dtype: str):
        self.time = Conv(channels, 2 * channels, (3, 1, 1), rngs=rngs, dtype=dtype) if temporal else None
        self.space = Conv(channels, channels // 2, (1, 3, 3), rngs=rngs, dtype=dtype)

    def __call__(self, x_bfhwc: jax.Array, stream: Stream) -> jax.Array:
        """Doubles; the first frame of all stays one."""
        if self.time is not None:
            b, f, h, w, c = x_bfhwc.shape
            begins = _begins(stream)
            # The first frame never enters the convolution over time.
            whole = stream.with_past(jnp.where(begins, jnp.zeros((), x_bfhwc.dtype), x_bfhwc), 2)
            doubled = self.time(whole).reshape(b, f, h, w, 2, c)
            doubled = jnp.where(begins[..., None], x_bfhwc[..., None, :], doubled)
            x_bfhwc = jnp.moveaxis(doubled, 4, 2).reshape(b, 2 * f, h, w, c)
            # Of the two frames that the first one became, the second is kept.
            pairs = jnp.stack([stream.exists & ~begins[:, :, 0, 0, 0], stream.exists], axis=2)
            stream.exists = pairs.reshape(b, 2 * f)
        x_bfhwc = jnp.repeat(jnp.repeat(x_bfhwc, 2, axis=2), 2, axis=3)
        return self.space(x_bfhwc)


def _begins(stream: Stream) -> jax.Array:
    """Which frame is the first of all, bool `[b, f, 1, 1, 1]`."""
    before = jnp.pad(stream.exists[:, :-1], ((0, 0), (1, 0)))
    return (stream.exists & ~before & stream.first[:, None])[:, :, None, None, None]


# ------------------------------------------------------------------------------------------------------------- codec


class Encoder(nnx.Module):
    """Pixels to the mean and log-variance of latents."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        dtype = config.precision.params
        widths = [config.width * factor for factor in config.multipliers]
        make = _Maker(rngs, dtype)
        self.enter = make.conv(3, widths[0])
        layers: list[Any] = []
        inputs = widths[0]
        for level, outputs in enumerate(widths):
            for _ in range(config.blocks):
                layers.append(make.residual(inputs, outputs))
                inputs = outputs
            if level < len(config.temporal):
                layers.append(Down(inputs, config.temporal[level], rngs=rngs, dtype=dtype))
        self.layers = nnx.List(layers)
        self.middle = make.middle(inputs)
        self.norm = ChannelNorm(inputs, dtype=dtype)
        self.leave = make.conv(inputs, 2 * config.channels)

    def __call__(self, x_bfhwc: jax.Array, stream: Stream) -> jax.Array:
        """Encodes a chunk."""
        return _through(self, [*self.layers, *self.middle], x_bfhwc, stream)


class Decoder(nnx.Module):
    """Latents to pixels."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        dtype = config.precision.params
        widths = [config.width * factor for factor in reversed(config.multipliers)]
        make = _Maker(rngs, dtype)
        self.enter = make.conv(config.channels, widths[0])
        self.middle = make.middle(widths[0])
        layers: list[Any] = []
        inputs = widths[0]
        for level, outputs in enumerate(widths):
            for _ in range(config.blocks + 1):
                layers.append(make.residual(inputs, outputs))
                inputs = outputs
            if level < len(config.temporal):
                layers.append(Up(inputs, config.temporal[-1 - level], rngs=rngs, dtype=dtype))
                inputs //= 2
        self.layers = nnx.List(layers)
        self.norm = ChannelNorm(inputs, dtype=dtype)
        self.leave = make.conv(inputs, 3)

    def __call__(self, x_bfhwc: jax.Array, stream: Stream) -> jax.Array:
        """Decodes a chunk."""
        return _through(self, [*self.middle, *self.layers], x_bfhwc, stream)


@dataclass(frozen=True)
class _Maker:
    rngs: nnx.Rngs
    dtype: str

    def conv(self, inputs: int, outputs: int) -> Conv:
        return Conv(inputs, outputs, (3, 3, 3), rngs=self.rngs, dtype=self.dtype)

    def residual(self, inputs: int, outputs: int) -> Residual:
        return Residual(inputs, outputs, rngs=self.rngs, dtype=self.dtype)

    def middle(self, channels: int) -> nnx.List:
        attention = Attention(channels, rngs=self.rngs, dtype=self.dtype)
        return nnx.List([self.residual(channels, channels), attention, self.residual(channels, channels)])


def _through(network: Any, layers: Sequence[Any], x_bfhwc: jax.Array, stream: Stream) -> jax.Array:
    x_bfhwc = network.enter(stream.with_past(_spread(x_bfhwc), 2))
    for layer in layers:
        x_bfhwc = _spread(layer(x_bfhwc, stream))
    return network.leave(stream.with_past(jax.nn.silu(network.norm(x_bfhwc)), 2))


def _spread(x_bfhwc: jax.Array) -> jax.Array:
    """Splits frames by their rows over the mesh; what convolutions need of neighbours is exchanged."""
    return constrain_divisible(x_bfhwc, "batch", None, "rows", None, None)


class WanVAE(nnx.Module):
    """Wan 2.1's VAE; large frames are split over the devices of a mesh's `sequence` axis."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        """Creates the parameters.

        Args:
            config: Shape.
            rngs: Source of the initial values.
        """
        dtype, channels = config.precision.params, config.channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.to_latent = Conv(2 * channels, 2 * channels, (1, 1, 1), rngs=rngs, dtype=dtype)
        self.from_latent = Conv(channels, channels, (1, 1, 1), rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, pixels_bfhwc: jax.Array) -> jax.Array:
        """Encodes whole clips, a latent frame at a time.

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
        self.config.latent_frames(frames_bfhwc.shape[1])
        self.config.latent_size(*frames_bfhwc.shape[2:4])
        padded = jnp.pad(frames_bfhwc, ((0, 0), (step - 1, 0), (0, 0), (0, 0), (0, 0)))
        rows, compute = padded.shape[0], self.config.precision.compute

        def chunk(state: State | None, part: jax.Array, first: bool) -> tuple[State, jax.Array]:
            exists = jnp.broadcast_to(jnp.arange(step)[None] >= (step - 1 if first else 0), (rows, step))
            stream = Stream(state, exists, jnp.full((rows,), first))
            latents = self.to_latent(self.encoder(part.astype(compute), stream))
            return stream.state, latents.astype(jnp.float32)

        moments = _streamed(chunk, padded, step)
        mean, deviation = self._statistics(moments.shape[:-1])
        return (moments[..., : self.config.channels] - mean) / deviation

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
        rows = latents_bfhwc.shape[0]

        def chunk(state: State | None, part: jax.Array, first: bool) -> tuple[State, jax.Array]:
            return self._decode(state, part, jnp.full((rows,), first))

        return _streamed(chunk, latents_bfhwc, 1)[:, self.config.frames_per_latent - 1 :]

    def init_state(self, rows: int, height: int, width: int) -> Any:
        """Streaming state of `rows` sessions whose latents are `height` × `width`."""
        latents = jnp.zeros((rows, 1, height, width, self.config.channels), jnp.float32)
        started = jnp.zeros((rows,), bool)
        past, _ = jax.eval_shape(lambda: self._decode(None, latents, ~started))
        return {"past": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), past), "started": started}

    def decode_chunk(self, state: Any, latents_bfhwc: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """Decodes one chunk of a stream.

        Args:
            state: From `init_state` or the previous chunk.
            latents_bfhwc: Latents of the chunk, `[b, n, h, w, c]`.

        Returns:
            Next state; uint8 frames `[b, 4 n, 8 h, 8 w, 3]`; and how many of them are valid, int32 `[b]`: all, or all
            but the first three where the session begins. The valid ones are the last.
        """
        first = ~state["started"]
        past, frames = self._decode(state["past"], latents_bfhwc, first)
        count = frames.shape[1]
        valid = jnp.where(first, count - self.config.frames_per_latent + 1, count).astype(jnp.int32)
        return {"past": past, "started": jnp.ones_like(first)}, to_uint8(frames), valid

    def _decode(self, state: State | None, latents: jax.Array, first: jax.Array) -> tuple[State, jax.Array]:
        mean, deviation = self._statistics(latents.shape[:-1])
        x = (latents.astype(jnp.float32) * deviation + mean).astype(self.config.precision.compute)
        stream = Stream(state, jnp.ones(latents.shape[:2], bool), first)
        frames = self.decoder(self.from_latent(x), stream)
        return stream.state, jnp.clip(frames.astype(jnp.float32), -1.0, 1.0)

    def _statistics(self, shape: tuple[int, ...]) -> Iterator[jax.Array]:
        values = (jnp.asarray(values, jnp.float32) for values in (self.config.mean, self.config.deviation))
        return (jnp.broadcast_to(value, (*shape, len(value))) for value in values)


def to_uint8(frames: jax.Array) -> jax.Array:
    """Rounds frames in [-1, 1] to uint8."""
    return jnp.clip(jnp.round((frames + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)


def _streamed(
    chunk: Callable[[State | None, jax.Array, bool], tuple[State, jax.Array]], x_bfhwc: jax.Array, step: int
) -> jax.Array:
    """Runs a chunk function over a clip, `step` frames at a time."""
    state, start = chunk(None, x_bfhwc[:, :step], True)
    count = x_bfhwc.shape[1] // step - 1
    if not count:
        return start
    rest = jnp.moveaxis(x_bfhwc[:, step:].reshape(x_bfhwc.shape[0], count, step, *x_bfhwc.shape[2:]), 1, 0)
    _, parts = jax.lax.scan(lambda state, part: chunk(state, part, False), state, rest)
    parts = jnp.moveaxis(parts, 0, 1)
    return jnp.concatenate([start, parts.reshape(parts.shape[0], -1, *parts.shape[3:])], axis=1)
