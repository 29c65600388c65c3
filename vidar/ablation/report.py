"""The report: what was asked, what came out and how sure that is, what it cost, and what exactly was run.

It turns findings into words, tables and pictures; it must not compute a statistic.
"""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidar.ablation.cost import parameters
from vidar.ablation.figures import animate, plot_curves, sheet
from vidar.ablation.findings import Findings, Key, videos
from vidar.ablation.pages import Block, Details, Heading, Paragraph, Picture, Table, write_pages
from vidar.ablation.words import (
    ABSENT,
    contrast_in_words,
    estimate_text,
    groups,
    number,
    paired_text,
    summary,
)
from vidar.ablation.worker import CIRCUMSTANCES
from vidar.evaluation.writing import replaced

_WIDTH = 3


def write_report(findings: Findings) -> Path:
    """Writes `report.html`, `report.md` and their pictures, and `results.csv` with the numbers of every seed.

    Args:
        findings: What there is.

    Returns:
        The HTML file.
    """
    ablation = findings.grid.ablation
    blocks: list[Block] = [Paragraph(ablation.text)] if ablation.text else []
    blocks += [Paragraph(summary(findings)), *_missing(findings)]
    blocks += [Heading("The contrast that was named beforehand"), *map(Paragraph, contrast_in_words(findings))]
    blocks += [Heading("Positive control"), *_control(findings)]
    if findings.metrics:
        blocks += [Heading("Results"), *_results(findings)]
        blocks += [Heading("Drift"), *_drift(findings)]
        blocks += [Heading("Rollouts"), *_rollouts(findings)]
    blocks += [Heading("What it cost"), *_costs(findings)]
    blocks += [Heading("What was run"), *_configs(findings)]
    _write_table(findings, findings.layout.report / "results.csv")
    return write_pages(f"Ablation: {ablation.name}", blocks, findings.layout.report)[0]


