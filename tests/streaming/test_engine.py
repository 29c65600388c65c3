"""The engine: one compilation each, no transfers, the cache in place; streams that equal clips;
snapshots; bad input.
"""

import gc
import logging
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import CONFIG, network, sampler
from vidar.attention.visibility import ChunkCausal, Window
from vidar.devices import host_resident_memory
from vidar.errors import ConfigError
from vidar.models.codecs.geometry import Geometry
from vidar.models.dit import TextConfig
from vidar.models.frames import Conditions
from vidar.models.layers import ContinuousActions, MultiBinaryActions
from vidar.sampling.guidance import classifier_free
from vidar.sampling.noise import session_keys
from vidar.sampling.solvers import FewStep
from vidar.streaming import Engine

STEPS = FewStep((1000.0, 500.0))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Floats(Geometry):
    """A codec whose pixels are the latents, so that streams are compared before rounding; it counts its frames."""

    channels: ClassVar[int] = 3
    patch: ClassVar[int] = 1
    frames_per_latent: ClassVar[int] = 1

    @property
    def config(self):
        return self

    def encode(self, pixels):
        return pixels.astype(jnp.float32) / 127.5 - 1.0

    def init_state(self, rows, height, width):
        return jnp.zeros((rows,), jnp.int32)

    def decode_chunk(self, state, latents):
        return state + latents.shape[1], latents, jnp.full((latents.shape[0],), latents.shape[1], jnp.int32)


def plan(**fields):
    return sampler(**(dict(frames=8, solver=STEPS, window=4, sink=1) | fields))


@pytest.fixture(scope="module")
def engine():
    """An engine for two sessions, compiled once for the module."""
    return Engine(plan(positions="relative"), Floats(), network(), rows=2)


def pixels(frames=1, rows=2):
    return np.random.default_rng(0).integers(0, 256, (rows, frames, 4, 4, 3), dtype=np.uint8)


def presses(ticks, rows=2, chunk=1):
    return np.random.default_rng(1).integers(0, 5, (ticks, rows, chunk)).astype(np.int32)


def streamed(engine, actions):
    return np.concatenate(list(engine.frames(iter(actions))), axis=1)


# -------------------------------------------------------------------------------------------------------- executables


def test_two_thousand_ticks_compile_nothing_transfer_nothing_and_keep_nothing(engine, caplog):
    """Each executable was compiled once, at warm-up; the guard allows explicit transfers alone."""
    assert sorted(kind for kind, _ in engine._compiled) == ["decode", "prefill", "tick"]
    assert sorted(engine.timing.compile) == ["decode", "prefill", "tick"]
    engine.open(seed=1, given=pixels())
    actions = presses(2000)
    for action in actions[:10]:
        engine.tick(action)
    engine.block()
    gc.collect()
    with jax.transfer_guard("disallow"), jax.log_compiles(), caplog.at_level(logging.DEBUG):
        for count, action in enumerate(actions[10:], start=10):
            frames = engine.tick(action)
            if count == 500:
                engine.block()
                arrays, memory = len(jax.live_arrays()), host_resident_memory()
        engine.block()
    assert not [record for record in caplog.records if "ompil" in record.getMessage()]
    with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
        jnp.add(frames, np.float32(1))
    assert len(engine._compiled) == 3
    assert len(jax.live_arrays()) <= arrays
    assert host_resident_memory() - memory < 4 * 2**20
    assert engine._state.cache.count.tolist() == [2001, 2001]
    assert engine._codec_state.tolist() == [2001, 2001]  # the given frame was decoded, too
    assert np.isfinite(np.asarray(frames)).all()


def test_sessions_open_under_the_transfer_guard(engine):
    with jax.transfer_guard("disallow"):
        engine.open(seed=2, given=pixels())
        engine.tick(presses(1)[0])
    assert engine._state.next_frame.tolist() == [2, 2]


def test_the_cache_is_updated_in_place():
    """A cache much larger than the activations: aliased, and never copied."""
    engine = Engine(plan(window=1025, sink=1), Floats(), network(), rows=1, compile_now=False)
    cache = engine._state.cache
    size = cache.keys.nbytes + cache.values.nbytes
    analysis = engine.lower().compile().memory_analysis()
    assert size > 2**21
    assert analysis.alias_size_in_bytes >= size
    assert analysis.temp_size_in_bytes < size / 2


