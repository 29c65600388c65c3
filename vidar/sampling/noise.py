"""Randomness of generation: derived from a session's key and the absolute frame, never carried.

Equal keys give equal noise for any batch slot, sharding, resumption or plan. This room must not know networks.
"""

from enum import IntEnum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32


class Purpose(IntEnum):
    """What noise is for; folded into the key, so that uses never share draws."""

    INITIAL = 0
    RENOISE = 1
    CONTEXT = 2


def frame_noise(
    key_b: Key[Array, " b"],
    purpose: Purpose,
    frame_bf: Int[Array, "b f"],
    step_f: Int[Array, " f"],
    shape: tuple[int, ...],
) -> Float[Array, "b f ..."]:
    """Standard normal noise of single frames.

    Args:
        key_b: Key of each row's session.
        purpose: What the noise is for.
        frame_bf: Absolute frame indices.
        step_f: The chunk's own progress at which the noise enters, per frame.
        shape: Shape of one frame's latents, `[h, w, c]`.

    Returns:
        fp32 noise `[b, f, *shape]`; each frame's depends on its own arguments only.
    """

    def one(key: jax.Array, frame: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, int(purpose)), frame), step)
        return jax.random.normal(key, shape, jnp.float32)

    return jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, 0, None))(key_b, frame_bf, step_f)


def session_keys(seed: int | UInt32[Array, ""], rows: int) -> Key[Array, " b"]:
    """Keys `[b]` of `rows` sessions that share nothing: seed, seed + 1, ..., all modulo 2³²."""
    if isinstance(seed, int):
        seed %= 2**32
    return jax.vmap(jax.random.key)(jnp.uint32(seed) + jnp.arange(rows, dtype=jnp.uint32))
