"""Diffusion and teacher forcing: their losses against numpy and against one chunk at a time through the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import CONFIG, network, pattern
from tests.objectives.parts import TEXT, Watched, axes, batch
from vidar.attention.cache import init_cache, write
from vidar.attention.visibility import CLEAN, NOISY, Bidirectional, TeacherForcing, Window, chunk_layout
from vidar.diffusion.levels import CleanPrefix, Independent, LevelsConfig, Shared
from vidar.models.frames import Frames
from vidar.objectives import diffusion, targets, teacher_forcing

KEY = jax.random.key(42)
SHARED = LevelsConfig(Shared())
PREFIX = LevelsConfig(Independent(), context=(CleanPrefix((0.0, 1.0)),))


def fake(latents, level):
    """A prediction that numpy can repeat."""
    return 0.5 * latents + level[:, :, None, None, None]


def observe(objective, axis, data, network_or_function=fake, prediction="v", key=KEY):
    """The loss, its metrics, and what the network was given."""

    @jax.jit
    def run(data, key):
        watched = Watched(network_or_function, prediction)
        loss, (metrics, _) = objective.loss("student", {"student": watched}, (), axis, data, jnp.int32(0), key)
        return loss, metrics, watched.calls[0]

    loss, metrics, (streams, conditions) = run(data, key)
    return float(loss), metrics, streams, conditions


def noise_of(stream, latents):
    """The noise that a stream was made with, from the definition of a level."""
    level = np.asarray(stream.level, np.float64)[:, :, None, None, None]
    return (np.asarray(stream.latents, np.float64) - (1 - level) * np.asarray(latents, np.float64)) / level


def bump(level, shift):
    """The weight of the field's baselines, from its definition on the shifted grid."""
    grid = 1 - np.arange(1000) / 1000
    grid = shift * grid / (1 + (shift - 1) * grid)
    y = np.exp(-2 * (grid - 0.5) ** 2)
    return (np.exp(-2 * (np.asarray(level, np.float64) - 0.5) ** 2) - y.min()) / (y - y.min()).mean()


@pytest.mark.parametrize("weight", ["uniform", "bump"])
@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
def test_diffusion_loss_is_the_weighted_mean_over_frames(prediction, weight):
    data = batch(rows=3)
    loss, metrics, (stream,), _ = observe(
        diffusion.Diffusion(weight=weight, shift=5.0), axes(chunk=2), data, prediction=prediction
    )
    noise = noise_of(stream, data.latents)
    clean = np.asarray(data.latents, np.float64)
    target = {"v": noise - clean, "x0": clean, "eps": noise}[prediction]
    error = np.mean((np.asarray(fake(stream.latents, stream.level)) - target) ** 2, axis=(2, 3, 4))
    factor = bump(stream.level, 5.0) if weight == "bump" else 1.0
    assert loss == pytest.approx(float(np.mean(error * factor)), rel=1e-4)
    sums = {name: float(value) for name, value in metrics.items()}
    assert sum(value for name, value in sums.items() if name.endswith(":count")) == 12
    assert sum(value for name, value in sums.items() if name.endswith(":sum")) == pytest.approx(error.sum(), rel=1e-4)
    for index in range(8):
        inside = (np.asarray(stream.level) * 8).astype(int) == index
        assert sums[f"loss_level/{index / 8:.3f}:count"] == inside.sum()


def test_levels_are_shared_by_a_chunk_and_differ_between_chunks_and_clips():
    _, _, (stream,), _ = observe(diffusion.Diffusion(), axes(chunk=2), batch(rows=3))
    level = np.asarray(stream.level)
    np.testing.assert_array_equal(level[:, 0::2], level[:, 1::2])
    assert len(np.unique(level)) == 6
    _, _, (stream,), _ = observe(diffusion.Diffusion(), axes(chunk=2, levels=SHARED), batch(rows=3))
    assert len(np.unique(np.asarray(stream.level))) == 3