def _write_table(findings: Findings, path: Path) -> None:
    """One line for each cell, seed, span and metric: the mean over its clips."""
    factors = sorted(findings.grid.ablation.factors)
    with replaced(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", *factors, "seed", "span", "metric", "mean over clips"])
        for cell in findings.grid.cells:
            for seed in findings.seeds((cell,)):
                for span, metrics in findings.metrics[cell.name, seed]["as trained"]["spans"].items():
                    for metric, values in metrics.items():
                        levels = [cell.levels.get(factor, "") for factor in factors]
                        writer.writerow([cell.name, *levels, seed, span, metric, sum(values) / len(values)])


# ------------------------------------------------------------------------------------------------ control and gaps


def _control(findings: Findings) -> list[Block]:
    ablation = findings.grid.ablation
    control, metric = ablation.control, ablation.contrast.metric
    if control is None:
        return [Paragraph("None was asked for, so a contrast that is not seen may be one that could not be seen.")]
    if not findings.harms:
        return [Paragraph("Not measured: no seed has all controlled cells, or the contrast's span has no rollouts.")]
    what = {"commit": "finished chunks noised to a level before they become context", "given": "noise in given frames"}
    words = f"The same networks with a known harm, {what[control.corrupt]}: harmed minus as trained, in {metric}."
    direction = ablation.evaluation.directions[metric]
    state = {
        harm.amount: ("no" if not harm.effect.shown else "yes" if harm.effect.mean * direction < 0 else "as a gain")
        for harm in findings.harms
    }
    rows = [
        (f"{harm.amount:g}", paired_text(harm.effect), f"{harm.effect.seed_probability:.3g}", state[harm.amount])
        for harm in findings.harms
    ]
    seen = [harm for harm in findings.harms if state[harm.amount] == "yes"]
    if seen:
        first = seen[0]
        said = (
            f"The smallest amount seen is {first.amount:g}, a loss of {number(abs(first.effect.mean))}: metric and "
            "clips see effects of that size in one and the same network."
        )
    elif all(harm.effect.equal for harm in findings.harms):
        said = "The harms changed nothing in any clip: the metric is at its limit here, or what is harmed is not used."
    else:
        said = "None of the harms was seen: in these networks, metric and clips do not see effects of their size."
    contrast = findings.contrast
    if contrast is not None and not contrast.equal and contrast.low is not None and contrast.high is not None:
        said += (
            " The contrast compares networks of different trainings, which differ by more; its own interval is "
            f"{number((contrast.high - contrast.low) / 2)} to either side."
        )
    header = ("amount", f"effect on {metric}, [95 % interval]", "p over seeds", "seen")
    return [Table(header, rows, words), Paragraph(said)]


def _missing(findings: Findings) -> list[Block]:
    blocks: list[Block] = []
    if findings.missing:
        rows = [(name, str(seed), reason) for (name, seed), reason in findings.missing.items()]
        blocks.append(Table(("cell", "seed", "state"), rows, "Not in this report:"))
    made = {json.dumps(entry, sort_keys=True) for entry in [*findings.done.values(), *_made_stages(findings)]}
    if len(made) > 1:
        blocks.append(
            Paragraph(
                "Attention: not everything was made under the same circumstances, so that differences may be theirs: "
                + "; ".join(sorted(made))
            )
        )
    return blocks


def _made_stages(findings: Findings) -> list[dict[str, Any]]:
    return [{name: stage[name] for name in CIRCUMSTANCES} for stage in findings.stages.values()]


# --------------------------------------------------------------------------------------------------------- results


def _results(findings: Findings) -> list[Block]:
    evaluation = findings.grid.ablation.evaluation
    baseline = findings.repeated
    blocks: list[Block] = []
    for span in evaluation.measured:
        metrics = evaluation.metrics_of(span)
        rows = [
            (label, *(estimate_text(findings.estimate(cells, span, metric)) for metric in metrics))
            for label, cells in groups(findings).items()
        ]
        if span in baseline:
            rows.append(("repeating the last given frame", *(number(baseline[span][metric]) for metric in metrics)))
        limits = evaluation.spans.get(span)
        words = f"{span}: frames {limits[0]} to {limits[1] - 1}" if limits else span
        words = f"{words}. Mean [95 % interval over seeds]. {evaluation.limits}".rstrip()
        blocks.append(Table(("", *map(_titled(evaluation), metrics)), rows, words))
    return blocks


def _titled(evaluation: Any) -> Any:
    def title(metric: str) -> str:
        unit = f" ({evaluation.units[metric]})" if metric in evaluation.units else ""
        return f"{metric.replace('_', ' ')}{unit} {'↑' if evaluation.directions[metric] > 0 else '↓'}"

    return title


def _drift(findings: Findings) -> list[Block]:
    ablation = findings.grid.ablation
    evaluation = ablation.evaluation
    metrics = list(next(iter(findings.metrics.values()))["as trained"]["curves"])
    cells = {label: cells for label, cells in groups(findings).items() if findings.seeds(cells)}
    figures = {"cells": {label: one for label, one in cells.items() if label not in findings.levels}}
    for factor in sorted(ablation.factors) if len(ablation.factors) > 1 else ():
        prefix = f"{factor}: "
        figures[factor] = {label.removeprefix(prefix): one for label, one in cells.items() if label.startswith(prefix)}
    trained = findings.grid.cells[0].run.config.video.frames
    blocks: list[Block] = []
    for name, shown in figures.items():
        if not shown:
            continue
        path = findings.layout.report / f"drift-{name}.png"
        curves = {metric: {label: findings.curves(one, metric) for label, one in shown.items()} for metric in metrics}
        plot_curves(curves, path, evaluation.given, trained, evaluation.spans.get(ablation.contrast.span))
        caption = (
            f"By {name}: mean over clips and seeds, band from the lowest to the highest seed. Dashed: the training "
            "length. Shaded: the contrast's frames. A shift is the difference from the truth."
        )
        blocks.append(Picture(path, caption))
    for part, words, factor in (
        ("change", "Change from the first to the last 15 % of the frames", 1),
        ("slope", "Least-squares slope, per 100 frames", 100),
    ):
        rows = [
            (label, *(estimate_text(findings.drift(one, metric, part), factor) for metric in metrics))
            for label, one in cells.items()
        ]
        header = ("", *(metric.replace("_", " ") for metric in metrics))
        blocks.append(Table(header, rows, f"{words}, mean [95 % interval over seeds]:"))
    return blocks


def _rollouts(findings: Findings) -> list[Block]:
    blocks: list[Block] = []
    for cell in findings.grid.cells:
        keys: list[Key] = [key for key in findings.metrics if key[0] == cell.name]
        if not keys:
            continue
        truth, first = videos(findings, keys[0])
        shown = {f"seed {key[1]}": videos(findings, key)[1] for key in keys[:2]}
        picture, film = (findings.layout.report / f"rollouts-{cell.name}{suffix}" for suffix in (".png", ".webp"))
        sheet(truth, shown, picture)
        blocks.append(Picture(picture, f"{cell.name}: two held-out clips, truth and rollouts"))
        width = animate(truth, first, film)
        blocks.append(Picture(film, f"{cell.name}, seed {keys[0][1]}: truth above, rollout below", _WIDTH * width))
    return blocks


# ------------------------------------------------------------------------------------------------------------- costs


def _costs(findings: Findings) -> list[Block]:
    header = ("", "seed", "steps", "updates", "skipped", "seconds", "FLOPs", "FLOPs of its stages")
    rows = []
    for cell in findings.grid.cells:
        stages = findings.grid.needed([cell.run])
        before = sum(findings.stages[name]["flops"] for name in stages if name in findings.stages)
        for seed in findings.grid.ablation.seeds:
            cost = findings.trained.get((cell.name, seed))
            if cost is not None:
                rows.append((cell.name, str(seed), *_cost(cost), f"{before:.3g}" if stages else ABSENT))
    rows += [(f"stage: {name}", ABSENT, *_cost(cost), ABSENT) for name, cost in findings.stages.items()]
    words = (
        "Training only. FLOPs are counted from the traced losses and their gradients, matrix products only, all phases "
        "and networks included; a stage is counted once, and again beside each cell that starts from it. Seconds are "
        "wall time, compilation included."
    )
    sizes = {cell.name: parameters(cell.run.config) for cell in findings.grid.cells}
    roles = list(dict.fromkeys(role for size in sizes.values() for role in size))
    counts = [
        (name, *(f"{size[role]:,}" if role in size else ABSENT for role in roles)) for name, size in sizes.items()
    ]
    return [Table(header, rows, words), Table(("", *roles), counts, "Parameters of the networks:")]


def _cost(cost: Mapping[str, Any]) -> tuple[str, ...]:
    updates = ", ".join(f"{count} {phase}" for phase, count in cost["updates"].items())
    return str(cost["steps"]), updates, str(cost["skipped"]), f"{cost['seconds']:.0f}", f"{cost['flops']:.3g}"


def _configs(findings: Findings) -> list[Block]:
    cells = findings.grid.cells
    flat = {cell.name: _flat(cell.run.document) for cell in cells}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = []
    for key in keys:
        values = [json.dumps(flat[cell.name][key]) if key in flat[cell.name] else ABSENT for cell in cells]
        if len(set(values)) > 1:
            rows.append((key, *values))
    table = Table(("", *(cell.name for cell in cells)), rows, "Everything in which the cells' configs differ:")
    documents = {f"cell {cell.name}": cell.run.document for cell in cells}
    documents |= {f"stage {name}": stage.document for name, stage in findings.grid.stages.items()}
    ablation = findings.grid.document()
    rest = {name: value for name, value in ablation.items() if name not in ("cells", "stages")}
    details = [Details(f"Config of {name}", json.dumps(document, indent=1)) for name, document in documents.items()]
    made = {f"{name}, seed {seed}": entry for (name, seed), entry in findings.done.items()}
    places = (
        "Places are the card's, not where anything lay: stages are stages/NAME below the output directory"
        f"{', and the data of the procedural world data/ there' if ablation['world'] else ''}."
    )
    return [
        table,
        Paragraph(places),
        Details("The ablation", json.dumps(rest, indent=1)),
        *details,
        Details("Circumstances of each cell", json.dumps(made, indent=1)),
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {
        key: entry for name, inner in value.items() for key, entry in _flat(inner, f"{path}.{name}".lstrip(".")).items()
    }
