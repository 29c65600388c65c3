"""Video files hold what was written, also while it is being written."""

import contextlib

import av
import numpy as np
import pytest

from vidar.data.video import VideoWriter, read_video, watchable_scale, write_video
from vidar.errors import ConfigError, DataError


def moving_bar(frames=12, height=16, width=16):
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 2] = 120
    for index in range(frames):
        video[index, :, index : index + 4] = [230, 40, 30]
    return video


def test_small_frames_are_enlarged_and_come_back(tmp_path):
    video = moving_bar()
    write_video(tmp_path / "deep" / "bar.mp4", video, fps=8)
    read = read_video(tmp_path / "deep" / "bar.mp4")
    assert read.shape == (12, 256, 256, 3)
    assert np.abs(read[:, 8::16, 8::16].astype(int) - video).max() < 12


def test_odd_sizes_are_padded_by_repetition(tmp_path):
    video = moving_bar(height=33, width=47).repeat(2, axis=2)[:, :, :47]
    write_video(tmp_path / "odd.mp4", video, fps=10, scale=1)
    read = read_video(tmp_path / "odd.mp4").astype(int)
    assert read.shape == (12, 34, 48, 3)
    assert np.abs(read[:, :33, :47] - video).mean() < 6
    assert np.abs(read[:, 33] - read[:, 32]).mean() < 4


def test_frames_can_be_appended_one_by_one(tmp_path):
    video = moving_bar()
    write_video(tmp_path / "whole.mp4", video, fps=10)
    with VideoWriter(tmp_path / "parts.mp4", fps=10) as writer:
        writer.append(video[:5])
        for frame in video[5:]:
            writer.append(frame)
        assert not (tmp_path / "parts.mp4").exists()
        assert (tmp_path / "parts.partial.mp4").exists()
    np.testing.assert_array_equal(read_video(tmp_path / "parts.mp4"), read_video(tmp_path / "whole.mp4"))
    assert not (tmp_path / "parts.partial.mp4").exists()


def interrupted(path):
    with VideoWriter(path, fps=10) as writer:
        writer.append(moving_bar())
        raise KeyboardInterrupt


def test_an_exception_still_leaves_a_valid_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "cut.mp4")
    assert len(read_video(tmp_path / "cut.mp4")) == 12


def test_the_file_of_a_killed_process_plays(tmp_path, run_python):
    run_python(
        f"""
        import os
        import numpy as np
        from vidar.data.video import VideoWriter
        frames = np.random.default_rng(0).integers(0, 255, (400, 32, 32, 3), dtype=np.uint8)
        writer = VideoWriter({str(tmp_path / "killed.mp4")!r}, fps=10, scale=1)
        writer.append(frames)
        os._exit(0)
        """,
        devices=1,
    )
    assert not (tmp_path / "killed.mp4").exists()
    played = 0
    with av.open(str(tmp_path / "killed.partial.mp4")) as container, contextlib.suppress(av.FFmpegError):
        for _ in container.decode(video=0):
            played += 1
    assert played > 100


def test_an_existing_file_stays_until_the_new_one_is_complete(tmp_path):
    write_video(tmp_path / "a.mp4", moving_bar(frames=4), fps=10)
    with VideoWriter(tmp_path / "a.mp4", fps=10) as writer:
        writer.append(moving_bar(frames=9))
        assert len(read_video(tmp_path / "a.mp4")) == 4
    assert len(read_video(tmp_path / "a.mp4")) == 9


def test_no_frames_no_file(tmp_path):
    with VideoWriter(tmp_path / "none.mp4", fps=10):
        pass
    assert not list(tmp_path.iterdir())


def test_scales():
    assert [watchable_scale(*size) for size in [(16, 16), (32, 40), (240, 320), (480, 832)]] == [16, 8, 2, 1]


def test_errors_are_one_line(tmp_path):
    with pytest.raises(DataError, match="no such image or video"):
        read_video(tmp_path / "missing.mp4")
    (tmp_path / "junk.mp4").write_bytes(b"junk")
    with pytest.raises(DataError, match="not a video"):
        read_video(tmp_path / "junk.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file, not a directory"):
        VideoWriter(tmp_path / "file" / "x.mp4", fps=10)
    for read in (read_video, lambda path: VideoWriter(path, fps=10)):
        with pytest.raises(DataError, match="a directory; give"):
            read(tmp_path)
    with pytest.raises(DataError, match=r"x.gif: videos are written as .mp4 alone"):
        VideoWriter(tmp_path / "x.gif", fps=10)


@pytest.mark.parametrize("fps", [float("nan"), float("inf"), 0.0, -3.0, 1e-9, 1e9])
def test_rates_that_no_video_has_are_refused(tmp_path, fps):
    with pytest.raises(ConfigError, match="fps=.* must be"):
        VideoWriter(tmp_path / "x.mp4", fps)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported(tmp_path):
    class Full:
        def append(self, frames):
            raise OSError(28, "No space left on device")

    writer = VideoWriter(tmp_path / "x.mp4", fps=10)
    writer._encoder = Full()
    with pytest.raises(DataError, match="No space left"):
        writer.append(moving_bar())
    writer.close()
