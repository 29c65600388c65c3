"""How the procedural world looks: flat colours, anti-aliased, on a dark ground.

It turns positions, kinds and colours into pixels; how they came about is the simulation's business.
"""

import math

import numpy as np

from vidar.data.world.simulation import BALL, SQUARE, States, WorldConfig, bounds, reach

BACKGROUND = np.array([18, 18, 26], np.float64)
PALETTE = np.array(
    [[235, 45, 40], [240, 215, 40], [45, 200, 70], [45, 215, 230], [60, 85, 245], [225, 60, 220]], np.float64
)
LINES = 16  # horizontal lines per pixel, on each of which the covered part is exact


def render(config: WorldConfig, states: States) -> np.ndarray:
    """Draws the frames of a clip; of shapes that overlap, the later one lies on top.

    Args:
        config: Rules of the world.
        states: What to draw, f frames of n shapes.

    Returns:
        uint8 `[f, size, size, 3]`.
    """
    frames, shapes = states.position.shape[:2]
    margin = patch_size(config)
    side = config.size + 2 * margin
    canvas = np.broadcast_to(BACKGROUND, (frames, side, side, 3)).copy()
    for shape in range(shapes):
        # A shape further out than the margin touches no pixel of the frame.
        position = np.clip(states.position[:, shape], -margin / 2, config.size + margin / 2)
        corner, offset = patch_corner(config, position)
        cover = coverage(config, int(states.kind[shape]), offset)[..., None]
        where = patch_index(config, corner + margin)
        canvas[where] += cover * (PALETTE[states.colour[shape]] - canvas[where])
    inside = slice(margin, margin + config.size)
    return np.round(canvas[:, inside, inside]).astype(np.uint8)


def coverage(config: WorldConfig, kind: int, offset: np.ndarray) -> np.ndarray:
    """Which part of each pixel of a small square patch a shape covers.

    Args:
        config: Rules of the world.
        kind: Index into `KINDS`.
        offset: float64 `[k, 2]`, centre of mass `(x, y)` in pixels from the patch's upper left corner.

    Returns:
        float64 `[k, p, p]` in [0, 1], p = `patch_size`.
    """
    patch = patch_size(config)
    lines = (np.arange(patch * LINES) + 0.5) / LINES
    half_width = _half_width(config, kind, lines - offset[:, 1:])[:, :, None]
    left = (np.arange(patch) - offset[:, :1])[:, None, :]
    covered = np.clip(np.minimum(left + 1, half_width) - np.maximum(left, -half_width), 0, None)
    return covered.reshape(len(offset), patch, LINES, patch).mean(axis=2)


def _half_width(config: WorldConfig, kind: int, down: np.ndarray) -> np.ndarray:
    """Half of a shape's width on horizontal lines at a distance below its centre."""
    if kind == BALL:
        return np.sqrt(np.maximum(config.radius * config.radius - down * down, 0))
    low, high = bounds(config, np.array([kind]))
    left, up = low[0]
    bottom = config.size - high[0, 1]
    width = np.full_like(down, left) if kind == SQUARE else (down + up) / math.sqrt(3)
    return np.where((down >= -up) & (down <= bottom), width, 0.0)


def patch_size(config: WorldConfig) -> int:
    """Side, in pixels, of a patch that holds any shape whose centre lies in its middle pixel."""
    return 2 * math.ceil(float(reach(config, np.arange(3)).max())) + 1


def patch_corner(config: WorldConfig, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The patch whose middle pixel holds a position.

    Args:
        config: Rules of the world.
        position: float64 `[k, 2]`.

    Returns:
        Its upper left pixel `(x, y)`, int64 `[k, 2]`, and the position from there, float64 `[k, 2]`.
    """
    corner = np.floor(position).astype(np.int64) - patch_size(config) // 2
    return corner, position - corner


def patch_index(config: WorldConfig, corner: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index arrays that select one patch `[k, p, p]` from each of k frames, given int64 `[k, 2]` corners `(x, y)`."""
    along = np.arange(patch_size(config))
    frame = np.arange(len(corner))
    return frame[:, None, None], (corner[:, 1:] + along)[:, :, None], (corner[:, :1] + along)[:, None, :]
