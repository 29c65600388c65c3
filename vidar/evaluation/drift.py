"""Drift: how a rollout changes with the index of its frames, the measure of error that feeds on itself.

A rollout is a batch of videos that start alike in kind; each metric gives one curve over the frame index, with the
interval of its mean over videos, the change from the first to the last part, and the slope. This module takes arrays
and must know neither the model that made them nor the data that they imitate.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vidar.errors import ConfigError
from vidar.evaluation import metrics
from vidar.evaluation.writing import replaced

PART = 0.15


@dataclass(frozen=True)
class Interval:
    """A mean over videos with its 95 % bootstrap interval.

    Attributes:
        mean: The mean.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One metric over the frame index.

    Attributes:
        mean: Mean over videos at each frame.
        low: Lower end of its 95 % interval at each frame.
        high: Upper end at each frame.
        change: Mean of the last 15 % of frames minus mean of the first 15 % (HeliosBench's drift, signed).
        slope: Least-squares slope, per frame.
    """

    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    change: Interval
    slope: Interval


@dataclass(frozen=True)
class Drift:
    """The curves of one rollout.

    Attributes:
        videos: Number of videos.
        frames: Number of measured frames of each.
        given: Frames before them, which were given.
        curves: Curve of each metric, by name.
    """

    videos: int
    frames: int
    given: int
    curves: Mapping[str, Curve]

    def to_json(self) -> str:
        """Returns everything as indented JSON."""
        return json.dumps(asdict(self), indent=2)


def drift(
    video: np.ndarray,
    truth: np.ndarray | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    given: int = 0,
) -> Drift:
    """Measures a rollout frame index by frame index.

    Args:
        video: uint8 `[b, f, h, w, 3]`, at least 2 frames that were not given.
        truth: What should have been seen, the same shape; adds `psnr`.
        extra: Further metrics by name, each `[b, f]`: `latent_rms`, position error, whether an identity is kept.
        given: First frames that were given, which are no drift: curves begin after them.

    Returns:
        Curves of `sharpness`, `luminance`, `saturation`, `distance_to_first`, `psnr` and the extra ones.

    Raises:
        ConfigError: Fewer than 2 frames, arrays whose shapes do not fit, or metrics that are not finite.
    """
    if video.ndim != 5 or video.shape[1] < given + 2:
        raise ConfigError(
            f"drift of videos of shape {video.shape}: give [videos, frames ≥ {given + 2}, height, width, 3]"
        )
    values = {
        "sharpness": metrics.sharpness(video),
        "luminance": metrics.luminance(video),
        "saturation": metrics.saturation(video),
        "distance_to_first": metrics.distance_to_first(video),
    }
    if truth is not None:
        if truth.shape != video.shape:
            raise ConfigError(f"drift of videos of shape {video.shape} against truth of shape {truth.shape}")
        values["psnr"] = metrics.psnr(video, truth)
    for name, value in (extra or {}).items():
        if np.shape(value) != video.shape[:2]:
            raise ConfigError(f"metric {name!r} has shape {np.shape(value)}, not [videos, frames] = {video.shape[:2]}")
        values[name] = np.asarray(value, np.float64)
        if not np.isfinite(values[name]).all():
            raise ConfigError(f"metric {name!r} has values that are not finite")
    curves = {name: curve(value[:, given:]) for name, value in values.items()}
    return Drift(video.shape[0], video.shape[1] - given, given, curves)


def curve(values_bf: np.ndarray) -> Curve:
    """Summarises one metric over the frame index.

    Args:
        values_bf: The metric of each video and frame, `[b, f]` with at least 2 frames.

    Returns:
        Its curve; the intervals come from resampling videos.
    """
    frames = values_bf.shape[1]
    part = part_of(frames)
    index = np.arange(frames) - (frames - 1) / 2
    low, high = metrics.bootstrap_interval(values_bf)
    return Curve(
        tuple(values_bf.mean(axis=0).tolist()),
        tuple(low.tolist()),
        tuple(high.tolist()),
        change=_interval(values_bf[:, -part:].mean(axis=1) - values_bf[:, :part].mean(axis=1)),
        slope=_interval(values_bf @ index / (index @ index)),
    )


def part_of(frames: int) -> int:
    """Frames at either end whose means are compared: 15 %."""
    return max(1, round(PART * frames))


def latent_rms(latents_bfhwc: np.ndarray, frames: int) -> np.ndarray:
    """Root mean square of each frame's latents: it leaves 1 where a rollout burns out or fades.

    Args:
        latents_bfhwc: Latents, at least 2 frames; the first one is one pixel frame, each other equally many.
        frames: Pixel frames.

    Returns:
        float64 `[b, frames]`: at each pixel frame that of its latent frame, for `drift`'s extra metrics.

    Raises:
        ConfigError: No such latents, or the pixel frames are not 1 + step · (latent frames - 1).
    """
    if latents_bfhwc.ndim != 5 or latents_bfhwc.dtype.kind != "f":
        held = f"{latents_bfhwc.dtype} {list(latents_bfhwc.shape)}"
        raise ConfigError(f"latents should be float [videos, frames, height, width, channels], not {held}")
    latent_frames = latents_bfhwc.shape[1]
    step, rest = divmod(frames - 1, max(1, latent_frames - 1))
    if rest or step < 1 or latent_frames < 2:
        raise ConfigError(f"{latent_frames} latent frames do not stand for {frames} pixel frames")
    rms = np.sqrt(np.mean(np.square(latents_bfhwc.astype(np.float64)), axis=(2, 3, 4)))
    return rms[:, -(-np.arange(frames) // step)]


def plot(drifts: Mapping[str, Drift], path: str | Path) -> None:
    """Draws the curves of several rollouts, one panel for each metric.

    Args:
        drifts: Rollouts by label.
        path: Image file to write; its suffix is the format.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for entry in drifts.values() for name in entry.curves))
    figure = Figure(figsize=(8, 2.2 * len(names)))
    band = 0.2 if len(drifts) <= 3 else 0.08  # where many lie over each other, the last would hide the rest
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True)
    for panel, name in zip(panels[:, 0], names, strict=True):
        for label, entry in drifts.items():
            if name in entry.curves:
                shown = entry.curves[name]
                frames = range(entry.given, entry.given + entry.frames)
                (line,) = panel.plot(frames, shown.mean, label=label)
                panel.fill_between(frames, shown.low, shown.high, color=line.get_color(), alpha=band)
        panel.set_ylabel(name.replace("_", " "))
        panel.grid(alpha=0.3)
    panels[0, 0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize="small")
    panels[-1, 0].set_xlabel("frame")
    with replaced(path) as unfinished:
        figure.savefig(unfinished, dpi=120, bbox_inches="tight")


def _interval(values_b: np.ndarray) -> Interval:
    low, high = metrics.bootstrap_interval(values_b)
    return Interval(float(values_b.mean()), float(low), float(high))
