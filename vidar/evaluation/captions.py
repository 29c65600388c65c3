"""Caption accuracy: generated clips of the captioned world are read back and compared with what their captions say.

Takes videos and captions; it must not know networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vidar.data import world
from vidar.evaluation.metrics import first_of, share_interval

_HELD_OUT = 2**30
"""Seeds from here on occur in no data set."""
_LEAST_FRAMES = 2
"""Frames in which a colour must be seen before it counts as a shape: generated video flickers."""
FACTS = ("count", "colours", "kinds", "order")


@dataclass(frozen=True)
class HeldOut:
    """Clips whose combinations of colours and kinds training never shows.

    Attributes:
        captions: What each shows.
        pixels: True clips of these captions, uint8 `[b, f, h, w, 3]`; others would be as true.
    """

    captions: tuple[str, ...]
    pixels: np.ndarray


@dataclass(frozen=True)
class Accuracy:
    """Which facts of the captions the clips show, bool `[b]` each.

    Attributes:
        count: As many shapes as named, two of one colour counted twice.
        colours: Shapes of the named colours and of no others.
        kinds: The shape of each named colour is of its named kind.
        order: The shapes there from the beginning are those named so, and the others enter in the named order.
        verbs: Those there from the beginning do what is said of them.
    """

    count: np.ndarray
    colours: np.ndarray
    kinds: np.ndarray
    order: np.ndarray
    verbs: np.ndarray

    @property
    def all(self) -> np.ndarray:
        """Count, colours, kinds and order at once, bool `[b]`; what the shapes do is not asked for."""
        return np.logical_and.reduce([getattr(self, name) for name in FACTS])

    def summary(self) -> dict[str, tuple[float, float, float]]:
        """Mean and 95 % interval over clips of each fact, of `all` and of the verbs."""
        result = {}
        for name in (*FACTS, "all", "verbs"):
            values = getattr(self, name)
            share = float(values.mean())
            result[name] = (share, *share_interval(share, len(values)))
        return result


def held_out(clips: int, seed: int = 0) -> HeldOut:
    """Draws captions that training never shows.

    Args:
        clips: Number of captions, ≥ 1.
        seed: Captions of different seeds have nothing to do with each other.

    Returns:
        Captions with true clips.
    """
    truths = world.draw_held_out(clips, _HELD_OUT + first_of(seed))
    pixels = np.stack([world.render(world.CAPTIONED, states) for states in truths])
    return HeldOut(tuple(world.caption(states) for states in truths), pixels)


def accuracy(video: np.ndarray, captions: Sequence[str]) -> Accuracy:
    """Compares clips with their captions.

    Args:
        video: uint8 `[b, f, h, w, 3]`.
        captions: What each should show, in the words of `vidar.data.world.caption`.

    Returns:
        The facts that agree.

    Raises:
        DataError: A caption is none of the procedural world's.
    """
    rows = [_agree(seen(clip), world.parse(text)) for clip, text in zip(video, captions, strict=True)]
    return Accuracy(*np.asarray(rows, bool).T)


def seen(clip: np.ndarray) -> tuple[world.Clause, ...]:
    """Reads what a clip shows.

    Args:
        clip: uint8 `[f, h, w, 3]` of the captioned world.

    Returns:
        What its caption says, or would say; nothing where no shape is seen. Where there is a second shape of one
        colour, which no caption has, its clause is there twice.
    """
    reading = world.read(clip, world.CAPTIONED)
    colours = np.flatnonzero(reading.present.sum(axis=0) >= _LEAST_FRAMES)
    if not len(colours):
        return ()
    present = reading.present[:, colours]
    weight = np.where(present, reading.confidence[:, colours], 0.0)
    votes = np.stack([np.where(reading.kind[:, colours] == kind, weight, 0.0).sum(0) for kind in range(3)])
    states = world.States(reading.position[:, colours], votes.argmax(axis=0), colours, present)
    doubled = colours[reading.twice[:, colours].sum(axis=0) >= _LEAST_FRAMES]
    clauses = world.clauses(states)
    return (*clauses, *(clause for clause in clauses if clause.colour in doubled))


def _agree(found: Sequence[world.Clause], wanted: Sequence[world.Clause]) -> tuple[bool, ...]:
    """Count, colours, kinds, order and verbs."""
    shown = {clause.colour: clause for clause in found}
    there = [clause for clause in wanted if clause.verb != world.ENTERS]
    return (
        len(found) == len(wanted),
        shown.keys() == {clause.colour for clause in wanted},
        all(clause.colour in shown and shown[clause.colour].kind == clause.kind for clause in wanted),
        _order(found) == _order(wanted),
        all(clause.colour in shown and shown[clause.colour].verb == clause.verb for clause in there),
    )


def _order(clauses: Sequence[world.Clause]) -> tuple[frozenset[int], list[int]]:
    """Colours that are there from the beginning, and the others as they enter."""
    there = frozenset(clause.colour for clause in clauses if clause.verb != world.ENTERS)
    return there, list(dict.fromkeys(clause.colour for clause in clauses if clause.verb == world.ENTERS))
