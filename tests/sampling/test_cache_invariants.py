"""Cached ticks against one forward over the whole sequence: append, ring, sink, first frame, positions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import CONFIG, clip, network, pattern, sampler
from vidar.attention import kernels, rope
from vidar.attention.cache import ContextConfig, Geometry, init_cache, slot_tokens, write
from vidar.attention.visibility import chunk_layout
from vidar.errors import ConfigError
from vidar.models.frames import Frames

CASES = {
    "append": dict(chunk=1),
    "append, chunk 2": dict(chunk=2),
    "ring": dict(chunk=1, window=3),
    "ring, chunk 2": dict(chunk=2, window=4),
    "sink": dict(chunk=1, window=4, sink=1),
    "sink, chunk 2": dict(chunk=2, window=6, sink=2),
    "first frame, sink": dict(chunk=3, window=7, sink=1, first=True, frames=10),
    "first frame, no ring behind it": dict(chunk=3, window=4, sink=1, first=True, frames=10),
    "window is the chunk": dict(chunk=2, window=2),
}


def whole_pass(model, latents, conditions, chunk, window, sink, first=False):
    """Predictions of one forward over the clean sequence under the same visibility."""
    rows, frames = latents.shape[:2]
    layout = chunk_layout(frames, chunk, independent_first_frame=first)
    stream = Frames(latents, jnp.zeros((rows, frames)), layout)
    return model((stream,), conditions, visibility=pattern(window, sink)).predictions[0]


def cached_pass(model, plan, latents, conditions):
    """Predictions of clean chunks read through the cache, chunk by chunk, committing each."""
    rows, frames = latents.shape[:2]
    state = plan.init(model, jax.vmap(jax.random.key)(jnp.arange(rows)), actions=conditions.actions)
    cache, outputs, start = state.cache, [], 0

    @jax.jit
    def step(cache, part, actions, start_b):
        layout = chunk_layout(part.shape[1], part.shape[1])
        stream = Frames(part, jnp.zeros(part.shape[:2]), layout, start=start_b)
        output = model((stream,), replace(conditions, actions=actions), visibility=plan.visibility, cache=cache)
        return output.predictions[0], write(cache, output.keys, output.values)

    while start < frames:
        size = 1 if plan.first and start == 0 else plan.chunk
        part = slice(start, start + size)
        prediction, cache = step(
            cache, latents[:, part], conditions.actions[:, part], jnp.full((rows,), start, jnp.int32)
        )
        outputs.append(prediction)
        start += size
    return jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize("name", CASES)
def test_cached_chunks_equal_one_forward_over_the_whole_sequence(name):
    case = CASES[name]
    plan = sampler(**case)
    model = network()
    latents, conditions = clip(frames=plan.frames)
    ours = cached_pass(model, plan, latents, conditions)
    theirs = whole_pass(
        model, latents, conditions, plan.chunk, plan.context.window, plan.context.sink, case.get("first", False)
    )
    scale = float(jnp.max(jnp.abs(theirs)))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)


def test_a_window_changes_the_result():
    """The comparison above would not notice a ring that kept everything; this one does."""
    model = network()
    latents, conditions = clip()
    windowed = whole_pass(model, latents, conditions, 1, 3, 0)
    full = whole_pass(model, latents, conditions, 1, None, 0)
    assert float(jnp.max(jnp.abs(windowed[:, :3] - full[:, :3]))) < 1e-5
    assert float(jnp.max(jnp.abs(windowed[:, 3:] - full[:, 3:]))) > 1e-2


def test_eviction_trace_of_the_reference():
    """Self Forcing's rolling cache, window 4, sink 1: frame 5 attends {1, 3, 4, 5}, frame 7 {1, 5, 6, 7}."""
    cache = init_cache(Geometry(3, 1, 1, 1), layers=1, rows=1, heads=1, head_dim=2, dtype=jnp.float32)
    seen = {}
    for frame in range(1, 9):
        slots = slot_tokens(cache)
        seen[frame] = {int(f) + 1 for f, w in zip(slots.frame[0], slots.written[0], strict=True) if w} | {frame}
        stored = {int(x) for x in cache.keys[0, 0, : int(cache.filled[0]), 0, 0]} | {frame}
        assert stored == seen[frame]
        value = jnp.full((1, 1, 1, 1, 2), float(frame))
        cache = write(cache, value, value)
    assert seen[4] == {1, 2, 3, 4}
    assert seen[5] == {1, 3, 4, 5}
    assert seen[7] == {1, 5, 6, 7}


def test_writes_of_inactive_rows_and_rows_in_step():
    keys = jax.random.normal(jax.random.key(0), (2, 3, 4, 1, 2))
    cache = init_cache(Geometry(3, 4), layers=2, rows=3, heads=1, head_dim=2, dtype=jnp.float32)
    active = jnp.asarray([True, False, True])
    first = write(cache, keys, keys, active)
    assert first.count.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(first.keys[:, 1], 0)
    np.testing.assert_array_equal(first.keys[:, 0, :4], keys[:, 0])
    second = write(first, 2 * keys, 2 * keys)
    assert second.count.tolist() == [2, 1, 2]
    np.testing.assert_array_equal(second.keys[:, 1, :4], 2 * keys[:, 1])
    np.testing.assert_array_equal(second.keys[:, 2, 4:8], 2 * keys[:, 2])
    together = init_cache(Geometry(3, 4), layers=2, rows=3, heads=1, head_dim=2, dtype=jnp.float32, in_step=True)
    together = write(write(together, keys, keys), 2 * keys, 2 * keys)
    assert int(together.count) == 2
    np.testing.assert_array_equal(together.keys[:, :, 4:8], 2 * keys)


