"""`vidar eval drift`: how videos change with the index of their frames, whoever made them."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--video", type=Path, nargs="+", help="video files of equal size and length: one rollout of each")
    what.add_argument(
        "--rollouts",
        type=Path,
        nargs="+",
        help="arrays (.npz), a curve for each file: `video` uint8 [b, f, h, w, 3], and where there are any `truth` "
        "likewise, `latents` [b, f, h, w, c], and further metrics by name, float or bool [b, f]",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        nargs="+",
        help="what should have been seen: a file for each --video, or for all --rollouts one .npz with `truth`, "
        "`pixels` or `video`",
    )
    parser.add_argument(
        "--given", type=int, default=0, help="first frames that were given, and are left out (default: 0)"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory that receives drift.json and drift.png")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures drift."""
    import json
    from dataclasses import asdict

    from vidar.errors import check_range, make_directory
    from vidar.evaluation.drift import part_of, plot
    from vidar.evaluation.writing import replaced

    check_range("--given", options.given, least=0)
    _check_once("--rollouts" if options.video is None else "--video", options.video or options.rollouts)
    if options.video is None:
        truth = _common_truth(options.truth)
        titles = _titles(options.rollouts)
        found = {t: _rollout(path, truth, options.given) for t, path in zip(titles, options.rollouts, strict=True)}
    else:
        found = {"video": _measured(options.video, options.truth, options.given)}
    make_directory(options.output)
    with replaced(options.output / "drift.json") as unfinished:
        unfinished.write_text(json.dumps({title: asdict(entry) for title, entry in found.items()}, indent=2) + "\n")
    plot(found, options.output / "drift.png")
    for title, entry in found.items():
        intervals = "the intervals are of the mean over videos" if entry.videos > 1 else "no intervals from one video"
        print(f"{title}: {entry.videos} video(s) of {entry.frames} frames; {intervals}")
        print("  means of the first and the last 15 % of the frames, their difference, and the slope over 100 frames:")
        part = part_of(entry.frames)
        for name, curve in entry.curves.items():
            start, end = (sum(values) / part for values in (curve.mean[:part], curve.mean[-part:]))
            change, slope = _shown(curve.change, entry.videos), _shown(curve.slope, entry.videos, 100)
            print(f"  {name:20s} {start:10.4g} → {end:10.4g}   change {change}   slope {slope}")
    print(f"{options.output}: drift.json, drift.png")
    return 0


def _check_once(option: str, paths: list[Path]) -> None:
    """Rollouts are independent of each other, so that none counts twice."""
    from vidar.errors import DataError

    if len(set(paths)) < len(paths):
        raise DataError(f"{option}: a file is named twice, but rollouts are counted as independent")


def _shown(interval: Any, videos: int, factor: float = 1) -> str:
    mean, low, high = (factor * value for value in (interval.mean, interval.low, interval.high))
    return f"{mean:+.4g}" + (f" [{low:+.4g}, {high:+.4g}]" if videos > 1 else "")


def _measured(paths: list[Path], truth: list[Path] | None, given: int) -> Any:
    """Drift of video files."""
    from vidar.errors import ConfigError
    from vidar.evaluation.drift import drift

    if truth is not None and len(truth) != len(paths):
        raise ConfigError(f"--truth: {len(truth)} files for the {len(paths)} of --video; give one for each")
    try:
        seen = None if truth is None else _videos("--truth", truth)
        return drift(_videos("--video", paths), seen, given=given)
    except ConfigError as error:
        raise ConfigError(f"--video: {error}") from error


def _videos(option: str, paths: list[Path]) -> Any:
    """Video files as one array `[b, f, h, w, 3]`."""
    import numpy as np

    from vidar.data.video import read_video
    from vidar.errors import DataError

    clips = [read_video(path) for path in paths]
    for path, clip in zip(paths, clips, strict=True):
        if clip.shape != clips[0].shape:
            sizes = [f"{len(one)} frames of {one.shape[2]}×{one.shape[1]}" for one in (clip, clips[0])]
            raise DataError(f"{option}: {path} has {sizes[0]}, {paths[0]} {sizes[1]}; measure them one by one")
    return np.stack(clips)


def _rollout(path: Path, truth: Any, given: int) -> Any:
    """Drift of the arrays of a file."""
    from vidar.errors import ConfigError, DataError
    from vidar.evaluation.drift import drift, latent_rms

    arrays = _arrays(path)
    video = _pixels(path, arrays, "video")
    if "truth" in arrays:
        truth = _pixels(path, arrays, "truth")
    extra = {name: x for name, x in arrays.items() if x.shape == video.shape[:2] and x.dtype.kind in "fb"}
    try:
        if "latents" in arrays:
            extra["latent_rms"] = latent_rms(arrays["latents"], video.shape[1])
        return drift(video, truth, extra, given)
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from error


def _common_truth(paths: list[Path] | None) -> Any:
    """What all rollouts should have shown."""
    from vidar.errors import ConfigError

    if paths is None:
        return None
    if len(paths) > 1:
        raise ConfigError(f"--truth: {len(paths)} files; --rollouts take one for all, or hold their own as `truth`")
    arrays = _arrays(paths[0])
    return _pixels(paths[0], arrays, next((name for name in ("truth", "pixels") if name in arrays), "video"))


def _arrays(path: Path) -> dict[str, Any]:
    import zipfile
    import zlib

    import numpy as np

    from vidar.errors import DataError

    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as arrays (.npz): {' '.join(str(error).split())[:200]}") from error


def _pixels(path: Path, arrays: dict[str, Any], name: str) -> Any:
    import numpy as np

    from vidar.errors import DataError

    value = arrays.get(name)
    if value is None or value.dtype != np.uint8 or value.ndim != 5 or value.shape[-1] != 3:
        held = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
        raise DataError(f"{path}: `{name}` should be uint8 [videos, frames, height, width, 3]; it holds {held}")
    if not value.size:
        raise DataError(f"{path}: `{name}` is empty: {list(value.shape)}")
    return value


def _titles(paths: list[Path]) -> list[str]:
    """A name for each file; where several are named alike, what tells their places apart."""
    import os

    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    places = [Path(os.path.abspath(path)).with_suffix("") for path in paths]
    common = os.path.commonpath(places)
    names = [place.relative_to(common) for place in places]
    return [str(name.parent) if len(set(stems)) == 1 else str(name) for name in names]
