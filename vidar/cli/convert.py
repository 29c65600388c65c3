"""`vidar convert`: published checkpoints from one layout to another, with adapters merged in."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--source",
        required=True,
        help=".safetensors, its index, .pt or .pth, a directory with one, or owner/name[/path][@revision] of the "
        "Hugging Face hub",
    )
    parser.add_argument("--part", help="network of a PyTorch file, such as generator_ema (default: generator or model)")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="directory, whose conversion goes on where it was interrupted; or a .safetensors file, a .pth as Wan's, "
        "or a .pt as Self Forcing's",
    )
    parser.add_argument("--layout", required=True, choices=("original", "diffusers"), help="names and forms to write")
    parser.add_argument(
        "--head-dim", type=int, help="channels of a head, where no config.json tells (default: as published)"
    )
    parser.add_argument("--lora", help="adapter to merge into the weights; given as the source is, in either layout")
    parser.add_argument(
        "--lora-scale",
        type=float,
        help="its strength (default: 1), times the alpha / rank that it holds; where alpha is only in a training "
        "config, as LongLive's, give alpha / rank",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Converts."""
    from tqdm import tqdm

    from vidar.errors import ConfigError, check_range
    from vidar.interop.hub import local_folder
    from vidar.interop.lora import merged_into, open_adapter
    from vidar.interop.networks import KINDS, open_network
    from vidar.interop.targets import checkpoint_files, fingerprint, save_tensors, size, write_json

    check_range("--head-dim", options.head_dim, least=2)
    check_range("--lora-scale", options.lora_scale)
    if options.lora_scale is not None and options.lora is None:
        raise ConfigError("--lora-scale is the strength of an adapter: give --lora too")
    source = local_folder(options.source)
    adapter = None if options.lora is None else local_folder(options.lora)
    read = [file.resolve() for path in (source, adapter) if path is not None for file in checkpoint_files(path)]
    output = options.output.resolve()
    if str(options.output) == "." or output in (source.resolve(), *read, *(file.parent for file in read)):
        raise ConfigError(f"--output {options.output} is where the source or the adapter lies; name another place")
    found = open_network(source, options.part, head_dim=options.head_dim)
    if options.output.suffix == ".pt" and found.kind != "transformer":
        raise ConfigError(f"--output {options.output}: a .pt file holds a student's transformer; name a .pth file")
    scale = 1.0 if options.lora_scale is None else options.lora_scale
    if adapter is not None:
        found = merged_into(found, open_adapter(adapter), scale)
    converted = found.converted(options.layout)
    stem = KINDS[found.kind].stem if options.layout == "diffusers" else "model"
    choices = {name: getattr(options, name) for name in ("part", "layout", "head_dim")}
    origin = fingerprint(source, adapter, **choices, scale=scale)
    with tqdm(total=size(converted), unit="B", unit_scale=True, unit_divisor=1024, delay=1) as bar:
        files = save_tensors(options.output, converted, stem=stem, source=origin, progress=bar.update)
    if options.layout == "diffusers" and options.output.is_dir():
        files.append(options.output / "config.json")
        write_json(files[-1], found.settings)
    gibibytes = sum(file.stat().st_size for file in files) / 2**30
    merged = f" with {adapter} merged in" if adapter else ""
    print(
        f"{options.output}: a {found.kind} of {len(converted)} tensors{merged}, {gibibytes:.2f} GiB in {len(files)} "
        "files"
    )
    return 0
