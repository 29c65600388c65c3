"""Parts of the DiT: linear layers, norms, modulation, attention, MLP, and embeddings of time, actions and classes.

Parameters are float `nnx.Param`s only; every part is a pure function of its arguments. Modulation, norms and
embeddings of time run in fp32, products in the compute type. Dimension letters as in `models/frames.py`; m is the
model width, p the tokens of a frame.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidar.errors import ConfigError, check_range

FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Precision:
    """Types of one network.

    Attributes:
        params: Storage type of parameters.
        compute: Type of matrix products and of the residual stream.
    """

    params: str = "float32"
    compute: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("params", "compute"):
            if getattr(self, name) not in FLOATS:
                raise ConfigError(f"precision.{name}={getattr(self, name)!r} must be one of {', '.join(FLOATS)}")


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Product over the last axis; leading axes are flattened where nothing is sharded.

    XLA's CPU backend is about three times slower on the kernel's gradient with several leading axes; over sharded axes
    a flattened one could not be expressed.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if x.ndim <= 2 or not (mesh.empty or mesh.size == 1):
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nnx.Module):
    """Affine map of the last axis."""

    def __init__(
        self, inputs: int, outputs: int, *, rngs: nnx.Rngs, bias: bool = True, scale: float | None = None, dtype: str
    ):
        """Creates the parameters.

        Args:
            inputs: Input channels.
            outputs: Output channels.
            rngs: Source of the initial values.
            bias: Whether to add a bias.
            scale: Standard deviation of the kernel; None for Xavier-uniform, 0 for zeros.
            dtype: Storage type.
        """
        shape = (inputs, outputs)
        if scale is None:
            kernel = jax.nn.initializers.xavier_uniform()(rngs.params(), shape, jnp.dtype(dtype))
        else:
            kernel = (scale * jax.random.normal(rngs.params(), shape)).astype(dtype)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None
        # The factors of an adapter, where one is attached (`models/lora.py`).
        self.lora_in: nnx.Param | None = None
        self.lora_out: nnx.Param | None = None

    def __call__(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Applies the map in `dtype`."""
        y = product(x.astype(dtype), self.kernel[...].astype(dtype))
        if self.lora_in is not None and self.lora_out is not None:
            thin = product(x.astype(dtype), self.lora_in[...].astype(dtype))
            y = y + product(thin, self.lora_out[...].astype(dtype))
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias[...].astype(dtype), y.shape)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis with a weight; statistics in fp32."""

    def __init__(self, channels: int, *, dtype: str, eps: float = 1e-6):
        self.weight = nnx.Param(jnp.ones((channels,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x`, keeping its type."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = jnp.broadcast_to(self.weight[...].astype(x.dtype), x.shape)
        return normed.astype(x.dtype) * weight


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Layer norm over the last axis without parameters, in fp32."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """Layer norm with weight and bias."""

    def __init__(self, channels: int, *, dtype: str, eps: float = 1e-6):
        self.weight = nnx.Param(jnp.ones((channels,), dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x`, keeping its type."""
        shape = x.shape
        weight = jnp.broadcast_to(self.weight[...].astype(jnp.float32), shape)
        bias = jnp.broadcast_to(self.bias[...].astype(jnp.float32), shape)
        return (layer_norm(x, self.eps) * weight + bias).astype(x.dtype)


class TableModulation(nnx.Module):
    """Wan's modulation: one shared projection of the embedding for all blocks, plus a table of each block's own."""

    kind: ClassVar[str] = "table"

    def __init__(self, parts: int, width: int, *, rngs: nnx.Rngs, dtype: str):
        self.table = nnx.Param((jax.random.normal(rngs.params(), (parts, width)) * width**-0.5).astype(dtype))

    def __call__(self, embedding: jax.Array) -> jax.Array:
        """Adds the table to the shared projection `[b, f, parts, m]`, in its type."""
        return embedding + self.table[...].astype(embedding.dtype)[None, None]


