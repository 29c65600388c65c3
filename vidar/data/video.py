"""Video files: frames in and out of H.264, whole or one by one while they are made.

It knows pixels and files only; what the frames show, and who makes them, is decided elsewhere.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vidar.errors import DataError, check_range, make_directory

WATCHABLE_SIDE = 256  # smaller frames are enlarged by whole factors until their shorter side reaches this
LEAST_FPS, MOST_FPS = 0.01, 1000.0
QUALITY = 18  # x264's constant rate factor: visually lossless
FRAGMENTS = "frag_keyframe+empty_moov"


def watchable_scale(height: int, width: int) -> int:
    """Smallest whole factor that enlarges a frame to a size at which a person can watch it.

    Args:
        height: Height in pixels, ≥ 1.
        width: Width in pixels, ≥ 1.

    Returns:
        A factor ≥ 1; 1 for frames that are large enough already.
    """
    return max(1, -(-WATCHABLE_SIDE // min(height, width)))


def check_target(path: str | Path, fps: float | None = None) -> None:
    """Refuses what cannot become a video, and makes its folder; long before there is anything to write.

    Args:
        path: The file.
        fps: Frames per second; None where they are not known yet.

    Raises:
        ConfigError: There is no such rate.
        DataError: The file cannot be written.
    """
    check_range("fps", fps, least=LEAST_FPS, most=MOST_FPS)
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: a directory; give a file to write, such as clip.mp4")
    if path.suffix != ".mp4":
        raise DataError(f"{path}: videos are written as .mp4 alone; give a name such as clip.mp4")
    make_directory(path.parent)


class VideoWriter:
    """Writes an H.264 file (MP4, yuv420p) frame by frame.

    The file appears under its name when the writer is closed, also if an exception closes it. Until then it grows
    beside it as `<stem>.partial<suffix>` in fragments, so that even the file of a killed process plays.

    Args:
        path: The file to write, usually `*.mp4`; its folder is created.
        fps: Frames per second, in [`LEAST_FPS`, `MOST_FPS`].
        scale: Whole factor by which frames are enlarged (nearest neighbour); None takes `watchable_scale`. Odd sides
            are padded by one repeated row or column, because H.264 stores colour at half resolution.

    Raises:
        ConfigError: There is no such rate.
        DataError: The file cannot be written.
    """

    def __init__(self, path: str | Path, fps: float, scale: int | None = None):
        check_target(path, fps)
        self.path = Path(path)
        self._partial = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        self._closed = False
        with self._report():
            self._partial.touch()
            self._encoder = _Encoder(str(self._partial), fps, scale, growing=True)

    def append(self, frames: np.ndarray) -> None:
        """Encodes further frames.

        Args:
            frames: uint8 `[f, H, W, 3]`, or one frame `[H, W, 3]`; all of the same size.

        Raises:
            DataError: The disk is full.
        """
        with self._report():
            self._encoder.append(frames)

    def close(self) -> None:
        """Flushes and puts the file in its place; without frames, no file appears. Further calls do nothing.

        Raises:
            DataError: The disk is full.
        """
        if self._closed:
            return
        self._closed = True
        with self._report():
            if not self._encoder.close():
                self._partial.unlink()
                return
            with self._partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(self._partial, self.path)

    def discard(self) -> None:
        """Closes without a file; what there is under its name stays."""
        self._closed = True
        self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _report(self) -> Iterator[None]:
        import av

        try:
            yield
        except (OSError, av.FFmpegError) as error:
            self._closed = True  # flushing an encoder that could not write its header ends the process
            raise DataError(f"{self.path}: cannot write video: {error.strerror}") from error

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def write_video(path: str | Path, frames: np.ndarray, fps: float, scale: int | None = None) -> None:
    """Writes one clip as H.264 (MP4, yuv420p).

    Args:
        path: The file to write.
        frames: uint8 `[f, H, W, 3]`, f ≥ 1.
        fps: Frames per second, > 0.
        scale: As for `VideoWriter`.

    Raises:
        DataError: The file cannot be written.
    """
    with VideoWriter(path, fps, scale) as writer:
        writer.append(frames)


def read_video(path: str | Path) -> np.ndarray:
    """Reads all frames of a video file.

    Args:
        path: Any file that FFmpeg decodes.

    Returns:
        uint8 `[f, H, W, 3]`.

    Raises:
        DataError: No such file, or it holds no video that can be decoded.
    """
    if Path(path).is_dir():
        raise DataError(f"{path}: a directory; give an image or video file")
    if not Path(path).is_file():
        raise DataError(f"{path}: no such image or video file")
    return _decode(str(path), where=str(path))


def encode_video(frames: np.ndarray, fps: float) -> bytes:
    """Encodes one clip as an MP4 in memory, at its own size.

    Args:
        frames: uint8 `[f, H, W, 3]`, f ≥ 1.
        fps: Frames per second, > 0.

    Returns:
        The bytes of the file.
    """
    file = io.BytesIO()
    encoder = _Encoder(file, fps, scale=1, growing=False)
    encoder.append(frames)
    encoder.close()
    return file.getvalue()


def decode_video(data: bytes, where: str) -> np.ndarray:
    """Decodes a clip made by `encode_video`.

    Args:
        data: The bytes of the file.
        where: Where they come from, for the error message.

    Returns:
        uint8 `[f, H, W, 3]`; odd sides come back one pixel larger.

    Raises:
        DataError: The bytes hold no video that can be decoded.
    """
    return _decode(io.BytesIO(data), where)


class _Encoder:
    """H.264 into a file, by name or open; knows sizes only after the first frame.

    A growing file is cut into fragments of two seconds, each of which plays without those that follow.
    """

    def __init__(self, file: str | io.BytesIO, fps: float, scale: int | None, growing: bool):
        import av

        self._container = av.open(file, "w", format="mp4", options={"movflags": FRAGMENTS} if growing else {})
        self._options = {"g": str(max(1, round(2 * fps)))} if growing else {}
        self._rate = Fraction(fps).limit_denominator(1001)
        self._scale = scale
        self._stream: Any = None
        self._size: tuple[int, ...] = ()

    def append(self, frames: np.ndarray) -> None:
        import av

        frames_fhwc = frames[None] if frames.ndim == 3 else frames
        if frames_fhwc.dtype != np.uint8 or frames_fhwc.ndim != 4 or frames_fhwc.shape[-1] != 3:
            raise ValueError(f"video frames are uint8 [f, H, W, 3], not {frames.dtype} {list(frames.shape)}")
        stream = self._stream or self._start(frames_fhwc.shape[1:])
        if frames_fhwc.shape[1:] != self._size:
            raise ValueError(f"video frame of size {frames_fhwc.shape[1:3]} after frames of size {self._size[:2]}")
        for frame_hwc in frames_fhwc:
            large_hwc = frame_hwc.repeat(self._scale, axis=0).repeat(self._scale, axis=1)
            pad = [(0, side % 2) for side in large_hwc.shape[:2]]
            picture = np.ascontiguousarray(np.pad(large_hwc, [*pad, (0, 0)], mode="edge"))
            self._container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

    def close(self) -> bool:
        """Returns whether there was any frame."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()
        return self._stream is not None

    def _start(self, size: tuple[int, ...]) -> Any:
        self._size = size
        self._scale = self._scale or watchable_scale(*size[:2])
        self._stream = self._container.add_stream("libx264", rate=self._rate)
        self._stream.height, self._stream.width = ((side * self._scale + 1) // 2 * 2 for side in size[:2])
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": str(QUALITY), "preset": "veryfast", **self._options}
        return self._stream


def _decode(file: str | io.BytesIO, where: str) -> np.ndarray:
    import av

    try:
        with av.open(file, "r") as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{where}: not a video that can be decoded ({error})") from error
    if not frames:
        raise DataError(f"{where}: a video without frames")
    return np.stack(frames)
