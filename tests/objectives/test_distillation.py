"""Distillation: its schedule, where its gradient flows and where not, its losses against numpy."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import network
from tests.objectives.parts import TEXT, axes, batch
from vidar.attention.cache import init_cache, write
from vidar.attention.visibility import Bidirectional, TeacherForcing, chunk_layout
from vidar.models.frames import Frames
from vidar.objectives import targets
from vidar.objectives.diffusion import Diffusion
from vidar.objectives.distillation import Distillation
from vidar.objectives.forcing import SelfForcing
from vidar.objectives.matching import DMD
from vidar.objectives.teacher_forcing import TeacherForcing as TeacherForcingObjective
from vidar.sampling import flight
from vidar.sampling.flight import Flight
from vidar.sampling.guidance import classifier_free
from vidar.sampling.noise import Purpose, frame_noise
from vidar.sampling.solvers import FewStep

KEY = jax.random.key(3)
AXES = axes(frames=4, chunk=2, solver=FewStep((1000.0, 600.0, 300.0)), window=4)
OBJECTIVE = Distillation(SelfForcing(given=1), DMD(guidance=classifier_free(4.0, ("text",))))
NETWORKS = {name: network(TEXT, seed) for seed, name in enumerate(("student", "critic", "teacher"))}


def clip_keys(data, phase="student"):
    """The keys of a phase's clips, as `loss` derives them: student and critic learn from rollouts of their own."""
    return targets.clip_keys(jax.random.fold_in(KEY, int(phase == "critic")), data.index)


def session_keys(data, phase="student"):
    """The rollout's keys."""
    return targets.fold_each(clip_keys(data, phase), 0)


@functools.cache
def gradients(phase, given=1):
    """Loss, metrics, and the gradient with respect to every network of one phase."""
    objective, data = replace(OBJECTIVE, forcing=SelfForcing(given=given)), batch()

    def loss(networks):
        value, (metrics, _) = objective.loss(phase, networks, (), AXES, data, jnp.int32(0), KEY)
        return value, metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(NETWORKS)


def rollout(student, data, exit_row, forcing=OBJECTIVE.forcing, phase="student"):
    chunks = (4 - forcing.given_frames(AXES)) // 2
    exit_rows = jnp.broadcast_to(exit_row, (chunks,))
    return forcing.rollout(student, data, AXES, session_keys(data, phase), exit_rows, jnp.int32(0))


