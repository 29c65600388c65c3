"""From a prompt, an image, actions or a class to pixels: a network with all that stands around it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidar.errors import ConfigError, check_range
from vidar.models.dit import DiT
from vidar.models.frames import Conditions, row_labels
from vidar.models.text import byte_tokens
from vidar.preparation.tokenizer import check_prompts
from vidar.sampling.flight import Source
from vidar.sampling.noise import session_keys
from vidar.sampling.rollout import Sampler
from vidar.system import System


@dataclass(frozen=True)
class Pipeline:
    """A model that is ready to generate.

    Attributes:
        system: The system that it belongs to.
        model: The network.
        codec: Latents to pixels and back.
        text: Prompts to what the network takes of them: text states, or tokens where it encodes them itself.
        image: Encoder of the image that conditions the video, where the network takes one.
    """

    system: System
    model: Any
    codec: Any
    text: Callable[[Sequence[str]], np.ndarray] | None = None
    image: Any = None

    def generate(
        self,
        frames: int | None = None,
        *,
        rows: int = 1,
        prompts: Sequence[str] | None = None,
        negative: str = "",
        image: np.ndarray | None = None,
        given: np.ndarray | None = None,
        video: np.ndarray | None = None,
        strength: float = 0.8,
        actions: np.ndarray | None = None,
        label: Any = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Generates clips: from noise, from an image, as the continuation of given frames, or from another video.

        Args:
            frames: Pixel frames of the clips, given ones included; None for `frames()` of the given ones.
            rows: Clips, where neither prompts nor frames say how many.
            prompts: What each clip shows, where the network takes text.
            negative: What none of them shows, where text guides.
            image: What each clip begins with, uint8 `[b, h, w, 3]` of any size, for image-to-video networks; others
                are `given` it.
            given: Pixels of the first frames, uint8 `[b, g, h, w, 3]` of the model's size.
            video: Pixels of whole clips to make these from, uint8 `[b, frames, h, w, 3]`: noised, and finished from
                there chunk by chunk (SDEdit, as CausVid edits a stream).
            strength: How much noise is put into `video`, in (0, 1]: generation begins at the solver's first level that
                is no higher. At 1 nothing is left of it.
            actions: Actions of all latent frames `[b, f, ...]`, or None.
            label: Class of each clip `[b]`, or one for all, where the network has classes.
            seed: Seed of the first clip's session; the others count on from it.

        Returns:
            uint8 pixels `[b, frames, h, w, 3]`.

        Raises:
            ConfigError: What was given does not fit the network, its plan or each other.
        """
        check_prompts(prompts or ())
        sized = [len(value) for value in (prompts, image, given, video) if value is not None]
        if len(set(sized)) > 1:
            raise ConfigError(f"prompts, images and given frames or videos are of {sized} clips: give as many of each")
        rows = sized[0] if sized else rows
        given = None if given is None else self._given(given)
        if actions is not None and self.model.config.actions is None:
            raise ConfigError("actions were given, but the network takes none (model.actions is not set)")
        known = None if given is None else given.shape[1]
        length = frames or self.frames(known)
        sampler = self._sampler(length, known)
        count = sampler.frames
        told = self.told(prompts, negative, sampler)
        labels = row_labels(label, self.model.config.classes, rows)
        conditions = Conditions(
            **told,
            **self._image(image, count),
            actions=None if actions is None else jnp.asarray(actions[:, :count]),
            label=None if labels is None else jnp.asarray(labels),
        )
        latents = None if given is None else _encode(self.codec, jnp.asarray(given))
        source = None if video is None else self._source(video, length, strength, sampler)
        latents = _generate(sampler, count, self.model, session_keys(seed, rows), conditions, latents, source)
        return np.asarray(_decode(self.codec, latents))

    def frames(self, given: int | None = None) -> int:
        """Pixel frames of a clip where nothing else is said: the model's own, or fewer, so that whole chunks follow.

        Args:
            given: Pixel frames that are given; after a single one, chunks begin at the second latent frame.

        Returns:
            Pixel frames, given ones included.
        """
        own = self.codec.config.pixel_frames(self.system.config.video.frames)
        if not self.system.sampler.program.lag:
            return own
        _, least, step = self._lengths(given)
        return least + max(0, (own - least) // step * step)

    def _sampler(self, frames: int, given: int | None) -> Sampler:
        """The system's sampler for so many pixel frames, some of them given."""
        sampler, config = self.system.sampler, self.codec.config
        if not sampler.program.lag:
            if given is not None:
                raise ConfigError(
                    "this model makes whole clips at once and cannot go on from frames: use an image-to-video model, "
                    "or a causal one (such as recipe self_forcing)"
                )
            return replace(sampler, frames=config.latent_frames(frames))
        first, least, step = self._lengths(given)
        if frames < least or (frames - least) % step:
            fits = least + step * max(0, round((frames - least) / step))
            raise ConfigError(
                f"{frames} frames are not {least} + {step} n, as chunks of {sampler.chunk} latent frames make"
                f"{' after one first image' if first else ''}; {fits} would be"
            )
        sampler.context.check(sampler.chunk, first)
        return replace(sampler, frames=config.latent_frames(frames), first=first)

    def _lengths(self, given: int | None) -> tuple[bool, int, int]:
        """Whether a first frame stands alone, the fewest pixel frames of a clip, and those of each further chunk."""
        sampler, config = self.system.sampler, self.codec.config
        first = sampler.first or (given is not None and sampler.chunk > 1 and config.latent_frames(given) == 1)
        return first, config.pixel_frames(int(first) + sampler.chunk), sampler.chunk * config.frames_per_latent

    def _source(self, video: Any, frames: int, strength: float, sampler: Sampler) -> Source:
        """A video to start from, and the solver steps that are left out."""
        check_range("strength", strength, above=0, most=1)
        pixels = self._given(video)
        if pixels.shape[1] != frames:
            raise ConfigError(f"the source video has {pixels.shape[1]} frames, the clip {frames}: make them equal")
        levels = sampler.solver.levels[:-1]
        # A strength below the last level leaves one step.
        skip = int(np.argmax(levels <= strength + 1e-6)) if levels[-1] <= strength + 1e-6 else len(levels) - 1
        return Source(_encode(self.codec, jnp.asarray(pixels)), skip)

    def _given(self, given: Any) -> np.ndarray:
        video, array = self.system.config.video, np.asarray(given)
        if array.dtype != np.uint8 or array.ndim != 5 or array.shape[2:] != (video.height, video.width, 3):
            raise ConfigError(
                f"given frames are {array.dtype} {list(array.shape)}, they should be uint8 pixels [clips, frames, "
                f"{video.height}, {video.width}, 3]"
            )
        return array

    def states(self, prompts: Sequence[str] | None) -> np.ndarray | None:
        """Text states of prompts `[b, s, c]`, or tokens `[b, s]` for the network's own encoder; None without text.

        Raises:
            ConfigError: There are no prompts where there should be, or some where there should not.
        """
        if self.model.config.text is None:
            if prompts is not None:
                raise ConfigError("prompts were given, but the network takes no text")
            return None
        if prompts is None:
            raise ConfigError("the network makes videos of a text: give a prompt (--prompt)")
        if self.text is None:
            raise ConfigError("the model came without a text encoder or its tokenizer, so prompts cannot be read")
        return self.text(prompts)

    def told(self, prompts: Sequence[str] | None, negative: str, sampler: Sampler) -> dict[str, Any]:
        """What the network is told of prompts.

        Args:
            prompts: One for each clip, or None.
            negative: What none of them shows, where text guides.
            sampler: Whose guidance decides.

        Returns:
            `text` `[b, s, c]` (tokens `[b, s]` for the network's own encoder), or None; and `negative`, of the same
            shape, where text guides.

        Raises:
            ConfigError: As `states`; or a negative prompt is given where nothing guides.
        """
        guided = prompts is not None and len(sampler.guidance) > 1
        if negative and not guided:
            raise ConfigError("a negative prompt acts through guidance by text, of which there is none: leave it out")
        states = self.states([*prompts, negative] if guided and prompts else prompts)
        if states is None or not guided:
            return {"text": None if states is None else jnp.asarray(states)}
        text = jnp.asarray(states[:-1])
        return {"text": text, "negative": jnp.broadcast_to(jnp.asarray(states[-1:]), text.shape)}

    def _image(self, image: np.ndarray | None, count: int) -> dict[str, Any]:
        """Features of the image, and the latents that each frame is given: Wan's image-to-video."""
        if self.model.config.image is None:
            if image is not None:
                raise ConfigError("an image was given, but the network takes none: give it as the first frame")
            return {}
        if image is None:
            raise ConfigError("the network makes videos from an image: give one (--first)")
        if self.image is None:
            raise ConfigError("the model came without an image encoder, so images cannot be read")
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ConfigError(f"images must be uint8 pixels [b, h, w, 3], got {array.dtype} {list(array.shape)}")
        video = self.system.config.video
        first = np.stack([fitted(one, video.height, video.width) for one in array])
        latents = _image_latents(self.codec, jnp.asarray(first), self.codec.config.pixel_frames(count))
        return {"image": _features(self.image, jnp.asarray(array)), "latents": latents}


def trained_pipeline(system: System, model: DiT) -> Pipeline:
    """The pipeline of a network that was trained here: its codec has no weights, its text encoder is its own."""
    text = model.config.text
    encoded = text is not None and text.encoder is not None
    return Pipeline(system, model, system.config.codec, partial(_tokens, text.length) if encoded else None)


def _tokens(length: int, prompts: Sequence[str]) -> np.ndarray:
    for prompt in prompts:
        if len(prompt.encode()) > length:
            raise ConfigError(
                f"the prompt {prompt[:24]!r} … has {len(prompt.encode())} bytes, the model reads {length}"
            )
    return byte_tokens(prompts, length)


def fitted(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts the middle of an image to a shape and resizes it (bicubic).

    Args:
        image: uint8 `[h, w, 3]`.
        height: Wanted height.
        width: Wanted width.

    Returns:
        uint8 `[height, width, 3]`.
    """
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    scale = max(height / image.shape[0], width / image.shape[1])
    rows, columns = height / scale, width / scale
    top, left = (image.shape[0] - rows) / 2, (image.shape[1] - columns) / 2
    box = (left, top, left + columns, top + rows)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box))


@partial(jax.jit, static_argnums=(0, 1))
def _generate(
    sampler: Sampler, frames: int, model: Any, keys: Any, conditions: Conditions, given: Any, source: Any
) -> jax.Array:
    return sampler.generate(model, keys, conditions, frames, given, source)


@jax.jit
def _encode(codec: Any, pixels: jax.Array) -> jax.Array:
    return codec.encode(pixels)


@jax.jit
def _decode(codec: Any, latents: jax.Array) -> jax.Array:
    return codec.decode(latents)


@jax.jit
def _features(encoder: Any, image: jax.Array) -> jax.Array:
    return encoder(image)


@partial(jax.jit, static_argnums=2)
def _image_latents(codec: Any, first: jax.Array, frames: int) -> jax.Array:
    """A mask of what is known and the latents of the image before grey frames, `[b, f, h, w, 4 + c]`."""
    scaled = first.astype(jnp.float32)[:, None] / 127.5 - 1.0
    latents = codec.encode_floats(jnp.pad(scaled, ((0, 0), (0, frames - 1), (0, 0), (0, 0), (0, 0))))
    known = jnp.arange(latents.shape[1], dtype=jnp.int32) == 0
    step = codec.config.frames_per_latent
    mask = jnp.broadcast_to(known.astype(jnp.float32)[None, :, None, None, None], (*latents.shape[:4], step))
    return jnp.concatenate([mask, latents], axis=-1)
