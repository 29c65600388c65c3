"""Wan's VAE as a stream: chunks of any size, sessions at different ticks, and whole clips, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidar.errors import ConfigError
from vidar.models.codecs.wan_vae import MEAN, WanVAE, WanVAEConfig, to_uint8

CONFIG = WanVAEConfig(
    width=8, multipliers=(1, 2, 2), blocks=1, temporal=(False, True), mean=MEAN[:4], deviation=(1.0,) * 4
)
DEEP = WanVAEConfig(width=4, multipliers=(1, 2, 2, 2), blocks=1, mean=MEAN[:4], deviation=(0.5, 1.0, 1.5, 2.0))
SIZE = (4, 6)


def network(config=DEEP):
    template = jax.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = float(np.prod(leaf.shape[:-1])) ** -0.5 if leaf.ndim > 1 else 0.1
        return jnp.asarray((leaf.ndim == 1) * 0.5 + scale * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, template)


def latents(frames=5, rows=2):
    return jnp.asarray(np.random.default_rng(1).normal(size=(rows, frames, *SIZE, 4)), jnp.float32)


def streamed(model, z, chunks):
    """Frames of a stream in chunks of the given sizes, before rounding, without those that do not exist."""
    decode = jax.jit(lambda state, part, first: model._decode(state, part, first))
    state, parts, start = model.init_state(z.shape[0], *SIZE)["past"], [], 0
    for size in chunks:
        first = jnp.full((z.shape[0],), start == 0)
        state, frames = decode(state, z[:, start : start + size], first)
        parts.append(frames[:, 3:] if start == 0 else frames)
        start += size
    return jnp.concatenate(parts, axis=1)


# ------------------------------------------------------------------------------------------------- written out


def conv(layer, x, stride=1):
    """Causal in time, over a whole clip, in one three-dimensional convolution."""
    t, h, w = layer.kernel.shape[:3]
    padding = ((t - 1, 0), (h // 2, h // 2), (w // 2, w // 2))
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    y = jax.lax.conv_general_dilated(x, layer.kernel[...], (1, stride, stride), padding, dimension_numbers=numbers)
    return y + layer.bias[...][None, None, None, None]


def norm(layer, x):
    return (
        x / jnp.linalg.norm(x, axis=-1, keepdims=True) * x.shape[-1] ** 0.5 * layer.weight[...][None, None, None, None]
    )


def residual(block, x):
    y = conv(block.inner, jax.nn.silu(norm(block.norm, x)))
    y = conv(block.outer, jax.nn.silu(norm(block.inner_norm, y)))
    return y + (x if block.shortcut is None else conv(block.shortcut, x))


def attention(block, x):
    b, f, h, w, c = x.shape
    query, key, value = jnp.split(conv(block.inner, norm(block.norm, x)).reshape(b, f, h * w, 3 * c), 3, axis=-1)
    weights = jax.nn.softmax(jnp.einsum("bfqc,bfkc->bfqk", query, key) * c**-0.5, axis=-1)
    return x + conv(block.outer, jnp.einsum("bfqk,bfkc->bfqc", weights, value).reshape(x.shape))


def up(block, x):
    if block.time is not None:
        # The first frame is passed on; the others are a clip of their own.
        rest = conv(block.time, x[:, 1:])
        b, f, h, w, c = rest.shape
        rest = jnp.moveaxis(rest.reshape(b, f, h, w, 2, c // 2), 4, 2).reshape(b, 2 * f, h, w, c // 2)
        x = jnp.concatenate([x[:, :1], rest], axis=1)
    return conv(block.space, x.repeat(2, axis=2).repeat(2, axis=3))


def down(block, x):
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))
    kernel, numbers = block.space.kernel[...], ("NDHWC", "DHWIO", "NDHWC")
    x = jax.lax.conv_general_dilated(x, kernel, (1, 2, 2), "VALID", dimension_numbers=numbers)
    x = x + block.space.bias[...][None, None, None, None]
    if block.time is None:
        return x
    rest = jax.lax.conv_general_dilated(x, block.time.kernel[...], (2, 1, 1), "VALID", dimension_numbers=numbers)
    return jnp.concatenate([x[:, :1], rest + block.time.bias[...][None, None, None, None]], axis=1)


def through(network, layers, x):
    x = conv(network.enter, x)
    for layer in layers:
        x = {"Residual": residual, "Attention": attention, "Up": up, "Down": down}[type(layer).__name__](layer, x)
    return conv(network.leave, jax.nn.silu(norm(network.norm, x)))


def decoded(model, z):
    scaled = z * jnp.asarray(model.config.deviation)[None, None, None, None]
    x = conv(model.from_latent, scaled + jnp.asarray(model.config.mean)[None, None, None, None])
    return jnp.clip(through(model.decoder, [*model.decoder.middle, *model.decoder.layers], x), -1, 1)


def encoded(model, pixels):
    x = pixels.astype(jnp.float32) / 127.5 - 1
    moments = conv(model.to_latent, through(model.encoder, [*model.encoder.layers, *model.encoder.middle], x))
    mean = moments[..., : model.config.channels] - jnp.asarray(model.config.mean)[None, None, None, None]
    return mean / jnp.asarray(model.config.deviation)[None, None, None, None]


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1), (3, 2), (1, 4), (5,)])
def test_a_stream_in_chunks_of_any_size_is_the_whole_clip(chunks):
    model, z = network(), latents()
    whole = jax.jit(lambda z: decoded(model, z))(z)
    assert whole.shape == (2, 17, 32, 48, 3)
    assert float(jnp.std(whole)) > 0.05
    assert float(jnp.mean(jnp.abs(whole) < 1)) > 0.5
    np.testing.assert_allclose(streamed(model, z, chunks), whole, atol=1e-5)


def test_whole_clips_are_decoded_and_encoded_frame_by_frame():
    model, z = network(), latents()
    np.testing.assert_allclose(
        jax.jit(lambda z: model.decode_floats(z))(z), jax.jit(lambda z: decoded(model, z))(z), atol=1e-5
    )
    pixels = jnp.asarray(np.random.default_rng(2).integers(0, 256, (2, 13, 16, 24, 3), dtype=np.uint8))
    whole = jax.jit(lambda x: encoded(model, x))(pixels)
    assert whole.shape == (2, 4, 2, 3, 4)
    np.testing.assert_allclose(jax.jit(lambda x: model.encode(x))(pixels), whole, atol=1e-5)
    one = jax.jit(lambda x: model.encode(x))(pixels[:, :1])
    np.testing.assert_allclose(one, whole[:, :1], atol=1e-5)


def test_one_change_of_frame_rate():
    model, z = network(CONFIG), latents(4)
    whole = jax.jit(lambda z: decoded(model, z))(z)
    assert whole.shape == (2, 7, 16, 24, 3)
    np.testing.assert_allclose(jax.jit(lambda z: model.decode_floats(z))(z), whole, atol=1e-5)


def test_sessions_at_different_ticks_share_an_executable():
    """Row 0 begins two chunks before row 1, which finds what others left in its place."""
    model, z = network(), latents(4)
    decode = jax.jit(lambda state, part: model.decode_chunk(state, part))
    alone = to_uint8(jax.jit(lambda z: model.decode_floats(z))(z))
    state = model.init_state(2, *SIZE)
    for tick in range(4):
        part = jnp.stack([z[0, tick], z[1, max(0, tick - 2)]])[:, None]
        if tick == 2:
            state["started"] = jnp.asarray([True, False])
        state, frames, valid = decode(state, part)
        assert frames.shape == (2, 4, 32, 48, 3)
        for row, begun in ((0, tick), (1, tick - 2)):
            if begun < 0:
                continue
            count = int(valid[row])
            assert count == (1 if begun == 0 else 4)
            end = 1 + 4 * begun
            difference = frames[row, 4 - count :].astype(jnp.int32) - alone[row, end - count : end].astype(jnp.int32)
            assert int(jnp.max(jnp.abs(difference))) <= 1


def test_bf16_stays_near_fp32():
    model, z = network(), latents(2)
    config = model.config
    rough = network(WanVAEConfig(**{**vars(config), "precision": type(config.precision)("float32", "bfloat16")}))
    exact, found = (jax.jit(lambda z, model=model: model.decode_floats(z))(z) for model in (model, rough))
    assert 1e-5 < float(jnp.max(jnp.abs(exact - found))) < 0.1


def test_clips_that_do_not_fit_are_refused():
    model = network()
    with pytest.raises(ConfigError, match=r"clips of 12 frames are not 1 \+ 4 n frames"):
        jax.eval_shape(model.encode, jax.ShapeDtypeStruct((1, 12, 16, 16, 3), jnp.uint8))
    with pytest.raises(ConfigError, match="20×16 pixels are not whole multiples of 8"):
        jax.eval_shape(model.encode, jax.ShapeDtypeStruct((1, 13, 20, 16, 3), jnp.uint8))
    with pytest.raises(ConfigError, match="each of 3 changes of resolution"):
        WanVAEConfig(temporal=(True,))
