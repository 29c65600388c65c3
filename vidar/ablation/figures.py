"""Pictures of findings: curves over the frame index, contact sheets, and short animations.

This module draws what it is given; it must not know what is significant.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vidar.evaluation.sheets import contact_sheet
from vidar.evaluation.writing import replaced

_FRAMES_PER_SECOND = 8


def plot_curves(
    curves: Mapping[str, Mapping[str, np.ndarray]],
    path: Path,
    first: int,
    trained: int,
    span: tuple[int, int] | None,
) -> None:
    """Draws one panel a metric, with a line for each label and a band from the lowest to the highest seed.

    Args:
        curves: By metric and label, the curve of each seed `[s, f]`.
        path: PNG to write.
        first: Frame index of the curves' first entry.
        trained: Frames of a training clip, which is marked.
        span: Frames of the contrast, which are shaded.
    """
    from matplotlib.figure import Figure

    columns = 2
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    for panel, (metric, lines) in zip(panels, curves.items(), strict=False):
        for label, values in lines.items():
            frames = np.arange(first, first + values.shape[1])
            (line,) = panel.plot(frames, values.mean(axis=0), label=label, linewidth=1.3)
            if len(values) > 1:
                panel.fill_between(frames, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.18)
        panel.axvline(trained, color="gray", linewidth=0.8, linestyle="--")
        if span is not None:
            panel.axvspan(*span, color="gray", alpha=0.08)
        panel.set_title(metric.replace("_", " "), fontsize=10)
        panel.grid(alpha=0.3)
        panel.tick_params(labelbottom=True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize=9)
    figure.supxlabel("frame", fontsize=10)
    with replaced(path) as unfinished:
        figure.savefig(unfinished, dpi=100)


def sheet(truth: np.ndarray, rollouts: Mapping[str, np.ndarray], path: Path, clips: int = 2, columns: int = 12) -> None:
    """Draws the first clips of several rollouts below their truth.

    Args:
        truth: uint8 `[b, f, h, w, 3]`.
        rollouts: The same shape, by label.
        path: PNG to write.
        clips: Clips shown.
        columns: Times shown.
    """
    rows = {}
    for clip in range(min(clips, len(truth))):
        rows[f"clip {clip}, truth"] = truth[clip]
        rows |= {f"clip {clip}, {label}": video[clip] for label, video in rollouts.items()}
    contact_sheet(rows, path, columns=columns, tile=64)


def animate(truth: np.ndarray, video: np.ndarray, path: Path, clips: int = 6) -> int:
    """Writes an animation in its own pixels, truth above and rollout below.

    Args:
        truth: uint8 `[b, f, h, w, 3]`.
        video: The same shape.
        path: WebP to write.
        clips: Clips side by side.

    Returns:
        Its width in pixels.
    """
    from PIL import Image

    frames = [
        np.concatenate([np.concatenate(_framed(part[:clips, frame]), axis=1) for part in (truth, video)], axis=0)
        for frame in range(video.shape[1])
    ]
    images = [Image.fromarray(frame) for frame in frames]
    with replaced(path) as unfinished:
        images[0].save(
            unfinished,
            save_all=True,
            append_images=images[1:],
            duration=1000 // _FRAMES_PER_SECOND,
            loop=0,
            lossless=True,
        )
    return images[0].width


def _framed(frames: np.ndarray) -> Sequence[np.ndarray]:
    """Frames with a white line around each."""
    return list(np.pad(frames, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=255))
