"""`vidar train`: trains a system from an experiment card, resuming where it stopped."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="experiment card, such as configs/world/teacher_forcing.py"
    )
    parser.add_argument("--workdir", required=True, type=Path, help="receives checkpoints, metrics and sample sheets")
    parser.add_argument(
        "--distributed", action="store_true", help="start jax.distributed (also read from the environment)"
    )
    parser.epilog = "Any value of the card can be overridden: --config.training.steps=100 --config.mesh.fsdp=8"
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trains."""
    from vidar.devices import enable_compilation_cache
    from vidar.training.distributed import initialize

    initialize(True if options.distributed else None)
    enable_compilation_cache()
    from vidar.training.experiment import load_run_config, make_run
    from vidar.training.loop import train

    train(make_run(load_run_config(options.config, options.overrides)), options.workdir)
    return 0
