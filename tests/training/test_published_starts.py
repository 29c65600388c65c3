"""The Wan card of self forcing on published files, tiny and of random weights: from prompts to videos of a student."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.published import make_folder, network_tensors, transformer_config
from vidar.cli.main import main
from vidar.config import to_dict
from vidar.data.video import read_video
from vidar.errors import ConfigError
from vidar.interop.networks import open_transformer
from vidar.interop.targets import save_tensors, write_json
from vidar.models.layers import Precision
from vidar.objectives import targets
from vidar.objectives.forcing import Generated
from vidar.pipeline import Choices, load_pipeline
from vidar.preparation.embeddings import Embeddings
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
    write_json(root / "config.json", {"dim": 48, "num_heads": 2})
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
        # The frozen teacher is stored as its role says.
        precision = replace(FP32, params="bfloat16") if role == "teacher" else FP32
        expected = open_transformer(str(places / source), precision).load()
        same(jax.tree.leaves((run.initial | run.frozen)[role]), jax.tree.leaves(expected))
    assert main(["train", "--config", str(places / "card.py"), "--workdir", str(tmp_path / "run")]) == 0
    _, trained = load(tmp_path / "run")
    with pytest.raises(AssertionError):
        same(jax.tree.leaves(trained), jax.tree.leaves(run.initial["student"]))
    clips = []
    for weights in (tmp_path / "run", places / "ode_init.pt"):
        out = tmp_path / f"{weights.name}.mp4"
        how = ["--size", "32x48", "--precision", "float32", "--frames", "9"]
        words = ["--model", str(places / "Wan2.1-T2V-1.3B"), "--weights", str(weights), "--prompt", "a fox"]
        assert main(["generate", *words, *how, "--output", str(out)]) == 0
        clips.append(read_video(out))
    assert len(clips[0]) == 9
    assert (clips[0] != clips[1]).any()
    # A run says itself how it is sampled.
    own = load_pipeline(places / "Wan2.1-T2V-1.3B", Choices(weights=tmp_path / "run", height=32, width=48, frames=9))
    wanted = run.axes.sampler
    for part in ("solver", "chunk", "lag", "commit", "context", "guidance"):
        assert getattr(own.system.sampler, part) == getattr(wanted, part)
    with pytest.raises(ConfigError, match="says itself how it is sampled"):
        load_pipeline(places / "Wan2.1-T2V-1.3B", Choices(weights=tmp_path / "run", recipe="wan"))


def test_dropped_text_is_the_negative_prompt(places):
    config = load_run_config(places / "card.py")
    run = make_run(config)
    batch = run.prepare_batch({"caption": np.array([b"a fox runs", b"two dogs play"]), "index": np.arange(2)})
    expected = Embeddings(places / "states").read(NEGATIVE)
    np.testing.assert_array_equal(batch["negative"], np.stack([expected, expected]))
    assert (batch["negative"] != batch["text"]).any()
    # The teacher's guidance leads away from it.
    networks = {role: jax.tree.map(jnp.asarray, (run.initial | run.frozen)[role]) for role in run.objective.roles}
    video = np.random.default_rng(0).normal(size=(2, 6, 4, 6, 16)).astype(np.float32)

    def loss(batch):
        prepared = run.objective.system.prepare(batch)
        keys = targets.clip_keys(jax.random.key(0), prepared.index)
        made = Generated(jnp.asarray(video), prepared.conditions, {})
        return float(config.objective.matching.student_loss(networks, made, prepared, keys)[0])

    zeros = {name: value for name, value in batch.items() if name != "negative"}
    assert loss(batch) != pytest.approx(loss(zeros), rel=1e-4)
    assert loss(batch | {"negative": 0 * batch["negative"]}) == pytest.approx(loss(zeros), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective.teacher": "ode_init.pt:critic"}, "ode_init.pt: .*'critic'"),
        ({"model.heads": "4"}, "is a network with heads=2, the config's student has heads=4"),
        ({"model.text.length": "64"}, "model.text is 64 × 32, but embeddings="),
        ({"objective.teacher": "."}, "neither a run's directory .* nor a published model"),
        ({"objective.teacher": "nothing.pt"}, "nothing.pt: neither a run's directory .* nor a published model"),
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
