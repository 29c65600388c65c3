"""The staircase against its goldens, and tick programs against the staircase."""

import math

import numpy as np
import pytest

from vidar import ConfigError
from vidar.diffusion.plan import Commit, TickProgram, staircase, tick_program

COMMITS = [Commit("extra_pass"), Commit("fused", time=-1.0), Commit("last_step")]


def in_flight(chunks: int, steps: int, lag: int, iteration: int) -> dict[int, int]:
    """Progress of the chunks that take a step at one iteration."""
    plan = staircase(chunks, steps, lag)
    before, after = plan.before[iteration], plan.after[iteration]
    return {u: int(before[u]) for u in range(chunks) if after[u] > before[u]}


def test_magi_pipeline():
    plan = staircase(4, 64, 16)
    assert plan.iterations == 112
    assert plan.width == 4
    assert in_flight(4, 64, 16, 16) == {0: 16, 1: 0}
    assert in_flight(4, 64, 16, 48) == {0: 48, 1: 32, 2: 16, 3: 0}
    # MAGI's generator: stage by stage, every chunk of the window advances 16 steps; a chunk leaves after 4 stages.
    rows = [
        {chunk: 16 * (stage - chunk) + row for chunk in range(4) if 0 <= stage - chunk < 4}
        for stage in range(7)
        for row in range(16)
    ]
    assert [in_flight(4, 64, 16, n) for n in range(112)] == rows


@pytest.mark.parametrize(("lag", "iterations"), [(0, 50), (5, 125), (25, 425), (50, 800)])
def test_ar_diffusion_scheduler(lag, iterations):
    plan = staircase(16, 50, lag)
    assert plan.iterations == iterations
    assert (plan.after > plan.before).sum() == 800
    # The recurrence of AR-Diffusion: a chunk advances while the one before it is `lag` ahead (or done).
    progress = np.zeros(16, np.int64)
    for before, after in zip(plan.before, plan.after, strict=True):
        np.testing.assert_array_equal(progress, before)
        ahead = np.concatenate([[50 + lag], progress[:-1]])
        advance = (progress < 50) & ((ahead - progress >= lag) | (ahead == 50))
        progress = progress + advance
        np.testing.assert_array_equal(progress, after)
    np.testing.assert_array_equal(progress, 50)


@pytest.mark.parametrize(
    ("rows", "lag", "iterations"),
    [(14, 1, 37), (14, 2, 50), (14, 4, 76), (14 * 16, 1, 247), (14 * 16, 2, 470), (14 * 16, 4, 916)],
)
def test_diagonal_decoding_of_images_with_24_columns(rows, lag, iterations):
    assert staircase(rows, 24, lag).iterations == iterations


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
@pytest.mark.parametrize(("steps", "lag"), [(1, 0), (1, 1), (4, 0), (4, 1), (4, 4), (5, 2), (6, 4), (7, 3), (64, 16)])
def test_staircase_laws(chunks, steps, lag):
    plan = staircase(chunks, steps, lag)
    moves = plan.after - plan.before
    assert plan.iterations == steps + (chunks - 1) * lag
    assert plan.width == moves.sum(axis=1).max()
    assert plan.width == (min(chunks, math.ceil(steps / lag)) if lag else chunks)
    assert set(np.unique(moves)) <= {0, 1}
    assert (np.diff(plan.before, axis=1) <= 0).all()
    assert (moves.sum(axis=0) == steps).all()


def unroll(program: TickProgram, chunks: int) -> tuple[list[dict[int, tuple[int, int]]], list[tuple[int, int, int]]]:
    """Runs a tick program on paper.

    Returns:
        The solver steps of each row, `{chunk: (before, after)}`, and the writes `(chunk, row, progress before)`.
    """
    rows, writes = [], []
    for tick in range(-(-chunks // program.emits) + program.delay):
        oldest = tick * program.emits - program.delay
        for group in program.groups:
            first = oldest - 1 if group.kind == "fused" else oldest
            for before, after in zip(group.before, group.after, strict=True):
                slots = {first + slot: pair for slot, pair in enumerate(zip(before, after, strict=True))}
                real = {chunk: pair for chunk, pair in slots.items() if 0 <= chunk < chunks}
                if group.write and first in real:
                    writes.append((first, len(rows), real[first][0]))
                moved = {chunk: pair for chunk, pair in real.items() if pair[1] > pair[0]}
                if group.kind != "commit":
                    rows.append(moved)
                else:
                    assert not moved
    return rows, writes


@pytest.mark.parametrize("commit", COMMITS, ids=lambda commit: commit.kind)
@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("steps", "lag"), [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4), (5, 2), (5, 3), (7, 3), (50, 5), (64, 16), (50, 50)]
)
def test_unrolled_ticks_are_the_staircase(steps, lag, chunks, commit):
    if commit.kind == "last_step" and steps % lag:
        with pytest.raises(ConfigError, match="does not divide"):
            tick_program(steps, lag, commit)
        return
    program = tick_program(steps, lag, commit)
    rows, writes = unroll(program, chunks)
    plan = staircase(chunks, steps, lag)
    for n, row in enumerate(rows):
        if n < plan.iterations:
            before, after = plan.before[n], plan.after[n]
            assert row == {u: (before[u], after[u]) for u in range(chunks) if after[u] > before[u]}
        else:
            assert not row
    assert len(rows) >= plan.iterations

    # Every chunk is written once, in order; a fused commit comes with the next tick, so the last chunk has none.
    written = range(chunks - 1) if commit.kind == "fused" else range(chunks)
    assert [chunk for chunk, _, _ in writes] == list(written)
    for chunk, row, progress in writes:
        emitted = (chunk + program.width) * lag
        assert progress == (steps - 1 if commit.kind == "last_step" else steps)
        assert row == (emitted - 1 if commit.kind == "last_step" else emitted)


