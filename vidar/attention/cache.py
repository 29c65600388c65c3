"""The context cache: keys and values of past frames, with static shapes.

Two policies: *append* (room for a whole clip) and *sink + ring* (the sink frames stay, the rest is overwritten in
turn). Every write is a `dynamic_update_slice` into the donated buffer; alignment rules make sure that none wraps. Also
the condition cache: projected keys and values of text. This room must not know networks or plans.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vidar.attention import kernels
from vidar.attention.kernels import Keys
from vidar.attention.rope import RopeConfig, shift_frames
from vidar.attention.visibility import CLEAN, Tokens
from vidar.errors import ConfigError
from vidar.sharding import constrain


@dataclass(frozen=True)
class ContextConfig:
    """Context of generation.

    Attributes:
        window: Frames a chunk may see, counting sink, past and itself; None keeps the whole clip (append).
        sink: First frames that are never evicted.
        positions: `"absolute"` frame indices, or `"relative"`: sink keys move along so that they stay right before
            the ring (endless video never leaves the trained distances).
    """

    window: int | None = None
    sink: int = 0
    positions: str = "absolute"

    def capacity(self, frames: int, chunk: int) -> int:
        """Frames of past that the cache holds, for clips of at most `frames` frames (used by *append* only)."""
        return frames if self.window is None else self.window - chunk

    def check(self, chunk: int, independent_first_frame: bool = False) -> None:
        """Raises ConfigError where a write would wrap around the end of the ring."""
        if self.positions not in ("absolute", "relative"):
            raise ConfigError(f"context.positions={self.positions!r} is unknown: use 'absolute' or 'relative'")
        if self.window is None:
            if self.sink:
                raise ConfigError(f"context.sink={self.sink} needs a window: set context.window or sink=0")
            return
        first = 1 % chunk if independent_first_frame else 0
        if self.sink < 0 or self.sink % chunk != first:
            raise ConfigError(
                f"context.sink={self.sink} does not align with chunks of {chunk}: sink % chunk must be {first}"
            )
        if self.window < self.sink + chunk or (self.window - self.sink) % chunk:
            raise ConfigError(
                f"context.window={self.window} does not align: it must be sink ({self.sink}) plus a positive multiple "
                f"of the chunk ({chunk}), such as {self.sink + chunk * max(1, (self.window - self.sink) // chunk)}"
            )


@dataclass(frozen=True)
class Geometry:
    """Static shape of a context cache.

    Attributes:
        capacity: Frames that fit.
        tokens: Tokens a frame.
        chunk: Frames a chunk.
        sink: Frames at the front that are never overwritten.
        first: Whether the first frame is a chunk of its own.
        relative: Whether the sink's positions move along with the ring.
    """

    capacity: int
    tokens: int
    chunk: int = 1
    sink: int = 0
    first: bool = False
    relative: bool = False

    def chunk_tokens(self, frame: Any, **fields: Any) -> Tokens:
        """Metadata of absolute frames (traced or numpy) of a session."""
        pad = self.chunk - 1 if self.first else 0
        index = (frame + pad) // self.chunk
        return Tokens(frame, index, (index + 1) * self.chunk - pad, **fields)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "count"],
    meta_fields=["geometry"],
)
@dataclass(frozen=True)
class ContextCache:
    """Keys and values of past frames.

    Attributes:
        keys: Rotated keys `[l, b, s, n, d]`, with s = capacity · tokens.
        values: Values `[l, b, s, n, d]`.
        count: Frames written so far: `[b]` (sessions at different ticks) or a scalar (all rows in step).
        geometry: Static shape.
    """

    keys: Any
    values: Any
    count: Any
    geometry: Geometry

    @property
    def filled(self) -> jax.Array:
        """Frames held, shaped as `count`."""
        return jnp.minimum(self.count, self.geometry.capacity)

    @property
    def slot(self) -> jax.Array:
        """Frame slot that the next write goes to, shaped as `count`."""
        capacity, sink = self.geometry.capacity, self.geometry.sink
        return jnp.where(self.count < capacity, self.count, sink + (self.count - sink) % max(1, capacity - sink))


def init_cache(
    geometry: Geometry,
    *,
    layers: int,
    rows: int,
    heads: int,
    head_dim: int,
    dtype: Any = jnp.bfloat16,
    in_step: bool = False,
) -> ContextCache:
    """An empty cache.

    Args:
        geometry: Static shape.
        layers: Layers of the network.
        rows: Batch rows (sessions times guidance branches).
        heads: Attention heads.
        head_dim: Channels of a head.
        dtype: Type of keys and values.
        in_step: Whether all rows always hold equally many frames (one scalar count).

    Returns:
        The cache, filled with zeros.
    """
    shape = (layers, rows, geometry.capacity * geometry.tokens, heads, head_dim)
    count = jnp.zeros(() if in_step else (rows,), jnp.int32)
    keys, values = (constrain(jnp.zeros(shape, dtype), "layers", "batch", "keys", "attended", None) for _ in range(2))
    return ContextCache(keys, values, count, geometry)


def write(cache: ContextCache, keys: jax.Array, values: jax.Array, active_b: jax.Array | None = None) -> ContextCache:
    """Commits one chunk: writes its keys and values and advances the count.

    Args:
        cache: The cache; donated buffers are updated in place.
        keys: `[l, b, f · tokens, n, d]` rotated keys of f consecutive frames.
        values: Values of the same shape.
        active_b: Rows to write, shaped as the count; others keep content and count. None writes every row.

    Returns:
        The cache after the write.
    """
    geometry = cache.geometry
    frames = keys.shape[2] // geometry.tokens
    step = jnp.int32(frames) if active_b is None else frames * active_b.astype(jnp.int32)
    if frames > geometry.capacity:
        # No past is kept but, perhaps, a first frame of its own.
        return replace(cache, count=cache.count + step)
    if geometry.capacity == geometry.sink:
        # Without a ring behind the sink, nothing is kept once the sink is full.
        room = cache.count < geometry.capacity
        active_b = room if active_b is None else active_b & room
    keys, values = keys.astype(cache.keys.dtype), values.astype(cache.values.dtype)
    slot = cache.slot * geometry.tokens
    if cache.count.ndim == 0:
        start = (0, 0, slot, 0, 0)
        return ContextCache(
            _update(cache.keys, keys, start, active_b),
            _update(cache.values, values, start, active_b),
            cache.count + step,
            geometry,
        )
    # Each device writes the rows that it holds: across devices, a write to one row would involve all of them.
    buffers = kernels.on_shards(_write_rows, (cache.keys, cache.values), (keys, values), slot, active_b)
    return ContextCache(*buffers, cache.count + step, geometry)


def _write_rows(buffers: Any, updates: Any, slot_b: jax.Array, active_b: jax.Array | None) -> Any:
    """Writes each row at its own token slot, in place."""
    written = []
    for buffer, update in zip(buffers, updates, strict=True):
        for row in range(update.shape[1]):
            start = (0, row, slot_b[row], 0, 0)
            active = None if active_b is None else active_b[row]
            buffer = _update(buffer, update[:, row : row + 1], start, active)
        written.append(buffer)
    return tuple(written)


def _update(buffer: jax.Array, update: jax.Array, start: Any, active: jax.Array | None) -> jax.Array:
    if active is not None:
        update = jnp.where(active, update, jax.lax.dynamic_slice(buffer, start, update.shape))
    return jax.lax.dynamic_update_slice(buffer, update, start)


def slot_tokens(cache: ContextCache) -> Tokens:
    """Metadata of the cache's frame slots, for patterns that need more than a key length.

    Args:
        cache: The cache.

    Returns:
        Tokens with arrays `[b or 1, capacity]`; frames count from the session's start.
    """
    geometry = cache.geometry
    count = jnp.atleast_1d(cache.count)[:, None]
    slot = jnp.arange(geometry.capacity, dtype=jnp.int32)[None, :]
    ring = max(1, geometry.capacity - geometry.sink)
    laps = jnp.maximum(0, (count - 1 - slot) // ring)
    frame = jnp.where(slot < geometry.sink, slot, slot + ring * laps)
    return geometry.chunk_tokens(frame, role=jnp.full_like(frame, CLEAN), written=slot < count)


def key_parts(
    cache: ContextCache, keys: jax.Array, values: jax.Array, rope: RopeConfig, mask: jax.Array | None
) -> tuple[Keys, ...]:
    """One layer's past keys, as parts for attention; relative positions move the sink to just before the ring.

    Args:
        cache: The cache (for its counts and geometry).
        keys: The layer's stored keys `[b, s, n, d]`.
        values: The layer's stored values.
        rope: Rotary embedding of the network.
        mask: Frame mask `[b or 1, query frames, capacity]` that already covers unwritten slots, or None: then every
            written key is visible.

    Returns:
        One part, or sink and ring.
    """
    geometry = cache.geometry
    if not geometry.capacity:
        return ()
    filled = jnp.broadcast_to(cache.filled, (keys.shape[0],))
    if not (geometry.relative and geometry.sink):
        return (Keys(keys, values, mask, None if mask is not None else filled * geometry.tokens),)
    evicted = jnp.broadcast_to(cache.count - cache.filled, (keys.shape[0],))
    edge = geometry.sink * geometry.tokens
    sink = Keys(shift_frames(keys[:, :edge], evicted, rope), values[:, :edge])
    ring = Keys(keys[:, edge:], values[:, edge:])
    if mask is not None:
        parts = sink._replace(mask=mask[:, :, : geometry.sink]), ring._replace(mask=mask[:, :, geometry.sink :])
    else:
        held = jnp.minimum(filled, geometry.sink)
        parts = (
            sink._replace(length=held * geometry.tokens),
            ring._replace(length=(filled - held) * geometry.tokens),
        )
    return parts if geometry.capacity > geometry.sink else parts[:1]


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "image_keys", "image_values"], meta_fields=[])
@dataclass(frozen=True)
class ConditionCache:
    """Projected keys and values of text, and of an image or None, `[l, b, s, n, d]`; differentiable, never cut."""

    keys: Any
    values: Any
    image_keys: Any = None
    image_values: Any = None

    @property
    def parts(self) -> tuple[tuple[Any, Any], ...]:
        """Keys and values of each attention."""
        text = ((self.keys, self.values),)
        return text if self.image_keys is None else (*text, (self.image_keys, self.image_values))
