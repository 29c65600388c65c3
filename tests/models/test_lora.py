"""Adapters: nothing at first, equal to merged weights, small, and placed as the kernels they stand beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import CONFIG, clip, network
from vidar.attention.visibility import ChunkCausal, chunk_layout
from vidar.errors import ConfigError
from vidar.models.frames import Frames
from vidar.models.lora import LoraConfig, attach, init_adapters, merge
from vidar.models.placement import logical_axes

MODEL, LORA = network(), LoraConfig(rank=3, targets=("query", "down"))


def predict(model):
    latents, conditions = clip(frames=4)
    stream = Frames(latents, jnp.full((2, 4), 0.5), chunk_layout(4, 1))
    return jax.jit(lambda model: model((stream,), conditions, visibility=ChunkCausal()).predictions[0])(model)


def trained(seed=1):
    adapters = init_adapters(MODEL, LORA, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for path, leaf in adapters.items()}


def test_new_adapters_change_nothing():
    adapters = init_adapters(MODEL, LORA, jax.random.key(0))
    np.testing.assert_array_equal(predict(attach(MODEL, adapters)), predict(MODEL))
    ends = [path.rpartition(".lora")[0] for path in adapters]
    assert sorted(set(ends)) == [".blocks.attention.query", ".blocks.mlp.down"]
    assert adapters[".blocks.mlp.down.lora_in.value"].shape == (CONFIG.layers, CONFIG.mlp, 3)
    assert adapters[".blocks.mlp.down.lora_out.value"].shape == (CONFIG.layers, 3, CONFIG.width)
    assert max(float(jnp.abs(adapters[f"{end}.lora_in.value"]).max()) for end in ends) > 0.1


def test_merged_weights_are_the_attached_product():
    adapters, before = trained(), predict(MODEL)
    attached, merged = predict(attach(MODEL, adapters)), predict(merge(MODEL, adapters))
    np.testing.assert_allclose(attached, merged, atol=1e-5 * float(jnp.abs(merged).max()))
    assert float(jnp.abs(merged - before).max()) > 0.1
    np.testing.assert_array_equal(predict(MODEL), before)


def test_gradients_reach_both_factors():
    gradient = jax.grad(lambda adapters: jnp.sum(predict(attach(MODEL, adapters)) ** 2))(trained())
    for path, leaf in gradient.items():
        assert float(jnp.abs(leaf).max()) > 1e-4, path


def test_factors_lie_as_their_kernels():
    for path, leaf in trained().items():
        axes = logical_axes(f"['{path}']", leaf)
        kernel = logical_axes(path.partition(".lora")[0] + ".kernel.value", leaf)
        kept, thin = (-2, -1) if "lora_in" in path else (-1, -2)
        assert axes[0] == "layers"
        assert axes[kept] == kernel[kept]
        assert axes[thin] is None


def test_maps_that_are_not_there_are_named():
    with pytest.raises(ConfigError, match=r"lora.targets=\('gate',\): the network has no such linear maps"):
        init_adapters(MODEL, LoraConfig(targets=("gate",)), jax.random.key(0))
