"""Presets: published sizes, by shapes alone."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vidar.attention.visibility import ChunkCausal, chunk_layout
from vidar.errors import ConfigError
from vidar.models.dit import DiT, DiTConfig, ImageConfig
from vidar.models.frames import Conditions, Frames
from vidar.models.presets import PRESETS, model_fields, preset

COUNTS = {"wan_1_3b": 1_418_996_800, "wan_14b": 14_288_491_584}
MILLIONS = {"small": 130, "nfd_310m": 310}


def network(config: DiTConfig):
    return jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))


def parameters(model) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize("name", COUNTS)
def test_wan_has_the_published_parameter_count(name):
    assert parameters(network(preset(name).model)) == COUNTS[name]


def test_wans_image_to_video_has_the_published_parameter_count():
    assert parameters(network(replace(preset("wan_14b").model, image=ImageConfig()))) == 16_394_878_784


@pytest.mark.parametrize("name", MILLIONS)
def test_next_frame_diffusion_is_near_its_published_size(name):
    assert parameters(network(preset(name).model)) / 1e6 == pytest.approx(MILLIONS[name], rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_a_clip_of_the_preset_runs_through_its_network(name):
    chosen = preset(name)
    config, frames = chosen.model, chosen.frames
    latent = (chosen.height, chosen.width, config.channels)
    assert frames % chosen.chunk == 0
    assert chosen.pixels[0] % chosen.height == chosen.pixels[1] % chosen.width == 0
    kept = Conditions(
        text=jax.ShapeDtypeStruct((1, 512, 4096), jnp.bfloat16) if config.text else None,
        actions=None if config.actions is None else jax.ShapeDtypeStruct(*actions(config, frames)),
    )
    stream = Frames(
        jax.ShapeDtypeStruct((1, frames, *latent), jnp.float32),
        jax.ShapeDtypeStruct((1, frames), jnp.float32),
        chunk_layout(frames, chosen.chunk),
    )
    output = jax.eval_shape(
        lambda model, stream, given: model((stream,), given, visibility=ChunkCausal()), network(config), stream, kept
    )
    tokens = frames * config.tokens(*latent[:2])
    assert output.predictions[0].shape == (1, frames, *latent)
    assert output.keys.shape == (config.layers, 1, tokens, config.heads, config.head_dim)
    assert output.keys.dtype == jnp.bfloat16


def actions(config, frames):
    discrete = config.actions.kind == "discrete"
    return ((1, frames), jnp.int32) if discrete else ((1, frames, config.actions.count), jnp.bool_)


def test_tokens_of_a_frame():
    counts = {name: preset(name).model.tokens(preset(name).height, preset(name).width) for name in PRESETS}
    assert counts == {"tiny": 16, "small": 336, "nfd_310m": 336, "wan_1_3b": 1560, "wan_14b": 1560}


def test_tiny_is_what_the_design_says():
    assert (preset("tiny").model.width, preset("tiny").model.layers) == (64, 2)
    assert DiTConfig(**model_fields("tiny")) == preset("tiny").model


def test_unknown_presets_are_refused():
    with pytest.raises(ConfigError, match="'huge' is unknown: use one of tiny, small"):
        preset("huge")
