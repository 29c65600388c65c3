"""What a card means: cells and their configs, the steps of a budget, and what is refused before anything runs."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.ablation.small import grid, values
from vidar.ablation.card import Budget, load_ablation
from vidar.ablation.cost import steps_within, total_flops
from vidar.ablation.grid import completed, expand, merged, steps_for
from vidar.ablation.records import read_json, settle
from vidar.errors import ConfigError
from vidar.objectives.protocol import Phase


@dataclass(frozen=True)
class Turns:
    """The critic at every step, the student before it at every n-th, after a warm-up of the critic alone."""

    every: int = 5
    warmup: int = 0
    students: int = 1

    def phases(self, step: int) -> tuple[Phase, ...]:
        late = step >= self.warmup and (step - self.warmup) % self.every == 0
        return (
            *(Phase(f"student{n}", "student") for n in range(self.students if late else 0)),
            Phase("critic", "critic"),
        )


FACTORS: dict[str, Any] = {
    "forcing": values()["factors"]["forcing"],
    "chunking": {"one": {}, "two": {"overrides": {"video": {"chunk": 2}, "context": {"window": 4, "sink": 0}}}},
}
CONTRAST = {"metric": "psnr", "span": "late", "better": ("one-teacher",), "worse": ("one-diffusion",)}
CHUNKS = {"factors": FACTORS, "contrast": CONTRAST, "control": None}


@pytest.mark.parametrize(
    ("objective", "updates", "steps"),
    [
        (Turns(5), 120, 596),
        (Turns(5), 1, 1),
        (Turns(1), 120, 120),
        (Turns(2), 7, 13),
        (Turns(5, warmup=30), 120, 626),
    ],
)
def test_updates_of_the_student_are_counted_exactly(objective, updates, steps):
    assert steps_for(objective, Budget("updates", updates)) == steps
    done = [phase.role for step in range(steps) for phase in objective.phases(step)]
    assert done.count("student") == updates
    assert done.count("critic") == steps
    assert steps_for(objective, Budget("updates", updates, role="critic")) == updates


def test_updates_that_no_number_of_steps_gives_are_refused():
    assert steps_for(Turns(5, students=2), Budget("updates", 4)) == 6
    with pytest.raises(ConfigError, match="never 5"):
        steps_for(Turns(5, students=2), Budget("updates", 5))
    with pytest.raises(ConfigError, match="updates teacher 0 times"):
        steps_for(Turns(5), Budget("updates", 5, role="teacher"))


@pytest.mark.parametrize("amount", [0.0, 12.9, 13.0, 29.0, 1000.0, 4321.5])
def test_a_budget_in_flops_is_filled_and_not_exceeded(amount):
    flops = {"student0": 10.0, "critic": 3.0}
    steps = steps_within(Turns(5), flops, amount)
    assert total_flops(Turns(5), flops, steps) <= amount < total_flops(Turns(5), flops, steps + 1)


def test_the_self_forcing_card_gets_its_updates():
    card = {"card": "configs/systems/self_forcing_dmd.py", "overrides": {"objective": {"generator_every": 5}}}
    changes = {
        "base": card | {"overrides": card["overrides"] | {"objective": {"student": "stage:a", "teacher": "stage:a"}}},
        "stages": {"a": {"card": "configs/world/teacher_forcing.py"}},
        "world": {"clips": 16, "frames": 8},
        "factors": {"every": {"five": {"overrides": {"objective": {"generator_every": 5}}}, "two": {}}},
        "budget": {"unit": "updates", "amount": 120},
        "contrast": CONTRAST | {"better": ("five",), "worse": ("two",)},
        "control": None,
    }
    five, two = grid(**changes).cells
    assert (five.name, five.run.config.training.steps) == ("five", 596)
    assert (two.name, two.run.config.training.steps) == ("two", 239)
    assert five.run.stages == ("a",)
    placed = five.run.placed(Path("/runs/stages"), None)
    assert placed.objective.roles["teacher"].source == "/runs/stages/a"


def test_the_product_of_the_factors_with_combinations_and_extras():
    diffusion = {"where": {"forcing": "diffusion", "chunking": "two"}, "overrides": {"solver": {"steps": 3}}}
    extra = {"wide": {"overrides": {"model": {"mlp": 32}}}}
    found = grid(**CHUNKS, combinations=(diffusion,), extra=extra)
    assert [cell.name for cell in found.cells] == [
        "one-diffusion",
        "one-teacher",
        "two-diffusion",
        "two-teacher",
        "wide",
    ]
    configs = {cell.name: cell.run.config for cell in found.cells}
    assert [config.video.chunk for config in configs.values()] == [1, 1, 2, 2, 1]
    assert [config.objective.kind for config in configs.values()] == ["diffusion", "teacher_forcing"] * 2 + [
        "teacher_forcing"
    ]
    assert configs["two-diffusion"].solver.steps == 3
    assert configs["one-diffusion"].solver.steps == 1
    assert [config.model.mlp for config in configs.values()] == [16, 16, 16, 16, 32]
    assert {config.training.steps for config in configs.values()} == {60}
    assert [cell.levels for cell in found.cells][2] == {"chunking": "two", "forcing": "diffusion"}
    assert found.cells[-1].levels == {}
    seeds = [(cell.name, seed) for cell, seed in found.units]
    assert len(seeds) == 10
    assert seeds[:5] == [(name, 3) for name in configs]
    seeded = found.cells[0].seeded(5)
    assert (seeded.config.training.seed, seeded.config.data.seed) == (5, 5)
    assert (
        replace(seeded.config, training=configs["one-diffusion"].training, data=configs["one-diffusion"].data)
        == (configs["one-diffusion"])
    )


def test_a_section_of_another_kind_replaces_the_cards():
    card = {"solver": {"kind": "few_step", "times": [1], "shift": 5.0}, "video": {"frames": 8, "chunk": 1}}
    assert merged(card, {"solver": {"kind": "euler", "steps": 2}, "video": {"chunk": 2}}) == {
        "solver": {"kind": "euler", "steps": 2},
        "video": {"frames": 8, "chunk": 2},
    }
    assert merged(card, {"solver": {"kind": "few_step", "shift": 1.0}})["solver"] == card["solver"] | {"shift": 1.0}
    assert merged(card, {"solver": None})["solver"] is None


def test_stages_come_after_those_that_they_start_from():
    stages = {
        "a": {"overrides": {"objective": {"start": "stage:z"}}},
        "b": {"overrides": {"objective": {"start": "stage:a"}}},
        "z": {},
    }
    factors = {
        "forcing": {
            "teacher": {"overrides": {"objective": {"start": "stage:b"}}},
            "diffusion": FACTORS["forcing"]["diffusion"],
        }
    }
    diffusion = {"where": {"forcing": "diffusion"}, "overrides": {"objective": {"start": "stage:z"}}}
    found = grid(stages=stages, factors=factors, combinations=(diffusion,))
    assert list(found.stages) == ["z", "a", "b"]
    diffusion, teacher = found.cells
    assert found.needed([teacher.run]) == ("z", "a", "b")
    assert found.needed([diffusion.run]) == ("z",)
    circle = {"a": stages["a"], "z": {"overrides": {"objective": {"start": "stage:a"}}}}
    with pytest.raises(ConfigError, match="a, z start from each other"):
        grid(stages=circle, factors={"forcing": {"teacher": {}, "diffusion": {}}})


SMALL = values()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factors": {}}, "factors: give one or more"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"budget": {"unit": "minutes", "amount": 1}}, "budget.unit: 'minutes'"),
        ({"budget": {"unit": "updates", "amount": 1.5}}, "whole number"),
        ({"budget": {"unit": "updates", "amount": 5, "role": "critic"}}, "cell diffusion: updates critic 0 times"),
        ({"contrast": CONTRAST | {"metric": "beauty"}}, "contrast.metric='beauty'"),
        ({"contrast": CONTRAST | {"span": "tail"}}, "contrast.span='tail'"),
        ({"contrast": CONTRAST}, "contrast: no cell 'one-"),
        ({"contrast": CONTRAST | {"better": ("teacher",), "worse": ("teacher",)}}, "cannot beat itself"),
        ({"world": SMALL["world"] | {"frames": 3}}, "start: data.frames=4, but world.frames=3"),
        ({"world": SMALL["world"] | {"config": "captioned"}}, "world.config='captioned' is made"),
        ({"control": {"corrupt": "given", "amounts": (0.5, 0.1)}}, "ascending"),
        ({"control": {"corrupt": "given", "amounts": (0.5,), "cells": ("three",)}}, "control: no cell 'three'"),
        ({"stages": {}}, "stage:start, which is no stage"),
        ({"base": {}}, "no experiment card"),
        ({"base": {"card": "configs/none.py"}}, "configs/none.py"),
        ({"evaluation": SMALL["evaluation"] | {"spans": {"late": (8, 13)}}}, "spans.late"),
        ({"evaluation": SMALL["evaluation"] | {"clip": 3}}, "evaluation.clip: unknown key"),
        ({"extra": {"teacher": {}}}, "two cells are named 'teacher'"),
        ({"extra": {"x": {"overrides": {"model": {"widht": 3}}}}}, "cell x: config.model.widht"),
        ({"extra": {"x": {"overrides": {"video": {"chunk": 3}}}}}, "cell x: video.frames=4"),
        (
            {"extra": {"x": {"overrides": {"plan": {"lag": 0}, "context": {"positions": "absolute"}}}}},
            "cell x: makes whole",
        ),
        ({"extra": {"x/y": {}}}, "name 'x/y'"),
        (
            {"extra": {"x": {"overrides": {"model": {"actions": {"count": 2}}}}}},
            "cell x: does not know the 5 discrete actions of the one-shape world",
        ),
        (
            {"extra": {"x": {"overrides": {"model": {"classes": 7}}}}},
            "needs one of 7 classes, the one-shape world tells 3",
        ),
        (
            {"extra": {"x": {"overrides": {"video": {"width": 20}}}}},
            "cell x: makes frames of 16×20, the one-shape world has 16×16",
        ),
        (
            {"extra": {"x": {"overrides": {"model": {"text": {"width": 8, "length": 8}}}}}},
            "cell x: needs text, which the evaluation has none of",
        ),
        ({"combinations": ({"where": {"forcing": "none"}},)}, "no forcing=none; known: diffusion, teacher"),
        (
            {"extra": {"x": {"overrides": {"model": {"mlp": 8}, "objective": {"start": "stage:start"}}}}},
            "mlp=16, but has",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_runs(changes, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")) as refused:
        grid(**changes)
    assert "\n" not in str(refused.value)


def test_given_frames_must_be_whole_chunks():
    evaluation = SMALL["evaluation"] | {"given": 3, "frames": 12, "spans": {"late": (8, 12)}}
    with pytest.raises(
        ConfigError, match="cell two-diffusion: evaluation.given=3 is not a whole number of chunks of 2"
    ):
        grid(**CHUNKS, evaluation=evaluation)


def test_a_document_of_a_version_with_fewer_options_is_completed_with_defaults():
    whole = grid()
    cell, seed = whole.units[0]
    for document in (whole.document(), whole.unit_document(cell, seed), whole.stage_document("start")):
        older = copy.deepcopy(document)
        runs = [*older["stages"].values(), *(entry["run"] for entry in older.get("cells", {}).values())]
        for run in [*runs, *([older["run"]] if "run" in older else [])]:
            del run["training"]["accumulate"], run["model"]["remat"]
        assert older != document
        assert completed(older) == document
        unknown = copy.deepcopy(document)
        unknown["stages"]["start"] = {"option": "of another version"}
        assert completed(unknown) == unknown


@pytest.mark.parametrize("card", sorted(Path("configs/ablations").glob("*.py")), ids=lambda card: card.stem)
def test_shipped_cards_can_be_composed(card):
    assert expand(load_ablation(card), card).cells


def test_stages_may_come_later(tmp_path):
    """To a grid without any; and one without them goes on beside it."""
    growing = ("seeds", "stages", "cells")
    small = grid(stages={}, factors={"forcing": {"teacher": {}, "diffusion": {}}})
    large = grid(
        factors={"forcing": {"teacher": {}, "diffusion": {}}}, extra={"x": SMALL["factors"]["forcing"]["teacher"]}
    )
    for document in (small.document(), large.document(), small.document()):
        settle(tmp_path / "record.json", document, "an ablation", growing)
    assert read_json(tmp_path / "record.json")["grown"] == [{"stages": ["start"], "cells": ["x"]}]
