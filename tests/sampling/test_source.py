"""A video in place of noise: what enters, which steps are taken, and that the context is that of the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import LATENT, clip, network, sampler
from tests.sampling.reference import keys
from vidar.attention.visibility import Bidirectional
from vidar.errors import ConfigError
from vidar.sampling.flight import Source
from vidar.sampling.solvers import Euler, FewStep, UniPC

STEPS = FewStep((1000.0, 600.0, 300.0))
VIDEO, CONDITIONS = clip(frames=6, seed=4)
MODEL = network()


def made(plan, skip=None, video=VIDEO, frames=6):
    source = None if skip is None else Source(video, skip)
    return jax.jit(lambda model: plan.generate(model, keys(0, 1), CONDITIONS, frames, source=source))(MODEL)


@pytest.mark.parametrize(
    "fields", [dict(), dict(chunk=2, window=4), dict(lag=0, visibility=Bidirectional()), dict(solver=Euler(4, 3.0))]
)
def test_no_step_left_out_is_plain_generation(fields):
    """At the first level, which is 1, nothing is left of the video."""
    plan = sampler(**(dict(frames=6, solver=STEPS) | fields))
    np.testing.assert_allclose(made(plan, 0), made(plan), atol=1e-5)


def test_the_first_chunk_is_the_noised_video_denoised_by_the_steps_that_are_left():
    """By hand: initial noise to the second level, one prediction, re-noised to the third, one more."""
    from vidar.attention.visibility import chunk_layout
    from vidar.models.frames import Frames
    from vidar.sampling.noise import Purpose, frame_noise

    plan = sampler(frames=6, chunk=2, solver=STEPS)
    found = made(plan, 1)[:, :2]
    frame = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32)[None], (2, 2))
    level = np.float32(STEPS.levels)

    def noise(purpose, step):
        return frame_noise(keys(0, 1), purpose, frame, jnp.full((2,), step, jnp.int32), LATENT)

    x = (1 - level[1]) * VIDEO[:, :2] + level[1] * noise(Purpose.INITIAL, 0)
    for step in (1, 2):
        stream = Frames(x, jnp.full((2, 2), level[step]), chunk_layout(2, 2))
        output = MODEL((stream,), CONDITIONS.frames(0, 2), visibility=plan.visibility).predictions[0]
        clean = x - level[step] * output
        x = (1 - level[step + 1]) * clean + level[step + 1] * noise(Purpose.RENOISE, step + 1)
    np.testing.assert_allclose(found, x, atol=1e-4)


def test_later_chunks_follow_the_result_and_not_the_source():
    """A change in the first chunk of the source reaches later chunks through the context."""
    plan = sampler(frames=6, chunk=2, solver=STEPS)
    other = VIDEO.at[:, :2].add(1.0)
    one, two = made(plan, 1), made(plan, 1, other)
    assert float(jnp.max(jnp.abs(one[:, 2:] - two[:, 2:]))) > 1e-3


def test_fewer_steps_keep_more_of_the_source():
    """With a network that says the clean frames are what it sees, the source comes through by its share."""
    plan = sampler(frames=6, solver=STEPS)
    distance = [float(jnp.mean(jnp.abs(made(plan, skip, 10 + VIDEO) - 10 - VIDEO))) for skip in (0, 1, 2)]
    assert distance[0] > distance[1] > distance[2]


def test_a_first_frame_of_its_own_has_a_source_too():
    plan = sampler(frames=7, chunk=3, first=True, solver=STEPS, window=7, sink=1)
    video, conditions = clip(frames=7, seed=4)

    def run(video):
        return jax.jit(lambda: plan.generate(MODEL, keys(0, 1), conditions, 7, source=Source(video, 2)))()

    moved = np.abs(np.asarray(run(video.at[:, 0].add(1.0)) - run(video))).max(axis=(0, 2, 3, 4))
    assert (moved > 1e-4).all()


@pytest.mark.parametrize(
    "fields, skip, text",
    [
        (dict(lag=1), 1, "plan.lag=None"),
        (dict(commit="fused"), 1, "not fused"),
        (dict(solver=UniPC(3)), 1, "'unipc' remembers its steps"),
        (dict(), 3, "leave at least one to take"),
    ],
)
def test_plans_that_cannot_begin_later_are_refused(fields, skip, text):
    with pytest.raises(ConfigError, match=text):
        made(sampler(**(dict(frames=6, solver=STEPS) | fields)), skip)


def test_a_source_is_the_whole_clip():
    plan = sampler(frames=6, solver=STEPS)
    with pytest.raises(ConfigError, match="all 6 frames"):
        made(plan, 1, VIDEO[:, :4])
    with pytest.raises(ConfigError, match="none are given beside it"):
        plan.generate(MODEL, keys(0, 1), CONDITIONS, 6, VIDEO[:, :2], Source(VIDEO, 1))


def test_it_can_be_jitted_with_the_source_as_an_argument():
    plan = sampler(frames=6, solver=STEPS)
    run = jax.jit(lambda source: plan.generate(MODEL, keys(0, 1), CONDITIONS, 6, source=source))
    np.testing.assert_allclose(run(Source(VIDEO, 1)), made(plan, 1), atol=1e-4)
