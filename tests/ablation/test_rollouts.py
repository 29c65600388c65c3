"""Cells are streamed as the pipeline generates, whatever their chunks and plans; a harm changes what it should."""

from dataclasses import replace

import numpy as np
import pytest

from tests.networks import network
from vidar.ablation.card import Control
from vidar.ablation.measures import WorldEvaluation
from vidar.ablation.rollouts import harmed, stream_sampler, streamer
from vidar.attention.cache import ContextConfig
from vidar.pipeline import Pipeline
from vidar.sampling.solvers import FewStep
from vidar.system import PlanConfig, VideoConfig, compose
from vidar.training.experiment import load_run_config

TRUTH = WorldEvaluation(spans={"x": (1, 4)}, clips=2, frames=9).truth()


def system(chunk: int = 1, lag: int | None = None, sink: int = 1):
    config = load_run_config("configs/world/teacher_forcing.py")
    model = replace(config.model, width=16, layers=1, mlp=16, remat=False)
    context = ContextConfig(sink + 2 * chunk, sink, "absolute")
    plan = PlanConfig(lag, replace(config.plan.commit, level=0.1))
    solver = FewStep((1000.0, 500.0), 1.0)
    video = VideoConfig(16, 16, 8, chunk)
    return compose(replace(config, model=model, video=video, context=context, plan=plan, solver=solver))


def streamed(system, generate=streamer, *extra, given=1, frames=9):
    model = network(system.config.model)
    return generate(system, model, given, 7, *extra)(TRUTH.pixels[:, :given], TRUTH.actions[:, :frames], TRUTH.label)


@pytest.mark.parametrize(("chunk", "lag", "given"), [(1, 1, 2), (2, None, 1)])
def test_streams_equal_the_pipeline(chunk, lag, given):
    made = system(chunk, lag, sink=chunk)
    sampler = stream_sampler(made, given)
    assert sampler.first == (chunk == 2)
    # The pipeline takes the window as trained; a first frame of its own widens the stream's.
    same = replace(
        made.config,
        context=sampler.context,
        video=replace(made.config.video, independent_first_frame=sampler.first, frames=9 if sampler.first else 8),
    )
    pipeline = Pipeline(compose(same), network(made.config.model), made.config.codec)
    expected = pipeline.generate(9, actions=TRUTH.actions, given=TRUTH.pixels[:, :given], label=TRUTH.label, seed=7)
    found = streamed(made, given=given)
    assert found.shape == (2, 9, 16, 16, 3)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert len(np.unique(found[:, -1])) > 20


def test_a_last_chunk_may_be_cut():
    made = system(2, sink=2)
    whole = streamed(made)
    cut = streamed(made, frames=8)
    assert cut.shape == (2, 8, 16, 16, 3)
    np.testing.assert_array_equal(cut[:, :7], whole[:, :7])


def test_harms_change_what_they_should():
    made = system()
    clean = streamed(made)
    given = [streamed(made, harmed, Control("given", (amount,)), amount) for amount in (0.3, 1.0)]
    np.testing.assert_allclose(
        given[0][:, 0].astype(float), 0.7 * TRUTH.pixels[:, 0] + 0.3 * given[1][:, 0].astype(float), atol=1.01
    )
    assert (given[0][:, 1:] != clean[:, 1:]).any()
    commit = streamed(made, harmed, Control("commit", (1.0,)), 1.0)
    np.testing.assert_array_equal(commit[:, :2], clean[:, :2])  # the first frame's context is data
    assert (commit[:, 2:] != clean[:, 2:]).any()
    again = streamed(made, harmed, Control("commit", (0.1,)), 0.1)  # as the system commits anyhow
    np.testing.assert_array_equal(again, clean)
