"""Teacher trajectories: the grid, the states against the sampler and against numpy, and what lies on disk."""

import dataclasses
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import CONFIG, LATENT, network, pattern, sampler
from vidar.attention.visibility import Bidirectional
from vidar.data.pipeline import DataConfig, make_dataset, open_source
from vidar.data.records import ActionSpec
from vidar.data.trajectories import Trajectories, TrajectoryFormat, TrajectoryWriter
from vidar.diffusion.plan import Commit
from vidar.errors import ConfigError, DataError
from vidar.models.frames import Conditions
from vidar.preparation.trajectories import (
    Teacher,
    clip_order,
    fingerprint,
    integrate,
    kept_steps,
    prepare,
    teacher_sampler,
)
from vidar.sampling.guidance import Branch
from vidar.sampling.noise import session_keys
from vidar.sampling.solvers import Euler, FewStep, level_table

TIMES = (1000.0, 750.0, 500.0, 250.0)
GUIDED = (Branch(2.0), Branch(-1.0, ("actions",)))


# --------------------------------------------------------------------------------------------------------------- grid


@pytest.mark.parametrize(("times", "shift", "steps"), [(TIMES, 5.0, 48), (TIMES, 8.0, 48), ((1000, 280, 120), 8.0, 50)])
def test_kept_states_are_the_students_levels_bit_for_bit(times, shift, steps):
    kept, student = kept_steps(times, shift, steps), FewStep(tuple(map(float, times)), shift)
    np.testing.assert_array_equal(level_table(Euler(steps, shift))[list(kept)], level_table(student))
    assert kept[0] == 0
    assert kept[-1] == steps


def test_a_self_forcing_teacher_passes_the_published_times():
    assert kept_steps(TIMES, 5.0, 48) == (0, 12, 24, 36, 48)
    published = [1000, 937.5, 833.3333, 625, 0]
    np.testing.assert_allclose(1000 * level_table(Euler(48, 5.0))[[0, 12, 24, 36, 48]], published, rtol=1e-6)


def test_levels_off_the_grid_are_refused_with_what_would_hit_them():
    with pytest.raises(ConfigError, match="50 steps at shift 5 do not pass time 750 .*: 44 or 48 or 52 would hit them"):
        kept_steps(TIMES, 5.0, 50)
    with pytest.raises(ConfigError, match="time 333.3 .* exactly: no count up to 1000 hits them"):
        kept_steps((1000, 333.3), 5.0, 48)


# ------------------------------------------------------------------------------------------------------------- states


def actions(rows: int, frames: int, seed: int = 5):
    rng = np.random.default_rng(seed)
    return Conditions(actions=jnp.asarray(rng.integers(0, 5, (rows, frames)), jnp.int32))