def measured(engine, ticks=2000) -> tuple[float, float]:
    """Median seconds of ticks 50–150 and of the last hundred."""
    engine.open(seed=0, given=pixels())
    actions, seconds = presses(ticks), []
    for action in actions:
        start = time.perf_counter()
        engine.tick(action).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[50:150])), float(np.median(seconds[-100:]))


@pytest.mark.slow
@pytest.mark.timing
def test_ticks_do_not_slow_down(engine):
    """Half a minute on an idle machine; a busy one may fail it."""
    ratios = [late / early for early, late in (measured(engine) for _ in range(3))]
    assert 0.9 < float(np.median(ratios)) < 1.1, ratios


# ------------------------------------------------------------------------------------------------- streams and clips

CLIPS = {
    "ring": (dict(), 1),
    "relative positions": (dict(positions="relative"), 1),
    "chunks of two, from noise": (dict(window=4, sink=0, chunk=2), 0),
    "pipeline, fused": (dict(solver=FewStep((1000.0, 600.0, 300.0)), lag=1, commit="fused"), 2),
    "first frame": (dict(window=7, sink=1, chunk=3, first=True, frames=10), 1),
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_stream_equals_the_generated_clip(name):
    """Two executables of the same tick: exact in the first four chunks; rounding compounds after them."""
    fields, given = CLIPS[name]
    chosen = plan(**fields)
    engine = Engine(chosen, Floats(), network(), rows=2, compile_now=False)
    ticks = (chosen.frames - given) // chosen.chunk
    track = presses(ticks + chosen.program.delay, chunk=chosen.chunk)
    before = np.full((2, given), 3, np.int32)
    first = pixels(given) if given else None
    shown = engine.open(seed=5, given=first, actions=before if given else None)
    stream = streamed(engine, track)
    actions = jnp.concatenate([jnp.asarray(before), *jnp.asarray(track[:ticks])], axis=1)
    clip = jax.jit(lambda key_b, actions, latents: chosen.generate(
        network(), key_b, Conditions(actions=actions), chosen.frames, latents
    ))(session_keys(5, 2), actions, Floats().encode(jnp.asarray(first)) if given else None)  # fmt: skip
    if given:
        np.testing.assert_array_equal(shown, first)
    generated = clip[:, given:]
    scale = float(jnp.max(jnp.abs(generated)))
    early = 4 * chosen.chunk
    np.testing.assert_allclose(stream[:, :early], generated[:, :early], atol=1e-5 * scale)
    np.testing.assert_allclose(stream, generated, atol=1e-3 * scale)


def test_a_stream_goes_on_from_a_snapshot_bit_for_bit(engine):
    actions = presses(30)
    engine.open(seed=3, given=pixels())
    beginning = streamed(engine, actions[:12])
    snapshot = engine.snapshot()
    ending = streamed(engine, actions[12:])
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(snapshot))
    engine.open(seed=3, given=pixels())
    np.testing.assert_array_equal(streamed(engine, actions), np.concatenate([beginning, ending], axis=1))
    engine.open(seed=99, given=pixels())
    engine.restore(snapshot)
    np.testing.assert_array_equal(streamed(engine, actions[12:]), ending)
    assert engine._codec_state.tolist() == [31, 31]


def test_actions_and_seeds_act(engine):
    def run(seed, action):
        engine.open(seed=seed, given=pixels())
        return streamed(engine, [action] * 4)

    still = run(1, 0)
    np.testing.assert_array_equal(still, run(1, None))
    np.testing.assert_array_equal(still, run(1, np.zeros((2, 1), np.int32)))
    assert np.abs(run(1, 3) - still).max() > 1e-2
    assert np.abs(run(2, 0) - still).max() > 1e-2
    # Sessions count on from the seed: row 1 of seed 1 is row 0 of seed 2, where both start from the same frame.
    same = np.repeat(pixels(rows=1), 2, axis=0)
    engine.open(seed=1, given=same)
    one = streamed(engine, [0] * 4)
    engine.open(seed=2, given=same)
    np.testing.assert_array_equal(streamed(engine, [0] * 4)[0], one[1])


@pytest.mark.parametrize("ahead", [0, 1])
def test_frames_are_handed_out_at_once_or_a_tick_later(engine, ahead):
    engine.open(seed=1, given=pixels())
    asked = []
    stream = engine.frames((asked.append(action) or action for action in range(4)), ahead)
    for count in range(4):
        next(stream)
        assert len(asked) == min(4, count + 1 + ahead)
    assert list(stream) == []


