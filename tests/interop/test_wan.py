"""Wan's networks: names and shapes of the real ones, outputs of small ones against diffusers', and round trips."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import wan as golden
from vidar.attention.visibility import Bidirectional, chunk_layout
from vidar.errors import CheckpointError, ConfigError
from vidar.interop import tables, wan
from vidar.interop.sources import Stored
from vidar.models.codecs.wan_vae import WanVAEConfig
from vidar.models.dit import DiTConfig, ImageConfig, TextConfig
from vidar.models.frames import Conditions, Frames
from vidar.models.layers import Precision
from vidar.models.presets import preset
from vidar.models.umt5 import UMT5Config, position_buckets

FP32 = Precision("float32", "float32")
SMALL = DiTConfig(
    width=48,
    layers=2,
    heads=2,
    mlp=96,
    channels=16,
    patch=2,
    time_channels=64,
    text=TextConfig(width=32),
    precision=FP32,
)
DITS = {"t2v": SMALL, "i2v": replace(SMALL, image=ImageConfig(width=40))}
TEXT = UMT5Config(width=32, layers=2, heads=4, head_dim=8, mlp=48, vocabulary=50, precision=FP32)
VAE = WanVAEConfig(width=8, mean=golden.MEAN, deviation=golden.DEVIATION)


def real(name):
    """The config of a published transformer."""
    config = preset(name.removesuffix("_i2v")).model
    return replace(config, image=ImageConfig()) if name.endswith("_i2v") else config


def seeded(template, table, layout="diffusers"):
    """A checkpoint of seeded weights, in diffusers' layout."""
    shapes = tables.shapes(template, table, layout)
    return {name: stored(golden.weight(name, shape)) for name, shape in shapes.items()}


def stored(array) -> Stored:
    return Stored(array.shape, array.dtype, lambda: array)


def described(config):
    """A network's template and table."""
    if isinstance(config, WanVAEConfig):
        return wan.vae_template(config), wan.vae_table(config)
    if isinstance(config, UMT5Config):
        return wan.umt5_template(config), wan.umt5_table(config)
    return wan.dit_template(config), wan.dit_table(config)


def loaded(config):
    template, table = described(config)
    return tables.load(seeded(template, table), template, table, "diffusers")


# ------------------------------------------------------------------------------------------------- names and shapes


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", ["wan_1_3b", "wan_14b", "wan_14b_i2v", "vae", "umt5"])
def test_every_tensor_of_the_real_networks_has_its_name_and_shape(name, layout):
    known = golden.unfolded(json.loads(golden.NAMES.read_text())[name][layout])
    config = {"vae": WanVAEConfig(), "umt5": UMT5Config()}.get(name) or real(name)
    assert tables.shapes(*described(config), layout) == known


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", ["wan_1_3b", "wan_14b", "wan_14b_i2v"])
def test_a_checkpoint_tells_its_network(name, layout):
    config = real(name)
    shapes = tables.shapes(*described(config), layout)
    found = wan.dit_config({tensor: Stored(shape, np.dtype(np.float16), None) for tensor, shape in shapes.items()})
    assert found == (replace(config, precision=Precision("float16")), layout)


def test_other_networks_are_no_transformers_of_wans():
    with pytest.raises(CheckpointError, match=r"neither head.head.weight nor proj_out.weight, but a.weight"):
        wan.dit_config({"a.weight": stored(np.zeros(1))})
    tensors = seeded(*described(SMALL))
    with pytest.raises(CheckpointError, match="48 wide, which heads of 128 channels do not fill"):
        wan.dit_config(tensors)
    del tensors["patch_embedding.bias"]
    with pytest.raises(CheckpointError, match=r"patch_embedding.bias is missing"):
        wan.dit_config(tensors, golden.HEAD)


