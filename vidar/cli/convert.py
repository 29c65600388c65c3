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
        help="directory, or a .safetensors or .pt file; a directory's conversion goes on where it was interrupted",
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
    from vidar.interop.networks import KINDS, read_settings, recognise
    from vidar.interop.sources import open_tensors
    from vidar.interop.targets import fingerprint, save_tensors, size, write_json

    check_range("--head-dim", options.head_dim, least=2)
    check_range("--lora-scale", options.lora_scale)
    if options.lora_scale is not None and options.lora is None:
        raise ConfigError("--lora-scale is the strength of an adapter: give --lora too")
    source = local_folder(options.source)
    if options.output.resolve() in (source.resolve(), source.resolve().parent):
        raise ConfigError(f"--output {options.output} is where the source lies; name another directory")
    tensors = open_tensors(source, options.part)
    settings = read_settings(source)
    if options.head_dim is not None:
        settings["attention_head_dim"] = options.head_dim
    found = recognise(tensors, settings)
    scale, adapter = 1.0 if options.lora_scale is None else options.lora_scale, None
    if options.lora is not None:
        adapter = local_folder(options.lora)
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
