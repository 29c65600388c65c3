"""Systems composed from configs: what each choice becomes, and one line for choices that contradict each other."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidar.attention.visibility import Bidirectional, ChunkCausal, KeyRange, TeacherForcing, Window
from vidar.errors import ConfigError, DataError
from vidar.models.frames import Frames
from vidar.objectives import targets
from vidar.objectives.protocol import Phase, Role
from vidar.sampling.guidance import Branch
from vidar.system import OnData, compose, streaming_sampler, system_config

MODEL = {
    "width": 24, "layers": 1, "heads": 2, "mlp": 24, "channels": 12, "actions": {"kind": "discrete", "count": 3},
    "precision": {"compute": "float32"},
}  # fmt: skip
TINY = {
    "objective": {"kind": "diffusion"},
    "video": {"height": 8, "width": 8, "frames": 4, "chunk": 2},
    "codec": {"kind": "pixel", "patch": 2},
    "model": MODEL,
}


GAN = {"kind": "distillation", "matching": {"kind": "gan", "heads": {"taps": [0]}}}
DISTILLED = {"objective": {"kind": "distillation"}, "solver": {"kind": "few_step"}}


def distilled(**forcing):
    return dict(DISTILLED, objective={"kind": "distillation", "forcing": {"kind": "self", **forcing}})


def composed(**changes):
    return compose(system_config(TINY | changes))


@dataclass(frozen=True)
class CleanRegression:
    """An objective that vidar does not know: predict the clean frames, all of them at one level."""

    kind: ClassVar[str] = "clean_regression"
    level: float = 0.5

    @property
    def roles(self):
        return {"student": Role(optimizer="student")}

    def init_aux(self):
        return jnp.zeros((), jnp.int32)

    def phases(self, step):
        return (Phase("student", "student"),)

    def loss(self, phase, networks, aux, axes, batch, step, key):
        level = jnp.full(batch.latents.shape[:2], self.level)
        stream = Frames((1 - self.level) * batch.latents, level, axes.layout(batch.latents.shape[1]))
        prediction = networks["student"]((stream,), batch.conditions, visibility=axes.visibility).predictions[0]
        return jnp.mean(targets.frame_error(prediction, batch.latents)), ({}, aux + 1)


def pixels(rows=2):
    rng = np.random.default_rng(0)
    return {
        "pixels": rng.integers(0, 256, (rows, 4, 8, 8, 3), dtype=np.uint8),
        "actions": rng.integers(0, 3, (rows, 4)).astype(np.int32),
        "index": np.arange(rows),
    }


@pytest.mark.parametrize("visibility", ["chunk_causal", "teacher_forcing"])
def test_an_objective_of_ones_own_is_named_by_its_import_path(visibility):
    """With any visibility: vidar's own rules about it are for vidar's own objectives."""
    kind = f"{CleanRegression.__module__}:CleanRegression"
    system = composed(objective={"kind": kind, "level": 0.25}, visibility={"kind": visibility})
    assert type(system.objective).__name__ == "CleanRegression"
    assert system.objective.level == 0.25
    if visibility == "teacher_forcing":
        return
    student = system.build("student", jax.random.key(0))
    objective = OnData(system)
    run = jax.jit(lambda student, batch: objective.loss(
        "student", {"student": student}, objective.init_aux(), system.axes, batch, jnp.int32(0), jax.random.key(1)
    ))  # fmt: skip
    loss, (_, aux) = run(student, jax.tree.map(jnp.asarray, pixels()))
    clean = pixels()["pixels"].astype(np.float64) / 127.5 - 1
    # The head of a fresh network is zero, so the loss is the mean square of the latents.
    assert float(loss) == pytest.approx(np.mean(clean**2), rel=1e-4)
    assert int(aux) == 1


def test_batches_are_encoded_and_lacking_ones_refused():
    system = composed()
    batch = system.prepare(jax.tree.map(jnp.asarray, pixels()))
    assert batch.latents.shape == (2, 4, 4, 4, 12)
    np.testing.assert_array_equal(system.config.codec.decode(batch.latents), pixels()["pixels"])
    np.testing.assert_array_equal(batch.conditions.actions, pixels()["actions"])
    assert batch.conditions.text is None
    lacking = {name: value for name, value in pixels().items() if name != "actions"}
    with pytest.raises(DataError, match="needs actions, which the batches lack"):
        system.prepare(lacking)


def test_axes_follow_the_config():
    system = composed(
        objective={"kind": "teacher_forcing"},
        visibility={"kind": "teacher_forcing"},
        context={"window": 4, "sink": 2},
        guidance=({"coefficient": 2.0}, {"coefficient": -1.0, "drops": ("actions",)}),
        solver={"kind": "few_step"},
        drop=0.1,
    )
    axes, sampler = system.axes, system.sampler
    assert axes.visibility == TeacherForcing() & Window(4, 2)
    assert sampler.visibility == ChunkCausal() & Window(4, 2)
    assert (axes.drop, sampler.tokens, sampler.latent) == (0.1, 16, (4, 4, 12))
    assert sampler.guidance == (Branch(2.0), Branch(-1.0, ("actions",)))
    assert (sampler.program.lag, sampler.program.rows, sampler.geometry.capacity) == (4, 5, 2)
    assert sampler.cache_dtype == "float32"
    endless = streaming_sampler(system, window=6, positions="relative")
    assert endless.visibility == ChunkCausal() & Window(6, 2)
    assert (endless.geometry.capacity, endless.geometry.relative) == (4, True)
    assert streaming_sampler(composed()).context.window == 4
    with pytest.raises(ConfigError, match="context.window=0 does not align"):
        streaming_sampler(composed(), window=0)


def test_presets_are_filled_in_and_overridden():
    system = compose(
        system_config(
            TINY | {"model": {"preset": "small", "layers": 1, "channels": 12}, "codec": {"kind": "pixel", "patch": 2}}
        )
    )
    assert (system.config.model.width, system.config.model.layers) == (768, 1)
    assert system.model_config("critic") == system.config.model


def test_patterns_combine_by_import_path():
    rooms = "vidar.attention.visibility"
    both = {
        "kind": f"{rooms}:Both",
        "left": {"kind": f"{rooms}:ChunkCausal"},
        "right": {"kind": f"{rooms}:KeyRange", "bounds": (0.5,), "ranges": (2, 1)},
    }
    assert composed(visibility=both).axes.visibility == ChunkCausal() & KeyRange((0.5,), (2, 1))


def test_a_bidirectional_network_generates_whole_clips():
    system = composed(visibility={"kind": "bidirectional"}, plan={"lag": 0})
    assert system.axes.visibility == Bidirectional()
    assert system.sampler.program.emits == 2


REFUSED = {
    "clip length": (dict(video={"frames": 5, "chunk": 2}), "video.frames=5 .* 4 would be"),
    "clip length, first frame": (
        dict(video={"frames": 6, "chunk": 2, "independent_first_frame": True}),
        "after the first frame; .* would be",
    ),
    "no frames": (dict(video={"frames": 0}), "at least 1"),
    "pixels": (dict(video={"height": 9, "frames": 4, "chunk": 2}), "9×16 pixels are not whole multiples of 2"),
    "patch": (dict(model=MODEL | {"patch": 3}), "do not divide into patches of 3"),
    "channels": (dict(model=MODEL | {"channels": 7}), "model.channels=7, but the codec gives 12"),
    "teacher's channels": (dict(teacher=MODEL | {"channels": 7}), "teacher.channels=7, but the codec gives 12"),
    "ring": (dict(context={"window": 5}), "context.window=5 does not align"),
    "leak": (dict(visibility={"kind": "bidirectional"}), "Bidirectional lets frames see later chunks"),
    "leak of a key range": (
        dict(visibility={"kind": "key_range", "bounds": (0.5,), "ranges": (2, 1)}),
        "KeyRange lets frames see later chunks",
    ),
    "relative without a window": (dict(context={"positions": "relative"}), "needs a window"),
    "relative sink in a pipeline": (
        dict(context={"window": 6, "sink": 2, "positions": "relative"}, plan={"lag": 1}),
        "one chunk at a time",
    ),
    "relative sink, fused": (
        dict(context={"window": 6, "sink": 2, "positions": "relative"}, plan={"commit": {"kind": "fused"}}),
        "one chunk at a time",
    ),
    "drops in a fused row": (
        dict(plan={"commit": {"kind": "fused", "drops": ("actions",)}}),
        "needs a pass of its own",
    ),
    "cudnn in a pipeline": (dict(model=MODEL | {"backend": "cudnn"}, plan={"lag": 1}), "runs one chunk at a time"),
    "lag": (dict(plan={"lag": 60}), "lag=60"),
    "objective without its pattern": (dict(objective={"kind": "teacher_forcing"}), "do not go together"),
    "pattern without its objective": (dict(visibility={"kind": "teacher_forcing"}), "do not go together"),
    "distillation in a pipeline": (dict(**DISTILLED, plan={"lag": 1}), "one chunk at a time"),
    "distillation of many steps": (dict(objective={"kind": "distillation"}), "use solver.kind='few_step', not 'euler'"),
    "distillation without a rest": (distilled(given=2), "leaves none to learn"),
    "consistency without a rest": (
        dict(objective={"kind": "consistency", "given": 2}, visibility={"kind": "teacher_forcing"}),
        "objective.given=2 of 2 chunks leaves none to learn",
    ),
    "more passes than steps": (
        distilled(gradient={"passes": 5}),
        "objective.forcing.gradient.passes=5 must be at most 4",
    ),
    "unknown role": (dict(**DISTILLED, roles={"studnet": {}}), "no such role; its are critic, student, teacher"),
    "adapters of a frozen role": (dict(**DISTILLED, roles={"teacher": {"lora": {"rank": 2}}}), "teacher is frozen"),
    "adapters beside heads": (
        dict(DISTILLED, objective=GAN, roles={"critic": {"lora": {"rank": 2}}}),
        "critic has parts of its own, trained with it",
    ),
    "type of a trained role": (dict(**DISTILLED, roles={"critic": {"dtype": "bfloat16"}}), "critic is trained"),
    "average that is not kept": (dict(**DISTILLED, roles={"critic": {"ema_memory": "host"}}), "critic has no average"),
    "network of no role": (dict(critic=MODEL), "critic: the objective has no such role; its are student"),
    "distillation, first frame": (
        dict(**DISTILLED, video={"frames": 5, "chunk": 2, "independent_first_frame": True}),
        "objective.forcing.given=1",
    ),
    "rollouts that are no clips": (distilled(frames=5), "must be video.frames=4 and whole chunks of 2 more"),
    "clean clips that nobody sees": (
        dict(DISTILLED, objective={"kind": "distillation", "forcing": {"kind": "teacher"}}),
        "do not go together",
    ),
    "taps past the last block": (
        dict(DISTILLED, objective={"kind": "distillation", "matching": {"kind": "gan", "heads": {"taps": [1]}}}),
        "the critic has blocks -1 … 0",
    ),
    "unknown key": (dict(modell={}), "did you mean 'model'"),
    "unknown preset": (dict(model={"preset": "huge"}), "preset 'huge' is unknown"),
    "unknown back end": (dict(model=MODEL | {"backend": "flash"}), "unknown"),
    "heads": (dict(model=MODEL | {"heads": 5}), "multiple of model.heads=5"),
    "modulation": (dict(model=MODEL | {"modulation": "film"}), "model.modulation='film' is unknown: use one of table"),
    "norm": (dict(model=MODEL | {"qk_norm": "layer"}), "model.qk_norm='layer' is unknown"),
    "prediction": (dict(model=MODEL | {"prediction": "score"}), "model.prediction='score' is unknown"),
    "height": (dict(video={"height": 0, "frames": 4, "chunk": 2}), "video.height=0 must be at least 1"),
    "width": (dict(video={"width": -8, "frames": 4, "chunk": 2}), "video.width=-8 must be at least 1"),
    "times that ascend": (dict(solver={"kind": "few_step", "times": (250.0, 1000.0)}), "times descend"),
    "times down to 0": (dict(solver={"kind": "few_step", "times": (1000.0, 0.0)}), "times descend"),
    "times above 1000": (dict(solver={"kind": "few_step", "times": (2000.0, 500.0)}), "times descend"),
    "few-step shift": (dict(solver={"kind": "few_step", "shift": 0.0}), "solver.shift=0.0 must be above 0"),
    "solver's shift": (dict(solver={"kind": "euler", "shift": -1.0}), "solver.shift=-1.0 must be above 0"),
    "solver's steps": (dict(solver={"kind": "euler", "steps": 0}), "solver.steps=0 must be at least 1"),
    "weight": (dict(objective={"kind": "diffusion", "weight": "nope"}), "'nope' is unknown: use one of uniform, bump"),
    "bump's shift": (dict(objective={"kind": "diffusion", "shift": 0.0}), "objective.shift=0.0 must be above 0"),
    "average": (dict(objective={"kind": "diffusion", "ema": 2.0}), "objective.ema=2.0 must be .* below 1"),
    "start of the average": (dict(objective={"kind": "diffusion", "ema_start": -5}), "ema_start=-5 must be at least 0"),
    "context noise": (dict(objective={"kind": "teacher_forcing", "context_noise": 2.0}), "context_noise=2.0 must be"),
    "negative average": (dict(objective={"kind": "teacher_forcing", "ema": -1.0}), "objective.ema=-1.0 must be"),
    "generator": (dict(objective={"kind": "distillation", "generator_every": 0}), "generator_every=0 must be"),
    "levels out of order": (
        dict(objective={"kind": "distillation", "matching": {"kind": "dmd", "noise": {"low": 0.9, "high": 0.1}}}),
        "noise.high=0.1 must be above 0.9",
    ),
    "no branch": (dict(guidance=()), r'guidance: has no branch; \({"coefficient": 1.0},\) is no guidance'),
    "branches that scale": (dict(guidance=({"coefficient": 1.5},)), "add up to 1.5, not to 1"),
    "dropping what is not taken": (
        dict(guidance=({"coefficient": 2.0}, {"coefficient": -1.0, "drops": ("text",)})),
        "guidance: a branch drops text, but the network takes actions",
    ),
    "no branch of the teacher": (
        dict(DISTILLED, objective={"kind": "distillation", "matching": {"kind": "dmd", "guidance": ()}}),
        "objective.matching.guidance: has no branch",
    ),
    "no branch of the autoregressive teacher": (
        dict(objective={"kind": "consistency", "guidance": ()}, visibility={"kind": "teacher_forcing"}),
        "objective.guidance: has no branch",
    ),
    "drop": (dict(drop=1.5), "drop=1.5 must be at least 0 and at most 1"),
    "codec's patch": (dict(codec={"kind": "pixel", "patch": 0}), "codec.patch=0 must be at least 1"),
    "codec's deviation": (dict(codec={"kind": "pixel", "deviation": 0.0}), "codec.deviation=0.0 must be above 0"),
    "codec's mean": (dict(codec={"kind": "pixel", "mean": float("nan")}), "codec.mean=nan must be finite"),
    "no heads": (dict(model=MODEL | {"heads": 0}), "model.heads=0 must be at least 1"),
    "no layers": (dict(model=MODEL | {"layers": -1}), "model.layers=-1 must be at least 1"),
    "no hidden width": (dict(model=MODEL | {"mlp": 0}), "model.mlp=0 must be at least 1"),
    "odd time": (dict(model=MODEL | {"time_channels": 3}), "time_channels=3 must be an even number"),
    "no actions": (dict(model=MODEL | {"actions": {"kind": "discrete", "count": 0}}), "actions.count=0 must be"),
    "no text": (dict(model=MODEL | {"text": {"length": 0}}), "text.length=0 must be at least 1"),
    "integers": (dict(model=MODEL | {"precision": {"compute": "int8"}}), "'int8' must be one of float32, bfloat16"),
    "no type": (dict(model=MODEL | {"precision": {"params": "float99"}}), "'float99' must be one of float32"),
    "theta": (dict(model=MODEL | {"rope": {"theta": 0.0}}), "rope.theta=0.0 must be above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused_in_one_line(name):
    changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as failure:
        composed(**changes)
    assert "\n" not in str(failure.value)
