"""What roles take of the machine: adapters, heads, types, placement, averages in host memory; through the driver."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import network
from vidar.attention.visibility import Bidirectional, ChunkCausal, chunk_layout
from vidar.errors import ConfigError
from vidar.models.frames import Conditions, Frames
from vidar.objectives.forcing import DiffusionForcing
from vidar.objectives.protocol import Phase, Role
from vidar.system import load, system_config
from vidar.training.experiment import RunConfig, make_run, portable_dict
from vidar.training.loop import train
from vidar.training.state import by_path
from vidar.weights import save_weights

MODEL = {
    "width": 16, "layers": 2, "heads": 1, "mlp": 16, "channels": 48, "actions": {"kind": "discrete", "count": 5},
    "precision": {"compute": "float32"},
}  # fmt: skip
TEACHER = {
    "objective": {"kind": "diffusion", "ema": None},
    "visibility": {"kind": "bidirectional"},
    "video": {"frames": 4, "chunk": 2},
    "codec": {"kind": "pixel", "patch": 4},
    "model": MODEL,
    "plan": {"lag": 0},
    "data": {"frames": 4, "batch": 4},
    "training": {"steps": 1, "log_every": 1, "tensorboard": False},
    "optimizers": {"student": {"learning_rate": 0.01}},
}


def built(**changes):
    return system_config(TEACHER | changes, RunConfig)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A teacher, and a causal student of half its width."""
    root = tmp_path_factory.mktemp("sources")
    small = MODEL | {"width": 8}
    train(make_run(built()), root / "teacher")
    train(make_run(built(visibility={"kind": "chunk_causal"}, plan={}, model=small)), root / "student")
    return root


def distilled(sources, objective=(), **changes):
    """A distillation of the teacher into the smaller student."""
    sources = {"student": str(sources / "student"), "teacher": str(sources / "teacher")}
    fields = {
        "objective": {"kind": "distillation", "generator_every": 1, "ema_start": 0} | sources | dict(objective),
        "visibility": {"kind": "chunk_causal"},
        "plan": {},
        "solver": {"kind": "few_step", "times": (1000.0, 500.0)},
        "model": MODEL | {"width": 8},
        "teacher": MODEL,
        "optimizers": {role: {"learning_rate": 0.01} for role in ("student", "critic")},
        "training": {"steps": 2, "log_every": 1, "tensorboard": False},
    }
    return built(**(fields | changes))


@pytest.fixture(scope="module")
def plain(sources, tmp_path_factory):
    """A distillation in which no role has a choice of its own: its directory, and its last state."""
    workdir = tmp_path_factory.mktemp("plain")
    return workdir, train(make_run(distilled(sources)), workdir)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def predict(model):
    stream = Frames(jnp.ones((1, 4, 4, 4, 48)), jnp.full((1, 4), 0.5), chunk_layout(4, 2))
    return model((stream,), Conditions(actions=jnp.ones((1, 4), jnp.int32)), visibility=Bidirectional()).predictions[0]


def test_a_student_smaller_than_its_teacher(plain):
    workdir, state = plain
    assert state.networks["student"].config.width == 8
    assert state.networks["critic"].config.width == 16
    row = rows(workdir)[-1]
    assert {"student/contrast", "student/colour_shift", "student/dmd_gradient", "critic/loss"} <= set(row)
    assert any(name.startswith("student/disagreement_level/") for name in row)
    assert row["health/critic_to_student"] == pytest.approx(row["critic/loss"] / row["student/loss"])


def test_a_causal_network_is_no_teacher_of_whole_clips(sources):
    student = str(sources / "student")
    with pytest.raises(ConfigError, match=r"objective.teacher: .*/student' was trained with visibility 'chunk_causal'"):
        make_run(distilled(sources, {"teacher": student}, teacher=MODEL | {"width": 8}))


def test_a_teacher_that_never_saw_clean_frames_cannot_judge_given_ones(sources, tmp_path):
    forcing = {"forcing": {"kind": "self", "given": 1}}
    assert make_run(distilled(sources, forcing))
    train(make_run(built(levels={"base": {"kind": "shared"}})), tmp_path / "shared")
    with pytest.raises(ConfigError, match="shared' has never seen clean frames beside noisy ones"):
        make_run(distilled(sources, {**forcing, "teacher": str(tmp_path / "shared")}))


