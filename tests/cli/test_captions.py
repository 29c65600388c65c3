"""Text to video with vidar's own text encoder, from data to videos and scores, as a person would do it."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from vidar.cli.main import main
from vidar.data.video import read_video
from vidar.data.world.builder import prepare
from vidar.errors import ConfigError
from vidar.pipeline import load_pipeline
from vidar.system import compose
from vidar.training.experiment import load_run_config, portable_dict
from vidar.weights import save_weights

CARD = "configs/captions/teacher.py"
SMALL = (
    "model.width=24",
    "model.layers=1",
    "model.mlp=32",
    "model.remat=False",
    "model.text.encoder.layers=1",
    "solver.times=(1000.0,500.0)",
)
PROMPTS = ["a red ball falls", "a blue square moves left, then a magenta triangle enters"]


def config(*overrides):
    return load_run_config(CARD, tuple(f"--config.{override}" for override in (*SMALL, *overrides)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random weights of the teacher, and of a causal student of the same shape."""
    directory = tmp_path_factory.mktemp("models")
    teacher = config()
    causal = config("visibility.kind=chunk_causal")
    causal = replace(causal, plan=replace(causal.plan, lag=None))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        # A small head keeps pixels away from black and white; sharp attention tells prompts apart.
        scale = 0.1 if name.startswith(".head") else 0.4
        centre = 3.0 if "weight" in name else 0.0
        return (centre + scale * rng.normal(size=leaf.shape)).astype(np.float32)

    paths = {}
    for name, one in (("teacher", teacher), ("student", causal)):
        system = compose(one)
        template = jax.eval_shape(lambda key, system=system: system.build("student", key), jax.random.key(0))
        network = jax.tree_util.tree_map_with_path(draw, template)
        paths[name] = directory / f"{name}.safetensors"
        save_weights(paths[name], {"student": network}, {"systems": {"student": portable_dict(one)}})
    return paths


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_prompts_become_clips_and_each_has_its_own(models, name):
    pipeline = load_pipeline(models[name])

    def video(prompts, negative="", seed=3):
        return pipeline.generate(prompts=prompts, negative=negative, seed=seed).astype(int)

    both = video(PROMPTS)
    assert both.shape == (2, 8, 20, 20, 3)
    assert both.std() > 20
    np.testing.assert_array_equal(both, video(PROMPTS))
    # A row is its prompt and its seed, whoever its neighbours are.
    swapped = video(PROMPTS[::-1])
    assert np.abs(both - swapped).max(axis=(1, 2, 3, 4)).min() > 2
    assert np.abs(video(PROMPTS[::-1], seed=4)[0] - both[1]).max() <= 1
    assert np.abs(both - video(PROMPTS, negative="a cyan ball stays")).max() > 2


def test_prompts_that_are_missing_or_no_list_are_refused(models):
    pipeline = load_pipeline(models["teacher"])
    with pytest.raises(ConfigError, match=r"give a prompt \(--prompt\)"):
        pipeline.generate()
    with pytest.raises(ConfigError, match="is a single text; give a list"):
        pipeline.generate(prompts=PROMPTS[0])
    with pytest.raises(ConfigError, match=r"'a red ball falls, then a' … has 90 bytes, the model reads 64"):
        pipeline.generate(prompts=["a red ball falls, then a blue one".ljust(90)])


def test_chunks_follow_a_single_image_in_clips_that_fit(models):
    pipeline = load_pipeline(models["student"])
    image = np.full((1, 1, 20, 20, 3), 90, np.uint8)
    for given, frames in ((None, 8), (1, 7), (2, 8)):
        assert pipeline.frames(given) == frames
    assert pipeline.generate(prompts=PROMPTS[:1], given=image).shape == (1, 7, 20, 20, 3)


def test_a_causal_model_gives_its_first_chunk_alone(models):
    pipeline = load_pipeline(models["student"])
    whole, first = (pipeline.generate(frames, prompts=PROMPTS[:1], seed=1) for frames in (8, 2))
    assert np.abs(whole[:, :2].astype(int) - first).max() <= 1


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_generate_takes_one_prompt_or_a_file_of_them(models, tmp_path, name):
    model = ["--model", str(models[name])]
    assert (
        main(["generate", *model, "--prompt", PROMPTS[0], "--output", str(tmp_path / "one.mp4"), "--clips", "2"]) == 0
    )
    assert len(read_video(tmp_path / "one.mp4")) == 8
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    assert (
        main(["generate", *model, "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "all")]) == 0
    )
    assert sorted(path.name for path in (tmp_path / "all").glob("*.mp4")) == ["0000.mp4", "0001.mp4"]


def test_eval_captions_compares_models_with_the_truth(models, tmp_path, capsys):
    arguments = ["eval", "captions", "--captions", "6", "--output", str(tmp_path / "results")]
    assert main([*arguments, "--model", str(models["teacher"]), str(models["student"])]) == 0
    report = json.loads((tmp_path / "results" / "captions.json").read_text())
    assert list(report["models"]) == ["true clips", "teacher", "student"]
    assert report["models"]["true clips"]["accuracy"]["all"][::2] == pytest.approx([1.0, 1.0])
    assert report["models"]["teacher"]["accuracy"]["all"][0] < 0.5  # random weights
    assert report["models"]["teacher"]["first_frames"] == 8
    assert report["models"]["student"]["first_frames"] == 2
    assert all(report["models"][name]["first_frame_s"] > 0 for name in ("teacher", "student"))
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"captions.json", "teacher.png", "student.png"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["true", "teacher", "student"]


def test_models_of_other_clips_are_refused(models, capsys, tmp_path):
    shipped = "vidar/assets/world.safetensors"
    assert main(["eval", "captions", "--model", shipped, "--output", str(tmp_path / "x")]) == 2
    assert "should take text and nothing else" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_card_trains_from_captions(tmp_path, capsys):
    prepare(tmp_path / "data", "captioned", clips=8, validation_clips=1, frames=8)
    values = [*SMALL, f"data.directory={tmp_path / 'data'}", "data.batch=2", "training.steps=2"]
    values += ["training.log_every=1", "training.tensorboard=False", "optimizers.student.name=adamw"]
    overrides = [f"--config.{value}" for value in values]
    assert main(["train", "--config", CARD, "--workdir", str(tmp_path / "run"), *overrides]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert load_pipeline(tmp_path / "run").generate(prompts=PROMPTS).shape == (2, 8, 20, 20, 3)
    capsys.readouterr()
    assert main(["train", "--config", CARD, "--workdir", str(tmp_path / "no"), *overrides,
                 "--config.model.text.encoder=None"]) == 2  # fmt: skip
    assert "the model needs text, which the data does not have" in capsys.readouterr().err
