"""Ticks through the cache against whole-clip iterations without one, for every plan; sessions, limits, determinism."""

import functools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import CONFIG, LATENT, clip, network, pattern, sampler
from tests.sampling import reference
from tests.sampling.reference import keys
from vidar.attention.visibility import Bidirectional, chunk_layout
from vidar.diffusion.plan import Commit
from vidar.errors import ConfigError
from vidar.models.frames import Conditions, Frames
from vidar.sampling.noise import Purpose, frame_noise, session_keys
from vidar.sampling.solvers import DPMPlusPlus, Euler, FewStep, UniPC

STEPS = FewStep((1000.0, 600.0, 300.0))
# Name: fields of the sampler, frames that are given. Three solver steps unless said otherwise.
PLANS = {
    "chunk after chunk": (dict(), 0),
    "chunk after chunk, fused": (dict(commit="fused"), 0),
    "chunk after chunk, last step": (dict(commit="last_step"), 0),
    "lag 2": (dict(lag=2), 0),
    "lag 2, fused": (dict(lag=2, commit="fused"), 0),
    "lag 1": (dict(lag=1), 0),
    "lag 1, fused": (dict(lag=1, commit="fused"), 0),
    "lag 1, last step": (dict(lag=1, commit="last_step"), 0),
    "lag 0": (dict(lag=0), 0),
    "lag 0, first frame, bidirectional": (
        dict(lag=0, frames=7, chunk=3, first=True, solver=Euler(5, shift=3.0), visibility=Bidirectional()),
        0,
    ),
    "UniPC": (dict(solver=UniPC(4)), 0),
    "UniPC, lag 2, fused": (dict(solver=UniPC(4), lag=2, commit="fused"), 0),
    "DPM++, ring, sink, chunk 2, lag 2": (dict(solver=DPMPlusPlus(4), window=6, sink=2, chunk=2, lag=2), 0),
    "DPM++, lag 0": (dict(solver=DPMPlusPlus(4), lag=0), 0),
    "ring": (dict(window=3, solver=Euler(3)), 0),
    "ring, fused": (dict(window=3, commit="fused"), 0),
    "ring, sink, lag 1": (dict(window=4, sink=1, lag=1), 0),
    "ring, sink, lag 1, fused": (dict(window=4, sink=1, lag=1, commit="fused"), 0),
    "ring, sink, chunk 2, lag 2": (dict(window=6, sink=2, chunk=2, lag=2), 0),
    "sink without a ring": (dict(window=2, sink=1), 0),
    "first frame": (dict(frames=10, chunk=3, window=7, sink=1, first=True), 0),
    "first frame, lag 1": (dict(frames=10, chunk=3, window=7, sink=1, first=True, lag=1), 0),
    "first frame, no ring behind it": (dict(frames=10, chunk=3, window=4, sink=1, first=True), 0),
    "first frame, no ring behind it, lag 1, fused": (
        dict(frames=10, chunk=3, window=4, sink=1, first=True, lag=1, commit="fused"),
        0,
    ),
    "first image": (dict(frames=7, chunk=3, first=True, commit="fused"), 1),
    "continuation": (dict(chunk=2, window=6, sink=2), 4),
    "continuation, lag 1": (dict(frames=7, window=4, sink=1, lag=1), 3),
    "continuation, last step": (dict(frames=5, commit="last_step"), 2),
    "continuation, noised context": (dict(frames=5, commit=Commit("extra_pass", 0.2, noise=True)), 2),
    "noised context": (dict(commit=Commit("extra_pass", 0.2, noise=True)), 0),
    "noised context, fused": (dict(commit=Commit("fused", 0.2, noise=True)), 0),
    "tagged context": (dict(commit=Commit("extra_pass", 0.0, time=-1.0)), 0),
    "tagged context, fused": (dict(commit=Commit("fused", 0.1, time=-1.0)), 0),
    "noised and tagged context, fused": (dict(commit=Commit("fused", 0.2, noise=True, time=-1.0)), 0),
}


