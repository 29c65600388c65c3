"""`vidar data`: makes the procedural world's data set, records ViZDoom, prepares text or teacher trajectories."""

import argparse
from pathlib import Path

from vidar.cli import trajectories


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    world = kinds.add_parser("world", help="the procedural world, as a prepared TFDS data set")
    world.add_argument("--directory", type=Path, required=True, help="TFDS data directory")
    sizes = "one_shape (16×16), captioned (20×20, one or two) or shapes (32×32, one to three)"
    world.add_argument("--config", default="one_shape", help=sizes)
    world.add_argument("--clips", type=int, default=8192, help="training clips")
    world.add_argument("--validation-clips", type=int, default=256)
    world.add_argument("--frames", type=int, default=16, help="frames of a clip")
    world.add_argument("--seed", type=int, default=0)
    world.set_defaults(run=_world)
    doom = kinds.add_parser("doom", help="ViZDoom gameplay by a scripted player (needs the doom extra); resumable")
    doom.add_argument("--output", type=Path, required=True, help="directory of the recording")
    doom.add_argument("--frames", type=int, default=60_000)
    doom.add_argument("--size", type=int, default=32, help="side of the square frames in pixels")
    doom.add_argument("--scenario", default=None, help="a scenario shipped with ViZDoom")
    doom.add_argument("--encoding", choices=("raw", "h264"), default="raw")
    doom.add_argument("--seed", type=int, default=0)
    doom.set_defaults(run=_doom)
    text = kinds.add_parser("embeddings", help="text states of prompts, computed once for training; resumable")
    text.add_argument("--model", required=True, help="folder or hub id of a published model with a text encoder")
    text.add_argument("--prompts", type=Path, help="file with a prompt on each line")
    text.add_argument("--tfds", help="instead: captions of a prepared TFDS set, such as vidar_world/shapes")
    text.add_argument("--directory", help="TFDS data directory")
    text.add_argument("--negative", help="also this text, which stands for dropped text (a card's `negative`)")
    text.add_argument("--output", type=Path, required=True, help="directory that receives them")
    text.add_argument("--rows", type=int, default=8, help="prompts encoded at once")
    text.add_argument("--text-encoder-on-cpu", action="store_true", help="keep the text encoder in host memory")
    text.set_defaults(run=_embeddings)
    pairs = kinds.add_parser("trajectories", help="a teacher's trajectories for few-step students; resumable")
    trajectories.add_arguments(pairs)


def _world(options: argparse.Namespace) -> int:
    from vidar.data.world.builder import prepare

    path = prepare(
        options.directory,
        options.config,
        clips=options.clips,
        validation_clips=options.validation_clips,
        frames=options.frames,
        seed=options.seed,
    )
    print(
        f"{path}: ready; train on it with data.tfds='vidar_world/{options.config}' data.directory='{options.directory}'"
    )
    return 0


def _doom(options: argparse.Namespace) -> int:
    from vidar.data import doom

    scenario = options.scenario or doom.SCENARIOS[0]
    doom.record(
        options.output,
        frames=options.frames,
        size=options.size,
        scenario=scenario,
        encoding=options.encoding,
        seed=options.seed,
    )
    print(f"{options.output}: ready; train on it with data.records='{options.output}'")
    return 0


def _embeddings(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from tqdm import tqdm

    from vidar.data.sources import captions, prompt_lines
    from vidar.errors import ConfigError
    from vidar.interop.folders import Folder
    from vidar.interop.hub import local_folder
    from vidar.pipeline import Choices, load_text_encoder
    from vidar.preparation.embeddings import EmbeddingCache

    if (options.prompts is None) == (options.tfds is None):
        raise ConfigError("give --prompts or --tfds, one of them")
    prompts = captions(options.tfds, options.directory) if options.tfds else prompt_lines(options.prompts)
    prompts = [*prompts, *([] if options.negative is None else [options.negative])]
    folder = Folder.find(local_folder(options.model))
    choices = Choices(text_encoder_on_cpu=options.text_encoder_on_cpu)
    encoder = replace(
        load_text_encoder(folder, choices, lambda work: tqdm(work, unit="tensor", delay=1, leave=False)),
        rows=options.rows,
    )
    cache = EmbeddingCache(options.output, encoder, encoder.identity)
    cache.prepare(prompts, lambda work: tqdm(work, unit="shard"))
    print(
        f"{options.output}: text states of {len(cache.embeddings)} prompts; train on them with "
        f"embeddings='{options.output}'"
    )
    return 0