def assert_trees_close(ours, theirs, tolerance=1e-4):
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(float(jnp.max(jnp.abs(right))), 1e-6)
        np.testing.assert_allclose(left, right, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


# ---------------------------------------------------------------------------------------------------------- schedule


def test_schedule_of_the_paper():
    """600 steps are 120 updates of the student and 600 of the critic; the average moves 80 times."""
    objective = Distillation()
    phases = [(step, phase) for step in range(600) for phase in objective.phases(step)]
    student = [step for step, phase in phases if phase.name == "student"]
    assert (len(student), sum(phase.name == "critic" for _, phase in phases)) == (120, 600)
    role = objective.roles["student"]
    assert sum(step >= role.ema_start for step in student) == 80
    assert role.ema == 0.99
    assert [phase.name for phase in objective.phases(0)] == ["student", "critic"]
    assert len({phase.batch for phase in objective.phases(0)}) == 2
    noise = objective.matching.noise
    assert (noise.shift, noise.low, noise.high) == (5.0, 0.02, 0.98)
    np.testing.assert_allclose(1000 * FewStep().levels, [1000, 937.5, 833.333, 625, 0], atol=1e-3)


def test_critic_starts_from_the_teacher_which_is_frozen():
    roles = Distillation(student="runs/a", teacher="runs/b").roles
    assert {name: (role.source, role.optimizer) for name, role in roles.items()} == {
        "student": ("runs/a", "student"),
        "critic": ("runs/b", "critic"),
        "teacher": ("runs/b", None),
    }


def test_one_exit_row_for_all_clips_drawn_uniformly():
    data = batch()
    other = replace(data, index=data.index + 5)

    @jax.jit
    def rows(keys, data):
        def one(key):
            _, (metrics, _) = OBJECTIVE.loss("critic", NETWORKS, (), AXES, data, jnp.int32(0), key)
            return metrics["exit_row"]

        return jax.lax.map(one, keys)

    keys = jax.random.split(jax.random.key(0), 60)
    drawn = np.asarray(rows(keys, data))
    np.testing.assert_array_equal(drawn, rows(keys, other))
    counts = np.bincount(drawn.astype(int), minlength=3)
    assert len(counts) == 3
    assert counts.min() >= 10


# ---------------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("exit_row", [0, 2])
def test_gradient_is_that_of_the_exit_passes_alone(exit_row):
    """Against chunks written out: constant context, constant latents, one differentiated pass each, live text."""
    data, student, plan = batch(), NETWORKS["student"], AXES.sampler
    forcing = SelfForcing()
    weights = jax.random.normal(jax.random.key(8), data.latents.shape)
    table = jnp.asarray(plan.solver.levels, jnp.float32)

    def ours(student):
        return jnp.sum(weights * rollout(student, data, jnp.int32(exit_row), forcing))

    def predict(student, x, level, start, cache):
        stream = Frames(x, jnp.full((2, 2), level), chunk_layout(2, 2), start=jnp.full((2,), start, jnp.int32))
        conditions = data.conditions.frames(start, start + 2)
        output = student((stream,), conditions, visibility=plan.visibility, cache=cache)
        return x - level * output.predictions[0], output

    def noise(purpose, step, start):
        frames = jnp.broadcast_to(jnp.arange(start, start + 2, dtype=jnp.int32)[None], (2, 2))
        return frame_noise(session_keys(data), purpose, frames, jnp.full((2,), step, jnp.int32), plan.latent)

    def theirs(student):
        frozen, total = jax.lax.stop_gradient(student), 0.0
        cache = init_cache(plan.geometry, layers=3, rows=2, heads=2, head_dim=24, dtype=jnp.float32)
        for start in (0, 2):
            x = noise(Purpose.INITIAL, 0, start)
            for row in range(exit_row):
                clean, _ = predict(frozen, x, table[row], start, cache)
                x = (1 - table[row + 1]) * clean + table[row + 1] * noise(Purpose.RENOISE, row + 1, start)
            clean, _ = predict(student, x, table[exit_row], start, cache)
            total += jnp.sum(weights[:, start : start + 2] * clean)
            _, output = predict(frozen, jax.lax.stop_gradient(clean), jnp.float32(0), start, cache)
            cache = write(cache, output.keys, output.values)
        return total

    (value, found), (expected_value, expected) = jax.jit(
        lambda student: (jax.value_and_grad(ours)(student), jax.value_and_grad(theirs)(student))
    )(student)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-4)
    assert_trees_close(found, expected)


def test_no_gradient_crosses_from_chunk_to_chunk(monkeypatch):
    """What a chunk emits reaches later chunks through the cache, and its gradient does not: exactly zero."""
    data, plan = batch(), AXES.sampler
    predicted = Flight.run_to_exit

    def run(shift_bu):
        def shifted(flight, model, exit_row, gradient):
            done, written = predicted(flight, model, exit_row, gradient)
            chunk = jnp.broadcast_to(done.start, (2,)) // plan.chunk
            shift = jnp.take_along_axis(shift_bu, chunk[:, None], axis=1)
            return replace(done, latents=done.latents + shift[:, :, None, None, None]), written

        with monkeypatch.context() as patch:
            patch.setattr(Flight, "run_to_exit", shifted)
            video = rollout(NETWORKS["student"], data, jnp.int32(1), SelfForcing())
        return video.reshape(2, 2, -1)

    still, moved = (jax.jit(run)(jnp.zeros((2, 2)).at[0, 0].set(shift)) for shift in (0.0, 0.5))
    jacobian = jax.jit(jax.jacrev(lambda shift: jnp.sum(run(shift), axis=2)))(jnp.zeros((2, 2)))
    size = still.shape[2]
    np.testing.assert_array_equal(jacobian, size * np.einsum("ac,bd->abcd", np.eye(2), np.eye(2)))
    assert float(jnp.max(jnp.abs(moved[0, 1] - still[0, 1]))) > 1e-3
    np.testing.assert_array_equal(moved[1], still[1])


