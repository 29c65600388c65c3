"""The Wan card of self forcing on published files, tiny and of random weights: from prompts to videos of a student."""

import jax
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.published import make_folder, network_tensors, transformer_config
from vidar.cli.main import main
from vidar.config import to_dict
from vidar.data.video import read_video
from vidar.errors import ConfigError
from vidar.interop.networks import open_transformer
from vidar.interop.targets import save_tensors
from vidar.models.layers import Precision
from vidar.system import load
from vidar.training.experiment import load_run_config, make_run

FP32 = Precision("float32", "float32")
MODEL = {name: value for name, value in to_dict(transformer_config(image=False)).items() if name != "backend"}
NEGATIVE = "grey, still"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders in both layouts, a student's file, prompts with their states, and a card that names them."""
    root = tmp_path_factory.mktemp("published")
    make_folder(root / "Wan2.1-T2V-1.3B", layout="original")
    make_folder(root / "Wan2.1-T2V-14B")
    tensors = network_tensors("transformer", transformer_config(image=False), "original", seed="student")
    save_tensors(root / "ode_init.pt", tensors)
    (root / "prompts.txt").write_text("a fox runs\ntwo dogs play\n")
    states = ["--prompts", str(root / "prompts.txt"), "--output", str(root / "states"), "--negative", NEGATIVE]
    assert main(["data", "embeddings", "--model", str(root / "Wan2.1-T2V-14B"), *states]) == 0
    card = root / "card.py"
    card.write_text(f"""
from vidar.config import load

def get_config():
    config = load({str(ROOT / "configs/systems/self_forcing_dmd.py")!r} + ":wan_1_3b").unlock()
    config.model = config.teacher = config.critic = {MODEL!r}
    config.video = {{"height": 32, "width": 48, "frames": 6, "chunk": 3}}
    config.objective.update({{"generator_every": 1, "ema": None}})
    config.objective.student = {str(root / "ode_init.pt")!r} + ":generator_ema"
    config.objective.teacher = {str(root / "Wan2.1-T2V-14B")!r}
    config.objective.critic = {str(root / "Wan2.1-T2V-1.3B")!r}
    config.negative, config.embeddings = {NEGATIVE!r}, {str(root / "states")!r}
    config.data = {{"prompts": {str(root / "prompts.txt")!r}, "frames": 21, "batch": 2}}
    config.mesh = {{"fsdp": 1}}
    config.training.update({{"steps": 2, "accumulate": 1, "tensorboard": False}})
    return config
""")
    return root


def same(ones, others):
    for one, other in zip(ones, others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_published_weights_are_distilled_and_sampled(places, tmp_path):
    run = make_run(load_run_config(places / "card.py"))
    starts = {"student": "ode_init.pt:generator_ema", "critic": "Wan2.1-T2V-1.3B", "teacher": "Wan2.1-T2V-14B"}
    for role, source in starts.items():
        expected = open_transformer(str(places / source), FP32, 24).load()
        same(jax.tree.leaves((run.initial | run.frozen)[role]), jax.tree.leaves(expected))
    assert main(["train", "--config", str(places / "card.py"), "--workdir", str(tmp_path / "run")]) == 0
    _, trained = load(tmp_path / "run")
    with pytest.raises(AssertionError):
        same(jax.tree.leaves(trained), jax.tree.leaves(run.initial["student"]))
    clips = []
    for weights in (tmp_path / "run", places / "ode_init.pt"):
        out = tmp_path / f"{weights.name}.mp4"
        how = ["--recipe", "self_forcing", "--size", "32x48", "--precision", "float32", "--frames", "9"]
        words = ["--model", str(places / "Wan2.1-T2V-1.3B"), "--weights", str(weights), "--prompt", "a fox"]
        assert main(["generate", *words, *how, "--output", str(out)]) == 0
        clips.append(read_video(out))
    assert len(clips[0]) == 9
    assert (clips[0] != clips[1]).any()


def test_dropped_text_is_the_negative_prompt(places):
    config = load_run_config(places / "card.py")
    run = make_run(config)
    batch = run.prepare_batch({"caption": np.array([b"a fox runs", b"two dogs play"]), "index": np.arange(2)})
    assert batch["negative"].shape == batch["text"].shape
    assert (batch["negative"][0] == batch["negative"][1]).all()
    assert np.abs(batch["negative"][0, :3].astype(np.float32)).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective.teacher": "ode_init.pt:critic"}, "critic"),
        ({"objective.teacher": "."}, "neither a run's directory .* nor a published model's folder"),
        ({"objective.teacher": "nothing.pt"}, "nothing.pt"),
        ({"objective.critic": "Wan2.1-T2V-14B/vae"}, "holds a vae, a transformer is wanted"),
        ({"teacher.mlp": "64"}, "is a network with mlp=96, the config's teacher has mlp=64"),
        ({"negative": "'never prepared'"}, "never prepared"),
    ],
)
def test_mistakes_get_one_line(places, tmp_path, capsys, monkeypatch, changes, words):
    monkeypatch.chdir(places)
    arguments = [f"--config.{name}={value}" for name, value in changes.items()]
    assert main(["train", "--config", "card.py", "--workdir", str(tmp_path / "run"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    with pytest.raises(ConfigError, match=words):
        raise ConfigError(line)