def test_one_chunk_after_the_other():
    extra = tick_program(4, 4, Commit("extra_pass"))
    assert (extra.width, extra.emits, extra.delay, extra.rows) == (1, 1, 0, 5)
    denoise, commit = extra.groups
    assert denoise.before == ((0,), (1,), (2,), (3,))
    assert denoise.after == ((1,), (2,), (3,), (4,))
    assert (denoise.kind, denoise.write, commit.kind, commit.write) == ("denoise", False, "commit", True)
    assert commit.before == commit.after == ((4,),)

    fused, rest = tick_program(4, 4, Commit("fused")).groups
    assert (fused.kind, fused.write, fused.before, fused.after) == ("fused", True, ((4, 0),), ((4, 1),))
    assert (rest.kind, rest.write, rest.before) == ("denoise", False, ((1,), (2,), (3,)))

    rest, last = tick_program(4, 4, Commit("last_step")).groups
    assert (rest.write, rest.before) == (False, ((0,), (1,), (2,)))
    assert (last.kind, last.write, last.before, last.after) == ("denoise", True, ((3,),), ((4,),))


def test_one_step_models_have_no_empty_groups():
    assert [group.before for group in tick_program(1, 1, Commit("extra_pass")).groups] == [((0,),), ((1,),)]
    assert [group.before for group in tick_program(1, 1, Commit("fused")).groups] == [((1, 0),)]
    (only,) = tick_program(1, 1, Commit("last_step")).groups
    assert (only.before, only.write) == (((0,),), True)


def test_pipeline_whose_lag_does_not_divide_the_steps():
    program = tick_program(5, 2, Commit("extra_pass"))
    assert (program.width, program.delay) == (3, 2)
    denoise, commit = program.groups
    assert denoise.before == ((4, 2, 0), (5, 3, 1))
    assert denoise.after == ((5, 3, 1), (5, 4, 2))
    assert commit.before == ((5,),)


def test_the_whole_clip_at_once_is_one_tick():
    program = tick_program(4, 0, None, chunks=3)
    assert (program.width, program.emits, program.delay, program.commit) == (3, 3, 0, None)
    plan = staircase(3, 4, 0)
    (group,) = program.groups
    np.testing.assert_array_equal(group.before, plan.before)
    np.testing.assert_array_equal(group.after, plan.after)
    assert not group.write


def test_programs_are_static_arguments():
    first, second = (tick_program(4, 2, Commit("fused", drops=("text",))) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != tick_program(4, 2, Commit("fused"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 5, Commit("extra_pass")), "lag=5: must be in 0 … 4"),
        ((4, -1, Commit("extra_pass")), "lag=-1"),
        ((0, 0, None), "steps=0"),
        ((4, 0, Commit("fused"), 3), "leave 'fused' out"),
        ((4, 0, None), "give its number of chunks"),
        ((4, 0, None, 0), "chunks=0"),
        ((4, 4, None), "give a commit"),
        ((5, 3, Commit("last_step")), "lag=3 does not divide steps=5"),
    ],
)
def test_impossible_programs_are_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        tick_program(*arguments)
    assert "\n" not in str(refusal.value)


def test_impossible_plans_are_refused():
    for arguments, message in (((0, 4, 4), "chunks=0"), ((2, 0, 0), "steps=0"), ((2, 4, 5), "lag=5")):
        with pytest.raises(ConfigError, match=message):
            staircase(*arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "sometimes"}, "one of extra_pass, fused, last_step"),
        ({"kind": "extra_pass", "level": 1.5}, "level 1.5"),
        ({"kind": "extra_pass", "noise": True}, "level 0 adds none"),
        ({"kind": "last_step", "time": -1.0}, "no pass of its own"),
        ({"kind": "last_step", "drops": ("text",)}, "no pass of its own"),
    ],
)
def test_impossible_commits_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Commit(**fields)
