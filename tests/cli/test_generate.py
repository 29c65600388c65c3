"""`vidar generate` and `vidar data embeddings` with published models, as a person would call them."""

from pathlib import Path

import numpy as np
import pytest

from tests.published import CONFIGS, make_folder, network_tensors, transformer_config
from tests.test_pipeline import picture
from vidar.cli.main import main
from vidar.data.pipeline import make_dataset
from vidar.data.sources import TfdsClips
from vidar.data.video import VideoWriter, read_video, write_video
from vidar.interop.folders import Folder
from vidar.interop.sources import Stored
from vidar.interop.targets import save_tensors
from vidar.pipeline import load_text_encoder
from vidar.preparation.embeddings import Embeddings
from vidar.training.experiment import load_run_config, make_run

SMALL = ["--size", "32x48", "--precision", "float32"]
WAN = [*SMALL, "--steps", "2", "--frames", "9"]
STUDENT = [*SMALL, "--recipe", "self_forcing", "--frames", "9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "image", image=True)


def generate(model, output, *arguments):
    return main(["generate", "--model", str(model), "--output", str(output), *map(str, arguments)])


def difference(one, other):
    return float(np.abs(read_video(one).astype(int) - read_video(other).astype(int)).mean())


def test_a_prompt_becomes_a_video(folder, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    assert generate(folder, out, *WAN, "--prompt", "a red fox", "--negative", "blurry") == 0
    assert "1 × 9 frames of 48×32" in capsys.readouterr().out
    assert read_video(out).shape == (9, 32 * 8, 48 * 8, 3)  # enlarged so that a person can see it
    for name, changes in {
        "negative": ["--prompt", "a red fox"],
        "prompt": ["--prompt", "two dogs", "--negative", "blurry"],
        "seed": ["--prompt", "a red fox", "--negative", "blurry", "--seed", "1"],
        "solver": ["--prompt", "a red fox", "--negative", "blurry", "--solver", "euler"],
        "shift": ["--prompt", "a red fox", "--negative", "blurry", "--shift", "1"],
        "guidance": ["--prompt", "a red fox", "--negative", "blurry", "--guidance", "2"],
    }.items():
        other = tmp_path / f"{name}.mp4"
        assert generate(folder, other, *WAN, *changes) == 0
        assert difference(out, other) > 1, name


def test_an_image_begins_a_video(image_folder, tmp_path):
    for name, pixels in (("one", picture()[0]), ("other", 255 - picture()[0])):
        write_video(tmp_path / f"{name}.mp4", pixels[None], fps=1, scale=1)
        arguments = [*WAN, "--prompt", "a red fox", "--first", tmp_path / f"{name}.mp4"]
        assert generate(image_folder, tmp_path / f"{name} out.mp4", *arguments) == 0
    assert difference(tmp_path / "one out.mp4", tmp_path / "other out.mp4") > 1


def test_a_file_of_prompts_becomes_a_directory_that_goes_on_where_it_stopped(folder, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "videos"
    prompts.write_text("a red fox\n\ntwo dogs\n")
    assert generate(folder, out, *STUDENT, "--prompts", prompts) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0000.mp4", "0001.mp4", "made.json"]
    assert difference(out / "0000.mp4", out / "0001.mp4") > 1
    first, second = ((out / f"000{number}.mp4").read_bytes() for number in range(2))
    (out / "0001.mp4").unlink()
    (out / "0000.mp4").write_bytes(b"kept")
    assert generate(folder, out, *STUDENT, "--prompts", prompts) == 0
    assert (out / "0000.mp4").read_bytes() == b"kept"
    assert (out / "0001.mp4").read_bytes() == second != first
    capsys.readouterr()
    assert generate(folder, out, *STUDENT, "--prompts", prompts) == 0
    assert "holds all of these videos already" in capsys.readouterr().out
    assert generate(folder, out, *STUDENT, "--prompts", prompts, "--seed", "1") == 2
    assert "made with another --seed; name another directory" in capsys.readouterr().err
    prompts.write_text("three dogs\ntwo dogs\n")
    assert generate(folder, out, *STUDENT, "--prompts", prompts) == 2
    assert "another --prompts" in capsys.readouterr().err


def test_half_a_clip_never_passes_for_a_whole_one(folder, tmp_path, monkeypatch):
    def interrupted(self, frames):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "append", interrupted)
    assert generate(folder, tmp_path / "out.mp4", *STUDENT, "--prompt", "a red fox") == 130
    assert not list(tmp_path.iterdir())


def test_students_adapters_and_tiny_decoders_are_used(folder, tmp_path):
    weights, lora, decoder = (tmp_path / name for name in ("student.pt", "lora.safetensors", "tiny.safetensors"))
    save_tensors(weights, network_tensors("transformer", transformer_config(False), "original", seed=" student"))
    save_tensors(decoder, network_tensors("tiny_vae", CONFIGS["tiny_vae"], "original"))
    rng = np.random.default_rng(0)
    parts = {"lora_A": (4, 48), "lora_B": (48, 4)}
    arrays = {part: rng.normal(size=shape).astype(np.float32) for part, shape in parts.items()}
    name = "diffusion_model.blocks.0.self_attn.o"
    adapter = {f"{name}.{part}.weight": Stored(a.shape, a.dtype, lambda a=a: a) for part, a in arrays.items()}
    save_tensors(lora, adapter)
    base = tmp_path / "base.mp4"
    assert generate(folder, base, *STUDENT, "--prompt", "a red fox") == 0
    for option, path in (("--weights", weights), ("--lora", lora), ("--decoder", decoder)):
        out = tmp_path / f"{path.stem}.mp4"
        assert generate(folder, out, *STUDENT, "--prompt", "a red fox", option, path) == 0
        assert difference(base, out) > 1, option
    off = tmp_path / "off.mp4"
    assert generate(folder, off, *STUDENT, "--prompt", "a red fox", "--lora", lora, "--lora-scale", "0") == 0
    assert difference(base, off) == 0


def test_a_student_streams_a_prompt_from_noise_and_from_an_image(folder, tmp_path, capsys):
    write_video(tmp_path / "first.mp4", picture()[0][None], fps=1, scale=1)
    model = ["--model", str(folder), *STUDENT[:-2], "--prompt", "a red fox"]
    for name, arguments, frames in (
        ("noise", ["--window", "6", "--frames", "30"], 33),
        ("image", ["--frames", "24", "--first", str(tmp_path / "first.mp4")], 25),
    ):
        out = tmp_path / f"{name}.mp4"
        assert main(["stream", *model, *arguments, "--output", str(out)]) == 0
        assert "few_step, 4 steps, shift 5, no guidance, chunks of 3 latent frames" in capsys.readouterr().err
        video = read_video(out)
        assert len(video) == frames
        assert video[-1].std() > 5
    assert main(["stream", "--model", str(folder), *SMALL, "--prompt", "a", "--output", str(tmp_path / "x.mp4")]) == 2
    assert "to stream, it must be causal (--recipe self_forcing)" in capsys.readouterr().err


def test_text_states_are_prepared_once(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\ntwo dogs\na red  fox\n")
    arguments = [
        "data",
        "embeddings",
        "--model",
        str(folder),
        "--prompts",
        str(prompts),
        "--output",
        str(tmp_path / "e"),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "text states of 2 prompts" in said
    files = {path.name for path in (tmp_path / "e").iterdir()}
    assert main(arguments) == 0
    assert {path.name for path in (tmp_path / "e").iterdir()} == files
    states = Embeddings(tmp_path / "e").read("two dogs")
    assert states.shape == (512, 32)
    assert np.abs(states[:3].astype(np.float32)).max() > 0.1
    assert not states[20:].any()


def test_a_network_trains_on_captions_whose_states_were_prepared(folder, tmp_path):
    """From the world's captions through the published text encoder to a batch, and two steps of training."""
    directory, states = str(tmp_path / "world"), str(tmp_path / "states")
    assert main(["data", "world", "--directory", directory, "--clips", "16", "--validation-clips", "4"]) == 0
    source = ["--tfds", "vidar_world/one_shape", "--directory", directory]
    assert main(["data", "embeddings", "--model", str(folder), *source, "--output", states]) == 0
    card = Path(__file__).resolve().parents[2] / "configs/world/teacher.py"
    changes = {
        "data.directory": directory,
        "embeddings": states,
        "training.steps": 2,
        "data.batch": 4,
        "data.frames": 8,
    }
    changes |= {"model.layers": 1, "model.width": 32, "model.heads": 2, "model.mlp": 32}
    text = tmp_path / "card.py"
    text.write_text(
        f"""
from vidar.config import load

def get_config():
    config = load({str(card)!r}).unlock()
    config.model.text = {{"width": 32, "length": 512}}
    config.embeddings = {states!r}
    return config
"""
    )
    arguments = [f"--config.{name}={value}" for name, value in changes.items()]
    assert main(["train", "--config", str(text), "--workdir", str(tmp_path / "run"), *arguments]) == 0
    config = load_run_config(text, tuple(arguments))
    run = make_run(config)
    batch = next(iter(make_dataset(config.data)))
    encoder = load_text_encoder(Folder.find(folder))
    expected = encoder([caption.decode() for caption in batch["caption"]])
    found = run.prepare_batch(batch)["text"].astype(np.float32)
    # In bf16, and there in batches of another size: each caption's states are nearer to its own than to any other's.
    distance = np.linalg.norm(found[:, None] - expected.astype(np.float32)[None], axis=(2, 3)) / np.linalg.norm(found)
    assert np.diag(distance).max() < 0.03
    held_out = TfdsClips("vidar_world/one_shape", directory, "validation", 8, 0)
    assert all(held_out.clip(index, 0.0)["caption"].decode() in Embeddings(states) for index in range(len(held_out)))


MISTAKES = {
    "no such model": (["--model", "nothing/here"], "nothing/here"),
    "no prompt": (["--prompt", None], "give a prompt"),
    "both prompts": (["--prompts", "prompts.txt"], "give one of them"),
    "size": (["--size", "480"], "HEIGHTxWIDTH"),
    "odd size": (["--size", "40x48"], "multiples of 16"),
    "frames": (["--frames", "10"], "9 would be"),
    "recipe": (["--recipe", "teacher"], "wan, self_forcing, causvid"),
    "steps": (["--steps", "0"], "solver.steps=0"),
    "guidance": (["--guidance", "nan"], "guidance.coefficient=nan must be finite"),
    "scale of no adapter": (["--lora-scale", "2"], "give --lora too"),
    "image": (["--first", "nothing.png"], "nothing.png"),
    "text for an image": (["--first", "prompts.txt"], "not a video that can be decoded"),
    "strength of no video": (["--strength", "0.5"], "name a video, or leave it out"),
    "seed": (["--seed", "-1"], "--seed=-1 must be at least 0"),
    "actions": (["--actions", "1*8"], "takes no actions"),
    "label": (["--label", "1"], "no classes"),
    "weights of the vae": (["--weights", "vae"], "holds a vae"),
    "adapter of another network": (["--lora", "vae"], "no tensor of an adapter"),
    "decoder": (["--decoder", "vae"], "a tiny_vae is wanted"),
    "directory for one prompt": (["--output", "out"], "mp4"),
    "frames to go on from": (["--first", "clip.mp4"], "cannot go on from frames"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_line_and_leave_nothing(folder, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    changes, message = MISTAKES[name]
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    write_video("clip.mp4", picture(1), fps=1, scale=1)
    (tmp_path / "vae").symlink_to(folder / "vae")
    options = dict(zip(WAN[::2], WAN[1::2], strict=True))
    options |= {"--model": folder, "--output": "out.mp4", "--prompt": "a red fox"}
    options |= dict(zip(changes[::2], changes[1::2], strict=True))
    arguments = [str(word) for option, value in options.items() if value is not None for word in (option, value)]
    assert main(["generate", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vidar generate: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "prompts.txt", "vae"]


def test_a_prompt_of_a_hundred_thousand_characters_is_cut_with_a_word_about_it(folder, tmp_path, caplog):
    out = tmp_path / "out.mp4"
    assert generate(folder, out, *STUDENT, "--prompt", "a red fox walks " * 6_250) == 0
    assert any("was truncated from" in record.getMessage() for record in caplog.records)
    assert read_video(out).shape[0] == 9
