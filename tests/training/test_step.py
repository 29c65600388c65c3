"""One phase, on one device, against the same done by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.toy import Numbers, Regression, Toy, arrays, assert_close, assert_same, build, logical_axes
from vidar.checkpoint import load_item
from vidar.errors import ConfigError
from vidar.objectives.protocol import Phase
from vidar.training import OptimizerConfig, TrainingConfig, train

SGD = OptimizerConfig("sgd", learning_rate=0.05, beta1=0.0, clip=None)


def trained(tmp_path, toy, **changes):
    return train(toy.run(**changes), tmp_path)


def config(steps, **changes):
    return TrainingConfig(steps=steps, log_every=1, save_every=1000, tensorboard=False, **changes)


def test_one_sgd_step_is_the_gradient_of_the_loss(tmp_path):
    toy = Toy(objective=Regression(every=1), training=config(1), optimizer=SGD)
    state = trained(tmp_path / "run", toy)
    start = trained_start(toy)
    batch = next(Numbers())
    teacher = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), build(jax.random.key(77)))

    def loss(network, phase, role, networks):
        networks = networks | {role: network}
        return toy.objective.loss(phase, networks, {"seen": jnp.int32(0)}, None, batch, jnp.int32(0), None)[0]

    networks = {"generator": start["generator"], "critic": start["critic"], "teacher": teacher}
    for role in ("generator", "critic"):
        gradient = jax.grad(loss)(networks[role], role, role, networks)
        networks[role] = jax.tree.map(lambda leaf, slope: leaf - 0.05 * slope, networks[role], gradient)
        assert_close(state.networks[role], networks[role])
    assert int(state.step) == 1
    assert int(state.aux["seen"]) == 2


def trained_start(toy):
    """The networks of step 0, as the driver derives them from the seed and the role's name."""
    import zlib

    root = jax.random.key(toy.training.seed)
    return {role: build(jax.random.fold_in(root, zlib.crc32(role.encode()))) for role in ("generator", "critic")}


def test_microbatches_give_the_gradient_of_the_whole_batch(tmp_path):
    whole = Toy(objective=Regression(every=0), training=config(4), optimizer=SGD)
    split = replace(whole, training=config(4, accumulate=4))
    one, four = trained(tmp_path / "one", whole), trained(tmp_path / "four", split)
    assert_close(one.networks, four.networks)
    assert int(one.aux["seen"]) == 4
    assert int(four.aux["seen"]) == 16
    with pytest.raises(ConfigError, match="accumulate=3 does not divide the batch of 16"):
        trained(tmp_path / "three", replace(whole, training=config(4, accumulate=3)))


def test_every_microbatch_and_step_draws_its_own_noise(tmp_path):
    seen = []

    class Draws(Regression):
        def loss(self, phase, networks, aux, axes, batch, step, key):
            jax.debug.callback(lambda word: seen.append(int(word)), jax.random.key_data(key)[-1])
            return super().loss(phase, networks, aux, axes, batch, step, key)

    trained(tmp_path, Toy(objective=Draws(every=0), training=config(3, accumulate=2)))
    root = jax.random.key(0)
    keys = [jax.random.fold_in(jax.random.fold_in(root, step), part) for step in range(3) for part in range(2)]
    expected = {int(jax.random.key_data(key)[-1]) for key in keys}
    assert len(expected) == 6
    assert set(seen) == expected


def test_a_non_finite_step_changes_nothing_but_the_count(tmp_path):
    good = Toy(objective=Regression(every=1, ema_start=0), training=config(2))
    bad = replace(good, objective=replace(good.objective, poison=(2, 3)), training=config(4))
    two, four = trained(tmp_path / "two", good), trained(tmp_path / "four", bad)
    assert int(four.updates["generator"]) == int(four.ema_updates["generator"]) == 2
    for part in ("networks", "optimizer", "ema", "aux", "updates", "ema_updates"):
        assert_same(getattr(two, part), getattr(four, part))
    assert int(four.step) == 4
    assert int(four.skipped) == 4
    assert int(four.skipped_in_a_row) == 4
    five = trained(tmp_path / "five", replace(bad, training=config(5)))
    assert int(five.skipped_in_a_row) == 0
    assert int(five.updates["critic"]) == 3