def test_no_gradient_reaches_given_frames_or_initial_noise(monkeypatch):
    data = batch()

    def video(latents, noise):
        with monkeypatch.context() as patch:
            patch.setattr(flight, "frame_noise", lambda *arguments: frame_noise(*arguments) + noise)
            return rollout(NETWORKS["student"], replace(data, latents=latents), jnp.int32(0))[:, 2:]

    zero = jnp.zeros(())
    gradient = jax.grad(lambda latents, noise: jnp.sum(video(latents, noise)), (0, 1))
    for found in jax.jit(gradient)(data.latents, zero):
        np.testing.assert_array_equal(found, 0)
    forward = jax.jit(video)
    still = forward(data.latents, zero)
    for moved in (forward(data.latents.at[:, :2].add(1.0), zero), forward(data.latents, zero + 0.5)):
        assert float(jnp.max(jnp.abs(moved - still))) > 1e-3


def test_only_the_network_of_the_phase_is_trained():
    for phase in ("student", "critic"):
        _, found = gradients(phase)
        for name, gradient in found.items():
            largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
            assert (largest > 1e-4) == (name == phase), (phase, name)
            assert largest == 0 or name == phase


def text_leaves(gradient):
    """Gradients of all parameters that text passes through."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)}
    found = {name: leaf for name, leaf in leaves.items() if "text" in name}
    parts = ("query.kernel", "key.kernel", "value.kernel", "output.kernel", "query_norm", "key_norm")
    wanted = [f".blocks.text_attention.{part}" for part in parts]
    wanted += [".blocks.text_norm.weight", ".blocks.text_norm.bias", ".text_inner.kernel", ".text_outer.kernel"]
    assert all(any(name.startswith(prefix) for name in found) for prefix in wanted)
    return found


def regression_gradient(objective, axis):
    def loss(student):
        return objective.loss("student", {"student": student}, (), axis, batch(), jnp.int32(0), KEY)[0]

    return jax.jit(jax.grad(loss))(NETWORKS["student"])


@pytest.mark.parametrize("name", ["student", "critic", "diffusion", "teacher forcing"])
def test_every_cross_attention_weight_gets_a_gradient_in_every_objective(name):
    """In every layer, and not by rounding: the condition cache is never cut in the differentiated pass."""
    if name in ("student", "critic"):
        gradient = gradients(name)[1][name]
    elif name == "diffusion":
        gradient = regression_gradient(Diffusion(), axes(Bidirectional()))
    else:
        gradient = regression_gradient(TeacherForcingObjective(), axes(TeacherForcing()))
    for path, leaf in text_leaves(gradient).items():
        stacked = leaf if ".blocks" in path else leaf[None]
        for layer, part in enumerate(stacked):
            assert float(jnp.max(jnp.abs(part))) > 1e-6, f"{path}, layer {layer}"


# ------------------------------------------------------------------------------------------------------------- losses


def test_direction_and_pull_against_numpy():
    rng = np.random.default_rng(0)
    x, fake, real = rng.normal(size=(3, 2, 4, 3, 3, 2)).astype(np.float32)
    mask = np.array([False, True, True, True])
    direction = targets.dmd_direction(*(jnp.asarray(value) for value in (x, fake, real)), jnp.asarray(mask))
    for row in range(2):
        scale = np.abs(x[row, 1:] - real[row, 1:]).mean()
        np.testing.assert_allclose(direction[row, 1:], (fake[row, 1:] - real[row, 1:]) / scale, rtol=1e-5)
    np.testing.assert_array_equal(direction[:, 0], 0)
    gradient = jax.grad(lambda x: targets.pull(x, direction, x.size))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, np.asarray(direction) / x.size, rtol=1e-5, atol=1e-9)
    assert float(targets.pull(jnp.asarray(x), direction, x.size)) == pytest.approx(
        0.5 * float(np.mean(np.asarray(direction) ** 2)), rel=1e-5
    )


def test_a_teacher_that_agrees_exactly_pulls_nowhere():
    x = jnp.ones((1, 2, 2, 2, 1))
    np.testing.assert_array_equal(targets.dmd_direction(x, x + 1, x, jnp.ones((2,), bool)), 0)


@functools.cache
def compared(phase):
    """Rollout of a phase, its draw of level and noise, and the networks' velocities, by public parts alone."""
    data = batch()
    exit_row = gradients(phase)[0][1]["exit_row"].astype(jnp.int32)

    @jax.jit
    def run(exit_row):
        keys = clip_keys(data, phase)
        video = rollout(NETWORKS["student"], data, exit_row, phase=phase)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(targets.fold_each(keys, 1))
        level = jnp.clip(5 * uniform / (1 + 4 * uniform), 0.02, 0.98)
        noise = targets.clip_noise(targets.fold_each(keys, 2), video.shape[1:])
        level = level[:, None] * jnp.array([[0.0, 0.0, 1.0, 1.0]])
        wide = level[:, :, None, None, None]
        noisy = (1 - wide) * video + wide * noise
        stream = Frames(noisy, level, chunk_layout(4, 4))
        null = data.conditions.drop(("text",), jnp.zeros((2,), bool))

        def velocity(name, conditions):
            return NETWORKS[name]((stream,), conditions, visibility=Bidirectional()).predictions[0]

        fake = velocity("critic", data.conditions)
        return video, wide, noise, noisy, fake, velocity("teacher", data.conditions), velocity("teacher", null)

    return tuple(np.asarray(value, np.float64) for value in run(exit_row))


