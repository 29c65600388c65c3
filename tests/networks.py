"""Small fp32 networks for tests: every parameter random, so that nothing is hidden behind a zero."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidar.attention.cache import ContextConfig
from vidar.attention.visibility import ChunkCausal, Visibility, Window
from vidar.diffusion.plan import Commit
from vidar.models.dit import DiT, DiTConfig
from vidar.models.frames import Conditions
from vidar.models.layers import DiscreteActions, Precision
from vidar.sampling.rollout import Sampler
from vidar.sampling.solvers import FewStep, Solver

LATENT = (4, 4, 3)
CONFIG = DiTConfig(
    width=48,
    layers=3,
    heads=2,
    mlp=96,
    channels=3,
    patch=2,
    actions=DiscreteActions(5),
    precision=Precision(compute="float32"),
)
TOKENS = CONFIG.tokens(*LATENT[:2])


@functools.cache
def network(config: DiTConfig = CONFIG, seed: int = 0):
    """A DiT with random parameters, drawn by numpy because that compiles nothing."""
    template = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if "weight" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, template)


def clip(rows: int = 2, frames: int = 8, seed: int = 3):
    """Random clean latents and actions."""
    rng = np.random.default_rng(seed)
    latents = jnp.asarray(rng.normal(size=(rows, frames, *LATENT)), jnp.float32)
    return latents, Conditions(actions=jnp.asarray(rng.integers(0, 5, (rows, frames)), jnp.int32))


def pattern(window: int | None = None, sink: int = 0) -> Visibility:
    """Chunk-causal visibility, with a window if any."""
    return ChunkCausal() if window is None else ChunkCausal() & Window(window, sink)


def sampler(
    frames: int = 8,
    chunk: int = 1,
    solver: Solver = FewStep(),
    window: int | None = None,
    sink: int = 0,
    commit: str = "extra_pass",
    positions: str = "absolute",
    **fields,
) -> Sampler:
    """A sampler for `LATENT` frames with an fp32 cache."""
    plain = Sampler(
        visibility=pattern(window, sink),
        latent=LATENT,
        tokens=TOKENS,
        frames=frames,
        chunk=chunk,
        solver=solver,
        commit=Commit(commit),
        context=ContextConfig(window, sink, positions),
        cache_dtype="float32",
    )
    return replace(plain, **fields)
