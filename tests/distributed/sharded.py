"""The real losses, their gradients and the tick, on one device and on meshes; run in processes with virtual devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from tests.networks import CONFIG, clip, network, sampler
from vidar.attention.visibility import ChunkCausal, TeacherForcing
from vidar.diffusion.levels import Independent, LevelsConfig
from vidar.models.dit import TextConfig
from vidar.models.frames import Batch
from vidar.models.placement import logical_axes
from vidar.objectives import diffusion, distillation, teacher_forcing
from vidar.objectives.matching import SiD
from vidar.sampling.axes import Axes
from vidar.sampling.noise import session_keys
from vidar.sampling.solvers import FewStep
from vidar.sharding import MeshConfig, Rules, make_mesh, shardings

ROWS = 4
MODEL = replace(CONFIG, heads=4, layers=2, text=TextConfig(8, 6))
PLAN = sampler(frames=4, chunk=2, window=4, solver=FewStep((1000.0, 500.0)))
STREAMS = {
    "tick": replace(PLAN, chunk=1, context=replace(PLAN.context, window=3)),
    "pipelined tick": replace(PLAN, chunk=1, lag=1, context=replace(PLAN.context, window=3)),
}
AXES = Axes(LevelsConfig(base=Independent()), ChunkCausal(), PLAN, drop=0.3)
LOSSES = {
    "teacher_forcing": (teacher_forcing.TeacherForcing(0.1), replace(AXES, visibility=TeacherForcing())),
    "diffusion": (diffusion.Diffusion(weight="bump", shift=3.0), AXES),
    "self_forcing": (distillation.Distillation(), AXES),
    "self_forcing by SiD": (distillation.Distillation(matching=SiD()), AXES),
}


def batch():
    """Clips with text and actions; the global index is not the position."""
    latents, conditions = clip(ROWS, 4)
    text = jax.random.normal(jax.random.key(9), (ROWS, 6, 8))
    return Batch(latents, replace(conditions, text=text), jnp.arange(ROWS, dtype=jnp.int32)[::-1] + 7)


def loss_and_gradient(name, models, batch):
    """Loss of one objective's student phase and its gradient with respect to the student."""
    objective, axes = LOSSES[name]

    def loss(student, batch):
        networks = {**models, "student": student}
        key = jax.random.key(5)
        return objective.loss("student", networks, (), axes, batch, jnp.int32(3), key)[0]

    return jax.jit(jax.value_and_grad(loss))(models["student"], batch)


def ticks(sampler, models, batch):
    """Four ticks of a stream whose ring wraps, one session a tick behind: emitted latents, and the cache after them."""

    @jax.jit
    def tick(model, state, conditions):
        state, chunk = sampler.tick(model, state, conditions)
        return state, chunk.latents

    conditions = sampler.encode(models["student"], batch.conditions)
    state = sampler.init(models["student"], session_keys(3, ROWS), actions=conditions.actions)
    emitted = []
    for frame in range(4):
        state = replace(state, active=jnp.arange(ROWS) != 1 if frame == 0 else jnp.ones((ROWS,), bool))
        state, latents = tick(models["student"], state, conditions.frames(frame, frame + 1))
        emitted.append(latents)
    return emitted, (state.cache.keys, state.cache.values, state.cache.count)


def computed(name, models, batch):
    """The case's numbers on the host, by path."""
    result = ticks(STREAMS[name], models, batch) if name in STREAMS else loss_and_gradient(name, models, batch)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(result)}


def errors(cases):
    """Compares meshes with one device.

    Args:
        cases: By name of a loss or stream, the meshes: sizes of their axes, as keywords of `MeshConfig`.

    Returns:
        By case and mesh, the largest error of any array, as norm of the difference over norm of the expected, and its
        path.
    """
    seeds = {"student": 0, "critic": 1, "teacher": 2}
    models, clips = {role: network(MODEL, seed) for role, seed in seeds.items()}, batch()
    found = {}
    for name, meshes in cases.items():
        expected = computed(name, models, clips)
        # A parameter that a loss does not use (the vector of dropped actions, in a rollout) has no gradient anywhere.
        used = {path for path, value in expected.items() if np.any(value)}
        assert len(used) >= len(expected) - 1, sorted(set(expected) - used)
        for sizes in meshes:
            mesh = make_mesh(MeshConfig(**sizes))
            with jax.set_mesh(mesh):
                placed = {
                    role: jax.device_put(model, shardings(model, logical_axes, mesh)) for role, model in models.items()
                }
                rows = jax.sharding.NamedSharding(mesh, Rules().spec(("batch",)))
                got = computed(name, placed, jax.device_put(clips, rows))
            size = {path: np.linalg.norm(value) if path in used else 1.0 for path, value in expected.items()}
            wrong = {path: np.linalg.norm(got[path] - value) / size[path] for path, value in expected.items()}
            worst = max(wrong, key=wrong.get)
            label = " ".join(f"{axis}={size}" for axis, size in sizes.items())
            found[f"{name} on {label}"] = (float(wrong[worst]), worst)
    return found
