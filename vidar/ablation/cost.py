"""Counted FLOPs of a training phase, for any objective: matrix products of the traced loss and its gradient.

XLA's own cost analysis counts the body of a loop once, so the traced program is walked instead and loops are
multiplied out: a scan by its length; a loop whose length is only known while it runs (the solver steps before a random
exit row, the chunks before the clip of a long rollout) by the mean of that draw. Attention is counted dense, masked
pairs included, as the `xla` back end computes it, for every back end; elementwise work is not counted, nor is the
optimizer's.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vidar.objectives.distillation import Distillation
from vidar.objectives.forcing import SelfForcing
from vidar.objectives.protocol import Phase
from vidar.sampling.rollout import ADVANCE
from vidar.system import OnData, System, compose
from vidar.training.experiment import RunConfig
from vidar.training.state import by_path, from_paths, joined, phases_of

# A budget in FLOPs may lead beyond a card's own steps, to phases that come later.
_LOOKED_THROUGH = 100_000


def phase_flops(config: RunConfig, batch: Any) -> dict[str, float]:
    """Counts one update of each phase.

    Args:
        config: The run; nothing of it is loaded, so its sources need not exist.
        batch: A prepared batch of it (arrays or shapes), as the loss takes it.

    Returns:
        FLOPs by phase name.
    """
    roles = ("model", "teacher", "critic")
    networks = {role: getattr(config, role) for role in roles if getattr(config, role) is not None}
    plain = {role: replace(network, backend="xla", remat=False) for role, network in networks.items()}
    system = compose(replace(config, **plain))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    phases = phases_of(system.objective, max(config.training.steps, _LOOKED_THROUGH))
    return {name: _count(system, phase, shapes) for name, phase in phases.items()}


def parameters(config: RunConfig) -> dict[str, int]:
    """Counts the parameters of every network of a run, by role; nothing is loaded."""
    system, key = compose(config), jax.random.key(0)
    return {
        role: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(partial(system.build, role), key)))
        for role in system.roles
    }


def total_flops(objective: Any, flops: Mapping[str, float], steps: int) -> float:
    """Adds up all phases of the first `steps` steps."""
    return sum(flops[phase.name] for step in range(steps) for phase in objective.phases(step))


def steps_within(objective: Any, flops: Mapping[str, float], amount: float) -> int:
    """Counts the steps that fit into a budget of FLOPs; 0 where not even the first does."""
    spent, step = 0.0, 0
    while (spent := spent + sum(flops[phase.name] for phase in objective.phases(step))) <= amount:
        step += 1
    return step


def _count(system: System, phase: Phase, batch: Any) -> float:
    objective, key = OnData(system), jax.random.key(0)
    trained = {
        role: jax.eval_shape(partial(system.trainable, role), key)
        for role, choice in system.roles.items()
        if choice.optimizer is not None
    }
    frozen = {
        role: jax.eval_shape(partial(system.build, role), key)
        for role, choice in system.roles.items()
        if choice.optimizer is None or choice.lora is not None
    }
    template = trained[phase.role]

    def loss(leaves: Any, frozen: Any, trained: Any, aux: Any, batch: Any, step: Any, key: Any) -> Any:
        free = {
            path: leaf if phase.trainable is None or phase.trainable(path) else jax.lax.stop_gradient(leaf)
            for path, leaf in leaves.items()
        }
        networks = joined(frozen, {**trained, phase.role: from_paths(template, free)})
        return objective.loss(phase.name, networks, aux, system.axes, batch, step, key)[0]

    aux, step = jax.eval_shape(objective.init_aux), jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.make_jaxpr(jax.value_and_grad(loss))(by_path(template), frozen, trained, aux, batch, step, key)
    return _flops(traced.jaxpr, _mean_turns(system))


def _mean_turns(system: System) -> dict[str, float]:
    """How often loops of unknown length turn on average: by scope, and `""` for the others."""
    objective, steps = system.objective, system.sampler.solver.steps
    forcing = objective.forcing if isinstance(objective, Distillation) else None
    if not isinstance(forcing, SelfForcing):
        return {"": (steps - 1) / 2}
    # Exit rows are uniform over the solver's steps; before the last passes, which are differentiated, they run here.
    before = sum(max(0, row + 1 - forcing.gradient.passes) for row in range(steps)) / steps
    most = ((forcing.frames or system.sampler.frames) - system.sampler.frames) // system.sampler.chunk
    return {ADVANCE: most / 2, "": before}


def _flops(jaxpr: Any, turns: Mapping[str, float]) -> float:
    """Matrix FLOPs of a traced program."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "scan":
            total += parameters["length"] * _flops(parameters["jaxpr"].jaxpr, turns)
        elif name == "while":
            scope = next(scope for scope in turns if scope in str(equation.source_info.name_stack))
            total += turns[scope] * _flops(parameters["body_jaxpr"].jaxpr, turns)
        elif name == "cond":
            total += max(_flops(branch.jaxpr, turns) for branch in parameters["branches"])
        else:
            total += sum(_flops(inner, turns) for inner in _inner(parameters))
    return total


def _inner(parameters: Mapping[str, Any]) -> Iterator[Any]:
    """Programs that an equation calls: functions under jit, checkpoints, custom derivatives."""
    for value in parameters.values():
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value.jaxpr


def _product(equation: Any) -> float:
    contracted = equation.params["dimension_numbers"][0][0]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    channels_out = kernel[numbers.rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / channels_out
