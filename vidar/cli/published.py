"""Options of commands that sample published models, and what they say."""

import argparse
import sys
from typing import Any

MODEL = "directory of a run, a .safetensors file, a published model's folder or hub id"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    how = parser.add_argument_group("how published models are sampled")
    how.add_argument(
        "--recipe", help="wan, self_forcing or causvid (default: self_forcing with --weights x.pt, or wan)"
    )
    how.add_argument(
        "--weights", help="transformer in place of the folder's, such as a student's .pt or a run; path or hub id"
    )
    how.add_argument("--part", help="network of a PyTorch file, such as generator_ema")
    how.add_argument("--lora", help="adapter that is merged in; path or hub id")
    how.add_argument("--lora-scale", type=float, help="its strength (default: 1), times the alpha / rank that it holds")
    how.add_argument("--decoder", help="weights of TAEHV, to decode in place of the VAE; path or hub id")
    how.add_argument("--size", help="HEIGHTxWIDTH in pixels, multiples of 16 (default: 480x832)")
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


def load(options: argparse.Namespace, **changes: Any) -> Any:
    """Loads the model that the options name, with progress.

    Args:
        options: Parsed options of `add_arguments`, and `model`.
        changes: Options that are taken otherwise.

    Returns:
        The pipeline.
    """
    from tqdm import tqdm

    from vidar.interop.hub import local_folder
    from vidar.pipeline import load_pipeline

    chosen = _choices(argparse.Namespace(**vars(options) | changes))
    pipeline = load_pipeline(
        local_folder(options.model), chosen, lambda work: tqdm(work, unit="tensor", delay=1, leave=False)
    )
    if pipeline.model.config.text is not None:
        print(f"{options.model}: {described(pipeline)}", file=sys.stderr)
    return pipeline


def rate(options: argparse.Namespace, pipeline: Any) -> float:
    """Frames per second of a video, for an option `--fps` that may be left out."""
    usual = 8.0 if pipeline.model.config.text is None else 16.0
    return usual if options.fps is None else options.fps


def described(pipeline: Any) -> str:
    """How a pipeline samples, in a few words."""
    sampler = pipeline.system.sampler
    how = f"{sampler.solver.kind}, {sampler.solver.steps} steps, shift {sampler.solver.shift:g}"
    how += f", guidance {sampler.guidance[0].coefficient:g}" if len(sampler.guidance) > 1 else ", no guidance"
    return f"{how}, {f'chunks of {sampler.chunk} latent frames' if sampler.program.lag else 'all frames at once'}"


def _choices(options: argparse.Namespace) -> Any:
    from vidar.errors import ConfigError
    from vidar.interop.hub import local_folder
    from vidar.pipeline import Choices

    names = ("recipe", "part", "chunk", "solver", "steps", "shift", "guidance", "window", "sink")
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    given |= {name: getattr(options, name) for name in ("lora_scale", "precision", "codec_precision")}
    given["text_encoder_on_cpu"] = options.text_encoder_on_cpu or None
    for name in ("weights", "lora", "decoder"):
        given[name] = None if getattr(options, name) is None else local_folder(getattr(options, name))
    if options.lora_scale is not None and options.lora is None:
        raise ConfigError("--lora-scale is the strength of an adapter: give --lora too")
    if options.size is not None:
        height, _, width = options.size.partition("x")
        if not all(side.isdecimal() and len(side) < 6 for side in (height, width)):
            raise ConfigError(f"--size={options.size!r} should be HEIGHTxWIDTH in pixels, such as 480x832")
        given |= {"height": int(height), "width": int(width)}
    given = {name: value for name, value in given.items() if value is not None}
    return Choices(**given) if given else None