def test_a_critic_of_its_own_shape_needs_weights_of_its_own(sources):
    critic = MODEL | {"width": 8}
    config = distilled(sources, {"critic": str(sources / "student")}, critic=critic)
    assert make_run(config).initial["critic"].config.width == 8
    with pytest.raises(ConfigError, match=r"objective.critic: .* is a network with width="):
        make_run(distilled(sources, critic=critic))


def test_adapters_are_trained_beside_frozen_networks_and_loaded_merged(sources, tmp_path):
    """The frozen ones have a storage type and a place of their own."""
    lora = {"rank": 2, "targets": ("query", "value")}
    roles = {"student": {"lora": lora}, "critic": {"lora": lora, "dtype": "bfloat16"}}
    config = distilled(sources, roles=roles | {"teacher": {"dtype": "bfloat16", "rules": {"embed": None}}})
    run = make_run(config)
    assert run.frozen["student"].config.width == 8
    state = train(run, tmp_path)
    assert int(state.skipped) == 0
    trained = state.networks["student"]
    assert {leaf.shape[-1] if "lora_in" in path else leaf.shape[-2] for path, leaf in trained.items()} == {2}
    assert max(float(jnp.abs(leaf).max()) for path, leaf in trained.items() if "lora_out" in path) > 0
    _, before = load(sources / "student")
    _, after = load(tmp_path)
    kernels = {path for path, leaf in by_path(after).items() if np.any(leaf != by_path(before)[path])}
    assert kernels == {f".blocks.attention.{name}.kernel.value" for name in ("query", "value")}
    expected = by_path(before)[".blocks.attention.query.kernel.value"] + (
        state.ema["student"][".blocks.attention.query.lora_in.value"]
        @ state.ema["student"][".blocks.attention.query.lora_out.value"]
    )
    np.testing.assert_allclose(by_path(after)[".blocks.attention.query.kernel.value"], expected, atol=1e-6)
    # It goes on where it stopped, and from other weights not at all.
    longer = replace(config, training=replace(config.training, steps=3))
    assert int(train(make_run(longer), tmp_path).step) == 3


def test_discriminator_heads_are_warmed_up_alone(sources, tmp_path):
    matching = {"kind": "gan", "warmup": 2, "heads": {"taps": (0, 1), "mlp": 1}, "penalty_real": 0.1}
    training = {"steps": 4, "log_every": 1, "tensorboard": False}
    run = make_run(distilled(sources, {"matching": matching}, training=training))
    first, moved = by_path(run.initial["critic"]), []

    def evaluate(step, networks, writer):
        critic = by_path(networks["critic"])
        moved.append({path for path, leaf in critic.items() if np.any(np.asarray(leaf) != np.asarray(first[path]))})
        return {}

    state = train(replace(run, training=replace(run.training, eval_every=2), evaluate=evaluate), tmp_path)
    assert {name: int(count) for name, count in state.updates.items()} == {"heads": 2, "student": 2, "critic": 2}
    warmed, trained = moved
    assert warmed
    assert not any(path.startswith(".network.") for path in warmed)
    assert any(path.startswith(".network.") for path in trained)


def test_a_run_that_ended_in_its_warm_up_goes_on_with_the_phases_after_it(sources, tmp_path):
    def run(steps):
        matching = {"kind": "gan", "warmup": 2, "heads": {"taps": (0, 1), "mlp": 1}}
        training = {"steps": steps, "log_every": 1, "tensorboard": False}
        return make_run(distilled(sources, {"matching": matching}, training=training))

    whole = train(run(3), tmp_path / "whole")
    assert {name: int(count) for name, count in train(run(2), tmp_path / "parts").updates.items()} == {"heads": 2}
    again = train(run(3), tmp_path / "parts")
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    for path, leaf in by_path(whole).items():
        np.testing.assert_array_equal(by_path(again)[path], leaf, err_msg=path)
    assert rows(tmp_path / "parts")[-1].keys() == rows(tmp_path / "whole")[-1].keys()


def test_a_run_does_not_go_on_with_another_optimizer(sources, plain):
    other = {"student": {"name": "sgd", "learning_rate": 0.01}, "critic": {"learning_rate": 0.01}}
    with pytest.raises(ConfigError, match=r"a run with optimizers\.student\.name=adamw, now sgd"):
        train(make_run(distilled(sources, optimizers=other)), plain[0])


