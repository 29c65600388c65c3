"""From an experiment card to a run: composes system, data and driver, with evaluation and sample sheets.

This is the only room where the driver meets video. It must not know command lines.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vidar.attention.kernels import check_backend
from vidar.config import load as load_card
from vidar.config import to_dict
from vidar.data.pipeline import DataConfig, make_dataset
from vidar.errors import ConfigError
from vidar.evaluation.metrics import psnr
from vidar.evaluation.sheets import contact_sheet
from vidar.models.codecs.pixel import PixelCodec
from vidar.models.dit import DiTConfig
from vidar.models.flops import PATTERNS, shape_of, training_flops
from vidar.models.layers import DiscreteActions
from vidar.models.placement import logical_axes
from vidar.pipeline import Pipeline
from vidar.preparation.embeddings import Embeddings
from vidar.sharding import MeshConfig
from vidar.system import OnData, System, SystemConfig, compose, load, system_config
from vidar.training.config import TrainingConfig
from vidar.training.logging import MetricWriter
from vidar.training.loop import Run
from vidar.training.optimizers import OptimizerConfig

_logger = logging.getLogger("vidar")
BATCHES = ("main", "critic")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is generated from held-out clips while training.

    Attributes:
        split: Split of the data.
        clips: Clips that are generated.
        given: Frames of each clip that are given.
        frames: Frames of each generated clip, given ones included; None for the training length.
        rows: Clips shown on a sample sheet.
    """

    split: str = "validation"
    clips: int = 16
    given: int = 1
    frames: int | None = None
    rows: int = 4

    def __post_init__(self) -> None:
        for name in ("clips", "given", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class RunConfig(SystemConfig):
    """A system with its data and its training.

    Attributes:
        data: Clips and batches.
        training: Length and rhythm.
        optimizers: By the name that roles use.
        mesh: Sizes of the mesh axes.
        evaluation: Generation from held-out clips.
        embeddings: Directory of the text states of all captions (`vidar data embeddings`), for models with text.
    """

    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=1000))
    optimizers: Mapping[str, OptimizerConfig] = field(default_factory=dict)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    embeddings: str | None = None


def load_run_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Reads an experiment card with overrides such as `--config.training.steps=10`."""
    return system_config(load_card(path, overrides), RunConfig)


def make_run(config: RunConfig) -> Run:
    """Composes a run.

    Args:
        config: System, data and training.

    Returns:
        The run, for `vidar.training.train`.

    Raises:
        ConfigError: Choices contradict each other, or do not fit the mesh.
        CheckpointError: Weights to start from cannot be loaded.
        DataError: The data cannot be read.
    """
    system = compose(config)
    _check_data(config)
    _check_mesh(config)
    _check_evaluation(config)
    objective = OnData(system)
    _check_optimizers(config, objective)
    trained = {role for role, choice in objective.roles.items() if choice.optimizer is not None}
    weights = {role: _start(system, role, choice.source) for role, choice in objective.roles.items()}
    frozen = {role: weight for role, weight in weights.items() if role not in trained}
    for role, weight in frozen.items():
        if weight is None:
            raise ConfigError(f"objective.{role}: a frozen network needs trained weights, a run or a .safetensors file")
    names = {phase.batch for step in range(config.training.steps) for phase in objective.phases(step)}
    evaluate, sample = _callbacks(config, system) if _evaluates(config) else (None, None)
    return Run(
        objective=objective,
        axes=system.axes,
        build={role: partial(system.build, role) for role in trained},
        logical_axes=logical_axes,
        batches={name: _factory(config.data, index) for index, name in enumerate(BATCHES) if name in names},
        prepare_batch=partial(_numeric, config, None if config.embeddings is None else Embeddings(config.embeddings)),
        training=config.training,
        optimizers=config.optimizers,
        frozen=frozen,
        initial={role: weight for role, weight in weights.items() if role in trained},
        evaluate=evaluate,
        sample=sample,
        mesh=config.mesh,
        meta={"config": system_dict(config), "run": to_dict(config), "identity": _identity(config)},
        flops_per_step=_flops_per_step(config, system),
        tokens_per_step=float(config.data.batch * config.video.frames * system.sampler.tokens),
    )


def system_dict(config: SystemConfig) -> dict[str, Any]:
    """The system's part of a config, as saved with its weights."""
    return to_dict(SystemConfig(**{entry.name: getattr(config, entry.name) for entry in fields(SystemConfig)}))


