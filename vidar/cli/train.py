"""`vidar train`: trains a system from an experiment card, resuming where it stopped."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="experiment card, such as configs/world/teacher_forcing.py"
    )
    parser.add_argument("--workdir", type=Path, help="receives checkpoints, metrics and sample sheets")
    parser.add_argument(
        "--distributed", action="store_true", help="start jax.distributed (also read from the environment)"
    )
    parser.add_argument("--lower-only", action="store_true", help="compile each phase for --topology; train nothing")
    parser.add_argument("--topology", default="v5p:2x2x2", metavar="NAME", help="TPUs to compile for, such as v5e:4x8")
    parser.epilog = "Any value of the card can be overridden: --config.training.steps=100 --config.mesh.fsdp=8"
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trains, or says what a step takes."""
    from vidar.errors import ConfigError

    if options.lower_only:
        return _lower(options)
    if options.workdir in (None, Path()):
        raise ConfigError("--workdir is missing: a directory that receives checkpoints, metrics and sample sheets")
    from vidar.devices import enable_compilation_cache
    from vidar.training.distributed import initialize

    initialize(True if options.distributed else None)
    enable_compilation_cache()
    from vidar.training.experiment import load_run_config, make_run
    from vidar.training.loop import is_complete, train

    run = make_run(load_run_config(options.config, options.overrides))
    state = train(run, options.workdir)
    if not is_complete(run, state):
        raise KeyboardInterrupt
    updates = ", ".join(f"{int(count)} of {phase}" for phase, count in state.updates.items())
    print(f"{options.workdir}: trained and saved; updates: {updates}")
    return 0


def _lower(options: argparse.Namespace) -> int:
    """Prints the memory of each phase on each chip of a topology."""
    from vidar.benchmark.cards import compile_card
    from vidar.benchmark.lowering import described, topology_mesh
    from vidar.training.experiment import load_run_config

    config = load_run_config(options.config, options.overrides)
    for phase, found in compile_card(config, topology_mesh(options.topology, config.mesh)).items():
        print(f"{phase}: {described(found, options.topology)}", flush=True)
    return 0
