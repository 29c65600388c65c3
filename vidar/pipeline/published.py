"""Models from where they lie, vidar's own and those that others publish, as pipelines of one form."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from vidar.attention.cache import ContextConfig
from vidar.attention.visibility import Bidirectional, ChunkCausal
from vidar.errors import CheckpointError, ConfigError, check_range
from vidar.interop.folders import Folder
from vidar.interop.lora import merged_into, open_adapter
from vidar.interop.networks import KINDS, Network, open_network
from vidar.interop.sources import TORCH_SUFFIXES
from vidar.interop.tables import Progress, tensors_of
from vidar.models.dit import DiT
from vidar.models.layers import Precision
from vidar.objectives.diffusion import Diffusion
from vidar.pipeline.generation import Pipeline, trained_pipeline
from vidar.preparation.embeddings import TextEncoder
from vidar.preparation.tokenizer import Tokenizer
from vidar.sampling.guidance import classifier_free
from vidar.sampling.solvers import DPMPlusPlus, Euler, FewStep, Solver, UniPC
from vidar.system import PlanConfig, SystemConfig, VideoConfig, compose, is_trained, load
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


def load_pipeline(source: str | Path, choices: Choices | None = None, progress: Progress = iter) -> Pipeline:
    """Loads a model: a run or weights of vidar's own, or the folder of a published model.

    Args:
        source: Directory of a run, a `.safetensors` file of vidar's, or a folder in the layout of Wan or of diffusers.
        choices: How a published model is loaded and sampled; None as its recipe says.
        progress: Wraps lists of tensors that are read, such as `tqdm`.

    Returns:
        The pipeline.

    Raises:
        CheckpointError: There is no model, or it is damaged.
        ConfigError: The choices do not fit it.
    """
    source = Path(source)
    if source.suffix == SUFFIX or is_trained(source):
        if choices is not None:
            raise ConfigError(
                f"{source}: is a model of vidar's own, which says itself how it is sampled: leave the choices for "
                "published models (size, steps, guidance, precision, …) out"
            )
        return trained_pipeline(*load(source))
    return _published(Folder.find(source), choices or Choices(), progress)


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
