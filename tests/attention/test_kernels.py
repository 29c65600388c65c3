"""Every back end against `xla`, on every pattern that it lowers; refusal of the others; the merge and its gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidar.attention import kernels, splash
from vidar.attention.visibility import (
    CLEAN,
    Bidirectional,
    ChunkCausal,
    Identity,
    KeyRange,
    TeacherForcing,
    Window,
    Written,
    chunk_layout,
)
from vidar.errors import ConfigError

CHUNKED = (chunk_layout(6, 2),)
FIRST = (chunk_layout(7, 3, independent_first_frame=True),)
BESIDE = (chunk_layout(6, 2, role=CLEAN), chunk_layout(6, 2))
PATTERNS = {
    "bidirectional": (Bidirectional(), CHUNKED),
    "causal": (ChunkCausal(), CHUNKED),
    "causal, first frame": (ChunkCausal(), FIRST),
    "window": (ChunkCausal() & Window(4), CHUNKED),
    "window, sink": (ChunkCausal() & Window(4, 2), CHUNKED),
    "window, sink, first frame": (ChunkCausal() & Window(4, 1), FIRST),
    "teacher": (TeacherForcing(), BESIDE),
    "teacher, window": (TeacherForcing() & Window(4, 2), BESIDE),
    "either": (ChunkCausal() & Window(2) | Identity(), CHUNKED),
    "identity": (Identity() & ChunkCausal(), BESIDE),
}


def arrays(frames: int, per_frame: int = 5, heads: int = 2, width: int = 8, rows: int = 2, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (rows, frames * per_frame, heads, width)) for key in keys)


def reference(q, k, v, mask):
    """Plain numpy softmax attention with a token mask, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), v)


def token_mask(pattern: kernels.Pattern, per_frame: int):
    return np.kron(pattern.mask(), np.ones((per_frame, per_frame), bool))


