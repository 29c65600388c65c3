"""CLIP's image encoder against transformers itself, and its images against torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import clip as golden
from tests.golden.wan import weight
from tests.interop.test_sources import stored
from tests.models.test_clip import FP32, SMALL, described, loaded, near, seeded
from vidar.interop import clip, tables
from vidar.interop.targets import save_tensors, write_json
from vidar.models.clip import CLIPConfig, prepare
from vidar.models.layers import Precision

pytestmark = pytest.mark.parity

WIDE = dict(golden.REAL, num_hidden_layers=2)  # real width, of which one block is run


def state(model):
    """Its arrays by the names that it gives them."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_the_stored_arrays_are_those_of_transformers_and_torch():
    with np.load(golden.ARRAYS) as arrays:
        np.testing.assert_allclose(arrays["features"], golden.features(golden.encoder(), golden.images()), atol=1e-5)
        np.testing.assert_allclose(arrays["prepared"], golden.prepared(golden.images(), 24), atol=1e-6)


def test_the_stored_names_are_those_of_transformers():
    known = json.loads(golden.NAMES.read_text())
    assert known == {
        "diffusers": golden.folded(golden.real_names()),
        "original": golden.folded(golden.original_names()),
    }


@pytest.mark.parametrize("size", [(480, 832), (100, 224), (224, 224), (1, 3), (37, 500)])
def test_images_are_resized_as_torch_does(size):
    pixels = golden.images(1, *size, 3)
    found = prepare(jnp.asarray(pixels), CLIPConfig())
    assert near(found, golden.prepared(pixels, 224), 1e-6)
    assert near(found, golden.prepared(pixels, 224, "float32"), 1e-4)


def test_small_features_are_those_of_transformers():
    for layers in (1, 2, 5):
        model = golden.encoder(num_hidden_layers=layers)
        tensors = clip.unpacked(stored(state(model)))
        config, layout = clip.clip_config(tensors, golden.HEAD, FP32)
        network = tables.load(tensors, *described(config), layout)
        found = jax.jit(lambda network, pixels: network(pixels))(network, jnp.asarray(golden.images()))
        assert near(found, golden.features(model, golden.images()), 1e-5)


def test_features_of_the_real_width_are_those_of_transformers():
    pixels = golden.images(1, 300, 200, 3)
    model = golden.encoder(**WIDE)
    expected = golden.features(model, pixels)
    assert expected.shape == (1, 257, 1280)
    for compute, tolerance in (("float32", 1e-4), ("bfloat16", 2e-2)):
        config = CLIPConfig(layers=2, precision=Precision(compute, compute))
        network = loaded(state(model), config)
        found = jax.jit(lambda network, pixels: network(pixels))(network, jnp.asarray(pixels))
        assert near(found, expected, tolerance)


def test_transformers_opens_what_goes_out(tmp_path):
    from transformers import CLIPVisionModel

    template, table = described(SMALL)
    network = tables.load(stored(seeded()), template, table, "diffusers")
    save_tensors(tmp_path, tables.tensors_of(network, table, "diffusers"))
    write_json(tmp_path / "config.json", clip.clip_transformers_config(SMALL))
    model, report = CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, array in state(model).items():
        np.testing.assert_array_equal(array, weight(golden.public(name), array.shape))
    with np.load(golden.ARRAYS) as arrays:
        assert near(golden.features(model.eval(), golden.images()), arrays["features"], 1e-5)
