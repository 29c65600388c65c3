"""CLIP's image encoder: outputs against those of transformers and torch, names, round trips, and what is refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import clip as golden
from tests.golden.wan import unfolded, weight
from tests.interop.test_sources import stored
from vidar.errors import CheckpointError, ConfigError
from vidar.interop import clip, tables
from vidar.interop.sources import Stored
from vidar.models.clip import CLIPConfig, cubic_weights, prepare
from vidar.models.layers import Precision

FP32 = Precision("float32", "float32")
SMALL = CLIPConfig(width=32, layers=3, heads=2, mlp=48, patch=4, size=24, precision=FP32)


def described(config):
    """The encoder's template and table."""
    return clip.clip_template(config), clip.clip_table(config)


def seeded(config=SMALL):
    """Seeded arrays by the names of published files of transformers."""
    names = tables.shapes(*described(config), "diffusers")
    return {name: weight(name, shape) for name, shape in names.items()}


def as_original(arrays):
    """The same arrays as Wan's file has them, with what is beside the vision tower there."""
    found = {"log_scale": np.float32(2.6), "textual.norm.weight": np.ones(3, np.float32)}
    found["visual.head"] = np.ones((32, 7), np.float32)
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
    names |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "pre_layrnorm": "pre_norm", "post_layernorm": "post_norm"}
    names |= {"embeddings.patch_embedding": "patch_embedding", "encoder.layers": "transformer"}
    for name, array in arrays.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        short = name.removeprefix("vision_model.")
        for theirs, ours in names.items():
            short = short.replace(theirs, ours)
        if ".q_proj." in name:
            array = np.concatenate([arrays[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            short = short.replace("self_attn.q_proj", "attn.to_qkv")
        elif "class" in name:
            short, array = "cls_embedding", array[None, None]
        elif "position" in name:
            short, array = "pos_embedding", array[None]
        found[f"visual.{short}"] = array
    return found


def loaded(arrays, config=SMALL, layout="diffusers"):
    return tables.load(clip.unpacked(stored(arrays)), *described(config), layout)


def encoded(model):
    return jax.jit(lambda model, pixels: model(pixels))(model, jnp.asarray(golden.images()))


def near(found, expected, tolerance) -> bool:
    """Whether the largest error is within a tolerance of the largest value."""
    assert found.shape == expected.shape
    found = np.asarray(found, np.float32)
    return float(np.max(np.abs(found - expected))) <= tolerance * float(np.max(np.abs(expected)))


@pytest.fixture(scope="module")
def arrays():
    with np.load(golden.ARRAYS) as file:
        return dict(file)


# ----------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_features_are_those_of_transformers(arrays, layout):
    given = seeded() if layout == "diffusers" else as_original(seeded())
    found = encoded(loaded(given, layout=layout))
    assert found.dtype == jnp.float32
    assert near(found, arrays["features"], 5e-6)
    rough = encoded(loaded(given, replace(SMALL, precision=Precision("float32", "bfloat16")), layout))
    assert rough.dtype == jnp.bfloat16
    assert near(rough, arrays["features"], 2e-2)


def test_features_take_no_copy_of_the_blocks():
    config = replace(CLIPConfig(), precision=FP32)  # on CPU, bf16 would be converted as a whole
    pixels = jax.ShapeDtypeStruct((1, 480, 832, 3), jnp.uint8)
    compiled = jax.jit(lambda model, pixels: model(pixels)).lower(clip.clip_template(config), pixels).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes > 4 * 630e6
    assert memory.temp_size_in_bytes < 0.05 * memory.argument_size_in_bytes


def test_images_are_resized_and_scaled_as_torch_does(arrays):
    pixels = jnp.asarray(golden.images())
    assert near(prepare(pixels, SMALL), arrays["prepared"], 1e-6)
    assert prepare(pixels, SMALL).max() > (1 - 0.40821073) / 0.27577711  # bicubic overshoots; nothing is cut off


def test_interpolation_keeps_what_it_should():
    for length in (1, 5, 24, 50):
        weights = cubic_weights(length, 24)
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)
        assert (np.count_nonzero(weights, axis=1) <= 4).all()
    np.testing.assert_array_equal(cubic_weights(24, 24), np.eye(24, dtype=np.float32))
    # Halfway between two pixels, a = -0.75 gives its neighbours 19/32 each and the next ones -3/32.
    np.testing.assert_array_equal(32 * cubic_weights(8, 4)[1], [0, -3, 19, 19, -3, 0, 0, 0])


@pytest.mark.parametrize(
    "shape, dtype, given",
    [
        ((1, 8, 8, 3), np.float32, "float32 [1, 8, 8, 3]"),
        ((1, 8, 8, 1), np.uint8, "uint8 [1, 8, 8, 1]"),
        ((1, 8, 8), np.uint8, "uint8 [1, 8, 8]"),
        ((8, 8, 3), np.uint8, "uint8 [8, 8, 3]"),
        ((1, 8, 8, 4), np.uint8, "uint8 [1, 8, 8, 4]"),
    ],
    ids=["float", "grey", "flat", "single", "rgba"],
)
def test_images_of_another_kind_are_refused(shape, dtype, given):
    with pytest.raises(ConfigError) as error:
        clip.clip_template(SMALL)(jnp.zeros(shape, dtype))
    assert str(error.value) == f"images must be uint8 [b, h, w, 3], got {given}"


def test_shapes_that_cannot_be_are_refused():
    for make, message in (
        (lambda: CLIPConfig(layers=0), "image_encoder.layers=0 must be at least 1"),
        (lambda: CLIPConfig(heads=3), "image_encoder.width=1280 must be a multiple of image_encoder.heads=3"),
        (lambda: CLIPConfig(size=225), "image_encoder.size=225 must be a multiple of image_encoder.patch=14"),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert str(error.value) == message


# ------------------------------------------------------------------------------------------------- names and shapes


def real_names(layout):
    return unfolded(json.loads(golden.NAMES.read_text())[layout])


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_every_tensor_of_the_real_encoder_has_its_name_and_shape(layout):
    found = clip.packed(tables.tensors_of(*described(CLIPConfig()), layout))
    known = real_names(layout)
    known.pop("visual.head", None)  # projects to the space of text, which is no part of the encoder
    assert {name: tensor.shape for name, tensor in found.items()} == known


@pytest.mark.parametrize("layout", ["original", "diffusers", "bare"])
def test_a_checkpoint_tells_its_encoder(layout):
    names = real_names(layout if layout == "original" else "diffusers")
    if layout == "bare":  # as transformers writes them from version 5 on
        names = {name.removeprefix("vision_model."): shape for name, shape in names.items()}
    half, unread = np.dtype(np.float16), lambda: pytest.fail("only names and shapes are needed")
    tensors = clip.unpacked({name: Stored(shape, half, unread) for name, shape in names.items()})
    config, found = clip.clip_config(tensors)
    assert config == CLIPConfig(precision=Precision("float16"))
    assert found == ("original" if layout == "original" else "diffusers")
    assert {name: tensor.shape for name, tensor in tensors.items()} == tables.shapes(*described(config), found)


def test_what_is_beside_the_vision_tower_is_left_out_and_nothing_else():
    beside = {"visual_projection.weight": np.zeros((7, 32)), "vision_model.embeddings.position_ids": np.zeros((1, 37))}
    encoder = loaded(seeded() | beside)
    jax.tree.map(np.testing.assert_array_equal, encoder, loaded(seeded()))
    with pytest.raises(CheckpointError, match="has beside them 1 tensors of this network, such as visual.lora"):
        loaded(as_original(seeded()) | {"visual.lora": np.zeros(3)}, layout="original")
    given = as_original(seeded())
    del given["visual.transformer.1.attn.to_qkv.bias"]
    with pytest.raises(CheckpointError, match=r"lacks 3 tensors .* visual.transformer.1.attn.to_qkv.bias\[key\]"):
        loaded(given, layout="original")


def test_other_networks_are_no_image_encoders():
    def refused(message, changes, head_dim=golden.HEAD):
        given = {name: array for name, array in (seeded() | changes).items() if array is not None}
        with pytest.raises(CheckpointError) as error:
            clip.clip_config(clip.unpacked(stored(given)), head_dim)
        assert message in str(error.value)

    start = "vision_model.embeddings"
    names = f"neither visual.patch_embedding.weight nor {start}.patch_embedding.weight"
    refused(f"it has {names}, but ", {f"{start}.patch_embedding.weight": None})
    refused("32 wide, which heads of 80 channels do not fill", {}, 80)
    position = f"{start}.position_embedding.weight"
    refused(f"{position} has 36 positions, not one more than a square", {position: np.zeros((36, 32))})
    refused(f"{position} is missing or has another shape", {position: np.zeros(37)})
    refused("layers.0.mlp.fc1.weight is missing", {"vision_model.encoder.layers.0.mlp.fc1.weight": None})
    name = "visual.transformer.0.attn.to_qkv.bias"
    refused(f"{name} is [95], which is not three tensors of the same size", {name: np.zeros(95)})


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_what_goes_out_comes_back_bit_for_bit(layout):
    template, table = described(SMALL)
    given, network = seeded(), loaded(seeded())
    expected = given if layout == "diffusers" else as_original(given)
    found = clip.packed(tables.tensors_of(network, table, layout))
    assert found.keys() == {name for name in expected if name not in clip.UNUSED and not name.startswith("textual.")}
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        np.testing.assert_array_equal(tensor.read(), expected[name])
    again = tables.load(clip.unpacked(found), template, table, layout)
    jax.tree.map(np.testing.assert_array_equal, again, network)
    back = tables.renamed(clip.unpacked(found), template, table, layout, "diffusers")
    assert {name: tensor.read().tobytes() for name, tensor in back.items()} == {
        name: array.tobytes() for name, array in given.items()
    }
