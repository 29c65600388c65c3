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
    parser.add_argument("--output", type=Path, required=True, help="directory that receives drift.json and drift.png")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures drift."""
    import json
    from dataclasses import asdict

    from vidar.errors import make_directory
    from vidar.evaluation.drift import plot
    from vidar.evaluation.writing import replaced

    if options.video is None:
        truth = _common_truth(options.truth)
        titles = _titles(options.rollouts)
        found = {title: _rollout(path, truth) for title, path in zip(titles, options.rollouts, strict=True)}
    else:
        found = {"video": _measured(options.video, options.truth)}
    make_directory(options.output)
    with replaced(options.output / "drift.json") as unfinished:
        unfinished.write_text(json.dumps({title: asdict(entry) for title, entry in found.items()}, indent=2) + "\n")
    plot(found, options.output / "drift.png")
    for title, entry in found.items():
        intervals = "the intervals are of the mean over videos" if entry.videos > 1 else "no intervals from one video"
        print(f"{title}: {entry.videos} video(s) of {entry.frames} frames; {intervals}")
        for name, curve in entry.curves.items():
            ends = f"{curve.mean[0]:10.4g} → {curve.mean[-1]:10.4g}"
            change, slope = (_shown(part, entry.videos) for part in (curve.change, curve.slope))
            print(f"  {name:20s} {ends}   end - start {change}   per frame {slope}")
    print(f"{options.output}: drift.json, drift.png")
    return 0


def _shown(interval: Any, videos: int) -> str:
    return f"{interval.mean:+.4g}" + (f" [{interval.low:+.4g}, {interval.high:+.4g}]" if videos > 1 else "")


def _measured(paths: list[Path], truth: list[Path] | None) -> Any:
    """Drift of video files."""
    from vidar.errors import ConfigError
    from vidar.evaluation.drift import drift

    if truth is not None and len(truth) != len(paths):
        raise ConfigError(f"--truth: {len(truth)} files for the {len(paths)} of --video; give one for each")
    try:
        return drift(_videos("--video", paths), None if truth is None else _videos("--truth", truth))
    except ConfigError as error:
        raise ConfigError(f"--video: {error}") from error


def _videos(option: str, paths: list[Path]) -> Any:
    """Video files as one array `[b, f, h, w, 3]`."""
    import numpy as np

    from vidar.data.video import read_video
    from vidar.errors import DataError

    if option == "--video" and len(set(paths)) < len(paths):
        raise DataError(f"{option}: a file is named twice, but rollouts are counted as independent")
    clips = [read_video(path) for path in paths]
    for path, clip in zip(paths, clips, strict=True):
        if clip.shape != clips[0].shape:
            sizes = [f"{len(one)} frames of {one.shape[2]}×{one.shape[1]}" for one in (clip, clips[0])]
            raise DataError(f"{option}: {path} has {sizes[0]}, {paths[0]} {sizes[1]}; measure them one by one")
    return np.stack(clips)


def _rollout(path: Path, truth: Any) -> Any:
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
        return drift(video, truth, extra)
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
    """A name for each file; that of its directory as well where several are named alike."""
    stems = [path.stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]
