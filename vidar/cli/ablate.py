"""`vidar ablate`: a grid of configs and seeds under equal budgets, resumable cell by cell, and its report."""

import argparse
import shlex
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("card", metavar="FILE", help="ablation's card, such as configs/ablations/smoke.py")
    parser.add_argument("--output", type=Path, help="receives everything; runs/ablations/NAME by default")
    parser.add_argument(
        "--cell", default="0/1", metavar="I/N", help="make every N-th cell from the I-th on (0 … N-1), and no others"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--report", action="store_true", help="make nothing; report what there is")
    what.add_argument("--recompute", action="store_true", help="measure the stored rollouts again; they must agree")
    what.add_argument("--slurm", type=int, metavar="N", help="make nothing; write scripts that use N jobs of Slurm")
    parser.epilog = "Any value of the card can be overridden: --config.budget.amount=10"
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the grid, or a part of it."""
    from vidar.ablation.card import load_ablation
    from vidar.ablation.findings import gather
    from vidar.ablation.grid import expand
    from vidar.ablation.slurm import write_scripts
    from vidar.ablation.worker import Layout, check_same, recompute, work
    from vidar.devices import enable_compilation_cache

    part = _part(options.cell)
    grid = expand(load_ablation(options.card, options.overrides), options.card)
    output = options.output or Path("runs/ablations") / grid.ablation.name
    if options.slurm is not None:
        if Layout(output.resolve()).record.exists():
            check_same(grid, output)
        script = write_scripts(options.card, output, options.overrides, options.slurm)
        print(f"written; submit all of it by: {shlex.join(['bash', str(script)])}")
        return 0
    enable_compilation_cache()
    if not (options.report or options.recompute):
        work(grid, output, part)
    check_same(grid, output)
    if options.recompute:
        print(f"{recompute(grid, output)} cells measured again: all equal")
        return 0
    findings = gather(grid, output)
    if findings.missing and not options.report and part != (0, 1):
        print(f"{len(findings.metrics)} of {len(grid.units)} cells are done; --report shows them")
        return 0
    _report(findings)
    return 0


def _report(findings: Any) -> None:
    from vidar.ablation.report import write_report
    from vidar.ablation.words import contrast_in_words, table_in_words

    path = write_report(findings)
    print("\n".join([*table_in_words(findings), *contrast_in_words(findings)]))
    if findings.missing:
        names = ", ".join(f"{name} seed {seed}" for name, seed in findings.missing)
        print(f"missing: {names}")
    print(f"{path} and {path.with_suffix('.md').name} beside it")


def _part(text: str) -> tuple[int, int]:
    from vidar.errors import ConfigError

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--cell={text}: write I/N with I in 0 … N-1, such as 0/4")
    return int(index), int(count)
