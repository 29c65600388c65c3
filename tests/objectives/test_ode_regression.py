"""ODE regression: loss and gradient against numpy, what the student sees, and a Gaussian that one step learns."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.networks import CONFIG, LATENT, network
from tests.objectives.parts import TEXT, Answer, Watched, axes
from vidar.attention.visibility import CLEAN, NOISY, TeacherForcing, chunk_layout
from vidar.errors import ConfigError
from vidar.models.frames import Batch, Conditions
from vidar.objectives.ode_regression import OdeRegression
from vidar.sampling.solvers import Euler, FewStep, level_table

KEY = jax.random.key(42)
TABLE = level_table(FewStep()).astype(np.float64)


def clips(rows: int = 3, frames: int = 4, seed: int = 1) -> Batch:
    """Random clips whose trajectories of five states end in their latents."""
    rng = np.random.default_rng(seed)
    trajectory = rng.normal(size=(rows, 5, frames, *LATENT)).astype(np.float32)
    conditions = Conditions(
        text=rng.normal(size=(rows, 6, 10)).astype(np.float32),
        actions=rng.integers(0, 5, (rows, frames)).astype(np.int32),
    )
    index = np.arange(10, 10 + rows, dtype=np.int32)
    return jax.tree.map(jnp.asarray, Batch(trajectory[:, -1], conditions, index, trajectory))


@partial(jax.jit, static_argnums=(0, 1, 3, 4))
def observe(objective, axis, data, network_or_function, prediction="v", key=KEY):
    """The loss, its metrics, and what the network was given."""
    watched = Watched(network_or_function, prediction)
    loss, (metrics, _) = objective.loss("student", {"student": watched}, (), axis, data, jnp.int32(0), key)
    return loss, metrics, *watched.calls[0]


def same(latents, level):
    """A network that does nothing."""
    return latents


def nothing(latents, level):
    """A network that predicts zeros."""
    return jnp.zeros_like(latents)


def states_of(stream, trajectory):
    """Which of a trajectory's states each frame of a stream is in."""
    equal = np.asarray(stream.latents)[:, None] == np.asarray(trajectory)
    index = equal.all(axis=(3, 4, 5)).argmax(axis=1)
    assert equal.all(axis=(3, 4, 5)).any(axis=1).all()
    return index


@pytest.mark.parametrize("context", ["noisy", "clean"])
@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
def test_loss_and_gradient_equal_numpy(context, prediction):
    """A network with one parameter for each level's scale and one offset; its gradient by hand."""
    data, axis = clips(), axes(TeacherForcing() if context == "clean" else None, chunk=2)
    objective = OdeRegression(context=context)
    scale, offset = jnp.float32(0.7), jnp.float32(-0.2)

    def answer(latents, level, scale, offset):
        return latents * (scale * (1.0 + level[:, :, None, None, None])) + offset

    def run(parameters, data):
        watched = Watched(lambda latents, level: answer(latents, level, *parameters), prediction)
        loss, _ = objective.loss("student", {"student": watched}, (), axis, data, jnp.int32(0), KEY)
        return loss, watched.calls[0][0][-1]

    (loss, stream), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))((scale, offset), data)
    index = states_of(stream, data.trajectory)
    level = TABLE[index][:, :, None, None, None]
    x, clean = np.asarray(stream.latents, np.float64), np.asarray(data.latents, np.float64)
    out = x * (0.7 * (1 + level)) - 0.2
    # Each parametrisation is linear in what the network says: clean = base + slope * out.
    with np.errstate(divide="ignore"):
        base, slope = {
            "v": (x, -level),
            "x0": (0 * x, 0 * level + 1),
            "eps": (np.where(level < 1, x / (1 - level), 0), np.where(level < 1, -level / (1 - level), 0)),
        }[prediction]
    error = base + slope * out - clean
    weight = (level > 0) / ((level > 0).sum() * np.prod(LATENT))
    assert float(loss) == pytest.approx((weight * error**2).sum(), rel=1e-5)
    by_hand = [(weight * 2 * error * slope * part).sum() for part in (x * (1 + level), 1)]
    np.testing.assert_allclose(np.asarray(gradient), by_hand, rtol=1e-5)