CASES = {
    "whole clips": (dict(frames=4, lag=0, visibility=Bidirectional(), guidance=GUIDED), 0),
    "chunk by chunk": (dict(frames=4, chunk=2, guidance=GUIDED), 0),
    "first frame, window": (dict(frames=5, chunk=2, first=True, window=5, sink=1), 0),
    "given first frame, window": (dict(frames=5, chunk=2, first=True, window=5, sink=1), 1),
    "noised context": (dict(frames=3, lag=2), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_trajectories_end_where_the_sampler_ends(name):
    fields, given = CASES[name]
    plan = sampler(**fields)
    if name == "noised context":
        plan = dataclasses.replace(plan, commit=Commit("fused", level=0.1, noise=True))
    teacher = teacher_sampler(plan, 6, 3.0)
    key_b, conditions, model = session_keys(3, 2), actions(2, plan.frames), network()
    latents = jax.random.normal(jax.random.key(8), (2, given, *LATENT)) if given else None
    states = jax.jit(partial(integrate, teacher, (0, 2, 6)))(model, key_b, conditions, latents)
    assert states.shape == (2, 3, plan.frames, *LATENT)
    generate = jax.jit(lambda model, given: teacher.generate(model, key_b, conditions, plan.frames, given))
    np.testing.assert_allclose(states[:, -1], generate(model, latents), atol=2e-5)


def test_chunk_by_chunk_equals_one_pass_after_the_teachers_own_clean_past():
    """Every kept state of each chunk, against clips in which the chunks before it are given clean."""
    plan, model, key_b, conditions = sampler(frames=6, chunk=2), network(), session_keys(3, 2), actions(2, 6)
    teacher, kept = teacher_sampler(plan, 6, 3.0), (0, 2, 3, 6)
    found = jax.jit(partial(integrate, teacher, kept))(model, key_b, conditions)
    assert np.std(found[:, 0]) == pytest.approx(1, abs=0.1)
    whole = dataclasses.replace(teacher, lag=0, visibility=pattern())
    one_pass = jax.jit(partial(integrate, whole, kept))
    for start in (0, 2, 4):
        alone = one_pass(model, key_b, conditions, found[:, -1, :start] if start else None)
        np.testing.assert_allclose(found[:, :, start : start + 2], alone[:, :, start : start + 2], atol=2e-5)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A network that numpy can repeat: its velocity depends on the frame, the level and the mean of the clip."""

    config = dataclasses.replace(CONFIG, prediction="v")

    def __call__(self, streams, conditions, *, visibility, cache=None):
        (stream,) = streams
        x, level = stream.latents, stream.level[:, :, None, None, None]
        action = conditions.actions[:, :, None, None, None].astype(jnp.float32)
        whole = jnp.mean(x, axis=1, keepdims=True)
        kept = 1.0 if conditions.actions_kept is None else conditions.actions_kept.astype(jnp.float32)
        kept = jnp.broadcast_to(jnp.asarray(kept), (x.shape[0],))[:, None, None, None, None]
        out = 0.5 * x + (0.3 * whole + level * level) + 0.2 * action * kept
        return type("Output", (), {"predictions": (out,)})


jax.tree_util.register_static(Linear)


@pytest.mark.parametrize("given", [0, 2])
def test_guided_states_of_whole_clips_equal_numpy(given):
    plan = teacher_sampler(sampler(frames=4, lag=0, visibility=Bidirectional(), guidance=GUIDED), 6, 3.0)
    conditions, key_b = actions(2, 4), session_keys(3, 2)
    latents = jax.random.normal(jax.random.key(8), (2, given, *LATENT)) if given else None
    states = np.asarray(integrate(plan, (0, 2, 3, 6), Linear(), key_b, conditions, latents))
    table = level_table(plan.solver).astype(np.float64)
    x, action = states[:, 0].astype(np.float64), np.asarray(conditions.actions)[:, :, None, None, None]
    if given:
        np.testing.assert_array_equal(states[:, :, :given], np.repeat(np.asarray(latents)[:, None], 4, axis=1))
    assert np.std(x[:, given:]) == pytest.approx(1, abs=0.1)
    found = [x]
    for step in range(6):
        level = np.where(np.arange(4) < given, 0, table[step])[None, :, None, None, None]
        velocity = 0.5 * x + 0.3 * x.mean(axis=1, keepdims=True) + level**2 + 2.0 * 0.2 * action
        x = np.where(level > 0, x + (table[step + 1] - table[step]) * velocity, x)
        found.append(x)
    np.testing.assert_allclose(states, np.stack(found, axis=1)[:, [0, 2, 3, 6]], atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- teacher


def whole_teacher(rows: int = 3, seed: int = 0):
    plan = teacher_sampler(sampler(frames=4, lag=0, visibility=Bidirectional()), 6, 3.0)
    return Teacher(network(), plan, (0, 3, 6), rows, seed)


def test_a_clips_trajectory_depends_on_its_number_and_not_on_its_slot():
    teacher = whole_teacher()
    conditions = Conditions(actions=np.zeros((3, 4), np.int32))
    one = teacher([7, 8, 9], conditions)
    np.testing.assert_allclose(one[1], teacher([1, 2, 8], conditions)[2], atol=1e-5)
    assert np.abs(one[0] - one[1]).max() > 0.5
    np.testing.assert_array_equal(one[:2], teacher([7, 8], Conditions(actions=np.zeros((2, 4), np.int32))))
    assert np.abs(one - whole_teacher(seed=1)([7, 8, 9], conditions)).max() > 0.5


def test_the_fingerprint_follows_every_parameter():
    model = network()
    again = jax.tree.map(jnp.array, model)
    assert fingerprint(model) == fingerprint(again)
    leaves, tree = jax.tree.flatten(model)
    for place in (0, len(leaves) - 1):
        changed = [leaf.at[(-1,) * leaf.ndim].add(1e-3) if i == place else leaf for i, leaf in enumerate(leaves)]
        assert fingerprint(jax.tree.unflatten(tree, changed)) != fingerprint(model)


def test_clips_are_taken_once_before_they_are_taken_twice():
    order = clip_order(5, 13, seed=3)
    for start in (0, 5):
        assert sorted(order[start : start + 5]) == list(range(5))
    assert list(order[:5]) != list(order[5:10])
    np.testing.assert_array_equal(clip_order(5, 7, seed=3), order[:7])


# ----------------------------------------------------------------------------------------------------------------- disk

FORM = TrajectoryFormat(
    levels=tuple(level_table(FewStep(TIMES, 5.0)).tolist()),
    latent=(2, 2, 2, 3),
    clips=10,
    rows=4,
    actions=ActionSpec("discrete", ("none", "go")),
    source={"teacher": "abc", "sampler": {"steps": 48}},
)


def states(number):
    return np.random.default_rng(number).normal(size=(5, 2, 2, 2, 3)).astype(np.float32)


def made(numbers):
    return {
        "latents": np.stack([states(number) for number in numbers]),
        "actions": [np.asarray([0, number % 2], np.int32) for number in numbers],
        "label": [number % 3 for number in numbers],
        "caption": [f"clip № {number}" for number in numbers],
        "clip": [number + 100 for number in numbers],
    }


@pytest.fixture
def filled(tmp_path):
    prepare(TrajectoryWriter(tmp_path / "full", FORM), made)
    return tmp_path / "full"


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_what_was_written_is_read_again(filled):
    stored = Trajectories(filled)
    assert stored.form == FORM
    np.testing.assert_array_equal(stored.levels, level_table(FewStep(TIMES, 5.0)))
    assert stored.levels.dtype == np.float32
    for number in range(10):
        clip = stored.read(number)
        np.testing.assert_array_equal(clip["trajectory"], states(number).astype(np.float16))
        np.testing.assert_array_equal(clip["actions"], [0, number % 2])
        assert (clip["label"], clip["caption"]) == (number % 3, f"clip № {number}".encode())


def test_a_stopped_preparation_goes_on_to_the_same_bits(filled, tmp_path):
    calls = []

    def stopping(numbers):
        calls.append(list(numbers))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made(numbers)

    directory = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        prepare(TrajectoryWriter(directory, FORM), stopping)
    with pytest.raises(DataError, match=r"unfinished, 2 of 3 shards are missing \(clips-000001.safetensors"):
        Trajectories(directory)
    prepare(TrajectoryWriter(directory, FORM), stopping)
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [8, 9]]
    assert contents(directory) == contents(filled)


def test_several_processes_make_the_same_directory(filled, tmp_path):
    directory = tmp_path / "shared"
    for part in (1, 0):
        prepare(TrajectoryWriter(directory, FORM), made, part, 2)
    assert contents(directory) == contents(filled)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": {"teacher": "abc", "sampler": {"steps": 50}}}, "source.sampler.steps=48 instead of 50"),
        ({"clips": 11}, "clips=10 instead of 11"),
        ({"levels": (1.0, 0.9, 0.8, 0.7, 0.0)}, "levels="),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(filled, change, words):
    before = contents(filled)
    with pytest.raises(DataError, match=f"holds trajectories made with .*{words}.*choose another directory"):
        TrajectoryWriter(filled, dataclasses.replace(FORM, **change))
    assert contents(filled) == before


def test_shards_of_other_settings_are_never_read(filled, tmp_path):
    other = tmp_path / "other"
    prepare(TrajectoryWriter(other, dataclasses.replace(FORM, source={"teacher": "xyz"})), made)
    os.replace(other / "clips-000001.safetensors", filled / "clips-000001.safetensors")
    assert Trajectories(filled).read(0)["label"] == 0
    with pytest.raises(DataError, match="clips-000001.safetensors: made with other settings"):
        Trajectories(filled).read(5)


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damage_is_found(filled, damage):
    path = filled / "clips-000000.safetensors"
    data = bytearray(path.read_bytes())
    # The last bytes are the latents of the shard's last clip, or what follows them.
    at = data.index(np.ascontiguousarray(states(1).astype(np.float16)).tobytes()[:16])
    data[at] ^= 1
    path.write_bytes(data[: at + 8] if damage == "truncated" else data)
    with pytest.raises(DataError, match="clips-000000.safetensors: damaged .*run the command that made it again"):
        Trajectories(filled).read(1)


def test_states_beyond_the_stored_type_are_refused(tmp_path):
    def large(numbers):
        entry = made(numbers)
        entry["latents"][1, 2, 0, 0, 0, 0] = 1e6
        return entry

    with pytest.raises(DataError, match="clip 1 is not finite in float16"):
        prepare(TrajectoryWriter(tmp_path / "half", FORM), large)
    whole = dataclasses.replace(FORM, precision="float32")
    prepare(TrajectoryWriter(tmp_path / "whole", whole), large)
    assert Trajectories(tmp_path / "whole").read(1)["trajectory"][2, 0, 0, 0, 0] == 1e6


def test_a_full_disk_leaves_whole_shards(small_disk):
    if small_disk is None:
        pytest.skip("needs a mount")
    form = dataclasses.replace(FORM, latent=(2, 100, 100, 3))

    def large(numbers):
        return {"latents": np.ones((len(numbers), 5, 2, 100, 100, 3))}

    with pytest.raises(DataError, match="cannot be written .No space left"):
        prepare(TrajectoryWriter(small_disk / "x", form), large)
    assert sorted(path.name for path in (small_disk / "x").iterdir()) == ["manifest.json"]


# -------------------------------------------------------------------------------------------------------------- batches


def test_batches_of_trajectories(filled):
    config = DataConfig(trajectories=str(filled), batch=5, seed=2, frames=2)
    batches = iter(make_dataset(config))
    first, second = next(batches), next(batches)
    assert first["trajectory"].shape == (5, 5, 2, 2, 2, 3)
    assert first["trajectory"].dtype == np.float32
    np.testing.assert_array_equal(first["latents"], first["trajectory"][:, -1])
    np.testing.assert_array_equal(second["index"], np.arange(5, 10))
    seen = [int(caption.decode().split()[-1]) for batch in (first, second) for caption in batch["caption"]]
    assert sorted(seen) == list(range(10))
    assert seen != list(range(10))
    for number, row, label in zip(seen[:5], first["trajectory"], first["label"], strict=True):
        np.testing.assert_array_equal(row, states(number).astype(np.float16).astype(np.float32))
        assert label == number % 3
    state = batches.get_state()
    third = next(batches)
    again = iter(make_dataset(config))
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["trajectory"], third["trajectory"])


def test_trajectories_come_before_the_data_set_beside_them(filled):
    source = open_source(DataConfig(trajectories=str(filled), records="elsewhere"))
    assert (source.actions, source.frames, source.size, len(source)) == (FORM.actions, 2, (2, 2), 10)
    with pytest.raises(DataError, match="nowhere: no trajectories here"):
        open_source(DataConfig(trajectories="nowhere"))