def test_pictures_of_a_stream_do_not_change_afterwards(engine):
    """Donated state is written in place; what was handed out is not part of it."""
    engine.open(seed=1, given=pixels())
    first = engine.tick(1)
    copy = np.array(first)
    for action in presses(5):
        engine.tick(action)
    np.testing.assert_array_equal(first, copy)


def test_warm_up_leaves_no_trace():
    chosen = plan(window=2, sink=0, frames=2)
    cold = Engine(chosen, Floats(), network(), rows=1, compile_now=False)
    warm = Engine(chosen, Floats(), network(), rows=1)
    assert cold.timing.compile == {}
    assert warm._codec_state.tolist() == [0]
    assert min(warm.timing.compile.values()) > 0
    assert warm.timing.warm_up > 0
    np.testing.assert_array_equal(streamed(warm, [1, 2]), streamed(cold, [1, 2]))


def test_text_and_kinds_of_actions():
    text = np.random.default_rng(0).normal(size=(1, 6, 10)).astype(np.float32)
    config = replace(CONFIG, text=TextConfig(width=10, length=6), actions=ContinuousActions(2))
    engine = Engine(plan(window=2, sink=0), Floats(), network(config), text=text, compile_now=False)
    one, other = streamed(engine, [np.float32([0.5, -1]), np.float32([2, 0])])[0]
    assert np.abs(one - other).max() > 1e-2
    silent = Engine(plan(window=2, sink=0), Floats(), network(config), text=0 * text, compile_now=False)
    assert np.abs(streamed(silent, [np.float32([0.5, -1])])[0, 0] - one).max() > 1e-2


def test_dropped_text_may_have_states_of_its_own():
    text, negative = np.random.default_rng(0).normal(size=(2, 1, 6, 10)).astype(np.float32)
    model = network(replace(CONFIG, text=TextConfig(width=10, length=6), actions=None))
    guided = replace(plan(window=2, sink=0), guidance=classifier_free(3.0, ("text",)))

    def first(**said):
        return streamed(Engine(guided, Floats(), model, text=text, compile_now=False, **said), [None])[0, 0]

    np.testing.assert_allclose(first(negative=0 * text), first(), atol=1e-5)
    assert np.abs(first(negative=negative) - first()).max() > 1e-2
    # Away from itself, it is where it was.
    plain = Engine(plan(window=2, sink=0), Floats(), model, text=text, compile_now=False)
    np.testing.assert_allclose(first(negative=text), streamed(plain, [None])[0, 0], atol=1e-4)


def test_classes_of_sessions_are_those_of_clips_and_stay_with_snapshots():
    model, chosen = network(replace(CONFIG, classes=3)), plan(frames=5)
    engine = Engine(chosen, Floats(), model, rows=2, compile_now=False)
    track, label = presses(4), np.int32([2, 0])
    engine.open(seed=5, given=pixels(), label=label)
    beginning, snapshot = streamed(engine, track[:2]), engine.snapshot()
    stream = np.concatenate([beginning, streamed(engine, track[2:])], axis=1)
    actions = jnp.concatenate([jnp.zeros((2, 1), jnp.int32), *jnp.asarray(track)], axis=1)
    clip = jax.jit(lambda key_b, conditions, latents: chosen.generate(model, key_b, conditions, 5, latents))(
        session_keys(5, 2),
        Conditions(actions=actions, label=jnp.asarray(label)),
        Floats().encode(jnp.asarray(pixels())),
    )
    np.testing.assert_allclose(stream, clip[:, 1:], atol=1e-5 * float(jnp.max(jnp.abs(clip))))
    engine.open(seed=5, given=pixels(), label=2)
    both = streamed(engine, track)
    np.testing.assert_array_equal(both[0], stream[0])
    assert np.abs(both[1] - stream[1]).max() > 1e-2
    engine.restore(snapshot)
    np.testing.assert_array_equal(streamed(engine, track[2:]), stream[:, 2:])


# ----------------------------------------------------------------------------------------------------------- bad input


