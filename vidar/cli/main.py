"""`vidar`: dispatches to its commands; a person's mistake gets one line on stderr and exit code 2."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from vidar.errors import VidarError

COMMANDS = {
    "quickstart": "train on the procedural world, stream the result and the shipped model, compare with ground truth",
    "train": "train a system from an experiment card",
    "generate": "generate clips: from a prompt, an image, given frames or actions",
    "stream": "stream endless video under live actions, writing it while it runs",
    "eval": "measure a trained model: actions, captions, exact errors on the procedural world, drift",
    "ablate": "train a grid of configs and seeds under equal budgets, and report what it shows",
    "data": "make the procedural world's data set, record ViZDoom, prepare text states or a teacher's trajectories",
    "convert": "turn published checkpoints from one layout into another",
    "bench": "measure streaming or training",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Command line without the program's name; None takes the process's.

    Returns:
        Exit code: 0; 2 after a mistake that the person can mend; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="vidar", description="Autoregressive video diffusion in JAX: train, generate, stream."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Only the chosen command is imported: starting up stays fast, and needs what that command needs.
    chosen = next((word for word in given if word in COMMANDS), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            importlib.import_module(f"vidar.cli.{name}").add_arguments(command)
    options, overrides = parser.parse_known_args(given)
    unknown = [word for word in overrides if not word.startswith("--config.")]
    if unknown or (overrides and chosen not in ("train", "ablate")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or overrides)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    options.overrides = tuple(overrides)
    try:
        return int(options.run(options) or 0)
    except VidarError as error:
        print(f"vidar {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vidar {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        print(
            f"vidar {options.command}: {error.filename or 'a file'}: {error.strerror or error}"[:400], file=sys.stderr
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
