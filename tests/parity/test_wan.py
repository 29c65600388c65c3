"""Wan's networks against diffusers itself, and PyTorch's files against PyTorch."""

import json

import numpy as np
import pytest

from tests.golden import wan as golden
from tests.interop.test_sources import ARRAYS, stored
from tests.interop.test_wan import DITS, TEXT, VAE, described, near, seeded
from vidar.cli.main import main
from vidar.interop import tables, wan
from vidar.interop.sources import open_tensors
from vidar.interop.targets import save_tensors
from vidar.interop.torch_file import write_torch_file
from vidar.models.umt5 import position_buckets

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def arrays():
    with np.load(golden.ARRAYS) as file:
        return dict(file)


@pytest.mark.parametrize("image", [False, True])
def test_the_stored_outputs_of_transformers_are_diffusers(arrays, image):
    expected = golden.transformed(golden.transformer(image), image)
    assert near(arrays["i2v" if image else "t2v"], expected, 1e-5)


def test_the_stored_outputs_of_the_vae_are_diffusers(arrays):
    model = golden.vae()
    np.testing.assert_allclose(arrays["encoded"], golden.encoded(model), atol=1e-5)
    np.testing.assert_allclose(arrays["decoded"], golden.decoded(model, arrays["encoded"])[:, :, ::4, ::4], atol=1e-5)


def test_the_stored_outputs_of_the_text_encoder_are_those_of_transformers(arrays):
    np.testing.assert_allclose(arrays["text"], golden.text_states(golden.text_encoder()), atol=1e-5)


def test_position_buckets_are_those_of_transformers():
    import torch

    attention = golden.text_encoder().encoder.block[0].layer[0].SelfAttention
    position = torch.arange(512)
    expected = attention._relative_position_bucket(position[None, :] - position[:, None])
    np.testing.assert_array_equal(position_buckets(512, 32, 128), expected.numpy())


def test_the_stored_names_are_diffusers():
    known = json.loads(golden.NAMES.read_text())
    for name, names in golden.real_names().items():
        assert known[name]["diffusers"] == golden.folded(names)


def test_diffusers_loads_what_goes_out():
    import torch

    for image in (False, True):
        model = golden.transformer(image)
        given = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        config, layout = wan.dit_config(stored(given), golden.HEAD)
        template, table = wan.dit_template(config), wan.dit_table(config)
        network = tables.load(stored(given), template, table, layout)
        out = {name: torch.from_numpy(one.read()) for name, one in tables.tensors_of(network, table, layout).items()}
        expected = golden.transformed(model, image)
        model.load_state_dict(out, strict=True)
        np.testing.assert_array_equal(golden.transformed(model, image), expected)


def test_pytorch_reads_what_is_written_and_the_other_way_round(tmp_path):
    import torch

    path = tmp_path / "x.pt"
    write_torch_file(path, {"generator_ema": stored(ARRAYS)})
    for mapped in (False, True):
        found = torch.load(path, weights_only=True, mmap=mapped)["generator_ema"]
        assert list(found) == list(ARRAYS)
        for name, array in ARRAYS.items():
            assert tuple(found[name].shape) == array.shape
            np.testing.assert_array_equal(found[name].float().numpy(), array.astype(np.float32))
    base = torch.arange(24.0).reshape(4, 6)
    views = {
        "whole": base,
        "turned": base.T,
        "part": base[1:3, ::2],
        "parameter": torch.nn.Parameter(base[0].bfloat16()),
    }
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in views.items()}, "step": 3}, path)
    tensors = open_tensors(path)
    expected = {name: tensor.detach().float().numpy() for name, tensor in views.items()}
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name].read().astype(np.float32), array)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    assert {name: tensor.shape for name, tensor in open_tensors(path).items()} == {"weight": (2, 2), "bias": (2,)}
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(Exception, match=r"torch.nn.modules.linear.Linear, which is not read because it could run code"):
        open_tensors(path)


def test_diffusers_and_transformers_open_converted_folders(tmp_path):
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    cases = {
        WanTransformer3DModel: (golden.transformer(True), DITS["i2v"]),
        AutoencoderKLWan: (golden.vae(), VAE),
        UMT5EncoderModel: (golden.text_encoder(), TEXT),
    }
    for number, (kind, (expected, config)) in enumerate(cases.items()):
        save_tensors(tmp_path / f"source{number}", seeded(*described(config)))
        folder = tmp_path / f"folder{number}"
        arguments = ["--source", str(tmp_path / f"source{number}"), "--output", str(folder), "--layout", "diffusers"]
        assert main(["convert", "--head-dim", str(golden.HEAD), *arguments]) == 0
        found, wanted = kind.from_pretrained(folder).state_dict(), expected.state_dict()
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value)


@pytest.mark.parametrize("saved", ["longlive", "peft", "diffusers"])
def test_adapters_of_peft_compute_unmerged_what_they_do_merged_in(saved, tmp_path):
    import torch

    peft = pytest.importorskip("peft")
    model = golden.transformer(False)
    save_tensors(tmp_path / "base", stored({name: one.numpy() for name, one in model.state_dict().items()}))
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "patch_embedding"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=layers))
    with torch.no_grad():
        for name, one in adapted.named_parameters():
            if "lora_" in name:
                one.copy_(torch.from_numpy(golden.normal(name, tuple(one.shape)) * 0.2))
    path, scale = tmp_path / "adapter", []
    if saved == "longlive":  # whose file does not say its alpha
        path, scale = tmp_path / "lora.pt", ["--lora-scale", "1.5"]
        torch.save({"generator_lora": peft.get_peft_model_state_dict(adapted), "critic_lora": {}, "step": 1}, path)
    elif saved == "peft":
        adapted.save_pretrained(path)
    else:
        path = tmp_path / "x.safetensors"
        meta = {f"transformer.{name}": value for name, value in (("r", 4), ("lora_alpha", 6))}
        weights = {
            name.replace("base_model.model.", "transformer."): one.contiguous()
            for name, one in peft.get_peft_model_state_dict(adapted).items()
        }
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(weights, path, {"format": "pt", "lora_adapter_metadata": json.dumps(meta)})
    expected = golden.transformed(adapted, False)
    with np.load(golden.ARRAYS) as arrays:
        assert np.max(np.abs(expected - arrays["t2v"])) > 0.1 * np.max(np.abs(expected))
    arguments = ["--source", str(tmp_path / "base"), "--output", str(tmp_path / "out"), "--layout", "diffusers"]
    assert main(["convert", "--head-dim", str(golden.HEAD), *arguments, "--lora", str(path), *scale]) == 0
    found = type(model).from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(golden.transformed(found, False), expected, atol=2e-5 * np.max(np.abs(expected)))
    folded = {name: one.numpy() for name, one in adapted.merge_and_unload().state_dict().items()}
    tensors = open_tensors(tmp_path / "out")
    assert tensors.keys() == folded.keys()
    for name, array in folded.items():
        np.testing.assert_allclose(tensors[name].read(), array, rtol=1e-6, atol=1e-6)