def test_plans_that_cannot_be_streamed_are_refused():
    endless = dict(rows=1, compile_now=False)
    with pytest.raises(ConfigError, match="lag=0 generates whole clips"):
        Engine(plan(lag=0), Floats(), network(), **endless)
    with pytest.raises(ConfigError, match="needs a window"):
        Engine(plan(window=None, sink=0), Floats(), network(), **endless)
    texted = network(replace(CONFIG, text=TextConfig(width=10, length=6)))
    for text in (None, np.zeros((2, 6, 10), np.float32)):
        with pytest.raises(ConfigError, match=r"text states \[1, s, c\]"):
            Engine(plan(), Floats(), texted, text=text, **endless)
    with pytest.raises(ConfigError, match="exactly where model.text is set"):
        Engine(plan(), Floats(), network(), text=np.zeros((1, 6, 10), np.float32), **endless)


@pytest.mark.parametrize(
    "given",
    [
        *(pixels(rows=1), pixels()[:, :, :3], pixels()[:, 0], pixels()[..., :1]),
        *(np.zeros((2, 1, 8, 8, 3), np.uint8), pixels()[:, :0]),
    ],
    ids=["rows", "height", "frames", "channels", "size", "none"],
)
def test_given_frames_of_the_wrong_size_are_refused(engine, given):
    engine.open(seed=1, given=pixels())
    before = engine.snapshot()
    with pytest.raises(ConfigError, match=r"should be \[2, frames, 4, 4, 3\]"):
        engine.open(given=given)
    with pytest.raises(ConfigError, match="should be uint8 pixels"):
        engine.open(given=pixels().astype(np.float32))
    for kept, found in zip(before["state"], engine.snapshot()["state"], strict=True):
        np.testing.assert_array_equal(kept, found)


def test_seeds_are_whole_numbers(engine):
    with pytest.raises(ConfigError, match="seed='x' must be a whole number"):
        engine.open(seed="x", given=pixels())


def test_given_frames_that_are_not_whole_chunks_are_refused():
    engine = Engine(plan(window=4, sink=2, chunk=2), Floats(), network(), rows=1, compile_now=False)
    with pytest.raises(ConfigError, match="3 given frames are not whole chunks of 2"):
        engine.open(given=pixels(3, rows=1))
    first = Engine(plan(window=7, chunk=3, first=True, frames=7), Floats(), network(), rows=1, compile_now=False)
    with pytest.raises(ConfigError, match="give the first frame"):
        first.open()


@pytest.mark.parametrize("label", [3, -1, True, 1.0, "ball", [0], [[0, 1]], [0, 1, 2]])
def test_wrong_classes_are_refused(label):
    engine = Engine(plan(), Floats(), network(replace(CONFIG, classes=3)), rows=2, compile_now=False)
    with pytest.raises(ConfigError, match=r"should be the class of each of 2 videos: 0 … 2"):
        engine.open(given=pixels(), label=label)
    with pytest.raises(ConfigError, match=r"give a label \(--label\), 0 … 2"):
        engine.open(given=pixels())


def test_classes_for_a_network_without_are_refused(engine):
    with pytest.raises(ConfigError, match="model.classes is not set"):
        engine.open(given=pixels(), label=0)


@pytest.mark.parametrize(
    "actions",
    [
        *(np.zeros((2, 2), np.int32), np.zeros((3, 1), np.int32), np.zeros(3, np.int32), np.zeros((2, 1, 1), np.int32)),
        *(5, -1, 2**40, 1.7, np.nan, "left"),
    ],
)
def test_wrong_actions_are_refused(engine, actions):
    engine.open(given=pixels())
    with pytest.raises(ConfigError, match="actions .* should be"):
        engine.tick(actions)


def test_actions_for_a_network_without_and_of_other_kinds_are_refused():
    deaf = Engine(plan(), Floats(), network(replace(CONFIG, actions=None)), compile_now=False)
    with pytest.raises(ConfigError, match="takes none"):
        deaf.tick(1)
    buttons = Engine(plan(), Floats(), network(replace(CONFIG, actions=MultiBinaryActions(3))), compile_now=False)
    with pytest.raises(ConfigError, match=r"\(2,\) should be \(1, 1, 3\)"):
        buttons.tick([True, False])


def test_snapshots_of_other_engines_are_refused(engine):
    other = Engine(plan(window=3), Floats(), network(), rows=2, compile_now=False)
    fewer = Engine(plan(), Floats(), network(), rows=1, compile_now=False)
    for foreign in (other, fewer):
        with pytest.raises(ConfigError, match="same model, window and number of sessions"):
            engine.restore(foreign.snapshot())
    for nothing in ({}, None):
        with pytest.raises(ConfigError, match="no snapshot"):
            engine.restore(nothing)
    assert plan().visibility == ChunkCausal() & Window(4, 1)
