"""`vidar stream`: endless video under live actions, or of a prompt, written while it runs."""

import argparse
from pathlib import Path

from vidar.cli import published


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--model", required=True, help=published.MODEL)
    parser.add_argument("--output", type=Path, required=True, help="video to write while it runs (.mp4)")
    parser.add_argument("--first", type=Path, help="image or video that the stream starts from; else from noise")
    parser.add_argument("--given", type=int, default=1, help="frames taken from --first")
    parser.add_argument(
        "--frames",
        type=int,
        default=240,
        help="frames to stream after those given, rounded up to whole chunks (default: 240); 0 until interrupted",
    )
    parser.add_argument(
        "--actions",
        default=None,
        help="script such as '1*8,2*8', by number, repeated; '-' reads one action a tick from stdin",
    )
    parser.add_argument("--prompt", help="what the video shows, for models with text")
    parser.add_argument("--negative", default="", help="what it does not show, where text guides")
    parser.add_argument("--label", type=int, help="class of the video, for models with classes")
    parser.add_argument("--relative", action="store_true", help="window-relative positions, for very long streams")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=None, help="default: 16 for models with text, 8 for others")
    published.add_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Streams."""
    import signal
    import sys
    import time

    from tqdm import tqdm

    from vidar.cli.scripts import action_ticks, given_frames
    from vidar.data.video import VideoWriter, check_target
    from vidar.devices import enable_compilation_cache
    from vidar.errors import ConfigError, VidarError, check_range
    from vidar.streaming import Engine
    from vidar.system import streaming_sampler

    if options.frames < 0:
        raise ConfigError(f"--frames={options.frames}: a number of frames, or 0 until interrupted")
    check_range("--seed", options.seed, least=0)
    if options.first is None and options.given != 1:
        raise ConfigError(f"--given={options.given} says how many frames of --first are taken: give --first, too")
    check_target(options.output, options.fps)
    enable_compilation_cache()
    pipeline = published.load(options, window=None, sink=None)  # these are the stream's
    system, model = pipeline.system, pipeline.model
    prompts = None if options.prompt is None else [options.prompt]
    said = pipeline.told(prompts, options.negative, system.sampler)
    if not system.sampler.program.lag:
        raise ConfigError(
            f"{options.model}: makes whole clips at once; to stream, it must be causal (--recipe self_forcing)"
        )
    positions = "relative" if options.relative else None
    # A single image is a chunk of its own.
    alone = options.first is not None and options.given == 1 and system.config.video.chunk > 1
    sampler = streaming_sampler(system, options.window, options.sink, positions, first=alone)
    engine = Engine(sampler, pipeline.codec, model, **said)
    video = system.config.video
    step = pipeline.codec.config.frames_per_latent
    # The first of a stream's latent frames is one frame, each other `step`.
    latents = -(-(options.frames + (step - 1) * (options.first is None)) // step)
    ticks = -(-latents // sampler.chunk) if options.frames else None
    first = (
        None
        if options.first is None
        else given_frames(options.first, options.given, video.height, video.width, exact=model.config.text is None)
    )
    track = action_ticks(model.config.actions, options.actions, sampler.chunk, ticks, sys.stdin)
    opened = time.perf_counter()
    shown, count, first_frame = engine.open(options.seed, given=first, label=options.label), 0, 0.0
    mistake = None
    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        VideoWriter(options.output, published.rate(options, pipeline)) as writer,
        tqdm(total=options.frames or None, unit="frame") as bar,
    ):
        if shown is not None:
            writer.append(shown[0])
        try:
            # A person at the keyboard sees what an action did before the next one.
            for frames in engine.frames(track, ahead=0 if options.actions == "-" else 1):
                first_frame = first_frame or time.perf_counter() - opened
                writer.append(frames[0])
                count += frames.shape[1]
                bar.update(frames.shape[1])
        except KeyboardInterrupt:
            print("interrupted: the video so far is complete", file=sys.stderr)
        except VidarError as error:
            mistake = error  # such as an action that does not parse: what was made before it is kept
        finally:
            signal.signal(signal.SIGTERM, terminated)
    if mistake is not None and count:
        print(f"{options.output}: {count} frames, before this:", file=sys.stderr)
    if mistake is not None:
        raise mistake
    if not count:
        raise ConfigError("no frame was streamed: the actions ended before the first tick")
    seconds = time.perf_counter() - opened
    compiled = sum(engine.timing.compile.values())
    print(
        f"{options.output}: {count} frames, {count / seconds:.1f} frames/s, first after {first_frame * 1000:.0f} ms "
        f"(compiling took {compiled:.1f} s before that)"
    )
    return 0
