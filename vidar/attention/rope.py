"""Three-axis rotary position embedding (frame, row, column).

Phases of the frame axis come from tables over the base-256 digits of the frame index, combined by angle addition, so
that they are exact to fp32 rounding for frames up to 2**24. Channel i rotates with channel i + d/2 of its head. This
room must not know attention patterns or caches.
"""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vidar.errors import ConfigError, check_range

_DIGIT = 256
_DIGITS = 3


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one backbone.

    Attributes:
        theta: Base of the geometric frequencies.
        split: Channels of a head for (frame, row, column), all even and summing to the head's width; empty for Wan's
            rule, d - 4(d // 6), 2(d // 6), 2(d // 6).
    """

    theta: float = 10_000.0
    split: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_range("rope.theta", self.theta, above=0)

    def axes(self, head_dim: int) -> tuple[int, int, int]:
        """Channels per axis for heads of `head_dim` channels."""
        if self.split:
            if len(self.split) != 3 or sum(self.split) != head_dim or any(part % 2 or part < 0 for part in self.split):
                raise ConfigError(f"rope.split={self.split} must be three even numbers ≥ 0 that sum to {head_dim}")
            return self.split[0], self.split[1], self.split[2]
        part = 2 * (head_dim // 6)
        if head_dim % 2 or not part:
            raise ConfigError(f"head width {head_dim} cannot be split over three rotary axes: use an even number ≥ 6")
        return head_dim - 2 * part, part, part


@dataclass(frozen=True)
class Phases:
    """Cosine and sine of every token's rotation, `[b or 1, t, d/2]` fp32."""

    cosine: jax.Array
    sine: jax.Array


def _frequencies(theta: float, channels: int) -> np.ndarray:
    return theta ** (-np.arange(0, channels, 2, dtype=np.float64) / channels)


@lru_cache(maxsize=32)
def _digit_tables(theta: float, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of digit · 256**place · frequency, `[places, 256, channels / 2]`."""
    places = _DIGIT ** np.arange(_DIGITS, dtype=np.float64)
    angle = places[:, None, None] * np.arange(_DIGIT)[None, :, None] * _frequencies(theta, channels)[None, None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def frame_phases(
    frame: Int[Array, "*shape"], theta: float, channels: int
) -> tuple[Float[Array, "*shape pairs"], Float[Array, "*shape pairs"]]:
    """Cosine and sine of the frame axis.

    Args:
        frame: Absolute frame indices in [0, 2**24).
        theta: Base of the frequencies.
        channels: Channels of a head on the frame axis.

    Returns:
        Cosine and sine with a trailing axis of channels / 2.
    """
    cosines, sines = _digit_tables(theta, channels)
    cosine = jnp.ones((*frame.shape, channels // 2), jnp.float32)
    sine = jnp.zeros((*frame.shape, channels // 2), jnp.float32)
    for place in range(_DIGITS):
        digit = (frame >> (8 * place)) & (_DIGIT - 1)
        digit_cosine, digit_sine = jnp.asarray(cosines[place])[digit], jnp.asarray(sines[place])[digit]
        cosine, sine = cosine * digit_cosine - sine * digit_sine, sine * digit_cosine + cosine * digit_sine
    return cosine, sine


def phases(frame_bf: Int[Array, "b f"], height: int, width: int, head_dim: int, config: RopeConfig) -> Phases:
    """Phases of all tokens of frames `frame_bf`, tokens in (frame, row, column) order.

    Args:
        frame_bf: Absolute frame index of each frame, `[b, f]` (b may be 1).
        height: Rows of tokens a frame.
        width: Columns of tokens a frame.
        head_dim: Channels of a head.
        config: Split and theta.

    Returns:
        Phases of shape `[b, f · height · width, head_dim / 2]`.
    """
    split = config.axes(head_dim)
    b, f = frame_bf.shape
    time = frame_phases(frame_bf, config.theta, split[0])
    parts = []
    for index, function in enumerate((np.cos, np.sin)):
        row, column = (
            function(np.arange(size)[:, None] * _frequencies(config.theta, channels)[None, :]).astype(np.float32)
            for size, channels in ((height, split[1]), (width, split[2]))
        )
        shape = (b, f, height, width)
        part = jnp.concatenate(
            [
                jnp.broadcast_to(time[index][:, :, None, None, :], (*shape, split[0] // 2)),
                jnp.broadcast_to(jnp.asarray(row)[None, None, :, None, :], (*shape, split[1] // 2)),
                jnp.broadcast_to(jnp.asarray(column)[None, None, None, :, :], (*shape, split[2] // 2)),
            ],
            axis=-1,
        )
        parts.append(part.reshape(b, f * height * width, head_dim // 2))
    return Phases(parts[0], parts[1])


def rotate(x_btnd: Float[Array, "b t n d"], turn: Phases) -> Float[Array, "b t n d"]:
    """Rotates queries or keys by their phases, in fp32, and returns them in their own type."""
    first, second = jnp.split(x_btnd.astype(jnp.float32), 2, axis=-1)
    cosine, sine = turn.cosine[:, :, None, :], turn.sine[:, :, None, :]
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_btnd.dtype)


def shift_frames(
    keys_bsnd: Float[Array, "b s n d"], delta_b: Int[Array, " b"], config: RopeConfig
) -> Float[Array, "b s n d"]:
    """Moves rotated keys `delta_b` frames later, as if they had been written there.

    Args:
        keys_bsnd: Keys rotated at their own frames.
        delta_b: Frames to add, ≥ 0, per row.
        config: Split and theta.

    Returns:
        Keys rotated at their frame + delta.
    """
    head_dim = keys_bsnd.shape[-1]
    split = config.axes(head_dim)
    cosine, sine = frame_phases(delta_b, config.theta, split[0])
    rest = (head_dim - split[0]) // 2
    cosine = jnp.pad(cosine, ((0, 0), (0, rest)), constant_values=1.0)
    sine = jnp.pad(sine, ((0, 0), (0, rest)))
    return rotate(keys_bsnd, Phases(cosine[:, None, :], sine[:, None, :]))