def test_an_average_may_wait_in_host_memory(plain, sources, tmp_path):
    state = train(make_run(distilled(sources, roles={"student": {"ema_memory": "host"}})), tmp_path)
    (_, kept), waiting = plain, by_path(state.ema["student"])
    assert {leaf.sharding.memory_kind for leaf in waiting.values()} == {"pinned_host"}
    for path, leaf in by_path(kept.ema["student"]).items():
        assert leaf.sharding.memory_kind != "pinned_host"
        np.testing.assert_array_equal(waiting[path], leaf, err_msg=path)


def test_a_storage_type_is_one_of_those_known(sources):
    with pytest.raises(ConfigError, match=r"roles.teacher: dtype='int8' must be one of float32"):
        distilled(sources, roles={"teacher": {"dtype": "int8"}})


@pytest.mark.parametrize(
    "forcing, matching, visibility",
    [("diffusion", "dmd", "chunk_causal"), ("teacher", "dmd", "teacher_forcing"), ("self", "sid", "chunk_causal"),
     ("diffusion", "gan", "chunk_causal")],
)  # fmt: skip
def test_combinations_train(sources, tmp_path, forcing, matching, visibility):
    objective = {"forcing": {"kind": forcing}, "matching": {"kind": matching}}
    config = distilled(sources, objective, visibility={"kind": visibility})
    before = by_path(make_run(config).initial["student"])
    state = train(make_run(config), tmp_path)
    assert int(state.skipped) == 0
    moved = [path for path, leaf in by_path(state.networks["student"]).items() if np.any(leaf != before[path])]
    assert len(moved) > 10


@dataclass(frozen=True)
class Quadratic:
    """An objective that vidar does not know, with two networks: each learns the other's mean of clean frames."""

    kind: ClassVar[str] = "quadratic"
    weight: float = 1.0

    @property
    def roles(self):
        return {name: Role(optimizer=name) for name in ("student", "critic")}

    def init_aux(self):
        return jnp.zeros((), jnp.int32)

    def phases(self, step):
        return Phase("student", "student"), Phase("critic", "critic")

    def loss(self, phase, networks, aux, axes, batch, step, key):
        level = jnp.full(batch.latents.shape[:2], 0.5)
        stream = Frames(0.5 * batch.latents, level, axes.layout(batch.latents.shape[1]))
        output = networks[phase]((stream,), batch.conditions, visibility=axes.visibility).predictions[0]
        return self.weight * jnp.mean(jnp.square(output - batch.latents)), ({"output": jnp.mean(output)}, aux + 1)


def test_an_objective_from_elsewhere_trains_by_its_import_path(tmp_path):
    config = built(
        objective={"kind": f"{__name__}:Quadratic", "weight": 2.0},
        visibility={"kind": "chunk_causal"},
        plan={},
        optimizers={role: {"learning_rate": 0.01} for role in ("student", "critic")},
        training={"steps": 2, "log_every": 1, "tensorboard": False},
    )
    state = train(make_run(config), tmp_path)
    assert {name: int(count) for name, count in state.updates.items()} == {"student": 2, "critic": 2}
    assert int(state.aux) == 4
    found = rows(tmp_path)
    assert found[1]["student/loss"] < found[0]["student/loss"]
    assert "critic/output" in found[0]
    system, _ = load(tmp_path)
    assert type(system.objective).__name__ == "Quadratic"


@dataclass(frozen=True)
class Loss:
    """No objective: it says neither which networks it needs nor when they are trained."""

    weight: float = 1.0


def test_a_class_that_is_no_objective_is_refused():
    with pytest.raises(ConfigError, match="objective: Loss has no roles; vidar/objectives/protocol.py says"):
        make_run(built(objective={"kind": f"{__name__}:Loss"}))


class NoRoles(Quadratic):
    """An objective of a person who has forgotten a `return`."""

    @property
    def roles(self):
        pass


class OtherBatch(Quadratic):
    """Phases take one of the streams of batches that a run has."""

    def phases(self, step):
        return Phase("student", "student", batch="other"), Phase("critic", "critic")


class NoPhases(Quadratic):
    """A step has at least one phase."""

    def phases(self, step):
        return ()


