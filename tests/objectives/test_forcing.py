"""Where a student's videos come from: exits, gradients, long rollouts, hidden first chunks, parallel passes."""

import functools
import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import network
from tests.objectives.parts import TEXT, Watched, axes, batch
from vidar.attention.cache import init_cache, write
from vidar.attention.visibility import TeacherForcing as TeacherForcingPattern
from vidar.attention.visibility import chunk_layout
from vidar.diffusion import flow
from vidar.errors import ConfigError
from vidar.models.frames import Conditions, Frames
from vidar.objectives import targets
from vidar.objectives.forcing import DiffusionForcing, SelfForcing, TeacherForcing
from vidar.sampling.flight import Gradient
from vidar.sampling.noise import Purpose, frame_noise
from vidar.sampling.solvers import FewStep

STEPS = FewStep((1000.0, 600.0, 300.0))
AXES = axes(frames=6, chunk=2, solver=STEPS, window=6)
MODEL = network(TEXT)
KEY = jax.random.key(5)


def keys(data):
    return targets.fold_each(targets.clip_keys(KEY, data.index), 0)


def rolled(forcing, exits, axis=AXES, data=None, skipped=0, model=MODEL):
    data = batch(frames=6) if data is None else data
    return forcing.rollout(model, data, axis, keys(data), jnp.asarray(exits, jnp.int32), jnp.int32(skipped))


@functools.cache
def frozen_video(skipped=0):
    return np.asarray(jax.jit(lambda: rolled(SelfForcing(), (1, 1, 1), skipped=skipped))())


# -------------------------------------------------------------------------------------------------------------- exits


def test_chunks_may_exit_at_rows_of_their_own():
    """What was emitted before the rows part is the same, and what comes after is not."""
    video = jax.jit(lambda: rolled(SelfForcing(), (1, 0, 1)))()
    np.testing.assert_allclose(video[:, :2], frozen_video()[:, :2], atol=1e-5)
    assert float(jnp.max(jnp.abs(video[:, 2:4] - frozen_video()[:, 2:4]))) > 1e-2


@pytest.mark.parametrize("choice", ["shared", "per_chunk"])
def test_exit_rows_are_drawn_for_all_chunks_or_for_each(monkeypatch, choice):
    drawn, video = [], frozen_video()
    monkeypatch.setattr(SelfForcing, "rollout", lambda self, *arguments: drawn.append(arguments[4]) or video)
    for number in range(40):
        SelfForcing(exit=choice).generate(MODEL, batch(frames=6), AXES, jax.random.key(number), None)
    rows = np.stack(drawn)
    assert rows.shape == (40, 3)
    assert set(rows.ravel()) == {0, 1, 2}
    assert (rows == rows[:, :1]).all() == (choice == "shared")


# ----------------------------------------------------------------------------------------------------------- gradient


def written_out(student, data, exits, passes, through):
    """The rollout as a plain loop: which passes are live, and what the context's gradient is."""
    plan, frozen, total = AXES.sampler, jax.lax.stop_gradient(student), 0.0
    table = jnp.asarray(STEPS.levels, jnp.float32)
    cache = init_cache(plan.geometry, layers=3, rows=2, heads=2, head_dim=24, dtype=jnp.float32)
    weights = jax.random.normal(jax.random.key(8), (3, 2, 2, *plan.latent))

    def noise(purpose, step, start):
        frames = jnp.broadcast_to(jnp.arange(start, start + 2, dtype=jnp.int32)[None], (2, 2))
        return frame_noise(keys(data), purpose, frames, jnp.full((2,), step, jnp.int32), plan.latent)

    for chunk, last in enumerate(exits):
        start = 2 * chunk
        past = cache if through else jax.lax.stop_gradient(cache)

        def predict(model, x, level, start=start, past=past):
            stream = Frames(x, jnp.full((2, 2), level), chunk_layout(2, 2), start=jnp.full((2,), start, jnp.int32))
            conditions = data.conditions.frames(start, start + 2)
            output = model((stream,), conditions, visibility=plan.visibility, cache=past)
            return x - level * output.predictions[0], output

        x = noise(Purpose.INITIAL, 0, start)
        for row in range(last):
            live = last - row < passes
            clean, _ = predict(student if live else frozen, x, table[row])
            clean = clean if live else jax.lax.stop_gradient(clean)
            x = (1 - table[row + 1]) * clean + table[row + 1] * noise(Purpose.RENOISE, row + 1, start)
        clean, output = predict(student, x, table[last])
        total += jnp.sum(weights[chunk] * clean)
        _, commit = predict(frozen, jax.lax.stop_gradient(clean), jnp.float32(0))
        commit, live = jax.lax.stop_gradient((commit.keys, commit.values)), (output.keys, output.values)
        if through:
            commit = [value + exit - jax.lax.stop_gradient(exit) for value, exit in zip(commit, live, strict=True)]
        cache = write(cache, *commit)
    return total


