"""A rollout's states between its solver steps, for whoever learns from the way and not from its end alone."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from vidar.diffusion.plan import RowGroup
from vidar.errors import ConfigError
from vidar.models.frames import Conditions
from vidar.sampling.flight import Flight, State
from vidar.sampling.rollout import Sampler


def chunk_by_chunk(
    sampler: Sampler,
    kept: tuple[int, ...],
    network: Any,
    key_b: jax.Array,
    conditions: Conditions,
    given: jax.Array | None = None,
) -> jax.Array:
    """Generates clips through the cache and keeps states on the way.

    Args:
        sampler: A plan with one chunk in flight.
        kept: Numbers of steps after which the state of each chunk is kept, ascending; 0 keeps its noise.
        network: The network.
        key_b: Session keys `[b]`.
        conditions: Conditions of all frames, projected by `Sampler.encode`.
        given: Clean latents of the first frames `[b, f, h, w, c]`, whole chunks; they are clean in every state.

    Returns:
        States `[b, k, f, h, w, c]`, fp32.

    Raises:
        ConfigError: Another plan, or given frames that are not whole chunks.
    """
    if sampler.program.width != 1 or sampler.carried:
        raise ConfigError("states of a rollout need one chunk in flight: lag = steps and a commit pass of its own")
    state = sampler.init(network, key_b, actions=conditions.actions, in_step=True)
    start, parts = 0, []
    if given is not None:
        start = given.shape[1]
        state = sampler.prefill(network, state, given, conditions.frames(0, start))
        parts.append(jnp.repeat(given[:, None], len(kept), axis=1))
    elif sampler.first:
        state, states = _chunk(replace(sampler, chunk=1), kept, network, state, conditions.frames(0, 1))
        start, parts = 1, [states]
    count = (sampler.frames - start) // sampler.chunk
    actions = None
    if conditions.actions is not None:
        actions = conditions.actions[:, start:]
        actions = jnp.moveaxis(actions.reshape(actions.shape[0], count, sampler.chunk, *actions.shape[2:]), 1, 0)

    def body(state: State, actions: Any) -> tuple[State, jax.Array]:
        return _chunk(sampler, kept, network, state, replace(conditions, actions=actions))

    _, chunks = jax.lax.scan(body, state, actions, length=count)
    return jnp.concatenate([*parts, rearrange(chunks, "u b k f h w c -> b k (u f) h w c")], axis=2)


def _chunk(
    sampler: Sampler, kept: tuple[int, ...], network: Any, state: State, conditions: Conditions
) -> tuple[State, jax.Array]:
    """One tick in stretches, with the states between them `[b, k, f, h, w, c]`."""
    flight, states = Flight.enter(sampler, state, conditions), []
    for start, stop in pairwise((0, *kept)):
        if stop > start:
            before, after = (tuple((step + ahead,) for step in range(start, stop)) for ahead in (0, 1))
            flight = flight.run(network, RowGroup("denoise", before, after))
        states.append(flight.latents)
    state, _ = flight.commit_first(network).leave()
    return state, jnp.stack(states, axis=1)
