"""Exposure bias, measured directly: the denoising loss with the true past, and with the past that the model made.

Takes a network and arrays; it must not know drivers or data sets.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vidar.attention.visibility import CLEAN, TeacherForcing, Window, chunk_layout
from vidar.diffusion import flow
from vidar.models.frames import Conditions, Frames
from vidar.sampling.noise import Purpose, frame_noise
from vidar.sampling.rollout import Sampler

LEVELS = (0.25, 0.5, 0.75)


@partial(jax.jit, static_argnums=0)
def context_losses(
    sampler: Sampler,
    model: Any,
    latents: jax.Array,
    past: jax.Array,
    conditions: Conditions,
    key_b: jax.Array,
) -> jax.Array:
    """Velocity error of each true frame, given a past.

    Args:
        sampler: How the network generates: chunks, window, and the level of committed chunks.
        model: The network.
        latents: True clips `[b, f, h, w, c]`.
        past: What the chunks before each one are taken from, the same shape: the truth, or what was generated under the
            same conditions.
        conditions: Conditions of the clips; raw text.
        key_b: Keys of the noise.

    Returns:
        Mean squared error over `LEVELS`, `[b, f]`, where 0 is perfect; frames in sight of no past are equal for any.
    """
    rows, frames = latents.shape[:2]
    layout = partial(chunk_layout, frames, sampler.chunk, independent_first_frame=sampler.first)
    frame = jnp.broadcast_to(jnp.arange(frames, dtype=jnp.int32)[None], (rows, frames))
    noise = partial(frame_noise, key_b, frame_bf=frame, shape=latents.shape[2:])
    visibility, context = TeacherForcing(), sampler.context
    if context.window is not None:
        visibility = visibility & Window(context.window, context.sink)
    commit = sampler.commit
    told = jnp.full((rows, frames), commit.level, jnp.float32)
    time = None if commit.time is None else jnp.full((rows, frames), commit.time, jnp.float32)
    noised = past
    if commit.noise:
        noised = flow.interpolate(past, noise(Purpose.CONTEXT, step_f=jnp.zeros((frames,), jnp.int32)), told)
    seen = Frames(noised, told, layout(role=CLEAN), time)
    errors = []
    for number, value in enumerate(LEVELS):
        eps = noise(Purpose.INITIAL, step_f=jnp.full((frames,), number, jnp.int32))
        level = jnp.full((rows, frames), value, jnp.float32)
        noisy = Frames(flow.interpolate(latents, eps, level), level, layout())
        prediction = model((seen, noisy), conditions, visibility=visibility).predictions[1]
        velocity = flow.to_velocity(model.config.prediction, prediction, noisy.latents, level)
        errors.append(jnp.mean(jnp.square(velocity - (eps - latents)), axis=(2, 3, 4)))
    return jnp.mean(jnp.stack(errors), axis=0)


def context_gap(
    sampler: Sampler, model: Any, latents: jax.Array, generated: jax.Array, conditions: Conditions, key_b: jax.Array
) -> dict[str, float]:
    """Exposure bias of a network: how much worse it denoises after its own past than after the true one.

    Args:
        sampler: How the network generates.
        model: The network.
        latents: True clips `[b, f, h, w, c]`.
        generated: Clips that it generated under the same conditions, the same shape.
        conditions: Conditions of the clips.
        key_b: Keys of the noise.

    Returns:
        `teacher_context_loss`, `self_context_loss`, means over clips and frames, and `context_gap`, their difference.
    """
    arguments = conditions, key_b
    true, own = (
        float(jnp.mean(context_losses(sampler, model, latents, past, *arguments))) for past in (latents, generated)
    )
    return {"teacher_context_loss": true, "self_context_loss": own, "context_gap": own - true}
