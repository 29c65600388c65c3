"""The byte encoder: tokens, an independent implementation, and its place in the DiT."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.networks import CONFIG, LATENT, TOKENS, network, pattern
from vidar.attention.visibility import chunk_layout
from vidar.errors import ConfigError
from vidar.models.dit import DiT, TextConfig
from vidar.models.flops import shape_of, text_flops, training_flops
from vidar.models.frames import Conditions, Frames
from vidar.models.layers import Precision
from vidar.models.placement import logical_axes
from vidar.models.text import ByteEncoder, ByteEncoderConfig, byte_tokens
from vidar.models.umt5 import position_buckets
from vidar.sampling.guidance import classifier_free
from vidar.sampling.rollout import Sampler

WIDTH = 12
ENCODER = ByteEncoderConfig(layers=2, heads=3, mlp=20)
FULL = replace(CONFIG, actions=None, text=TextConfig(WIDTH, 16, ENCODER))
PROMPTS = ["a red ball falls", "a cyan ball"]


def encoder():
    """Random parameters, away from zero and one."""
    precision = Precision(compute="float32")
    template = jax.eval_shape(lambda: ByteEncoder(ENCODER, WIDTH, precision, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.6 * rng.normal(size=leaf.shape), leaf.dtype), template)


@jax.jit
def encode(network, tokens):
    return network(tokens)


@jax.jit
def condition(model, text, kept=None, negative=None):
    return model.encode_conditioning(text, kept, None, negative)


def test_tokens_are_bytes_and_one():
    tokens = byte_tokens(["ab", "", "é!", "abcdefgh"], 6)
    assert tokens.dtype == np.int32
    expected = [
        [98, 99, 0, 0, 0, 0],
        [0] * 6,
        [0xC3 + 1, 0xA9 + 1, 34, 0, 0, 0],
        [98, 99, 100, 101, 102, 103],
    ]
    np.testing.assert_array_equal(tokens, expected)


def by_hand(network, tokens):
    """One text without padding, in numpy."""

    def value(part):
        return np.asarray(part[...], np.float64)

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight

    def linear(x, part, layer):
        return x @ value(part.kernel)[layer] + value(part.bias)[layer]

    x = value(network.embedding)[tokens]
    blocks, length = network.blocks, len(tokens)
    bucket = position_buckets(length, 32, 128)
    for layer in range(ENCODER.layers):
        hidden = norm(x, value(blocks.norm.weight)[layer])
        parts = (linear(hidden, getattr(blocks.attention, name), layer) for name in ("query", "key", "value"))
        query, key, held = (part.reshape(length, ENCODER.heads, -1) for part in parts)
        query = norm(query, value(blocks.attention.query_norm.weight)[layer])
        key = norm(key, value(blocks.attention.key_norm.weight)[layer])
        score = np.einsum("qnd,knd->nqk", query, key) / np.sqrt(WIDTH / ENCODER.heads)
        score = np.exp(score + value(blocks.positions)[layer][bucket].transpose(2, 0, 1))
        mixed = np.einsum("nqk,knd->qnd", score / score.sum(-1, keepdims=True), held).reshape(length, WIDTH)
        x = x + linear(mixed, blocks.attention.output, layer)
        hidden = linear(norm(x, value(blocks.mlp_norm.weight)[layer]), blocks.mlp.up, layer)
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(hidden, blocks.mlp.down, layer)
    return norm(x, value(network.norm.weight))


def test_states_are_those_of_an_implementation_by_hand_and_padding_changes_nothing():
    model = encoder()
    tokens = byte_tokens(PROMPTS, 24)
    states = np.asarray(encode(model, tokens))
    for row, prompt in enumerate(PROMPTS):
        length = len(prompt)
        np.testing.assert_allclose(states[row, :length], by_hand(model, tokens[row, :length]), rtol=2e-4, atol=2e-4)
        assert np.all(states[row, length:] == 0)
    np.testing.assert_allclose(encode(model, tokens[:, :20])[:, :16], states[:, :16], atol=1e-5)


def test_every_byte_sees_those_before_and_behind_it_and_where_they_are():
    model = encoder()
    base, last, swapped = np.asarray(encode(model, byte_tokens(["abcd", "abcx", "bacd"], 6)))
    assert np.abs(base[0] - last[0]).max() > 1e-3
    assert np.abs(base[3] - swapped[3]).max() > 1e-3


def test_the_network_encodes_tokens_as_its_encoder_does_and_drops_them_to_nothing():
    model = network(FULL)
    tokens = jnp.asarray(byte_tokens(PROMPTS, 16))
    states = model.text_encoder(tokens)
    whole, parts = condition(model, tokens), condition(model, states)
    np.testing.assert_allclose(whole.keys, parts.keys, atol=1e-5)
    np.testing.assert_allclose(whole.values, parts.values, atol=1e-5)
    # What is dropped is the empty prompt, unless a negative one stands for it.
    kept = jnp.asarray([True, False])
    other = jnp.asarray(byte_tokens(["", "a dog"], 16))
    dropped, replaced = condition(model, tokens, kept), condition(model, tokens, kept, other)
    np.testing.assert_allclose(dropped.keys[:, 0], whole.keys[:, 0], atol=1e-5)
    np.testing.assert_allclose(dropped.keys[:, 1], condition(model, other).keys[:, 0], atol=1e-5)
    np.testing.assert_allclose(replaced.keys[:, 1], condition(model, other).keys[:, 1], atol=1e-5)
    assert np.abs(dropped.keys[:, 1] - replaced.keys[:, 1]).max() > 1e-2


@pytest.mark.parametrize("lag", [0, None])
def test_every_parameter_of_the_encoder_gets_a_gradient_through_a_rollout(lag):
    sampler = Sampler(pattern(), LATENT, TOKENS, 2, lag=lag, guidance=classifier_free(2.0), cache_dtype="float32")
    given = Conditions(text=jnp.asarray(byte_tokens(PROMPTS[:1], 16)))

    @jax.jit
    def gradient(model):
        def loss(model):
            encoded = sampler.encode(model, given)
            latents = jax.random.normal(jax.random.key(0), (2, 2, *LATENT))
            frames = Frames(latents, jnp.full((2, 2), 0.5), chunk_layout(2, 1))
            return jnp.sum(model((frames,), encoded, visibility=pattern()).predictions[0] ** 2)

        return jax.grad(loss)(model).text_encoder

    model = network(FULL)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(model)):
        name = jax.tree_util.keystr(path)
        if "positions" in name:
            leaf = leaf[:, :1]  # only buckets of distances that occur
        assert np.abs(np.asarray(leaf)).max() > 0, name


def test_tokens_for_a_network_without_encoder_and_uneven_heads_are_refused():
    frozen = network(replace(FULL, text=TextConfig(WIDTH, 16)))
    assert frozen.text_encoder is None
    with pytest.raises(ConfigError, match="model.text.encoder is None"):
        frozen.encode_conditioning(jnp.zeros((1, 16), jnp.int32))
    with pytest.raises(ConfigError, match="text.width=10 must be a multiple of text.encoder.heads=3"):
        TextConfig(10, 16, ENCODER)
    with pytest.raises(ConfigError, match="text.encoder.layers=0"):
        ByteEncoderConfig(layers=0)


def test_its_matrices_are_placed_as_those_of_the_blocks():
    template = jax.eval_shape(lambda: DiT(FULL, rngs=nnx.Rngs(0)))
    axes = {
        jax.tree_util.keystr(path): logical_axes(jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(template)
    }
    blocks = ".text_encoder.blocks"
    assert axes[f"{blocks}.attention.query.kernel.value"] == ("layers", "embed", "heads")
    assert axes[f"{blocks}.mlp.down.kernel.value"] == ("layers", "mlp", "embed")
    assert axes[f"{blocks}.positions.value"] == ("layers", None, None)
    assert axes[".text_encoder.embedding.value"] == (None, None)


def test_its_parameters_and_work_are_counted():
    config = replace(
        FULL, width=96, heads=2, mlp=192, layers=1, text=TextConfig(64, 48, ByteEncoderConfig(1, 2, 256)), channels=12
    )
    shape = shape_of(config, 8, 8)
    template = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    matrices = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(template)
        if "kernel" in jax.tree_util.keystr(path)
    )
    modulation = 6 * config.width  # a table, which `Shape.parameters` counts among the blocks
    assert shape.parameters == matrices + modulation
    tokens = jax.ShapeDtypeStruct((1, 48), jnp.int32)
    lowered = jax.jit(DiT.encode_conditioning).lower(template, tokens)
    # One block each, so that XLA counts every product once; what is left is elementwise.
    assert text_flops(shape) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.06)
    frozen = replace(shape, text_encoder=None)
    trained, without = (training_flops(one, "bidirectional", [2, 2]) for one in (shape, frozen))
    assert trained.total - without.total == pytest.approx(3 * text_flops(shape))
    assert text_flops(frozen) == without.text == 0
