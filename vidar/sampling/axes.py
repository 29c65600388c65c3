"""The axes of a system that objectives see, composed once by `vidar.system`."""

from dataclasses import dataclass

from vidar.attention.visibility import Layout, Visibility, chunk_layout
from vidar.diffusion.levels import LevelsConfig
from vidar.sampling.rollout import Sampler


@dataclass(frozen=True)
class Axes:
    """Everything besides networks and data that a loss depends on; hashable.

    Attributes:
        levels: How training levels are drawn.
        visibility: Who sees whom in a training pass, window included.
        sampler: How the student generates: plan, solver, context, guidance.
        drop: Probability that a training clip's conditions are dropped, for guidance.
    """

    levels: LevelsConfig
    visibility: Visibility
    sampler: Sampler
    drop: float = 0.0

    def layout(self, frames: int, role: int = 0) -> Layout:
        """Layout of a clip of `frames` frames in this system's chunks."""
        return chunk_layout(frames, self.sampler.chunk, independent_first_frame=self.sampler.first, role=role)