@pytest.mark.parametrize(
    "exits, gradient",
    [((2, 2, 2), Gradient(passes=2)), ((0, 2, 1), Gradient(passes=3)), ((1, 1, 1), Gradient(through_cache=True))],
    ids=["two passes", "three passes, some exits earlier", "through the cache"],
)
def test_gradient_against_a_plain_loop(exits, gradient):
    data = batch(frames=6)
    weights = jax.random.normal(jax.random.key(8), (3, 2, 2, *AXES.sampler.latent))
    weights = jnp.concatenate(list(weights), axis=1)

    def ours(model):
        return jnp.sum(weights * rolled(SelfForcing(gradient=gradient), exits, data=data, model=model))

    def theirs(model):
        return written_out(model, data, exits, gradient.passes, gradient.through_cache)

    (value, found), (expected_value, expected) = jax.jit(
        lambda model: (jax.value_and_grad(ours)(model), jax.value_and_grad(theirs)(model))
    )(MODEL)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-4)
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = max(float(jnp.max(jnp.abs(right))), 1e-6)
        np.testing.assert_allclose(left, right, atol=2e-4 * scale, err_msg=jax.tree_util.keystr(path))


def test_offloading_moves_contexts_to_the_host_and_changes_nothing():
    data = batch(frames=6)

    def gradient(offload):
        def loss(model):
            forcing = SelfForcing(gradient=Gradient(passes=2, offload=offload))
            return jnp.sum(rolled(forcing, (2, 2, 2), data=data, model=model))

        traced = jax.jit(jax.grad(loss)).trace(MODEL)
        return str(traced.jaxpr).lower(), jax.tree.leaves(traced.lower().compile()(MODEL))

    (plain, kept), (moving, waited) = gradient(False), gradient(True)
    # Keys and values, one rollout's all at once; no counts, which TPUs cannot stack there.
    assert set(re.findall(r"\w+<host>\[[\d,]*\]", moving)) == {"f32<host>[3,2,16,2,24]", "f32<host>[3,3,2,16,2,24]"}
    assert "host" not in plain
    for one, other in zip(kept, waited, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * float(jnp.abs(one).max()))


# ------------------------------------------------------------------------------------------- long rollouts, first chunk


LONG = SelfForcing(given=1, frames=12)
LONG_AXES = axes(frames=6, chunk=2, solver=STEPS, window=4)


@pytest.mark.parametrize("skipped", [0, 2])
def test_a_clip_of_a_long_rollout_continues_it(skipped):
    """What precedes the clip is plain generation; the clip is the exit form of the frames that follow."""
    data, plan = batch(frames=12), LONG_AXES.sampler

    @jax.jit
    def ours():
        return rolled(LONG, (2, 2), LONG_AXES, data, skipped)

    @jax.jit
    def whole():
        # Exits at the last row are plain generation.
        return plan.generate(MODEL, keys(data), data.conditions, 12, data.latents[:, :2])

    np.testing.assert_allclose(ours(), whole()[:, 2 * skipped :][:, :6], atol=2e-4)


def test_clips_of_long_rollouts_begin_anywhere_and_bring_their_conditions():
    data = batch(frames=12)
    starts = set()

    @jax.jit
    def run(key):
        generated = LONG.generate(MODEL, data, LONG_AXES, key, keys(data))
        return generated.start, generated.conditions.actions

    for number in range(12):
        start, actions = run(jax.random.key(number))
        starts.add(int(start))
        np.testing.assert_array_equal(actions, data.conditions.actions[:, int(start) :][:, :6])
    assert starts == {0, 2, 4, 6}


