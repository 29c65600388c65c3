"""Findings as words and numbers: what was asked, the contrast with its n, and the verdict.

This module must not know pages or pictures.
"""

from collections.abc import Sequence
from typing import Any

from vidar.ablation.findings import Findings
from vidar.ablation.grid import Cell
from vidar.ablation.records import fingerprint
from vidar.ablation.statistics import Estimate, Paired, excludes_zero

ABSENT = "–"


def summary(findings: Findings) -> str:
    """The grid, its budget and its evaluation, in a paragraph."""
    ablation = findings.grid.ablation
    budget, evaluation = ablation.budget, ablation.evaluation
    spent = {
        "updates": f"{budget.amount:g} updates of the {budget.role}",
        "flops": f"{budget.amount:.3g} counted FLOPs, those of teacher and critic included",
        "seconds": f"{budget.amount:g} seconds of training",
    }[budget.unit]
    cells = findings.grid.cells
    extra = sum(not cell.levels for cell in cells)
    more = f" and {extra} extra" if extra else ""
    seeds = ", ".join(map(str, ablation.seeds))
    shared = " Stages are shared by all of them, so that intervals say nothing of other pre-trainings."
    return (
        f"{len(cells) - extra} cells ({' × '.join(sorted(ablation.factors))}){more}, each trained with seeds {seeds} "
        f"for {spent}, and then streamed for {evaluation.frames} frames from {evaluation.given} given, on the same "
        f"{evaluation.clips} held-out clips. {len(findings.metrics)} of {len(findings.grid.units)} trainings are done. "
        "Means are over clips and then over seeds; intervals in brackets are 95 % intervals over seeds (Student's t), "
        f"which say what trainings with other seeds would give.{shared if findings.grid.stages else ''} "
        f"Fingerprint of the card: {fingerprint(findings.grid.document())}."
    )


def contrast_in_words(findings: Findings) -> list[str]:
    """The contrast as sentences: the claim, the numbers with their n, and the verdict.

    Args:
        findings: What there is.

    Returns:
        Paragraphs.
    """
    ablation, result = findings.grid.ablation, findings.contrast
    contrast = ablation.contrast
    direction = ablation.evaluation.directions[contrast.metric]
    wanted = "more" if direction > 0 else "less"
    better, worse = (" and ".join(names) for names in (contrast.better, contrast.worse))
    claim = f"Claim: in {contrast.metric} over {_span(findings)} ({wanted} is better), {better} beats {worse}."
    if result is None:
        return [claim, "Not measured yet: no seed has all the cells that it needs."]
    seeds = ", ".join(number(value) for value in result.seed_means)
    numbers = (
        f"Difference, better minus worse: {paired_text(result)} over {result.seeds} seeds × {result.clips} clips "
        f"(bootstrap over seeds and clips); over seeds alone {estimate_text(result.over_seeds)}; by seed {seeds}. "
        f"Exact sign-flip test over the seeds: p = {result.seed_probability:.3g} (with {result.seeds} it cannot be "
        f"below {result.smallest_probability:.3g}). Sign test over the clips, which speaks of these trained networks "
        f"only: p = {result.clip_probability:.3g}, {result.clips_above} of {result.clips} clips above zero"
        f"{f', {result.clips_equal} at zero' if result.clips_equal else ''}."
    )
    return [claim, numbers, _verdict(result, direction), *_caution(findings, direction), *_grown(findings)]


def _grown(findings: Findings) -> list[str]:
    """Sentences where the ablation is larger than it was meant to be when it was begun, or this is not all of it."""
    here = {"seeds": findings.grid.ablation.seeds, "cells": [cell.name for cell in findings.grid.cells]}
    grown = [(name, growth.get(name, ())) for growth in findings.grown for name in here]
    added = [(name, [entry for entry in entries if entry in here[name]]) for name, entries in grown]
    added = [(name, entries) for name, entries in added if entries]
    said = []
    if added:
        said.append(
            f"Added after the ablation was begun: {_listed(added)}. Intervals and probabilities take the grid as it "
            "was planned: what is added after a look at results makes them too sure."
        )
    left_out = [(name, entries) for name, entries in findings.left_out.items() if entries]
    if left_out:
        said.append(f"Left out here, though they are of this ablation: {_listed(left_out)}.")
    return said


def _listed(named: Sequence[tuple[str, Sequence[Any]]]) -> str:
    return "; ".join(f"{name} {', '.join(map(str, entries))}" for name, entries in named)


def _caution(findings: Findings, direction: int) -> list[str]:
    """A sentence where a picture that stands still does as well as the winner."""
    contrast = findings.grid.ablation.contrast
    still = findings.repeated.get(contrast.span, {}).get(contrast.metric)
    winner = findings.estimate(
        tuple(cell for cell in findings.grid.cells if cell.name in contrast.better), contrast.span, contrast.metric
    )
    if still is None or winner is None or (winner.mean - still) * direction > 0:
        return []
    return [
        f"Caution: repeating the last given frame has {number(still)}, {' and '.join(contrast.better)} "
        f"{number(winner.mean)}: this metric alone does not tell a good rollout."
    ]


def _verdict(result: Paired, direction: int) -> str:
    if result.equal:
        return (
            "Verdict: none. Both sides have the same value in every clip: where the metric stands, it does not tell "
            "them apart, as at its limit."
        )
    if result.seeds == 1:
        return "Verdict: open. One seed says nothing of other trainings."
    side = "as claimed" if result.mean * direction > 0 else "against the claim"
    if result.shown:
        return f"Verdict: {side}; both intervals exclude zero."
    if excludes_zero(result.low, result.high):
        return (
            f"Verdict: open. The difference points {side} and the bootstrap excludes zero, but over only "
            f"{result.seeds} seeds the t interval does not: more seeds would decide."
        )
    return "Verdict: open. The interval includes zero: no difference was shown, which is not the same as none."


def groups(findings: Findings) -> dict[str, tuple[Cell, ...]]:
    """Rows of the tables: levels of factors, each averaged over the others, then single cells, extra ones last."""
    levels = findings.levels if len(findings.grid.ablation.factors) > 1 else {}
    cells = {(cell.name if cell.levels else f"extra: {cell.name}"): (cell,) for cell in findings.grid.cells}
    return levels | cells


def _span(findings: Findings) -> str:
    contrast, evaluation = findings.grid.ablation.contrast, findings.grid.ablation.evaluation
    limits = evaluation.spans.get(contrast.span)
    return f"frames {limits[0]} to {limits[1] - 1}" if limits else f"the {contrast.span} test"


def number(value: float, factor: float = 1) -> str:
    """Three digits of a number, times a factor."""
    value = value * factor
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def estimate_text(value: Estimate | None, factor: float = 1) -> str:
    """A mean over seeds with its interval, times a factor."""
    return ABSENT if value is None else _interval(value.mean, value.low, value.high, factor)


def paired_text(value: Paired) -> str:
    """A paired difference with its interval."""
    return _interval(value.mean, value.low, value.high)


def _interval(mean: float, low: float | None, high: float | None, factor: float = 1) -> str:
    text = number(mean, factor)
    if low is None or high is None:
        return text
    return f"{text} [{number(low, factor)}, {number(high, factor)}]"


def table_in_words(findings: Findings) -> Sequence[str]:
    """The contrast's metric of every cell, a line each, for the terminal."""
    contrast = findings.grid.ablation.contrast
    return [
        f"  {label:32s} {contrast.metric} ({contrast.span}) "
        f"{estimate_text(findings.estimate(cells, contrast.span, contrast.metric))}"
        for label, cells in groups(findings).items()
    ]