def test_gradient_of_the_student_is_the_distribution_matching_direction_over_its_size():
    """dL/dx = g / numel, with the teacher guided as r_c + w (r_c - r_u), w = 3; given frames carry no loss."""
    video, level, _, noisy, fake, conditional, null = compared("student")
    fake, conditional, null = (noisy - level * value for value in (fake, conditional, null))
    real = conditional + 3.0 * (conditional - null)
    scale = np.abs(video - real)[:, 2:].mean(axis=(1, 2, 3, 4), keepdims=True)
    direction = (fake - real) / scale
    direction[:, :2] = 0.0
    (loss, metrics), found = gradients("student")
    count = direction[:, 2:].size
    assert float(loss) == pytest.approx(0.5 * np.sum(direction**2) / count, rel=1e-3)
    assert float(metrics["dmd_gradient"]) == pytest.approx(np.sqrt(np.sum(direction**2) / count), rel=1e-3)
    cotangent = jnp.asarray(direction / count, jnp.float32)
    exit_row = metrics["exit_row"].astype(jnp.int32)
    expected = jax.jit(
        lambda student: jax.vjp(lambda student: rollout(student, batch(), exit_row), student)[1](cotangent)[0]
    )(NETWORKS["student"])
    assert_trees_close(found["student"], expected, 1e-3)


def test_critic_loss_is_the_mean_squared_velocity_error_of_generated_frames():
    video, _, noise, _, fake, _, _ = compared("critic")
    loss, metrics = gradients("critic")[0]
    error = np.mean((fake - (noise - video)) ** 2, axis=(2, 3, 4))
    assert float(loss) == pytest.approx(np.mean(error[:, 2:]), rel=1e-3)
    sums = {name: float(value) for name, value in metrics.items()}
    assert sum(value for name, value in sums.items() if name.endswith(":count")) == 4
    assert sum(value for name, value in sums.items() if name.endswith(":sum")) == pytest.approx(
        error[:, 2:].sum(), rel=1e-3
    )


def test_given_chunks_are_the_data_and_the_rest_continues_them():
    data = batch()
    run = jax.jit(lambda data: rollout(NETWORKS["student"], data, jnp.int32(2)))
    video = run(data)
    np.testing.assert_array_equal(video[:, :2], data.latents[:, :2])
    assert float(jnp.max(jnp.abs(video[:, 2:] - data.latents[:, 2:]))) > 0.1
    later = run(replace(data, latents=data.latents.at[:, 2:].add(1.0)))
    np.testing.assert_array_equal(later, video)
