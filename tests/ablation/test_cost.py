"""Counted FLOPs agree with the published formulas, and what a phase runs is what is counted."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidar.ablation.cost import phase_flops
from vidar.models.flops import forward_flops, shape_of, training_flops
from vidar.training.experiment import RunConfig, load_run_config

BATCH, FRAMES, TOKENS, STEPS = 4, 8, 16, 4


def batch(rows: int = BATCH):
    """Shapes of a prepared batch of the one-shape world."""
    return {
        "pixels": jax.ShapeDtypeStruct((rows, FRAMES, 16, 16, 3), jnp.uint8),
        "actions": jax.ShapeDtypeStruct((rows, FRAMES), jnp.int32),
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "index": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }


def config(card: str) -> RunConfig:
    loaded = load_run_config(f"configs/{card}.py")
    return replace(loaded, model=replace(loaded.model, width=64, layers=2, mlp=256))


def test_a_bidirectional_update_is_three_forwards():
    teacher = config("world/teacher")
    wanted = BATCH * training_flops(shape_of(teacher.model, 4, 4), "bidirectional", [1] * FRAMES).total
    assert phase_flops(teacher, batch())["student"] == pytest.approx(wanted, rel=0.1)


def test_counts_do_not_depend_on_rematerialisation_and_grow_with_the_batch():
    teacher = config("world/teacher")
    plain = replace(teacher, model=replace(teacher.model, remat=False))
    assert phase_flops(teacher, batch()) == phase_flops(plain, batch())
    ratio = phase_flops(plain, batch(2 * BATCH))["student"] / phase_flops(plain, batch())["student"]
    assert ratio == pytest.approx(2, rel=0.01)


def test_teacher_forcing_runs_twice_the_tokens_and_counts_attention_dense():
    shape = shape_of(config("world/teacher_forcing").model, 4, 4)
    tokens = 2 * FRAMES * TOKENS
    wanted = 3 * BATCH * forward_flops(shape, tokens, tokens).total
    assert phase_flops(config("world/teacher_forcing"), batch())["student"] == pytest.approx(wanted, rel=0.1)


def test_self_forcing_counts_rollouts_teacher_and_critic():
    forced = config("systems/self_forcing_dmd")
    shape = shape_of(forced.model, 4, 4)
    window = forced.context.window
    assert window is not None
    one = forward_flops(shape, TOKENS, window * TOKENS).total
    clip = forward_flops(shape, FRAMES * TOKENS, FRAMES * TOKENS).total
    # Seven generated chunks: solver steps before a random exit, the exit itself, the commit; one given chunk committed.
    before, chunks = (STEPS - 1) / 2, FRAMES - 1
    rollout = chunks * (before + 1 + 1) * one + one
    # The exit is run once more where it is differentiated, and backward is two forwards.
    wanted = {"student": rollout + chunks * 3 * one + 2 * clip, "critic": rollout + 3 * clip}
    found = phase_flops(forced, batch())
    assert found.keys() == wanted.keys()
    for phase, flops in wanted.items():
        assert found[phase] == pytest.approx(BATCH * flops, rel=0.12), phase


def test_long_rollouts_and_more_passes_are_counted_as_they_turn():
    """A mean of 32 chunks before the clip, each of four steps and a commit; and three passes of four differentiated."""
    forced = config("systems/self_forcing_dmd")
    shape = shape_of(forced.model, 4, 4)
    one = forward_flops(shape, TOKENS, (forced.context.window or 0) * TOKENS).total
    forcing = forced.objective.forcing
    longer = replace(forced, objective=replace(forced.objective, forcing=replace(forcing, frames=FRAMES + 64)))
    short, long = (phase_flops(choice, batch())["critic"] for choice in (forced, longer))
    assert long - short == pytest.approx(BATCH * 32 * (STEPS + 1) * one, rel=0.12)
    passes = replace(forcing, gradient=replace(forcing.gradient, passes=3))
    more = phase_flops(replace(forced, objective=replace(forced.objective, forcing=passes)), batch())["critic"]
    # Before the last three passes there is one in a quarter of the draws, instead of 0 to 3; two are added.
    assert more - short == pytest.approx(BATCH * (FRAMES - 1) * (0.25 - (STEPS - 1) / 2 + 2) * one, rel=0.12)


def test_a_loop_counts_once_for_each_turn():
    from vidar.ablation.cost import _flops

    def product(x):
        def turn(carry, _):
            return carry @ carry, None

        x, _ = jax.lax.scan(turn, x, None, length=5)
        return jax.lax.fori_loop(0, jnp.int32(x[0, 0]), lambda _, value: value @ value, x)

    traced = jax.make_jaxpr(product)(np.zeros((8, 8), np.float32))
    assert _flops(traced.jaxpr, {"": 1.5}) == (5 + 1.5) * 2 * 8**3


def test_frozen_sources_need_not_exist():
    forced = config("systems/self_forcing_dmd")
    missing = replace(forced, objective=replace(forced.objective, teacher="/nowhere", student="/nowhere"))
    assert phase_flops(missing, batch()) == phase_flops(forced, batch())
