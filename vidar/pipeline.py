"""From a prompt, an image, actions or a class to pixels: a network with all that stands around it.

Loads vidar's own models and those that others publish, in one form. This room must not know training, command lines or
how videos are shown.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidar.attention.cache import ContextConfig
from vidar.attention.visibility import Bidirectional, ChunkCausal
from vidar.errors import CheckpointError, ConfigError, check_range
from vidar.interop.folders import Folder
from vidar.interop.lora import merged_into, open_adapter
from vidar.interop.networks import KINDS, Network, open_network
from vidar.interop.sources import TORCH_SUFFIXES
from vidar.interop.tables import Progress, tensors_of
from vidar.models.dit import DiT
from vidar.models.frames import Conditions, row_labels
from vidar.models.layers import Precision
from vidar.models.text import byte_tokens
from vidar.objectives.diffusion import Diffusion
from vidar.preparation.embeddings import TextEncoder
from vidar.preparation.tokenizer import Tokenizer, check_prompts
from vidar.sampling.flight import Source
from vidar.sampling.guidance import classifier_free
from vidar.sampling.noise import session_keys
from vidar.sampling.rollout import Sampler
from vidar.sampling.solvers import DPMPlusPlus, Euler, FewStep, Solver, UniPC
from vidar.system import PlanConfig, System, SystemConfig, VideoConfig, compose, is_trained, load
from vidar.weights import SUFFIX

SOLVERS = {kind.kind: kind for kind in (UniPC, DPMPlusPlus, Euler)}


@dataclass(frozen=True)
class Recipe:
    """How a family of published models is sampled.

    Attributes:
        solver: Solver and its grid.
        chunk: Latent frames a chunk; None for models that see the whole clip at once.
        guidance: Scale of guidance by text; 1 for none.
    """

    solver: Solver
    chunk: int | None = None
    guidance: float = 1.0


RECIPES: Mapping[str, Recipe] = {
    "wan": Recipe(UniPC(50, 5.0), guidance=5.0),
    "self_forcing": Recipe(FewStep(), chunk=3),
    "causvid": Recipe(FewStep((1000.0, 757.0, 522.0), 1.0), chunk=3),
}


@dataclass(frozen=True)
class Choices:
    """How a published model is loaded and sampled.

    Attributes:
        recipe: One of `RECIPES`; None for `self_forcing` where `weights` is a PyTorch file, and `wan` elsewhere.
        weights: Weights of the transformer in place of the folder's own, such as a student's: a file, or the directory
            of a run.
        part: Which network of a PyTorch file; see `open_tensors`.
        lora: LoRA adapter that is merged in.
        lora_scale: Its strength, times its own alpha / rank.
        decoder: Weights of TAEHV, which then decodes in place of the VAE.
        height: Pixel height.
        width: Pixel width.
        frames: Pixel frames.
        chunk: Latent frames a chunk, for causal models.
        solver: `unipc`, `dpm++` or `euler`.
        steps: Solver steps.
        shift: Time shift.
        guidance: Scale of guidance by text.
        window: Latent frames that a chunk may see; None for the whole clip.
        sink: First latent frames that stay in view.
        precision: Type of the transformer and of the encoders of text and image, such as `float32`.
        codec_precision: Type of the codec.
        text_encoder_on_cpu: Whether the text encoder stays in host memory and runs there.
    """

    recipe: str | None = None
    weights: str | Path | None = None
    part: str | None = None
    lora: str | Path | None = None
    lora_scale: float = 1.0
    decoder: str | Path | None = None
    height: int = 480
    width: int = 832
    frames: int = 81
    chunk: int | None = None
    solver: str | None = None
    steps: int | None = None
    shift: float | None = None
    guidance: float | None = None
    window: int | None = None
    sink: int = 0
    precision: str = "bfloat16"
    codec_precision: str = "float32"
    text_encoder_on_cpu: bool = False

    def __post_init__(self) -> None:
        for name, known in (("recipe", RECIPES), ("solver", SOLVERS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ConfigError(f"{name}={value!r} is unknown: use one of {', '.join(known)}")
        for name in ("height", "width", "frames", "chunk"):
            check_range(name, getattr(self, name), least=1)


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
        labels = row_labels(label, self.model.config.classes, rows)
        conditions = Conditions(
            **self.told(prompts, negative, sampler),
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


def load_pipeline(source: str | Path, choices: Choices = Choices(), progress: Progress = iter) -> Pipeline:
    """Loads a model: a run or weights of vidar's own, or the folder of a published model.

    Args:
        source: Directory of a run, a `.safetensors` file of vidar's, or a folder in the layout of Wan or of diffusers.
        choices: How a published model is loaded and sampled.
        progress: Wraps lists of tensors that are read, such as `tqdm`.

    Returns:
        The pipeline.

    Raises:
        CheckpointError: There is no model, or it is damaged.
        ConfigError: The choices do not fit it.
    """
    source = Path(source)
    if source.suffix == SUFFIX or is_trained(source):
        if choices != Choices():
            raise ConfigError(f"{source}: is a model of vidar's own, whose choices are made: give none")
        return trained_pipeline(*load(source))
    return _published(Folder.find(source), choices, progress)


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


# --------------------------------------------------------------------------------------------------- published models


def _published(folder: Folder, choices: Choices, progress: Progress) -> Pipeline:
    kind, place = ("vae", folder.vae) if choices.decoder is None else ("tiny_vae", Path(choices.decoder))
    if place is None:
        raise CheckpointError(f"{folder.transformer.parent}: has no VAE; add it, or name a tiny one (decoder)")
    codec = _network(kind, place, choices.codec_precision, progress)
    path = folder.transformer if choices.weights is None else Path(choices.weights)
    # A student's file says nothing of its heads: they are those of the folder's own transformer.
    precision = Precision(choices.precision, choices.precision)
    own = None
    if is_trained(path):
        if choices.part is not None or choices.recipe is not None:
            raise ConfigError(f"{path}: was trained here, and says itself how it is sampled: leave part and recipe out")
        trained, model = load(path)
        own, found = trained.config, _as_published(model, precision, path)
    else:
        found = open_network(path, choices.part, precision, folder.transformer)
    if found.kind != "transformer":
        raise CheckpointError(f"{path}: holds a {found.kind}, a transformer is wanted here")
    if choices.lora is not None:
        found = merged_into(found, open_adapter(choices.lora), choices.lora_scale)
    system = compose(_system(found.config, codec.config, choices, path, own))
    image = None
    if found.config.image is not None and folder.image_encoder is not None:
        image = _network("image_encoder", folder.image_encoder, choices.precision, progress)
    text = None
    if folder.text_encoder is not None and folder.tokenizer is not None:
        text = load_text_encoder(folder, choices, progress)
        if text.network.config.width != found.config.text.width:
            raise CheckpointError(
                f"{folder.text_encoder}: gives text states of {text.network.config.width} channels, the transformer "
                f"takes {found.config.text.width}"
            )
    return Pipeline(system, found.load(progress), codec, text, image)


def _as_published(model: DiT, precision: Precision, path: Path) -> Network:
    """A network that was trained here, as if it were read from another project's file."""
    kind = KINDS["transformer"]
    config, table = replace(model.config, precision=precision, backend="xla", remat=False), kind.table(model.config)
    tensors = tensors_of(model, table, "original")
    return Network("transformer", config, "original", kind.template(config), table, tensors, str(path))


