"""`vidar convert`: published checkpoints from one layout to another."""

import argparse
from pathlib import Path

_STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--source", required=True, help=".safetensors, its index, .pt or .pth, or a directory with one")
    parser.add_argument("--part", help="network of a PyTorch file, such as generator_ema (default: generator or model)")
    parser.add_argument("--output", type=Path, required=True, help="directory, or a .safetensors or .pt file")
    parser.add_argument("--layout", required=True, choices=("original", "diffusers"), help="names and forms to write")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a transformer's head (Wan: 128)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Converts."""
    from tqdm import tqdm

    from vidar.errors import check_range
    from vidar.interop import wan
    from vidar.interop.sources import open_tensors
    from vidar.interop.tables import renamed
    from vidar.interop.targets import save_tensors, write_json

    check_range("--head-dim", options.head_dim, least=2)
    tensors = open_tensors(options.source, options.part)
    found = wan.recognise(tensors, options.head_dim)
    converted = renamed(tensors, found.template, found.table, found.layout, options.layout)
    stem = _STEMS[found.kind] if options.layout == "diffusers" else "model"
    files = save_tensors(options.output, converted, stem=stem, progress=lambda work: tqdm(work, unit="file"))
    if options.layout == "diffusers" and not options.output.suffix:
        files.append(options.output / "config.json")
        write_json(files[-1], wan.diffusers_config(found.config))
    size = sum(file.stat().st_size for file in files)
    print(f"{options.output}: a {found.kind} of {len(converted)} tensors, {size / 2**30:.2f} GiB in {len(files)} files")
    return 0
