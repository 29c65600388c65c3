"""The loss after a true and after a generated past: against a pass through the cache, and where there is no past."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import clip, network, sampler
from vidar.diffusion.plan import Commit
from vidar.evaluation.context import LEVELS, context_gap, context_losses
from vidar.models.frames import Frames
from vidar.sampling.noise import Purpose, frame_noise, session_keys

LATENTS, CONDITIONS = clip(frames=6)
KEYS = session_keys(0, 2)
OTHER = LATENTS + 0.5


TOLD = Commit("extra_pass", level=0.3, time=100.0)


@pytest.mark.parametrize("fields", [dict(), dict(window=4, chunk=2), dict(told=TOLD)], ids=["append", "window", "told"])
def test_the_loss_is_that_of_a_chunk_after_its_committed_past(fields):
    """The last chunk, written out: past committed to the cache, the chunk noised, one pass."""
    plan, model = sampler(frames=6, **{name: value for name, value in fields.items() if name != "told"}), network()
    plan = replace(plan, commit=fields.get("told", plan.commit))
    errors, start = [], 6 - plan.chunk
    state = plan.init(model, KEYS, actions=CONDITIONS.actions)
    cache = jax.jit(plan.prefill)(model, state, OTHER[:, :start], CONDITIONS.frames(0, start)).cache
    for number, value in enumerate(LEVELS):
        frame = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (2, 6))
        eps = frame_noise(KEYS, Purpose.INITIAL, frame, jnp.full((6,), number, jnp.int32), LATENTS.shape[2:])
        noisy = ((1 - value) * LATENTS + value * eps)[:, start:]
        from vidar.attention.visibility import chunk_layout

        layout = chunk_layout(plan.chunk, plan.chunk)
        stream = Frames(noisy, jnp.full((2, plan.chunk), value), layout, start=jnp.full((2,), start, jnp.int32))
        output = jax.jit(lambda model, stream: model(
            (stream,), CONDITIONS.frames(start, 6), visibility=plan.visibility, cache=cache
        ).predictions[0])(model, stream)  # fmt: skip
        errors.append(np.mean((np.asarray(output) - np.asarray(eps - LATENTS)[:, start:]) ** 2, axis=(2, 3, 4)))
    found = context_losses(plan, model, LATENTS, OTHER, CONDITIONS, KEYS)
    np.testing.assert_allclose(found[:, start:], np.mean(errors, axis=0), rtol=1e-4)


def test_the_first_chunk_has_no_past_and_a_perfect_rollout_no_gap():
    plan, model = sampler(frames=6), network()
    true, own = (context_losses(plan, model, LATENTS, past, CONDITIONS, KEYS) for past in (LATENTS, OTHER))
    np.testing.assert_allclose(own[:, 0], true[:, 0], rtol=1e-6)
    assert float(jnp.max(jnp.abs(own[:, 1:] - true[:, 1:]))) > 1e-3
    same = context_gap(plan, model, LATENTS, LATENTS, CONDITIONS, KEYS)
    assert same["context_gap"] == 0
    gap = context_gap(plan, model, LATENTS, OTHER, CONDITIONS, KEYS)
    assert gap["teacher_context_loss"] == pytest.approx(float(jnp.mean(true)))
    assert gap["context_gap"] == pytest.approx(float(jnp.mean(own) - jnp.mean(true)), abs=1e-5)


def test_committed_noise_is_in_the_past():
    plan, model = sampler(frames=6), network()
    noisy = replace(plan, commit=replace(plan.commit, level=0.5, noise=True))
    clean, other = (context_losses(one, model, LATENTS, LATENTS, CONDITIONS, KEYS) for one in (plan, noisy))
    assert float(jnp.max(jnp.abs(clean[:, 1:] - other[:, 1:]))) > 1e-3
