"""Scripts for Slurm: an array of jobs that share an ablation's cells, and a last one that gathers.

Plain bash without a site's names; partitions and accounts come from the environment (`SBATCH_PARTITION`, …) or from
edits of the files. This module must not know cells.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from vidar.errors import check_range
from vidar.evaluation.writing import replaced

_CELLS = """#!/usr/bin/env bash
# Each job makes cells {count} apart, and waits for stages that another one makes. Two minutes before its time ends it
# is told to stop, and stops in order; a job that was requeued, or submitted again, goes on where it was.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output="{output}/slurm/%A_%a.log"
set -euo pipefail
exec {command} --cell "$SLURM_ARRAY_TASK_ID/{count}"
"""

_REPORT = """#!/usr/bin/env bash
#SBATCH --job-name={name}-report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output="{output}/slurm/report.log"
set -euo pipefail
exec {command} --report
"""

_SUBMIT = """#!/usr/bin/env bash
# Submits all jobs; options are handed to sbatch, such as --gpus-per-task=1 --time=08:00:00.
set -euo pipefail
cells=$(sbatch --parsable "$@" {folder}/cells.sbatch)
sbatch --dependency="afterany:${{cells%%;*}}" "$@" {folder}/report.sbatch
"""


def write_scripts(card: str, output: Path, overrides: Sequence[str], count: int) -> Path:
    """Writes `cells.sbatch`, `report.sbatch` and `submit.sh`.

    Args:
        card: File of the ablation's card, as given.
        output: Directory of the ablation.
        overrides: Overrides of the card.
        count: Jobs of the array.

    Returns:
        The script that submits them.

    Raises:
        ConfigError: There would be no job.
    """
    check_range("--slurm", count, least=1)
    command = shlex.join(["vidar", "ablate", card, "--output", str(output), *overrides])
    folder = output / "slurm"
    name = Path(card).stem
    texts = {
        "cells.sbatch": _CELLS.format(name=name, count=count, last=count - 1, output=output, command=command),
        "report.sbatch": _REPORT.format(name=name, output=output, command=command),
        "submit.sh": _SUBMIT.format(folder=shlex.quote(str(folder))),
    }
    for file, text in texts.items():
        with replaced(folder / file) as unfinished:
            unfinished.write_text(text)
    return folder / "submit.sh"
