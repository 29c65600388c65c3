"""`vidar generate`: continues given frames under scripted actions, a clip at a time."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--model", required=True, help="directory of a run, or a .safetensors file")
    parser.add_argument("--output", type=Path, required=True, help="video to write (.mp4)")
    parser.add_argument("--first", type=Path, help="image or video with the given frames; else generate from noise")
    parser.add_argument("--given", type=int, default=1, help="frames taken from --first")
    parser.add_argument("--frames", type=int, help="frames of the clip, given ones included (default: training length)")
    parser.add_argument("--actions", help="script such as '1*8,2*8', by number, repeated; default: no action")
    parser.add_argument("--clips", type=int, default=1, help="clips, each of its own seed, side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=8.0)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Generates."""
    import numpy as np

    from vidar.cli.scripts import action_track, given_frames
    from vidar.data.video import write_video
    from vidar.devices import enable_compilation_cache
    from vidar.errors import ConfigError
    from vidar.system import load
    from vidar.training.experiment import generate_clips

    enable_compilation_cache()
    system, model = load(options.model)
    video = system.config.video
    frames = options.frames or video.frames
    if options.clips < 1 or frames < 1:
        raise ConfigError(f"--clips={options.clips} and --frames={frames} must be at least 1")
    given = None
    if options.first is not None:
        given = np.repeat(given_frames(options.first, options.given, video.height, video.width), options.clips, axis=0)
    actions = action_track(model.config.actions, options.actions, frames)
    if actions is not None:
        actions = np.repeat(actions, options.clips, axis=0)
    clips = generate_clips(system, model, actions, given, frames, seed=options.seed, rows=options.clips)
    write_video(options.output, np.concatenate(list(clips), axis=2), options.fps)
    print(f"{options.output}: {options.clips} × {frames} frames of {video.width}×{video.height}")
    return 0