# ----------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("name", DITS)
def test_transformers_compute_what_diffusers_does(name):
    given = {key: jnp.asarray(value) for key, value in golden.inputs(name == "i2v").items()}
    level = jnp.broadcast_to(given["time"][:, None] / 1000, (2, 3))
    latents = given["latents"]
    frames = Frames(latents[..., :16], level, chunk_layout(3, 3))
    further = latents[..., 16:] if name == "i2v" else None
    conditions = Conditions(text=given["text"], image=given.get("image"), latents=further)
    model = loaded(DITS[name])

    @jax.jit
    def forward(conditions):
        return model((frames,), conditions, visibility=Bidirectional()).predictions[0]

    with np.load(golden.ARRAYS) as arrays:
        expected = arrays[name]
    assert near(forward(conditions), expected, 2e-5)
    assert not near(forward(replace(conditions, text=given["text"] * 0.5)), expected, 1e-3)
    if name == "i2v":
        assert not near(forward(replace(conditions, image=given["image"][..., ::-1])), expected, 1e-3)


def test_the_vae_computes_what_diffusers_does():
    model = loaded(VAE)
    with np.load(golden.ARRAYS) as arrays:
        latents, frames = arrays["encoded"], arrays["decoded"]
    assert near(jax.jit(lambda x: model.encode(x))(jnp.asarray(golden.pixels())), latents, 1e-5)
    decode = jax.jit(lambda x: model.decode_floats(x))
    assert near(decode(jnp.asarray(latents))[:, :, ::4, ::4], frames, 1e-4)


def test_the_text_encoder_computes_what_transformers_does():
    model, lengths = loaded(TEXT), jnp.asarray(golden.LENGTHS, jnp.int32)
    found = jax.jit(lambda tokens, lengths: model(tokens, lengths))(jnp.asarray(golden.tokens()), lengths)
    with np.load(golden.ARRAYS) as arrays:
        assert near(found, arrays["text"], 2e-5)
    assert not np.any(found[1, golden.LENGTHS[1] :])


def test_positions_share_buckets_as_they_grow_apart():
    bucket = position_buckets(300, 32, 128)
    assert bucket[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert bucket[:9, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert (bucket[0, 128:] == 31).all()
    assert (bucket[128:, 0] == 15).all()
    assert (np.diff(bucket[0, 1:]) >= 0).all()
    assert len(set(bucket[0, 1:])) == len(set(bucket[1:, 0])) == 15


def near(found, expected, tolerance) -> bool:
    """Whether the largest error is within a tolerance of the largest value."""
    assert found.shape == expected.shape
    return float(np.max(np.abs(np.asarray(found) - expected))) <= tolerance * float(np.max(np.abs(expected)))


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("config", [*DITS.values(), VAE, TEXT], ids=[*DITS, "vae", "text"])
def test_what_goes_out_comes_back_bit_for_bit(config, layout):
    template, table = described(config)
    tensors = seeded(template, table)
    network = tables.load(tensors, template, table, "diffusers")
    out = tables.tensors_of(network, table, layout)
    if layout == "diffusers":
        assert out.keys() == tensors.keys()
        for name, tensor in out.items():
            assert tensor.shape == tensors[name].shape
            np.testing.assert_array_equal(tensor.read(), tensors[name].read())
    again = tables.load(out, template, table, layout)
    jax.tree.map(np.testing.assert_array_equal, again, network)


def test_missing_left_over_and_misshapen_tensors_are_named():
    template, table = described(SMALL)
    tensors = seeded(template, table)

    def refused(message, **changes):
        given = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        with pytest.raises(CheckpointError, match=re.escape(message)):
            tables.load(given, template, table, "diffusers")

    refused("lacks 1 tensors of this network, such as proj_out.bias", **{"proj_out.bias": None})
    refused("has beside them 1 tensors of this network, such as lora", lora=stored(np.zeros(1)))
    refused("proj_out.bias is [3] in the checkpoint, this network's is [64]", **{"proj_out.bias": stored(np.zeros(3))})
    with pytest.raises(ConfigError, match="layout 'comfy' is unknown: use one of original, diffusers"):
        tables.load(tensors, template, table, "comfy")
    other = wan.dit_template(replace(SMALL, classes=3))
    with pytest.raises(ConfigError, match=r"has classes.table, for which other projects have no name"):
        tables.shapes(other, table, "original")