class ZeroModulation(nnx.Module):
    """adaLN-zero (DiT, arXiv 2212.09748): each block projects the embedding itself, from zero."""

    kind: ClassVar[str] = "adaln_zero"

    def __init__(self, parts: int, width: int, *, rngs: nnx.Rngs, dtype: str):
        self.projection = Linear(width, parts * width, rngs=rngs, scale=0.0, dtype=dtype)
        self.parts = parts

    def __call__(self, embedding: jax.Array) -> jax.Array:
        """Projects the embedding `[b, f, m]` to `[b, f, parts, m]`, in its type."""
        projected = self.projection(jax.nn.silu(embedding), embedding.dtype)
        return projected.reshape(*embedding.shape[:2], self.parts, embedding.shape[-1])


MODULATIONS = {part.kind: part for part in (TableModulation, ZeroModulation)}


def modulate(x_bfpm: jax.Array, shift_bfm: jax.Array, scale_bfm: jax.Array, dtype: Any) -> jax.Array:
    """Layer norm in fp32, then per-frame scale and shift in their type."""
    normed = layer_norm(x_bfpm).astype(scale_bfm.dtype) * (1.0 + scale_bfm[:, :, None, :]) + shift_bfm[:, :, None, :]
    return normed.astype(dtype)


def sinusoid(time: jax.Array, channels: int) -> jax.Array:
    """Sinusoidal embedding, cosines before sines, of times in [0, 1000]."""
    half = channels // 2
    rate = jnp.asarray(np.exp(-math.log(10_000.0) * np.arange(half) / half).astype(np.float32))
    angle = time.astype(jnp.float32)[..., None] * rate.reshape((1,) * time.ndim + (half,))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Embeds what the network is told about a frame's level."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs, dtype: str):
        self.inner = Linear(channels, width, rngs=rngs, scale=0.02, dtype=dtype)
        self.outer = Linear(width, width, rngs=rngs, scale=0.02, dtype=dtype)
        self.channels = channels

    def __call__(self, time_bf: jax.Array, dtype: Any) -> jax.Array:
        """Embeds `[b, f]` to `[b, f, m]` in `dtype`."""
        hidden = self.inner(sinusoid(time_bf, self.channels), dtype)
        return self.outer(jax.nn.silu(hidden), dtype)


@dataclass(frozen=True)
class DiscreteActions:
    """One of `count` actions a frame, int32 `[b, f]`."""

    kind: ClassVar[str] = "discrete"
    count: int

    def __post_init__(self) -> None:
        check_range("actions.count", self.count, least=1)


@dataclass(frozen=True)
class MultiBinaryActions:
    """`count` buttons, each up or down, bool `[b, f, k]`."""

    kind: ClassVar[str] = "multi_binary"
    count: int

    def __post_init__(self) -> None:
        check_range("actions.count", self.count, least=1)


@dataclass(frozen=True)
class ContinuousActions:
    """`count` continuous values, float32 `[b, f, k]`."""

    kind: ClassVar[str] = "continuous"
    count: int

    def __post_init__(self) -> None:
        check_range("actions.count", self.count, least=1)


Actions = DiscreteActions | MultiBinaryActions | ContinuousActions


class ActionEmbedding(nnx.Module):
    """Embeds per-frame actions; a learned vector stands for dropped ones."""

    def __init__(self, config: Actions, width: int, *, rngs: nnx.Rngs, dtype: str):
        self.config = config
        if isinstance(config, DiscreteActions):
            self.inner = None
            self.outer = Linear(config.count, width, rngs=rngs, bias=False, scale=0.5, dtype=dtype)
        else:
            self.inner = Linear(config.count, width, rngs=rngs, dtype=dtype)
            self.outer = Linear(width, width, rngs=rngs, dtype=dtype)
        self.dropped = nnx.Param(jnp.zeros((width,), dtype))

    def __call__(self, actions: jax.Array, kept_b: jax.Array | None) -> jax.Array:
        """Embeds actions to `[b, f, m]` in fp32."""
        self._check(actions)
        if self.inner is None:
            embedding = self.outer(jax.nn.one_hot(actions, self.config.count, dtype=jnp.float32), jnp.float32)
        else:
            embedding = self.outer(jax.nn.silu(self.inner(actions.astype(jnp.float32), jnp.float32)), jnp.float32)
        if kept_b is None:
            return embedding
        dropped = self.dropped[...].astype(jnp.float32)[None, None]
        return jnp.where(kept_b[:, None, None], embedding, dropped)

    def _check(self, actions: jax.Array) -> None:
        discrete = isinstance(self.config, DiscreteActions)
        if actions.ndim != (2 if discrete else 3) or (not discrete and actions.shape[-1] != self.config.count):
            shape = "[b, f]" if discrete else f"[b, f, {self.config.count}]"
            raise ConfigError(f"{self.config.kind} actions must have shape {shape}, got {tuple(actions.shape)}")


