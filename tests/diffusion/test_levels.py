"""Training levels: every sampler against the law that it claims to follow."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidar import ConfigError
from vidar.config import build, to_dict
from vidar.diffusion import levels as lv
from vidar.diffusion.flow import few_step_levels
from vidar.diffusion.levels import LevelsConfig

KEY = jax.random.key(7)


def sample(config: LevelsConfig, b: int, u: int) -> lv.Levels:
    """Draws a batch under jit, as numpy arrays."""
    drawn = jax.jit(config.sample, static_argnums=(1, 2))(KEY, b, u)
    return lv.Levels(*(np.asarray(array) for array in drawn))


def non_decreasing(chunks: int, steps: int) -> list[tuple[int, ...]]:
    """All non-decreasing vectors of `chunks` levels out of `steps`."""
    return list(itertools.combinations_with_replacement(range(steps), chunks))


def fopp_marginals(chunks: int, steps: int) -> np.ndarray:
    """The exact probability of each level at each chunk under FoPP, `[chunks, steps]`.

    Given that chunk `a` has level `s`, the paths through `(f, t)` are counted by three binomials.
    """
    law = np.zeros((chunks, steps))
    for a, s, f, t in itertools.product(range(chunks), range(steps), range(chunks), range(steps)):
        if f == a:
            probability = float(s == t)
        elif f < a and t <= s:
            probability = math.comb(t + f, f) * math.comb(s - t + a - f - 1, a - f - 1) / math.comb(s + a, a)
        elif f > a and t >= s:
            rest = math.comb(steps - 1 - t + chunks - 1 - f, chunks - 1 - f)
            total = math.comb(steps - 1 - s + chunks - 1 - a, chunks - 1 - a)
            probability = math.comb(t - s + f - a - 1, f - a - 1) * rest / total
        else:
            probability = 0.0
        law[f, t] += probability / (chunks * steps)
    return law


# ---- FoPP -----------------------------------------------------------------------------------------------------------


def test_fopp_weights_count_all_completions():
    chunks, steps = 4, 5
    vectors = np.array(non_decreasing(chunks, steps))
    after, before = (np.exp(weights) for weights in lv.fopp_weights(chunks, steps))
    for f, t in itertools.product(range(chunks), range(steps)):
        through = vectors[vectors[:, f] == t]
        assert after[f, t] == pytest.approx(len(np.unique(through[:, f:], axis=0)))
        assert before[f, t] == pytest.approx(len(np.unique(through[:, : f + 1], axis=0)))


def test_fopp_weights_hold_numbers_that_exceed_every_float():
    after, before = lv.fopp_weights(400, 1000)
    assert before[-1, -1] == pytest.approx(math.log(math.comb(999 + 399, 399)), rel=1e-12)
    assert after[0, 0] == pytest.approx(before[-1, -1], rel=1e-12)


def test_fopp_draws_vectors_with_the_probability_of_brute_force():
    chunks, steps, draws = 3, 4, 60_000
    vectors = non_decreasing(chunks, steps)
    expected = np.zeros(len(vectors))
    for f, t in itertools.product(range(chunks), range(steps)):
        through = [index for index, vector in enumerate(vectors) if vector[f] == t]
        expected[through] += 1 / (chunks * steps) / len(through)
    keys = jax.random.split(KEY, draws)
    draw = jax.jit(jax.vmap(lambda key: lv.fopp_discrete(key, chunks, steps)))
    drawn = np.asarray(draw(keys))
    counts = np.array([(drawn == vector).all(axis=1).sum() for vector in vectors])
    assert counts.sum() == draws
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected)).sum()
    assert chi_square < 45  # 19 degrees of freedom: exceeded once in 1400 by chance

    uniform = ((counts - draws / len(vectors)) ** 2 / (draws / len(vectors))).sum()
    assert uniform > 1000  # the alternative, uniform over all vectors, is another law


def test_fopp_marginals_follow_the_closed_form_and_keep_their_floor():
    chunks, steps, draws = 6, 20, 40_000
    law = fopp_marginals(chunks, steps)
    np.testing.assert_allclose(law.sum(axis=1), 1)
    assert law.min() >= 1 / (chunks * steps)
    level = sample(LevelsConfig(lv.FoPP(steps)), draws, chunks).level_bu
    indices = np.rint(level * steps).astype(int) - 1
    np.testing.assert_allclose(level, (indices + 1) / steps, rtol=1e-6)
    frequency = np.stack([np.bincount(column, minlength=steps) for column in indices.T]) / draws
    np.testing.assert_allclose(frequency, law, atol=5 * math.sqrt(law.max() / draws))
    assert frequency.min() > 0.7 / (chunks * steps)


def test_fopp_differs_from_uniform_monotone_vectors_as_published():
    chunks, steps = 16, 50
    law = fopp_marginals(chunks, steps)
    assert law.min() >= 1 / (chunks * steps)
    assert law[0] @ np.arange(steps) == pytest.approx(5.2, abs=0.05)
    pooled = law.mean(axis=0) * steps
    assert (pooled.min(), pooled.max()) == (pytest.approx(0.72, abs=0.01), pytest.approx(2.18, abs=0.01))

    after, before = (np.exp(weights) for weights in lv.fopp_weights(chunks, steps))
    alternative = before * after / math.comb(steps - 1 + chunks, chunks)
    np.testing.assert_allclose(alternative.sum(axis=1), 1)
    assert alternative[0] @ np.arange(steps) == pytest.approx(2.9, abs=0.05)
    np.testing.assert_allclose(alternative.mean(axis=0) * steps, 1)
    assert alternative.min() < 1e-9


def test_continuous_fopp_is_the_limit_of_the_discrete_one():
    chunks, draws = 5, 60_000
    level = sample(LevelsConfig(lv.FoPP()), draws, chunks).level_bu
    assert (np.diff(level, axis=1) >= 0).all()
    assert level.min() >= 0
    assert level.max() <= 1
    distance = {}
    for steps in (20, 80):
        exact = np.cumsum(fopp_marginals(chunks, steps), axis=1)
        edges = (np.arange(steps) + 1) / steps
        empirical = np.stack([np.searchsorted(np.sort(column), edges) / draws for column in level.T])
        distance[steps] = np.abs(empirical - exact).max()
    assert distance[80] < 0.015
    assert distance[20] > 2.5 * distance[80]


@pytest.mark.parametrize(("steps", "marginal"), [(None, lv.ShiftedLogitNormal(0.0, 0.5, 3.0)), (30, lv.Uniform(5.0))])
def test_fopp_goes_through_the_quantile_function_of_any_marginal(steps, marginal):
    plain = sample(LevelsConfig(lv.FoPP(steps)), 512, 6).level_bu
    composed = sample(LevelsConfig(lv.FoPP(steps), marginal), 512, 6).level_bu
    np.testing.assert_allclose(composed, marginal.quantile(jnp.asarray(plain)), rtol=1e-5)
    assert (np.diff(composed, axis=1) >= 0).all()
    assert np.abs(composed - plain).max() > 0.1


def test_fopp_of_one_chunk_is_its_marginal():
    level = sample(LevelsConfig(lv.FoPP()), 20_000, 1).level_bu
    np.testing.assert_allclose(np.quantile(level, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.015)


# ---- other bases and marginals --------------------------------------------------------------------------------------


def test_shared_levels_are_equal_within_a_clip_and_differ_between_clips():
    level = sample(LevelsConfig(lv.Shared()), 1000, 4).level_bu
    assert (level == level[:, :1]).all()
    assert len(np.unique(level[:, 0])) > 990


def test_independent_levels_are_uncorrelated():
    drawn = sample(LevelsConfig(lv.Independent()), 20_000, 3)
    np.testing.assert_allclose(np.corrcoef(drawn.level_bu.T), np.eye(3), atol=0.03)
    np.testing.assert_allclose(drawn.level_bu.mean(axis=0), 0.5, atol=0.01)
    assert not drawn.clean_bu.any()
    assert drawn.loss_bu.all()


def test_grid_levels_are_those_of_the_few_step_sampler_equally_often():
    levels = tuple(few_step_levels()[:-1].tolist())
    level = sample(LevelsConfig(lv.Grid(levels)), 20_000, 3).level_bu
    values, counts = np.unique(level, return_counts=True)
    np.testing.assert_allclose(values, sorted(levels), rtol=1e-6)
    np.testing.assert_allclose(counts / level.size, 0.25, atol=0.01)
    assert (level[:, 0] == level[:, 1]).mean() == pytest.approx(0.25, abs=0.015)


def test_logit_normal_marginal_has_the_mass_that_magi_states():
    level = sample(LevelsConfig(marginal=lv.ShiftedLogitNormal(0.0, 0.5, 3.0)), 20_000, 1).level_bu
    assert (level > 0.7).mean() == pytest.approx(0.692, abs=0.01)
    plain = sample(LevelsConfig(marginal=lv.ShiftedLogitNormal(0.3, 1.2)), 20_000, 1).level_bu.astype(np.float64)
    logit = np.log(plain / (1 - plain))
    assert logit.mean() == pytest.approx(0.3, abs=0.03)
    assert logit.std() == pytest.approx(1.2, abs=0.03)


def test_quantile_functions_are_finite_at_both_ends():
    ends = jnp.asarray([0.0, 1.0])
    for marginal in (lv.Uniform(shift=5.0), lv.ShiftedLogitNormal(0.2, 0.7, 3.0)):
        np.testing.assert_allclose(marginal.quantile(ends), [0, 1], atol=1e-6)


# ---- context --------------------------------------------------------------------------------------------------------


def test_stochastic_clean_context():
    drawn = sample(LevelsConfig(context=(lv.StochasticCleanContext(0.3),)), 10_000, 4)
    assert drawn.clean_bu.mean() == pytest.approx(0.3, abs=0.01)
    np.testing.assert_array_equal(drawn.loss_bu, ~drawn.clean_bu)
    assert (drawn.level_bu[drawn.clean_bu] == 0).all()
    np.testing.assert_allclose(np.corrcoef(drawn.clean_bu.T.astype(float)), np.eye(4), atol=0.04)
    untouched = sample(LevelsConfig(), 10_000, 4)
    np.testing.assert_array_equal(drawn.level_bu[~drawn.clean_bu], untouched.level_bu[~drawn.clean_bu])


def test_no_clean_context_is_diffusion_forcing():
    for ours, plain in zip(
        sample(LevelsConfig(context=(lv.StochasticCleanContext(0.0),)), 64, 4),
        sample(LevelsConfig(), 64, 4),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, plain)


def test_clean_prefix_has_the_lengths_that_it_was_given():
    drawn = sample(LevelsConfig(lv.Shared(), context=(lv.CleanPrefix((0.5, 0.2, 0.3)),)), 20_000, 4)
    length = drawn.clean_bu.sum(axis=1)
    np.testing.assert_array_equal(drawn.clean_bu, np.arange(4) < length[:, None])
    np.testing.assert_allclose(np.bincount(length) / len(length), [0.5, 0.2, 0.3], atol=0.015)
    np.testing.assert_array_equal(drawn.loss_bu, ~drawn.clean_bu)
    assert (drawn.level_bu[drawn.clean_bu] == 0).all()


def test_a_prefix_of_one_chunk_is_image_to_video():
    drawn = sample(LevelsConfig(context=(lv.CleanPrefix((0.0, 1.0)),)), 64, 3)
    np.testing.assert_array_equal(drawn.clean_bu, np.broadcast_to([True, False, False], (64, 3)))


def test_history_noise_acts_on_clean_chunks_alone_and_leaves_them_without_loss():
    context = (lv.CleanPrefix((0.5, 0.0, 0.5)), lv.HistoryNoise(0.05))
    drawn = sample(LevelsConfig(lv.FoPP(), context=context), 10_000, 4)
    before = sample(LevelsConfig(lv.FoPP(), context=context[:1]), 10_000, 4)
    history = drawn.level_bu[drawn.clean_bu]
    assert 0.0495 < history.max() <= 0.05
    assert history.mean() == pytest.approx(0.025, abs=5e-4)
    np.testing.assert_array_equal(drawn.level_bu[~drawn.clean_bu], before.level_bu[~drawn.clean_bu])
    np.testing.assert_array_equal(drawn.loss_bu, ~drawn.clean_bu)


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [lv.Grid((1.0, 0.5)), lv.FoPP(), lv.FoPP(10)])
def test_the_draw_of_a_clip_does_not_depend_on_the_batch(base):
    config = LevelsConfig(base, context=(lv.StochasticCleanContext(0.5), lv.HistoryNoise(0.1)))
    few, many = sample(config, 3, 5), sample(config, 8, 5)
    for ours, theirs in zip(few, many, strict=True):
        np.testing.assert_array_equal(ours, theirs[:3])
    assert [array.dtype for array in few] == [np.float32, np.bool_, np.bool_]


def test_configurations_are_plain_data():
    config = LevelsConfig(
        lv.FoPP(50), lv.ShiftedLogitNormal(0.0, 0.5, 3.0), (lv.CleanPrefix((0.5, 0.5)), lv.HistoryNoise(0.05))
    )
    mapping = {
        "base": {"kind": "fopp", "steps": 50},
        "marginal": {"kind": "logit_normal", "mean": 0.0, "std": 0.5, "shift": 3.0},
        "context": [
            {"kind": "clean_prefix", "probabilities": [0.5, 0.5]},
            {"kind": "history_noise", "maximum": 0.05},
        ],
    }
    assert build(LevelsConfig, mapping) == config
    assert to_dict(config) == mapping


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lv.Uniform(0.0), "shift=0.0"),
        (lambda: lv.ShiftedLogitNormal(std=-1.0), "std=-1.0"),
        (lambda: lv.Grid(()), "one or more levels"),
        (lambda: lv.Grid((1.2,)), "one or more levels"),
        (lambda: lv.FoPP(0), "steps=0"),
        (lambda: lv.StochasticCleanContext(1.0), "probability=1.0"),
        (lambda: lv.CleanPrefix((0.5, 0.4)), "sum to 1"),
        (lambda: lv.HistoryNoise(2.0), "maximum=2.0"),
        (lambda: LevelsConfig(lv.Grid((1.0,)), lv.Uniform(5.0)), "leave `marginal` out"),
        (lambda: LevelsConfig(context=(lv.CleanPrefix((0.0, 0.0, 1.0)),)).sample(KEY, 2, 2), "at most 2 probabilities"),
    ],
)
def test_impossible_levels_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
