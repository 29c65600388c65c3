"""Losses and gradients of DMD, SiD, GAN and consistency against numpy in fp64, where gradients are differences."""

import functools
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import CONFIG, LATENT
from tests.objectives.parts import Answer, axes, batch
from vidar.attention.visibility import TeacherForcing
from vidar.diffusion import flow
from vidar.errors import ConfigError
from vidar.models.frames import Conditions
from vidar.objectives import targets
from vidar.objectives.consistency import Consistency
from vidar.objectives.forcing import Generated
from vidar.objectives.matching import DMD, GAN, NoiseLaw, SiD
from vidar.sampling.guidance import Branch, classifier_free
from vidar.sampling.solvers import FewStep

RNG = np.random.default_rng(0)
SHAPE = (2, 4, *LATENT)
VIDEO = RNG.normal(size=SHAPE)
DATA = RNG.normal(size=SHAPE)
KEYS = targets.clip_keys(jax.random.key(1), jnp.asarray([4, 9], jnp.int32))
GIVEN = 1
COUNTS = np.arange(4) >= GIVEN


def answer(x, level, weight, keep=1.0, library=np):
    """What a stand-in network says the clean frames are; nonlinear, and different without its conditions."""
    wide = level.reshape(*level.shape, 1, 1, 1)
    return library.tanh(weight * x) * (1 - 0.3 * wide) + 0.2 * keep * x * wide


@dataclass(frozen=True)
class Network:
    """The same in place of a network: rows whose actions are dropped are answered otherwise."""

    weight: float

    @property
    def config(self):
        return replace(CONFIG, prediction="x0")

    def __call__(self, streams, conditions, *, visibility):
        keep = 1.0
        if conditions.actions_kept is not None:
            keep = conditions.actions_kept.astype(jnp.float32)[:, None, None, None, None]
        say = partial(answer, weight=self.weight, keep=keep, library=jnp)
        return Answer(tuple(say(stream.latents, stream.level) for stream in streams))

    def logits(self, frames, conditions):
        return judge(frames.latents, frames.level, self.weight, jnp)


def judge(x, level, weight, library=np):
    wide = level.reshape(*level.shape, 1, 1, 1)
    return library.sum(library.sin(weight * x) * (1 + wide), axis=(1, 2, 3, 4)) / 7


def slopes(function, x, step=1e-5):
    """Gradient by central differences in fp64."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        moved = x.copy()
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


@functools.cache
def drawn(part=0):
    """Level and noise of a comparison, as any matching draws them."""
    levels = jax.vmap(lambda key: flow.random_level(key, (), 5.0, 0.02, 0.98))(targets.fold_each(KEYS, 1))
    level = np.where(COUNTS, np.asarray(levels, np.float64)[:, None], 0.0)
    key = targets.fold_each(KEYS, 2)
    noise = targets.clip_noise(targets.fold_each(key, part - 1) if part else key, SHAPE[1:])
    return level, np.asarray(noise, np.float64)


def noised(x, part=0):
    level, noise = drawn(part)
    wide = level[..., None, None, None]
    return (1 - wide) * x + wide * noise, level


def generated(video):
    actions = jnp.zeros(SHAPE[:2], jnp.int32)
    return Generated(video, Conditions(actions=actions), {}, GIVEN)


def ours(matching, phase="student", of="video"):
    """Loss and gradient with respect to the video."""
    networks = {"critic": Network(0.7), "teacher": Network(1.3)}
    latents = replace(batch(text=False), latents=jnp.asarray(DATA, jnp.float32))

    def loss(video):
        return getattr(matching, f"{phase}_loss")(networks, generated(video), latents, KEYS)[0]

    return jax.value_and_grad(loss)(jnp.asarray(VIDEO, jnp.float32))


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def scores(x, scale):
    noisy, level = noised(x)
    fake = answer(noisy, level, 0.7)
    conditional, null = answer(noisy, level, 1.3), answer(noisy, level, 1.3, keep=0.0)
    return fake, null + scale * (conditional - null)


def guided(below):
    """A scale of 4 for clips up to a level, which one of them is above, and of 1 above it."""
    level = drawn()[0][:, -1]
    assert level.min() < 0.85 < level.max()
    return np.where(level > below, 1.0, 4.0).reshape(2, 1, 1, 1, 1)


@pytest.mark.parametrize("below", [1.0, 0.85])
def test_dmd(below):
    """dL/dx = (fake - real) / mean|x - real| / size, with w = 3 in the field's way: a scale of 4; above a level, 1."""
    fake, real = scores(VIDEO, guided(below))
    scale = np.abs(VIDEO - real)[:, GIVEN:].mean(axis=(1, 2, 3, 4), keepdims=True)
    direction = np.where(COUNTS[:, None, None, None], (fake - real) / scale, 0.0)
    count = direction[:, GIVEN:].size
    value, gradient = ours(DMD(guidance=classifier_free(4.0, ("actions",)), guided_below=below))
    close(value, 0.5 * np.sum(direction**2) / count)
    close(gradient, direction / count)


