"""Causal Wan against the reference's semantics: one forward under its masks, and rollouts through its rolling cache.

The arrays are an independent implementation's (tests/golden/causal.py), in fp64. Where its rules and vidar's differ:

* Its mask has no sink; vidar's `Window` has. What frames should see with a sink is what they see through its cache.
* Its buffer evicts any number of frames, so that a block may see part of another. vidar's mask does the same ("chunk 3,
  window 5"); its ring holds whole chunks, and other windows are refused.
* Window and sink count alike: the window counts the sink and the block itself. With chunks of 3, a sink of 3 and a
  window of 6, that leaves no other past; with a window of 9, one chunk of it.
* Without a window its buffer holds a clip of a given length, as vidar's *append* does. Beyond, it fails inside a copy.
* It runs the clean pass after the last block, too, which nothing reads; so does vidar.
* Its keys keep their absolute positions, as vidar's do by default.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import causal as golden
from tests.golden.wan import weight
from tests.interop.test_wan import stored
from tests.networks import pattern
from vidar.attention.cache import ContextConfig, slot_tokens
from vidar.attention.visibility import chunk_layout
from vidar.diffusion import flow
from vidar.errors import ConfigError
from vidar.interop import networks
from vidar.models.dit import DiTConfig, TextConfig
from vidar.models.frames import Conditions, Frames
from vidar.models.layers import Precision
from vidar.sampling import flight
from vidar.sampling.noise import Purpose
from vidar.sampling.rollout import Sampler
from vidar.sampling.solvers import FewStep

FP32 = Precision("float32", "float32")
TOLERANCE = 1e-5  # largest error over largest value; measured are 4e-6, most of it from the fp32 angles of times


@functools.cache
def recognised():
    """The network that a checkpoint under the original names turns out to be."""
    tensors = {name: stored(weight(name, shape)) for name, shape in golden.shapes().items()}
    return networks.recognise(tensors, {"attention_head_dim": golden.HEAD}, FP32)


@functools.cache
def model():
    return recognised().load()


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(golden.ARRAYS) as file:
        return dict(file)


def text(number: int = 0) -> Conditions:
    return Conditions(text=jnp.asarray(golden.text(number)))


def error(found, expected) -> float:
    """Largest error over largest value."""
    assert found.shape == expected.shape
    return float(np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected)))


def test_the_checkpoint_is_known_for_what_it_is():
    found = recognised()
    assert (found.kind, found.layout) == ("transformer", "original")
    assert found.config == DiTConfig(
        width=golden.WIDTH,
        layers=golden.LAYERS,
        heads=golden.HEADS,
        mlp=golden.MLP,
        channels=golden.LATENT[-1],
        patch=golden.PATCH,
        time_channels=golden.TIME,
        text=TextConfig(golden.TEXT[1]),
        precision=FP32,
    )


# ------------------------------------------------------------------------------------------------------- one forward


@functools.cache
def forward(case: golden.Case):
    layout = chunk_layout(case.frames, case.chunk, independent_first_frame=case.first)
    network, visibility = model(), pattern(case.window, case.sink)

    @jax.jit
    def run(latents, level, conditions):
        frames = Frames(latents, level, layout)
        return network((frames,), conditions, visibility=visibility).predictions[0]

    return run


@pytest.mark.parametrize("name", golden.PARALLEL)
def test_one_forward_with_a_level_for_each_chunk(name):
    case = golden.PARALLEL[name]
    latents, level = jnp.asarray(golden.clean(case.frames)), jnp.asarray(golden.block_times(case) / 1000)
    assert error(forward(case)(latents, level, text()), arrays()[f"parallel: {name}"]) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name, case in golden.CACHED.items() if case.switch is None])
def test_one_clean_forward_is_what_the_rolling_cache_gives(name):
    case = golden.CACHED[name]
    level = jnp.zeros((golden.ROWS, case.frames))
    found = forward(case)(jnp.asarray(golden.clean(case.frames)), level, text())
    assert error(found, arrays()[f"streamed: {name}"]) <= TOLERANCE


# ---------------------------------------------------------------------------------------------------------- rollouts


def sampler(case: golden.Case) -> Sampler:
    context = ContextConfig(case.window, case.sink)
    context.check(case.chunk, case.first)
    return Sampler(
        visibility=pattern(case.window, case.sink),
        latent=golden.LATENT,
        tokens=golden.TOKENS,
        frames=case.frames,
        chunk=case.chunk,
        solver=FewStep(golden.TIMES, golden.SHIFT),
        context=context,
        first=case.first,
        cache_dtype="float32",
    )


def given_noise(frames: int):
    """`frame_noise` that gives the noise of the stored rollouts: of step 0 at first, then of each re-noising."""
    every = np.stack([golden.noise(step, frames) for step in range(len(golden.TIMES))])

    def noise(key_b, purpose, frame_bf, step_f, shape):
        assert purpose in (Purpose.INITIAL, Purpose.RENOISE)
        assert shape == golden.LATENT
        # After the last step there is no noise left to add: any will do.
        row = jnp.arange(golden.ROWS, dtype=jnp.int32)[:, None]
        return jnp.asarray(every)[jnp.minimum(step_f, len(every) - 1)[None], row, frame_bf]

    return noise


def rolled_out(case: golden.Case) -> tuple[np.ndarray, np.ndarray]:
    """Generates tick by tick; returns as `golden.rollout`."""
    plan, network = sampler(case), model()
    prompts = [plan.encode(network, text(number)) for number in range(2 if case.switch else 1)]
    state = plan.init(network, jax.vmap(jax.random.key)(jnp.arange(golden.ROWS)))
    tick = jax.jit(lambda state, conditions: plan.tick(network, state, conditions))
    parts, seen = [], np.zeros((len(case.blocks()), case.frames), bool)
    for index, (start, end) in enumerate(case.blocks()):
        slots = slot_tokens(state.cache)
        seen[index, np.asarray(slots.frame)[0][np.asarray(slots.written)[0]]] = True
        seen[index, start:end] = True
        if case.first and not index:
            parts.append(jnp.asarray(golden.clean(1)))
            state = jax.jit(functools.partial(plan.prefill, network))(state, parts[0], prompts[0])
            continue
        state, chunk = tick(state, prompts[case.switch is not None and start >= case.switch])
        np.testing.assert_array_equal(chunk.frame, [start] * golden.ROWS)
        parts.append(chunk.latents)
    return np.concatenate(parts, axis=1), seen


@pytest.mark.parametrize("name", golden.CACHED)
def test_ticks_generate_what_the_reference_does(monkeypatch, name):
    case, expected = golden.CACHED[name], arrays()[f"rollout: {name}"]
    monkeypatch.setattr(flight, "frame_noise", given_noise(case.frames))
    found, seen = rolled_out(case)
    np.testing.assert_array_equal(seen, arrays()[f"seen: {name}"])
    # With this network rounding does not compound, not even over ten chunks.
    assert error(found, expected) <= TOLERANCE


def test_which_frames_are_evicted():
    """The published trace: window 4, sink 1; frame 5 attends to {1, 3, 4, 5} and frame 7 to {1, 5, 6, 7}."""
    seen = [set(np.flatnonzero(row) + 1) for row in arrays()["seen: chunk 1, window 4, sink 1"]]
    assert [seen[frame - 1] for frame in (4, 5, 7, 10)] == [{1, 2, 3, 4}, {1, 3, 4, 5}, {1, 5, 6, 7}, {1, 8, 9, 10}]
    seen = [set(np.flatnonzero(row)) for row in arrays()["seen: chunk 3, window 6, sink 3"]]
    assert seen[2:4] == [{0, 1, 2, 6, 7, 8}, {0, 1, 2, 9, 10, 11}]
    with pytest.raises(ConfigError, match="context.window=5 does not align"):
        ContextConfig(5).check(3)


def test_every_case_is_another():
    """Guard: windows, sinks and prompts that did nothing would pass above."""
    plain = arrays()["rollout: chunk 3"]
    for name, start in (("chunk 3, window 6", 6), ("chunk 3, window 6, sink 3", 6), ("chunk 3, window 9, sink 3", 9)):
        other = arrays()[f"rollout: {name}"][:, :12]
        np.testing.assert_array_equal(other[:, :start], plain[:, :start])
        assert error(other[:, start : start + 3], plain[:, start : start + 3]) > 0.01
    assert error(arrays()["rollout: two prompts"][:, 6:], plain[:, 6:]) > 0.01


# ---------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("shift,published", [(5, [1000, 937.5, 833.33, 625]), (8, [1000, 960, 888.89, 727.27])])
def test_steps_are_warped(shift, published):
    levels = 1000 * FewStep(golden.TIMES, float(shift)).levels
    np.testing.assert_allclose(levels, [*arrays()[f"warped: {shift}"], 0], rtol=1e-12)
    np.testing.assert_allclose(levels[:-1], published, atol=0.005)


@pytest.mark.parametrize("shift", [5, 8])
def test_loss_weights_of_the_grid(shift):
    expected = arrays()[f"bump: {shift}"]
    level = jnp.asarray(golden.grid(shift)[::37], jnp.float32)
    assert error(flow.bump_weight(level, float(shift)), expected) <= TOLERANCE
    assert float(flow.bump_weight(jnp.float32(1), float(shift))) == pytest.approx(0, abs=1e-6)


def test_the_largest_loss_weight():
    assert float(flow.bump_weight(jnp.float32(0.5), 5.0)) == pytest.approx(2.08, abs=0.005)