def test_each_chunk_is_in_a_state_of_its_own():
    data = clips(rows=64)
    _, metrics, (stream,), conditions = observe(OdeRegression(), axes(chunk=2), data, same)
    index = states_of(stream, data.trajectory)
    np.testing.assert_array_equal(stream.level, level_table(FewStep())[index])
    np.testing.assert_array_equal(index[:, 0::2], index[:, 1::2])
    assert np.mean(index[:, 0] != index[:, 2]) > 0.6
    assert np.bincount(index[:, 0], minlength=5).min() > 4
    counted = sum(float(value) for name, value in metrics.items() if name.endswith(":count"))
    assert counted == (index < 4).sum()
    assert stream.layout == chunk_layout(4, 2)
    np.testing.assert_array_equal(conditions.actions, data.conditions.actions)


def test_draws_belong_to_the_sample_and_not_to_its_slot():
    data = clips(rows=8)
    turned = jax.tree.map(lambda x: x[::-1], data)
    _, _, (one,), _ = observe(OdeRegression(), axes(), data, same)
    _, _, (other,), _ = observe(OdeRegression(), axes(), turned, same)
    np.testing.assert_array_equal(one.level, other.level[::-1])
    _, _, (later,), _ = observe(OdeRegression(), axes(), data, same, "v", key=jax.random.key(43))
    assert np.any(np.asarray(later.level) != np.asarray(one.level))


def test_clean_context_stands_beside_noisy_states():
    data = clips(rows=32)
    objective = OdeRegression(context="clean")
    _, _, (clean, noisy), _ = observe(objective, axes(TeacherForcing(), chunk=2), data, same)
    np.testing.assert_array_equal(clean.latents, data.latents)
    np.testing.assert_array_equal(clean.level, 0)
    assert clean.layout == chunk_layout(4, 2, role=CLEAN)
    assert noisy.layout == chunk_layout(4, 2, role=NOISY)
    # A clean state would teach nothing: nobody sees it.
    assert (
        np.bincount(states_of(noisy, data.trajectory).ravel(), minlength=5).min(initial=99, where=[1, 1, 1, 1, 0]) > 8
    )
    assert float(jnp.min(noisy.level)) == np.float32(0.625)
    assert (objective.beside, OdeRegression().beside) == (True, False)


@pytest.mark.parametrize("context", ["noisy", "clean"])
def test_given_chunks_stay_clean_and_carry_no_loss(context):
    data, axis = clips(rows=16), axes(TeacherForcing() if context == "clean" else None, chunk=2, first=True, frames=5)
    data = clips(rows=16, frames=5)
    objective = OdeRegression(context=context, given=2)
    loss, _, streams, _ = observe(objective, axis, data, nothing, "x0")
    index = states_of(streams[-1], data.trajectory)
    np.testing.assert_array_equal(index[:, :3], 4)
    assert np.min(index[:, 3:]) < 4
    late = np.broadcast_to((index < 4)[:, :, None, None, None], data.latents.shape)
    assert loss == pytest.approx(np.mean(np.asarray(data.latents)[late] ** 2), rel=1e-5)


def test_later_chunks_learn_from_noisy_ones_and_not_the_other_way():
    """Through a real network: chunk 0's prediction ignores chunk 1's state, chunk 1's depends on chunk 0's."""
    model, axis, data = network(TEXT), axes(chunk=2), clips(rows=1)

    def predictions(data):
        watched = Watched(model)
        OdeRegression().loss("student", {"student": watched}, (), axis, data, jnp.int32(0), KEY)
        streams, conditions = watched.calls[0]
        return model(streams, conditions, visibility=axis.visibility).predictions[0]

    run = jax.jit(predictions)
    before = np.asarray(run(data))
    for chunk, changed in ((0, [True, True]), (1, [False, True])):
        other = data.trajectory.at[:, :, 2 * chunk : 2 * chunk + 2].add(0.5)
        after = np.asarray(run(dataclasses.replace(data, trajectory=other)))
        assert [np.abs(after - before)[:, part].max() > 1e-4 for part in (slice(0, 2), slice(2, 4))] == changed


