"""The discriminator: a DiT underneath, a logit that reads every tapped block and every frame."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.networks import clip, network
from vidar.attention.visibility import Bidirectional, chunk_layout
from vidar.errors import ConfigError
from vidar.models.discriminator import Discriminator, DiscriminatorConfig
from vidar.models.frames import Frames

LATENTS, CONDITIONS = clip(frames=4)
STREAM = Frames(LATENTS, jnp.full((2, 4), 0.5), chunk_layout(4, 4))


def critic(taps=(0, -1)):
    return Discriminator(network(), DiscriminatorConfig(taps, mlp=2), rngs=nnx.Rngs(3))


def test_it_is_the_network_underneath():
    def run(model):
        return model((STREAM,), CONDITIONS, visibility=Bidirectional()).predictions[0]

    np.testing.assert_array_equal(jax.jit(run)(critic()), jax.jit(run)(network()))


def test_heads_read_their_block_and_every_frame():
    model = critic()

    def logits(latents, model=model):
        return model.logits(replace(STREAM, latents=latents), CONDITIONS)

    found = jax.jit(logits)(LATENTS)
    assert found.shape == (2,)
    slope = np.asarray(jax.jit(jax.grad(lambda latents: jnp.sum(logits(latents))))(LATENTS))
    assert (np.abs(slope).max(axis=(2, 3, 4)) > 1e-6).all()
    other = jax.jit(logits)(LATENTS.at[1].add(1.0))
    np.testing.assert_allclose(other[0], found[0], rtol=1e-5)
    assert abs(float(other[1] - found[1])) > 1e-4
    gradient = jax.jit(jax.grad(lambda model: jnp.sum(logits(LATENTS, model))))(model)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)}
    unused = {path for path, leaf in leaves.items() if float(jnp.abs(leaf).max()) == 0}
    # The DiT's own head is not asked; a bias of keys moves no softmax.
    assert all(".network.head" in path or "dropped" in path or "key.bias" in path for path in unused), unused


def test_taps_count_from_either_end_and_past_the_last_are_refused():
    assert DiscriminatorConfig((-17, -9, -1)).blocks(30) == (13, 21, 29)
    with pytest.raises(ConfigError, match=r"heads.taps=\(3,\): the critic has blocks -3 … 2"):
        critic(taps=(3,))
