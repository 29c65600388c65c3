"""Rollouts of the procedural world against its ground truth: position, identity and colour, frame by frame.

Takes videos and the truth of their action sequences; it must not know networks.
"""

from dataclasses import dataclass

import numpy as np

from vidar.data import world
from vidar.evaluation.form import Form
from vidar.evaluation.metrics import bootstrap_interval, first_of

_HELD_OUT = 2**30
"""Seeds from here on occur in no data set."""
FORM = Form(
    "the one-shape world", (world.WorldConfig().size, world.WorldConfig().size), len(world.ACTIONS), len(world.KINDS)
)


@dataclass(frozen=True)
class HeldOut:
    """Held-out action sequences with their truth.

    Attributes:
        config: Rules of the world.
        actions: int32 `[b, f]`.
        states: Truth of each sequence.
        pixels: uint8 `[b, f, h, w, 3]`.
    """

    config: world.WorldConfig
    actions: np.ndarray
    states: tuple[world.States, ...]
    pixels: np.ndarray

    @property
    def label(self) -> np.ndarray:
        """Kind of the controlled shape, int32 `[b]`, which is the class of a clip."""
        return np.asarray([states.kind[0] for states in self.states], np.int32)


@dataclass(frozen=True)
class Score:
    """Errors of a rollout.

    Attributes:
        error: Distance of the controlled shape from the truth in pixels, `[b, f]`; the frame's side where it vanished.
        identity: Whether kind and colour are the true ones, bool `[b, f]`.
        colour: Whether the colour is the true one, bool `[b, f]`.
    """

    error: np.ndarray
    identity: np.ndarray
    colour: np.ndarray

    def part(self, start: int, stop: int) -> "Score":
        """Frames `start:stop`."""
        return Score(self.error[:, start:stop], self.identity[:, start:stop], self.colour[:, start:stop])

    def summary(self) -> dict[str, tuple[float, float, float]]:
        """Mean and 95 % interval over sequences of each metric, averaged over frames."""
        values = {"position error": self.error, "identity kept": self.identity, "colour kept": self.colour}
        result = {}
        for name, value in values.items():
            mean = value.astype(np.float64).mean(axis=1, keepdims=True)
            low, high = bootstrap_interval(mean)
            result[name] = (float(mean.mean()), float(low[0]), float(high[0]))
        return result


def held_out(clips: int, frames: int, seed: int = 0) -> HeldOut:
    """Draws held-out sequences of the one-shape world.

    Args:
        clips: Number of sequences.
        frames: Frames of each.
        seed: Sequences of different seeds have nothing to do with each other.

    Returns:
        Sequences that no data set holds.
    """
    config = world.WorldConfig(frames=frames)
    first = _HELD_OUT + first_of(seed)
    seeds = range(first, first + clips)
    actions = [world.sample_actions(config, number, frames) for number in seeds]
    states = [world.simulate(config, number, track) for number, track in zip(seeds, actions, strict=True)]
    pixels = np.stack([world.render(config, truth) for truth in states])
    return HeldOut(config, np.stack(actions).astype(np.int32), tuple(states), pixels)


def score(video: np.ndarray, truth: HeldOut) -> Score:
    """Reads a rollout and compares it with the truth.

    Args:
        video: uint8 `[b, f, h, w, 3]`, the first frames of the sequences.
        truth: The sequences.

    Returns:
        Errors of the controlled shape.
    """
    frames = video.shape[1]
    errors, identities, colours = [], [], []
    for clip, states in zip(video, truth.states, strict=True):
        part = world.States(states.position[:frames], states.kind, states.colour, states.present[:frames])
        seen = world.compare(world.read(clip, truth.config), part, truth.config)
        errors.append(np.where(seen.found[:, 0], seen.error[:, 0], truth.config.size))
        colours.append(seen.found[:, 0] & seen.colour[:, 0])
        identities.append(colours[-1] & seen.kind[:, 0])
    return Score(np.stack(errors), np.stack(identities), np.stack(colours))


def standing_still(truth: HeldOut, given: int = 1) -> np.ndarray:
    """The baseline that repeats the last given frame, `[b, f, h, w, 3]`."""
    video = truth.pixels.copy()
    video[:, given:] = video[:, given - 1 : given]
    return video