class ClassEmbedding(nnx.Module):
    """Embeds a class label; a learned vector stands for a dropped one."""

    def __init__(self, classes: int, width: int, *, rngs: nnx.Rngs, dtype: str):
        self.table = nnx.Param((0.02 * jax.random.normal(rngs.params(), (classes + 1, width))).astype(dtype))
        self.classes = classes

    def __call__(self, label_b: jax.Array, kept_b: jax.Array | None) -> jax.Array:
        """Embeds `[b]` to `[b, m]` in fp32; the last row of the table is the dropped label."""
        index = label_b if kept_b is None else jnp.where(kept_b, label_b, self.classes)
        return self.table[...].astype(jnp.float32)[index]


class MLP(nnx.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, dtype: str):
        self.up = Linear(width, hidden, rngs=rngs, dtype=dtype)
        self.down = Linear(hidden, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Applies the MLP in `dtype`."""
        return self.down(jax.nn.gelu(self.up(x, dtype), approximate=True), dtype)


class ImageEmbedding(nnx.Module):
    """Wan's embedding of image features: norm, two linear layers around an exact GELU, norm."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs, dtype: str):
        self.norm = LayerNorm(channels, dtype=dtype, eps=1e-5)
        self.inner = Linear(channels, channels, rngs=rngs, dtype=dtype)
        self.outer = Linear(channels, width, rngs=rngs, dtype=dtype)
        self.last_norm = LayerNorm(width, dtype=dtype, eps=1e-5)

    def __call__(self, image_bsc: jax.Array, dtype: Any) -> jax.Array:
        """Embeds `[b, s, c]` to `[b, s, m]` in `dtype`."""
        hidden = jax.nn.gelu(self.inner(self.norm(image_bsc), dtype), approximate=False)
        return self.last_norm(self.outer(hidden, dtype))


class KeysAndValues(nnx.Module):
    """Key and value maps of an attention that shares its queries with another, with a norm of keys."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, dtype: str):
        self.heads = heads
        self.key = Linear(width, width, rngs=rngs, dtype=dtype)
        self.value = Linear(width, width, rngs=rngs, dtype=dtype)
        self.key_norm = RMSNorm(width, dtype=dtype)

    def __call__(self, x_bsm: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Normed keys and values `[b, s, n, d]`."""
        shape = (*x_bsm.shape[:-1], self.heads, -1)
        return self.key_norm(self.key(x_bsm, dtype)).reshape(shape), self.value(x_bsm, dtype).reshape(shape)


class Projections(nnx.Module):
    """Query, key, value and output maps of an attention, with norms of queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: str, *, rngs: nnx.Rngs, dtype: str):
        self.heads = heads
        self.query = Linear(width, width, rngs=rngs, dtype=dtype)
        self.key = Linear(width, width, rngs=rngs, dtype=dtype)
        self.value = Linear(width, width, rngs=rngs, dtype=dtype)
        self.output = Linear(width, width, rngs=rngs, dtype=dtype)
        self.whole = qk_norm == "width"
        channels = width if self.whole else width // heads
        self.query_norm = RMSNorm(channels, dtype=dtype) if qk_norm != "none" else None
        self.key_norm = RMSNorm(channels, dtype=dtype) if qk_norm != "none" else None

    def _heads(self, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        if norm is not None and self.whole:
            x = norm(x)
        x = x.reshape(*x.shape[:-1], self.heads, -1)
        return norm(x) if norm is not None and not self.whole else x

    def queries(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Normed queries `[..., n, d]` of `[..., m]`."""
        return self._heads(self.query(x, dtype), self.query_norm)

    def keys(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Normed keys `[..., n, d]` of `[..., m]`."""
        return self._heads(self.key(x, dtype), self.key_norm)

    def values(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Values `[..., n, d]` of `[..., m]`."""
        return self._heads(self.value(x, dtype), None)

    def merge(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Output map of `[..., n, d]`."""
        return self.output(x.reshape(*x.shape[:-2], -1), dtype)
