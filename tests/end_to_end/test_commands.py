"""As a person would: make data, train, resume, generate, stream, evaluate; and every mistake one clear line."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from vidar.cli.main import main
from vidar.data.records import ActionSpec, EpisodeWriter, Format
from vidar.data.video import read_video, write_video
from vidar.errors import CheckpointError
from vidar.system import compose, load
from vidar.training.experiment import system_dict
from vidar.weights import save_weights

SMALL = [
    "--config.model.width=32",
    "--config.model.layers=1",
    "--config.model.mlp=32",
    "--config.data.batch=4",
    "--config.data.cache_megabytes=8",
    "--config.evaluation.clips=2",
    "--config.evaluation.rows=1",
    "--config.training.log_every=1",
    "--config.training.save_every=2",
    "--config.training.tensorboard=False",
]
CARD = "configs/world/teacher_forcing.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set and a model trained for four steps, in two goes."""
    root = tmp_path_factory.mktemp("commands")
    data = ["data", "world", "--directory", str(root / "data"), "--clips", "16", "--validation-clips", "4"]
    assert main([*data, "--frames", "8"]) == 0
    for steps in (2, 4):
        assert main(train(root, steps)) == 0
    return root


def train(root: Path, steps: int, *extra: str, card: str = CARD, workdir: str = "run") -> list[str]:
    """Arguments of a small training."""
    given = ["train", "--config", card, "--workdir", str(root / workdir)]
    data = f"--config.data.directory={root / 'data'}"
    return [*given, *SMALL, data, f"--config.training.steps={steps}", *extra]


