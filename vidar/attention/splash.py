"""Splash attention: visibilities as masks computed inside a Pallas TPU kernel.

The kernel sees token indices only, so metadata is recomputed from them by arithmetic; layouts must be regular (every
stream the same chunks). Heads are padded to 128 channels and tokens to the block size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidar.attention.visibility import Layout, Tokens, Visibility, chunk_layout
from vidar.errors import ConfigError

_LANES = 128
_BLOCK = 512


@dataclass(frozen=True)
class Regular:
    """Closed form of the metadata of concatenated equal streams."""

    frames: int
    chunk: int
    pad: int
    roles: tuple[int, ...]

    def tokens(self, frame: Any) -> Tokens:
        """Metadata of global frame indices (numpy or traced int32)."""
        stream = frame // self.frames
        offset = frame - stream * self.frames
        index = (offset + self.pad) // self.chunk
        role = stream * 0
        for position, value in enumerate(self.roles):
            role = role + value * (stream == position).astype("int32")
        return Tokens(offset, index, (index + 1) * self.chunk - self.pad, role)


def regular(layouts: tuple[Layout, ...]) -> Regular:
    """Finds the closed form of the layouts.

    Args:
        layouts: Layouts of the concatenated streams.

    Returns:
        The closed form.

    Raises:
        ConfigError: The layouts are irregular, so that the kernel could not compute their metadata.
    """
    first = layouts[0]
    sizes = np.bincount(np.asarray(first.chunks))
    chunk = int(sizes.max())
    independent = len(sizes) > 1 and int(sizes[0]) == 1 and chunk > 1
    roles = tuple(layout.roles[0] for layout in layouts)
    for layout, role in zip(layouts, roles, strict=True):
        expected = chunk_layout(layout.frames, chunk, independent_first_frame=independent, role=role)
        if layout.frames != first.frames or layout.chunks != expected.chunks or layout.roles != expected.roles:
            raise ConfigError("attention backend 'splash' needs streams of equal, regular chunks; use backend='xla'")
    return Regular(first.frames, chunk, chunk - 1 if independent else 0, roles)


@lru_cache(maxsize=64)
def _mask(visibility: Visibility, form: Regular, per_frame: int, padded: int) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    real = form.frames * len(form.roles) * per_frame

    def sees(query: Any, key: Any) -> Any:
        q_frame, k_frame = query // per_frame, key // per_frame
        inside = (query < real) & (key < real)
        # Padded queries see padded keys, so that no row is empty.
        outside = (query >= real) & (key >= real)
        return (inside & visibility.sees(form.tokens(q_frame), form.tokens(k_frame))) | outside

    # Rows of the last, unreal frame are the padding.
    frames = np.arange(form.frames * len(form.roles) + 1) * per_frame
    frame_of = np.minimum(np.arange(padded) // per_frame, frames.size - 1)
    columns = np.asarray(sees(frames[:, None], frames[None, :]), bool)[:, frame_of]

    class FrameMask(splash_attention_mask._ComputableMask):
        def __init__(self) -> None:
            super().__init__(shape=(padded, padded), mask_function=sees)
            self.identity = (visibility, form, per_frame, padded)

        def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
            # Every block of the mask is looked at once: by a table, tens of times faster than by `sees`.
            return columns[:, part[1]][frame_of[part[0]]]

        def __eq__(self, other: object) -> bool:
            return isinstance(other, FrameMask) and self.identity == other.identity

        def __hash__(self) -> int:
            return hash(self.identity)

    return FrameMask()


@lru_cache(maxsize=64)
def _kernel(mask: Any, heads: int, queries: int, keys: int, residuals: bool, interpret: bool) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    q_block, k_block = min(_BLOCK, queries), min(_BLOCK, keys)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q_block, block_kv=k_block, block_kv_compute=k_block, block_q_dkv=q_block, block_kv_dkv=k_block,
        block_kv_dkv_compute=k_block, block_q_dq=q_block, block_kv_dq=k_block,
    )  # fmt: skip
    # Concrete tables even when first called inside a trace, and NumPy's: the kernel is kept across traces and meshes.
    with jax.ensure_compile_time_eval():
        kernel = splash_attention_kernel.make_splash_mha(
            mask=splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            save_residuals=residuals,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _padded(tokens: int) -> int:
    block = _BLOCK if tokens > _BLOCK else _LANES
    return -(-tokens // block) * block


def _prepare(x_btnd: jax.Array, tokens: int) -> jax.Array:
    """`[b, t, n, d]` → `[b, n, tokens, d']` with zero padding."""
    x = jnp.swapaxes(x_btnd, 1, 2)
    channels = -(-x.shape[3] // _LANES) * _LANES
    return jnp.pad(x, ((0, 0), (0, 0), (0, tokens - x.shape[2]), (0, channels - x.shape[3])))


def attend(
    q_btnd: jax.Array,
    k_btnd: jax.Array,
    v_btnd: jax.Array,
    visibility: Visibility,
    layouts: tuple[Layout, ...],
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention of a sequence over itself under a static visibility; differentiable.

    Args:
        q_btnd: Queries.
        k_btnd: Keys of the same tokens.
        v_btnd: Values of the same tokens.
        visibility: A predicate on the static layout.
        layouts: Layouts of the streams.
        interpret: Whether to interpret the kernel (off the TPU).

    Returns:
        Output `[b, t, n, d]`.
    """
    _, t, n, d = q_btnd.shape
    form = regular(layouts)
    padded = _padded(t)
    mask = _mask(visibility, form, t // (form.frames * len(form.roles)), padded)
    kernel = _kernel(mask, n, padded, padded, False, interpret)
    query, key, value = (
        _prepare(x, padded) for x in (q_btnd * np.float32(d**-0.5).astype(q_btnd.dtype), k_btnd, v_btnd)
    )
    output = jax.vmap(kernel)(query, key, value)
    return jnp.swapaxes(output, 1, 2)[:, :t, :, :d]


def dense_call(interpret: bool) -> Callable[..., Any]:
    """A maskless attention call whose key length becomes segment ids.

    Args:
        interpret: Whether to interpret the kernel.

    Returns:
        Function (q, k, v, key length [b] or None, residual) → output, or (output, log-sum-exp [b, t, n]).
    """
    return _DENSE[bool(interpret)]


def _dense(
    interpret: bool, query: jax.Array, key: jax.Array, value: jax.Array, length: jax.Array | None, residual: bool
) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    b, t, n, d = query.shape
    s = key.shape[1]
    queries, keys = _padded(t), _padded(s)
    mask = splash_attention_mask.FullMask((queries, keys))
    kernel = _kernel(mask, n, queries, keys, residual, interpret)
    ids = None
    if length is not None or keys > s:
        length = jnp.full((b,), s, jnp.int32) if length is None else length
        ids = splash_attention_kernel.SegmentIds(
            q=jnp.zeros((b, queries), jnp.int32),
            kv=(jnp.arange(keys, dtype=jnp.int32)[None, :] >= length[:, None]).astype(jnp.int32),
        )
    scaled = query * np.float32(d**-0.5).astype(query.dtype)
    result = jax.vmap(kernel)(_prepare(scaled, queries), _prepare(key, keys), _prepare(value, keys), ids)
    output = result[0] if residual else result
    output = jnp.swapaxes(output, 1, 2)[:, :t, :, :d]
    return (output, jnp.swapaxes(result[1][0], 1, 2)[:, :t]) if residual else output


def _interpreted(*arguments: Any) -> Any:
    return _dense(True, *arguments)


def _compiled(*arguments: Any) -> Any:
    return _dense(False, *arguments)


_DENSE = {True: _interpreted, False: _compiled}
