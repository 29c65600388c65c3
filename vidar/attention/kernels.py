"""Attention kernels: lowers a visibility to a back end and runs it, over current tokens and a cache of past keys.

Back ends: `xla` (any pattern, forward-mode differentiation), `cudnn` (a list of maskless segments), `splash` (a mask
computed inside a TPU kernel). A back end refuses what it does not lower. This is the only room with a `shard_map`:
batch over data × fsdp, heads over tensor × sequence, so that tokens sharded over `sequence` outside are exchanged for
heads on the way in and back on the way out (DeepSpeed Ulysses, arXiv 2309.14509).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vidar.attention import splash
from vidar.attention.visibility import STATIC_FIELDS, Layout, Tokens, Visibility, frame_mask, tokens_of
from vidar.errors import ConfigError

BACKENDS = ("xla", "cudnn", "splash")
_PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}
# Above this many bytes of logits the xla back end maps over heads and frames of queries instead of one product.
_LOGIT_BYTES = 1 << 27


class Keys(NamedTuple):
    """One part of the keys that a block of queries attends to.

    Attributes:
        keys: `[b, s, n, d]`.
        values: `[b, s, n, d]`.
        mask: Boolean `[1 or b, query frames, key frames]`, or None where every query sees every key.
        length: Valid keys per row `[b]`, counted from the front, or None for all.
    """

    keys: jax.Array
    values: jax.Array
    mask: Any = None
    length: jax.Array | None = None


class Segment(NamedTuple):
    """Query frames `start:stop` that see exactly the key frames in `ranges`, without a mask."""

    start: int
    stop: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pattern:
    """A visibility over the frames of one sequence, ready for one back end.

    Attributes:
        visibility: The predicate.
        layouts: Layouts of the concatenated streams.
        backend: One of `BACKENDS`.
        interpret: Whether Pallas kernels are interpreted (tests on a CPU).
    """

    visibility: Visibility
    layouts: tuple[Layout, ...]
    backend: str = "xla"
    interpret: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"attention backend {self.backend!r} is unknown: use one of {', '.join(BACKENDS)}")
        if self.backend != "xla" and self.visibility.reads:
            reads = ", ".join(sorted(self.visibility.reads))
            raise ConfigError(
                f"attention backend {self.backend!r} cannot lower {type(self.visibility).__name__}: it reads {reads}, "
                f"beyond the static layout ({', '.join(sorted(STATIC_FIELDS))}); use backend='xla'"
            )

    def tokens(self) -> Tokens:
        """Metadata of all frames of all streams, in order."""
        parts = [tokens_of(layout) for layout in self.layouts]
        names = ("frame", "chunk", "end", "role")
        return Tokens(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def mask(self) -> np.ndarray:
        """Static frame mask `[f, f]`."""
        tokens = self.tokens()
        return np.asarray(frame_mask(self.visibility, tokens, tokens), bool)


def segments(mask: np.ndarray) -> tuple[Segment, ...]:
    """Decomposes a static frame mask into maskless dense attention calls.

    Args:
        mask: Boolean `[query frames, key frames]`.

    Returns:
        One segment per run of query frames with equal keys; together they cover every query once.
    """
    found: list[Segment] = []
    start = 0
    for frame in range(1, len(mask) + 1):
        if frame < len(mask) and np.array_equal(mask[frame], mask[start]):
            continue
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask[start], [False]]).astype(np.int8)))
        ranges = tuple((int(first), int(last)) for first, last in edges.reshape(-1, 2))
        found.append(Segment(start, frame, ranges))
        start = frame
    return tuple(found)


# ------------------------------------------------------------------------------------------------------- dense calls

Dense = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, bool], Any]


def dense_call(implementation: Any) -> Dense:
    """A maskless attention call through `jax.nn.dot_product_attention`.

    Args:
        implementation: `"xla"` or `"cudnn"`.

    Returns:
        Function (q, k, v, key length [b] or None, residual) → output, or (output, log-sum-exp [b, t, n]).
    """

    def call(query: jax.Array, key: jax.Array, value: jax.Array, length: jax.Array | None, residual: Any) -> Any:
        # jax's own function relies on implicit promotion, which a strict caller forbids.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                query, key, value, key_value_seq_lengths=length, implementation=implementation, return_residual=residual
            )

    return call


def segmented(q_btnd: jax.Array, k_btnd: jax.Array, v_btnd: jax.Array, mask: np.ndarray, dense: Dense) -> jax.Array:
    """Runs a static frame mask as dense calls over slices of the keys.

    Args:
        q_btnd: Queries; their tokens divide evenly over the mask's rows.
        k_btnd: Keys of the same tokens.
        v_btnd: Values of the same tokens.
        mask: Boolean `[f, f]`.
        dense: The dense call.

    Returns:
        Attention output `[b, t, n, d]`.
    """
    per_frame = q_btnd.shape[1] // len(mask)
    outputs = []
    for segment in segments(mask):
        slices = [slice(first * per_frame, last * per_frame) for first, last in segment.ranges]
        keys, values = (
            x[:, slices[0]] if len(slices) == 1 else jnp.concatenate([x[:, part] for part in slices], axis=1)
            for x in (k_btnd, v_btnd)
        )
        queries = q_btnd[:, segment.start * per_frame : segment.stop * per_frame]
        outputs.append(dense(queries, keys, values, None, False))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def merged(dense: Dense, query: jax.Array, parts: tuple[Keys, ...]) -> jax.Array:
    """Attention over several parts of keys by separate calls, merged by their log-sum-exp.

    Kernels stop the gradient of the log-sum-exp, so the backward pass runs one call over all keys instead; only the
    last part may be partly filled up to its length while the ones before it are not (the order in which a cache fills).

    Args:
        dense: The dense call.
        query: `[b, t, n, d]`.
        parts: Maskless keys.

    Returns:
        Output `[b, t, n, d]`.
    """
    outputs, residuals = zip(*(dense(query, part.keys, part.values, part.length, True) for part in parts), strict=True)
    sums = [
        residual if part.length is None else jnp.where((part.length > 0)[:, None, None], residual, -jnp.inf)
        for part, residual in zip(parts, residuals, strict=True)
    ]
    weights = jax.nn.softmax(jnp.stack(sums).astype(jnp.float32), axis=0)
    # An empty part's output may be NaN; its weight is zero.
    terms = [
        jnp.where(weight[..., None] > 0, output.astype(jnp.float32), 0.0) * weight[..., None]
        for weight, output in zip(weights, outputs, strict=True)
    ]
    return reduce(jnp.add, terms).astype(query.dtype)


def _one_call(dense: Dense, query: jax.Array, parts: tuple[Keys, ...]) -> jax.Array:
    keys = jnp.concatenate([part.keys for part in parts], axis=1)
    values = jnp.concatenate([part.values for part in parts], axis=1)
    rows = query.shape[0]
    lengths = [
        jnp.full((rows,), part.keys.shape[1], jnp.int32) if part.length is None else part.length for part in parts
    ]
    length = sum(lengths[1:], lengths[0]) if any(part.length is not None for part in parts) else None
    return dense(query, keys, values, length, False)


def _merged_forward(dense: Dense, query: jax.Array, parts: tuple[Keys, ...]) -> tuple[jax.Array, Any]:
    return merged(dense, query, parts), (query, parts)


def _merged_backward(dense: Dense, saved: Any, cotangent: jax.Array) -> tuple[jax.Array, Any]:
    query, parts = saved

    def call(query: jax.Array, keys: list[jax.Array], values: list[jax.Array]) -> jax.Array:
        rebuilt = tuple(
            part._replace(keys=key, values=value) for part, key, value in zip(parts, keys, values, strict=True)
        )
        return _one_call(dense, query, rebuilt)

    _, pull = jax.vjp(call, query, [part.keys for part in parts], [part.values for part in parts])
    query_bar, keys_bar, values_bar = pull(cotangent)

    def zero(length: jax.Array | None) -> Any:
        return None if length is None else np.zeros(length.shape, jax.dtypes.float0)

    parts_bar = tuple(
        Keys(key_bar, value_bar, None, zero(part.length))
        for part, key_bar, value_bar in zip(parts, keys_bar, values_bar, strict=True)
    )
    return query_bar, parts_bar


merged.defvjp(_merged_forward, _merged_backward)


# --------------------------------------------------------------------------------------------------------------- xla


def _visible(part: Keys, frames: slice, query_tokens: int, per_frame: int) -> jax.Array | np.ndarray | None:
    """Token-level boolean mask `[1 or b, query tokens, s]` of some query frames; None where everything is visible."""
    keys = part.keys.shape[1]
    mask = None
    if part.mask is not None:
        frame_part = part.mask[:, frames]
        array = np if isinstance(frame_part, np.ndarray) else jnp
        mask = array.repeat(frame_part, keys // frame_part.shape[2], axis=2)
        mask = array.repeat(mask, per_frame, axis=1) if frame_part.shape[1] > 1 else mask
        mask = array.broadcast_to(mask, (mask.shape[0], query_tokens, keys))
    if part.length is not None:
        filled = jnp.arange(keys, dtype=jnp.int32)[None, None, :] < part.length[:, None, None]
        mask = filled if mask is None else jnp.logical_and(filled, mask)
    return mask


def _softmax_over_parts(
    query: jax.Array, parts: Sequence[Keys], masks: Sequence[Any], letters: tuple[str, str, str]
) -> jax.Array:
    """Joint softmax over all parts with plain array operations: exact under every differentiation mode."""
    scores, values, output = letters
    scale = query.shape[-1] ** -0.5
    logits = []
    for part, mask in zip(parts, masks, strict=True):
        score = jnp.einsum(scores, query, part.keys, preferred_element_type=jnp.float32) * scale
        if mask is not None:
            mask = mask[:, None] if score.ndim == 4 else mask
            score = jnp.where(mask, score, -jnp.inf)
        logits.append(score)
    peak = jax.lax.stop_gradient(jnp.max(jnp.stack([jnp.max(score, axis=-1) for score in logits]), axis=0))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)[..., None]
    weights = [jnp.exp(score - peak) for score in logits]
    totals = [jnp.sum(weight, axis=-1) for weight in weights]
    total = sum(totals[1:], totals[0])
    mixed = [
        jnp.einsum(values, weight.astype(part.values.dtype), part.values, preferred_element_type=jnp.float32)
        for part, weight in zip(parts, weights, strict=True)
    ]
    mix = sum(mixed[1:], mixed[0])
    divisor = jnp.where(total > 0, total, 1.0)
    divisor = jnp.swapaxes(divisor, 1, 2)[..., None] if output == "btnd" else divisor[..., None]
    return (mix / divisor).astype(query.dtype)


def attend_xla(q_btnd: jax.Array, parts: Sequence[Keys], frames: int) -> jax.Array:
    """Reference back end: one joint softmax over all parts, blocked over heads and query frames when large.

    Args:
        q_btnd: Queries of `frames` frames.
        parts: Keys with masks or lengths.
        frames: Query frames.

    Returns:
        Output `[b, t, n, d]`; rows that see nothing give zeros.
    """
    b, t, n, d = q_btnd.shape
    keys = sum(part.keys.shape[1] for part in parts)
    per_frame = t // frames
    if 4 * b * n * t * keys <= _LOGIT_BYTES:
        masks = [_visible(part, slice(None), t, per_frame) for part in parts]
        return _softmax_over_parts(q_btnd, parts, masks, ("btnd,bsnd->bnts", "bnts,bsnd->btnd", "btnd"))
    blocks = jnp.moveaxis(q_btnd.reshape(b, frames, per_frame, n, d), (3, 1), (0, 1))

    def head(arguments: tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]) -> jax.Array:
        query, pairs = arguments
        own = [part._replace(keys=key, values=value) for part, (key, value) in zip(parts, pairs, strict=True)]

        def block(arguments: tuple[jax.Array, list[Any]]) -> jax.Array:
            query, rows = arguments
            masked = [
                part if row is None else part._replace(mask=row[:, None]) for part, row in zip(own, rows, strict=True)
            ]
            masks = [_visible(part, slice(None), per_frame, per_frame) for part in masked]
            return _softmax_over_parts(query, own, masks, ("btd,bsd->bts", "bts,bsd->btd", "btd"))

        rows = [None if part.mask is None else jnp.moveaxis(jnp.asarray(part.mask), 1, 0) for part in parts]
        return jax.lax.map(block, (query, rows))

    pairs = [(jnp.moveaxis(part.keys, 2, 0), jnp.moveaxis(part.values, 2, 0)) for part in parts]
    output = jax.lax.map(head, (blocks, pairs))
    return jnp.moveaxis(output, (0, 1), (3, 1)).reshape(b, t, n, d)


# ------------------------------------------------------------------------------------------------------------ attend


def attend(
    pattern: Pattern,
    q_btnd: jax.Array,
    k_btnd: jax.Array,
    v_btnd: jax.Array,
    *,
    mask: Any = None,
    cached: Sequence[Keys] = (),
) -> jax.Array:
    """Attention of the current tokens over themselves and a cache.

    Args:
        pattern: Visibility, layouts and back end of the current tokens.
        q_btnd: Rotated queries of all streams, `[b, t, n, d]`.
        k_btnd: Rotated keys of the same tokens.
        v_btnd: Values of the same tokens.
        mask: Frame mask `[1 or b, f, f]` that replaces the pattern's static one (levels, inactive chunks), or None.
        cached: Parts of past keys.

    Returns:
        Output `[b, t, n, d]` in the type of the queries.

    Raises:
        ConfigError: The back end cannot lower the pattern, or the devices do not have it.
    """
    static = pattern.mask() if mask is None and not pattern.visibility.reads else None
    if static is None and mask is None:
        raise ConfigError(f"{type(pattern.visibility).__name__} reads levels or slots: the caller must give the mask")
    masked = mask is not None or (static is not None and not static.all()) or any(p.mask is not None for p in cached)
    if pattern.backend != "xla" and (mask is not None or (masked and cached)):
        raise ConfigError(
            f"attention backend {pattern.backend!r} runs a cached step only without a mask (one chunk in flight, its "
            "commit in a pass of its own); use backend='xla' for plans with lag < steps or fused commits"
        )

    _check_device(pattern, q_btnd)

    def local(query: jax.Array, key: jax.Array, value: jax.Array, mask: Any, cached: Sequence[Keys]) -> jax.Array:
        return _local(pattern, static, query, key, value, mask, tuple(cached))

    arguments = (q_btnd, k_btnd, v_btnd, mask, tuple(cached))
    specs = _specs(arguments)
    if specs is None:
        return local(*arguments)
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)


def _local(
    pattern: Pattern,
    static: np.ndarray | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Any,
    cached: tuple[Keys, ...],
) -> jax.Array:
    frames = sum(layout.frames for layout in pattern.layouts)
    if pattern.backend == "xla":
        own = mask if static is None else (None if static.all() else static[None])
        return attend_xla(query, (Keys(key, value, own), *cached), frames)
    if cached:
        return merged(_dense_of(pattern), query, (Keys(key, value), *cached))
    if pattern.backend == "cudnn":
        assert static is not None
        return segmented(query, key, value, static, dense_call("cudnn"))
    return splash.attend(query, key, value, pattern.visibility, pattern.layouts, interpret=pattern.interpret)


def attend_all(pattern: Pattern, q_bfpnd: jax.Array, k_bsnd: jax.Array, v_bsnd: jax.Array) -> jax.Array:
    """Attention in which every query sees every key, such as to text; queries stay sharded by tokens.

    Args:
        pattern: Names the back end; who sees whom is not asked.
        q_bfpnd: Queries by frame and token of a frame.
        k_bsnd: Keys.
        v_bsnd: Values.

    Returns:
        Output `[b, f, p, n, d]` in the type of the queries.

    Raises:
        ConfigError: The devices do not have the back end.
    """
    _check_device(pattern, q_bfpnd)

    def local(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        b, f, p, n, d = query.shape
        flat = query.reshape(b, f * p, n, d)
        if pattern.backend == "xla":
            return attend_xla(flat, (Keys(key, value),), f).reshape(query.shape)
        return _dense_of(pattern)(flat, key, value, None, False).reshape(query.shape)

    b, _, p, n, _ = q_bfpnd.shape
    rows, tokens, heads = (
        _fitting(names, size) for names, size in ((("data", "fsdp"), b), (("sequence",), p), (("tensor",), n))
    )
    if rows is None and tokens is None and heads is None:
        return local(q_bfpnd, k_bsnd, v_bsnd)
    queries, keys = PartitionSpec(rows, None, tokens, heads, None), PartitionSpec(rows, None, heads, None)
    return jax.shard_map(local, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)(
        q_bfpnd, k_bsnd, v_bsnd
    )


def on_shards(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function of cached keys and values where they lie: on each device's own rows and heads.

    Args:
        function: From the arguments' shards to one or more arrays `[l, b, s, n, d]`.
        *arguments: Trees of arrays `[l, b, s, n, d]` and `[b]`.

    Returns:
        What the function returns, over all devices.
    """
    _, b, _, n, _ = next(leaf.shape for leaf in jax.tree.leaves(arguments) if leaf.ndim == 5)
    rows, heads = _fitting(("data", "fsdp"), b), _fitting(("tensor", "sequence"), n)
    if rows is None and heads is None:
        return function(*arguments)
    cached = PartitionSpec(None, rows, None, heads, None)
    specs = jax.tree.map(lambda leaf: cached if leaf.ndim == 5 else PartitionSpec(rows), arguments)
    return jax.shard_map(function, in_specs=specs, out_specs=cached, check_vma=False)(*arguments)