def refused(capsys, arguments: list[str], *words: str) -> None:
    """Asserts exit code 2 and one line that says all the words."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"vidar {arguments[0]}: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


def test_training_resumed_and_left_a_sample_sheet(root):
    rows = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "student/loss" in row]
    assert steps == [1, 2, 3, 4]
    assert (root / "run" / "samples" / "step-0000004.png").stat().st_size > 500
    assert any("evaluation/psnr" in row for row in rows)


def test_a_training_that_was_stopped_is_no_success(root, monkeypatch, capsys):
    quiet = ("--config.training.eval_every=None", "--config.training.sample_every=None")
    arguments = train(root, 2, *quiet, workdir="stopped")
    with monkeypatch.context() as patch:
        patch.setattr("vidar.training.stop.StopSignal.at", lambda stop, done: True)
        assert main(arguments) == 130
    assert "stopped: trained" not in capsys.readouterr().out
    assert main(arguments) == 0
    assert "stopped: trained and saved" in capsys.readouterr().out


def test_generate_writes_the_clip(root, tmp_path):
    first = tmp_path / "first.mp4"
    frame = np.full((1, 16, 16, 3), 40, np.uint8)
    write_video(first, frame, fps=8)
    output = tmp_path / "clip.mp4"
    arguments = ["generate", "--model", str(root / "run"), "--output", str(output), "--first", str(first)]
    assert main([*arguments, "--label", "1", "--frames", "6", "--actions", "1*2,2", "--clips", "2"]) == 0
    assert len(read_video(output)) == 6
    edited = tmp_path / "edited.mp4"
    arguments = ["generate", "--model", str(root / "run"), "--output", str(edited), "--label", "1", "--frames", "6"]
    whole = tmp_path / "whole.mp4"
    write_video(whole, np.repeat(frame, 6, axis=0), fps=8)
    assert main([*arguments, "--video", str(whole), "--strength", "0.9"]) == 0
    assert len(read_video(edited)) == 6


def test_videos_to_edit_that_do_not_fit_are_refused(root, tmp_path, capsys):
    short = tmp_path / "short.mp4"
    write_video(short, np.full((2, 16, 16, 3), 40, np.uint8), fps=8)
    generate = ["generate", "--model", str(root / "run"), "--output", str(tmp_path / "x.mp4"), "--label", "1"]
    refused(capsys, [*generate, "--frames", "6", "--video", str(short)], "2 frames", "6")
    refused(capsys, [*generate, "--video", str(short), "--first", str(short)], "give one")
    refused(capsys, [*generate, "--frames", "2", "--video", str(short), "--strength", "0"], "strength=0")


def test_stream_writes_while_it_runs_and_follows_stdin(root, tmp_path, monkeypatch, capsys):
    import io

    output = tmp_path / "stream.mp4"
    stream = ["stream", "--model", str(root / "run"), "--output", str(output), "--label", "2"]
    assert main([*stream, "--frames", "20"]) == 0
    assert len(read_video(output)) == 20
    assert "first after" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\n\n"))
    assert main([*stream, "--frames", "0", "--actions", "-"]) == 0
    assert len(read_video(output)) == 3


def test_self_forcing_starts_from_trained_runs(root):
    teacher = train(root, 1, card="configs/world/teacher.py", workdir="teacher")
    assert main(teacher) == 0
    sources = [f"--config.objective.student={root / 'run'}", f"--config.objective.teacher={root / 'teacher'}"]
    assert main(train(root, 2, *sources, card="configs/systems/self_forcing_dmd.py", workdir="forced")) == 0
    rows = [json.loads(line) for line in (root / "forced" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["updates/student"] == 1
    assert rows[1]["updates/critic"] == 2
    evaluate = ["eval", "world", "--model", str(root / "forced"), "--clips", "2", "--frames", "4"]
    assert main([*evaluate, "--output", str(root / "measured")]) == 0
    report = json.loads((root / "measured" / "world.json").read_text())
    assert (report["clips"], report["frames"]) == (2, 4)
    still, forced = report["models"]["repeated"], report["models"]["forced"]
    assert still.keys() == forced.keys() == {"position error", "identity kept", "colour kept"}
    assert still["position error"] != forced["position error"]
    for name in report["models"]:
        assert (root / "measured" / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.training.stepz=3", ["stepz"]),
        ("--config.video.chunk=3", ["video.frames=8", "chunks of 3", "9"]),
        ("--config.visibility.kind=bidirectional", ["teacher_forcing"]),
        ("--config.mesh.data=3", ["mesh", "1"]),
        ("--config.model.heads=5", ["width", "heads"]),
        ("--config.codec.patch=3", ["16", "3"]),
        ("--config.data.tfds=vidar_world/none", ["vidar_world/none"]),
        ("--config.solver.kind=heun", ["heun", "euler"]),
        ("--config.model.backend=splash", ["'splash' needs a TPU", "backend='xla'"]),
        ("--config.model=3", ["--config.model=3: a section"]),
    ],
)
def test_mistakes_in_a_config_get_one_line(root, capsys, override, words):
    refused(capsys, train(root, 1, override, workdir="never"), *words)
    assert not (root / "never").exists() or not list((root / "never").glob("checkpoints/*"))


def test_leaky_visibility_with_a_cache_is_refused(root, capsys):
    card = "configs/world/diffusion_forcing.py"
    refused(capsys, train(root, 1, "--config.visibility.kind=bidirectional", card=card), "later chunks", "plan.lag=0")


def test_ring_that_does_not_align_is_refused(root, capsys):
    two = ["--config.video.chunk=2", "--config.context.window=5", "--config.context.sink=0"]
    refused(capsys, train(root, 1, *two, workdir="never"), "context.window=5", "chunk (2)")


def test_missing_model_data_and_files_are_refused(root, capsys, tmp_path):
    output = ["--output", str(tmp_path / "x.mp4")]
    refused(capsys, ["stream", "--model", str(tmp_path / "nothing"), *output], "nothing", "no such file or folder")
    refused(capsys, ["stream", "--model", str(root / "run"), *output, "--seed", "-1"], "--seed=-1 must be at least 0")
    refused(capsys, ["train", "--config", "configs/world/teacher.py", "--workdir", ""], "--workdir is missing")
    refused(capsys, ["generate", "--model", str(root / "run"), *output, "--first", str(tmp_path / "no.png")], "no.png")
    refused(
        capsys, ["generate", "--model", str(root / "run"), *output, "--frames", "4", "--actions", "9"], "'9'", "0 to 4"
    )
    refused(capsys, ["data", "doom", "--output", str(tmp_path / "d"), "--scenario", "moon"], "moon")
    refused(capsys, ["train", "--config", str(tmp_path / "no.py"), "--workdir", str(tmp_path / "w")], "no.py")
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--given 3", ["--given=3", "--first"]),
        ("--frames 0", ["--frames=0 must be at least 1"]),
        ("--first first.mp4 --frames 2 --given 2", ["--frames=2 must be above --given=2"]),
        ("--first .", [".: a directory; give an image or video file"]),
        ("--label 3", ["label=3", "0 … 2"]),
        ("--fps nan", ["fps=nan must be finite"]),
        ("--fps -3", ["fps=-3.0 must be at least"]),
        ("--actions 1*99999999999", ["'1*99999999999'", "1000000 in all"]),
        ("--output first.mp4/x.mp4", ["first.mp4 is a file, not a directory"]),
        ("--output first.mp4/x.mp4 --model nothing", ["first.mp4 is a file, not a directory"]),  # before it is loaded
        ("--size 480x832", ["run: is a model of vidar's own", "leave the choices"]),  # also where they are the default
        ("--negative blur", ["a negative prompt acts through guidance"]),
    ],
)
def test_mistakes_in_generating_get_one_line(root, capsys, tmp_path, monkeypatch, options, words):
    write_video(tmp_path / "first.mp4", np.full((3, 16, 16, 3), 40, np.uint8), fps=8)
    monkeypatch.chdir(tmp_path)
    label = [] if "--label" in options else ["--label", "0"]
    refused(capsys, ["generate", "--model", str(root / "run"), "--output", "x.mp4", *label, *options.split()], *words)
    assert [path.name for path in tmp_path.iterdir()] == ["first.mp4"]


@pytest.mark.parametrize("size", [16, 32])
def test_turning_compares_sizes_and_names(root, capsys, tmp_path, size):
    rng = np.random.default_rng(0)
    records, run, output = tmp_path / "records", str(root / "run"), tmp_path / "results"
    names = ("none", "turn_left", "turn_right", "forward")
    writer = EpisodeWriter(records, Format((size, size), ActionSpec("discrete", names)), {})
    frames = rng.integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    for split in ("train", "validation"):
        writer.write_shard(split, 0, [(frames, np.zeros(8, np.int32))] * 4)
    writer.finish()

    def command(*options: str) -> list[str]:
        small = ["--starts", "2", "--given", "1", "--frames", "3", "--output", str(output)]
        return ["eval", "turning", "--records", str(records), "--model", run, *small, *options]

    if size == 16:
        refused(capsys, command(), "run: needs one of 3 classes", "tells none")
        run = without("classes", root, tmp_path / "run.safetensors")
        assert main(command()) == 0
        assert list(json.loads((output / "turning.json").read_text())) == ["run"]
        assert (output / "run.png").stat().st_size > 100
        refused(capsys, command("--starts", "0"), "--starts=0 must be at least 1")
        refused(capsys, command("--given", "0"), "--given=0 must be at least 1")
        refused(capsys, command("--given", "3"), "--frames=3 must be above 3")
        refused(capsys, command("--output", str(records / "manifest.json")), "manifest.json is a file")
        refused(capsys, command("--model", run, str(tmp_path / "other" / "run")), "several are named run")
        deaf = without("actions", root, tmp_path / "deaf.safetensors")
        refused(capsys, ["eval", "world", "--model", deaf, "--clips", "2"], "deaf.safetensors: takes no actions")
        refused(capsys, ["eval", "world", "--model", run, "--clips", "0"], "--clips=0 must be at least 1")
    else:
        refused(capsys, command(), "run: makes frames of 16×16", "has 32×32")
        assert not output.exists()


def without(condition: str, root: Path, path: Path) -> str:
    """Random weights of the trained run's system, but for a condition."""
    config = load(root / "run")[0].config
    system = compose(replace(config, model=replace(config.model, **{condition: None})))
    model = system.build("student", jax.random.key(0))
    save_weights(path, {"student": model}, {"systems": {"student": system_dict(system.config)}})
    return str(path)