class NoLoss(Quadratic):
    """A loss that returns nothing."""

    def loss(self, *given):
        return None


class ManyLosses(Quadratic):
    """A loss of every clip is none of the batch."""

    def loss(self, phase, networks, aux, axes, batch, step, key):
        value, rest = super().loss(phase, networks, aux, axes, batch, step, key)
        return value * jnp.ones(4), rest


@dataclass(frozen=True)
class Picky(Quadratic):
    """An objective that checks its own values, in Python's own words."""

    def __post_init__(self):
        raise ValueError("weight is not to my taste")


@pytest.mark.parametrize(
    "name, words",
    [
        ("NoRoles", "roles of NoRoles should be a mapping by name, not None"),
        ("OtherBatch", "a phase takes batch 'other': use main or critic"),
        ("NoPhases", "objective: it has no phase at step 0"),
        ("NoLoss", r"loss of phase 'student' should return \(loss, \(metrics, aux\)\), not None"),
        ("ManyLosses", r"loss of phase 'student' has shape \(4,\); it should be a scalar"),
        ("Picky", "config.objective: ValueError: weight is not to my taste"),
    ],
)
def test_mistakes_in_an_objective_of_ones_own_get_one_line(tmp_path, name, words):
    def trained():
        fields = {"objective": {"kind": f"{__name__}:{name}"}, "visibility": {"kind": "chunk_causal"}, "plan": {}}
        optimizers = {role: {"learning_rate": 0.01} for role in ("student", "critic")}
        train(make_run(built(**fields, optimizers=optimizers)), tmp_path)

    with pytest.raises(ConfigError, match=words):
        trained()


TEXT = {"width": 8, "length": 12, "encoder": {"layers": 1, "heads": 1, "mlp": 8}}


def test_prompts_alone_are_enough_for_self_forcing(tmp_path):
    """Two networks of random weights, prompts from a file, long rollouts; the student's text encoder learns, too."""
    written = {name: value for name, value in MODEL.items() if name != "actions"} | {"text": TEXT}
    weights = tmp_path / "start.safetensors"
    fields = {"model": written, "visibility": {"kind": "chunk_causal"}, "plan": {}, "solver": {"kind": "few_step"}}
    config = built(**fields)
    start, teacher = network(config.model, 0), network(config.model, 1)
    systems = {"student": portable_dict(config), "teacher": portable_dict(built(model=written))}
    save_weights(weights, {"student": start, "teacher": teacher}, {"systems": systems})
    (tmp_path / "prompts.txt").write_text("a red ball\na blue square\n")
    objective = {
        "kind": "distillation", "student": str(weights), "teacher": str(weights), "generator_every": 1, "ema": None,
        "forcing": {"kind": "self", "frames": 8},
    }  # fmt: skip
    data = {"prompts": str(tmp_path / "prompts.txt"), "frames": 4, "batch": 2}
    optimizers = {role: {"learning_rate": 0.01} for role in ("student", "critic")}
    # The critic begins as the teacher: the student has a direction from the second step on.
    training = {"steps": 2, "log_every": 1, "tensorboard": False}
    changes = {"objective": objective, "data": data, "optimizers": optimizers, "training": training}
    distilled = built(**fields, **changes, context={"window": 4})
    state = train(make_run(distilled), tmp_path / "run")
    assert int(state.skipped) == 0
    before, after = by_path(start), by_path(state.networks["student"])
    moved = {path for path, leaf in after.items() if np.any(np.asarray(leaf) != np.asarray(before[path]))}
    assert any(path.startswith(".text_encoder.") for path in moved)
    assert "student/contrast" not in rows(tmp_path / "run")[0]
    with pytest.raises(ConfigError, match="data.prompts=.*has no clips, which the objective needs"):
        make_run(replace(distilled, objective=replace(distilled.objective, forcing=DiffusionForcing())))


def test_a_causal_student_may_start_from_its_bidirectional_teacher(sources):
    run = make_run(distilled(sources, {"student": str(sources / "teacher")}, model=MODEL))
    _, teacher = load(sources / "teacher")
    student = by_path(run.initial["student"])
    for path, leaf in by_path(teacher).items():
        np.testing.assert_array_equal(student[path], leaf)
    assert isinstance(run.axes.sampler.visibility, ChunkCausal)
