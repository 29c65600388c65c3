"""The diffusion transformer: one composed network for bidirectional, causal, teacher-forced and cached passes.

Blocks are stacked (a leading layer axis on every parameter) and run by `lax.scan`. Activations are `[b, f, p, m]`:
rows, frames, tokens of a frame, model width. This room must not know objectives, plans or samplers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vidar.attention import kernels, rope
from vidar.attention.cache import ConditionCache, ContextCache, key_parts, slot_tokens
from vidar.attention.kernels import Pattern
from vidar.attention.rope import RopeConfig
from vidar.attention.visibility import Tokens, Visibility, frame_mask
from vidar.diffusion import flow
from vidar.errors import ConfigError, check_range
from vidar.models.frames import Conditions, Frames
from vidar.models.layers import (
    MLP,
    MODULATIONS,
    ActionEmbedding,
    Actions,
    ClassEmbedding,
    ImageEmbedding,
    KeysAndValues,
    LayerNorm,
    Linear,
    Precision,
    Projections,
    TimeEmbedding,
    modulate,
)
from vidar.models.placement import gathered
from vidar.models.quirks import Quirks
from vidar.models.text import ByteEncoder, ByteEncoderConfig
from vidar.sharding import constrain


@dataclass(frozen=True)
class TextConfig:
    """Text cross-attention.

    Attributes:
        width: Channels of the text states.
        length: Text tokens; all of them are attended, padding included, as in Wan.
        encoder: An encoder of bytes that is trained with the network; None where states come from a frozen one.
    """

    width: int = 4096
    length: int = 512
    encoder: ByteEncoderConfig | None = None

    def __post_init__(self) -> None:
        check_range("text.width", self.width, least=1)
        check_range("text.length", self.length, least=1)
        if self.encoder is not None:
            self.encoder.check(self.width)


@dataclass(frozen=True)
class ImageConfig:
    """An image that conditions the video, as in Wan's image-to-video.

    Attributes:
        width: Channels of its features, which are attended beside the text.
        latents: Channels of the further latents that each frame is given.
    """

    width: int = 1280
    latents: int = 20

    def __post_init__(self) -> None:
        check_range("image.width", self.width, least=1)
        check_range("image.latents", self.latents, least=0)


@dataclass(frozen=True)
class DiTConfig:
    """Shape and parts of a DiT.

    Attributes:
        width: Model width.
        layers: Blocks.
        heads: Attention heads.
        mlp: Hidden width of the MLP.
        channels: Latent channels, in and out.
        patch: Side of the square latent patch that becomes one token.
        modulation: `"table"` (Wan) or `"adaln_zero"`.
        qk_norm: RMS norm of queries and keys over the `"width"` (Wan), each `"head"`, or `"none"`.
        time_channels: Channels of the sinusoidal time embedding.
        text: Text cross-attention, or None.
        image: Image that conditions the video, or None; needs text.
        actions: Per-frame actions added to the time embedding, or None.
        classes: Number of class labels, or None.
        rope: Rotary embedding.
        prediction: What the output is: `"v"`, `"x0"` or `"eps"`.
        precision: Types.
        backend: Attention back end of full sequences and cached steps: `xla`, `cudnn` or `splash`.
        remat: Whether the backward pass recomputes each block.
        quirks: What reference code does by accident; none by default.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    mlp: int = 256
    channels: int = 48
    patch: int = 1
    modulation: str = "table"
    qk_norm: str = "width"
    time_channels: int = 256
    text: TextConfig | None = None
    image: ImageConfig | None = None
    actions: Actions | None = None
    classes: int | None = None
    rope: RopeConfig = field(default_factory=RopeConfig)
    prediction: str = "v"
    precision: Precision = field(default_factory=Precision)
    backend: str = "xla"
    remat: bool = False
    quirks: Quirks = field(default_factory=Quirks)

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "mlp", "channels", "patch", "classes"):
            check_range(f"model.{name}", getattr(self, name), least=1)
        if self.time_channels < 2 or self.time_channels % 2:
            raise ConfigError(f"model.time_channels={self.time_channels} must be an even number of at least 2")
        if self.width % self.heads:
            raise ConfigError(f"model.width={self.width} must be a multiple of model.heads={self.heads}")
        choices = {
            "modulation": tuple(MODULATIONS),
            "qk_norm": ("width", "head", "none"),
            "prediction": flow.KINDS,
            "backend": kernels.BACKENDS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"model.{name}={getattr(self, name)!r} is unknown: use one of {', '.join(known)}")
        if self.image is not None and self.text is None:
            raise ConfigError("model.image is attended beside text: set model.text, too")
        self.rope.axes(self.head_dim)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    def tokens(self, height: int, width: int) -> int:
        """Tokens of a frame of `height` × `width` latents."""
        if min(height, width) < 1 or height % self.patch or width % self.patch:
            raise ConfigError(f"latents of {height}×{width} do not divide into patches of {self.patch}×{self.patch}")
        return height // self.patch * (width // self.patch)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["predictions", "keys", "values", "taps"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Output:
    """What a forward pass gives.

    Attributes:
        predictions: One `[b, f, h, w, c]` fp32 array per stream.
        keys: Rotated keys of all tokens, `[l, b, t, n, d]`.
        values: Values of all tokens.
        taps: Features `[b, f, p, m]` after the tapped blocks.
    """

    predictions: tuple[Any, ...]
    keys: Any
    values: Any
    taps: tuple[Any, ...]