def test_a_weights_file_without_systems_and_roles_that_are_not_there_are_refused(root, tmp_path):
    system, model = load(root / "run")
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"student": model}, {"systems": {"student": system_dict(system.config)}})
    assert load(path)[0].config == system.config
    for source in (path, root / "run"):
        with pytest.raises(CheckpointError, match=r"holds no network 'critic'; it has student"):
            load(source, "critic")
    headers = {"{}": "its header has no systems", "[1]": "header is no dictionary", "{not": "header is not JSON"}
    for header, message in headers.items():
        save_file({"x": np.zeros(1, np.float32)}, path, {"vidar": header})
        with pytest.raises(CheckpointError, match=message):
            load(path)


def test_damaged_checkpoint_falls_back_and_says_so(root, capsys, caplog, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(root / "run", copy)
    newest = max((copy / "checkpoints").iterdir())
    files = [file for file in newest.rglob("*") if file.is_file() and "ema" in file.parts]
    victim = max(files, key=lambda file: file.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    output = tmp_path / "x.mp4"
    with caplog.at_level("WARNING", logger="vidar"):
        assert main(["generate", "--model", str(copy), "--output", str(output), "--frames", "2", "--label", "0"]) == 0
    assert any("damaged" in message for message in caplog.messages)
    truncated = tmp_path / "weights.safetensors"
    truncated.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
    refused(capsys, ["generate", "--model", str(truncated), "--output", str(output)], "weights.safetensors")


def test_help_of_every_command(capsys):
    from vidar.cli.main import COMMANDS

    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.codec.mean=0.0", ["codec.mean=-0.75, now 0.0", "another directory"]),
        ("--config.video.height=32", ["video.height=32", "16×16"]),
        ("--config.model.actions.count=3", ["model.actions.count=3", "has actions"]),
        ("--config.model.classes=2", ["model.classes=2", "has label 2", "use 3"]),
        ("--config.evaluation.given=8", ["evaluation.given=8", "8 frames"]),
        ("--config.evaluation.rows=0", ["evaluation.rows=0"]),
        ("--config.optimizers.other.name=adamw", ["optimizers.other", "student"]),
    ],
)
def test_mistakes_about_data_and_runs_get_one_line(root, capsys, override, words):
    workdir = "run" if "now" in words[0] else "never"
    refused(capsys, train(root, 6, override, workdir=workdir), *words)


