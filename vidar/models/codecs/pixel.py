"""The pixel codec: space-to-depth, exact and without parameters."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange

from vidar.errors import check_range
from vidar.models.codecs.geometry import Geometry


@jax.tree_util.register_static
@dataclass(frozen=True)
class PixelCodec(Geometry):
    """Cuts frames into square patches; latents are pixels in [-1, 1], centred and scaled.

    Attributes:
        patch: Side of a patch in pixels.
        mean: Mean of the data in [-1, 1], subtracted.
        deviation: Standard deviation of the data, divided by.
    """

    kind: ClassVar[str] = "pixel"
    frames_per_latent: ClassVar[int] = 1  # pyright: ignore[reportIncompatibleMethodOverride]
    patch: int = 4  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self) -> None:
        check_range("codec.patch", self.patch, least=1)
        check_range("codec.mean", self.mean)
        check_range("codec.deviation", self.deviation, above=0)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return 3 * self.patch**2

    @property
    def config(self) -> "PixelCodec":
        """Itself."""
        return self

    def encode(self, pixels_bfhwc: jax.Array) -> jax.Array:
        """Encodes uint8 pixels `[b, f, h, w, 3]` to fp32 latents `[b, f, h / patch, w / patch, channels]`."""
        scaled = (pixels_bfhwc.astype(jnp.float32) / 127.5 - 1.0 - self.mean) / self.deviation
        return rearrange(scaled, "b f (h p) (w q) c -> b f h w (p q c)", p=self.patch, q=self.patch)

    def decode(self, latents_bfhwc: jax.Array) -> jax.Array:
        """Decodes latents to uint8 pixels, clipped and rounded."""
        scaled = latents_bfhwc.astype(jnp.float32) * self.deviation + self.mean
        pixels = jnp.clip(jnp.round((scaled + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)
        return rearrange(pixels, "b f h w (p q c) -> b f (h p) (w q) c", p=self.patch, q=self.patch)

    def init_state(self, rows: int, height: int, width: int) -> Any:
        """Streaming state of `rows` sessions whose latents are `height` × `width`: none."""
        return ()

    def decode_chunk(self, state: Any, latents_bfhwc: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """Decodes one chunk of a stream.

        Args:
            state: From `init_state` or the previous chunk.
            latents_bfhwc: Latents of the chunk.

        Returns:
            Next state, uint8 frames `[b, f, h, w, 3]`, and the number of valid frames of each row, int32 `[b]`.
        """
        frames = self.decode(latents_bfhwc)
        return state, frames, jnp.full((frames.shape[0],), frames.shape[1], jnp.int32)
