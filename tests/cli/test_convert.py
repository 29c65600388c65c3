"""`vidar convert`: there and back, and what it refuses."""

import json

import numpy as np
import pytest

from tests.interop.test_wan import DITS, TEXT, VAE, described, seeded
from vidar.cli.main import main
from vidar.interop.sources import open_tensors
from vidar.interop.targets import save_tensors

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


def test_mistakes_get_one_line(tmp_path, capsys):
    def refused(*words, **options):
        given = {"source": tmp_path / "x", "output": tmp_path / "y", "layout": "original"} | options
        assert main(["convert", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("vidar convert: ")
        assert "\n" not in line
        for word in words:
            assert word in line

    refused("no such checkpoint")
    tensors = seeded(*described(DITS["t2v"]))
    save_tensors(tmp_path / "x", tensors)
    refused("48 wide", "128 channels")
    refused("only PyTorch files hold several networks", part="generator")
    refused("unknown kind of file", **{"head-dim": 24, "output": tmp_path / "y.gguf"})
    save_tensors(tmp_path / "x", {name: tensor for name, tensor in tensors.items() if "norm2.bias" not in name})
    refused("lacks 2 tensors", "blocks.0.norm2.bias", **{"head-dim": 24})
    save_tensors(tmp_path / "x", {"lora_A": tensors["proj_out.bias"]})
    refused("no transformer of Wan's", "lora_A")
    assert not (tmp_path / "y").exists()
