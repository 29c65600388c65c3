"""A grid as a person runs it: through, killed and restarted, by two processes at once; all with the same numbers."""

import csv
import json
import os
import shutil
import signal
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.ablation.small import finished, grid, loaded, start, written
from tests.conftest import ROOT
from vidar.ablation.card import Budget, load_ablation
from vidar.ablation.findings import Findings, gather
from vidar.ablation.grid import expand
from vidar.ablation.report import write_report
from vidar.ablation.statistics import paired
from vidar.ablation.words import contrast_in_words, number
from vidar.ablation.worker import _check_spent, _Clock, _train
from vidar.cli.main import main
from vidar.data.world.builder import prepare
from vidar.errors import CheckpointError, DivergenceError
from vidar.system import load

DISTILLED = ROOT / "configs/ablations/forcing.py"
ONE_SEED = "--config.seeds=(3,)"
CELLS = [f"{cell}-seed{seed}" for cell in ("diffusion", "teacher") for seed in (3, 5)]


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return written(tmp_path_factory.mktemp("card"))


@pytest.fixture(scope="module")
def whole(card, tmp_path_factory):
    """The grid, run by one process without a disturbance, and what it said."""
    output = tmp_path_factory.mktemp("ablation") / "whole"
    return output, finished(start(card, output))


def same(found, expected):
    """Asserts that a directory with one seed holds the same results as the whole one, bit for bit."""
    cells = ["diffusion-seed3", "teacher-seed3"]
    assert sorted(path.name for path in (found / "cells").iterdir()) == cells
    for cell in cells:
        for name in ("metrics.json", "fingerprint.json"):
            assert (found / "cells" / cell / name).read_text() == (expected / "cells" / cell / name).read_text()
        costs = [json.loads((place / "cells" / cell / "trained.json").read_text()) for place in (found, expected)]
        assert [cost.pop("seconds") > 0 for cost in costs] == [True, True]
        assert costs[0] == costs[1]
        one, other = (dict(np.load(place / "cells" / cell / "rollouts.npz")) for place in (found, expected))
        assert sorted(one) == sorted(other)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_every_cell_gets_its_updates_and_is_rolled_out(whole):
    output, said = whole
    assert "cell 4 of 4" in said
    assert "left" in said
    assert "Verdict" in said
    for cell in CELLS:
        cost = json.loads((output / "cells" / cell / "trained.json").read_text())
        assert cost["updates"] == {"student": 60}
        assert cost["flops"] == pytest.approx(60 * cost["flops of an update"]["student"])
    with np.load(output / "cells" / "teacher-seed3" / "rollouts.npz") as rollouts:
        assert sorted(rollouts) == ["control 0.5", "control 1", "video"]
        assert {rollouts[name].shape for name in rollouts} == {(3, 12, 16, 16, 3)}
        with np.load(output / "truth.npz") as truth:
            np.testing.assert_array_equal(rollouts["video"][:, 0], truth["pixels"][:, 0])
            assert (rollouts["control 1"][:, 0] != truth["pixels"][:, 0]).mean() > 0.9
    with np.load(output / "cells" / "diffusion-seed3" / "rollouts.npz") as rollouts:
        assert list(rollouts) == ["video"]
    videos = [np.load(output / "cells" / cell / "rollouts.npz")["video"] for cell in CELLS]
    assert len({video.tobytes() for video in videos}) == 4


def test_report_holds_every_cell_and_nothing_from_elsewhere(whole, card):
    output, _ = whole
    findings = gather(loaded(card), output)
    assert not findings.missing
    page, text = (path.read_text() for path in (write_report(findings), output / "report" / "report.md"))
    for content in (page, text):
        for cell in ("diffusion", "teacher"):
            assert content.count(cell) > 4
    assert "<script" not in page
    assert 'src="data:image/png' in page
    assert 'src="data:image/webp' in page
    assert "http" not in page
    for picture in ("drift-cells.png", "rollouts-teacher.png", "rollouts-diffusion.webp"):
        assert (output / "report" / picture).stat().st_size > 1000
    with np.load(output / "truth.npz") as truth:
        pixels = truth["pixels"].astype(np.float64)
    late = []
    for seed in (3, 5):
        video = np.load(output / "cells" / f"teacher-seed{seed}" / "rollouts.npz")["video"].astype(np.float64)
        error = np.mean(((video - pixels)[:, 8:12] / 255) ** 2, axis=(2, 3, 4))
        late.append(np.mean(-10 * np.log10(error)))
    cell = next(cell for cell in findings.grid.cells if cell.name == "teacher")
    found = findings.estimate((cell,), "late", "psnr")
    assert found is not None
    assert found.mean == pytest.approx(np.mean(late), rel=1e-12)
    rows = text[text.index("late: frames 8 to 11") :].splitlines()
    header = next(row for row in rows if "psnr" in row).split(" | ")
    row = next(row for row in rows if row.startswith("| teacher")).split(" | ")
    assert row[header.index("psnr (dB) ↑")].startswith(f"{found.mean:.3g} [")
    assert findings.contrast is not None
    assert (findings.contrast.seeds, findings.contrast.clips) == (2, 3)
    assert [harm.amount for harm in findings.harms] == [0.5, 1.0]
    assert "objective.kind | " in text
    with (output / "report" / "results.csv").open() as file:
        table = [row for row in csv.DictReader(file) if (row["cell"], row["metric"]) == ("teacher", "psnr")]
    assert [(row["forcing"], row["seed"], row["span"]) for row in table] == [
        ("teacher", seed, span) for seed in ("3", "5") for span in ("early", "late")
    ]
    assert [float(row["mean over clips"]) for row in table if row["span"] == "late"] == pytest.approx(late, rel=1e-12)
    _, network = load(output / "cells" / "teacher-seed3" / "run")
    assert f"| teacher | {sum(leaf.size for leaf in jax.tree.leaves(network)):,} |" in text


