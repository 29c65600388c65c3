"""Wan's networks at their real widths, a layer or two of each, against diffusers and transformers.

Widths are real, so that sums are as long as in the real networks; layers, clips and vocabulary are not. In fp32 the two
differ by rounding. In bf16 both differ from fp32, and vidar is asked to be about as near to it as torch is: of its own
types, diffusers computes all in bf16, vidar modulation and norms in fp32.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import wan as golden
from tests.interop.test_sources import stored
from vidar.attention.visibility import Bidirectional, chunk_layout
from vidar.interop import networks
from vidar.models.frames import Conditions, Frames
from vidar.models.layers import Precision

pytestmark = pytest.mark.parity

FP32, BF16 = Precision("float32", "float32"), Precision("bfloat16", "bfloat16")


@dataclass(frozen=True)
class Error:
    """How far an array is from another.

    Attributes:
        norm: Norm of the error over the norm of what is expected.
        largest: Largest error over the largest value.
    """

    norm: float
    largest: float


def error(found, expected) -> Error:
    assert found.shape == expected.shape
    wrong = np.asarray(found, np.float64) - expected
    norm = np.linalg.norm(wrong) / np.linalg.norm(expected)
    return Error(float(norm), float(np.max(np.abs(wrong)) / np.max(np.abs(expected))))


def loaded(model, precision: Precision):
    """A torch model's weights in vidar's network."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != golden.TIED}
    return networks.recognise(stored(state), precision=precision).load()


def compare(name: str, model, theirs, ours) -> None:
    """Compares in fp32, and in bf16 to fp32; `theirs(model)` and `ours(network)` run the two. Consumes the model."""
    expected = theirs(model)
    errors = {"bf16": error(ours(loaded(model, BF16)), expected)}
    network = loaded(model, FP32)
    errors["torch's bf16"] = error(theirs(model.bfloat16()), expected)  # makes room, too
    errors["fp32"] = error(ours(network), expected)
    print(name, errors)  # shown with -s
    assert errors["fp32"].largest <= 2e-5
    assert errors["bf16"].norm <= 2e-2
    assert errors["bf16"].norm <= 1.25 * errors["torch's bf16"].norm
    assert errors["bf16"].largest <= 1.5 * errors["torch's bf16"].largest


# ------------------------------------------------------------------------------------------------------ transformers

WIDE = dict(golden.REAL["wan_1_3b"], num_layers=1)
WIDEST = dict(golden.REAL["wan_14b"], num_layers=1)


