"""TAEHV against the network of torch, live, and the stored outputs against it."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import taehv as golden
from tests.models.test_taehv import REAL, SMALL, distance, error, stored
from vidar.interop import tables
from vidar.interop.taehv import taehv_config, taehv_table, taehv_template
from vidar.models.layers import Precision

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def arrays():
    with np.load(golden.ARRAYS) as file:
        return dict(file)


@pytest.mark.parametrize("size, sizes", [("small", golden.SMALL), ("real", golden.REAL)])
def test_the_stored_outputs_are_those_of_torch(arrays, size, sizes):
    model = golden.seeded(**sizes)
    np.testing.assert_allclose(arrays[f"{size}_encoded"], golden.encoded(model, golden.clip(size)), atol=1e-5)
    np.testing.assert_allclose(arrays[f"{size}_decoded"], golden.decoded(model, golden.latents(size)), atol=1e-5)


def test_the_stored_names_are_those_of_torch(arrays):
    assert json.loads(str(arrays["names"])) == golden.names()


@pytest.mark.parametrize("compute, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("size, sizes", [("small", golden.SMALL), ("real", golden.REAL)])
def test_other_clips_become_what_torch_makes_of_them(size, sizes, compute, tolerance):
    """Through the original's names, with inputs that no array is stored for, whole and as a stream."""
    reference = golden.seeded(**sizes)
    tensors = {name: stored(tensor.numpy()) for name, tensor in reference.state_dict().items()}
    config = taehv_config(tensors)
    assert config == (SMALL if size == "small" else REAL)
    config = replace(config, precision=Precision("float32", compute))
    model = tables.load(tensors, taehv_template(config), taehv_table(config), "original")
    pixels, given = golden.clip(size)[:, ::-1, ::-1], 0.5 * golden.latents(size)[:, ::-1]
    latents, frames = golden.encoded(reference, pixels), golden.decoded(reference, given)
    found = jax.jit(lambda x: model.encode(x))(jnp.asarray(pixels))
    # Of bf16 the norm: single values err by what rounding makes of 35 random layers, in torch as much as here.
    measure = error if compute == "float32" else distance
    assert measure(found, latents) <= tolerance
    given = jnp.asarray(given)
    assert measure(jax.jit(lambda z: model.decode_floats(z))(given), frames) <= tolerance
    decode = jax.jit(lambda state, part: model.decode_chunk(state, part))
    state, parts = model.init_state(given.shape[0], *given.shape[2:4]), []
    for number in range(given.shape[1]):
        state, part, valid = decode(state, given[:, number : number + 1])
        parts.append(part[:, 4 - int(valid[0]) :])
    streamed = np.concatenate(parts, axis=1).astype(np.float32) / 127.5 - 1
    assert measure(streamed, frames) <= tolerance + 1 / 255


def test_torch_loads_what_goes_out():
    import torch

    reference = golden.seeded(**golden.SMALL)
    tensors = {name: stored(tensor.numpy().copy()) for name, tensor in reference.state_dict().items()}
    network = tables.load(tensors, taehv_template(SMALL), taehv_table(SMALL), "original")
    out = tables.tensors_of(network, taehv_table(SMALL), "original")
    other = golden.network(**golden.SMALL)
    other.load_state_dict({name: torch.from_numpy(tensor.read().copy()) for name, tensor in out.items()}, strict=True)
    given = golden.latents("small")
    np.testing.assert_array_equal(golden.decoded(other, given), golden.decoded(reference, given))
