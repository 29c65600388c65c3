"""Checks across the axes of a system: every choice that contradicts another is named in one line."""

import inspect
from collections.abc import Mapping

import numpy as np

from vidar.attention.visibility import TeacherForcing, chunk_layout, leaks
from vidar.errors import ConfigError, check_range
from vidar.models.dit import DiTConfig
from vidar.objectives.consistency import Consistency
from vidar.objectives.distillation import Distillation
from vidar.objectives.forcing import SelfForcing
from vidar.objectives.matching import GAN
from vidar.objectives.ode_regression import OdeRegression
from vidar.sampling.guidance import Guidance
from vidar.sampling.rollout import Sampler
from vidar.sampling.solvers import FewStep
from vidar.system.config import Objectives, SystemConfig


def check_parts(config: SystemConfig) -> None:
    """Checks what each part must be for the others, before anything is composed.

    Args:
        config: One choice on each axis.

    Raises:
        ConfigError: A part does not fit.
    """
    video = config.video
    head = 1 if video.independent_first_frame else 0
    if (video.frames - head) % video.chunk:
        fits = head + video.chunk * max(1, round((video.frames - head) / video.chunk))
        raise ConfigError(
            f"video.frames={video.frames} is not a whole number of chunks of {video.chunk}"
            f"{' after the first frame' if head else ''}; {fits} would be"
        )
    check_range("drop", config.drop, least=0, most=1)
    _check_guidance("guidance", config.guidance, config.model)
    config.context.check(video.chunk, video.independent_first_frame)
    for role, network in (("model", config.model), ("teacher", config.teacher), ("critic", config.critic)):
        if network is not None and network.channels != config.codec.channels:
            raise ConfigError(
                f"{role}.channels={network.channels}, but the codec gives {config.codec.channels} channels"
            )


def check_choices(config: SystemConfig, sampler: Sampler) -> None:
    """Checks objective and plan against everything else.

    Args:
        config: One choice on each axis.
        sampler: How the student generates.

    Raises:
        ConfigError: Choices contradict each other.
    """
    _check_objective(config, sampler)
    _check_roles(config)
    _check_plan(config, sampler)


def _check_guidance(name: str, guidance: Guidance, model: DiTConfig) -> None:
    """Branches make a prediction together, and each that drops something drops what the network would be told."""
    if not guidance:
        raise ConfigError(f'{name}: has no branch; ({{"coefficient": 1.0}},) is no guidance')
    total = sum(branch.coefficient for branch in guidance)
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"{name}: its coefficients add up to {total:g}, not to 1: it would scale what is predicted")
    taken = {"text": model.text, "actions": model.actions, "label": model.classes}
    known = [condition for condition, network in taken.items() if network is not None]
    for branch in guidance:
        if branch.drops and not set(branch.drops) & set(known):
            raise ConfigError(
                f"{name}: a branch drops {' and '.join(branch.drops)}, but the network takes "
                f"{' and '.join(known) or 'no conditions'}"
            )


def _check_objective(config: SystemConfig, sampler: Sampler) -> None:
    objective, pattern = config.objective, config.visibility
    for name in ("roles", "init_aux", "phases", "loss"):
        if inspect.getattr_static(objective, name, None) is None:
            raise ConfigError(
                f"objective: {type(objective).__name__} has no {name}; vidar/objectives/protocol.py says what it needs"
            )
    if not isinstance(objective.roles, Mapping):
        raise ConfigError(
            f"objective: roles of {type(objective).__name__} should be a mapping by name, not {objective.roles!r}"
        )
    beside = getattr(objective, "beside", False)
    if isinstance(objective, Objectives) and beside != isinstance(pattern, TeacherForcing):
        raise ConfigError(
            f"objective {type(objective).__name__} and visibility {type(pattern).__name__} do not go together: "
            "visibility teacher_forcing is for objectives with clean clips beside noisy ones, which need it"
        )
    if isinstance(objective, Distillation):
        _check_distillation(config, objective, sampler)
    if isinstance(objective, OdeRegression | Consistency):
        _check_given(config, sampler, "objective.given", objective.given)
    if isinstance(objective, Consistency):
        _check_guidance("objective.guidance", objective.guidance, config.teacher or config.model)
    levels = getattr(config.levels.base, "levels", None)
    if levels is not None and not np.all(np.diff(levels) < 0):
        raise ConfigError(f"levels.base.levels={levels} must descend")