def test_a_winner_that_a_frozen_frame_equals_is_called_so(whole, card, monkeypatch):
    findings = gather(loaded(card), whole[0])
    contrast = findings.grid.ablation.contrast
    (winner,) = (cell for cell in findings.grid.cells if cell.name in contrast.better)
    found = findings.estimate((winner,), contrast.span, contrast.metric)
    assert found is not None
    direction = findings.grid.ablation.evaluation.directions[contrast.metric]
    for better, said in ((0.01, True), (0.0, True), (-0.01, False)):
        still = {contrast.span: {contrast.metric: found.mean + better * direction}}
        monkeypatch.setattr(Findings, "repeated", still)
        words = f"Caution: repeating the last given frame has {number(found.mean + better * direction)}, "
        assert any(one.startswith(words) for one in contrast_in_words(findings)) == said


def test_a_metric_at_its_limit_gives_no_verdict(whole, card):
    findings = gather(loaded(card), whole[0])
    said = contrast_in_words(replace(findings, contrast=paired(np.zeros((2, 8)))))
    assert "Verdict: none. Both sides have the same value in every clip" in "".join(said)
    assert "0 of 8 clips above zero, 8 at zero" in said[1]


def test_killed_and_restarted_it_loses_only_the_running_cell(whole, card, tmp_path):
    output = tmp_path / "parts"
    process = start(card, output, ONE_SEED)
    running = output / "cells" / "teacher-seed3"
    while not list(running.glob("run/checkpoints/*/manifest.0.json")):  # the second cell, past its first checkpoint
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    first = output / "cells" / "diffusion-seed3"
    assert not (running / "done.json").exists()
    times = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    stage = (output / "stages" / "start" / "done.json").stat().st_mtime_ns
    said = finished(start(card, output, ONE_SEED))
    assert "continuing after step" in said
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == times
    assert (output / "stages" / "start" / "done.json").stat().st_mtime_ns == stage
    same(output, whole[0])


def test_two_processes_make_what_one_makes(whole, card, tmp_path, capsys):
    output = tmp_path / "shared"
    processes = [start(card, output, ONE_SEED, "--cell", f"{index}/2") for index in range(2)]
    said = [finished(process) for process in processes]
    assert any("waiting for another process, which makes" in text for text in said)
    assert ["diffusion, seed 3" in text for text in said] == [True, False]
    assert ["teacher, seed 3" in text for text in said] == [False, True]
    assert main(["ablate", str(card), "--output", str(output), ONE_SEED, "--report"]) == 0
    assert "missing" not in capsys.readouterr().out
    same(output, whole[0])


