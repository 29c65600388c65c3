"""What trained cells are measured by: the procedural world's exact errors, or recorded gameplay under its own actions.

Takes videos and gives numbers for each clip and frame. Everything is determined by the evaluation's own seed, so that
all cells see the same clips. This module must not know networks, cells or seeds of training.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vidar.data.pipeline import DataConfig, make_dataset
from vidar.data.records import Episodes
from vidar.errors import ConfigError, DataError, check_range
from vidar.evaluation import metrics, world
from vidar.evaluation.control import Turning, turning
from vidar.evaluation.drift import curve
from vidar.evaluation.form import Form

Generate = Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]
"""From given frames uint8 `[b, g, h, w, 3]`, actions `[b, f]` and label `[b]` to video uint8 `[b, f, h, w, 3]`."""

VIDEO, TURNING = "video", "turning"
_TURNED = ("turn_left", "turn_right")
# 1 where more is better, -1 where less is.
_PIXELS = {"psnr": 1, "saturation_error": -1, "luminance_error": -1, "sharpness_error": -1}
_UNITS = {"psnr": "dB"}


@dataclass(frozen=True)
class Truth:
    """Held-out clips that every cell continues from their first frames.

    Attributes:
        pixels: What should be seen, uint8 `[b, f, h, w, 3]`.
        actions: int32 `[b, f]`.
        label: Class of each clip, int32 `[b]`, or None.
    """

    pixels: np.ndarray
    actions: np.ndarray
    label: np.ndarray | None = None


@dataclass(frozen=True)
class Evaluation:
    """What all evaluations have in common.

    Attributes:
        spans: Ranges of frames `(start, stop)` over which metrics are averaged, by name.
        clips: Held-out clips.
        frames: Frames of each rollout, given ones included; far more than in training shows drift.
        given: Frames that are given.
        seed: Seed of the clips, and of the noise that rollouts start from.
    """

    spans: Mapping[str, tuple[int, int]]
    clips: int = 32
    frames: int = 264
    given: int = 1
    seed: int = 0

    directions: ClassVar[Mapping[str, int]] = _PIXELS
    units: ClassVar[Mapping[str, str]] = _UNITS
    limits: ClassVar[str] = ""
    """What a metric has where there is nothing to measure, for people."""

    def __post_init__(self) -> None:
        check_range("clips", self.clips, least=1)
        check_range("given", self.given, least=1)
        check_range("frames", self.frames, least=self.given + 2)
        check_range("seed", self.seed, least=0, below=metrics.SEEDS)
        if not self.spans:
            raise ConfigError("spans: give at least one, such as {'whole': (1, 264)}")
        for name, (start, stop) in self.spans.items():
            if name == TURNING or not self.given <= start < stop <= self.frames:
                raise ConfigError(f"spans.{name}=({start}, {stop}) must lie within {self.given} … {self.frames}")

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of everything that metrics are averaged over, from early to late."""
        return tuple(sorted(self.spans, key=lambda name: self.spans[name]))

    @property
    def form(self) -> Form | None:
        """Form of the clips; None where it is not known yet."""
        return None

    def metrics_of(self, span: str) -> tuple[str, ...]:
        """Names of the metrics with a direction that are known over a span."""
        return tuple(self.directions)

    def rollouts(self, generate: Generate, truth: Truth) -> dict[str, np.ndarray]:
        """Generates everything that `measure` reads, uint8 videos by name."""
        return {VIDEO: generate(truth.pixels[:, : self.given], truth.actions, truth.label)}

    def values(self, video: np.ndarray, truth: Truth) -> dict[str, np.ndarray]:
        """Metrics of every clip and frame, each `[b, f]`; `_shift` is the signed difference from the truth."""
        values = {"psnr": metrics.psnr(video, truth.pixels), "distance_to_first": metrics.distance_to_first(video)}
        for name in ("saturation", "luminance", "sharpness"):
            measured = getattr(metrics, name)
            values[f"{name}_shift"] = measured(video) - measured(truth.pixels)
            values[f"{name}_error"] = np.abs(values[f"{name}_shift"])
        return values

    def measure(self, rollouts: Mapping[str, np.ndarray], truth: Truth) -> dict[str, Any]:
        """Measures rollouts.

        Args:
            rollouts: Videos by name, from `rollouts`.
            truth: The clips.

        Returns:
            Plain values: `spans`, the mean of each metric of each clip `[b]` by span and metric; and `curves`, each
            metric over the frames after the given ones (`vidar.evaluation.drift.Curve`).
        """
        values = self.values(rollouts[VIDEO], truth)
        spans = {
            span: {name: value[:, start:stop].mean(axis=1).tolist() for name, value in values.items()}
            for span, (start, stop) in self.spans.items()
        }
        curves = {name: asdict(curve(np.asarray(value, np.float64)[:, self.given :])) for name, value in values.items()}
        return {"spans": spans, "curves": curves}