def portable_dict(config: SystemConfig) -> dict[str, Any]:
    """As `system_dict`, without the places that networks started from: for weights that travel."""
    system = system_dict(config)
    for source in ("start", "student", "teacher"):
        system["objective"].pop(source, None)
    return system


def _identity(config: RunConfig) -> dict[str, Any]:
    """What makes a run that goes on the same run: the system, but for where it computes and what it started from."""
    identity = portable_dict(config)
    for role in ("model", "teacher"):
        for free in ("backend", "remat"):
            (identity[role] or {}).pop(free, None)
    return identity


def _flops_per_step(config: RunConfig, system: System) -> float | None:
    """Counted FLOPs of one update, where one pass over clips is all there is to it; None for rollouts."""
    if set(system.objective.roles) != {"student"} or config.visibility.kind not in PATTERNS:
        return None
    video = config.video
    chunks = [1] * video.independent_first_frame
    chunks += [video.chunk] * ((video.frames - len(chunks)) // video.chunk)
    shape = shape_of(config.model, *system.sampler.latent[:2])
    return config.data.batch * training_flops(shape, config.visibility.kind, chunks, config.context.window).total


def _callbacks(config: RunConfig, system: System) -> tuple[Any, Any]:
    """Evaluation (PSNR to the truth by frame) and sample sheets, over one fixed batch of held-out clips."""
    choice = config.evaluation
    frames = choice.frames or config.video.frames
    held_out = replace(config.data, split=choice.split, batch=choice.clips, frames=frames, shuffle=False, repeat=True)
    batch = next(iter(make_dataset(held_out)))
    truth = batch["pixels"]
    actions = batch.get("actions") if config.model.actions else None
    label = batch.get("label") if config.model.classes else None

    def video(networks: Mapping[str, Any]) -> np.ndarray:
        pipeline = Pipeline(system, networks["student"], config.codec)
        return pipeline.generate(frames, actions=actions, given=truth[:, : choice.given], label=label)

    def evaluate(step: int, networks: Mapping[str, Any], writer: MetricWriter) -> dict[str, float]:
        score = psnr(video(networks)[:, choice.given :], truth[:, choice.given :])
        return {"evaluation/psnr": float(np.mean(score)), "evaluation/psnr_last": float(np.mean(score[:, -1]))}

    def sample(step: int, networks: Mapping[str, Any], writer: MetricWriter) -> dict[str, float]:
        generated = video(networks)
        videos = {}
        for row in range(min(choice.rows, choice.clips)):
            videos |= {f"truth {row}": truth[row], f"generated {row}": generated[row]}
        contact_sheet(videos, writer.directory / "samples" / f"step-{step:07d}.png")
        return {}

    return evaluate, sample


def _evaluates(config: RunConfig) -> bool:
    wanted = config.training.eval_every or config.training.sample_every
    # Without actions, text or class there is nothing to compare; without a context nothing can be continued.
    return bool(wanted) and config.plan.lag != 0


def _start(system: System, role: str, source: str) -> Any:
    """Weights that a role starts from; None for a random start."""
    if source == "init":
        return None
    stored = "teacher" if role in ("teacher", "critic") and source.endswith(".safetensors") else "student"
    _, network = load(source, stored)
    wanted = system.model_config(role)
    if _shape(network.config) != _shape(wanted):
        raise ConfigError(f"objective.{role}={source!r} has another shape than the config's network for {role!r}")
    abstract = jax.eval_shape(partial(system.build, role), jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(network))


def _shape(config: DiTConfig) -> DiTConfig:
    return replace(config, backend="xla", remat=False, precision=DiTConfig().precision)


def _factory(config: DataConfig, index: int) -> Callable[[], Any]:
    """Creates this process's batches; each named stream has an order of its own."""
    stream = replace(config, seed=config.seed + 7919 * index)
    return lambda: iter(make_dataset(stream, jax.process_index(), jax.process_count()))


def _numeric(config: RunConfig, embeddings: Embeddings | None, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the network can take: pixels or latents, index, and its conditions."""
    model, video = config.model, config.video
    if model.text is not None and embeddings is not None and "caption" in batch:
        text = np.stack([embeddings.read(caption.decode()) for caption in batch["caption"]])
        if text.shape[1:] != (model.text.length, model.text.width):
            raise ConfigError(
                f"model.text is {model.text.length} × {model.text.width}, but embeddings={config.embeddings!r} holds "
                f"{text.shape[1]} × {text.shape[2]}"
            )
        batch = {**batch, "text": text}
    size = batch["pixels"].shape[2:4] if "pixels" in batch else (video.height, video.width)
    if size != (video.height, video.width):
        raise ConfigError(
            f"video.height={video.height} and video.width={video.width}, but the data has {size[0]}×{size[1]} pixels"
        )
    known = {"label": ("model.classes", model.classes)}
    if isinstance(model.actions, DiscreteActions):
        known["actions"] = ("model.actions.count", model.actions.count)
    for name, (key, count) in known.items():
        largest = int(np.max(batch.get(name, 0)))
        if count is not None and largest >= count:
            raise ConfigError(f"{key}={count}, but the data has {name} {largest}: use {largest + 1}")
    wanted = {"pixels", "latents", "index"}
    wanted |= {"actions"} if model.actions else set()
    wanted |= {"label"} if model.classes else set()
    wanted |= {"text"} if model.text else set()
    missing = wanted - set(batch) - {"pixels", "latents"}
    if missing:
        hint = "; captions become text by embeddings=DIRECTORY" if "text" in missing and "caption" in batch else ""
        raise ConfigError(f"the model needs {', '.join(sorted(missing))}, which the data does not have{hint}")
    chosen = {name: value for name, value in batch.items() if name in wanted}
    return chosen | {"index": np.asarray(chosen["index"], np.int32)}


def _check_data(config: RunConfig) -> None:
    pixel_frames = config.codec.pixel_frames(config.video.frames)
    if config.data.frames != pixel_frames:
        raise ConfigError(
            f"data.frames={config.data.frames}, but video.frames={config.video.frames} needs {pixel_frames}"
        )
    if config.data.batch % config.training.accumulate:
        raise ConfigError(
            f"data.batch={config.data.batch} does not split into training.accumulate={config.training.accumulate} parts"
        )


def _check_evaluation(config: RunConfig) -> None:
    choice, video = config.evaluation, config.video
    frames = choice.frames or video.frames
    if not _evaluates(config):
        return
    if not isinstance(config.codec, PixelCodec):
        raise ConfigError(
            f"evaluation while training needs a codec without weights, not {config.codec.kind}: leave "
            "training.eval_every and training.sample_every out"
        )
    if choice.given >= frames:
        raise ConfigError(f"evaluation.given={choice.given} leaves none of {frames} frames to generate")
    head = int(video.independent_first_frame)
    if choice.given < head or (choice.given - head) % video.chunk or (frames - head) % video.chunk:
        raise ConfigError(
            f"evaluation.given={choice.given} of {frames} frames are not whole chunks of {video.chunk}: "
            f"give {head or video.chunk}"
        )


def _check_optimizers(config: RunConfig, objective: OnData) -> None:
    used = {choice.optimizer for choice in objective.roles.values() if choice.optimizer is not None}
    unused = sorted(set(config.optimizers) - used)
    if unused:
        raise ConfigError(f"optimizers.{unused[0]}: no role uses it; the objective's are {', '.join(sorted(used))}")


def _check_mesh(config: RunConfig) -> None:
    """Sizes that the mesh splits must divide."""
    mesh = config.mesh
    for name, model in (("model", config.model), ("teacher", config.teacher)):
        if model is None:
            continue
        check_backend(model.backend)
        shards = max(1, mesh.tensor) * max(1, mesh.sequence)
        if model.heads % shards:
            fits = [count for count in range(1, model.heads + 1) if model.heads % count == 0]
            raise ConfigError(
                f"{name}.heads={model.heads} does not split over mesh tensor={mesh.tensor} × sequence={mesh.sequence}: "
                f"their product must be one of {fits}"
            )
    rows = max(1, mesh.data) * max(1, mesh.fsdp)
    if config.data.batch // config.training.accumulate % rows:
        raise ConfigError(
            f"data.batch={config.data.batch} in {config.training.accumulate} parts does not split over mesh "
            f"data={mesh.data} × fsdp={mesh.fsdp}: use a multiple of {rows * config.training.accumulate}"
        )
