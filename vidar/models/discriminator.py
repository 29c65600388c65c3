"""A discriminator: heads on the features of a DiT, one logit a video.

Source: the GAN variant of Self Forcing (arXiv 2506.08009): a learned token for each tapped block attends to all tokens
of the video. Dimension letters as in `models/dit.py`. This room must not know losses.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vidar.attention.visibility import Bidirectional
from vidar.errors import ConfigError, check_range
from vidar.models.dit import DiT, DiTConfig
from vidar.models.frames import Conditions, Frames
from vidar.models.layers import MLP, LayerNorm, Linear, Projections
from vidar.models.placement import gathered


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Heads on a DiT.

    Attributes:
        taps: Blocks whose features are looked at; negative ones count from the last.
        mlp: Hidden width of a head's MLP, as a multiple of the model's width.
    """

    taps: tuple[int, ...] = (-1,)
    mlp: int = 4

    def __post_init__(self) -> None:
        check_range("heads.mlp", self.mlp, least=1)
        if not self.taps:
            raise ConfigError("heads.taps names no block: give some, such as (-1,) for the last")

    def blocks(self, layers: int) -> tuple[int, ...]:
        """Numbers of the tapped blocks of a network with so many layers."""
        for tap in self.taps:
            if not -layers <= tap < layers:
                raise ConfigError(f"heads.taps={self.taps}: the critic has blocks {-layers} … {layers - 1}")
        return tuple(tap % layers for tap in self.taps)


class Head(nnx.Module):
    """A learned token that attends to the features of one block."""

    def __init__(self, config: DiTConfig, mlp: int, *, rngs: nnx.Rngs):
        dtype, width = config.precision.params, config.width
        self.token = nnx.Param((width**-0.5 * jax.random.normal(rngs.params(), (width,))).astype(dtype))
        self.norm = LayerNorm(width, dtype=dtype)
        self.attention = Projections(width, config.heads, config.qk_norm, rngs=rngs, dtype=dtype)
        self.mlp_norm = LayerNorm(width, dtype=dtype)
        self.mlp = MLP(width, mlp * width, rngs=rngs, dtype=dtype)

    def __call__(self, x_btm: jax.Array, dtype: Any) -> jax.Array:
        """Reads `[b, t, m]` to `[b, m]`."""
        normed = self.norm(x_btm)
        token = jnp.broadcast_to(self.token[...].astype(dtype)[None, None], (x_btm.shape[0], 1, x_btm.shape[2]))
        query, key = self.attention.queries(token, dtype), self.attention.keys(normed, dtype)
        logits = jnp.einsum("bqnd,btnd->bnqt", query, key).astype(jnp.float32) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
        mixed = jnp.einsum("bnqt,btnd->bqnd", weights, self.attention.values(normed, dtype))
        token = token + self.attention.merge(mixed, dtype)
        return (token + self.mlp(self.mlp_norm(token), dtype))[:, 0]


class Discriminator(nnx.Module):
    """A DiT with heads; called as the DiT itself, it is the DiT."""

    def __init__(self, network: DiT, config: DiscriminatorConfig, *, rngs: nnx.Rngs):
        """Puts new heads on a network.

        Args:
            network: Whose features are looked at.
            config: Heads.
            rngs: Source of their initial values.
        """
        model = network.config
        dtype, width = model.precision.params, model.width
        self.taps = config.blocks(model.layers)
        self.network = network
        self.heads = nnx.List([Head(model, config.mlp, rngs=rngs) for _ in self.taps])
        self.norm = LayerNorm(width * len(self.taps), dtype=dtype)
        self.inner = Linear(width * len(self.taps), width, rngs=rngs, dtype=dtype)
        self.outer = Linear(width, 1, rngs=rngs, scale=0.02, dtype=dtype)

    @property
    def config(self) -> DiTConfig:
        """Config of the DiT."""
        return self.network.config

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The DiT's own forward pass."""
        return self.network(*arguments, **named)

    def logits(self, frames: Frames, conditions: Conditions) -> jax.Array:
        """How real each video looks.

        Args:
            frames: Videos, possibly noisy.
            conditions: Their conditions.

        Returns:
            Logits `[b]`, fp32.
        """
        dtype = jnp.dtype(self.config.precision.compute)
        output = self.network((frames,), conditions, visibility=Bidirectional(), taps=self.taps)
        own = gathered((self.heads, self.norm, self.inner, self.outer))
        heads, norm, inner, outer = own
        read = [head(rearrange(x, "b f p m -> b (f p) m"), dtype) for head, x in zip(heads, output.taps, strict=True)]
        hidden = jax.nn.silu(inner(norm(jnp.concatenate(read, axis=-1)), dtype))
        return outer(hidden, jnp.float32)[:, 0].astype(jnp.float32)
