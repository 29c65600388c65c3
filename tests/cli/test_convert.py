"""`vidar convert`: there and back, and what it refuses."""

import json
import logging
import pickle
import shutil
import sys
import types
import zipfile

import numpy as np
import pytest

from tests.interop.test_lora import adapter, base
from tests.interop.test_wan import DITS, TEXT, VAE, described, seeded
from vidar.cli.main import main
from vidar.interop import targets
from vidar.interop.lora import merged
from vidar.interop.sources import open_tensors
from vidar.interop.targets import save_tensors
from vidar.interop.torch_file import write_torch_file

NETWORKS = {"transformer": DITS["i2v"], "vae": VAE, "text_encoder": TEXT}


@pytest.mark.parametrize("kind", NETWORKS)
def test_checkpoints_go_there_and_back_bit_for_bit(kind, tmp_path, capsys):
    tensors = seeded(*described(NETWORKS[kind]))
    save_tensors(tmp_path / "source", tensors)
    middle = tmp_path / ("middle.pt" if kind == "transformer" else "middle")
    command = ["convert", "--head-dim", "24"]
    arguments = ["--source", str(tmp_path / "source"), "--output", str(middle), "--layout", "original"]
    assert main([*command, *arguments]) == 0
    assert f"a {kind} of {len(tensors)} tensors" in capsys.readouterr().out
    part = ["--part", "generator_ema"] if kind == "transformer" else []
    arguments = ["--source", str(middle), *part, "--output", str(tmp_path / "back"), "--layout", "diffusers"]
    assert main([*command, *arguments]) == 0
    back = open_tensors(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].read(), tensor.read())
    stem = "model" if kind == "text_encoder" else "diffusion_pytorch_model"
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == ["config.json", f"{stem}.safetensors"]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("num_layers", 2) == 2


@pytest.fixture
def source(tmp_path):
    """A transformer in diffusers' layout; its tensors and its folder."""
    tensors = seeded(*described(DITS["t2v"]))
    save_tensors(tmp_path / "source", tensors)
    return tensors, tmp_path / "source"


def run(source, output, *arguments):
    return main(["convert", "--head-dim", "24", "--source", str(source), "--output", str(output), *map(str, arguments)])


def test_adapters_are_merged_in(source, tmp_path, capsys):
    tensors, folder = source
    write_torch_file(tmp_path / "lora.pt", {"generator_lora": adapter(base()), "critic_lora": adapter(base())})
    lora = ("--lora", tmp_path / "lora.pt", "--lora-scale", 0.25)
    assert run(folder, tmp_path / "x", "--layout", "diffusers", *lora) == 0
    assert f"a transformer of {len(tensors)} tensors with {lora[1]} merged in" in capsys.readouterr().out
    expected = merged(tensors, adapter(tensors, "diffusers", "diffusers"), 0.25)
    found = open_tensors(tmp_path / "x")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].read(), tensor.read())