def _network(kind: str, path: Path, precision: str, progress: Progress) -> Any:
    found = open_network(path, precision=Precision(precision, precision))
    if found.kind != kind:
        raise CheckpointError(f"{path}: holds a {found.kind}, a {kind} is wanted here")
    return found.load(progress)


def load_text_encoder(folder: Folder, choices: Choices = Choices(), progress: Progress = iter) -> TextEncoder:
    """Loads the text encoder of a published model, with its tokenizer.

    Args:
        folder: Where the networks lie.
        choices: Its types, and where it runs.
        progress: Wraps the list of tensors that are read, such as `tqdm`.

    Returns:
        The encoder.

    Raises:
        CheckpointError: The model lacks one, or it is damaged.
        ConfigError: Its tokenizer is none of UMT5's.
    """
    if folder.text_encoder is None or folder.tokenizer is None:
        raise CheckpointError(f"{folder.transformer.parent}: has no text encoder, or no tokenizer for it")
    tokenizer = Tokenizer(folder.tokenizer)
    place = jax.default_device(jax.devices("cpu")[0]) if choices.text_encoder_on_cpu else nullcontext()
    with place:
        network = _network("text_encoder", folder.text_encoder, choices.precision, progress)
    if choices.text_encoder_on_cpu:
        network = jax.device_put(network, jax.devices("cpu")[0])  # and there it is run
    return TextEncoder(network, tokenizer)


def _system(model: Any, codec: Any, choices: Choices, path: Path, own: SystemConfig | None) -> SystemConfig:
    """The system of a published transformer, by its recipe; or of a student trained here, by its own."""
    if own is None:
        student = choices.weights is not None and path.suffix in TORCH_SUFFIXES
        recipe = RECIPES[choices.recipe or ("self_forcing" if student else "wan")]
    else:
        recipe = Recipe(own.solver, own.video.chunk if own.plan.lag != 0 else None)
    chunk = recipe.chunk if choices.chunk is None else choices.chunk
    if recipe.chunk is None and (choices.chunk or choices.window or choices.sink):
        raise ConfigError("chunk, window and sink are for causal models: choose a recipe such as self_forcing")
    if model.image is not None and recipe.chunk is not None:
        raise ConfigError(f"{path}: takes an image beside all frames at once, so it cannot be causal: use recipe wan")
    frames, side = codec.latent_frames(choices.frames), codec.patch * model.patch
    if min(choices.height, choices.width) < 1 or choices.height % side or choices.width % side:
        raise ConfigError(f"{choices.height}×{choices.width} pixels: height and width must be multiples of {side}")
    scale = recipe.guidance if choices.guidance is None else choices.guidance
    guidance = own.guidance if own is not None and choices.guidance is None else classifier_free(scale, ("text",))
    context = ContextConfig(choices.window, choices.sink)
    return SystemConfig(
        objective=Diffusion(),
        video=VideoConfig(choices.height, choices.width, frames - frames % (chunk or 1), chunk or 1),
        codec=codec,
        model=model,
        visibility=ChunkCausal() if chunk else Bidirectional(),
        solver=_solver(recipe.solver, choices),
        plan=PlanConfig(lag=None if chunk else 0) if own is None else own.plan,
        context=own.context if own is not None and context == ContextConfig() else context,
        guidance=guidance,
    )


def _solver(solver: Solver, choices: Choices) -> Solver:
    if choices.solver is not None:
        solver = SOLVERS[choices.solver](shift=solver.shift)
    changes = {name: getattr(choices, name) for name in ("steps", "shift") if getattr(choices, name) is not None}
    if "steps" in changes and isinstance(solver, FewStep):
        raise ConfigError(f"steps={choices.steps}: the recipe has its {solver.steps} steps, which were trained")
    return replace(solver, **changes)


# --------------------------------------------------------------------------------------------------------- executables


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