@pytest.mark.parametrize("name", PATTERNS)
def test_xla_equals_a_plain_masked_softmax(name):
    visibility, layouts = PATTERNS[name]
    pattern = kernels.Pattern(visibility, layouts)
    q, k, v = arrays(len(pattern.mask()))
    expected = reference(q, k, v, token_mask(pattern, 5))
    np.testing.assert_allclose(kernels.attend(pattern, q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize("name", ["causal", "teacher, window"])
def test_blocked_form_equals_the_single_product(name, monkeypatch):
    visibility, layouts = PATTERNS[name]
    pattern = kernels.Pattern(visibility, layouts)
    q, k, v = arrays(len(pattern.mask()))
    whole = kernels.attend(pattern, q, k, v)
    monkeypatch.setattr(kernels, "_LOGIT_BYTES", 0)
    np.testing.assert_allclose(kernels.attend(pattern, q, k, v), whole, atol=2e-6)


@pytest.mark.parametrize("name", PATTERNS)
def test_segments_equal_xla(name):
    visibility, layouts = PATTERNS[name]
    pattern = kernels.Pattern(visibility, layouts)
    q, k, v = arrays(len(pattern.mask()))
    dense = kernels.dense_call("xla")

    def by_segments(q, k, v):
        return kernels.segmented(q, k, v, pattern.mask(), dense)

    def by_xla(q, k, v):
        return kernels.attend(pattern, q, k, v)

    np.testing.assert_allclose(by_segments(q, k, v), by_xla(q, k, v), atol=2e-6)
    for ours, theirs in zip(
        jax.grad(lambda *x: jnp.sum(by_segments(*x) ** 2), (0, 1, 2))(q, k, v),
        jax.grad(lambda *x: jnp.sum(by_xla(*x) ** 2), (0, 1, 2))(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_segments_cover_every_query_once():
    mask = kernels.Pattern(TeacherForcing() & Window(4, 2), BESIDE).mask()
    rebuilt = np.zeros_like(mask)
    covered = []
    for segment in kernels.segments(mask):
        covered += range(segment.start, segment.stop)
        for first, last in segment.ranges:
            rebuilt[segment.start : segment.stop, first:last] = True
    assert covered == list(range(12))
    np.testing.assert_array_equal(rebuilt, mask)


@pytest.mark.parametrize("name", list(PATTERNS))
def test_splash_equals_xla(name):
    visibility, layouts = PATTERNS[name]
    q, k, v = arrays(sum(layout.frames for layout in layouts), per_frame=13, rows=1)
    ours = kernels.attend(kernels.Pattern(visibility, layouts, "splash", interpret=True), q, k, v)
    theirs = kernels.attend(kernels.Pattern(visibility, layouts), q, k, v)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_splash_gradient_equals_xla():
    visibility, layouts = PATTERNS["teacher"]
    q, k, v = arrays(12, per_frame=13, rows=1)

    def loss(backend, q, k, v):
        pattern = kernels.Pattern(visibility, layouts, backend, interpret=True)
        return jnp.sum(jnp.sin(kernels.attend(pattern, q, k, v)))

    for ours, theirs in zip(
        jax.grad(loss, (1, 2, 3))("splash", q, k, v), jax.grad(loss, (1, 2, 3))("xla", q, k, v), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


@pytest.mark.parametrize("visibility", [KeyRange((0.5,), (2, 1)) & ChunkCausal(), Written()])
@pytest.mark.parametrize("backend", ["cudnn", "splash"])
def test_patterns_on_levels_and_slots_are_refused(visibility, backend):
    with pytest.raises(ConfigError, match="cannot lower .* use backend='xla'"):
        kernels.Pattern(visibility, CHUNKED, backend)


@pytest.mark.parametrize(("backend", "needs"), [("cudnn", "GPU"), ("splash", "TPU")])
def test_a_back_end_that_the_devices_lack_is_refused(backend, needs):
    q, k, v = arrays(6)
    pattern = kernels.Pattern(ChunkCausal(), CHUNKED, backend)
    message = f"{backend}' needs a {needs}, these devices are cpu: use backend='xla'"
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda: kernels.attend(pattern, q, k, v))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda: kernels.attend_all(pattern, q[:, None], k, v))


def test_unknown_backend_and_irregular_layout_are_refused():
    with pytest.raises(ConfigError, match="unknown"):
        kernels.Pattern(ChunkCausal(), CHUNKED, "flash")
    ragged = (chunk_layout(6, 2), chunk_layout(4, 2))
    with pytest.raises(ConfigError, match="regular"):
        splash.regular(ragged)


def cached_parts(lengths, slots=20, seed=7):
    k, v, _ = arrays(1, per_frame=slots, seed=seed)
    return (kernels.Keys(k, v, None, jnp.asarray(lengths, jnp.int32)),)


@pytest.mark.parametrize("dense", [kernels.dense_call("xla"), splash.dense_call(True)], ids=["segments", "splash"])
@pytest.mark.parametrize("lengths", [(0, 0), (20, 7), (0, 20)])
def test_merged_attention_and_its_gradient_equal_one_softmax(dense, lengths):
    q, k, v = arrays(2)
    cached = cached_parts(lengths)

    def ours(q, k, v, cached):
        return jnp.sum(jnp.sin(kernels.merged(dense, q, (kernels.Keys(k, v), *cached))))

    def theirs(q, k, v, cached):
        return jnp.sum(jnp.sin(kernels.attend_xla(q, (kernels.Keys(k, v), *cached), 2)))

    np.testing.assert_allclose(ours(q, k, v, cached), theirs(q, k, v, cached), rtol=2e-5)
    gradients = (jax.grad(f, (0, 1, 2))(q, k, v, cached) for f in (ours, theirs))
    for left, right in zip(*gradients, strict=True):
        np.testing.assert_allclose(left, right, atol=3e-5)


def test_naive_merge_would_have_a_wrong_gradient():
    """The trap that `merged` avoids: differentiating the merge itself drops the log-sum-exp's gradient."""
    q, k, v = arrays(2)
    cached = cached_parts((20, 20))
    dense = kernels.dense_call("xla")
    exact = jax.grad(lambda q: jnp.sum(jnp.sin(kernels.attend_xla(q, (kernels.Keys(k, v), *cached), 2))))(q)
    naive = jax.grad(lambda q: jnp.sum(jnp.sin(kernels.merged.fun(dense, q, (kernels.Keys(k, v), *cached)))))(q)
    assert float(jnp.max(jnp.abs(exact - naive)) / jnp.max(jnp.abs(exact))) > 0.05


def test_forward_mode_through_xla_equals_finite_differences():
    q, k, v = arrays(6)
    cached = cached_parts((20, 7))
    pattern = kernels.Pattern(ChunkCausal(), CHUNKED)

    def run(q):
        return kernels.attend(pattern, q, k, v, mask=jnp.asarray(pattern.mask())[None], cached=cached)

    direction = jax.random.normal(jax.random.key(9), q.shape)
    _, tangent = jax.jvp(run, (q,), (direction,))
    step = 1e-2
    numeric = (run(q + step * direction) - run(q - step * direction)) / (2 * step)
    np.testing.assert_allclose(tangent, numeric, atol=2e-3)


def test_cached_step_with_a_mask_is_refused_off_xla():
    q, k, v = arrays(6)
    for backend in ("cudnn", "splash"):
        with pytest.raises(ConfigError, match="one chunk in flight"):
            kernels.attend(kernels.Pattern(ChunkCausal(), CHUNKED, backend), q, k, v, cached=cached_parts((20, 7)))


@pytest.mark.parametrize("rows,columns", list(itertools.product((1, 3), (2, 4))))
def test_rows_that_see_nothing_give_zeros(rows, columns):
    q, k, v = arrays(columns, rows=rows)
    mask = np.zeros((1, columns, columns), bool)
    np.testing.assert_array_equal(
        kernels.attend(kernels.Pattern(ChunkCausal(), (chunk_layout(columns, 1),)), q, k, v, mask=mask), 0
    )