def test_what_is_not_trainable_stays_with_its_optimizer_state(tmp_path):
    only_blocks = Regression(every=0, trainable=lambda path: "blocks" in path)
    toy = Toy(objective=only_blocks, training=config(3), optimizer=OptimizerConfig(weight_decay=0.1))
    state = trained(tmp_path, toy)
    start, end = arrays(trained_start(toy)["critic"]), arrays(state.networks["critic"])
    moments = arrays(state.optimizer["critic"])
    for path, leaf in end.items():
        moved = not np.allclose(leaf, start[path], rtol=1e-6, atol=1e-7)
        assert moved == ("blocks" in path), path
        moment = next(moments[name] for name in moments if ".mu[" in name and path in name)
        assert bool(np.any(moment)) == ("blocks" in path), path


def test_a_phase_leaves_the_moments_of_what_it_does_not_train(tmp_path):
    class Alternating(Regression):
        def phases(self, step):
            blocks = Phase("blocks", "critic", trainable=lambda path: "blocks" in path)
            return (Phase("all", "critic"),) if step == 0 else (blocks,)

    toy = Toy(objective=Alternating(), training=config(1))
    one = arrays(trained(tmp_path / "one", toy).optimizer["critic"])
    three = arrays(trained(tmp_path / "three", replace(toy, training=config(3))).optimizer["critic"])
    for path, leaf in one.items():
        same = np.array_equal(three[path], leaf)
        assert same == ("enter" in path or "leave" in path), path


def test_a_phase_may_reset_its_optimizer(tmp_path):
    class Reset(Regression):
        def phases(self, step):
            return (Phase("critic", "critic", reset_optimizer=step == 2),)

    kept = Toy(objective=Regression(every=0), training=config(3))
    state = trained(tmp_path, replace(kept, objective=Reset()))
    assert int(state.optimizer["critic"]["count"]) == 1
    assert int(state.updates["critic"]) == 3


def test_the_average_follows_its_formula(tmp_path):
    """A copy until just before step 2, then 0.9 of itself and 0.1 of the parameters."""
    toy = Toy(objective=Regression(every=1, ema_start=2), training=config(5, keep=10))
    toy = replace(toy, training=replace(toy.training, save_every=1))
    last = trained(tmp_path, toy)
    template = jax.eval_shape(build, jax.random.key(0))
    network, average = {}, {}
    for step in range(2, 6):
        saved = load_item(tmp_path / "checkpoints", "state", {"networks": {"generator": template}}, step)
        network[step] = saved["networks"]["generator"]
        average[step] = load_item(tmp_path / "checkpoints", "ema", {"generator": template}, step)["generator"]
    assert_same(average[2], network[2])
    for step in range(3, 6):
        mixed = jax.tree.map(lambda old, leaf: 0.9 * old + 0.1 * leaf, average[step - 1], network[step])
        assert_close(average[step], mixed, 1e-6)
    assert int(last.ema_updates["generator"]) == 3


def test_a_role_may_start_as_a_copy_or_from_given_weights(tmp_path):
    toy = Toy(objective=Regression(every=0, critic_source="teacher"), training=config(1), optimizer=SGD)
    still = replace(toy, optimizer=replace(SGD, learning_rate=0.0))
    assert_same(trained(tmp_path / "copy", still).networks["critic"], build(jax.random.key(77)))
    given = build(jax.random.key(5))
    state = trained(tmp_path / "given", still, initial={"critic": given})
    assert_same(state.networks["critic"], given)
    trained(tmp_path / "moved", toy, initial={"critic": given})
    assert_same(given, build(jax.random.key(5)))
    chained = replace(still, objective=replace(toy.objective, critic_source="generator"))
    state = trained(tmp_path / "chain", chained)
    assert_same(state.networks["critic"], state.networks["generator"])


def test_initial_weights_of_another_shape_are_refused(tmp_path):
    wide = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf], axis=-1), build(jax.random.key(5)))
    with pytest.raises(
        ConfigError, match=r"initial weights .blocks.bias.value have shape \(2, 32\), the configuration says \(2, 16\)"
    ):
        trained(tmp_path, Toy(training=config(1)), initial={"critic": wide})


def test_logical_axes_cover_the_toy():
    for path, leaf in arrays(build(jax.random.key(0))).items():
        assert len(logical_axes(path, leaf)) == leaf.ndim
