"""As a person would: make data, train, resume, generate, stream, evaluate; and every mistake one clear line."""

import json
from pathlib import Path

import numpy as np
import pytest

from vidar.cli.main import main
from vidar.data.video import read_video, write_video

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


def test_generate_writes_the_clip(root, tmp_path):
    first = tmp_path / "first.mp4"
    frame = np.full((1, 16, 16, 3), 40, np.uint8)
    write_video(first, frame, fps=8)
    output = tmp_path / "clip.mp4"
    arguments = ["generate", "--model", str(root / "run"), "--output", str(output), "--first", str(first)]
    assert main([*arguments, "--frames", "6", "--actions", "1*2,2", "--clips", "2"]) == 0
    assert len(read_video(output)) == 6


def test_stream_writes_while_it_runs_and_follows_stdin(root, tmp_path, monkeypatch, capsys):
    import io

    output = tmp_path / "stream.mp4"
    assert main(["stream", "--model", str(root / "run"), "--output", str(output), "--frames", "20"]) == 0
    assert len(read_video(output)) == 20
    assert "first after" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\n\n"))
    arguments = ["stream", "--model", str(root / "run"), "--output", str(output), "--frames", "0", "--actions", "-"]
    assert main(arguments) == 0
    assert len(read_video(output)) == 3


def test_self_forcing_starts_from_trained_runs(root):
    teacher = train(root, 1, card="configs/world/teacher.py", workdir="teacher")
    assert main(teacher) == 0
    sources = [f"--config.objective.student={root / 'run'}", f"--config.objective.teacher={root / 'teacher'}"]
    assert main(train(root, 2, *sources, card="configs/world/self_forcing.py", workdir="forced")) == 0
    rows = [json.loads(line) for line in (root / "forced" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["updates/student"] == 1
    assert rows[1]["updates/critic"] == 2
    assert main(["eval", "world", "--model", str(root / "forced"), "--clips", "2", "--frames", "4"]) == 0


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
    refused(capsys, ["stream", "--model", str(tmp_path / "nothing"), *output], "nothing", "run")
    refused(capsys, ["generate", "--model", str(root / "run"), *output, "--first", str(tmp_path / "no.png")], "no.png")
    refused(
        capsys, ["generate", "--model", str(root / "run"), *output, "--frames", "4", "--actions", "9"], "'9'", "0 to 4"
    )
    refused(capsys, ["data", "doom", "--output", str(tmp_path / "d"), "--scenario", "moon"], "moon")
    refused(capsys, ["train", "--config", str(tmp_path / "no.py"), "--workdir", str(tmp_path / "w")], "no.py")
    assert not (tmp_path / "x.mp4").exists()


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
        assert main(["generate", "--model", str(copy), "--output", str(output), "--frames", "2"]) == 0
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
