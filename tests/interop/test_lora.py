"""Adapters: what they add to weights, how others name them, and those that do not fit."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.golden import wan as golden
from tests.interop.test_sources import stored
from tests.interop.test_wan import FP32, SMALL, VAE, described, seeded
from vidar.attention.visibility import Bidirectional, chunk_layout
from vidar.errors import CheckpointError, ConfigError
from vidar.interop import tables
from vidar.interop.lora import merged, merged_into, open_adapter
from vidar.interop.networks import recognise
from vidar.interop.sources import Stored, open_tensors
from vidar.interop.torch_file import write_torch_file
from vidar.models.frames import Conditions, Frames

RANK, ALPHA = 3, 12.0
SETTINGS = {"attention_head_dim": golden.HEAD}
# Every linear layer of the blocks, as LongLive adapts them; by layout.
LAYERS = {
    "original": [
        *(f"{part}.{letter}" for part in ("self_attn", "cross_attn") for letter in "qkvo"),
        *("ffn.0", "ffn.2"),
    ],
    "diffusers": [
        *(f"{part}.{name}" for part in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *("ffn.net.0.proj", "ffn.net.2"),
    ],
}
PAIRS = {  # by who writes them: names of A and B for a module
    "longlive": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "comfy": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
}


def base(layout="original", config=SMALL):
    """A seeded transformer's tensors."""
    template, table = described(config)
    return tables.renamed(seeded(template, table), template, table, "diffusers", layout)


def factors(module, shape):
    """A and B of a layer, by its place in the network rather than its name."""
    return golden.normal(f"A{module}", (RANK, shape[1])), golden.normal(f"B{module}", (shape[0], RANK)) * 0.2


def modules(layout):
    return [f"blocks.{block}.{layer}" for block in range(SMALL.layers) for layer in LAYERS[layout]]


def adapter(tensors, kind="longlive", layout="original", alpha=None):
    """An adapter of every layer in somebody's names."""
    down, up = PAIRS[kind]
    found = {}
    for module, place in zip(modules(layout), modules("original"), strict=True):
        name = module.replace(".", "_") if kind == "kohya" else module
        found[down.format(name)], found[up.format(name)] = factors(place, tensors[f"{module}.weight"].shape)
        if alpha is not None:
            found[down.format(name).split(".lora_")[0] + ".alpha"] = np.asarray(alpha, np.float32)
    return stored(found)


def near(found, expected, tolerance):
    return np.max(np.abs(np.asarray(found) - np.asarray(expected))) <= tolerance * np.max(np.abs(expected))


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("kind", PAIRS)
def test_merged_weights_compute_what_the_branch_beside_them_does(kind, alpha):
    tensors = base()
    found = merged(tensors, adapter(tensors, kind, alpha=alpha), 0.5)
    scale = 0.5 * (1 if alpha is None else alpha / RANK)
    assert list(found) == list(tensors)
    changed = {f"{module}.weight" for module in modules("original")}
    for name, tensor in found.items():
        before, after = tensors[name].read(), tensor.read()
        if name not in changed:
            np.testing.assert_array_equal(after, before)
            continue
        down, up = factors(name.removesuffix(".weight"), before.shape)
        x = golden.normal("x", (5, before.shape[1]))
        branch = np.float32(scale) * ((x @ down.T) @ up.T)
        assert near(x @ after.T, x @ before.T + branch, 1e-6)
        assert not near(x @ after.T, x @ before.T, 1e-2)


def summed(scale):
    """A network with an adapter merged in, formed in vidar's own layout."""
    changes = {name: np.zeros(tensor.shape, np.float32) for name, tensor in base().items()}
    for module in modules("original"):
        down, up = factors(module, changes[f"{module}.weight"].shape)
        changes[f"{module}.weight"] = np.float32(scale) * (up @ down)
    template, table = described(SMALL)
    parts = (tables.load(tensors, template, table, "original") for tensors in (base(), stored(changes)))
    return jax.tree.map(jnp.add, *parts)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("named", ["original", "diffusers"])
def test_networks_take_adapters_of_either_layout(named, layout):
    network = recognise(base(layout), SETTINGS, FP32)
    found = merged_into(network, adapter(base(named), "diffusers", named), 0.7)
    assert (found.kind, found.config, found.layout) == ("transformer", network.config, named)
    expected = summed(0.7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found.load(), expected)


def test_a_merged_network_computes_what_the_sum_does():
    network = recognise(base("diffusers"), SETTINGS, FP32)
    found = merged_into(network, adapter(base()), 0.7)
    given = {key: jnp.asarray(value) for key, value in golden.inputs(False).items()}
    frames = Frames(given["latents"], jnp.broadcast_to(given["time"][:, None] / 1000, (2, 3)), chunk_layout(3, 3))
    forward = jax.jit(lambda model: model((frames,), Conditions(given["text"]), visibility=Bidirectional()))
    output, expected, without = (forward(one).predictions[0] for one in (found.load(), summed(0.7), network.load()))
    assert near(output, expected, 1e-5)
    assert not near(output, without, 1e-2)