@dataclass(frozen=True)
class WorldEvaluation(Evaluation):
    """Held-out action sequences of the one-shape world, against its simulated truth."""

    kind: ClassVar[str] = "world"
    directions: ClassVar[Mapping[str, int]] = {"position_error": -1, "identity_kept": 1, "colour_kept": 1} | _PIXELS
    units: ClassVar[Mapping[str, str]] = {"position_error": "px"} | _UNITS
    limits: ClassVar[str] = f"A shape that vanished has a position error of {world.FORM.size[0]} px, the frame's side."

    @property
    def form(self) -> Form:
        """That of the one-shape world."""
        return world.FORM

    def truth(self) -> Truth:
        """Draws the sequences; no data set holds them."""
        held_out = self._held_out()
        return Truth(held_out.pixels, held_out.actions, held_out.label)

    def values(self, video: np.ndarray, truth: Truth) -> dict[str, np.ndarray]:
        """As for any evaluation, with the exact errors of the controlled shape."""
        score = world.score(video, self._held_out())
        exact = {"position_error": score.error, "identity_kept": score.identity, "colour_kept": score.colour}
        return exact | super().values(video, truth)

    def _held_out(self) -> world.HeldOut:
        return world.held_out(self.clips, self.frames, self.seed)


@dataclass(frozen=True)
class DoomEvaluation(Evaluation):
    """Held-out recorded gameplay, continued under the actions that were recorded.

    Attributes:
        records: Recording with a validation split.
        split: Its split.
        stride: Frames from one possible start to the next within an episode.
        turns: Frames of the videos that turn left and right from the same starts, for the sign of their optical flow
            (span `turning`, metric `right_sign`); None leaves them out.
    """

    kind: ClassVar[str] = "doom"
    records: str = "data/doom"
    split: str = "validation"
    stride: int = 37
    turns: int | None = None

    directions: ClassVar[Mapping[str, int]] = _PIXELS | {"right_sign": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("turns", self.turns, above=self.given)

    @property
    def measured(self) -> tuple[str, ...]:
        """The spans, and the turning test."""
        return (*super().measured, *((TURNING,) if self.turns else ()))

    @property
    def form(self) -> Form | None:
        """As it was recorded."""
        if not Path(self.records).is_dir():
            return None
        found = Episodes(self.records, self.split).form
        height, width = found.size
        return Form(self.records, (height, width), 0 if found.actions is None else len(found.actions.names))

    def metrics_of(self, span: str) -> tuple[str, ...]:
        """The turning test has one metric of its own."""
        return ("right_sign",) if span == TURNING else tuple(_PIXELS)

    def truth(self) -> Truth:
        """Reads the clips.

        Raises:
            DataError: There is no such recording, or it has fewer clips.
        """
        choice = DataConfig(
            records=self.records,
            split=self.split,
            frames=self.frames,
            stride=self.stride,
            batch=self.clips,
            seed=self.seed,
            repeat=False,
        )
        batch = next(iter(make_dataset(choice)))
        if "actions" not in batch:
            raise DataError(f"{self.records}: has no actions to continue under")
        return Truth(batch["pixels"], np.asarray(batch["actions"], np.int32))

    def rollouts(self, generate: Generate, truth: Truth) -> dict[str, np.ndarray]:
        """The continuations, and the turns."""
        videos = super().rollouts(generate, truth)
        if self.turns is None:
            return videos
        spec = Episodes(self.records, self.split).form.actions
        missing = set(_TURNED) - set(spec.names)
        if missing:
            raise DataError(f"{self.records}: has no action {min(missing)} for the turning test: leave turns out")
        left, right = (spec.names.index(name) for name in _TURNED)

        def both(given: np.ndarray, actions: np.ndarray) -> np.ndarray:
            # Both turns of a start share their seed.
            return np.concatenate([generate(given[part], actions[part], None) for part in self._halves])

        return videos | {TURNING: self._turn(both, truth, left, right).videos}

    def measure(self, rollouts: Mapping[str, np.ndarray], truth: Truth) -> dict[str, Any]:
        """As for any evaluation, with the share of each start's two turns that move the right way."""
        measured = super().measure(rollouts, truth)
        if TURNING in rollouts:
            result = self._turn(lambda given, actions: rollouts[TURNING], truth)
            hits = np.stack([result.flow_left > 0, result.flow_right < 0]).mean(axis=0)
            measured["spans"][TURNING] = {"right_sign": hits.tolist()}
        return measured

    @property
    def _halves(self) -> tuple[slice, slice]:
        """Rows that turn left, and rows that turn right."""
        return slice(0, self.clips), slice(self.clips, None)

    def _turn(self, generate: Any, truth: Truth, left: int = 0, right: int = 1) -> Turning:
        return turning(generate, truth.pixels[:, : self.given], self.turns or 0, left, right)
