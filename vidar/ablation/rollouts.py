"""What a trained network shows: streamed far past its training length, as it is and with a known harm to its context.

Takes a built system and its network; it must not know cells, disks or metrics.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from vidar.ablation.card import Control
from vidar.ablation.measures import Generate
from vidar.sampling.rollout import Sampler
from vidar.streaming import Engine
from vidar.system import System, streaming_sampler


def stream_sampler(system: System, given: int) -> Sampler:
    """The system's sampler for endless video; a single given frame is a chunk of its own.

    Args:
        system: The system.
        given: Frames that are given.

    Returns:
        The sampler.

    Raises:
        ConfigError: The window does not align with the chunks.
    """
    return streaming_sampler(system, first=given == 1 and system.config.video.chunk > 1)


def streamer(system: System, model: Any, given: int, seed: int) -> Generate:
    """Streams a network.

    Args:
        system: The system.
        model: Its network.
        given: Frames that will be given.
        seed: Seed of the first session; the others count on.

    Returns:
        The function.
    """
    return _Streamer(system, model, stream_sampler(system, given), seed)


def harmed(system: System, model: Any, given: int, seed: int, control: Control, amount: float) -> Generate:
    """As `streamer`, with the context corrupted by a known amount.

    Args:
        system: The system.
        model: Its network.
        given: Frames that will be given.
        seed: Seed of the first session.
        control: What is corrupted.
        amount: How much, in (0, 1].

    Returns:
        The function.
    """
    sampler = stream_sampler(system, given)
    if control.corrupt == "given":
        clean = _Streamer(system, model, sampler, seed)
        return lambda pixels, actions, label: clean(_blended(pixels, amount, seed), actions, label)
    commit = replace(sampler.commit, level=amount, noise=True, time=None)
    return _Streamer(system, model, replace(sampler, commit=commit), seed)


def _blended(pixels: np.ndarray, amount: float, seed: int) -> np.ndarray:
    """Pixels with a share of uniform noise, the same for every network."""
    noise = np.random.default_rng(seed).uniform(0, 255, pixels.shape)
    return np.round((1 - amount) * pixels.astype(np.float64) + amount * noise).astype(np.uint8)


class _Streamer:
    """Streams batches of sessions; compiles once for each number of rows."""

    def __init__(self, system: System, model: Any, sampler: Sampler, seed: int):
        self._system, self._model, self._sampler, self._seed = system, model, sampler, seed
        self._engines: dict[int, Engine] = {}

    def __call__(self, given: np.ndarray, actions: np.ndarray, label: np.ndarray | None) -> np.ndarray:
        config = self._model.config
        rows = len(given)
        if rows not in self._engines:
            codec = self._system.config.codec
            self._engines[rows] = Engine(self._sampler, codec, self._model, rows=rows, compile_now=False)
        engine, start = self._engines[rows], given.shape[1]
        known = None if config.actions is None else actions
        opening = None if known is None else known[:, :start]
        engine.open(self._seed, given, opening, label if config.classes else None)
        chunks = list(engine.frames(self._ticks(known, start, actions.shape[1])))
        return np.concatenate([given, *chunks], axis=1)[:, : actions.shape[1]]

    def _ticks(self, actions: np.ndarray | None, start: int, frames: int) -> Iterator[np.ndarray | None]:
        """Actions of each chunk; the last chunk may be a longer one than is asked for, and a pipeline has to empty."""
        chunk = self._sampler.chunk
        ticks = -(-(frames - start) // chunk) + self._sampler.program.delay
        for first in range(start, start + ticks * chunk, chunk):
            wanted = np.minimum(np.arange(first, first + chunk), frames - 1)
            yield None if actions is None else actions[:, wanted]
