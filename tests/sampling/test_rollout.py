"""Ticks through the cache against whole-clip iterations without one, for every plan; sessions, limits, determinism."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import LATENT, clip, network, pattern, quick_jit, sampler
from tests.sampling import reference
from tests.sampling.reference import keys
from vidar.attention.cache import ContextConfig
from vidar.attention.visibility import Bidirectional
from vidar.diffusion.plan import Commit
from vidar.errors import ConfigError
from vidar.models.frames import Frames
from vidar.sampling.solvers import Euler, FewStep

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
    "ring": (dict(window=3, solver=Euler(3)), 0),
    "ring, fused": (dict(window=3, commit="fused"), 0),
    "ring, sink, lag 1": (dict(window=4, sink=1, lag=1), 0),
    "ring, sink, lag 1, fused": (dict(window=4, sink=1, lag=1, commit="fused"), 0),
    "ring, sink, chunk 2, lag 2": (dict(window=6, sink=2, chunk=2, lag=2), 0),
    "sink without a ring": (dict(window=2, sink=1), 0),
    "first frame": (dict(frames=10, chunk=3, window=7, sink=1, first=True), 0),
    "first frame, lag 1": (dict(frames=10, chunk=3, window=7, sink=1, first=True, lag=1), 0),
    "first image": (dict(frames=7, chunk=3, first=True, commit="fused"), 1),
    "continuation": (dict(chunk=2, window=6, sink=2), 4),
    "continuation, lag 1": (dict(frames=7, window=4, sink=1, lag=1), 3),
    "noised context": (dict(commit=Commit("extra_pass", 0.2, noise=True)), 0),
    "noised context, fused": (dict(commit=Commit("fused", 0.2, noise=True)), 0),
    "tagged context": (dict(commit=Commit("extra_pass", 0.0, time=-1.0)), 0),
    "tagged context, fused": (dict(commit=Commit("fused", 0.1, time=-1.0)), 0),
}


def plan_of(fields):
    plan = dict(solver=STEPS) | {name: value for name, value in fields.items() if name != "commit"}
    commit = fields.get("commit", "extra_pass")
    return replace(sampler(**plan), commit=Commit(commit) if isinstance(commit, str) else commit)


def run(plan, key_b=None, given=None, latents_and_conditions=None, model=None):
    latents, conditions = latents_and_conditions or clip(frames=plan.frames)
    key_b = keys(*range(len(latents))) if key_b is None else key_b
    given = None if not given else latents[:, :given]
    model = network() if model is None else model
    ours = quick_jit(partial(plan.generate, frames=plan.frames))(model, key_b, conditions, given=given)
    return ours, (plan, model, key_b, conditions, plan.frames, given)


@pytest.mark.parametrize("name", PLANS)
def test_ticks_through_the_cache_equal_the_staircase_over_the_whole_clip(name):
    """Rounding compounds from chunk to chunk: exact in the first four chunks, near after them."""
    fields, given = PLANS[name]
    plan = plan_of(fields)
    ours, arguments = run(plan, given=given)
    theirs = reference.generate(*arguments)
    scale = float(jnp.max(jnp.abs(theirs)))
    early = given + 4 * plan.chunk
    np.testing.assert_allclose(ours[:, :early], theirs[:, :early], atol=1e-5 * scale)
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * scale)
    assert float(jnp.std(ours[:, -1])) > 0.1


def test_plans_differ():
    """The comparison above would not notice a plan that is ignored."""
    videos = [run(plan_of(PLANS[name][0]))[0] for name in ("chunk after chunk", "lag 1", "lag 0", "ring, fused")]
    for index, video in enumerate(videos):
        for other in videos[:index]:
            assert float(jnp.max(jnp.abs(video[:, -1] - other[:, -1]))) > 1e-2