class Block(nnx.Module):
    """Self-attention, optional cross-attention, MLP; each residual gated per frame but the cross-attention."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        dtype, width = config.precision.params, config.width
        self.modulation = MODULATIONS[config.modulation](6, width, rngs=rngs, dtype=dtype)
        self.attention = Projections(width, config.heads, config.qk_norm, rngs=rngs, dtype=dtype)
        self.text_norm = LayerNorm(width, dtype=dtype) if config.text else None
        self.text_attention = (
            Projections(width, config.heads, config.qk_norm, rngs=rngs, dtype=dtype) if config.text else None
        )
        self.image_attention = KeysAndValues(width, config.heads, rngs=rngs, dtype=dtype) if config.image else None
        self.mlp = MLP(width, config.mlp, rngs=rngs, dtype=dtype)

    def __call__(
        self, x_bfpm: jax.Array, embedding: jax.Array, turn: rope.Phases, attend: Any, attend_text: Any, dtype: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One block.

        Args:
            x_bfpm: Residual stream.
            embedding: Shared modulation `[b, f, 6, m]` or embedding `[b, f, m]`.
            turn: Rotations of all tokens.
            attend: Function (q, k, v) → output over `[b, t, n, d]`.
            attend_text: Function q `[b, f, p, n, d]` → output over the keys of text and image.
            dtype: Compute type.

        Returns:
            The residual stream, rotated keys and values of this block.
        """
        b, f, p, _ = x_bfpm.shape
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.unstack(self.modulation(embedding), axis=2)
        hidden = modulate(x_bfpm, shift, scale, dtype)

        def sequence(x_bfpnd: jax.Array) -> jax.Array:
            # From tokens sharded over `sequence` to heads sharded over it: an all-to-all where that axis is > 1. The
            # first line keeps the projections before it, where each device has its own tokens only.
            x_bfpnd = constrain(x_bfpnd, "batch", "frames", "tokens", "heads", None)
            x_bfpnd = constrain(x_bfpnd, "batch", "frames", None, "attended", None)
            return x_bfpnd.reshape(b, f * p, *x_bfpnd.shape[3:])

        query = rope.rotate(sequence(self.attention.queries(hidden, dtype)), turn)
        key = rope.rotate(sequence(self.attention.keys(hidden, dtype)), turn)
        value = sequence(self.attention.values(hidden, dtype))
        mixed = attend(query, key, value).reshape(b, f, p, *query.shape[2:])
        mixed = constrain(mixed, "batch", "frames", "tokens", "heads", None)
        x_bfpm = _gated(x_bfpm, gate, self.attention.merge(mixed, dtype))
        if self.text_attention is not None and self.text_norm is not None:
            query = self.text_attention.queries(self.text_norm(x_bfpm), dtype)
            x_bfpm = x_bfpm + self.text_attention.merge(attend_text(query), dtype)
        hidden = modulate(x_bfpm, mlp_shift, mlp_scale, dtype)
        x_bfpm = _gated(x_bfpm, mlp_gate, self.mlp(hidden, dtype))
        return constrain(x_bfpm, "batch", "frames", "tokens", None), key, value


