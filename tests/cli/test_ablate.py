"""The command: its scripts for Slurm, and mistakes in one line."""

import os
import subprocess
from pathlib import Path

import pytest

from vidar.cli.main import main

CARD = "configs/ablations/smoke.py"


def test_slurm_scripts_submit_an_array_and_then_the_report(tmp_path, capsys):
    output = tmp_path / "grid with a space"
    assert main(["ablate", CARD, "--output", str(output), "--slurm", "3", "--config.seeds=(0, 1)"]) == 0
    assert "submit.sh" in capsys.readouterr().out
    folder = output / "slurm"
    for script in folder.iterdir():
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    cells = (folder / "cells.sbatch").read_text()
    assert "#SBATCH --array=0-2\n" in cells
    assert "#SBATCH --signal=B:TERM@120\n" in cells  # without B, only steps of a job are told, and it has none
    assert '--cell "$SLURM_ARRAY_TASK_ID/3"' in cells
    # What the scripts run, by stand-ins for Slurm and vidar that write their arguments down.
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/bash\nprintf "[%s]" sbatch "$@" >>{log}; echo >>{log}; echo "41;cluster"\n')
    (tools / "vidar").write_text(f'#!/bin/bash\nprintf "[%s]" vidar "$@" >>{log}; echo >>{log}\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}
    subprocess.run(
        ["bash", str(folder / "submit.sh"), "--time=1"], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    for script in ("cells", "report"):
        subprocess.run(["bash", str(folder / f"{script}.sbatch")], env=environment, check=True)
    common = f"[vidar][ablate][{CARD}][--output][{output}][--config.seeds=(0, 1)]"
    assert log.read_text().splitlines() == [
        f"[sbatch][--parsable][--time=1][{folder}/cells.sbatch]",
        f"[sbatch][--dependency=afterany:41][--time=1][{folder}/report.sbatch]",
        f"{common}[--cell][2/3]",
        f"{common}[--report]",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([CARD, "--cell", "2/2"], "--cell=2/2: write I/N"),
        ([CARD, "--cell", "one"], "--cell=one"),
        ([CARD, "--slurm", "0"], "--slurm=0"),
        ([CARD, "--report"], "holds no ablation"),
        ([CARD, "--recompute"], "holds no ablation"),
        (["configs/none.py"], "no such file"),
        (["configs/world/teacher.py"], "ablation.codec: unknown key"),
        ([CARD, "--config.budgit.amount=1"], "ablation.budgit: unknown key"),
        ([CARD, "--config.contrast.metric=beauty"], "contrast.metric='beauty'"),
    ],
)
def test_mistakes_get_one_line(arguments, words, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["ablate", *arguments, "--output", str(output)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("vidar ablate: ")
    assert words in lines[0]
    assert not Path(output).exists()