def test_only_a_branch_with_all_conditions_can_stand_for_the_unguided_teacher():
    with pytest.raises(ConfigError, match="guided_below: needs a branch"):
        SiD(guidance=(Branch(1.0, ("text",)),), guided_below=0.9)


@pytest.mark.parametrize(("alpha", "below"), [(1.0, 0.0), (0.5, 0.85)])
def test_sid(alpha, below):
    """The scores are differentiated, with a scale of 4 below a level; the divisor is not."""
    scale = guided(below)
    _, real = scores(VIDEO, scale)
    size = np.abs(VIDEO - real)[:, GIVEN:].mean(axis=(1, 2, 3, 4))

    def loss(x):
        fake, real = scores(x, scale)
        apart = real - fake
        return np.mean((apart * ((real - x) - alpha * apart))[:, GIVEN:].mean(axis=(1, 2, 3, 4)) / size)

    value, gradient = ours(SiD(alpha=alpha, guidance=classifier_free(4.0, ("actions",)), guided_below=below))
    close(value, loss(VIDEO))
    close(gradient, slopes(loss, VIDEO))


def softplus(x):
    return np.logaddexp(0, x)


@pytest.mark.parametrize("relativistic", [True, False])
def test_gan(relativistic):
    """Both sides, with slopes at data and at generated clips by finite differences along one random direction."""
    matching = GAN(relativistic=relativistic, penalty_real=3.0, penalty_fake=2.0)

    def logits(x):
        return judge(*noised(x, 1), 0.7), judge(*noised(DATA, 2), 0.7)

    def student(x):
        fake, real = logits(x)
        return softplus(-(fake - real) if relativistic else -fake).mean()

    def critic(x):
        fake, real = logits(x)
        loss = softplus(fake - real).mean() if relativistic else softplus(-real).mean() + softplus(fake).mean()
        away = 0.01 * np.asarray(targets.clip_noise(targets.fold_each(KEYS, 3), SHAPE[1:]), np.float64)
        for weight, clip, before, part in ((2.0, x, fake, 1), (3.0, DATA, real, 2)):
            noisy, level = noised(clip, part)
            slope = (judge(noisy + away, level, 0.7) - before) / 0.01
            loss += 0.5 * weight * np.mean(slope**2)
        return loss

    value, gradient = ours(matching)
    close(value, student(VIDEO))
    close(gradient, slopes(student, VIDEO))
    value, gradient = ours(matching, "critic")
    # A difference over a hundredth loses two digits in fp32.
    assert float(value) == pytest.approx(critic(VIDEO), rel=1e-3)
    expected = slopes(critic, VIDEO)
    np.testing.assert_allclose(gradient, expected, atol=5e-3 * np.abs(expected).max())
    plain = replace(matching, penalty_real=0.0, penalty_fake=0.0)
    fake, real = logits(VIDEO)
    expected = softplus(fake - real).mean() if relativistic else softplus(-real).mean() + softplus(fake).mean()
    close(ours(plain, "critic")[0], expected)


