"""The captioned world: one or two shapes in small frames, with captions that training never shows.

Captions are held out by what they are about: some combinations of colours and kinds occur in no training clip, though
each shape of them does. This module chooses clips; how they come about is the simulation's business.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from vidar.data.world.simulation import States, WorldConfig, bounds, sample_actions, simulate

CAPTIONED = WorldConfig(size=20, shapes=2, speed=2.2, late=0.5, frames=8)
SHOWN = 2  # frames at a clip's end in which every shape is whole, so that its kind can be told
_PARTS = 5  # one combination in five is held out


def is_held_out(states: States) -> bool:
    """Whether training must not show a clip: a fifth of the combinations of colours and kinds, spread evenly.

    Args:
        states: The clip.

    Returns:
        True for the combinations of the validation split.
    """
    place = np.arange(len(states.kind))
    return int(((place + 1) * states.colour + (2 * place + 1) * states.kind).sum()) % _PARTS == 0


def is_clear(world: WorldConfig, states: States) -> bool:
    """Whether every shape, late ones too, lies wholly inside the last frames: then its kind can be told.

    Args:
        world: Rules of the world.
        states: The clip.

    Returns:
        True for clips that are used.
    """
    low, high = bounds(world, states.kind)
    last = states.position[-SHOWN:]
    return bool(np.all((last >= low - 1e-6) & (last <= high + 1e-6)))


def chosen(world: WorldConfig, seeds: Iterator[int] | range, held_out: bool) -> Iterator[int]:
    """Picks the clips of a split.

    Args:
        world: Rules of the world.
        seeds: Candidates.
        held_out: Whether the held-out combinations are wanted, or all others.

    Yields:
        Seeds of clear clips.
    """
    for seed in seeds:
        states = simulate(world, seed, sample_actions(world, seed, world.frames))
        if is_held_out(states) == held_out and is_clear(world, states):
            yield seed


def draw_held_out(clips: int, seed: int) -> tuple[States, ...]:
    """Draws clips of held-out combinations.

    Args:
        clips: Number of clips.
        seed: First candidate; choose one that occurs in no data set.

    Returns:
        Their true states.
    """
    seeds = itertools.islice(chosen(CAPTIONED, itertools.count(seed), held_out=True), clips)
    return tuple(simulate(CAPTIONED, number, sample_actions(CAPTIONED, number, CAPTIONED.frames)) for number in seeds)
