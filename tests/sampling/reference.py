"""Generation without caches, ticks or slots: every iteration of the staircase is one forward over the whole clip."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vidar.attention.visibility import chunk_layout
from vidar.diffusion import flow
from vidar.diffusion.plan import staircase
from vidar.models.frames import Frames
from vidar.sampling.noise import Purpose, frame_noise


def keys(*seeds: int) -> jax.Array:
    """Session keys."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def generate(plan, model, key_b, conditions, frames: int, given=None) -> jax.Array:
    """What `plan.generate` must give, from `staircase`, the solver and the visibility alone.

    A finished chunk stays in the sequence as it was committed: clean or noised at the commit's level, or as it was
    before its last step. Given frames are never noised.
    """
    steps = plan.solver.steps
    lag = steps if plan.lag is None else plan.lag
    data = 0 if given is None else given.shape[1]
    if given is None and plan.first and lag:
        alone = replace(plan, chunk=1, first=False, lag=None)
        given = generate(alone, model, key_b, conditions.frames(0, 1), 1)
    layout = chunk_layout(frames, plan.chunk, independent_first_frame=plan.first)
    chunk_of = np.asarray(layout.chunks)
    x, done = _initial(key_b, Purpose.INITIAL, jnp.zeros((frames,), jnp.int32), plan.latent), 0
    if given is not None:
        x, done = x.at[:, : given.shape[1]].set(given), chunk_of[given.shape[1] - 1] + 1
    table = staircase(int(chunk_of[-1] + 1 - done), steps, lag)
    before, after = (
        np.pad(rows, ((0, 0), (done, 0)), constant_values=steps)[:, chunk_of] for rows in (table.before, table.after)
    )
    committed, previous = _committed(plan, np.arange(frames) < data), x
    history = jnp.zeros((*x.shape[:2], plan.solver.remembered, *plan.latent), jnp.float32)
    axes = (plan.visibility, layout, plan.solver, plan.guidance)
    for row in zip(jnp.asarray(before), jnp.asarray(after), strict=True):
        x, previous, history = _iteration(axes, model, key_b, conditions, x, previous, history, *row, committed)
    return x


def _committed(plan, given_f):
    """Level, time and share of real noise of each frame as it was committed, and whether its last step serves."""
    commit, last_step = plan.commit, plan.commit.kind == "last_step"
    level = np.where(given_f & commit.noise, 0.0, float(plan.solver.levels[-2]) if last_step else commit.level)
    level = np.where(given_f & last_step, 0.0, level)
    time = 1000.0 * level if commit.time is None else np.full(level.shape, commit.time)
    noised = commit.noise * ~given_f
    return *(jnp.asarray(value, jnp.float32) for value in (level, time, noised)), jnp.asarray(last_step & ~given_f)


def _noise(key_b, purpose, step_f, latent):
    frame_bf = jnp.broadcast_to(jnp.arange(len(step_f), dtype=jnp.int32)[None], (key_b.shape[0], len(step_f)))
    return frame_noise(key_b, purpose, frame_bf, step_f, latent)


_initial = jax.jit(_noise, static_argnums=(1, 3))


@partial(jax.jit, static_argnums=0)
def _iteration(axes, model, key_b, conditions, x, previous, history, before_f, after_f, committed):
    visibility, layout, solver, guidance = axes
    level, time, noised, last_step = committed
    table = jnp.asarray(solver.levels, jnp.float32)
    rows, frames, *latent = x.shape

    def spread(value_f):
        return jnp.broadcast_to(value_f[None], (rows, frames))

    finished = before_f == solver.steps
    noise = _noise(key_b, Purpose.CONTEXT, jnp.zeros_like(before_f), tuple(latent))
    noised_x = flow.interpolate(x, noise, spread(level * noised * finished.astype(jnp.float32)))
    context = jnp.where(last_step[None, :, None, None, None], previous, noised_x)
    own = spread(jnp.where(finished, level, table[before_f]))
    told = spread(jnp.where(finished, time, 1000.0 * table[before_f]))
    seen = Frames(jnp.where(finished[None, :, None, None, None], context, x), own, layout, told)
    prediction = jnp.zeros_like(x)
    for branch in guidance:
        dropped = conditions.drop(branch.drops, jnp.zeros((rows,), bool))
        prediction += branch.coefficient * model((seen,), dropped, visibility=visibility).predictions[0]
    renoise = _noise(key_b, Purpose.RENOISE, after_f, tuple(latent))
    stepped, remembered = solver.step(model.config.prediction, prediction, x, before_f, renoise, history)
    moves = (after_f > before_f)[None, :, None, None, None]
    return (
        jnp.where(moves, stepped, x),
        jnp.where(moves, x, previous),
        jnp.where(moves[:, :, None], remembered, history),
    )
