"""Contact sheets: several videos, one below the other, at evenly spaced times.

This module takes arrays and writes one image; it must know neither models nor metrics.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vidar.errors import ConfigError
from vidar.evaluation.writing import replaced

_GAP = 2
_FONT = 11


def contact_sheet(
    videos: Mapping[str, np.ndarray], path: str | Path, columns: int = 8, tile: int = 96, text: str = ""
) -> None:
    """Writes a contact sheet, one labelled row for each video.

    Pixels are repeated, never interpolated, so that small videos show what they are.

    Args:
        videos: Videos by label, each uint8 `[f, h, w, 3]`; lengths and sizes may differ.
        path: Image file to write; its suffix is the format.
        columns: Times shown; a video with fewer frames shows all of them.
        tile: Height of a shown frame in pixels; smaller videos are enlarged by a whole factor up to it.
        text: A line above the sheet.

    Raises:
        ConfigError: No videos, or an array that is not a video.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not videos:
        raise ConfigError("a contact sheet needs at least one video")
    rows = [(label, *_row(label, video, columns, tile)) for label, video in videos.items()]
    top = _FONT + 3 * _GAP if text else 0
    heights = [_FONT + 2 * _GAP + image.shape[0] + _GAP for _, image, _ in rows]
    sheet = Image.new("RGB", (max(image.shape[1] for _, image, _ in rows), top + sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    draw.text((_GAP, _GAP), text, "black", font)
    for (label, image, times), height, y in zip(rows, heights, top + np.cumsum([0, *heights[:-1]]), strict=True):
        draw.text((_GAP, int(y) + _GAP), f"{label}: frames {', '.join(map(str, times))}", "black", font)
        sheet.paste(Image.fromarray(image), (0, int(y) + height - image.shape[0] - _GAP))
    with replaced(path) as unfinished:
        sheet.save(unfinished)


def _row(label: str, video: np.ndarray, columns: int, tile: int) -> tuple[np.ndarray, list[int]]:
    """Enlarges the frames at the shown times and sets them side by side; returns the image and the times."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
        raise ConfigError(f"contact sheet row {label!r}: {video.dtype}{list(video.shape)} is not uint8 [f, h, w, 3]")
    times = np.unique(np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)).tolist()
    factor = max(1, tile // video.shape[1])
    frames = video[times].repeat(factor, axis=1).repeat(factor, axis=2)
    spaced = np.pad(frames, [(0, 0), (0, 0), (0, _GAP), (0, 0)], constant_values=255)
    return np.concatenate(list(spaced), axis=1)[:, :-_GAP], times
