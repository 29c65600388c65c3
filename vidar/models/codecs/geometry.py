"""How many latents a codec makes of how many pixels, in space and time.

A codec is a network, or anything that JAX can pass as an argument, with `config`, a `Geometry`; `encode` and `decode`
for clips; and `init_state`, `decode_chunk` for streams. The pixel codec has no weights and is its own config.
"""

from abc import ABC, abstractmethod

from vidar.errors import ConfigError


class Geometry(ABC):
    """Sizes of pixels and latents; the first latent frame is one pixel frame, each other `frames_per_latent`."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Latent channels."""

    @property
    @abstractmethod
    def patch(self) -> int:
        """Pixels of a latent's side."""

    @property
    @abstractmethod
    def frames_per_latent(self) -> int:
        """Pixel frames of a latent frame but the first."""

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent height and width of a frame of `height` × `width` pixels.

        Raises:
            ConfigError: They are not whole multiples of the patch.
        """
        if min(height, width) < 1 or height % self.patch or width % self.patch:
            raise ConfigError(f"frames of {height}×{width} pixels are not whole multiples of {self.patch}")
        return height // self.patch, width // self.patch

    def latent_frames(self, frames: int) -> int:
        """Latent frames of `frames` pixel frames.

        Raises:
            ConfigError: They do not come out even.
        """
        step = self.frames_per_latent
        if frames < 1 or (frames - 1) % step:
            fits = 1 + step * max(0, round((frames - 1) / step))
            raise ConfigError(f"clips of {frames} frames are not 1 + {step} n frames; {fits} would be")
        return 1 + (frames - 1) // step

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames of `latent_frames` latent frames."""
        return 1 + (latent_frames - 1) * self.frames_per_latent