def test_only_the_clip_is_differentiated():
    """What was generated before it, and is shown with it, is constant."""
    data = batch(frames=12)

    def loss(model):
        return jnp.sum(rolled(LONG, (1, 1), LONG_AXES, data, 3, model)[:, :2])

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(MODEL)):
        np.testing.assert_array_equal(leaf, 0)


def test_the_last_chunk_does_not_see_the_first():
    """Given frames reach the last chunk through others only: with nothing between, not at all."""
    forcing, axis = SelfForcing(given=1, last_without_first=True), axes(frames=6, chunk=2, solver=FewStep((1000.0,)))
    data = batch(frames=6)
    other = replace(data, latents=data.latents.at[:, :2].add(1.0))

    def moved(forcing):
        videos = [np.asarray(jax.jit(lambda data: rolled(forcing, (0, 0), axis, data))(one)) for one in (data, other)]
        return np.abs(videos[1] - videos[0]).reshape(2, 3, -1).max(axis=(0, 2))

    hidden, seen = moved(forcing), moved(replace(forcing, last_without_first=False))
    np.testing.assert_allclose(hidden[1], seen[1], rtol=1e-4)
    assert hidden[2] > 0  # through the second chunk's features
    assert not np.isclose(hidden[2], seen[2], rtol=1e-2)


# ----------------------------------------------------------------------------------------------------------- parallel


@pytest.mark.parametrize("forcing", [DiffusionForcing(given=1), TeacherForcing(given=1)], ids=["diffusion", "teacher"])
def test_parallel_videos_are_clean_predictions_at_solver_levels(forcing):
    beside = isinstance(forcing, TeacherForcing)
    axis = axes(TeacherForcingPattern(), frames=6, chunk=2, solver=STEPS) if beside else AXES
    data, seen = batch(frames=6), []

    class Student:
        config = MODEL.config

        def __call__(self, streams, conditions, *, visibility):
            seen.append((streams, visibility))
            return MODEL(streams, conditions, visibility=visibility)

    generated = forcing.generate(Student(), data, axis, KEY, keys(data))
    ((streams, visibility),) = seen
    noisy = streams[-1]
    assert visibility == axis.visibility
    assert len(streams) == 1 + beside
    if beside:
        np.testing.assert_array_equal(streams[0].latents, data.latents)
        np.testing.assert_array_equal(streams[0].level, 0)
    assert set(np.unique(noisy.level)) <= set(np.float32(STEPS.levels).tolist())
    np.testing.assert_array_equal(noisy.level[:, :2], 0)
    np.testing.assert_array_equal(generated.video[:, :2], data.latents[:, :2])
    np.testing.assert_array_equal(noisy.level[:, 2], noisy.level[:, 3])
    prediction = MODEL(streams, data.conditions, visibility=visibility).predictions[-1]
    np.testing.assert_allclose(
        generated.video, noisy.latents - np.asarray(noisy.level)[:, :, None, None, None] * prediction, atol=1e-4
    )
    np.testing.assert_array_equal(generated.counts, [False, False, True, True, True, True])


def test_every_chunk_is_trained_at_every_level_of_the_solver_and_at_the_clean_end():
    seen = Watched(lambda latents, level: jnp.zeros_like(latents))
    data = replace(batch(rows=240, frames=6), conditions=Conditions())
    DiffusionForcing().generate(seen, data, AXES, KEY, keys(data))
    ((streams, _),) = seen.calls
    for chunk in np.asarray(streams[0].level)[:, ::2].T:
        found, counts = np.unique(chunk, return_counts=True)
        np.testing.assert_allclose(found, np.sort(STEPS.levels), atol=1e-6)
        assert counts.min() >= 40


@partial(jax.tree_util.register_dataclass, data_fields=["network"], meta_fields=["seen"])
@dataclass(frozen=True)
class Noted:
    """A network that keeps what it was shown without a cache."""

    network: Any
    seen: list = field(default_factory=list, hash=False, compare=False)

    @property
    def config(self):
        return self.network.config

    @property
    def encode_conditioning(self):
        return self.network.encode_conditioning

    def __call__(self, streams, conditions, *, visibility, cache=None):
        if cache is None:
            self.seen[:] = streams
        return self.network(streams, conditions, visibility=visibility, cache=cache)