def test_every_parameter_gets_a_gradient():
    model, data, axis = network(TEXT), clips(rows=6), axes(chunk=2, drop=0.5)

    @jax.jit
    def gradient(model):
        return jax.grad(
            lambda model: OdeRegression().loss("student", {"student": model}, (), axis, data, jnp.int32(0), KEY)[0]
        )(model)

    sizes = {
        jax.tree_util.keystr(path): float(jnp.max(jnp.abs(leaf)))
        for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(model))[0]
    }
    assert [path for path, size in sizes.items() if not size > 0] == []


def test_trajectories_must_be_those_of_the_solver():
    bare = dataclasses.replace(clips(), trajectory=None)
    with pytest.raises(ConfigError, match="needs trajectories: set data.trajectories"):
        OdeRegression().loss("student", {}, (), axes(), bare, jnp.int32(0), KEY)
    with pytest.raises(ConfigError, match="5 states for the 9 of the solver"):
        OdeRegression().loss("student", {"student": None}, (), axes(solver=Euler(8)), clips(), jnp.int32(0), KEY)
    with pytest.raises(ConfigError, match="objective.context='dirty' is unknown: use one of noisy, clean"):
        OdeRegression(context="dirty")


# ------------------------------------------------------------------------------------------------------------- learning

MEAN, DEVIATION = np.array([1.5, -1.0, 0.5]), np.array([0.4, 0.8, 1.6])


def exact_trajectories(key, rows):
    """The probability flow of a diagonal Gaussian: the standardised state never moves."""
    noise = jax.random.normal(key, (rows, 1, 4, *LATENT))
    level = jnp.asarray(TABLE, jnp.float32)[None, :, None, None, None, None]
    mean, deviation = (jnp.asarray(x, jnp.float32)[None, None, None, None, None] for x in (MEAN, DEVIATION))
    return (1 - level) * mean + jnp.sqrt(((1 - level) * deviation) ** 2 + level**2) * noise


@partial(jax.tree_util.register_dataclass, data_fields=["scale", "offset"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Affine:
    """A student whose velocity is affine in the state, by channel and level."""

    scale: jax.Array
    offset: jax.Array

    config = dataclasses.replace(CONFIG, prediction="v")

    def __call__(self, streams, conditions, *, visibility, cache=None):
        (stream,) = streams
        table = jnp.asarray(level_table(FewStep()))
        index = jnp.argmin(jnp.abs(stream.level[:, :, None] - table[None, None]), axis=-1)
        scale, offset = (part[index][:, :, None, None] for part in (self.scale, self.offset))
        return Answer((scale * stream.latents + offset,))


def divergence(student):
    """KL divergence of the student's one-step samples, mean + deviation · noise, from the data, in nats."""
    mean, deviation = -np.asarray(student.offset[0]), 1 - np.asarray(student.scale[0])
    ratio = (deviation / DEVIATION) ** 2
    return 0.5 * float(np.sum(ratio + ((mean - MEAN) / DEVIATION) ** 2 - 1 - np.log(ratio)))


def test_one_step_samples_become_the_data():
    axis, objective, data = axes(chunk=2), OdeRegression(), clips(rows=32)
    student = Affine(jnp.full((5, 3), 0.5), jnp.zeros((5, 3)))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 200))
    assert divergence(student) > 1

    @jax.jit
    def step(student, state, number):
        key = jax.random.fold_in(KEY, number)
        trajectory = exact_trajectories(key, 32)
        clips = dataclasses.replace(data, trajectory=trajectory, latents=trajectory[:, -1])

        def loss(student):
            return objective.loss("student", {"student": student}, (), axis, clips, number, key)[0]

        value, gradient = jax.value_and_grad(loss)(student)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(student, updates), state, value

    state = optimizer.init(student)
    for number in range(200):
        student, state, value = step(student, state, jnp.int32(number))
    assert float(value) < 1e-3
    assert divergence(student) < 0.02
    # And not by the exact first level alone: every state is mapped to its end.
    trajectory = np.asarray(exact_trajectories(jax.random.key(7), 8))
    scale, offset = np.asarray(student.scale), np.asarray(student.offset)
    for index in range(4):
        state = trajectory[:, index]
        clean = state - TABLE[index] * (scale[index] * state + offset[index])
        np.testing.assert_allclose(clean, trajectory[:, -1], atol=0.1)