def test_without_strength_nothing_changes():
    tensors = base()
    tensors["blocks.0.ffn.0.weight"] = stored({"x": np.full((96, 48), -0.0, np.float32)})["x"]
    found = merged(tensors, adapter(tensors), 0.0)
    for name, tensor in tensors.items():
        assert found[name].read().tobytes() == tensor.read().tobytes()
    with pytest.raises(ConfigError, match="scale=nan must be finite"):
        merged(tensors, adapter(tensors), float("nan"))


def test_sums_are_formed_in_fp32_and_rounded_once():
    shapes = {"x.weight": (8, 6), "x.lora_A.weight": (4, 6), "x.lora_B.weight": (8, 4), "x.diff": (8, 6)}
    arrays = {name: golden.normal(name, shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    change = {name: array for name, array in arrays.items() if name != "x.weight"}
    after = merged(stored(arrays), stored(change))["x.weight"].read()
    weight, down, up, difference = (array.astype(np.float32) for array in arrays.values())
    assert after.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(after, (weight + up @ down + difference).astype(ml_dtypes.bfloat16))
    twice = (weight + up @ down).astype(ml_dtypes.bfloat16) + arrays["x.diff"]
    assert not np.array_equal(after, twice)


def test_tensors_are_read_when_the_sum_is():
    reads = []

    def noted(tensors):
        def read(name, stored):
            reads.append(name)
            return stored.read()

        return {name: replace(one, read=lambda name=name, one=one: read(name, one)) for name, one in tensors.items()}

    tensors = base()
    found = merged(noted(tensors), noted(adapter(tensors)))
    assert not reads
    found["blocks.1.ffn.2.weight"].read()
    assert {name.removeprefix("base_model.model.") for name in reads} == {
        "blocks.1.ffn.2.weight",
        "blocks.1.ffn.2.lora_A.weight",
        "blocks.1.ffn.2.lora_B.weight",
    }


def test_differences_are_added_and_convolutions_merged():
    tensors = base()
    patch = tensors["patch_embedding.weight"].read()
    width, *inner = patch.shape
    down, up = golden.normal("a", (RANK, *inner)), golden.normal("b", (width, RANK, 1, 1, 1))
    added = {name: golden.normal(name, tensors[name].shape) for name in ("blocks.0.norm3.weight", "head.modulation")}
    change = {
        "diffusion_model.patch_embedding.lora_A.weight": down,
        "diffusion_model.patch_embedding.lora_B.weight": up,
        "diffusion_model.patch_embedding.diff_b": golden.normal("c", (width,)),
        "diffusion_model.blocks.0.norm3.diff": added["blocks.0.norm3.weight"],
        "diffusion_model.head.diff_m": added["head.modulation"],
    }
    found = merged(tensors, stored(change), 0.5)
    product = np.einsum("or,ri...->oi...", up[:, :, 0, 0, 0], down)
    np.testing.assert_allclose(found["patch_embedding.weight"].read(), patch + 0.5 * product, rtol=1e-5, atol=1e-6)
    bias = tensors["patch_embedding.bias"].read() + np.float32(0.5) * change["diffusion_model.patch_embedding.diff_b"]
    np.testing.assert_allclose(found["patch_embedding.bias"].read(), bias, rtol=1e-6)
    for name, difference in added.items():
        np.testing.assert_allclose(found[name].read(), tensors[name].read() + 0.5 * difference, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- files


def weights(adapter):
    return {name: stored.read() for name, stored in adapter.items()}


def test_longlives_file_holds_two_adapters(tmp_path):
    tensors = base()
    ours = adapter(tensors)
    other = {name: replace(one, read=lambda one=one: one.read() * 0) for name, one in ours.items()}
    write_torch_file(tmp_path / "lora.pt", {"critic_lora": other, "generator_lora": ours})
    write_torch_file(tmp_path / "bare.pt", {"model": ours})
    for name in ("lora.pt", "bare.pt"):
        found = open_adapter(tmp_path / name)
        assert found.keys() == ours.keys()
        for key, one in ours.items():
            np.testing.assert_array_equal(found[key].read(), one.read())


@pytest.mark.parametrize("kind", ["peft", "diffusers"])
def test_alpha_beside_the_weights_counts(tmp_path, kind):
    tensors, name = base(), "blocks.1.cross_attn.k.weight"
    ours = weights(adapter(tensors, "longlive" if kind == "peft" else "diffusers"))

    def written(**settings):
        if kind == "peft":
            save_file(ours, tmp_path / "adapter_model.safetensors")
            (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
            return tmp_path
        meta = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
        save_file(ours, tmp_path / "x.safetensors", {"format": "pt", "lora_adapter_metadata": meta})
        return tmp_path / "x.safetensors"

    def change(path):
        return merged(tensors, open_adapter(path))[name].read() - tensors[name].read()

    one = change(written())
    assert near(change(written(r=RANK, lora_alpha=6)), one * (6 / RANK), 1e-5)
    stabilised = change(written(r=RANK, lora_alpha=6, use_rslora=True))
    assert near(stabilised, one * (6 / RANK**0.5), 1e-5)
    with pytest.raises(CheckpointError, match="DoRA"):
        change(written(lora_alpha=6, use_dora=True))
    if kind == "peft":
        for content in ("{", "[]"):
            (tmp_path / "adapter_config.json").write_text(content)
            with pytest.raises(CheckpointError, match="settings"):
                open_adapter(tmp_path)


# Who saved a network; its names with its wrappers.
WRAPPED = {
    "self_forcing": ("generator_ema", "model.{}"),
    "causal_forcing": ("generator", "model._fsdp_wrapped_module.{}"),
    "checkpointed": ("generator", "model._fsdp_wrapped_module._checkpoint_wrapped_module.{}"),
    "diffusion_trainer": ("generator_ema", "model._fsdp_wrapped_module.{}"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_networks_of_other_trainers_open_and_take_adapters(tmp_path, kind):
    part, form = WRAPPED[kind]
    tensors = base()
    wrapped = {form.format(name).replace("blocks.0.", "blocks.0._orig_mod."): one for name, one in tensors.items()}
    networks = {"critic": {"model.x": stored({"x": np.zeros(1)})["x"]}, part: wrapped}
    write_torch_file(tmp_path / "model.pt", networks)
    found = open_tensors(tmp_path, part)  # CausVid names the directory
    assert found.keys() == tensors.keys()
    if part == "generator":
        assert open_tensors(tmp_path / "model.pt").keys() == tensors.keys()
    network = merged_into(recognise(found, SETTINGS), adapter(tensors))
    expected = merged(tensors, adapter(tensors))
    for name, one in network.converted("original").items():
        np.testing.assert_array_equal(one.read(), expected[name].read())


# ----------------------------------------------------------------------------------------------------------- refusals


def test_adapters_that_do_not_fit_are_refused():
    tensors = base()
    whole = adapter(tensors)
    query = "base_model.model.blocks.0.self_attn.q"

    def refused(message, **changes):
        given = {name.replace("+", "."): one for name, one in changes.items()}
        given = {name: one for name, one in ({**whole, **given}).items() if one is not None}
        for network in (tensors, recognise(tensors, SETTINGS)):
            with pytest.raises(CheckpointError, match=re.escape(message)):
                merged(network, given) if isinstance(network, dict) else merged_into(network, given)

    def zeros(*shape):
        return Stored(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))

    strange = "the adapter is of another network: 2 of its 42 tensors change what this one lacks, such as "
    far = query.replace("blocks.0", "blocks.2")
    refused(f"{strange}blocks.2.self_attn.q", **{f"{far}.lora_{one}.weight": zeros(3, 48) for one in "AB"})
    only = "the adapter has only {} for blocks.0.self_attn.q.weight; down and up belong together"
    refused(only.format("down"), **{f"{query}.lora_B.weight": None})
    refused(only.format("up and alpha"), **{f"{query}.lora_A.weight": None, f"{query}.alpha": zeros()})
    shapes = "blocks.0.self_attn.q.weight is [48, 48], its change is down {}, up {}"
    refused(shapes.format([3, 40], [48, 3]), **{f"{query}.lora_A.weight": zeros(3, 40)})
    refused(shapes.format([3, 48], [48, 4]), **{f"{query}.lora_B.weight": zeros(48, 4)})
    refused(shapes.format([3, 48], [1, 3]), **{f"{query}.lora_B.weight": zeros(1, 3)})
    refused("up [48, 3], alpha [2]", **{f"{query}.alpha": zeros(2)})
    refused("its change is down [3, 48], up [48, 3], difference [48]", **{f"{query}.diff": zeros(48)})
    refused("changes blocks.0.self_attn.q.weight twice", **{"blocks.0.self_attn.q.lora_down.weight": zeros(3, 48)})
    refused("magnitude_vector is no tensor of an adapter", **{f"{query}.lora_magnitude_vector": zeros(48)})
    vae = recognise(seeded(*described(VAE)))
    with pytest.raises(CheckpointError, match="of another network: 40 of its 40 tensors"):
        merged_into(vae, whole)
