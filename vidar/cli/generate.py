"""`vidar generate`: clips from a prompt, an image, given frames or scripted actions."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--model", required=True, help="directory of a run, a .safetensors file, a published model's folder or hub id"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="video to write (.mp4), or a directory for several prompts"
    )
    what = parser.add_argument_group("what is shown")
    what.add_argument("--prompt", help="what the video shows, for models with text")
    what.add_argument("--prompts", type=Path, help="file with a prompt on each line; videos that exist are kept")
    what.add_argument("--negative", default="", help="what no video shows")
    what.add_argument("--first", type=Path, help="image or video that the clip begins with; else from noise")
    what.add_argument("--given", type=int, help="frames taken from --first (default: 1)")
    what.add_argument("--frames", type=int, help="frames of the clip, given ones included (default: the model's)")
    what.add_argument("--actions", help="script such as '1*8,2*8', by number, repeated; default: no action")
    what.add_argument("--label", type=int, help="class of the video, for models with classes")
    what.add_argument("--clips", type=int, default=1, help="clips, each of its own seed, side by side")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--fps", type=float, default=None, help="default: 16 for models with text, 8 for others")
    how = parser.add_argument_group("how published models are sampled")
    how.add_argument(
        "--recipe", help="wan, self_forcing or causvid (default: self_forcing with --weights x.pt, or wan)"
    )
    how.add_argument("--weights", type=Path, help="transformer in place of the folder's, such as a student's .pt")
    how.add_argument("--part", help="network of a PyTorch file, such as generator_ema")
    how.add_argument("--lora", type=Path, help="adapter that is merged in")
    how.add_argument("--lora-scale", type=float, help="its strength (default: 1), times the alpha / rank that it holds")
    how.add_argument("--decoder", type=Path, help="weights of TAEHV, to decode in place of the VAE")
    how.add_argument("--size", help="HEIGHTxWIDTH in pixels (default: 480x832)")
    how.add_argument("--chunk", type=int, help="latent frames a chunk, for causal models")
    how.add_argument("--solver", help="unipc, dpm++ or euler")
    how.add_argument("--steps", type=int, help="solver steps")
    how.add_argument("--shift", type=float, help="time shift")
    how.add_argument("--guidance", type=float, help="scale of guidance by text; 1 for none")
    how.add_argument("--window", type=int, help="latent frames that a chunk may see, for long videos")
    how.add_argument("--sink", type=int, help="first latent frames that stay in view")
    how.add_argument("--precision", choices=("bfloat16", "float32"), help="types of transformer and encoders")
    how.add_argument("--codec-precision", choices=("bfloat16", "float32"), help="types of the codec (default: float32)")
    how.add_argument("--text-encoder-on-cpu", action="store_true", help="keep the text encoder in host memory")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Generates."""
    from tqdm import tqdm

    from vidar.devices import enable_compilation_cache
    from vidar.errors import ConfigError, check_range
    from vidar.interop.hub import local_folder
    from vidar.pipeline import load_pipeline

    for name in ("clips", "frames", "given"):
        check_range(f"--{name}", getattr(options, name), least=1)
    if options.given is not None and options.first is None:
        raise ConfigError(f"--given={options.given} takes frames from --first: name an image or video, or leave it out")
    work = _work(options)
    if not work:
        print(f"{options.output}: holds all of these videos already")
        return 0
    enable_compilation_cache()
    pipeline = load_pipeline(
        local_folder(options.model), _choices(options), lambda work: tqdm(work, unit="tensor", delay=1, leave=False)
    )
    for prompt, path in tqdm(work, unit="video", disable=len(work) == 1):
        _write(options, pipeline, prompt, path)
    return 0


def _work(options: argparse.Namespace) -> list[tuple[str | None, Path]]:
    """Prompts and the videos to make of them, without those that exist."""
    from vidar.cli.scripts import prompt_lines
    from vidar.errors import ConfigError

    if options.prompts is None:
        return [(options.prompt, options.output)]
    if options.prompt is not None:
        raise ConfigError("--prompt and --prompts: give one of them")
    if options.output.suffix:
        raise ConfigError(f"--output={options.output}: several prompts need a directory")
    prompts = prompt_lines(options.prompts)
    files = [(prompt, options.output / f"{number:04d}.mp4") for number, prompt in enumerate(prompts)]
    return [(prompt, path) for prompt, path in files if not path.exists()]


def _choices(options: argparse.Namespace) -> Any:
    """What was said about published models."""
    from vidar.errors import ConfigError
    from vidar.models.layers import Precision
    from vidar.pipeline import Choices

    names = ("recipe", "weights", "part", "decoder", "chunk", "solver", "steps", "shift", "guidance", "window", "sink")
    given: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    renamed = {"adapter": options.lora, "adapter_scale": options.lora_scale}
    given |= {name: value for name, value in renamed.items() if value is not None}
    for name in ("precision", "codec_precision"):
        if getattr(options, name) is not None:
            given[name] = Precision(getattr(options, name), getattr(options, name))
    if options.text_encoder_on_cpu:
        given["text_encoder_on_cpu"] = True
    if options.size is not None:
        height, _, width = options.size.partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            raise ConfigError(f"--size={options.size!r} should be HEIGHTxWIDTH in pixels, such as 480x832")
        given |= {"height": int(height), "width": int(width)}
    return Choices(**given)


def _write(options: argparse.Namespace, pipeline: Any, prompt: str | None, path: Path) -> None:
    import numpy as np

    from vidar.cli.scripts import action_track, given_frames
    from vidar.data.video import VideoWriter, read_video
    from vidar.errors import ConfigError

    video, model = pipeline.system.config.video, pipeline.model.config
    frames = options.frames or pipeline.codec.config.pixel_frames(video.frames)
    shown: dict[str, Any] = {"label": options.label, "seed": options.seed, "rows": options.clips}
    if prompt is not None:
        shown |= {"prompts": [prompt] * options.clips, "negative": options.negative}
    if options.first is not None and model.image is not None:
        shown["image"] = np.repeat(read_video(options.first)[:1], options.clips, axis=0)
    elif options.first is not None:
        count = options.given or 1
        if frames <= count:
            raise ConfigError(f"--frames={frames} must be above --given={count}: it counts given frames, too")
        first = given_frames(options.first, count, video.height, video.width, exact=model.text is None)
        shown["given"] = np.repeat(first, options.clips, axis=0)
    actions = action_track(model.actions, options.actions, frames)
    if actions is not None:
        shown["actions"] = np.repeat(actions, options.clips, axis=0)
    with VideoWriter(path, options.fps or (16.0 if model.text else 8.0)) as writer:
        clips = pipeline.generate(frames, **shown)
        writer.append(np.concatenate(list(clips), axis=2))
    print(f"{path}: {options.clips} × {frames} frames of {video.width}×{video.height}")
