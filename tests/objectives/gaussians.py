"""A task with known answers: independent Gaussian latents, and networks that are exact for Gaussians.

Every network is a Gaussian `N(mean, deviation²)` of each latent element, and answers as one whose data it is; so a
trained student *is* a distribution, and its divergence from the truth is a closed formula.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.networks import CONFIG, sampler
from vidar.attention.visibility import TeacherForcing
from vidar.diffusion.levels import LevelsConfig
from vidar.models.frames import Batch, Conditions
from vidar.sampling.axes import Axes
from vidar.sampling.solvers import FewStep

LATENT = (1, 2, 2)
MEAN = np.array([[[1.5, -1.0], [0.5, 1.0]]], np.float32)
DEVIATION = np.array([[[0.4, 0.7], [0.5, 0.3]]], np.float32)
FRAMES = 4


@dataclass(frozen=True)
class Answer:
    """What a network returns: predictions, and keys and values for a cache, which say nothing here."""

    predictions: tuple
    keys: jax.Array
    values: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["mean", "log_deviation"], meta_fields=["answers"])
@dataclass(frozen=True)
class Gaussian:
    """A network that knows Gaussian data: as a denoiser the posterior mean, as a student the exact ODE's end."""

    mean: jax.Array
    log_deviation: jax.Array
    answers: str = "denoiser"

    @property
    def config(self):
        return replace(CONFIG, layers=1, heads=1, width=16, channels=2, patch=1, prediction="v")

    def __call__(self, streams, conditions, *, visibility, cache=None, taps=()):
        predictions = []
        for stream in streams:
            level = stream.level[:, :, None, None, None]
            mean, variance = self.mean[None, None], jnp.exp(2 * self.log_deviation)[None, None]
            total = jnp.square(1 - level) * variance + jnp.square(level)
            if self.answers == "denoiser":
                clean = mean + variance * (1 - level) / total * (stream.latents - (1 - level) * mean)
            else:
                clean = mean + jnp.sqrt(variance / total) * (stream.latents - (1 - level) * mean)
            predictions.append((stream.latents - clean) / jnp.maximum(level, 1e-6))
        rows, frames = streams[0].latents.shape[:2]
        nothing = jnp.zeros((1, rows, frames * 2, 1, 16))
        return Answer(tuple(predictions), nothing, nothing)

    def encode_conditioning(self, *arguments):
        return None


@partial(jax.tree_util.register_dataclass, data_fields=["linear", "square", "offset"], meta_fields=[])
@dataclass(frozen=True)
class Quadratic:
    """A discriminator that is exact between Gaussians at one level."""

    linear: jax.Array
    square: jax.Array
    offset: jax.Array

    def logits(self, frames, conditions):
        x = frames.latents
        terms = self.linear[None, None] * x + self.square[None, None] * jnp.square(x)
        return jnp.mean(jnp.sum(terms, axis=(2, 3, 4)), axis=1) + self.offset


def truth(answers="denoiser"):
    return Gaussian(jnp.asarray(MEAN), jnp.log(jnp.asarray(DEVIATION)), answers)


def beginner(answers="denoiser"):
    return Gaussian(jnp.zeros(LATENT), jnp.zeros(LATENT), answers)


def discriminator():
    return Quadratic(jnp.zeros(LATENT), jnp.zeros(LATENT), jnp.zeros(()))


def divergence(student) -> float:
    """KL divergence of one frame of the student from the truth, in nats."""
    mean, variance = np.asarray(student.mean, np.float64), np.exp(2 * np.asarray(student.log_deviation, np.float64))
    true = DEVIATION.astype(np.float64) ** 2
    return float(0.5 * np.sum(variance / true + (mean - MEAN) ** 2 / true - 1 + np.log(true / variance)))


def axes(beside=False, times=(1000.0, 500.0)):
    plan = sampler(frames=FRAMES, chunk=2, solver=FewStep(times))
    plan = replace(plan, latent=LATENT, tokens=2)
    visibility = TeacherForcing() if beside else plan.visibility
    return Axes(LevelsConfig(), visibility, plan)


def data(key, rows=256):
    latents = jnp.asarray(MEAN)[None, None] + jnp.asarray(DEVIATION)[None, None] * jax.random.normal(
        key, (rows, FRAMES, *LATENT)
    )
    return Batch(latents, Conditions(), jnp.arange(rows, dtype=jnp.int32))