def transformer(**fields):
    """A transformer of diffusers with seeded weights."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**fields).eval()
    golden.fill(model)
    return model


def compare_transformers(name: str, model, size: tuple[int, int], time, image: bool = False) -> None:
    """One clip of 3 frames, with a time for each."""
    import torch

    latents = golden.normal("latents", (1, 3, *size, 36 if image else 16))
    text = golden.normal("text", (1, 512, 4096)) * (np.arange(512) < 60)[None, :, None].astype(np.float32)
    features = golden.normal("features", (1, 257, 1280)) if image else None
    tokens = size[0] * size[1] // 4

    def theirs(model):
        def tensor(array):
            return None if array is None else torch.from_numpy(array).to(model.dtype)

        given = torch.tensor(time[:1]) if len(set(time)) == 1 else torch.tensor([time]).repeat_interleave(tokens, 1)
        with torch.no_grad():
            states = tensor(latents).permute(0, 4, 1, 2, 3)
            velocity = model(states, given, tensor(text), tensor(features)).sample
        return velocity.permute(0, 2, 3, 4, 1).float().numpy()

    @jax.jit
    def run(network, given, conditions):
        frames = Frames(given, jnp.asarray([time], jnp.float32) / 1000, chunk_layout(3, 3))
        return network((frames,), conditions, visibility=Bidirectional()).predictions[0]

    def ours(network):
        conditions = Conditions(text=jnp.asarray(text))
        if features is not None:
            conditions = replace(conditions, image=jnp.asarray(features), latents=jnp.asarray(latents[..., 16:]))
        return run(network, jnp.asarray(latents[..., :16]), conditions)

    compare(name, model, theirs, ours)


def test_a_layer_of_wan_1_3b():
    compare_transformers("1.3B", transformer(**WIDE), (60, 104), [937.5, 625.0, 0.0])


def test_a_layer_of_image_to_video():
    """As wide as the 1.3B, which has no image-to-video: with 5120 channels this many tokens would take minutes."""
    fields = dict(WIDE, in_channels=36, image_dim=1280, added_kv_proj_dim=WIDE["num_attention_heads"] * 128)
    compare_transformers("image to video", transformer(**fields), (60, 104), [500.0] * 3, image=True)


def test_a_layer_of_wan_14b():
    """On few tokens, for the sake of memory and time."""
    compare_transformers("14B", transformer(**WIDEST), (8, 12), [937.5, 625.0, 0.0])


# --------------------------------------------------------------------------------------------------------------- VAE


@pytest.fixture(scope="module")
def clip():
    """9 frames of 64 × 96, in [-1, 1]."""
    time, row, column = np.meshgrid(np.arange(9), np.arange(64), np.arange(96), indexing="ij")
    waves = [np.sin(0.2 * row + 0.3 * time), np.cos(0.15 * column - 0.4 * time), np.sin(0.1 * (row + column))]
    noise = golden.normal("clip", (9, 64, 96, 3))
    return np.clip(0.7 * np.stack(waves, axis=-1) + 0.1 * noise, -1, 1).astype(np.float32)[None]


@pytest.fixture
def vae():
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan().eval()
    golden.fill(model)
    return model


def statistics(model):
    return (np.float32(getattr(model.config, f"latents_{name}")) for name in ("mean", "std"))


def test_the_vae_encodes(vae, clip):
    import torch

    mean, deviation = statistics(vae)

    def theirs(model):
        with torch.no_grad():
            found = model.encode(torch.from_numpy(clip).permute(0, 4, 1, 2, 3).to(model.dtype)).latent_dist.mode()
        return (found.permute(0, 2, 3, 4, 1).float().numpy() - mean) / deviation

    run = jax.jit(lambda network, given: network.encode_floats(given))
    compare("encode", vae, theirs, lambda network: run(network, jnp.asarray(clip)))


LATENTS = golden.normal("latents", (1, 3, 8, 12, 16))


def test_the_vae_decodes(vae):
    import torch

    mean, deviation = statistics(vae)

    def theirs(model):
        scaled = torch.from_numpy(LATENTS * deviation + mean).permute(0, 4, 1, 2, 3).to(model.dtype)
        with torch.no_grad():
            return model.decode(scaled).sample.permute(0, 2, 3, 4, 1).float().numpy()

    run = jax.jit(lambda network, given: network.decode_floats(given))
    compare("decode", vae, theirs, lambda network: run(network, jnp.asarray(LATENTS)))


def test_the_vae_decodes_a_stream_as_it_does_a_clip(vae):
    network = loaded(vae, FP32)
    latents = jnp.asarray(LATENTS)
    whole = np.asarray(jax.jit(lambda network: network.decode_floats(latents))(network))
    decode = jax.jit(lambda network, *arguments: network._decode(*arguments))
    state = network.init_state(1, *LATENTS.shape[2:4])["past"]
    state, begun = decode(network, state, latents[:, :2], jnp.asarray([True]))
    _, rest = decode(network, state, latents[:, 2:], jnp.asarray([False]))
    frames = jnp.concatenate([begun[:, 3:], rest], axis=1)
    assert frames.shape == (1, 9, 64, 96, 3)
    assert error(frames, whole).largest <= 1e-5


# -------------------------------------------------------------------------------------------------------------- text


def test_two_layers_of_umt5():
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(UMT5Config(**golden.XXL | dict(vocab_size=300, num_layers=2))).eval()
    golden.fill(model)
    with torch.no_grad():
        for block in model.encoder.block:  # as T5 begins, too: its attention is not scaled, so its queries are small
            block.layer[0].SelfAttention.q.weight.mul_(64**-0.5)
    tokens = np.random.default_rng(0).integers(0, 300, (1, 512)).astype(np.int32)
    kept = (np.arange(512) < 400)[None]

    def theirs(model):
        with torch.no_grad():
            given = torch.from_numpy(tokens).long(), torch.from_numpy(kept).long()
            return model(given[0], attention_mask=given[1]).last_hidden_state.float().numpy() * kept[..., None]

    run = jax.jit(lambda network, *given: network(*given).astype(jnp.float32))
    compare("UMT5", model, theirs, lambda network: run(network, jnp.asarray(tokens), jnp.asarray([400], jnp.int32)))
