"""The DiT as a module and as a pytree; its parts: conditions and their drops, modulation, norms, taps, shardings."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.networks import CONFIG, LATENT, clip, network, pattern
from vidar.attention.visibility import Bidirectional, chunk_layout
from vidar.errors import ConfigError
from vidar.models.dit import DiT, DiTConfig, ImageConfig, TextConfig
from vidar.models.frames import Conditions, Frames
from vidar.models.layers import ContinuousActions, DiscreteActions, MultiBinaryActions, Precision, sinusoid
from vidar.models.placement import logical_axes
from vidar.models.quirks import Quirks
from vidar.sharding import MeshConfig, Rules, make_mesh, shardings

FULL = replace(CONFIG, text=TextConfig(width=10, length=6), classes=3)
FRAMES = 3


def stream(level=0.5, rows=2, layout=None):
    latents = jax.random.normal(jax.random.key(0), (rows, FRAMES, *LATENT))
    return Frames(latents, jnp.full((rows, FRAMES), level), layout or chunk_layout(FRAMES, 1))


def conditions(rows=2):
    text = jax.random.normal(jax.random.key(1), (rows, 6, 10))
    return Conditions(text, clip(rows, FRAMES)[1].actions, jnp.arange(rows, dtype=jnp.int32))


@jax.jit
def predict(model, frames, given):
    return model((frames,), given, visibility=pattern()).predictions[0]


def fresh(config):
    """A network as training starts from it."""
    return jax.jit(lambda: DiT(config, rngs=nnx.Rngs(0)))()


def largest(x):
    return float(jnp.max(jnp.abs(x)))


# -------------------------------------------------------------------------------------------------------- as a module


def test_modules_are_plain_pytrees_of_float_parameters():
    model = fresh(FULL)
    variables = jax.tree.leaves(nnx.state(model), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    assert {type(variable) for variable in variables} == {nnx.Param}
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {np.dtype(np.float32)}
    assert len(variables) == len(jax.tree.leaves(model))
    half = fresh(replace(FULL, precision=Precision(params="bfloat16")))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_split_merge_state_and_nnx_jit_give_the_same_predictions():
    model, frames, given = network(FULL), stream(), conditions()
    expected = predict(model, frames, given)
    graph, state = nnx.split(model)
    merged = nnx.merge(graph, state)
    np.testing.assert_array_equal(predict(merged, frames, given), expected)
    through = nnx.jit(lambda model, frames, given: model((frames,), given, visibility=pattern()))(model, frames, given)
    np.testing.assert_allclose(through.predictions[0], expected, atol=1e-5 * largest(expected))
    doubled = nnx.merge(graph, jax.tree.map(lambda leaf: 2 * leaf, state))
    assert largest(predict(doubled, frames, given) - expected) > 0.1
    gradient = jax.jit(jax.grad(lambda model: jnp.sum(model((frames,), given, visibility=pattern()).predictions[0])))
    assert jax.tree.structure(gradient(model)) == jax.tree.structure(model)


def test_a_fresh_network_predicts_zero_whatever_the_modulation():
    for modulation in ("table", "adaln_zero"):
        model = fresh(replace(FULL, modulation=modulation))
        np.testing.assert_array_equal(predict(model, stream(), conditions()), 0)


# ---------------------------------------------------------------------------------------------------------- conditions


def test_dropped_text_is_text_of_zeros():
    model, given = network(FULL), conditions()
    kept = jnp.asarray([True, False])
    dropped = predict(model, stream(), given.drop(("text",), kept))
    zeros = predict(model, stream(), replace(given, text=jnp.where(kept[:, None, None], given.text, 0.0)))
    np.testing.assert_allclose(dropped, zeros, atol=1e-6)
    whole = predict(model, stream(), given)
    np.testing.assert_allclose(dropped[0], whole[0], atol=1e-6)
    assert largest(dropped[1] - whole[1]) > 1e-2


def test_projected_text_equals_raw_text():
    model, given = network(FULL), conditions()
    projected = jax.jit(lambda model, text: model.encode_conditioning(text))(model, given.text)
    assert projected.keys.shape == (FULL.layers, 2, 6, FULL.heads, FULL.head_dim)
    np.testing.assert_allclose(
        predict(model, stream(), replace(given, text=projected)), predict(model, stream(), given), atol=1e-5
    )


def test_dropped_labels_and_actions_have_vectors_of_their_own():
    model, given = network(FULL), conditions()
    whole = predict(model, stream(), given)
    for name in ("label", "actions"):
        bare = predict(model, stream(), given.drop((name,), jnp.zeros((2,), bool)))
        assert largest(bare - whole) > 1e-2
        other = replace(given, **{name: getattr(given, name) * 0 + 2})
        np.testing.assert_array_equal(predict(model, stream(), other.drop((name,), jnp.zeros((2,), bool))), bare)


KINDS = {
    "discrete": (DiscreteActions(3), np.array([[0, 1, 2]], np.int32)),
    "multi_binary": (MultiBinaryActions(4), np.eye(4, dtype=bool)[None, :3]),
    "continuous": (ContinuousActions(2), np.array([[[0.5, -1.0], [0.0, 0.25], [1.0, 1.0]]], np.float32)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_actions_act_from_their_own_frame_on(kind):
    """An action changes its frame and, through attention, later ones; never an earlier one."""
    config, actions = KINDS[kind]
    model = network(replace(CONFIG, actions=config))
    frames = stream(rows=1)
    before = predict(model, frames, Conditions(actions=jnp.asarray(actions)))
    changed = actions.copy()
    changed[:, 1] = actions[:, 2]
    after = predict(model, frames, Conditions(actions=jnp.asarray(changed)))
    difference = np.asarray(jnp.max(jnp.abs(after - before), axis=(0, 2, 3, 4)))
    assert difference[0] == 0
    assert difference[1] > 1e-2
    wrong = jnp.asarray(actions)[..., None]
    with pytest.raises(ConfigError, match=f"{kind} actions must have shape"):
        jax.eval_shape(lambda: predict(model, frames, Conditions(actions=wrong)))


@pytest.mark.parametrize("name", ["text", "actions", "label"])
def test_missing_conditions_are_named(name):
    with pytest.raises(ConfigError, match=r"is set, but no \w+ (was|were) given"):
        jax.eval_shape(lambda: predict(network(FULL), stream(), replace(conditions(), **{name: None})))


def test_text_for_a_network_without_and_text_of_the_wrong_width_are_refused():
    with pytest.raises(ConfigError, match="model.text is None"):
        network().encode_conditioning(jnp.zeros((1, 2, 10)))
    with pytest.raises(ConfigError, match="have 4 channels, model.text.width=10"):
        network(FULL).encode_conditioning(jnp.zeros((1, 2, 4)))


# --------------------------------------------------------------------------------------------------------------- parts


def test_time_is_a_thousand_levels_unless_told_otherwise():
    model, frames, given = network(), stream(0.3), clip(frames=FRAMES)[1]
    expected = predict(model, frames, given)
    told = replace(frames, level=jnp.zeros((2, FRAMES)), time=jnp.full((2, FRAMES), 300.0))
    np.testing.assert_allclose(predict(model, told, given), expected, atol=1e-5)
    tagged = replace(frames, time=jnp.full((2, FRAMES), -1.0))
    assert largest(predict(model, tagged, given) - expected) > 1e-2
    angle = 300.0 * 10_000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(
        sinusoid(jnp.float32(300.0), 8), np.concatenate([np.cos(angle), np.sin(angle)]), atol=2e-5
    )


def test_quirks_cut_times_and_narrow_the_modulation_where_they_are_asked_for():
    given = clip(frames=FRAMES)[1]

    def run(compute="float32", time=None, **quirks):
        config = replace(CONFIG, precision=Precision(compute=compute), quirks=Quirks(**quirks))
        frames = stream() if time is None else replace(stream(), time=jnp.full((2, FRAMES), time))
        return np.asarray(predict(network(config), frames, given))

    np.testing.assert_array_equal(run(time=437.9, whole_times=True), run(time=437.0))
    assert largest(run(time=437.9) - run(time=437.0)) > 1e-4
    # Where products are in fp32, there is nothing to narrow.
    np.testing.assert_array_equal(run(narrow_modulation=True), run())
    exact, usual, narrow = run(), run("bfloat16"), run("bfloat16", narrow_modulation=True)
    scale = largest(exact)
    assert largest(usual - exact) < largest(narrow - exact) < 0.2 * scale
    assert largest(narrow - usual) > 1e-3 * scale


def test_parts_can_be_chosen():
    outputs = []
    for changes in (dict(), dict(modulation="adaln_zero"), dict(qk_norm="head"), dict(qk_norm="none"), dict(patch=1)):
        model = network(replace(CONFIG, **changes))
        output = predict(model, stream(), clip(frames=FRAMES)[1])
        assert output.shape == (2, FRAMES, *LATENT)
        outputs.append(output)
    for index, output in enumerate(outputs):
        assert all(largest(output - other) > 1e-2 for other in outputs[:index])


def test_recomputing_blocks_changes_neither_predictions_nor_gradients():
    given = clip(frames=FRAMES)[1]

    def run(remat):
        model = network(replace(CONFIG, remat=remat))

        def loss(leaves):
            own = jax.tree.unflatten(jax.tree.structure(model), leaves)
            return jnp.sum(jnp.square(own((stream(),), given, visibility=pattern()).predictions[0]))

        return jax.jit(jax.value_and_grad(loss))(jax.tree.leaves(model))

    (value, gradient), (again, recomputed) = run(False), run(True)
    assert float(value) == pytest.approx(float(again), rel=1e-6)
    for ours, theirs in zip(gradient, recomputed, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(largest(ours), 1e-6))


def test_taps_are_features_after_their_blocks():
    model, given = network(), clip(frames=FRAMES)[1]
    output = jax.jit(lambda model: model((stream(),), given, visibility=Bidirectional(), taps=(0, CONFIG.layers - 1)))(
        model
    )
    first, last = output.taps
    assert first.shape == last.shape == (2, FRAMES, 4, CONFIG.width)
    single = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf[:1] if ".blocks" in jax.tree_util.keystr(path) else leaf, model
    )
    again = jax.jit(lambda model: model((stream(),), given, visibility=Bidirectional(), taps=(0,)))(single)
    np.testing.assert_allclose(again.taps[0], first, atol=1e-5 * largest(first))
    assert largest(last - first) > 1e-2


def test_bf16_compute_stays_near_fp32():
    given = clip(frames=FRAMES)[1]
    exact = predict(network(), stream(), given)
    rough = predict(network(replace(CONFIG, precision=Precision())), stream(), given)
    assert rough.dtype == jnp.float32
    assert 1e-5 < largest(rough - exact) / largest(exact) < 0.1


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="patches of 2×2"):
        CONFIG.tokens(5, 4)
    with pytest.raises(ConfigError, match="multiple of model.heads"):
        DiTConfig(width=50, heads=4)
    with pytest.raises(ConfigError, match="three rotary axes"):
        DiTConfig(width=16, heads=4)


# ----------------------------------------------------------------------------------------------------------- sharding

EVERY_PART = [
    FULL,
    replace(FULL, modulation="adaln_zero", actions=MultiBinaryActions(25)),
    replace(FULL, actions=ContinuousActions(8), text=None),
    replace(FULL, image=ImageConfig(width=12)),
]


@pytest.mark.parametrize("config", EVERY_PART, ids=["table", "adaln", "continuous", "image"])
def test_every_parameter_has_axes_and_every_matrix_is_sharded(config):
    """Tables of modulation and classes are small and read by row: they alone stay whole."""
    template = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    rules = Rules()
    for path, leaf in jax.tree_util.tree_leaves_with_path(template):
        name = jax.tree_util.keystr(path)
        axes = logical_axes(name, leaf)
        assert len(axes) == leaf.ndim, name
        assert axes[0] == "layers" or ".blocks" not in name
        rules.spec(axes)
        if "kernel" in name:
            assert set(axes) & {"embed", "heads", "mlp"}, name
    placed = shardings(template, logical_axes, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert len(jax.tree.leaves(placed)) == len(jax.tree.leaves(template))


def test_query_key_value_split_over_heads_and_output_joins_them():
    def axes(name, rank=3):
        return logical_axes(name, jax.ShapeDtypeStruct((1,) * rank, jnp.float32))

    for part in ("query", "key", "value"):
        assert axes(f".blocks.attention.{part}.kernel.value") == ("layers", "embed", "heads")
        assert axes(f".blocks.text_attention.{part}.bias.value", 2) == ("layers", "heads")
    assert axes(".blocks.attention.output.kernel.value") == ("layers", "heads", "embed")
    assert axes(".blocks.mlp.up.kernel.value") == ("layers", "embed", "mlp")
    assert axes(".blocks.mlp.down.kernel.value") == ("layers", "mlp", "embed")
    assert axes(".blocks.mlp.down.bias.value", 2) == ("layers", None)
    assert axes(".patch.kernel.value", 2) == (None, "embed")
    assert axes(".head.kernel.value", 2) == ("embed", None)