def check_backend(backend: str) -> None:
    """Raises ConfigError where the devices that are traced for, which need not exist, lack an attention back end."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    wanted = _PLATFORMS.get(backend, platform)
    if platform != wanted:
        raise ConfigError(
            f"attention backend {backend!r} needs a {wanted.upper()}, these devices are {platform}: use backend='xla'"
        )


def _check_device(pattern: Pattern, query: jax.Array) -> None:
    if pattern.backend == "xla" or pattern.interpret:
        return
    check_backend(pattern.backend)
    if pattern.backend == "cudnn" and (query.dtype not in (jnp.bfloat16, jnp.float16) or query.shape[-1] % 8):
        raise ConfigError(
            f"attention backend 'cudnn' takes bfloat16 or float16 and heads of a multiple of 8 channels, not "
            f"{query.dtype} and {query.shape[-1]}: use backend='xla'"
        )


def _dense_of(pattern: Pattern) -> Dense:
    return dense_call("cudnn") if pattern.backend == "cudnn" else splash.dense_call(pattern.interpret)


def _specs(arguments: tuple[Any, ...]) -> Any:
    """Partition specs for the local computation under the current mesh; None where nothing is sharded."""
    b, _, n, _ = arguments[0].shape
    batch, heads = _fitting(("data", "fsdp"), b), _fitting(("tensor", "sequence"), n)
    if batch is None and heads is None:
        return None

    def spec(x: Any) -> PartitionSpec:
        rows = batch if x.shape[0] == b and b > 1 else None
        return PartitionSpec(rows, None, heads, None) if x.ndim == 4 else PartitionSpec(rows)

    return jax.tree.map(spec, arguments)


def _fitting(names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """Those of the current mesh's axes that split a dimension of `size`; None where none does."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    chosen: list[str] = []
    shards = 1
    for name in names:
        wide = mesh.shape[name] > 1 and name not in mesh.manual_axes
        if wide and size % (shards * mesh.shape[name]) == 0:
            chosen.append(name)
            shards *= mesh.shape[name]
    return tuple(chosen) or None
