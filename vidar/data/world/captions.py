"""Captions of the procedural world: what each shape does, in the order of appearance."""

import numpy as np

from vidar.data.world.simulation import COLOURS, KINDS, States

STILL = 1.0  # pixels: who ends up nearer to where it began has stayed


def caption(states: States) -> str:
    """Says in English what a clip shows, such as "a red ball falls, then a blue square enters".

    Args:
        states: The clip.

    Returns:
        One clause for each shape that is seen: those there from the beginning are joined by "and", those that enter
        later follow with "then".
    """
    seen = np.flatnonzero(states.present.any(axis=0)).tolist()
    first = states.present.argmax(axis=0)
    clauses = {shape: f"a {COLOURS[states.colour[shape]]} {KINDS[states.kind[shape]]}" for shape in seen}
    opening = " and ".join(f"{clauses[shape]} {_verb(states, shape)}" for shape in seen if first[shape] == 0)
    entering = sorted((shape for shape in seen if first[shape] > 0), key=lambda shape: first[shape])
    return ", then ".join([opening] + [f"{clauses[shape]} enters" for shape in entering])


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