def plan_of(fields):
    plan = dict(solver=STEPS) | {name: value for name, value in fields.items() if name != "commit"}
    commit = fields.get("commit", "extra_pass")
    return replace(sampler(**plan), commit=Commit(commit) if isinstance(commit, str) else commit)


@functools.cache
def video(name):
    """A plan's video, and what it was made from."""
    fields, count = PLANS[name]
    plan = plan_of(fields)
    latents, conditions = clip(frames=plan.frames)
    given = latents[:, :count] if count else None
    ours = jax.jit(partial(plan.generate, frames=plan.frames))(network(), keys(0, 1), conditions, given=given)
    return ours, (plan, network(), keys(0, 1), conditions, plan.frames, given)


@pytest.mark.parametrize("name", PLANS)
def test_ticks_through_the_cache_equal_the_staircase_over_the_whole_clip(name):
    """Rounding compounds from chunk to chunk: exact in the first four chunks, near after them."""
    ours, arguments = video(name)
    plan, given = arguments[0], PLANS[name][1]
    theirs = reference.generate(*arguments)
    scale = float(jnp.max(jnp.abs(theirs)))
    early = given + 4 * plan.chunk
    np.testing.assert_allclose(ours[:, :early], theirs[:, :early], atol=1e-5 * scale)
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * scale)
    assert float(jnp.std(ours[:, -1])) > 0.1


def test_plans_differ():
    """The comparison above would not notice a plan that is ignored."""
    videos = [
        video(name)[0]
        for name in ("chunk after chunk", "lag 1", "lag 0", "ring, fused", "noised and tagged context, fused")
    ]
    for index, one in enumerate(videos):
        for other in videos[:index]:
            assert float(jnp.max(jnp.abs(one[:, -1] - other[:, -1]))) > 1e-2


@pytest.mark.parametrize("pair", [("chunk after chunk", "chunk after chunk, fused"), ("lag 1", "lag 1, fused")])
def test_a_fused_commit_equals_a_pass_of_its_own(pair):
    apart, fused = (video(name)[0] for name in pair)
    np.testing.assert_allclose(apart[:, :4], fused[:, :4], atol=1e-5 * float(jnp.max(jnp.abs(apart))))


# ---------------------------------------------------------------------------------------------------------- sessions

PIPELINE = plan_of(dict(window=4, sink=1, lag=1, commit="fused"))


@functools.cache
def tick(plan):
    """One compiled tick of the network."""
    return jax.jit(lambda state, actions: plan.tick(network(), state, Conditions(actions=actions)))


def ticks(plan, state, actions, activity):
    """Runs ticks with the given rows active; returns all states and chunks."""
    found = []
    for active_b in activity:
        state = replace(state, active=jnp.asarray(active_b))
        state, chunk = tick(plan)(state, actions)
        found.append((state, chunk))
    return found


