"""TAEHV against torch's frame-by-frame outputs; as a stream of chunks at different ticks; its checkpoint's names."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import taehv as golden
from vidar.errors import CheckpointError, ConfigError
from vidar.interop import tables
from vidar.interop.sources import Stored
from vidar.interop.taehv import taehv_config, taehv_table, taehv_template
from vidar.models.codecs.taehv import TAEHVConfig
from vidar.models.layers import Precision

SMALL, REAL = TAEHVConfig(**golden.SMALL), TAEHVConfig()
SIZE = (3, 4)


@pytest.fixture(scope="module")
def arrays():
    with np.load(golden.ARRAYS) as file:
        return dict(file)


def seeded(config):
    """A checkpoint of seeded weights."""
    shapes = tables.shapes(taehv_template(config), taehv_table(config), "original")
    return {name: stored(golden.weight(name, shape)) for name, shape in shapes.items()}


def stored(array) -> Stored:
    return Stored(array.shape, array.dtype, lambda: array)


@functools.cache
def loaded(config):
    return tables.load(seeded(config), taehv_template(config), taehv_table(config), "original")


@functools.cache
def decoder():
    """The small network's `decode_chunk`, compiled once a size."""
    return jax.jit(lambda state, part: loaded(SMALL).decode_chunk(state, part))


@functools.cache
def before_rounding():
    return jax.jit(lambda past, part: loaded(SMALL)._decode(past, part))


def latents():
    return jnp.asarray(golden.latents("small"))


def error(found, expected) -> float:
    """The largest error over the largest value."""
    assert found.shape == expected.shape
    return float(np.max(np.abs(np.asarray(found) - np.asarray(expected))) / np.max(np.abs(expected)))


def distance(found, expected) -> float:
    """The norm of the error over that of the values."""
    assert found.shape == expected.shape
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


def levels(found, expected) -> int:
    """The largest error of uint8 frames."""
    assert found.shape == expected.shape
    return int(np.max(np.abs(np.asarray(found, np.int32) - np.asarray(expected, np.int32))))


# ----------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("size", ["small", "real"])
def test_clips_become_what_torch_makes_of_them(arrays, size):
    model = loaded({"small": SMALL, "real": REAL}[size])
    pixels, given = jnp.asarray(golden.clip(size)), jnp.asarray(golden.latents(size))
    encode, decode = jax.jit(lambda x: model.encode(x)), jax.jit(lambda x: model.decode_floats(x))
    frames = arrays[f"{size}_decoded"]
    assert np.mean(np.abs(frames) < 1) > 0.7
    assert error(encode(pixels), arrays[f"{size}_encoded"]) <= 1e-5
    assert error(decode(given), frames) <= 1e-5
    rounded = jax.jit(lambda x: model.decode(x))(given)
    assert rounded.dtype == jnp.uint8
    assert levels(rounded, np.round((frames + 1) * 127.5)) <= 1


def test_bf16_stays_near(arrays):
    model = loaded(replace(SMALL, precision=Precision("float32", "bfloat16")))
    encoded = jax.jit(lambda x: model.encode(x))(jnp.asarray(golden.clip("small")))
    decoded = jax.jit(lambda x: model.decode_floats(x))(latents())
    assert encoded.dtype == decoded.dtype == jnp.float32
    assert 1e-3 < distance(encoded, arrays["small_encoded"]) < 2e-2
    assert 1e-3 < distance(decoded, arrays["small_decoded"]) < 2e-2


def test_a_latent_knows_its_four_frames_and_those_before(arrays):
    """A clip's end is filled with its last frame; what comes after four frames changes nothing in their latent."""
    model, pixels = loaded(SMALL), jnp.asarray(golden.clip("small"))
    encode = jax.jit(lambda x: model.encode(x))
    start = encode(pixels[:, :9])
    assert error(start[:, :2], arrays["small_encoded"][:, :2]) <= 1e-5
    assert error(start[:, 2], arrays["small_encoded"][:, 2]) > 1e-3
    filled = encode(jnp.concatenate([pixels[:, :9], *[pixels[:, 8:9]] * 4], axis=1))
    assert error(start, filled[:, :3]) <= 1e-5
    one = encode(pixels[:, :1])
    assert one.shape == (2, 1, 4, 6, 4)
    assert error(one, encode(jnp.repeat(pixels[:, :1], 5, axis=1))[:, :1]) <= 1e-5


# ----------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (1, 2, 1), (3, 1), (4,)])
def test_a_stream_in_chunks_of_any_size_is_the_whole_clip(arrays, chunks):
    model, given = loaded(SMALL), latents()
    state, start, floats, frames = model.init_state(2, *SIZE), 0, [], []
    for size in chunks:
        part = given[:, start : start + size]
        floats.append(before_rounding()(state["past"], part)[1])
        state, shown, valid = decoder()(state, part)
        assert shown.shape == (2, 4 * size, 24, 32, 3)
        assert valid.dtype == jnp.int32
        assert valid.tolist() == [4 * size - 3 * (start == 0)] * 2
        frames.append(shown[:, shown.shape[1] - int(valid[0]) :])
        start += size
    assert error(jnp.concatenate(floats, axis=1)[:, 3:], arrays["small_decoded"]) <= 1e-5
    assert levels(jnp.concatenate(frames, axis=1), np.round((arrays["small_decoded"] + 1) * 127.5)) <= 1


