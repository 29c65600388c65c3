"""Captions of the procedural world: what each shape does, in the order of appearance; and what a caption says."""

from dataclasses import dataclass

import numpy as np

from vidar.data.world.simulation import COLOURS, KINDS, States
from vidar.errors import DataError

STILL = 1.0  # pixels: who ends up nearer to where it began has stayed
ENTERS = "enters"


@dataclass(frozen=True)
class Clause:
    """What a caption says of one shape.

    Attributes:
        colour: Index into `COLOURS`.
        kind: Index into `KINDS`.
        verb: What it does; `ENTERS` for those that are not there from the beginning.
    """

    colour: int
    kind: int
    verb: str


def caption(states: States) -> str:
    """Says in English what a clip shows, such as "a red ball falls, then a blue square enters".

    Args:
        states: The clip.

    Returns:
        One clause for each shape that is seen: those there from the beginning are joined by "and", those that enter
        later follow with "then".
    """
    said = [
        (clause.verb, f"a {COLOURS[clause.colour]} {KINDS[clause.kind]} {clause.verb}") for clause in clauses(states)
    ]
    opening = " and ".join(text for verb, text in said if verb != ENTERS)
    return ", then ".join([opening] + [text for verb, text in said if verb == ENTERS])


def clauses(states: States) -> tuple[Clause, ...]:
    """What a clip's caption says.

    Args:
        states: The clip.

    Returns:
        One clause for each shape that is seen, those that enter last and in the order of their entering.
    """
    seen = np.flatnonzero(states.present.any(axis=0)).tolist()
    first = states.present.argmax(axis=0)

    def clause(shape: int) -> Clause:
        verb = ENTERS if first[shape] else _verb(states, shape)
        return Clause(int(states.colour[shape]), int(states.kind[shape]), verb)

    return tuple(clause(shape) for shape in sorted(seen, key=lambda shape: first[shape]))


def parse(text: str) -> tuple[Clause, ...]:
    """Reads a caption: the inverse of `caption`.

    Args:
        text: A caption of the procedural world.

    Returns:
        Its clauses, those of shapes that enter last and in the order of their entering.

    Raises:
        DataError: The text is none of this world's captions.
    """
    opening, *entering = text.split(", then ")
    found = []
    for clause in [*opening.split(" and "), *entering]:
        words = clause.split(" ", 3)
        if len(words) != 4 or words[0] != "a" or words[1] not in COLOURS or words[2] not in KINDS:
            raise DataError(f"caption {text!r}: {clause!r} is not of the form 'a red ball falls'")
        found.append(Clause(COLOURS.index(words[1]), KINDS.index(words[2]), words[3]))
    late = [clause.verb == ENTERS for clause in found]
    if late != sorted(late) or sum(late) != len(entering):
        raise DataError(f"caption {text!r}: shapes that enter follow after 'then'")
    return tuple(found)


def _verb(states: States, shape: int) -> str:
    path = states.position[states.present[:, shape], shape]
    if shape > 0 and _bounces(np.diff(path, axis=0)):
        return "bounces"
    across, down = path[-1] - path[0]
    if max(abs(across), abs(down)) < STILL:
        return "stays"
    if abs(down) >= abs(across):
        return "falls" if down > 0 else "rises"
    return "moves right" if across > 0 else "moves left"


def _bounces(moves: np.ndarray) -> bool:
    """Whether a free shape is thrown back; the top of an arc, where it begins to fall, is none."""
    before, after = moves[:-1], moves[1:]
    turns = (before * after < 0) & (np.abs(before) + np.abs(after) > 0.4)
    turns[:, 1] &= before[:, 1] > 0
    return bool(turns.any())
