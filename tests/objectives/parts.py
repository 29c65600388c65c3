"""What the tests of all objectives share: axes for tiny clips, batches with text, a network that says what it saw."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from tests.networks import CONFIG, LATENT, sampler
from vidar.diffusion.levels import LevelsConfig
from vidar.models.dit import TextConfig
from vidar.models.frames import Batch, Conditions
from vidar.sampling.axes import Axes

TEXT = replace(CONFIG, text=TextConfig(width=10, length=6))


def axes(visibility=None, levels=LevelsConfig(), drop: float = 0.0, **fields) -> Axes:
    """Axes around a test sampler."""
    plan = sampler(**fields)
    return Axes(levels, visibility or plan.visibility, plan, drop)


def batch(rows: int = 2, frames: int = 4, text: bool = True, seed: int = 0) -> Batch:
    """Random clips with actions, text states and sample indices."""
    keys = jax.random.split(jax.random.key(seed), 3)
    conditions = Conditions(
        text=jax.random.normal(keys[0], (rows, 6, 10)) if text else None,
        actions=jax.random.randint(keys[1], (rows, frames), 0, 5, jnp.int32),
    )
    latents = jax.random.normal(keys[2], (rows, frames, *LATENT))
    return Batch(latents, conditions, jnp.arange(10, 10 + rows, dtype=jnp.int32))


class Watched:
    """A network, or a function of (latents, level) in place of one, that keeps what it was called with."""

    def __init__(self, network, prediction: str = "v"):
        self.network = network
        self.config = getattr(network, "config", None) or replace(CONFIG, prediction=prediction)
        self.calls = []

    def __call__(self, streams, conditions, *, visibility, cache=None):
        self.calls.append((streams, conditions))
        if hasattr(self.network, "config"):
            return self.network(streams, conditions, visibility=visibility, cache=cache)
        return Answer(tuple(self.network(stream.latents, stream.level) for stream in streams))


class Answer:
    """An output that holds predictions alone."""

    def __init__(self, predictions):
        self.predictions = predictions