def test_draws_belong_to_the_sample_and_not_to_its_slot():
    data = batch(rows=3)
    turned = jax.tree.map(lambda x: x[::-1], data)
    _, _, (one,), _ = observe(diffusion.Diffusion(), axes(), data)
    _, _, (other,), _ = observe(diffusion.Diffusion(), axes(), turned)
    np.testing.assert_array_equal(one.level, other.level[::-1])
    np.testing.assert_array_equal(one.latents, other.latents[::-1])
    _, _, (later,), _ = observe(diffusion.Diffusion(), axes(), data, key=jax.random.key(43))
    assert float(jnp.min(jnp.abs(later.level - one.level))) > 1e-6
    assert np.std(noise_of(one, data.latents)) == pytest.approx(1, abs=0.1)


def test_clean_context_carries_no_loss():
    data = batch()
    loss, metrics, (stream,), _ = observe(diffusion.Diffusion(), axes(levels=PREFIX), data)
    np.testing.assert_array_equal(stream.level[:, 0], 0)
    np.testing.assert_array_equal(stream.latents[:, 0], data.latents[:, 0])
    late = Frames(stream.latents[:, 1:], stream.level[:, 1:], stream.layout)
    target = noise_of(late, data.latents[:, 1:]) - np.asarray(data.latents[:, 1:])
    assert loss == pytest.approx(np.mean((np.asarray(fake(late.latents, late.level)) - target) ** 2), rel=1e-4)
    assert sum(float(value) for name, value in metrics.items() if name.endswith(":count")) == 6


@pytest.mark.parametrize(("probability", "low", "high"), [(0.25, 0.6, 0.9), (1.0, 0, 0), (0.0, 1, 1)])
def test_conditions_are_dropped_together(probability, low, high):
    _, _, _, conditions = observe(diffusion.Diffusion(), axes(drop=probability), batch(rows=64))
    if not probability:
        assert conditions.actions_kept is None
        assert conditions.text_kept is None
        return
    np.testing.assert_array_equal(conditions.actions_kept, conditions.text_kept)
    assert low <= float(jnp.mean(conditions.text_kept.astype(jnp.float32))) <= high


# --------------------------------------------------------------------------------------------------- teacher forcing


def test_teacher_forcing_puts_clean_frames_beside_noisy_ones():
    data = batch()
    _, _, (clean, noisy), _ = observe(teacher_forcing.TeacherForcing(), axes(TeacherForcing(), chunk=2), data)
    np.testing.assert_array_equal(clean.latents, data.latents)
    np.testing.assert_array_equal(clean.level, 0)
    assert clean.layout == chunk_layout(4, 2, role=CLEAN)
    assert noisy.layout == chunk_layout(4, 2, role=NOISY)
    assert float(jnp.min(noisy.level)) > 0
    assert np.std(noise_of(noisy, data.latents)) == pytest.approx(1, abs=0.1)


def test_context_noise_is_small_and_carries_no_loss():
    data = batch(rows=64)
    _, _, (clean, noisy), _ = observe(teacher_forcing.TeacherForcing(context_noise=0.2), axes(TeacherForcing()), data)
    level = np.asarray(clean.level)
    np.testing.assert_array_equal(level, np.broadcast_to(level[:, :1], level.shape))
    assert 0 < level.min() < 0.02
    assert 0.18 < level.max() < 0.2
    noise = noise_of(clean, data.latents)
    assert np.std(noise) == pytest.approx(1, abs=0.1)
    assert np.abs(np.corrcoef(noise.ravel(), noise_of(noisy, data.latents).ravel())[0, 1]) < 0.05


def test_context_noise_leaves_the_sink_alone():
    data, axis = batch(), axes(TeacherForcing() & Window(3, 1), window=3, sink=1)
    _, _, (clean, _), _ = observe(teacher_forcing.TeacherForcing(context_noise=0.2), axis, data)
    np.testing.assert_array_equal(clean.latents[:, :1], data.latents[:, :1])
    np.testing.assert_array_equal(np.asarray(clean.level) > 0, [[False, True, True, True]] * 2)


