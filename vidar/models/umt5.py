"""UMT5's encoder (arXiv 2304.09151), which turns prompts into the text states that Wan attends to.

Blocks are stacked and scanned. Each has a table of relative positions of its own; attention is not scaled. Dimension
letters as elsewhere; s text tokens, m model width. Tokens come from elsewhere: this room must not know words.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidar.errors import ConfigError, check_range
from vidar.models.layers import Linear, Precision, RMSNorm


@dataclass(frozen=True)
class UMT5Config:
    """Shape of the encoder; the defaults are UMT5-XXL's.

    Attributes:
        width: Model width.
        layers: Blocks.
        heads: Attention heads.
        head_dim: Channels of a head.
        mlp: Hidden width of the gated MLP.
        vocabulary: Tokens that it knows.
        buckets: Relative positions that are told apart, half of them forwards.
        distance: Distance from which on all positions share the last bucket.
        precision: Types.
    """

    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp: int = 10240
    vocabulary: int = 256384
    buckets: int = 32
    distance: int = 128
    precision: Precision = Precision(params="bfloat16", compute="bfloat16")

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "head_dim", "mlp", "vocabulary"):
            check_range(f"text_encoder.{name}", getattr(self, name), least=1)
        if self.buckets % 4 or self.buckets // 4 >= self.distance:
            raise ConfigError(
                f"text_encoder.buckets={self.buckets} must be a multiple of 4, and a quarter of it below "
                f"text_encoder.distance={self.distance}"
            )


def position_buckets(length: int, buckets: int, distance: int) -> np.ndarray:
    """Bucket of each key's position relative to each query's, int32 `[s, s]`; T5's bidirectional ones."""
    position = np.arange(length)
    relative = position[None, :] - position[:, None]
    half = buckets // 2
    exact = half // 2
    far = np.abs(relative)
    # Near positions have a bucket each; further ones share them on a logarithmic scale.
    scale = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.log(distance / exact)
    shared = np.minimum(exact + (scale * (half - exact)).astype(np.int32), half - 1)
    return (np.where(relative > 0, half, 0) + np.where(far < exact, far, shared)).astype(np.int32)


class UMT5Block(nnx.Module):
    """Self-attention and a gated MLP, each after a norm."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        dtype, width, inner = config.precision.params, config.width, config.heads * config.head_dim

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, rngs=rngs, bias=False, dtype=dtype)

        self.norm = RMSNorm(width, dtype=dtype)
        self.query, self.key, self.value = (linear(width, inner) for _ in range(3))
        self.output = linear(inner, width)
        self.positions = nnx.Param(
            (0.1 * jax.random.normal(rngs.params(), (config.buckets, config.heads))).astype(dtype)
        )
        self.mlp_norm = RMSNorm(width, dtype=dtype)
        self.gate, self.up = linear(width, config.mlp), linear(width, config.mlp)
        self.down = linear(config.mlp, width)
        self.heads = config.heads

    def __call__(self, x_bsm: jax.Array, bucket_ss: np.ndarray, kept_bs: jax.Array) -> jax.Array:
        """One block; `kept_bs` says which tokens there are."""
        dtype = x_bsm.dtype
        b, s, _ = x_bsm.shape
        hidden = self.norm(x_bsm)
        query, key, value = (
            part(hidden, dtype).reshape(b, s, self.heads, -1) for part in (self.query, self.key, self.value)
        )
        bias = jnp.moveaxis(self.positions[...].astype(jnp.float32)[bucket_ss], 2, 0)
        score = jnp.einsum("bqnd,bknd->bnqk", query, key, preferred_element_type=jnp.float32)
        score = jnp.where(kept_bs[:, None, None, :], score + bias[None], jnp.finfo(jnp.float32).min)
        mixed = jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(score, axis=-1).astype(dtype), value)
        x_bsm = x_bsm + self.output(mixed.reshape(b, s, -1), dtype)
        hidden = self.mlp_norm(x_bsm)
        hidden = jax.nn.gelu(self.gate(hidden, dtype), approximate=True) * self.up(hidden, dtype)
        return x_bsm + self.down(hidden, dtype)


class UMT5(nnx.Module):
    """The encoder."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        """Creates the parameters.

        Args:
            config: Shape.
            rngs: Source of the initial values.
        """
        dtype = config.precision.params
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocabulary, config.width)).astype(dtype))
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: UMT5Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.width, dtype=dtype)

    def __call__(self, token_bs: jax.Array, length_b: jax.Array) -> jax.Array:
        """Encodes padded prompts.

        Args:
            token_bs: Tokens, int32 `[b, s]`.
            length_b: Tokens of each prompt, its end included, int32 `[b]`; what follows is padding.

        Returns:
            States `[b, s, m]` in the compute type, zero where padding is, as Wan expects them.
        """
        config = self.config
        length = token_bs.shape[1]
        kept_bs = jnp.arange(length, dtype=jnp.int32)[None] < length_b[:, None]
        bucket_ss = position_buckets(length, config.buckets, config.distance)
        x_bsm = self.embedding[...][token_bs].astype(config.precision.compute)

        def block(x_bsm: jax.Array, block: UMT5Block) -> tuple[jax.Array, None]:
            return block(x_bsm, bucket_ss, kept_bs), None

        x_bsm, _ = jax.lax.scan(block, x_bsm, self.blocks)
        return jnp.where(kept_bs[:, :, None], self.norm(x_bsm), jnp.zeros((), x_bsm.dtype))
