"""Reads the state of the procedural world back from pixels, true or generated, and compares it with the truth.

Every pixel is explained as background plus one colour of the palette. Where a colour covers about a shape's area, its
centre of mass is the position, and the best matching of the rendered kinds is the kind. It must not know how the pixels
were made.
"""

import functools
from dataclasses import dataclass

import numpy as np

from vidar.data.world.rendering import BACKGROUND, PALETTE, coverage, patch_corner, patch_index, patch_size
from vidar.data.world.simulation import COLOURS, KINDS, States, WorldConfig, bounds

AMBIGUITY = 30.0  # distance in colour space within which a pixel may belong to either of two colours
SOLID = 0.4  # cover above this belongs to a shape; less does only beside it, as its edge, and is noise elsewhere
LEAST_AREA = 0.4  # of a shape's area: what covers less is not there
OFFSETS = 8  # sub-pixel positions per axis at which the kinds are matched
BLOCK = 1024  # frames read at once, to bound memory


@dataclass(frozen=True)
class Reading:
    """What is seen of each colour of the palette (k = 6) in each frame.

    Attributes:
        position: float64 `[f, k, 2]`, centre of mass `(x, y)` in pixels; NaN where nothing is seen.
        kind: int64 `[f, k]`, index into `KINDS`; -1 where nothing is seen.
        area: float64 `[f, k]`, covered area, in areas of a whole shape.
        present: bool `[f, k]`, whether there is a shape of that colour.
        confidence: float64 `[f, k]` in [0, 1], correlation of what is seen with the rendered kind.
        twice: bool `[f, k]`, whether the colour covers a shape's area away from that shape, too.
    """

    position: np.ndarray
    kind: np.ndarray
    area: np.ndarray
    present: np.ndarray
    confidence: np.ndarray
    twice: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """How a reading differs from the truth, for each of n true shapes.

    Attributes:
        counted: bool `[f, n]`, the true shape lies wholly inside the frame; the rest is only meaningful there.
        found: bool `[f, n]`, a shape was assigned to it.
        error: float64 `[f, n]`, distance of the centres in pixels; the side of the frame where nothing was found.
        colour: bool `[f, n]`, found in its own colour.
        kind: bool `[f, n]`, found as its own kind.
    """

    counted: np.ndarray
    found: np.ndarray
    error: np.ndarray
    colour: np.ndarray
    kind: np.ndarray


def read(frames: np.ndarray, config: WorldConfig) -> Reading:
    """Finds the largest shape of each colour in each frame, and whether there is another.

    Args:
        frames: uint8 `[f, size, size, 3]`, of any number of clips one after another.
        config: Rules of the world.

    Returns:
        What is seen.
    """
    if frames.shape[1:] != (config.size, config.size, 3):
        raise ValueError(f"frames {list(frames.shape)} do not fit a world of {config.size} pixels")
    blocks = [_read(frames[start : start + BLOCK], config) for start in range(0, len(frames), BLOCK)]
    return Reading(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True)))


def compare(reading: Reading, states: States, config: WorldConfig) -> Comparison:
    """Compares what is seen in a clip with what should be there.

    A true shape is assigned what is seen in its colour; where that is missing, the nearest shape of a colour that
    should not be there, so that a shape that changed its colour still has a position. A colour counts as kept where it
    covers no less than any that should not be there.

    Args:
        reading: What is seen in f frames.
        states: The truth of the same frames, with n shapes.
        config: Rules of the world.

    Returns:
        The comparison, frame by frame and shape by shape.
    """
    low, high = bounds(config, states.kind)
    counted = np.all((states.position >= low - 1e-6) & (states.position <= high + 1e-6), axis=-1)
    found = reading.present[:, states.colour]
    slot = np.broadcast_to(states.colour, found.shape).copy()
    distance = np.linalg.norm(reading.position[:, None] - states.position[:, :, None], axis=-1)
    stray = reading.present.copy()
    stray[:, states.colour] = False
    largest_stray = np.where(stray, reading.area, 0.0).max(axis=1)
    colour = found & (reading.area[:, states.colour] >= largest_stray[:, None])
    for frame, shape in np.argwhere(counted & ~found):
        candidates = np.where(stray[frame], distance[frame, shape], np.inf)
        nearest = candidates.argmin()
        if stray[frame, nearest]:
            slot[frame, shape], found[frame, shape], stray[frame, nearest] = nearest, True, False
    error = np.take_along_axis(distance, slot[..., None], axis=-1)[..., 0]
    kind = found & (np.take_along_axis(reading.kind, slot, axis=1) == states.kind)
    return Comparison(counted, found, np.where(found, error, float(config.size)), colour, kind)


