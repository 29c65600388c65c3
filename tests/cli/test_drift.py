"""`vidar eval drift`: curves of video files and of arrays, as a person would ask for them."""

import argparse
import json

import numpy as np
import pytest

from vidar.cli import drift
from vidar.data.video import write_video
from vidar.errors import ConfigError, DataError
from vidar.evaluation.world import held_out, score, standing_still


def command(*words):
    parser = argparse.ArgumentParser()
    drift.add_arguments(parser)
    options = parser.parse_args([str(word) for word in words])
    assert options.run(options) == 0
    return json.loads((options.output / "drift.json").read_text())


def fading(frames=12, start=200, step=8):
    """A clip that loses `step` grey levels a frame."""
    grey = (start - step * np.arange(frames)).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (frames, 16, 16, 3))


def test_video_files_are_one_rollout(tmp_path, capsys):
    paths = [tmp_path / f"{number}.mp4" for number in range(3)]
    for number, path in enumerate(paths):
        write_video(path, fading(start=200 - number), fps=8, scale=1)
    truth = tmp_path / "truth.mp4"
    write_video(truth, fading(step=0), fps=8, scale=1)
    found = command("--video", *paths, "--truth", truth, truth, truth, "--output", tmp_path / "out")["video"]
    assert (found["videos"], found["frames"]) == (3, 12)
    luminance = found["curves"]["luminance"]
    assert luminance["slope"]["mean"] == pytest.approx(-8 / 255, rel=0.02)
    assert luminance["change"]["mean"] == pytest.approx(-8 * 10 / 255, rel=0.02)
    assert found["curves"]["psnr"]["mean"][6] == pytest.approx(-20 * np.log10(49 / 255), abs=0.3)
    assert (tmp_path / "out" / "drift.png").stat().st_size > 10_000
    assert "luminance" in capsys.readouterr().out


def test_rollouts_are_compared_with_their_own_truth_and_metrics(tmp_path):
    """On the procedural world: the exact state error of standing still is the way that was walked."""
    truth = held_out(3, 9)
    video = standing_still(truth)
    error = score(video, truth).error
    latents = np.broadcast_to(np.arange(1.0, 10)[None, :, None, None, None], (3, 9, 2, 2, 4))
    for name in ("a", "b"):
        np.savez_compressed(
            tmp_path / f"{name}.npz",
            video=video if name == "a" else truth.pixels,
            truth=truth.pixels,
            latents=latents,
            position_error=error,
            actions=truth.actions,
        )
    found = command("--rollouts", tmp_path / "a.npz", tmp_path / "b.npz", "--output", tmp_path / "out")
    assert set(found) == {"a", "b"}
    names = {"sharpness", "luminance", "saturation", "distance_to_first", "psnr", "latent_rms", "position_error"}
    assert set(found["a"]["curves"]) == names
    walked = np.stack([np.linalg.norm(s.position[:, 0] - s.position[:1, 0], axis=-1) for s in truth.states])
    np.testing.assert_allclose(found["a"]["curves"]["position_error"]["mean"], walked.mean(axis=0), atol=0.15)
    np.testing.assert_allclose(found["a"]["curves"]["latent_rms"]["mean"], np.arange(1, 10))
    assert found["a"]["curves"]["distance_to_first"]["mean"][-1] == 0
    assert found["b"]["curves"]["psnr"]["mean"] == [100.0] * 9


def test_one_truth_serves_all_rollouts(tmp_path):
    np.savez(tmp_path / "truth.npz", pixels=fading(step=0)[None], actions=np.zeros((1, 12)))
    for name, step in (("a", 8), ("b", 4)):
        np.savez(tmp_path / f"{name}.npz", video=fading(step=step)[None])
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    found = command("--rollouts", *paths, "--truth", tmp_path / "truth.npz", "--output", tmp_path / "out")
    for name, step in (("a", 8), ("b", 4)):
        assert found[name]["curves"]["psnr"]["mean"][5] == pytest.approx(-20 * np.log10(5 * step / 255))


