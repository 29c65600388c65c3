"""Guidance: its algebra, branches folded into the batch with caches of their own, and commits that drop conditions."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import CONFIG, clip, network, sampler
from tests.sampling import reference
from tests.sampling.reference import keys
from vidar.attention.cache import init_cache, write
from vidar.attention.visibility import chunk_layout
from vidar.diffusion.plan import Commit
from vidar.errors import ConfigError
from vidar.models.dit import ImageConfig, TextConfig
from vidar.models.frames import Conditions, Frames
from vidar.sampling.guidance import UNGUIDED, Branch, classifier_free, combine, fold
from vidar.sampling.noise import Purpose, frame_noise
from vidar.sampling.solvers import Euler, FewStep

STEPS = FewStep((1000.0, 500.0))
TEXT = replace(CONFIG, text=TextConfig(width=10, length=6), classes=3)
IMAGE = replace(TEXT, image=ImageConfig(width=7, latents=2))


def prompts(rows: int = 2, frames: int = 4) -> Conditions:
    """Text, actions and labels."""
    text = jax.random.normal(jax.random.key(4), (rows, 6, 10))
    return replace(clip(rows, frames)[1], text=text, label=jnp.arange(rows, dtype=jnp.int32))


def pictures() -> Conditions:
    """Text, actions, labels, an image, and two further latents of each frame."""
    image = jax.random.normal(jax.random.key(5), (2, 3, 7))
    latents = jax.random.normal(jax.random.key(6), (2, 4, 4, 4, 2))
    return replace(prompts(), image=image, latents=latents)


def generate(plan, model, conditions):
    return jax.jit(partial(plan.generate, frames=plan.frames))(model, keys(0, 1), conditions)


def test_classifier_free_guidance_is_a_sum_of_two_branches():
    """Self Forcing's weight w is the common scale 1 + w."""
    assert classifier_free(1.0) == UNGUIDED
    assert classifier_free(4.0, ("text",)) == (Branch(4.0), Branch(-3.0, ("text",)))
    rng = np.random.default_rng(0)
    conditional, null = rng.normal(size=(2, 3, 2, 2, 2, 1)).astype(np.float32)
    for w in (0.5, 3.0):
        combined = combine(jnp.concatenate([jnp.asarray(conditional), jnp.asarray(null)]), classifier_free(1 + w))
        np.testing.assert_allclose(combined, (1 + w) * conditional - w * null, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(combined, conditional + w * (conditional - null), rtol=1e-5, atol=1e-5)


def test_unknown_drops_are_refused():
    with pytest.raises(ConfigError, match="only text, actions and label"):
        Branch(1.0, ("history",))


def test_folding_drops_by_branch():
    folded = fold(prompts(), (Branch(2.0), Branch(-0.5, ("text",)), Branch(-0.5, ("text", "actions", "label"))))
    assert folded.actions.shape == (6, 4)
    assert folded.text.shape == (6, 6, 10)
    np.testing.assert_array_equal(folded.actions[2:4], folded.actions[:2])
    assert folded.text_kept.tolist() == [True, True, False, False, False, False]
    assert folded.actions_kept.tolist() == folded.label_kept.tolist() == [True] * 4 + [False] * 2
    assert fold(prompts(), UNGUIDED).actions_kept is None


def test_rows_that_were_dropped_before_stay_dropped():
    before = prompts().drop(("actions",), jnp.asarray([True, False]))
    assert fold(before, classifier_free(2.0)).actions_kept.tolist() == [True, False, False, False]


GUIDED = {
    "actions": (dict(guidance=classifier_free(3.0, ("actions",))), network(), clip(frames=4)[1]),
    "text, actions and label, ring, fused": (
        dict(guidance=classifier_free(2.5), window=3, commit="fused"),
        network(TEXT),
        prompts(),
    ),
    "three branches, lag 1": (
        dict(guidance=(Branch(3.0), Branch(-1.5, ("text",)), Branch(-0.5, ("text", "actions"))), lag=1),
        network(TEXT),
        prompts(),
    ),
    "image, whole clips": (dict(guidance=classifier_free(2.5, ("text",)), lag=0), network(IMAGE), pictures()),
}


@pytest.mark.parametrize("name", GUIDED)
def test_guided_ticks_equal_passes_over_the_whole_clip(name):
    """Each branch keeps its own context: the reference runs every branch alone, without a cache."""
    fields, model, conditions = GUIDED[name]
    plan = sampler(frames=4, solver=STEPS, **fields)
    ours = generate(plan, model, conditions)
    theirs = reference.generate(plan, model, keys(0, 1), conditions, 4)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.max(jnp.abs(theirs))))
    unguided = reference.generate(replace(plan, guidance=UNGUIDED), model, keys(0, 1), conditions, 4)
    assert float(jnp.max(jnp.abs(ours[:, 0] - unguided[:, 0]))) > 1e-2