def test_sessions_at_different_ticks_share_an_executable():
    """Row 0 begins two chunks before row 1, which finds what another left in its place."""
    model, given = loaded(SMALL), latents()
    alone = jax.jit(lambda z: model.decode(z))(given)
    state = model.init_state(2, *SIZE)
    for tick in range(4):
        if tick == 2:
            state["started"] = jnp.asarray([True, False])
        part = jnp.stack([given[0, tick], given[1, (tick + 2) % 4]])[:, None]
        state, frames, valid = decoder()(state, part)
        for row, begun in ((0, tick), (1, tick - 2)):
            if begun >= 0:
                count, end = int(valid[row]), 1 + 4 * begun
                assert count == (1 if begun == 0 else 4)
                assert levels(frames[row, 4 - count :], alone[row, end - count : end]) <= 1


def test_a_session_that_begins_anew_remembers_nothing():
    """Whatever stands in its place, be it no number at all; the session beside it remembers everything."""
    model, given = loaded(SMALL), latents()
    used, _, _ = decoder()(model.init_state(2, *SIZE), given[:, :1])
    spoiled = tuple(frame.at[0].set(jnp.nan) for frame in used["past"])
    state, frames, valid = decoder()({"past": spoiled, "started": jnp.asarray([False, True])}, given[:, 1:2])
    fresh, expected, _ = decoder()(model.init_state(2, *SIZE), given[:, 1:2])
    assert valid.tolist() == [1, 4]
    assert state["started"].tolist() == [True, True]
    np.testing.assert_array_equal(frames[0], expected[0])
    for found, wanted in zip(state["past"], fresh["past"], strict=True):
        np.testing.assert_array_equal(found[0], wanted[0])
    _, expected, _ = decoder()(used, given[:, 1:2])
    np.testing.assert_array_equal(frames[1], expected[1])
    assert levels(frames[1], decoder()(model.init_state(2, *SIZE), given[:, 1:2])[1][1]) > 10


def test_what_does_not_fit_is_refused():
    model = taehv_template(REAL)
    assert (REAL.patch, REAL.frames_per_latent, REAL.latent_size(480, 832)) == (8, 4, (60, 104))
    with pytest.raises(ConfigError, match=r"clips of 12 frames are not 1 \+ 4 n frames"):
        jax.eval_shape(model.encode, jax.ShapeDtypeStruct((1, 12, 16, 16, 3), jnp.uint8))
    with pytest.raises(ConfigError, match="20×16 pixels are not whole multiples of 8"):
        jax.eval_shape(model.encode, jax.ShapeDtypeStruct((1, 13, 20, 16, 3), jnp.uint8))
    with pytest.raises(ConfigError, match="one number more than codec.growth"):
        TAEHVConfig(widths=(4, 4, 4))
    with pytest.raises(ConfigError, match=r"codec.growth=0 must be at least 1"):
        TAEHVConfig(growth=(0, 2, 2))


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_every_tensor_of_the_published_network_has_its_name_and_shape(arrays):
    known = {name: tuple(shape) for name, shape in json.loads(str(arrays["names"])).items()}
    assert tables.shapes(taehv_template(REAL), taehv_table(REAL), "original") == known
    assert sum(name.startswith("decoder.") for name in known) == 64
    assert known["decoder.7.conv.weight"] == (256, 256, 1, 1)


@pytest.mark.parametrize("config", [SMALL, REAL, replace(SMALL, growth=(2, 1, 2))])
def test_a_checkpoint_tells_its_network(config):
    shapes = tables.shapes(taehv_template(config), taehv_table(config), "original")
    assert (
        taehv_config({name: stored(np.broadcast_to(np.float16(0), shape)) for name, shape in shapes.items()}) == config
    )


def test_what_goes_out_comes_back_bit_for_bit():
    given, network = seeded(SMALL), loaded(SMALL)
    out = tables.tensors_of(network, taehv_table(SMALL), "original")
    assert out.keys() == given.keys()
    for name, tensor in out.items():
        assert tensor.shape == given[name].shape
        np.testing.assert_array_equal(tensor.read(), given[name].read())
    again = tables.load(out, taehv_template(SMALL), taehv_table(SMALL), "original")
    jax.tree.map(np.testing.assert_array_equal, again, network)


def test_other_checkpoints_are_refused():
    tensors = seeded(SMALL)

    def refused(message, **changes):
        given = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        with pytest.raises(CheckpointError, match=message) as refusal:
            taehv_config(given)
        assert "\n" not in str(refusal.value)

    refused("decoder.1.weight is missing", **{"decoder.1.weight": None})
    refused("decoder.8.weight is missing or no convolution's", **{"decoder.8.weight": stored(np.zeros(3))})
    # Of other models' networks: pixels shuffled into channels; eight frames a latent, which the original would cut.
    refused(r"decoder.22.weight makes 12 channels", **{"decoder.22.weight": stored(np.zeros((12, 10, 3, 3)))})
    surplus = {"decoder.7.conv.weight": stored(np.zeros((32, 16, 1, 1)))}
    refused(r"decoder.7.conv.weight makes 32 channels of 16, where encoder.12.conv.weight makes 8 of 8", **surplus)