def test_sessions_at_different_ticks_do_not_disturb_each_other():
    """A row that runs only now and then gives the same chunks, bit for bit, and keeps its state while it waits."""
    plan = PIPELINE
    actions = jnp.asarray([[1], [3]], jnp.int32)
    start = plan.init(network(), keys(5, 9), actions=actions)
    always = ticks(plan, start, actions, [(True, True)] * 6)
    rows = [(True, True), (True, False), (True, False), (False, True), (True, True), (True, True), (True, True)]
    found = ticks(plan, start, actions, rows)
    for row in range(2):
        mine = [chunk for (_, chunk), active in zip(found, rows, strict=True) if active[row]]
        for (_, expected), chunk in zip(always, mine, strict=False):
            np.testing.assert_array_equal(chunk.latents[row], expected.latents[row])
            assert int(chunk.frame[row]) == int(expected.frame[row])
            assert bool(chunk.valid[row]) == bool(expected.valid[row])
    assert found[-1][0].cache.count.tolist() != [0, 0]
    before, after = found[1][0], found[2][0]
    for old, new in zip(jax.tree.leaves(_row(before, 1)), jax.tree.leaves(_row(after, 1)), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not bool(found[2][1].valid[1])


def _row(state, row):
    """What belongs to one session."""
    cache = state.cache
    return (
        (cache.keys[:, row], cache.values[:, row], cache.count[row]),
        (state.latents[row], state.actions[row], state.next_frame[row], state.origin[row]),
    )


def test_a_session_joins_while_others_run():
    """Prefill of one row leaves the others as they are, and the joined row goes on as if it were alone."""
    plan = plan_of(dict(window=3))
    latents, conditions = clip(frames=2)
    actions = jnp.zeros((2, 1), jnp.int32)
    running = ticks(plan, plan.init(network(), keys(0, 1), actions=actions), actions, [(True, False)] * 2)[-1][0]
    state = replace(running, active=jnp.asarray([False, True]))
    joined = jax.jit(plan.prefill)(network(), state, latents, conditions)
    for old, new in zip(jax.tree.leaves(_row(running, 0)), jax.tree.leaves(_row(joined, 0)), strict=True):
        np.testing.assert_array_equal(old, new)
    assert joined.next_frame.tolist() == joined.cache.count.tolist() == [2, 2]
    assert joined.origin.tolist() == [0, 2]
    fresh = plan.init(network(), keys(0, 1), actions=actions)
    alone = jax.jit(plan.prefill)(network(), fresh, latents, conditions)
    ours, theirs = (ticks(plan, state, actions, [(True, True)])[0][1] for state in (joined, alone))
    np.testing.assert_array_equal(ours.latents[1], theirs.latents[1])


def test_ramp_up_and_the_end_of_a_clip_are_marked():
    """Lag 1 of 3 steps: two ticks of ramp-up, then one chunk a tick, until the limit."""
    plan = PIPELINE
    actions = jnp.zeros((1, 1), jnp.int32)
    state = plan.init(network(), keys(0), actions=actions, limit=3)
    assert (plan.program.delay, plan.carried) == (2, 3)
    chunks = [chunk for _, chunk in ticks(plan, state, actions, [(True,)] * 7)]
    assert [bool(chunk.valid[0]) for chunk in chunks] == [False, False, True, True, True, False, False]
    assert [int(chunk.frame[0]) for chunk in chunks] == [-2, -1, 0, 1, 2, 3, 4]


def test_the_same_video_in_every_slot_bit_for_bit():
    plan = plan_of(dict(window=3, sink=1, frames=5))
    generate = jax.jit(partial(plan.generate, network(), frames=5))
    conditions = Conditions(actions=jnp.full((3, 5), 2, jnp.int32))
    same = np.asarray(generate(keys(7, 7, 7), conditions))
    mixed = np.asarray(generate(keys(8, 7, 3), conditions))
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[0], same[2])
    np.testing.assert_array_equal(mixed[1], same[0])
    for other in (mixed[0], mixed[2]):
        assert np.abs(other - same[0]).min(axis=(1, 2, 3)).max() > 1e-4
        assert np.abs(other[0] - same[0, 0]).max() > 0.1


def test_noise_depends_on_session_purpose_frame_and_step_alone():
    noise = jax.jit(frame_noise, static_argnums=(1, 4))

    def draw(seed=0, purpose=Purpose.INITIAL, frame=4, step=1):
        frame_bf = jnp.full((1, 1), frame, jnp.int32)
        return noise(keys(seed), purpose, frame_bf, jnp.full((1,), step, jnp.int32), LATENT)[0, 0]

    one = draw()
    frames = jnp.asarray([[3, 4], [4, 5]], jnp.int32)
    many = noise(keys(6, 0), Purpose.INITIAL, frames, jnp.asarray([1, 2], jnp.int32), LATENT)
    np.testing.assert_array_equal(many[1, 0], one)
    for other in (
        draw(seed=1),
        draw(purpose=Purpose.RENOISE),
        draw(frame=5),
        draw(step=2),
        draw(purpose=Purpose.CONTEXT),
    ):
        assert float(jnp.max(jnp.abs(other - one))) > 0.1


