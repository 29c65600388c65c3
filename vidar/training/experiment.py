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
from vidar.attention.visibility import chunk_layout
from vidar.config import load as load_card
from vidar.config import to_dict
from vidar.data.pipeline import DataConfig, make_dataset
from vidar.data.trajectories import Trajectories
from vidar.errors import ConfigError, check_range
from vidar.evaluation.context import context_gap
from vidar.evaluation.metrics import psnr
from vidar.evaluation.sheets import contact_sheet
from vidar.models.codecs.pixel import PixelCodec
from vidar.models.dit import DiTConfig
from vidar.models.flops import PATTERNS, shape_of, training_flops
from vidar.models.layers import DiscreteActions
from vidar.models.placement import logical_axes
from vidar.models.text import byte_tokens
from vidar.objectives.ode_regression import OdeRegression
from vidar.objectives.protocol import Role
from vidar.pipeline import trained_pipeline
from vidar.preparation.embeddings import Embeddings
from vidar.sampling.noise import session_keys
from vidar.sampling.solvers import level_table
from vidar.sharding import MeshConfig
from vidar.system import OnData, System, SystemConfig, compose, load, stored_role, system_config
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
        given: Frames of each clip that are given; may be 0 where a text says what is to be seen.
        frames: Frames of each generated clip, given ones included; None for the training length.
        rows: Clips shown on a sample sheet.
    """

    split: str = "validation"
    clips: int = 16
    given: int = 1
    frames: int | None = None
    rows: int = 4

    def __post_init__(self) -> None:
        for name, least in (("clips", 1), ("given", 0), ("rows", 1)):
            check_range(f"evaluation.{name}", getattr(self, name), least=least)


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
    roles = system.roles
    weights = {role: _start(system, role, choice.source) for role, choice in roles.items()}
    for role in _frozen(roles):
        if weights[role] is None:
            raise ConfigError(f"objective.{role}: a frozen network needs trained weights, a run or a .safetensors file")
    run = _run(config, system, weights)
    names = {phase.batch for step in range(config.training.steps) for phase in run.objective.phases(step)}
    embeddings = None if config.embeddings is None else Embeddings(config.embeddings)
    evaluate, sample = _callbacks(config, system, embeddings) if _evaluates(config) else (None, None)
    return replace(
        run,
        batches={name: _factory(config.data, index) for index, name in enumerate(BATCHES) if name in names},
        prepare_batch=partial(_numeric, config, embeddings),
        evaluate=evaluate,
        sample=sample,
    )


def abstract_run(config: RunConfig) -> Run:
    """Composes a run of shapes alone: without data, and without the weights that it starts from.

    Args:
        config: System, data and training.

    Returns:
        A run to compile, whose networks are shapes.

    Raises:
        ConfigError: Choices contradict each other.
    """
    system = compose(config)
    key = jax.random.key(0)
    return _run(config, system, {role: jax.eval_shape(partial(system.build, role), key) for role in system.roles})


def _frozen(roles: Mapping[str, Role]) -> set[str]:
    """Roles whose networks are frozen, whole or beside adapters."""
    return {role for role, choice in roles.items() if choice.optimizer is None or choice.lora is not None}


def _run(config: RunConfig, system: System, weights: Mapping[str, Any]) -> Run:
    """A run without data, from the weights of each role, or their shapes."""
    objective = OnData(system)
    _check_optimizers(config, objective)
    roles, heads = system.roles, jax.random.key(config.training.seed)
    trained, frozen = {role for role, choice in roles.items() if choice.optimizer is not None}, _frozen(roles)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(dict(weights)))

    def start(role: str) -> Any:
        if weights[role] is None:
            return None
        wrapped = partial(system.wrapped, role)
        return jax.eval_shape(wrapped, weights[role], heads) if abstract else wrapped(weights[role], heads)

    return Run(
        objective=objective,
        axes=system.axes,
        build={role: partial(system.trainable, role) for role in trained},
        logical_axes=logical_axes,
        batches={},
        prepare_batch=dict,
        training=config.training,
        optimizers=config.optimizers,
        frozen={role: weights[role] for role in roles if role in frozen},
        initial={role: start(role) for role in trained - frozen},
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
    for source in ("start", "student", "teacher", "critic"):
        system["objective"].pop(source, None)
    del system["roles"]
    return system


def _identity(config: RunConfig) -> dict[str, Any]:
    """What makes a run that goes on the same run: the system, but for where it computes and what it started from."""
    identity = portable_dict(config)
    lora = {role: to_dict(choice.lora) for role, choice in config.roles.items() if choice.lora is not None}
    if lora:  # runs of before there was any go on
        identity["lora"] = lora
    for role in ("model", "teacher", "critic"):
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


def _callbacks(config: RunConfig, system: System, embeddings: Embeddings | None) -> tuple[Any, Any]:
    """Evaluation against the truth and sample sheets, over one fixed batch of held-out clips."""
    choice, model, sampler = config.evaluation, config.model, system.sampler
    frames = choice.frames or config.video.frames
    held_out = replace(config.data, split=choice.split, batch=choice.clips, frames=frames, shuffle=False, repeat=True)
    batch = next(iter(make_dataset(replace(held_out, trajectories=None, prompts=None))))
    truth = batch["pixels"]
    conditions: dict[str, Any] = {
        "actions": batch.get("actions") if model.actions else None,
        "label": batch.get("label") if model.classes else None,
        "prompts": [caption.decode() for caption in batch["caption"]] if model.text else None,
        "given": truth[:, : choice.given] if sampler.program.lag and choice.given else None,
    }

    def video(networks: Mapping[str, Any]) -> np.ndarray:
        return trained_pipeline(system, networks["student"]).generate(frames, **conditions)

    def evaluate(step: int, networks: Mapping[str, Any], writer: MetricWriter) -> dict[str, float]:
        generated = video(networks)
        score = psnr(generated[:, choice.given :], truth[:, choice.given :])
        values = {"psnr": float(np.mean(score)), "psnr_last": float(np.mean(score[:, -1]))}
        if sampler.program.lag and model.backend == "xla":
            # Exposure bias is measured within the training length, where the network knows what to do.
            parts = ({**batch, "pixels": pixels} for pixels in (truth, generated))
            true, own = (system.prepare(_numeric(config, embeddings, part)) for part in parts)
            keys = session_keys(0, choice.clips)
            student = networks["student"]
            values |= context_gap(sampler, student, true.latents, own.latents, true.conditions, keys)
        return {f"evaluation/{name}": value for name, value in values.items()}

    def sample(step: int, networks: Mapping[str, Any], writer: MetricWriter) -> dict[str, float]:
        generated = video(networks)
        videos = {}
        for row in range(min(choice.rows, choice.clips)):
            name = conditions["prompts"][row] if conditions["prompts"] else str(row)
            videos |= {f"truth {row}": truth[row], f"generated {name}": generated[row]}
        contact_sheet(videos, writer.directory / "samples" / f"step-{step:07d}.png")
        return {}

    return evaluate if sampler.program.lag else None, sample


def _evaluates(config: RunConfig) -> bool:
    wanted = config.training.eval_every or config.training.sample_every
    # Without a context nothing can be continued: whole clips are looked at where a text says what they should show.
    return bool(wanted) and (config.plan.lag != 0 or config.model.text is not None)


def _start(system: System, role: str, source: str) -> Any:
    """Weights that a role starts from; None for a random start."""
    if source == "init":
        return None
    _, network = load(source, stored_role(source, role))
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
    if model.text is not None and model.text.encoder is not None and "caption" in batch:
        texts = [caption.decode() for caption in batch["caption"]]
        batch = {**batch, "text": byte_tokens(texts, model.text.length)}
    elif model.text is not None and embeddings is not None and "caption" in batch:
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
    wanted |= {"trajectory"} if isinstance(config.objective, OdeRegression) else set()
    missing = wanted - set(batch) - {"pixels", "latents", "trajectory"}
    if missing:
        said = "text" in missing and "caption" in batch
        hint = "; captions become text by embeddings=DIRECTORY or model.text.encoder" if said else ""
        raise ConfigError(f"the model needs {', '.join(sorted(missing))}, which the data does not have{hint}")
    chosen = {name: value for name, value in batch.items() if name in wanted}
    return chosen | {"index": np.asarray(chosen["index"], np.int32)}


def _check_data(config: RunConfig) -> None:
    frames, source = config.video.frames, "video.frames"
    longer = getattr(config.objective, "frames", None)
    if longer is not None and config.model.actions is not None:  # which are needed for all of a rollout
        frames, source = longer, "objective.forcing.frames"
    pixel_frames = config.codec.pixel_frames(frames)
    if config.data.frames != pixel_frames:
        raise ConfigError(f"data.frames={config.data.frames}, but {source}={frames} needs {pixel_frames}")
    if config.data.batch % config.training.accumulate:
        raise ConfigError(
            f"data.batch={config.data.batch} does not split into training.accumulate={config.training.accumulate} parts"
        )
    if config.data.prompts is not None:
        if getattr(config.objective, "needs_clips", True):
            raise ConfigError(
                f"data.prompts={config.data.prompts!r} has no clips, which the objective needs: give data.tfds or "
                "data.records (prompts are enough for self forcing without given frames, by DMD or SiD)"
            )
        if _evaluates(config) and config.data.tfds is None and config.data.records is None:
            raise ConfigError(
                "data.prompts has no clips to evaluate on: leave training.eval_every and sample_every out"
            )
    if config.data.trajectories is not None:
        _check_trajectories(config, Trajectories(config.data.trajectories))
    elif isinstance(config.objective, OdeRegression):
        raise ConfigError(
            "ode_regression needs a teacher's trajectories (`vidar data trajectories`): set data.trajectories"
        )


def _check_trajectories(config: RunConfig, trajectories: Trajectories) -> None:
    """Trajectories must be of the model's latents, and of exactly the levels that the student will visit."""
    video, codec, form, place = config.video, config.codec, trajectories.form, config.data.trajectories
    latent = (video.frames, *codec.latent_size(video.height, video.width), codec.channels)
    if form.latent != latent:
        raise ConfigError(
            f"data.trajectories={place!r} holds latents {list(form.latent)}, the system's are {list(latent)}"
        )
    if _evaluates(config) and config.data.tfds is None and config.data.records is None:
        raise ConfigError("data.trajectories have no pixels to evaluate on: set data.tfds or data.records beside them")
    if not isinstance(config.objective, OdeRegression):
        return
    if not np.array_equal(trajectories.levels, level_table(config.solver)):
        stored, visited = (", ".join(f"{x:.7g}" for x in table) for table in (form.levels, level_table(config.solver)))
        raise ConfigError(
            f"data.trajectories={place!r} holds the levels {stored}, but the solver visits {visited}: give both "
            "the same times and shift"
        )
    layout = chunk_layout(video.frames, video.chunk, independent_first_frame=video.independent_first_frame)
    given = config.objective.given_frames(layout)
    if given != form.given:
        raise ConfigError(
            f"objective.given={config.objective.given} chunks are {given} frames, but data.trajectories={place!r} was "
            f"made with {form.given} given ones: make them equal"
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
    text = config.model.text
    if text is not None and text.encoder is None:
        raise ConfigError(
            "evaluation while training needs a text encoder in the model (model.text.encoder): leave "
            "training.eval_every and training.sample_every out"
        )
    if config.plan.lag == 0:
        if frames != video.frames:
            raise ConfigError(f"evaluation.frames={frames}, but plan.lag=0 makes clips of video.frames={video.frames}")
        return
    if choice.given >= frames:
        raise ConfigError(f"evaluation.given={choice.given} leaves none of {frames} frames to generate")
    head = int(video.independent_first_frame)
    least = 0 if text is not None else 1
    whole = choice.given >= head and not (choice.given - head) % video.chunk and not (frames - head) % video.chunk
    if choice.given < least or not (whole or choice.given == 0):
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
    for name, model in (("model", config.model), ("teacher", config.teacher), ("critic", config.critic)):
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