def test_another_card_does_not_go_on_in_a_trained_directory(root, capsys):
    refused(capsys, train(root, 6, card="configs/world/diffusion_forcing.py"), "objective", "another directory")


def test_a_stream_keeps_what_it_made_before_a_mistake(root, tmp_path, monkeypatch, capsys):
    import io

    output = tmp_path / "stream.mp4"
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\n1\nnorth\n"))
    stream = ["stream", "--model", str(root / "run"), "--label", "0", "--output", str(output)]
    arguments = [*stream, "--frames", "0", "--actions", "-"]
    refused(capsys, arguments, "'north'")
    assert len(read_video(output)) == 3
    assert main([*arguments[:-1], "1*2,7"]) == 2
    assert len(read_video(output)) == 3
    refused(capsys, [*arguments[:-3], "-5"], "--frames=-5")


def test_a_stream_stopped_by_its_scheduler_is_complete(root, tmp_path):
    import os
    import signal
    import subprocess
    import sys
    import time

    output = tmp_path / "stream.mp4"
    command = [sys.executable, "-m", "vidar.cli.main", "stream", "--model", str(root / "run"), "--label", "0"]
    with subprocess.Popen([*command, "--output", str(output), "--frames", "0"], stderr=subprocess.DEVNULL) as process:
        partial = output.with_suffix(".partial.mp4")
        while not partial.exists() or not partial.stat().st_size:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0
    assert len(read_video(output)) >= 1