def test_measured_again_it_is_the_same(whole, card, capsys):
    output, _ = whole
    command = ["ablate", str(card), "--output", str(output), "--recompute"]
    assert main(command) == 0
    assert "4 cells measured again" in capsys.readouterr().out
    path = output / "cells" / "teacher-seed5" / "metrics.json"
    before = path.read_text()
    metrics = json.loads(before)
    metrics["as trained"]["spans"]["late"]["psnr"][1] += 1e-9
    path.write_text(json.dumps(metrics))
    try:
        assert main(command) == 2
        assert "teacher-seed5/metrics.json" in capsys.readouterr().err
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.budget.amount=61", ["ablation.json", "budget.amount=60", "now 61"]),
        ("--config.seeds=(6, 7)", ["seeds=[3, 5]", "now [6, 7]"]),
        ("--config.contrast.metric=sharpness_error", ["contrast.metric", "psnr", "sharpness_error"]),
        ("--config.base.overrides.model.mlp=24", ["model.mlp=16", "now 24"]),
    ],
)
def test_a_changed_config_is_refused_in_one_line(whole, card, capsys, override, words):
    for option in ([], ["--report"], ["--slurm", "2"]):
        assert main(["ablate", str(card), "--output", str(whole[0]), override, *option]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        for word in words:
            assert word in lines[0]


def test_a_grid_grows_by_seeds_and_cells(whole, card, tmp_path, capsys):
    output = tmp_path / "grown"
    shutil.copytree(whole[0], output)
    command = ["ablate", str(card), "--output", str(output)]
    before = {path: path.read_bytes() for path in output.glob("cells/*/*.*")}
    record = (output / "ablation.json").read_text()
    more = "--config.extra={'more': {'overrides': {'objective': {'start': 'stage:start'}}}}"
    assert main([*command, more, "--report"]) == 0
    said = capsys.readouterr().out
    assert "missing: more seed 3, more seed 5" in said
    assert "Added after" not in said
    assert (output / "ablation.json").read_text() == record
    assert main([*command, more, "--config.seeds=(3,)"]) == 0
    assert (output / "cells" / "more-seed3" / "done.json").exists()
    assert main([*command, "--config.seeds=(3, 5, 6)"]) == 0
    said = capsys.readouterr().out
    assert "missing" not in said
    assert "over 3 seeds × 3 clips" in said
    assert "Added after the ablation was begun: seeds 6." in said
    assert "Left out here, though they are of this ablation: cells more." in said
    assert {path: path.read_bytes() for path in before} == before
    record = json.loads((output / "ablation.json").read_text())
    assert record["grown"] == [{"cells": ["more"]}, {"seeds": [6]}]
    assert sorted(record["config"]["cells"]) == ["diffusion", "more", "teacher"]
    assert main([*command, "--config.seeds=(6, 3)", "--report"]) == 0
    said = capsys.readouterr().out
    assert "over 2 seeds × 3 clips" in said
    assert "Left out here, though they are of this ablation: seeds 5; cells more." in said
    assert main(command) == 0  # as a process that was at work meanwhile
    assert json.loads((output / "ablation.json").read_text())["config"]["seeds"] == [3, 5, 6]


def test_a_cell_of_another_grid_is_refused(whole, card, tmp_path, capsys):
    output = tmp_path / "mixed"
    shutil.copytree(whole[0], output)
    (output / "cells" / "teacher-seed5").rename(output / "cells" / "away")
    shutil.copytree(output / "cells" / "teacher-seed3", output / "cells" / "teacher-seed5")
    assert main(["ablate", str(card), "--output", str(output), "--report"]) == 2
    error = capsys.readouterr().err
    assert "teacher-seed5" in error
    assert "seed=3, now 5" in error


DAMAGED = {
    "cells/teacher-seed5/metrics.json": "{}",
    "cells/diffusion-seed5/metrics.json": "null",
    "cells/teacher-seed5/trained.json": '{"steps": 3}',
    "cells/teacher-seed3/done.json": "[]",
    "cells/teacher-seed3/fingerprint.json": "3",
    "cells/diffusion-seed3/rollouts.npz": "x",
    "stages/start/done.json": "{}",
    "truth.npz": "x",
    "ablation.json": "[]",
}


def test_damaged_files_are_named_and_can_be_made_again(whole, card, tmp_path, capsys):
    output = tmp_path / "damaged"
    shutil.copytree(whole[0], output)
    command = ["ablate", str(card), "--output", str(output)]
    results = {path: path.read_bytes() for path in output.glob("cells/*/metrics.json")}
    assert len(results) == 4
    for file, content in DAMAGED.items():
        before = (output / file).read_bytes()
        (output / file).write_text(content)
        assert main([*command, "--report"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{file}: cannot be read" in line
        assert "delete this file, and run again" in line
        (output / file).write_bytes(before)
    for file in DAMAGED:
        (output / file).unlink()
    assert main(command) == 0
    assert "missing" not in capsys.readouterr().out
    assert {path: path.read_bytes() for path in output.glob("cells/*/metrics.json")} == results


def test_a_lost_record_does_not_let_another_config_in(whole, card, tmp_path, capsys):
    output = tmp_path / "lost"
    shutil.copytree(whole[0], output)
    for record in ("ablation.json", *(path.relative_to(output) for path in output.rglob("fingerprint.json"))):
        (output / record).unlink()
    command = ["ablate", str(card), "--output", str(output)]
    assert main([*command, "--config.budget.amount=61"]) == 2
    assert "fingerprint.json is lost, and its trained.json is not of this config" in capsys.readouterr().err
    (output / "ablation.json").unlink()
    assert main(command) == 0
    assert "missing" not in capsys.readouterr().out


def test_files_that_say_something_else_are_named(whole, card, tmp_path, capsys):
    output = tmp_path / "odd"
    shutil.copytree(whole[0], output)
    metrics = output / "cells" / "teacher-seed5" / "metrics.json"
    metrics.write_text('{"as trained": {}, "control": []}')
    assert main(["ablate", str(card), "--output", str(output), "--report"]) == 2
    assert f"{metrics}: cannot be read (no 'as trained/spans' in it)" in capsys.readouterr().err
    for noted in ({"abc": 1}, {"0": "x"}):
        (tmp_path / "clock.json").write_text(json.dumps(noted))
        with pytest.raises(CheckpointError, match="clock.json: cannot be read"):
            _Clock(tmp_path)


def test_rollouts_of_other_clips_are_named(whole, card, tmp_path, capsys):
    output = tmp_path / "cut"
    shutil.copytree(whole[0], output)
    path = output / "cells" / "teacher-seed5" / "rollouts.npz"
    videos = dict(np.load(path))
    np.savez(path, **{**videos, "video": videos["video"][:, :-1]})
    for option in ("--recompute", "--report"):
        assert main(["ablate", str(card), "--output", str(output), option]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{path}: holds a video [" in line
        assert "delete this file" in line


def test_a_cell_that_skipped_updates_is_not_compared(card, tmp_path, capsys):
    broken = "--config.factors.forcing.teacher.overrides.optimizers={'student':{'learning_rate':1e30}}"
    short = ["--config.budget.amount=5", "--config.base.overrides.training.steps=2", ONE_SEED]
    assert main(["ablate", str(card), "--output", str(tmp_path / "out"), broken, *short]) == 0
    said = capsys.readouterr().out
    assert "missing: teacher seed 3" in said
    assert "as claimed" not in said
    failed = json.loads((tmp_path / "out" / "cells" / "teacher-seed3" / "failed.json").read_text())
    assert "student was never updated: 5 of 5 steps had an update that was not finite" in failed["error"]


def test_updates_that_the_budget_does_not_count_may_be_skipped():
    (cell,) = [cell for cell in grid().cells if cell.name == "teacher"]
    record = {"steps": 60, "skipped": 0, "updates": {"student": 60}}
    _check_spent(record, grid().ablation.budget, cell)
    with pytest.raises(DivergenceError, match="1 updates were skipped.*the budget of 60 of student is not spent"):
        _check_spent(record | {"skipped": 1, "updates": {"student": 59}}, grid().ablation.budget, cell)
    distilled = expand(load_ablation(DISTILLED), DISTILLED)
    (cell,) = [cell for cell in distilled.cells if cell.name == "frame-self"]
    counts = {"student": int(distilled.ablation.budget.amount), "critic": 200}
    record = {"steps": cell.run.config.training.steps, "skipped": 3, "updates": counts}
    _check_spent(record, distilled.ablation.budget, cell)
    with pytest.raises(DivergenceError, match="critic was never updated: 3 of"):
        _check_spent(record | {"updates": counts | {"critic": 0}}, distilled.ablation.budget, cell)


def test_the_time_before_a_stop_is_counted(tmp_path, monkeypatch):
    """Stopped between two checkpoints of its rhythm, a training in seconds goes on with what is left of them."""
    config = grid().cells[0].run.placed(tmp_path / "stages", None)
    source = {"tfds": "vidar_world/one_shape", "directory": str(tmp_path)}
    prepare(tmp_path, "one_shape", clips=8, validation_clips=2, frames=4)
    config = replace(
        config,
        objective=replace(config.objective, start="init"),
        data=replace(config.data, **source),
        training=replace(config.training, steps=10**6, save_every=10**6),
    )
    record = _train(config, tmp_path / "run", Budget("seconds", 1.0))
    assert json.loads((tmp_path / "run" / "clock.json").read_text())[str(record["steps"])] == pytest.approx(
        record["seconds"], abs=2.0
    )
    assert _train(config, tmp_path / "run", Budget("seconds", 1.0))["steps"] == record["steps"]


def test_missing_cells_are_listed(whole, card, tmp_path, capsys):
    output = tmp_path / "partial"
    shutil.copytree(whole[0], output)
    (output / "cells" / "teacher-seed5" / "done.json").unlink()
    shutil.rmtree(output / "cells" / "diffusion-seed3")
    assert main(["ablate", str(card), "--output", str(output), "--report"]) == 0
    said = capsys.readouterr().out
    assert "missing: diffusion seed 3, teacher seed 5" in said
    assert "no seed has all the cells" in said
    text = (output / "report" / "report.md").read_text()
    assert "| diffusion | 3 | not begun |" in text
    assert "| teacher | 5 | begun |" in text