@pytest.mark.parametrize("fields", [dict(window=4, sink=1), dict(chunk=2)], ids=["ring", "append"])
def test_rows_in_step_equal_rows_with_counts_of_their_own_and_the_exit_form_equals_the_static_one(fields):
    plan, model = plan_of(fields), network()
    chunks = plan.frames // plan.chunk
    _, conditions = clip()
    exit_rows = jnp.full((chunks,), plan.solver.steps - 1, jnp.int32)

    @partial(jax.jit, static_argnums=0)
    def rollout(in_step, exit_rows):
        state = plan.init(model, keys(0, 1), actions=conditions.actions, in_step=in_step)
        return plan.rollout(model, state, conditions, chunks, exit_rows=exit_rows)

    own, video = rollout(False, None)
    shared, together = rollout(True, None)
    _, exited = rollout(True, exit_rows)
    scale = float(jnp.max(jnp.abs(video)))
    np.testing.assert_allclose(together, video, atol=1e-6 * scale)
    np.testing.assert_allclose(exited[:, :4], video[:, :4], atol=1e-5 * scale)
    assert shared.cache.count.shape == ()
    assert own.cache.count.tolist() == [int(shared.cache.count)] * 2 == [8, 8]
    _, early = rollout(True, jnp.zeros((chunks,), jnp.int32))
    assert float(jnp.max(jnp.abs(early[:, 0] - video[:, 0]))) > 1e-2


def test_an_early_exit_emits_the_clean_prediction_of_that_step():
    plan = plan_of(dict(frames=1))
    actions = jnp.zeros((1, 1), jnp.int32)
    state = plan.init(network(), keys(0), actions=actions, in_step=True)
    conditions = Conditions(actions=actions)
    _, chunk = jax.jit(partial(plan.tick, network()))(state, conditions, exit_row=jnp.int32(1))
    level, frame, first = plan.solver.levels, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32)

    def clean(x, level):
        stream = Frames(x, jnp.full((1, 1), level, jnp.float32), chunk_layout(1, 1))
        return x - jnp.float32(level) * network()((stream,), conditions, visibility=pattern()).predictions[0]

    @jax.jit
    def expected():
        x = frame_noise(keys(0), Purpose.INITIAL, frame, first, LATENT)
        renoise = frame_noise(keys(0), Purpose.RENOISE, frame, first + 1, LATENT)
        x = (1 - jnp.float32(level[1])) * clean(x, level[0]) + jnp.float32(level[1]) * renoise
        return clean(x, level[1])

    np.testing.assert_allclose(chunk.latents, expected(), atol=1e-5 * float(jnp.max(jnp.abs(chunk.latents))))


# --------------------------------------------------------------------------------------------------------- positions