def _gated(x_bfpm: jax.Array, gate_bfm: jax.Array, update: jax.Array) -> jax.Array:
    return x_bfpm + (gate_bfm[:, :, None, :] * update.astype(gate_bfm.dtype)).astype(x_bfpm.dtype)


class DiT(nnx.Module):
    """Diffusion transformer over one or more streams of frames."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        """Creates the parameters.

        Args:
            config: Shape and parts.
            rngs: Source of the initial values.
        """
        dtype, width = config.precision.params, config.width
        area, image = config.patch**2, config.image
        inputs = (config.channels + (image.latents if image else 0)) * area
        self.config = config
        self.patch = Linear(inputs, width, rngs=rngs, dtype=dtype)
        self.time = TimeEmbedding(config.time_channels, width, rngs=rngs, dtype=dtype)
        shared = config.modulation == "table"
        self.time_projection = Linear(width, 6 * width, rngs=rngs, dtype=dtype) if shared else None
        self.actions = ActionEmbedding(config.actions, width, rngs=rngs, dtype=dtype) if config.actions else None
        self.classes = ClassEmbedding(config.classes, width, rngs=rngs, dtype=dtype) if config.classes else None
        text = config.text
        self.text_encoder = (
            ByteEncoder(text.encoder, text.width, config.precision, rngs=rngs) if text and text.encoder else None
        )
        self.text_inner = Linear(text.width, width, rngs=rngs, scale=0.02, dtype=dtype) if text else None
        self.text_outer = Linear(width, width, rngs=rngs, scale=0.02, dtype=dtype) if text else None
        self.image = ImageEmbedding(image.width, width, rngs=rngs, dtype=dtype) if image else None
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.head_modulation = MODULATIONS[config.modulation](2, width, rngs=rngs, dtype=dtype)
        self.head = Linear(width, config.channels * area, rngs=rngs, scale=0.0, dtype=dtype)

    # ------------------------------------------------------------------------------------------------- conditioning

    def encode_conditioning(
        self,
        text_bsc: jax.Array,
        kept_b: jax.Array | None = None,
        image_bsc: jax.Array | None = None,
        negative_bsc: jax.Array | None = None,
    ) -> ConditionCache:
        """Projects text, and an image's features, to each block's keys and values; differentiable.

        Args:
            text_bsc: Text states `[b, s, c]`, or tokens `[b, s]` for the network's own encoder.
            kept_b: Rows whose text is kept, bool `[b]`; None for all.
            image_bsc: Features of an image `[b, s, c]`, or None.
            negative_bsc: States or tokens of the other rows; None for zeros.

        Returns:
            Keys and values `[l, b, s, n, d]`.

        Raises:
            ConfigError: The network has no text cross-attention or takes no image, or states have the wrong width.
        """
        config = self.config
        network = gathered(self)
        if config.text is None or network.text_inner is None or network.text_outer is None:
            raise ConfigError("text was given, but model.text is None: set model.text or leave the text out")
        dtype = jnp.dtype(config.precision.compute)
        text_bsc = network._states(text_bsc)
        if kept_b is not None:
            other = jnp.zeros((), text_bsc.dtype)
            if negative_bsc is not None:
                other = network._states(negative_bsc).astype(text_bsc.dtype)
            text_bsc = jnp.where(kept_b[:, None, None], text_bsc, other)
        hidden = jax.nn.gelu(network.text_inner(text_bsc, dtype), approximate=True)
        states = constrain(network.text_outer(hidden, dtype), "batch", None, None)
        image = None
        if image_bsc is not None:
            if config.image is None or network.image is None:
                raise ConfigError("an image was given, but model.image is None: set model.image or leave it out")
            if image_bsc.shape[-1] != config.image.width:
                raise ConfigError(
                    f"image features have {image_bsc.shape[-1]} channels, model.image.width={config.image.width}"
                )
            image = constrain(network.image(image_bsc, dtype), "batch", None, None)

        def project(block: Block) -> tuple[jax.Array, ...]:
            block = gathered(block)
            assert block.text_attention is not None
            projected = block.text_attention.keys(states, dtype), block.text_attention.values(states, dtype)
            if image is None or block.image_attention is None:
                return projected
            return (*projected, *block.image_attention(image, dtype))

        return ConditionCache(*jax.lax.map(project, network.blocks))

    def _states(self, text: jax.Array) -> jax.Array:
        """Text states `[b, s, c]`: as given, or those of tokens `[b, s]`."""
        config = self.config.text
        assert config is not None
        if jnp.issubdtype(text.dtype, jnp.integer):
            if self.text_encoder is None:
                raise ConfigError("tokens were given, but model.text.encoder is None: give text states [b, s, c]")
            return constrain(self.text_encoder(text), "batch", None, None)
        if text.shape[-1] != config.width:
            raise ConfigError(f"text states have {text.shape[-1]} channels, model.text.width={config.width}")
        return text

    def _embed(self, streams: Sequence[Frames], conditions: Conditions) -> jax.Array:
        """Embedding of time, actions and class, `[b, f, m]` over all streams; fp32 but for `narrow_modulation`."""
        quirks, parts = self.config.quirks, []
        dtype = jnp.dtype(self.config.precision.compute if quirks.narrow_modulation else jnp.float32)
        for stream in streams:
            time = 1000.0 * stream.level if stream.time is None else stream.time
            embedding = self.time(jnp.floor(time + 1e-3) if quirks.whole_times else time, dtype)
            if self.actions is not None:
                if conditions.actions is None:
                    raise ConfigError("model.actions is set, but no actions were given")
                embedding = embedding + self.actions(conditions.actions, conditions.actions_kept).astype(dtype)
            if self.classes is not None:
                if conditions.label is None:
                    raise ConfigError("model.classes is set, but no label was given")
                embedding = embedding + self.classes(conditions.label, conditions.label_kept)[:, None].astype(dtype)
            parts.append(embedding)
        return jnp.concatenate(parts, axis=1)

    # ------------------------------------------------------------------------------------------------------ forward

    def __call__(
        self,
        streams: Sequence[Frames],
        conditions: Conditions,
        *,
        visibility: Visibility,
        cache: ContextCache | None = None,
        taps: tuple[int, ...] = (),
    ) -> Output:
        """One pass over the frames of all streams, and over past frames in the cache.

        Args:
            streams: Streams of equal height, width and channels, concatenated along frames; conditions apply to each.
            conditions: Actions per frame, label, and text (raw or projected).
            visibility: Who sees whom.
            cache: Keys and values of past frames; read only.
            taps: Blocks whose output features are returned.

        Returns:
            Predictions per stream, keys and values to commit, tapped features.

        Raises:
            ConfigError: Conditions do not match the network, or the back end cannot lower the pattern.
        """
        network, config = gathered(self), self.config
        dtype = jnp.dtype(config.precision.compute)
        height, width = (size // config.patch for size in streams[0].latents.shape[2:4])
        latents = jnp.concatenate([self._inputs(stream, conditions) for stream in streams], axis=1)
        patches = rearrange(latents, "b f (h p) (w q) c -> b f (h w) (p q c)", p=config.patch, q=config.patch)
        x_bfpm = constrain(network.patch(patches, dtype), "batch", "frames", "tokens", None)
        embedding = constrain(network._embed(streams, conditions), "batch", "frames", None)
        shared = embedding
        if network.time_projection is not None:
            shared = network.time_projection(jax.nn.silu(embedding), embedding.dtype)
            shared = constrain(shared, "batch", "frames", None).reshape(*embedding.shape[:2], 6, config.width)
        turn = rope.phases(_absolute_frames(streams), height, width, config.head_dim, config.rope)
        pattern = Pattern(visibility, tuple(stream.layout for stream in streams), config.backend)
        masks = _masks(visibility, streams, cache)

        def attend(query: jax.Array, key: jax.Array, value: jax.Array, past: Any) -> jax.Array:
            cached = key_parts(cache, *past, config.rope, masks[1]) if cache is not None else ()
            return kernels.attend(pattern, query, key, value, mask=masks[0], cached=cached)

        def block(x_bfpm: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            block, past, parts = gathered(layer[0]), *layer[1:]

            def attend_parts(query: jax.Array) -> jax.Array:
                return reduce(jnp.add, (kernels.attend_all(pattern, query, *part) for part in parts))

            x_bfpm, key, value = block(x_bfpm, shared, turn, lambda *qkv: attend(*qkv, past), attend_parts, dtype)
            return x_bfpm, (key, value, x_bfpm if taps else None)

        text = network._text(conditions)
        past = None if cache is None else (cache.keys, cache.values)
        layers = (network.blocks, past, () if text is None else text.parts)
        x_bfpm, (keys, values, features) = jax.lax.scan(
            jax.checkpoint(block) if config.remat else block, x_bfpm, layers
        )
        predictions = network._predict(x_bfpm, embedding, [s.layout.frames for s in streams], (height, width), dtype)
        return Output(predictions, keys, values, tuple(features[tap] for tap in taps))

    def _text(self, conditions: Conditions) -> ConditionCache | None:
        if self.config.text is None:
            return None
        if conditions.text is None:
            raise ConfigError("model.text is set, but no text was given")
        if not isinstance(conditions.text, ConditionCache):
            parts = conditions.text_kept, conditions.image, conditions.negative
            return self.encode_conditioning(conditions.text, *parts)
        return conditions.text

    def _inputs(self, stream: Frames, conditions: Conditions) -> jax.Array:
        """A stream's latents with the further ones that it is given."""
        image = self.config.image
        given = 0 if conditions.latents is None else conditions.latents.shape[-1]
        if given != (image.latents if image else 0):
            raise ConfigError(
                f"{given} further latent channels were given, the network takes {image.latents if image else 0} "
                "(model.image.latents)"
            )
        if conditions.latents is None:
            return stream.latents
        return jnp.concatenate([stream.latents, conditions.latents.astype(stream.latents.dtype)], axis=-1)

    def _predict(
        self, x_bfpm: jax.Array, embedding: jax.Array, frames: list[int], grid: tuple[int, int], dtype: Any
    ) -> tuple[jax.Array, ...]:
        """Head, per stream, so that streams whose prediction nobody reads cost nothing."""
        if self.config.modulation == "table":
            embedding = jnp.broadcast_to(embedding[:, :, None], (*embedding.shape[:2], 2, embedding.shape[2]))
        shift, scale = jnp.unstack(self.head_modulation(embedding), axis=2)
        predictions, start = [], 0
        for count in frames:
            part = slice(start, start + count)
            hidden = modulate(x_bfpm[:, part], shift[:, part], scale[:, part], dtype)
            patches = self.head(hidden, dtype).astype(jnp.float32)
            p, (h, w) = self.config.patch, grid
            predictions.append(rearrange(patches, "b f (h w) (p q c) -> b f (h p) (w q) c", h=h, w=w, p=p, q=p))
            start += count
        return tuple(predictions)


