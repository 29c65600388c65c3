"""What the README shows of published models runs as it stands, but for sizes, on tiny checkpoints made on the spot."""

import re
from pathlib import Path

import numpy as np

from tests.golden import wan as golden
from tests.interop.test_wan import SMALL
from tests.published import make_folder, network_tensors
from tests.test_pipeline import picture
from vidar.data.video import read_video
from vidar.interop.sources import open_tensors
from vidar.interop.targets import save_tensors

README = Path(__file__).resolve().parent.parent / "README.md"
SIZES = ("height=480, width=832, frames=81", "height=32, width=48, frames=9, steps=2")


def snippets() -> list[str]:
    text = README.read_text()
    part = text[text.index("## Published models") : text.index("## Train")]
    return re.findall(r"```python\n(.*?)```", part, re.DOTALL)


def run(code: str) -> dict:
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    return names


def test_snippets_are_short():
    assert [len(code.splitlines()) <= 10 for code in snippets()] == [True] * 3


def test_text_to_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "Wan2.1-T2V-1.3B", layout="original")
    code = snippets()[0]
    assert SIZES[0] in code
    video = run(code.replace(*SIZES))["video"]
    assert video.shape == (1, 9, 32, 48, 3)
    assert len(read_video("fox.mp4")) == 9


def test_image_to_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "Wan2.1-I2V-14B-480P", image=True)
    from PIL import Image

    Image.fromarray(picture()[0]).save("fox.png")
    np.testing.assert_array_equal(read_video("fox.png"), picture())
    code = snippets()[1]
    assert SIZES[0] in code
    assert run(code.replace(*SIZES))["video"].shape == (1, 9, 32, 48, 3)


def test_conversion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from dataclasses import replace

    config = replace(SMALL, width=128, heads=1)
    tensors = network_tensors("transformer", config, "original")
    save_tensors("checkpoints/self_forcing_dmd.pt", tensors)
    run(snippets()[2])
    for path in ("trained.pt", "checkpoints/self_forcing_dmd.pt"):
        found = open_tensors(path, "generator_ema")
        assert found.keys() == tensors.keys()
        for name, stored in tensors.items():
            np.testing.assert_array_equal(found[name].read(), stored.read())
    expected = network_tensors("transformer", config, "diffusers")
    found = open_tensors("trained")
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name].read(), golden.weight(name, expected[name].shape))
