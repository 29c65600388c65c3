"""The procedural world: coloured shapes that move, collide and enter; one of them obeys actions.

Everything follows from a seed and the actions, in plain float64 arithmetic without library functions that differ
between machines; so the truth about any action sequence can be computed anywhere. Positions are `(x, y)` in pixels, y
downwards, and pixel `(row, column)` covers `[column, column + 1) × [row, row + 1)`. This module must not know what
shapes look like beyond their extent, nor who learns from them.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np

from vidar.errors import ConfigError

KINDS = ("ball", "square", "triangle")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
ACTIONS = ("none", "left", "right", "up", "down")

BALL, SQUARE, TRIANGLE = range(3)

_HALF_SIDE = math.sqrt(math.pi) / 2  # of a square with the area of the unit circle
_SIDE = math.sqrt(4 * math.pi / math.sqrt(3))  # of an equilateral triangle with that area
# How far each kind reaches from its centre of mass to the left, up, right and down, in radii.
_EXTENTS = np.array(
    [
        [1.0, 1.0, 1.0, 1.0],
        [_HALF_SIDE] * 4,
        [_SIDE / 2, _SIDE / math.sqrt(3), _SIDE / 2, _SIDE / math.sqrt(12)],
    ]
)
_REACH = np.array([1.0, _HALF_SIDE * math.sqrt(2), _SIDE / math.sqrt(3)])  # of the furthest point, in radii
_DIRECTIONS = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], np.float64)
_ROOM = (4, 6, 10)  # side of a frame that holds one, two or three shapes, in radii
_STATE, _POLICY = range(2)  # purposes of a seed


@dataclass(frozen=True)
class WorldConfig:
    """Rules of a world.

    Attributes:
        size: Side of the square frame in pixels.
        shapes: Largest number of shapes in a clip, 1 to 3; a clip has one to this many.
        radius: Radius of a ball in pixels; the other kinds have its area.
        stride: Pixels that an action moves the controlled shape by.
        speed: Largest initial speed of a free shape, in pixels per frame.
        gravity: Acceleration of free shapes in the half of all clips that have gravity, in pixels per frame².
        late: Probability that a free shape enters later.
        frames: Usual length of a clip; late shapes begin to enter within its first half.
    """

    size: int = 16
    shapes: int = 1
    radius: float = 3.0
    stride: float = 1.0
    speed: float = 1.2
    gravity: float = 0.08
    late: float = 0.35
    frames: int = 16

    def __post_init__(self):
        if not 1 <= self.shapes <= 3:
            raise ConfigError(f"shapes: {self.shapes}; a world has 1 to 3")
        room = _ROOM[self.shapes - 1] * self.radius
        if not 0 < room <= self.size:
            raise ConfigError(f"size: {self.size} pixels do not hold {self.shapes} shapes of radius {self.radius:g}")
        if self.frames < 2:
            raise ConfigError(f"frames: {self.frames}; a world's clips have at least 2")


@dataclass(frozen=True)
class State:
    """One instant of a clip with n shapes; shape 0 is the controlled one and has the first colour of the palette.

    Attributes:
        position: float64 `[n, 2]`, centres of mass.
        velocity: float64 `[n, 2]`, pixels per frame; zero for the controlled shape, which has no hidden state.
        kind: int64 `[n]`, index into `KINDS`.
        colour: int64 `[n]`, index into `COLOURS`; no two shapes share it.
        start: int64 `[n]`, frame in which a shape begins to move in from its side; 0 if it is there from the beginning.
        entering: bool `[n]`, not yet wholly inside.
        gravity: Acceleration of this clip's free shapes.
        frame: Frame number of the instant.
    """

    position: np.ndarray
    velocity: np.ndarray
    kind: np.ndarray
    colour: np.ndarray
    start: np.ndarray
    entering: np.ndarray
    gravity: float
    frame: int


@dataclass(frozen=True)
class States:
    """What a clip shows.

    Attributes:
        position: float64 `[f, n, 2]`.
        kind: int64 `[n]`.
        colour: int64 `[n]`.
        present: bool `[f, n]`, the shape's centre is in the frame.
    """

    position: np.ndarray
    kind: np.ndarray
    colour: np.ndarray
    present: np.ndarray


def initial_state(config: WorldConfig, seed: int) -> State:
    """Draws the first instant of a clip.

    Args:
        config: Rules of the world.
        seed: Seed of the clip, ≥ 0.

    Returns:
        The state at frame 0.
    """
    rng = _rng(seed, _STATE)
    count = 1 + int(rng.integers(config.shapes))
    colour = np.sort(np.argsort(rng.random(len(COLOURS)))[:count])
    kind = rng.integers(len(KINDS), size=count)
    position = _scatter(config, kind, rng)
    velocity = config.speed * (2 * rng.random((count, 2)) - 1)
    late = rng.random(count) < config.late
    start = np.where(late, 1 + rng.integers(config.frames // 2, size=count), 0)
    side = rng.integers(4, size=count)
    gravity = config.gravity * float(rng.integers(2))
    start[0], velocity[0] = 0, 0.0
    for shape in np.flatnonzero(start):
        position[shape], velocity[shape] = _at_side(config, kind[shape], side[shape], position[shape], velocity[shape])
    return State(position, velocity, kind, colour, start, start > 0, gravity, 0)


def step(config: WorldConfig, state: State, action: int) -> State:
    """Moves the world on by one frame.

    The action displaces the controlled shape by `stride`, as far as the walls let it. Free shapes fall, bounce off
    walls and, as equal masses, off each other. They bounce off the controlled shape as off a wall, or are pushed by it;
    only where they cannot give way, it is held up. An entering shape is stopped by nothing.

    Args:
        config: Rules of the world.
        state: The instant before.
        action: Index into `ACTIONS`.

    Returns:
        The instant after.
    """
    frame = state.frame + 1
    started = state.start <= frame
    free = started & ~state.entering
    free[0] = False
    velocity = state.velocity.copy()
    position = state.position + np.where(started[:, None], velocity, 0.0)
    position[free, 1] += state.gravity / 2
    velocity[free, 1] += state.gravity
    position[0] += config.stride * _DIRECTIONS[action]
    low, high = bounds(config, state.kind)
    for shape in np.flatnonzero(free):
        _bounce_off_walls(position[shape], velocity[shape], low[shape], high[shape], state.gravity)
    position[0] = np.clip(position[0], low[0], high[0])
    _collide(config, state.kind, position, velocity, started, free)
    inside = np.all((position >= low) & (position <= high), axis=1)
    return dataclasses.replace(
        state, position=position, velocity=velocity, entering=state.entering & ~(started & inside), frame=frame
    )


def simulate(config: WorldConfig, seed: int, actions: np.ndarray) -> States:
    """The true course of a clip under any actions.

    Args:
        config: Rules of the world.
        seed: Seed of the clip, ≥ 0.
        actions: Integers `[f]`, f ≥ 1; `actions[i]` leads from frame i - 1 into frame i, so `actions[0]` has no effect.

    Returns:
        The states of f frames.
    """
    state = initial_state(config, seed)
    positions = [state.position]
    for action in actions[1:]:
        state = step(config, state, int(action))
        positions.append(state.position)
    position = np.stack(positions)
    present = np.all((position >= 0) & (position <= config.size), axis=-1)
    return States(position, state.kind, state.colour, present)


def sample_actions(config: WorldConfig, seed: int, frames: int) -> np.ndarray:
    """Draws the actions of a sticky random player, who holds each for two to six frames.

    Args:
        config: Rules of the world.
        seed: Seed of the clip, ≥ 0.
        frames: How many actions, ≥ 1.

    Returns:
        int32 `[f]`; the first is `none`.
    """
    rng = _rng(seed, _POLICY)
    choices = rng.integers(len(ACTIONS), size=frames)
    holds = 2 + rng.integers(5, size=frames)
    return np.concatenate([[0], np.repeat(choices, holds)])[:frames].astype(np.int32)


def bounds(config: WorldConfig, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the centres of shapes can be that lie wholly inside the frame.

    Args:
        config: Rules of the world.
        kind: Integers `[n]`.

    Returns:
        Smallest and largest `(x, y)`, float64 `[n, 2]` each.
    """
    extent = config.radius * _EXTENTS[kind]
    return extent[:, :2], config.size - extent[:, 2:]