def _absolute_frames(streams: Sequence[Frames]) -> jax.Array:
    parts = []
    for stream in streams:
        offsets = jnp.asarray(stream.layout.offsets, jnp.int32)[None]
        parts.append(offsets if stream.start is None else stream.start[:, None] + offsets)
    rows = max(part.shape[0] for part in parts)
    return jnp.concatenate([jnp.broadcast_to(part, (rows, part.shape[1])) for part in parts], axis=1)


def _masks(
    visibility: Visibility, streams: Sequence[Frames], cache: ContextCache | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """Traced masks over current and past frames; None where static layout and key lengths say it all."""
    active = [stream.active for stream in streams if stream.active is not None]
    several = len({chunk for stream in streams for chunk in stream.layout.chunks}) > 1
    if not visibility.reads and not active and not (cache is not None and several):
        return None, None
    rows = streams[0].latents.shape[0]
    level = jnp.concatenate([stream.level for stream in streams], axis=1)
    roles = jnp.asarray([role for stream in streams for role in stream.layout.roles], jnp.int32)[None]
    if cache is None:
        arrays = (
            [value for s in streams for value in getattr(s.layout, name)] for name in ("offsets", "chunks", "ends")
        )
        own = Tokens(*(jnp.asarray(values, jnp.int32)[None] for values in arrays), role=roles, level=level)
    else:
        own = cache.geometry.chunk_tokens(_absolute_frames(streams), role=roles, level=level)
    mask = jnp.asarray(frame_mask(visibility, own, own))
    if active:
        exists = [jnp.ones(s.level.shape, bool) if s.active is None else s.active for s in streams]
        mask = mask & jnp.concatenate(exists, axis=1)[:, None, :]
    if cache is None:
        return mask, None
    slots = slot_tokens(cache)
    past = jnp.asarray(frame_mask(visibility, own, slots)) & jnp.asarray(slots.written)[:, None, :]
    return jnp.broadcast_to(mask, (rows, *mask.shape[1:])), jnp.broadcast_to(past, (rows, *past.shape[1:]))