def test_data_are_judged_from_the_frame_on_where_the_clips_conditions_begin():
    networks, matching = {"critic": Network(0.7)}, GAN()
    before = jnp.asarray(RNG.normal(size=(2, 3, *LATENT)), jnp.float32)
    data, clip = jnp.asarray(DATA, jnp.float32), generated(jnp.asarray(VIDEO, jnp.float32))

    def loss(clip, latents):
        return float(matching.student_loss(networks, clip, replace(batch(text=False), latents=latents), KEYS)[0])

    longer = jnp.concatenate([before, data], axis=1)
    assert loss(replace(clip, start=jnp.int32(3)), longer) == pytest.approx(loss(clip, data), rel=1e-6)
    assert loss(clip, longer) != pytest.approx(loss(clip, data), rel=1e-3)
    # Where nothing goes along with frames, data are as long as a clip, and all of it.
    assert loss(replace(clip, start=jnp.int32(3)), data) == pytest.approx(loss(clip, data), rel=1e-6)


@pytest.mark.parametrize("matching", [DMD(), SiD()], ids=["dmd", "sid"])
def test_the_critic_denoises_what_was_generated(matching):
    def loss(x):
        noisy, level = noised(x)
        _, noise = drawn()
        wide = np.where(level == 0, 1, level)[..., None, None, None]
        velocity = (noisy - answer(noisy, level, 0.7)) / wide
        return np.mean((velocity - (noise - x))[:, GIVEN:] ** 2)

    value, gradient = ours(matching, "critic")
    close(value, loss(VIDEO))
    close(gradient, slopes(loss, VIDEO))


def test_noise_law_keeps_given_frames_clean_and_gives_one_level_a_clip():
    level = NoiseLaw(0.3, 0.6).draw(generated(jnp.asarray(VIDEO, jnp.float32)), KEYS)
    np.testing.assert_array_equal(level[:, :GIVEN], 0)
    np.testing.assert_array_equal(level[:, GIVEN], level[:, -1])
    assert 0.299999 < float(level[:, -1].min()) <= float(level[:, -1].max()) < 0.600001


@pytest.mark.parametrize("seed", [1])
def test_consistency(seed):
    """Neighbouring levels of the teacher's ODE, each chunk at its own; the goal is not differentiated."""
    objective = Consistency(steps=2, shift=3.0, given=1)
    axis = axes(TeacherForcing(), frames=4, chunk=2, solver=FewStep((1000.0,)))
    data = replace(batch(text=False), latents=jnp.asarray(DATA, jnp.float32))
    key = jax.random.key(seed)
    keys = targets.clip_keys(key, data.index)
    chunks = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2))(targets.fold_each(keys, 0))
    index = np.repeat(np.asarray(chunks), 2, axis=1)
    grid = flow.level_grid(2, 3.0)
    level, cleaner = grid[index], grid[index + 1]
    noise = np.asarray(targets.clip_noise(targets.fold_each(keys, 1), SHAPE[1:]), np.float64)
    wide = level[..., None, None, None]
    noisy = (1 - wide) * DATA + wide * noise
    stepped = noisy + (cleaner[..., None, None, None] - wide) * (noisy - answer(noisy, level, 1.3)) / wide
    goal = np.where(cleaner[..., None, None, None] == 0, stepped, answer(stepped, cleaner, 0.7))

    def loss(weight):
        return np.mean((answer(noisy, level, weight) - goal)[:, 2:] ** 2)

    def found(weight):
        networks = {"student": Network(weight), "teacher": Network(1.3)}
        return objective.loss("student", networks, (), axis, data, jnp.int32(0), key)[0]

    close(found(0.7), loss(0.7))
    close(jax.grad(found)(0.7), (loss(0.7 + 1e-5) - loss(0.7 - 1e-5)) / 2e-5)
    assert 0 in cleaner[:, 2:]  # the last cut, where the teacher's step is the goal, is among them