def test_an_image_acts_and_its_latents_are_for_whole_clips():
    plan, model = sampler(frames=4, solver=STEPS, lag=0), network(IMAGE)
    video = generate(plan, model, pictures())
    for change in ({"image": 0 * pictures().image}, {"latents": 0 * pictures().latents}):
        assert float(jnp.max(jnp.abs(generate(plan, model, replace(pictures(), **change)) - video))) > 1e-2
    refusals = {
        "use a plan with lag=0": (replace(plan, lag=None), model, pictures()),
        "0 further latent channels were given, the network takes 2": (plan, model, replace(pictures(), latents=None)),
        "2 further latent channels were given, the network takes 0": (
            plan,
            network(TEXT),
            replace(pictures(), image=None),
        ),
        "model.image is None": (plan, network(TEXT), pictures()),
    }
    for message, arguments in refusals.items():
        with pytest.raises(ConfigError, match=message):
            generate(*arguments)


def test_scale_one_is_no_guidance_and_the_cache_holds_all_branches():
    plan = sampler(frames=4, solver=STEPS, window=3, guidance=(Branch(1.0), Branch(0.0, ("actions",))))
    model, conditions = network(), clip(frames=4)[1]
    plain = generate(replace(plan, guidance=UNGUIDED), model, conditions)
    np.testing.assert_allclose(generate(plan, model, conditions), plain, atol=1e-6 * float(jnp.max(jnp.abs(plain))))
    state = plan.init(model, keys(0, 1), actions=conditions.actions)
    state, _ = jax.jit(plan.tick)(model, state, conditions.frames(0, 1))
    kept, dropped = jnp.split(state.cache.keys[:, :, : plan.tokens], 2, axis=1)
    assert state.cache.count.tolist() == [1, 1, 1, 1]
    assert float(jnp.max(jnp.abs(kept - dropped))) > 1e-2


@pytest.mark.parametrize("drops", [("text",), ("actions", "label"), ("text", "actions", "label")])
def test_commits_drop_conditions_tag_the_time_and_add_noise(drops):
    """Against a loop written out: the denoising passes see the conditions, the committing pass does not."""
    commit = Commit("extra_pass", level=0.1, noise=True, time=-1.0, drops=drops)
    plan = sampler(frames=3, solver=Euler(1), commit="extra_pass")
    plan, model, conditions = replace(plan, commit=commit), network(TEXT), prompts(frames=3)
    ours = generate(plan, model, conditions)
    cache = init_cache(
        plan.geometry, layers=TEXT.layers, rows=2, heads=TEXT.heads, head_dim=TEXT.head_dim, dtype=jnp.float32
    )
    zero, chunks = jnp.zeros((1,), jnp.int32), []

    @jax.jit
    def forward(x, level, time, start, conditions, cache):
        told = [jnp.full((2, 1), value, jnp.float32) for value in (level, time)]
        frames = Frames(x, told[0], chunk_layout(1, 1), told[1], jnp.full((2,), start))
        output = model((frames,), conditions, visibility=plan.visibility, cache=cache)
        return output.predictions[0], write(cache, output.keys, output.values)

    draw = jax.jit(frame_noise, static_argnums=(1, 4))
    for frame in range(3):
        own, index = conditions.frames(frame, frame + 1), jnp.full((2, 1), frame, jnp.int32)
        noise, context = (draw(keys(0, 1), use, index, zero, plan.latent) for use in (Purpose.INITIAL, Purpose.CONTEXT))
        velocity, _ = forward(noise, jnp.float32(1), jnp.float32(1000), jnp.int32(frame), own, cache)
        clean = noise - velocity
        bare = own.drop(drops, jnp.zeros((2,), bool))
        noised = jnp.float32(0.9) * clean + jnp.float32(0.1) * context
        _, cache = forward(noised, jnp.float32(0.1), jnp.float32(-1), jnp.int32(frame), bare, cache)
        chunks.append(clean)
    theirs = jnp.concatenate(chunks, axis=1)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.max(jnp.abs(theirs))))
    keeping = generate(replace(plan, commit=replace(commit, drops=())), model, conditions)
    assert float(jnp.max(jnp.abs(ours[:, 1:] - keeping[:, 1:]))) > 1e-3