def _read(frames: np.ndarray, config: WorldConfig) -> tuple[np.ndarray, ...]:
    """The fields of a `Reading`."""
    shape = (len(frames), len(COLOURS))
    position, kind = np.full((*shape, 2), np.nan), np.full(shape, -1)
    area, confidence, twice = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    whole = np.pi * config.radius**2
    margin = patch_size(config)
    cover_fkhw = _explain(frames)
    seen = np.nonzero(cover_fkhw.sum(axis=(2, 3)) >= LEAST_AREA * whole)
    cover_ehw = np.pad(cover_fkhw[seen], ((0, 0), (margin, margin), (margin, margin)))
    centre = _densest(cover_ehw, 2 * round(config.radius) + 1)
    for _ in range(3):
        corner, _ = patch_corner(config, centre)
        centre = corner + _centre_of_mass(cover_ehw[patch_index(config, corner)])
    corner, offset = patch_corner(config, centre)
    patch = cover_ehw[patch_index(config, corner)]
    area[seen] = patch.sum(axis=(1, 2)) / whole
    twice[seen] = cover_ehw.sum(axis=(1, 2)) / whole - area[seen] >= LEAST_AREA
    kind[seen], confidence[seen] = _match(patch, offset, config)
    position[seen] = centre - margin
    present = area >= LEAST_AREA
    position[~present], kind[~present] = np.nan, -1
    return position, kind, area, present, np.where(present, confidence, 0.0), twice


def _explain(frames: np.ndarray) -> np.ndarray:
    """float32 `[f, k, H, W]`: how much of each pixel each colour covers."""
    signal = frames.astype(np.float32) - BACKGROUND.astype(np.float32)
    towards = (PALETTE - BACKGROUND).astype(np.float32)
    length = (towards**2).sum(axis=1)
    cover = np.maximum(signal @ (towards / length[:, None]).T, 0)
    residual = (signal**2).sum(axis=-1, keepdims=True) - cover**2 * length
    belief = np.exp((residual.min(axis=-1, keepdims=True) - residual) / (2 * AMBIGUITY**2))
    cover_fkhw = np.moveaxis(np.minimum(cover, 1), -1, 1)
    belief_fkhw = np.moveaxis(belief, -1, 1)
    solid = cover_fkhw * belief_fkhw > SOLID * belief_fkhw.sum(axis=1, keepdims=True)
    belief_fkhw = belief_fkhw * _grow(solid)
    return cover_fkhw * belief_fkhw / np.maximum(belief_fkhw.sum(axis=1, keepdims=True), 1e-6)


def _grow(mask: np.ndarray) -> np.ndarray:
    """Adds the eight neighbours of every true pixel of `[..., H, W]`."""
    for axis in (-1, -2):
        padded = np.pad(mask, [(0, 0)] * (mask.ndim + axis) + [(1, 1)] + [(0, 0)] * (-1 - axis))
        mask = mask | padded.take(range(mask.shape[axis]), axis) | padded.take(range(2, mask.shape[axis] + 2), axis)
    return mask


def _densest(cover_ehw: np.ndarray, window: int) -> np.ndarray:
    """float64 `[e, 2]`: centre `(x, y)` of the square window that holds most cover."""
    sums = np.pad(cover_ehw.cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0)))
    rows = sums[:, window:] - sums[:, :-window]
    boxes = rows[:, :, window:] - rows[:, :, :-window]
    best = boxes.reshape(len(boxes), boxes.shape[1] * boxes.shape[2]).argmax(axis=1)
    return np.stack([best % boxes.shape[2], best // boxes.shape[2]], axis=1) + window / 2


def _centre_of_mass(patch: np.ndarray) -> np.ndarray:
    """float64 `[e, 2]`: `(x, y)` from the patch's corner."""
    along = np.arange(patch.shape[1]) + 0.5
    total = np.maximum(patch.sum(axis=(1, 2)), 1e-6)
    return np.stack([patch.sum(axis=1) @ along, patch.sum(axis=2) @ along], axis=1) / total[:, None]


def _match(patch: np.ndarray, offset: np.ndarray, config: WorldConfig) -> tuple[np.ndarray, np.ndarray]:
    """The kind whose rendering, sharp or soft, correlates best with each patch `[e, p, p]`, and how well."""
    column, row = np.floor((offset - patch_size(config) // 2) * OFFSETS).astype(np.int64).clip(0, OFFSETS - 1).T
    scale = np.maximum(np.sqrt((patch**2).sum(axis=(1, 2))), 1e-6)
    scores = np.einsum("eyx,skeyx->ske", patch, _templates(config)[:, :, row, column]).max(axis=0) / scale
    return scores.argmax(axis=0), scores.max(axis=0)


@functools.cache
def _templates(config: WorldConfig) -> np.ndarray:
    """float64 `[softness, kind, row offset, column offset, p, p]`: cover of each kind, scaled to unit length."""
    fraction = (np.arange(OFFSETS) + 0.5) / OFFSETS + patch_size(config) // 2
    down, right = np.meshgrid(fraction, fraction, indexing="ij")
    offset = np.stack([right.ravel(), down.ravel()], axis=1)
    sharp = np.stack([coverage(config, kind, offset) for kind in range(len(KINDS))])
    covers = np.stack([sharp, _soften(sharp), _soften(_soften(sharp))])
    covers /= np.sqrt((covers**2).sum(axis=(-2, -1), keepdims=True))
    return covers.reshape(*covers.shape[:2], OFFSETS, OFFSETS, *covers.shape[3:])


def _soften(pictures: np.ndarray) -> np.ndarray:
    """Blurs `[..., p, p]` by (1, 2, 1) / 4 along both axes."""
    for axis in (-1, -2):
        pad = [(0, 0)] * (pictures.ndim + axis) + [(1, 1)] + [(0, 0)] * (-1 - axis)
        padded, length = np.pad(pictures, pad), pictures.shape[axis]
        before, after = padded.take(range(length), axis), padded.take(range(2, length + 2), axis)
        pictures = (before + 2 * pictures + after) / 4
    return pictures
