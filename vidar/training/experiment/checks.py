"""Checks of a system against its data, its mesh and its evaluation: one line for what does not fit."""

import numpy as np

from vidar.attention.kernels import check_backend
from vidar.attention.visibility import chunk_layout
from vidar.data.trajectories import Trajectories
from vidar.errors import ConfigError
from vidar.models.codecs.pixel import PixelCodec
from vidar.objectives.ode_regression import OdeRegression
from vidar.sampling.solvers import level_table
from vidar.system import OnData
from vidar.training.experiment.config import RunConfig


def check_run(config: RunConfig) -> None:
    """Checks that the system fits its data, its mesh and its evaluation.

    Args:
        config: System, data and training.

    Raises:
        ConfigError: Choices contradict each other.
        DataError: Trajectories cannot be read.
    """
    _check_data(config)
    _check_mesh(config)
    _check_evaluation(config)


def check_optimizers(config: RunConfig, objective: OnData) -> None:
    """Checks that every optimizer of the config is some role's.

    Args:
        config: System, data and training.
        objective: The objective, whose roles name optimizers.

    Raises:
        ConfigError: An optimizer is nobody's.
    """
    used = {choice.optimizer for choice in objective.roles.values() if choice.optimizer is not None}
    unused = sorted(set(config.optimizers) - used)
    if unused:
        raise ConfigError(f"optimizers.{unused[0]}: no role uses it; the objective's are {', '.join(sorted(used))}")


def evaluates(config: RunConfig) -> bool:
    """Whether clips are generated from held-out data while training."""
    wanted = config.training.eval_every or config.training.sample_every
    # Without a context nothing can be continued: whole clips are looked at where a text says what they should show.
    return bool(wanted) and (config.plan.lag != 0 or config.model.text is not None)


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
        if evaluates(config) and config.data.tfds is None and config.data.records is None:
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
    if evaluates(config) and config.data.tfds is None and config.data.records is None:
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
    if not evaluates(config):
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