def train(objective, networks, axis, steps, rates, draw=data):
    """Trains as the driver does, phase by phase, and returns the student.

    Args:
        objective: Any objective.
        networks: By role.
        axis: Axes.
        steps: Global steps, whole cycles of phases.
        rates: Learning rate by trained role, the student's falls to zero over the run.
        draw: From a key to a batch of data.
    """
    roles = {role for role, choice in objective.roles.items() if choice.optimizer is not None}
    cycle = next(n for n in range(1, 20) if objective.phases(steps + n) == objective.phases(steps))
    updates = sum(one.role == "student" for step in range(steps) for one in objective.phases(step))
    schedules = {role: rates[role] for role in roles} | {
        "student": optax.cosine_decay_schedule(rates["student"], updates)
    }
    optimizers = {role: optax.adam(schedules[role], b1=0.5, b2=0.99) for role in roles}
    trained = {role: networks[role] for role in roles}
    states = {role: optimizers[role].init(trained[role]) for role in roles}

    def phase(carry, step, name, role):
        trained, states = carry
        key = jax.random.fold_in(jax.random.key(7), step)
        batch = draw(jax.random.fold_in(key, len(name)))

        def loss(network):
            return objective.loss(name, {**networks, **trained, role: network}, (), axis, batch, step, key)[0]

        updates, state = optimizers[role].update(jax.grad(loss)(trained[role]), states[role])
        moved = jax.tree.map(jnp.add, trained[role], updates)
        return {**trained, role: moved}, {**states, role: state}

    @jax.jit
    def run(carry):
        def body(carry, first):
            for offset in range(cycle):
                for one in objective.phases(offset):
                    carry = phase(carry, first + offset, one.name, one.role)
            return carry, None

        return jax.lax.scan(body, carry, jnp.arange(0, steps, cycle, dtype=jnp.int32))[0]

    with jax.numpy_dtype_promotion("standard"):
        return run((trained, states))[0]["student"]


# ------------------------------------------------------------------------------------- two chunks that are correlated

CORRELATION = 0.9


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["answers"])
@dataclass(frozen=True)
class Pair:
    """A network for clips of two numbers, each a chunk; it knows a Gaussian, or maps noise to one in a single step.

    As a denoiser, `values` are the Cholesky factor `(log l00, l10, log l11)`. As a student they are `(s, a, b, c, d)`:
    the first chunk is `s` times its noise; the second is `a` times the first one's noise and `b` times its own, or,
    after a first chunk that is clean, `c` times that and `d` times its own noise. What it caches is what it was shown.
    """

    values: jax.Array
    answers: str = "denoiser"

    @property
    def config(self):
        return replace(CONFIG, layers=1, heads=1, width=16, channels=1, patch=1, prediction="x0")

    def __call__(self, streams, conditions, *, visibility, cache=None):
        (stream,) = streams
        x, level = stream.latents[..., 0, 0, 0], stream.level
        shown = jnp.broadcast_to(x[None, :, :, None, None], (1, *x.shape, 1, 16))
        if cache is not None:  # one chunk alone, after those before it
            first, later = cache.keys[0, :, 0, 0, 0], cache.count > 0
            both = jnp.stack([jnp.where(later, first, x[:, 0]), x[:, 0]], axis=1)
            levels = jnp.stack([jnp.where(later, 0.0, level[:, 0]), level[:, 0]], axis=1)
            clean = self._student(both, levels)
            clean = jnp.where(later, clean[:, 1:], clean[:, :1])
        else:
            clean = self._student(x, level) if self.answers == "student" else jax.vmap(self._posterior)(x, level)
        return Answer((clean[..., None, None, None],), shown, shown)

    def encode_conditioning(self, *arguments):
        return None

    def _posterior(self, x, level):
        first, below, second = jnp.exp(self.values[0]), self.values[1], jnp.exp(self.values[2])
        covariance = jnp.array([[first**2, first * below], [first * below, below**2 + second**2]])
        scaled = covariance * (1 - level)[None]
        return scaled @ jnp.linalg.solve((1 - level)[:, None] * scaled + jnp.diag(level**2), x)

    def _student(self, x, level):
        s, a, b, c, d = self.values
        (first, second), (noise, later) = x.T, level.T == 1
        made = jnp.where(noise, a * first + b * second, c * first + d * second)
        return jnp.stack([jnp.where(noise, s * first, first), jnp.where(later, made, second)], axis=1)


def pairs(key, rows=256):
    """Standard normal pairs with `CORRELATION`."""
    first, own = jax.random.normal(key, (2, rows))
    second = CORRELATION * first + np.sqrt(1 - CORRELATION**2) * own
    clips = jnp.stack([first, second], axis=1)[..., None, None, None]
    return Batch(clips, Conditions(), jnp.arange(rows, dtype=jnp.int32))


def variety_of_second_chunk(objective, steps):
    """Variance of the second of two chunks, given the first, in what a student learned; and the true one."""
    left = 1 - CORRELATION**2
    networks = {
        "student": Pair(jnp.array([0.3, 0.0, 0.3, 0.0, 0.3]), "student"),
        "critic": Pair(jnp.zeros(3)),
        "teacher": Pair(jnp.array([0.0, CORRELATION, 0.5 * np.log(left)], jnp.float32)),
    }
    plan = replace(sampler(frames=2, chunk=1, solver=FewStep((1000.0,))), latent=(1, 1, 1), tokens=1)
    axis = Axes(LevelsConfig(), plan.visibility, plan)
    student = train(objective, networks, axis, steps, {"student": 0.02, "critic": 0.03}, pairs)
    return float(student.values[4] ** 2), left
