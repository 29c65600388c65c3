"""A small text encoder over bytes, trained with the network that it belongs to (as ByT5, arXiv 2105.13626).

Tokens are UTF-8 bytes, so there is no vocabulary to keep. Blocks are stacked and scanned. Dimension letters as
elsewhere; s text tokens, m width. This room must not know what the text is for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidar.errors import ConfigError, check_range
from vidar.models.layers import MLP, Precision, Projections, RMSNorm
from vidar.models.placement import gathered
from vidar.models.umt5 import position_buckets

VOCABULARY = 257  # the padding and 256 bytes
_BUCKETS, _DISTANCE = 32, 128  # relative positions, as T5 tells them apart


@dataclass(frozen=True)
class ByteEncoderConfig:
    """Shape of the encoder; its width is that of the text states.

    Attributes:
        layers: Blocks.
        heads: Attention heads.
        mlp: Hidden width of the MLP.
    """

    layers: int = 3
    heads: int = 2
    mlp: int = 256

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "mlp"):
            check_range(f"text.encoder.{name}", getattr(self, name), least=1)

    def check(self, width: int) -> None:
        """Raises ConfigError where the heads do not divide the width."""
        if width % self.heads:
            raise ConfigError(f"text.width={width} must be a multiple of text.encoder.heads={self.heads}")


def byte_tokens(texts: Sequence[str], length: int) -> np.ndarray:
    """Turns texts into tokens.

    Args:
        texts: The texts.
        length: Tokens of each; what goes beyond is cut off.

    Returns:
        int32 `[b, length]`: UTF-8 bytes + 1, then zeros.
    """
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        coded = np.frombuffer(text.encode()[:length], np.uint8)
        row[: len(coded)] = coded.astype(np.int32) + 1
    return tokens


class ByteBlock(nnx.Module):
    """Self-attention with learned relative positions, and an MLP; each after a norm."""

    def __init__(self, config: ByteEncoderConfig, width: int, *, rngs: nnx.Rngs, dtype: str):
        self.norm = RMSNorm(width, dtype=dtype)
        self.attention = Projections(width, config.heads, "head", rngs=rngs, dtype=dtype)
        self.positions = nnx.Param((0.1 * jax.random.normal(rngs.params(), (_BUCKETS, config.heads))).astype(dtype))
        self.mlp_norm = RMSNorm(width, dtype=dtype)
        self.mlp = MLP(width, config.mlp, rngs=rngs, dtype=dtype)

    def __call__(self, x_bsm: jax.Array, bucket_ss: np.ndarray, kept_bs: jax.Array) -> jax.Array:
        """One block; `kept_bs` says which tokens there are."""
        dtype = x_bsm.dtype
        hidden = self.norm(x_bsm)
        query, key, value = (
            part(hidden, dtype) for part in (self.attention.queries, self.attention.keys, self.attention.values)
        )
        bias = jnp.moveaxis(self.positions[...].astype(jnp.float32)[bucket_ss], 2, 0)[None]
        score = jnp.einsum("bqnd,bknd->bnqk", query, key, preferred_element_type=jnp.float32)
        score = score * query.shape[-1] ** -0.5 + jnp.broadcast_to(bias, score.shape)
        score = jnp.where(kept_bs[:, None, None, :], score, jnp.finfo(jnp.float32).min)
        mixed = jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(score, axis=-1).astype(dtype), value)
        x_bsm = x_bsm + self.attention.merge(mixed, dtype)
        return x_bsm + self.mlp(self.mlp_norm(x_bsm), dtype)


class ByteEncoder(nnx.Module):
    """Encodes bytes to text states, each byte seeing all others."""

    def __init__(self, config: ByteEncoderConfig, width: int, precision: Precision, *, rngs: nnx.Rngs):
        """Creates the parameters.

        Args:
            config: Shape.
            width: Channels of the states.
            precision: Types.
            rngs: Source of the initial values.
        """
        config.check(width)
        dtype = precision.params
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (VOCABULARY, width)).astype(dtype))
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: ByteBlock(config, width, rngs=nnx.Rngs(key), dtype=dtype))(keys)
        self.norm = RMSNorm(width, dtype=dtype)
        self.compute = precision.compute

    def __call__(self, token_bs: jax.Array) -> jax.Array:
        """Encodes padded texts; differentiable in the parameters.

        Args:
            token_bs: Tokens, int32 `[b, s]`; see `byte_tokens`.

        Returns:
            States `[b, s, m]` in the compute type, zero where padding is.
        """
        kept_bs = token_bs > 0
        bucket_ss = position_buckets(token_bs.shape[1], _BUCKETS, _DISTANCE)
        x_bsm = self.embedding[...][token_bs].astype(self.compute)

        def block(x_bsm: jax.Array, block: ByteBlock) -> tuple[jax.Array, None]:
            return gathered(block)(x_bsm, bucket_ss, kept_bs), None

        x_bsm, _ = jax.lax.scan(block, x_bsm, self.blocks)
        return jnp.where(kept_bs[:, :, None], self.norm(x_bsm), jnp.zeros((), x_bsm.dtype))