def shown(forcing, data, axis=AXES):
    """What is generated, and the clips that the network was shown for it; the noised ones are last."""
    student = Noted(MODEL)
    generated = forcing.generate(student, data, axis, KEY, keys(data))
    return generated, tuple(student.seen)


@pytest.mark.parametrize("kind, given", [(DiffusionForcing, 0), (TeacherForcing, 1)], ids=["diffusion", "teacher"])
def test_simulated_clips_are_states_of_rollouts(kind, given):
    """The state at a row is the noised clean prediction of the row before, after chunks that were finished."""
    forcing, data = kind(given=given, simulated=True), batch(frames=6)
    axis = axes(TeacherForcingPattern(), frames=6, chunk=2, solver=STEPS) if kind is TeacherForcing else AXES
    generated, (*beside, noisy) = jax.jit(lambda: shown(forcing, data, axis))()
    session = targets.fold_each(keys(data), 1)
    exit_at = jax.jit(lambda rows: SelfForcing(given=given).rollout(MODEL, data, axis, session, rows, jnp.int32(0)))
    exits = {
        (chunk, row): np.asarray(exit_at(jnp.full(3, 2).at[chunk].set(row)[given:]))
        for chunk, row in np.ndindex(3, 3)
        if chunk >= given
    }
    met = [set(), set()]
    for clip, frame in np.ndindex(2, 6):
        level, chunk = float(noisy.level[clip, frame]), frame // 2
        row = int(np.argmin(np.abs(np.asarray(STEPS.levels) - level)))
        if chunk < given:
            assert level == 0
            np.testing.assert_allclose(noisy.latents[clip, frame], data.latents[clip, frame], atol=1e-6)
            continue
        met[clip].add(row)
        purpose = Purpose.RENOISE if row else Purpose.INITIAL
        noise = frame_noise(session[clip][None], purpose, jnp.array([[frame]]), jnp.array([row]), AXES.sampler.latent)
        clean = exits[chunk, row - 1][clip, frame] if row else 0.0
        np.testing.assert_allclose(noisy.latents[clip, frame], (1 - level) * clean + level * noise[0, 0], atol=1e-5)
    # After clean chunks, a clip has one row; otherwise each chunk its own, and the last row is clean.
    assert met == [{0}, {2}] if kind is TeacherForcing else set.union(*met) >= {0, 1, 3}
    for clean in beside:
        np.testing.assert_allclose(clean.latents[:, 2 * given :], exits[2, 2][:, 2 * given :], atol=1e-5)
        np.testing.assert_array_equal(clean.level, 0)
    assert len(beside) == (kind is TeacherForcing)
    np.testing.assert_allclose(generated.video[:, : 2 * given], data.latents[:, : 2 * given], atol=1e-6)
    assert forcing.needs_clips == bool(given)


def test_a_simulation_needs_one_chunk_in_flight():
    diagonal = replace(AXES, sampler=replace(AXES.sampler, lag=1))
    with pytest.raises(ConfigError, match="one chunk in flight: lag = steps"):
        DiffusionForcing(simulated=True).generate(MODEL, batch(frames=6), diagonal, KEY, keys(batch(frames=6)))


def test_nothing_is_learned_through_the_simulation():
    data, forcing = batch(frames=6), DiffusionForcing(simulated=True)
    _, (noisy,) = jax.jit(lambda: shown(forcing, data))()

    def ours(model):
        return jnp.sum(jnp.square(forcing.generate(model, data, AXES, KEY, keys(data)).video))

    def theirs(model):
        velocity = model((noisy,), data.conditions, visibility=AXES.visibility).predictions[-1]
        return jnp.sum(jnp.square(flow.to_x0("v", velocity, noisy.latents, noisy.level)))

    found, expected = jax.jit(lambda model: (jax.grad(ours)(model), jax.grad(theirs)(model)))(MODEL)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4 * max(float(jnp.max(jnp.abs(right))), 1e-6))