CASES = {
    "chunks": (dict(chunk=2), 0.0),
    "first frame, noised context": (dict(chunk=3, first=True), 0.3),
    "window, sink": (dict(window=3, sink=1), 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_teacher_forcing_equals_each_noisy_chunk_alone_after_the_clean_past(name):
    fields, context_noise = CASES[name]
    window, sink = fields.get("window"), fields.get("sink", 0)
    visibility = TeacherForcing() if window is None else TeacherForcing() & Window(window, sink)
    axis, data, model = axes(visibility, frames=4, **fields), batch(), network(TEXT)
    objective = teacher_forcing.TeacherForcing(context_noise=context_noise)

    loss, _, (clean, noisy), _ = observe(objective, axis, data, model)
    cache = init_cache(
        axis.sampler.geometry, layers=TEXT.layers, rows=2, heads=TEXT.heads, head_dim=TEXT.head_dim, dtype=jnp.float32
    )

    @jax.jit
    def forward(latents, level, start, conditions, cache):
        layout = chunk_layout(latents.shape[1], latents.shape[1])
        stream = Frames(latents, level, layout, start=jnp.full((2,), start))
        return model((stream,), conditions, visibility=pattern(window, sink), cache=cache)

    errors = []
    for chunk in range(noisy.layout.chunks[-1] + 1):
        frames = np.flatnonzero(np.asarray(noisy.layout.chunks) == chunk)
        part, start = slice(frames[0], frames[-1] + 1), jnp.int32(frames[0])
        conditions = data.conditions.frames(part.start, part.stop)
        alone = forward(noisy.latents[:, part], noisy.level[:, part], start, conditions, cache)
        context = forward(clean.latents[:, part], clean.level[:, part], start, conditions, cache)
        cache = write(cache, context.keys, context.values)
        noise = noise_of(noisy, data.latents)[:, part]
        errors.append((np.asarray(alone.predictions[0]) - (noise - np.asarray(data.latents[:, part]))) ** 2)
    assert loss == pytest.approx(np.mean(np.concatenate(errors, axis=1)), rel=1e-5)


def test_roles_and_phases():
    for objective in (diffusion.Diffusion(ema=0.5, ema_start=3), teacher_forcing.TeacherForcing(ema=0.5, ema_start=3)):
        assert {name: (role.optimizer, role.ema, role.ema_start) for name, role in objective.roles.items()} == {
            "student": ("student", 0.5, 3)
        }
        assert [(phase.name, phase.role) for phase in objective.phases(7)] == [("student", "student")]
        assert objective.init_aux() == ()


# ------------------------------------------------------------------------------------------------------------ targets


def test_masked_mean_is_zero_where_nothing_is_chosen():
    error = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    assert float(targets.masked_mean(error, jnp.asarray([[True, False], [False, True]]))) == 2.5
    assert float(targets.masked_mean(error, jnp.zeros((2, 2), bool))) == 0.0


def test_a_level_of_one_falls_into_the_last_bucket():
    metrics = targets.level_buckets(
        jnp.asarray([[1.0, 2.0, 4.0]]), jnp.asarray([[0.0, 0.125, 1.0]]), jnp.ones((1, 3), bool)
    )
    found = {name: float(value) for name, value in metrics.items() if float(value)}
    assert found == {
        "loss_level/0.000:sum": 1, "loss_level/0.000:count": 1, "loss_level/0.125:sum": 2,
        "loss_level/0.125:count": 1, "loss_level/0.875:sum": 4, "loss_level/0.875:count": 1,
    }  # fmt: skip


def test_bidirectional_diffusion_lets_the_first_frame_see_the_last():
    """The same objective trains a teacher or a causal student: the axes alone decide."""
    model, data = network(), batch(text=False)

    def error(visibility, change):
        def loss(latents):
            stream = Frames(latents, jnp.full((2, 4), 0.5), chunk_layout(4, 1))
            return jnp.sum(model((stream,), data.conditions, visibility=visibility).predictions[0][:, 0])

        return jax.grad(loss)(data.latents)[:, change]

    both = jax.jit(lambda: (error(Bidirectional(), 3), error(pattern(), 3)))()
    assert float(jnp.max(jnp.abs(both[0]))) > 1e-3
    assert float(jnp.max(jnp.abs(both[1]))) == 0
    assert CONFIG.layers == 3