@pytest.mark.parametrize(
    "fields,chunk,first",
    [
        (dict(window=5, sink=1), 2, False),
        (dict(window=5), 3, False),
        (dict(window=2), 3, False),
        (dict(window=7, sink=2), 3, True),
        (dict(sink=1), 1, False),
        (dict(positions="sideways"), 1, False),
    ],
)
def test_rings_that_would_wrap_are_refused(fields, chunk, first):
    with pytest.raises(ConfigError, match="context"):
        ContextConfig(**fields).check(chunk, first)


@pytest.mark.parametrize("window,sink,chunk,first", [(6, 2, 2, False), (7, 1, 3, True), (3, 0, 1, False)])
def test_rings_that_align_are_accepted_and_never_wrap(window, sink, chunk, first):
    ContextConfig(window, sink).check(chunk, first)
    geometry = Geometry(window - chunk, 1, chunk, sink, first)
    cache = init_cache(geometry, layers=1, rows=1, heads=1, head_dim=2)
    size = 1 if first else chunk
    for _ in range(12):
        assert int(cache.slot[0]) + size <= geometry.capacity
        block = jnp.zeros((1, 1, size, 1, 2))
        cache = write(cache, block, block)
        size = chunk


# --------------------------------------------------------------------------------------------------------- positions


def test_phases_are_exact_far_out():
    frames = np.asarray([0, 1, 255, 256, 1024, 65_535, 9_999_999, 10_000_000, 2**24 - 1])
    cosine, sine = rope.frame_phases(jnp.asarray(frames, jnp.int32), 1e4, 44)
    angle = frames[:, None].astype(np.float64) * 1e4 ** (-np.arange(0, 44, 2) / 44)
    np.testing.assert_allclose(cosine, np.cos(angle), atol=5e-7)
    np.testing.assert_allclose(sine, np.sin(angle), atol=5e-7)


def test_a_clip_far_from_the_start_gives_the_same_prediction():
    """Absolute positions only enter as differences."""
    model = network()
    latents, conditions = clip()
    layout = chunk_layout(8, 1)

    def run(start):
        start_b = jnp.full((2,), start, jnp.int32)
        stream = Frames(latents, jnp.zeros((2, 8)), layout, start=start_b)
        return model((stream,), conditions, visibility=pattern()).predictions[0]

    near, far = run(0), run(10_000_000)
    np.testing.assert_allclose(near, far, atol=1e-5 * float(jnp.max(jnp.abs(near))))


def test_relative_positions_equal_a_dense_reference_that_rotates_keys_per_query():
    """One attention layer: sink keys stand right before the ring for every query chunk, wherever the stream is."""
    window, sink, frames, per_frame, heads, head_dim = 4, 2, 9, 2, 1, 12
    config = rope.RopeConfig()
    q, k, v = (
        jax.random.normal(key, (1, frames * per_frame, heads, head_dim))
        for key in jax.random.split(jax.random.key(5), 3)
    )

    def turned(x, frame_f):
        return rope.rotate(x, rope.phases(jnp.asarray([frame_f], jnp.int32), 1, per_frame, head_dim, config))

    from vidar.attention.cache import key_parts

    geometry = Geometry(window - 1, per_frame, 1, sink, relative=True)
    cache = init_cache(geometry, layers=1, rows=1, heads=heads, head_dim=head_dim, dtype=jnp.float32)
    for frame in range(frames):
        own = slice(frame * per_frame, (frame + 1) * per_frame)
        query, key = turned(q[:, own], [frame]), turned(k[:, own], [frame])
        past = key_parts(cache, cache.keys[0], cache.values[0], config, None)
        ours = kernels.attend_xla(query, (kernels.Keys(key, v[:, own]), *past), 1)
        visible = [f for f in range(frame + 1) if f < sink or f > frame - (window - sink)]
        places = [frame - (len(visible) - 1) + i for i in range(len(visible))]
        index = [f * per_frame + t for f in visible for t in range(per_frame)]
        keys = turned(k[:, np.asarray(index)], places)
        theirs = kernels.attend_xla(query, (kernels.Keys(keys, v[:, np.asarray(index)]),), 1)
        np.testing.assert_allclose(ours, theirs, atol=5e-6, err_msg=f"frame {frame}")
        cache = write(cache, key[None], v[None, :, own])


def test_relative_positions_are_absolute_ones_until_something_is_evicted():
    model = network()
    latents, conditions = clip()
    absolute = cached_pass(model, sampler(window=4, sink=1), latents, conditions)
    relative = cached_pass(model, sampler(window=4, sink=1, positions="relative"), latents, conditions)
    np.testing.assert_allclose(absolute[:, :4], relative[:, :4], atol=1e-5 * float(jnp.max(jnp.abs(absolute))))
    assert float(jnp.max(jnp.abs(absolute[:, 5:] - relative[:, 5:]))) > 1e-3


def test_cached_pass_differs_with_other_parameters():
    """Guard: the invariants are not satisfied by a network that ignores its context."""
    latents, conditions = clip()
    model = network()
    changed = latents.at[:, 0].add(1.0)
    before = cached_pass(model, sampler(), latents, conditions)
    after = cached_pass(model, sampler(), changed, conditions)
    assert float(jnp.max(jnp.abs(before[:, -1] - after[:, -1]))) > 1e-3
    assert CONFIG.layers > 1