def test_an_interrupted_conversion_goes_on_unless_it_is_another(source, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setitem(save_tensors.__kwdefaults__, "shard", 70_000)
    assert run(source[1], tmp_path / "whole", "--layout", "original") == 0
    capsys.readouterr()
    write, left = targets._save, 2

    def full(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(targets, "_save", full)
    output = tmp_path / "x"
    assert run(source[1], output, "--layout", "original") == 2
    line = capsys.readouterr().err.strip()
    assert line == f"vidar convert: {output}: cannot be written (No space left on device); free space or choose another"
    assert [file.name for file in output.iterdir()] == ["model.part"]
    monkeypatch.setattr(targets, "_save", write)
    shutil.copytree(output, tmp_path / "y")
    contents = [{file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}]
    with caplog.at_level(logging.INFO, "vidar"):
        assert run(source[1], output, "--layout", "original") == 0
        assert [message.split(": ")[1][:6] for message in caplog.messages] == ["kept 2"]
        contents.append({file.name: file.read_bytes() for file in output.iterdir()})
        write_torch_file(tmp_path / "lora.pt", {"generator_lora": adapter(base())})
        assert run(source[1], tmp_path / "y", "--layout", "original", "--lora", tmp_path / "lora.pt") == 0
    assert len(caplog.messages) == 1
    assert contents[1] == contents[0]
    assert len(contents[0]) > 4


def test_names_on_the_hub_are_sources(source, tmp_path, monkeypatch):
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, **_: {"owner/name": str(source[1])}[name]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert run("owner/name", tmp_path / "x.safetensors", "--layout", "diffusers") == 0
    assert open_tensors(tmp_path / "x.safetensors").keys() == source[0].keys()


def test_mistakes_get_one_line(tmp_path, capsys):
    def refused(*words, **options):
        given = {"source": tmp_path / "x", "output": tmp_path / "y", "layout": "original"} | options
        assert main(["convert", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("vidar convert: ")
        assert "\n" not in line
        for word in words:
            assert word in line

    refused("no such file or folder")
    tensors = seeded(*described(DITS["t2v"]))
    save_tensors(tmp_path / "x", tensors)
    refused("48 wide", "128 channels")
    refused("only PyTorch files hold several networks", part="generator")
    refused("unknown kind of file", **{"head-dim": 24, "output": tmp_path / "y.gguf"})
    for output in (tmp_path / "x", tmp_path / "x" / "model.safetensors"):
        refused("where the source or the adapter lies", **{"head-dim": 24, "output": output})
    refused("where the source or the adapter lies", source=tmp_path / "x" / "model.safetensors", output=tmp_path / "x")
    save_tensors(tmp_path / "x", {name: tensor for name, tensor in tensors.items() if "norm2.bias" not in name})
    refused("lacks 2 tensors", "blocks.0.norm2.bias", **{"head-dim": 24})
    save_tensors(tmp_path / "x", {"lora_A": tensors["proj_out.bias"]})
    refused("no network that is known here", "lora_A")
    names = ("embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight")
    save_tensors(tmp_path / "x", {f"bert.{name}": tensors["proj_out.bias"] for name in names})
    refused("no network that is known here", "bert.embeddings")
    assert not (tmp_path / "y").exists()


def damaged(kind, path):
    """Writes a checkpoint that cannot be used, and returns where it is."""
    tensors = seeded(*described(DITS["t2v"]))
    if kind == "missing shard":
        save_tensors(path, tensors, shard=70_000)
        (path / "model-00002-of-00006.safetensors").unlink()
        return path
    if kind == "code":
        with zipfile.ZipFile(path.with_suffix(".pt"), "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"generator": {"x": print}}))
        return path.with_suffix(".pt")
    if kind == "torch checksum":
        write_torch_file(path.with_suffix(".pt"), {"generator": tensors})
        path = path.with_suffix(".pt")
        content = path.read_bytes()
        path.write_bytes(content[:-200_000] + bytes(8) + content[-199_992:])
        return path
    path = path.with_suffix(".safetensors")
    save_tensors(path, tensors)
    content = path.read_bytes()
    changed = {"truncated": content[:-9], "header": content[:9] + b"?" + content[10:], "empty": b""}
    path.write_bytes(changed[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("truncated", "cannot be read as safetensors"),
        ("header", "cannot be read as safetensors"),
        ("empty", "cannot be read as safetensors"),
        ("missing shard", "names model-00002-of-00006.safetensors, which"),
        ("code", "holds an object of builtins.print, which is not read because it could run code"),
        ("torch checksum", "does not have its checksum"),
    ],
)
@pytest.mark.parametrize("output", ["y", "y.pt", "y.safetensors"])
def test_damaged_sources_get_one_line_and_leave_nothing(kind, told, output, tmp_path, capsys):
    path = damaged(kind, tmp_path / "x")
    assert run(path, tmp_path / output, "--layout", "original") == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("vidar convert: ")
    assert told in line
    assert "\n" not in line
    assert not [file for file in (tmp_path / output, *(tmp_path / output).rglob("*")) if file.is_file()]
    assert {file.name for file in tmp_path.iterdir()} <= {path.name, "y"}


def test_adapters_that_cannot_be_merged_get_one_line(source, tmp_path, capsys):
    def refused(told, *arguments):
        assert run(source[1], tmp_path / "y", "--layout", "original", *arguments) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("vidar convert: ")
        assert told in line
        assert "\n" not in line
        assert not (tmp_path / "y").exists()

    lora = tmp_path / "lora.safetensors"
    given = ("--lora", lora)
    refused("no such file or folder", *given)
    refused("give --lora too", "--lora-scale", 0.5)
    refused("--lora-scale=nan must be finite", *given, "--lora-scale", "nan")
    save_tensors(lora, seeded(*described(DITS["t2v"])))
    refused("is no tensor of an adapter", *given)
    save_tensors(lora, adapter(base(), "comfy"))
    content = lora.read_bytes()
    lora.write_bytes(content[:-1])
    refused("cannot be read as safetensors", *given)
    wider = {name: one for name, one in adapter(base()).items() if "blocks.0.self_attn.q.lora_A" not in name}
    save_tensors(lora, wider)
    refused("has only up for blocks.0.self_attn.q.weight", *given)
    save_tensors(lora, {name.replace("blocks.1.", "blocks.31."): one for name, one in adapter(base()).items()})
    refused("the adapter is of another network: 20 of its 40 tensors change what this one lacks", *given)
