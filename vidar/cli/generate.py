"""`vidar generate`: clips from a prompt, an image, given frames or scripted actions."""

import argparse
from pathlib import Path
from typing import Any

from vidar.cli import published


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--model", required=True, help=published.MODEL)
    parser.add_argument(
        "--output", type=Path, required=True, help="video to write (.mp4), or a directory for several prompts"
    )
    what = parser.add_argument_group("what is shown")
    what.add_argument("--prompt", help="what the video shows, for models with text")
    what.add_argument("--prompts", type=Path, help="file with a prompt on each line; videos that exist are kept")
    what.add_argument("--negative", default="", help="what no video shows")
    what.add_argument("--first", type=Path, help="image or video that the clip begins with; else from noise")
    what.add_argument(
        "--given", type=int, help="frames taken from --first (default: 1; 9 + 12 n for published students)"
    )
    what.add_argument("--video", type=Path, help="video to make the clip from: noised, and finished from there")
    what.add_argument("--strength", type=float, help="noise put into --video (default: 0.8); 1 leaves nothing of it")
    what.add_argument("--frames", type=int, help="frames of the clip, given ones included (default: the model's)")
    what.add_argument("--actions", help="script such as '1*8,2*8', by number, repeated; default: no action")
    what.add_argument("--label", type=int, help="class of the video, for models with classes")
    what.add_argument("--clips", type=int, default=1, help="clips, each of its own seed, side by side")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--fps", type=float, default=None, help="default: 16 for models with text, 8 for others")
    published.add_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Generates."""
    from tqdm import tqdm

    from vidar.data.video import check_target
    from vidar.devices import enable_compilation_cache
    from vidar.errors import ConfigError, check_range

    for name in ("clips", "frames", "given"):
        check_range(f"--{name}", getattr(options, name), least=1)
    check_range("--seed", options.seed, least=0)
    if options.strength is not None and options.video is None:
        raise ConfigError(f"--strength={options.strength} is noise put into --video: name a video, or leave it out")
    if options.video is not None and options.first is not None:
        raise ConfigError("--video and --first: a clip begins with one of them or is made from the other; give one")
    if options.given is not None and options.first is None:
        raise ConfigError(f"--given={options.given} takes frames from --first: name an image or video, or leave it out")
    work = _work(options)
    if not work:
        print(f"{options.output}: holds all of these videos already; to make them otherwise, name another directory")
        return 0
    for _, path in work:
        check_target(path, options.fps)
    enable_compilation_cache()
    pipeline = published.load(options)
    for prompt, path in tqdm(work, unit="video", disable=len(work) == 1):
        _write(options, pipeline, prompt, path)
    return 0


def _work(options: argparse.Namespace) -> list[tuple[str | None, Path]]:
    """Prompts and the videos to make of them, without those that exist."""
    from vidar.data.sources import prompt_lines
    from vidar.errors import ConfigError

    if options.prompts is None and options.output.suffix != ".mp4":
        raise ConfigError(f"--output={options.output}: videos are written as .mp4; a directory is for --prompts")
    if options.prompts is None:
        return [(options.prompt, options.output)]
    if options.prompt is not None:
        raise ConfigError("--prompt and --prompts: give one of them")
    if options.output.suffix:
        raise ConfigError(f"--output={options.output}: several prompts need a directory")
    prompts = prompt_lines(options.prompts)
    _record(options, prompts)
    files = [(prompt, options.output / f"{number:04d}.mp4") for number, prompt in enumerate(prompts)]
    return [(prompt, path) for prompt, path in files if not path.exists()]


def _record(options: argparse.Namespace, prompts: list[str]) -> None:
    """Keeps beside the videos what they are made of, and refuses to go on with something else."""
    import json

    from vidar.errors import DataError
    from vidar.weights import whole_file

    path = options.output / "made.json"
    free = ("output", "prompts", "run", "command", "overrides", "fps", "text_encoder_on_cpu")
    chosen = {name: str(value) for name, value in vars(options).items() if name not in free}
    if path.exists():
        try:
            known = json.loads(path.read_text())
            before, settings = known["prompts"], known["options"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error}); name another directory") from error
        changed = [f"--{name.replace('_', '-')}" for name in chosen if settings.get(name) != chosen[name]]
        changed += ["--prompts"] if prompts[: len(before)] != before else []
        if changed:
            raise DataError(f"{options.output}: holds videos made with another {changed[0]}; name another directory")
    with whole_file(path) as file:
        file.write((json.dumps({"prompts": prompts, "options": chosen}, indent=1) + "\n").encode())


def _write(options: argparse.Namespace, pipeline: Any, prompt: str | None, path: Path) -> None:
    import numpy as np
    from tqdm import tqdm

    from vidar.cli.scripts import action_track, given_frames
    from vidar.data.video import VideoWriter, read_video
    from vidar.errors import ConfigError

    video, model = pipeline.system.config.video, pipeline.model.config
    count = None if options.first is None or model.image is not None else options.given or 1
    frames = options.frames or pipeline.frames(count)
    shown: dict[str, Any] = {name: getattr(options, name) for name in ("label", "seed", "negative")}
    shown["rows"] = options.clips
    if prompt is not None:
        shown["prompts"] = [prompt] * options.clips
    if options.given is not None and model.image is not None:
        raise ConfigError(f"--given={options.given}: this model begins with an image alone; leave it out")
    if options.first is not None and model.image is not None:
        shown["image"] = np.repeat(read_video(options.first)[:1], options.clips, axis=0)
    elif options.first is not None and count is not None:
        if frames <= count:
            raise ConfigError(f"--frames={frames} must be above --given={count}: it counts given frames, too")
        first = given_frames(options.first, count, video.height, video.width, exact=model.text is None)
        shown["given"] = np.repeat(first, options.clips, axis=0)
    if options.video is not None:
        size = video.height, video.width
        whole = given_frames(options.video, frames, *size, exact=model.text is None, option="--frames")
        shown["video"] = np.repeat(whole, options.clips, axis=0)
        if options.strength is not None:
            shown["strength"] = options.strength
    actions = action_track(model.actions, options.actions, frames)
    if actions is not None:
        shown["actions"] = np.repeat(actions, options.clips, axis=0)
    clips = pipeline.generate(frames, **shown)
    with VideoWriter(path, published.rate(options, pipeline)) as writer:
        try:
            writer.append(np.concatenate(list(clips), axis=2))
        except BaseException:
            writer.discard()  # half a clip would pass for a whole one
            raise
    tqdm.write(f"{path}: {options.clips} × {frames} frames of {video.width}×{video.height}")