def test_relative_positions_equal_a_stream_whose_frames_are_counted_anew():
    """After evictions, the same keys renumbered so that the ring follows the sink give the same prediction.

    The sink keeps its frames and the ring moves back, by rotating its keys in float64, where the cache moves the sink
    forward: only distances matter.
    """
    model, plan = network(), plan_of(dict(window=4, sink=1, positions="relative"))
    latents, conditions = clip(rows=1, frames=8)
    state = plan.init(model, keys(0), actions=conditions.actions[:, :1])
    cache = jax.jit(plan.prefill)(model, state, latents[:, :7], conditions.frames(0, 7)).cache
    evicted = int(cache.count[0] - cache.filled[0])
    assert evicted == 4
    split = CONFIG.rope.axes(CONFIG.head_dim)[0] // 2
    turn = np.ones(CONFIG.head_dim // 2, complex)
    turn[:split] = np.exp(-1j * evicted * 10_000.0 ** (-np.arange(split) / split))
    stored = np.asarray(cache.keys, np.float64)
    half = CONFIG.head_dim // 2
    moved = (stored[..., :half] + 1j * stored[..., half:]) * turn
    moved = np.concatenate([moved.real, moved.imag], axis=-1)
    moved[:, :, : cache.geometry.sink * cache.geometry.tokens] = stored[:, :, : cache.geometry.sink * plan.tokens]
    anew = replace(
        cache,
        keys=jnp.asarray(moved, jnp.float32),
        count=cache.filled,
        geometry=replace(cache.geometry, relative=False),
    )

    @jax.jit
    def predict(cache, start):
        stream = Frames(latents[:, 7:], jnp.full((1, 1), 0.5), chunk_layout(1, 1), start=jnp.full((1,), start))
        return model((stream,), conditions.frames(7, 8), visibility=plan.visibility, cache=cache).predictions[0]

    ours, theirs = predict(cache, jnp.int32(7)), predict(anew, jnp.int32(7 - evicted))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.max(jnp.abs(theirs))))
    absolute = predict(replace(cache, geometry=replace(cache.geometry, relative=False)), jnp.int32(7))
    assert float(jnp.max(jnp.abs(absolute - theirs))) > 1e-3


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "fields, frames, given, message",
    [
        (dict(chunk=2), 7, 0, "not whole chunks of 2"),
        (dict(chunk=2), 8, 3, "3 given frames are not whole chunks of 2"),
        (dict(chunk=3, frames=7, first=True), 7, 2, "after a first frame of its own"),
        (dict(lag=0), 8, 1, "need a context cache"),
        (dict(lag=0), 4, 0, "lag=0 generates all 8 frames"),
        (dict(), 9, 0, "holds clips of 8 frames"),
        (dict(), 4, 4, "frames=4 with 4 given ones leave none to generate"),
        (dict(), 2, 4, "leave none to generate"),
    ],
)
def test_clips_that_do_not_fit_are_refused(fields, frames, given, message):
    plan = plan_of(fields)
    latents, conditions = clip(frames=max(frames, given))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(
            lambda: plan.generate(network(), keys(0, 1), conditions, frames, latents[:, :given] if given else None)
        )


def test_exit_rows_need_one_chunk_in_flight():
    plan = plan_of(dict(lag=1))
    actions = jnp.zeros((1, 1), jnp.int32)
    state = plan.init(network(), keys(0), actions=actions)
    with pytest.raises(ConfigError, match="one chunk in flight"):
        plan.tick(network(), state, Conditions(actions=actions), exit_row=jnp.int32(0))


def test_a_single_first_frame_and_a_context_of_it_alone():
    """Behind a first frame of its own, a window of one more chunk holds nothing but that frame."""
    plan = sampler(chunk=3, window=4, sink=1, first=True, frames=7)
    conditions = clip(frames=7)[1]
    alone = jax.jit(lambda: plan.generate(network(), keys(0, 1), conditions, 1))()
    whole = jax.jit(lambda: plan.generate(network(), keys(0, 1), conditions, 7))()
    assert alone.shape == (2, 1, *LATENT)
    np.testing.assert_allclose(whole[:, :1], alone, atol=1e-5)
    assert bool(jnp.isfinite(whole).all())
    given = jax.jit(lambda: plan.generate(network(), keys(0, 1), conditions, 7, alone))()
    np.testing.assert_allclose(given, whole, atol=1e-4)


@pytest.mark.parametrize("seed", [-1, 2**32 - 1, 99_999_999_999])
def test_any_seed_is_folded_into_32_bits(seed):
    folded = jax.random.key_data(session_keys(seed, 2))
    np.testing.assert_array_equal(folded, jax.random.key_data(session_keys(jnp.uint32(seed % 2**32), 2)))