def reach(config: WorldConfig, kind: np.ndarray) -> np.ndarray:
    """Distance from centre to furthest point of shapes.

    Args:
        config: Rules of the world.
        kind: Integers of any shape.

    Returns:
        float64 of that shape, in pixels.
    """
    return config.radius * _REACH[kind]


def _rng(seed: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([int(seed), purpose])))


def _scatter(config: WorldConfig, kind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions inside the frame at which no two shapes touch."""
    low, high = bounds(config, kind)
    separation = reach(config, kind)[:, None] + reach(config, kind)
    np.fill_diagonal(separation, -1.0)
    for _ in range(10_000):
        position = low + rng.random((len(kind), 2)) * (high - low)
        offset = position[:, None] - position
        if (_dot(offset, offset) > separation * np.abs(separation)).all():
            return position
    raise ConfigError(f"size: {config.size} pixels do not hold {len(kind)} shapes of radius {config.radius:g}")


def _at_side(
    config: WorldConfig, kind: int, side: int, position: np.ndarray, velocity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Puts a shape just outside one of the four sides and makes it move straight in, faster than others move."""
    axis, far = divmod(side, 2)
    distance = reach(config, np.asarray(kind))
    outside, inward = position.copy(), np.zeros(2)
    outside[axis] = config.size + distance if far else -distance
    inward[axis] = (config.speed + abs(velocity[axis]) / 2) * (-1 if far else 1)
    return outside, inward


def _bounce_off_walls(
    position: np.ndarray, velocity: np.ndarray, low: np.ndarray, high: np.ndarray, gravity: float
) -> None:
    """Mirrors a shape that has passed a wall, with the speed that keeps its energy where it now is; in place."""
    for axis, pull in enumerate((0.0, gravity)):
        if low[axis] <= position[axis] <= high[axis]:
            continue
        wall, inward = (low, 1.0) if position[axis] < low[axis] else (high, -1.0)
        shift = 2 * (wall[axis] - position[axis])
        position[axis] += shift
        velocity[axis] = inward * math.sqrt(max(0.0, velocity[axis] * velocity[axis] + 2 * pull * shift))


def _collide(
    config: WorldConfig,
    kind: np.ndarray,
    position: np.ndarray,
    velocity: np.ndarray,
    started: np.ndarray,
    free: np.ndarray,
) -> None:
    """Separates shapes that overlap, and turns the velocities of free shapes that approach; in place."""
    low, high = bounds(config, kind)
    reaches = reach(config, kind)
    pairs = list(itertools.combinations(np.flatnonzero(started).tolist(), 2))
    for attempt in range(4):
        for first, second in pairs:
            offset = position[second] - position[first]
            distance = math.sqrt(_dot(offset, offset))
            overlap = reaches[first] + reaches[second] - distance
            if overlap <= 0:
                continue
            normal = offset / distance if distance else np.array([1.0, 0.0])
            first_free, second_free = bool(free[first]), bool(free[second])
            if attempt == 0:
                _turn(velocity[first], velocity[second], normal, first_free, second_free)
            share = _share(first_free, second_free, first == 0, attempt)
            for shape, part in ((first, -share), (second, 1 - share)):
                if part and (free[shape] or shape == 0):
                    position[shape] = np.clip(position[shape] + part * overlap * normal, low[shape], high[shape])


def _turn(first: np.ndarray, second: np.ndarray, normal: np.ndarray, first_free: bool, second_free: bool) -> None:
    """Elastic collision of equal masses along `normal`, or of a free shape with one that is not; in place."""
    if first_free and second_free:
        approach = _dot(first - second, normal)
        if approach > 0:
            first -= approach * normal
            second += approach * normal
        return
    for velocity, towards, is_free in ((first, normal, first_free), (second, -normal, second_free)):
        approach = _dot(velocity, towards)
        if is_free and approach > 0:
            velocity -= 2 * approach * towards


def _share(first_free: bool, second_free: bool, first_controlled: bool, attempt: int) -> float:
    """Which part of an overlap the first of two shapes gives way by."""
    if first_free and second_free:
        return 0.5
    if first_controlled:
        # It pushes free shapes, unless that has not helped: then it is held up. It always yields to entering ones.
        return 0.0 if second_free and attempt < 2 else 1.0
    return 1.0 if first_free else 0.0


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Inner product over the last axis; spelled out, because a BLAS may round it differently elsewhere."""
    return first[..., 0] * second[..., 0] + first[..., 1] * second[..., 1]