def _check_roles(config: SystemConfig) -> None:
    """Nothing is said of a role that the objective does not have, or that the role would not use."""
    roles = config.objective.roles
    for name, choice in config.roles.items():
        if name not in roles:
            raise ConfigError(f"roles.{name}: the objective has no such role; its are {', '.join(sorted(roles))}")
        trained = roles[name].optimizer is not None
        if choice.lora is not None and not trained:
            raise ConfigError(f"roles.{name}.lora: adapters are trained, and {name} is frozen")
        if choice.dtype is not None and trained and choice.lora is None:
            raise ConfigError(
                f"roles.{name}.dtype={choice.dtype!r} is for frozen parameters, and {name} is trained: "
                "model.precision says in which types it computes"
            )
        if choice.lora is not None and roles[name].wrap is not None:
            raise ConfigError(f"roles.{name}.lora: {name} has parts of its own, trained with it: leave lora out")
        if choice.ema_memory is not None and roles[name].ema is None:
            raise ConfigError(f"roles.{name}.ema_memory={choice.ema_memory!r}: {name} has no average")
    for name, used in (("teacher", roles.keys() & {"teacher", "critic"}), ("critic", roles.keys() & {"critic"})):
        if getattr(config, name) is not None and not used:
            raise ConfigError(f"{name}: the objective has no such role; its are {', '.join(sorted(roles))}")


def _check_given(config: SystemConfig, sampler: Sampler, name: str, given: int) -> None:
    video = config.video
    last = chunk_layout(video.frames, video.chunk, independent_first_frame=sampler.first).chunks[-1]
    if not 0 <= given <= last:
        raise ConfigError(f"{name}={given} of {last + 1} chunks leaves none to learn: give 0 … {last}")


def _check_distillation(config: SystemConfig, objective: Distillation, sampler: Sampler) -> None:
    forcing, video = objective.forcing, config.video
    if config.plan.lag not in (None, config.solver.steps) or config.plan.commit.kind != "extra_pass":
        raise ConfigError("distillation rolls out one chunk at a time: use plan.lag=None and an extra_pass commit")
    if not isinstance(config.solver, FewStep):
        raise ConfigError(
            f"distillation makes a few-step student: use solver.kind='few_step', not {config.solver.kind!r}"
        )
    _check_given(config, sampler, "objective.forcing.given", forcing.given)
    if isinstance(forcing, SelfForcing):
        check_range("objective.forcing.gradient.passes", forcing.gradient.passes, most=config.solver.steps)
    if video.independent_first_frame and not forcing.given:
        raise ConfigError("distillation with an independent first frame needs it given: set objective.forcing.given=1")
    frames = objective.frames
    if frames is not None and (frames < video.frames or (frames - video.frames) % video.chunk):
        raise ConfigError(
            f"objective.forcing.frames={frames} must be video.frames={video.frames} "
            f"and whole chunks of {video.chunk} more"
        )
    if isinstance(objective.matching, GAN):
        objective.matching.heads.blocks((config.critic or config.teacher or config.model).layers)
    else:
        _check_guidance("objective.matching.guidance", objective.matching.guidance, config.teacher or config.model)


def _check_plan(config: SystemConfig, sampler: Sampler) -> None:
    program = sampler.program
    if not program.lag:
        return
    frames = config.video.frames
    if config.context.window is not None:
        frames = max(frames, 2 * config.context.window)
    layout = chunk_layout(frames, config.video.chunk, independent_first_frame=config.video.independent_first_frame)
    if leaks(sampler.visibility, layout):
        raise ConfigError(
            f"visibility {type(config.visibility).__name__} lets frames see later chunks, so cached keys would be "
            "wrong: use chunk_causal, or plan.lag=0 to generate the whole clip at once"
        )
    if config.context.window is None and config.context.positions == "relative":
        raise ConfigError("context.positions='relative' needs a window: set context.window")
    fused = config.plan.commit.kind == "fused"
    if fused and config.plan.commit.drops:
        raise ConfigError(
            f"plan.commit.drops={config.plan.commit.drops} needs a pass of its own, since a fused row shares its "
            "conditions with the next chunk: use plan.commit.kind='extra_pass'"
        )
    if config.context.positions == "relative" and config.context.sink and (program.width > 1 or fused):
        raise ConfigError(
            "context.positions='relative' with a sink runs one chunk at a time, because each chunk sees the sink "
            "elsewhere: use plan.lag=None and an extra_pass commit, or context.sink=0"
        )
    if config.model.backend != "xla" and (program.width > 1 or fused):
        raise ConfigError(
            f"model.backend={config.model.backend!r} runs one chunk at a time: use backend='xla' for "
            f"lag={program.lag} of {program.steps} steps with a {config.plan.commit.kind} commit"
        )