def test_one_video_has_no_interval(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", video=fading()[None])
    np.savez(tmp_path / "b.npz", video=np.stack([fading(), fading(step=4)]))
    for name, said in (("a", "no intervals"), ("b", "the intervals")):
        command("--rollouts", tmp_path / f"{name}.npz", "--output", tmp_path / "out")
        lines = capsys.readouterr().out.splitlines()
        assert said in lines[0]
        assert f"slope {-800 / 255 if name == 'a' else -600 / 255:+.4g}" in next(x for x in lines if "luminance" in x)
        assert ["[" in line for line in lines[2:-1]] == [name == "b"] * (len(lines) - 3)


def test_equal_names_are_told_apart(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        np.savez(tmp_path / place / "rollouts.npz", video=fading()[None])
    paths = [tmp_path / place / "rollouts.npz" for place in ("one", "two")]
    assert list(command("--rollouts", *paths, "--output", tmp_path / "out")) == ["one", "two"]
    np.savez(tmp_path / "two" / "other.npz", video=fading()[None])
    paths.append(tmp_path / "two" / "other.npz")
    names = ["one/rollouts", "two/rollouts", "two/other"]
    assert list(command("--rollouts", *paths, "--output", tmp_path / "out")) == names
    with pytest.raises(DataError, match="--rollouts: a file is named twice"):
        command("--rollouts", paths[0], paths[0], "--output", tmp_path / "out")


def test_given_frames_are_no_drift(tmp_path, capsys):
    """After a true frame, a video that is wrong but constant does not drift."""
    truth = np.stack([fading(step=0)] * 2)
    video = truth.copy()
    video[:, 1:] = 90
    np.savez(tmp_path / "a.npz", video=video, truth=truth)
    for given, drifts in ((0, True), (1, False)):
        found = command("--rollouts", tmp_path / "a.npz", "--given", given, "--output", tmp_path / "out")["a"]
        assert (found["frames"], found["given"]) == (12 - given, given)
        assert (abs(found["curves"]["psnr"]["change"]["mean"]) > 1) == drifts
    assert "luminance                0.3529 →     0.3529   change +0" in capsys.readouterr().out
    with pytest.raises(DataError, match="frames ≥ 13"):
        command("--rollouts", tmp_path / "a.npz", "--given", 11, "--output", tmp_path / "out")


def test_mistakes_get_one_line(tmp_path):
    write_video(tmp_path / "a.mp4", fading(12), fps=8, scale=1)
    write_video(tmp_path / "b.mp4", fading(10), fps=8, scale=1)
    np.savez(tmp_path / "bare.npz", frames=fading())
    np.savez(tmp_path / "float.npz", video=fading()[None] / 255)
    (tmp_path / "text.npz").write_text("not an archive")
    output = ("--output", tmp_path / "out")
    with pytest.raises(DataError, match="b.mp4 has 10 frames of 16×16, .*a.mp4 12 frames of 16×16"):
        command("--video", tmp_path / "a.mp4", tmp_path / "b.mp4", *output)
    with pytest.raises(ConfigError, match="2 files for the 1 of --video"):
        command("--video", tmp_path / "a.mp4", "--truth", tmp_path / "a.mp4", tmp_path / "a.mp4", *output)
    with pytest.raises(ConfigError, match="--truth: 2 files; --rollouts take one for all"):
        command("--rollouts", tmp_path / "bare.npz", "--truth", tmp_path / "a.npz", tmp_path / "b.npz", *output)
    with pytest.raises(DataError, match="bare.npz: `video` should be uint8 .* it holds nothing"):
        command("--rollouts", tmp_path / "bare.npz", *output)
    with pytest.raises(DataError, match=r"float.npz: `video` should be uint8 .* it holds float64 \[1, 12, 16, 16, 3\]"):
        command("--rollouts", tmp_path / "float.npz", *output)
    with pytest.raises(DataError, match="text.npz: cannot be read as arrays"):
        command("--rollouts", tmp_path / "text.npz", *output)
    broken = {"video": np.repeat(fading()[None], 2, axis=0)}
    for name, array, words in (
        ("latents", np.full((2, 12), "x"), "odd.npz: latents should be float .* not <U1"),
        ("latents", np.ones((2, 7, 2, 2, 4)), "odd.npz: 7 latent frames do not stand for 12"),
        ("error", np.full((2, 12), np.nan), "odd.npz: metric 'error' has values that are not finite"),
        ("video", np.zeros((0, 12, 4, 4, 3), np.uint8), "odd.npz: `video` is empty"),
    ):
        np.savez(tmp_path / "odd.npz", **(broken | {name: array}))
        with pytest.raises(DataError, match=words):
            command("--rollouts", tmp_path / "odd.npz", *output)
    with pytest.raises(DataError, match="--video: a file is named twice"):
        command("--video", tmp_path / "a.mp4", tmp_path / "a.mp4", *output)
    with pytest.raises(DataError, match="nothing.npz: cannot be read as arrays .* No such file"):
        command("--rollouts", tmp_path / "nothing.npz", *output)
    assert not (tmp_path / "out").exists()
