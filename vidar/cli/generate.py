"""`vidar generate`: continues given frames under scripted actions, a clip at a time."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--model", required=True, help="directory of a run, or a .safetensors file")
    parser.add_argument("--output", type=Path, required=True, help="video to write (.mp4)")
    parser.add_argument("--first", type=Path, help="image or video with the given frames; else generate from noise")
    parser.add_argument("--given", type=int, help="frames taken from --first (default: 1)")
    parser.add_argument("--frames", type=int, help="frames of the clip, given ones included (default: training length)")
    parser.add_argument("--actions", help="script such as '1*8,2*8', by number, repeated; default: no action")
    parser.add_argument("--label", type=int, help="class of the video, for models with classes")
    parser.add_argument("--clips", type=int, default=1, help="clips, each of its own seed, side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=8.0)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Generates."""
    import numpy as np

    from vidar.cli.scripts import action_track, given_frames
    from vidar.data.video import VideoWriter
    from vidar.devices import enable_compilation_cache
    from vidar.errors import ConfigError, check_range
    from vidar.system import load
    from vidar.training.experiment import generate_clips

    for name in ("clips", "frames", "given"):
        check_range(f"--{name}", getattr(options, name), least=1)
    if options.given is not None and options.first is None:
        raise ConfigError(f"--given={options.given} takes frames from --first: name an image or video, or leave it out")
    enable_compilation_cache()
    system, model = load(options.model)
    video = system.config.video
    frames = options.frames or video.frames
    given = None
    if options.first is not None:
        count = options.given or 1
        if frames <= count:
            raise ConfigError(f"--frames={frames} must be above --given={count}: it counts given frames, too")
        given = np.repeat(given_frames(options.first, count, video.height, video.width), options.clips, axis=0)
    actions = action_track(model.config.actions, options.actions, frames)
    if actions is not None:
        actions = np.repeat(actions, options.clips, axis=0)
    with VideoWriter(options.output, options.fps) as writer:
        clips = generate_clips(
            system, model, actions, given, frames, seed=options.seed, rows=options.clips, label=options.label
        )
        writer.append(np.concatenate(list(clips), axis=2))
    print(f"{options.output}: {options.clips} × {frames} frames of {video.width}×{video.height}")
    return 0
