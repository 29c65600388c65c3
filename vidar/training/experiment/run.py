"""From an experiment card to a run: composes system, data and driver, with evaluation and sample sheets."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from vidar.attention.visibility import Bidirectional
from vidar.config import to_dict
from vidar.data.pipeline import DataConfig, make_dataset
from vidar.errors import CheckpointError, ConfigError
from vidar.evaluation.context import context_gap
from vidar.evaluation.metrics import psnr
from vidar.evaluation.sheets import contact_sheet
from vidar.models.dit import DiTConfig
from vidar.models.flops import PATTERNS, shape_of, training_flops
from vidar.models.layers import DiscreteActions
from vidar.models.placement import logical_axes
from vidar.models.text import byte_tokens
from vidar.objectives.distillation import Distillation
from vidar.objectives.ode_regression import OdeRegression
from vidar.objectives.protocol import Role
from vidar.pipeline import trained_pipeline
from vidar.preparation.embeddings import Embeddings
from vidar.sampling.noise import session_keys
from vidar.system import OnData, System, SystemConfig, compose, load_start, system_config
from vidar.training.experiment.checks import check_optimizers, check_run, evaluates
from vidar.training.experiment.config import RunConfig
from vidar.training.logging import MetricWriter
from vidar.training.loop import Run

BATCHES = ("main", "critic")


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
    check_run(config)
    roles = system.roles
    embeddings = None if config.embeddings is None else Embeddings(config.embeddings)
    negative = None if config.negative is None or embeddings is None else embeddings.read(config.negative)
    weights = {role: _start(system, role) for role in roles}
    for role in _frozen(roles):
        if weights[role] is None:
            raise ConfigError(
                f"objective.{role}: a frozen network needs trained weights: a run, a file, or a published model"
            )
    run = _run(config, system, weights)
    names = {phase.batch for step in range(config.training.steps) for phase in run.objective.phases(step)}
    if names - set(BATCHES):
        raise ConfigError(f"objective: a phase takes batch {min(names - set(BATCHES))!r}: use {' or '.join(BATCHES)}")
    numeric = partial(_numeric, config, embeddings, negative)
    evaluate, sample = _callbacks(config, system, numeric) if evaluates(config) else (None, None)
    return replace(
        run,
        batches={name: _factory(config.data, index) for index, name in enumerate(BATCHES) if name in names},
        prepare_batch=numeric,
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
    check_optimizers(config, objective)
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
        meta={"config": system_dict(config), "run": to_dict(config)},
        identity=_identity,
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


def _identity(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run that goes on the same run: the system, but for where it computes and what it started from.

    It is composed anew, so that choices that a run of before did not know are their defaults. With it go the kinds of
    the optimizers, which decide what their states hold.
    """
    try:
        config = system_config(meta["config"])
    except ConfigError as error:
        raise ConfigError(f"this directory holds a run that cannot go on with this version: {error}") from error
    identity = portable_dict(config)
    optimizers = meta.get("run", {}).get("optimizers", {})
    identity["optimizers"] = {name: {"name": entry.get("name")} for name, entry in optimizers.items()}
    identity["lora"] = {role: to_dict(choice.lora) for role, choice in config.roles.items() if choice.lora is not None}
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


def _callbacks(config: RunConfig, system: System, numeric: Callable[[Any], Any]) -> tuple[Any, Any]:
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
            true, own = (system.prepare(numeric(part)) for part in parts)
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


def _start(system: System, role: str) -> Any:
    """Weights that a role starts from; None for a random start."""
    choice, wanted = system.roles[role], system.model_config(role)
    source = choice.source
    if not source:
        raise ConfigError(f"objective.{role} is empty: give a run, a file, a published model, or 'init'")
    if source == "init":
        return None
    if role in _frozen(system.roles):
        wanted = replace(wanted, precision=replace(wanted.precision, params=choice.dtype))
    try:
        origin, network = load_start(source, role, wanted)
    except CheckpointError as error:
        raise CheckpointError(f"objective.{role}: {error}") from error
    if role == "teacher" and isinstance(system.objective, Distillation) and origin is not None:
        _check_teacher(source, origin.config, system.objective.forcing.given)
    stored, ours = (_facts(one, origin is None) for one in (network.config, wanted))
    for name, theirs in stored.items():
        if theirs != ours[name]:
            raise ConfigError(
                f"objective.{role}: {source!r} is a network with {name}={theirs}, the config's {role} has "
                f"{name}={ours[name]}: make them equal (model, teacher and critic may differ)"
            )
    abstract = jax.eval_shape(partial(system.build, role), jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(network))


def _check_teacher(source: str, config: SystemConfig, given: int) -> None:
    """A teacher has to judge whole clips, of which the first chunks may be given."""
    if not isinstance(config.visibility, Bidirectional):
        raise ConfigError(
            f"objective.teacher: {source!r} was trained with visibility {config.visibility.kind!r}; it has to "
            "judge whole clips, so give one that was trained with 'bidirectional'"
        )
    if given and config.levels.one_for_all:
        raise ConfigError(
            f"objective.teacher: {source!r} has never seen clean frames beside noisy ones, which it has to judge with "
            f"forcing.given={given}: train it with levels.context clean_prefix, or give none"
        )


def _facts(config: DiTConfig, published: bool) -> dict[str, Any]:
    """What makes a network the same, but for where and how it computes; of a published one, what its tensors tell."""
    free = {"backend", "remat", "precision"}
    if published:
        free |= {"rope", "prediction", "quirks"}
        config = replace(config, text=None if config.text is None else replace(config.text, length=1))
    return {entry.name: getattr(config, entry.name) for entry in fields(DiTConfig) if entry.name not in free}


def _factory(config: DataConfig, index: int) -> Callable[[], Any]:
    """Creates this process's batches; each named stream has an order of its own."""
    stream = replace(config, seed=config.seed + 7919 * index)
    return lambda: iter(make_dataset(stream, jax.process_index(), jax.process_count()))


def _numeric(
    config: RunConfig, embeddings: Embeddings | None, negative: np.ndarray | None, batch: Mapping[str, Any]
) -> dict[str, np.ndarray]:
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
        if negative is not None:
            batch["negative"] = np.broadcast_to(negative, text.shape)
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
    wanted |= {"negative"} if config.negative is not None else set()
    wanted |= {"trajectory"} if isinstance(config.objective, OdeRegression) else set()
    missing = wanted - set(batch) - {"pixels", "latents", "trajectory"}
    if missing:
        said = "text" in missing and "caption" in batch
        hint = "; captions become text by embeddings=DIRECTORY or model.text.encoder" if said else ""
        raise ConfigError(f"the model needs {', '.join(sorted(missing))}, which the data does not have{hint}")
    chosen = {name: value for name, value in batch.items() if name in wanted}
    return chosen | {"index": np.asarray(chosen["index"], np.int32)}
