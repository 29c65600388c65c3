"""`vidar data trajectories`: from a teacher, or from the pairs of others, to a student that trains on them."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from vidar.cli.main import main
from vidar.data.records import ActionSpec, EpisodeWriter, Format
from vidar.data.trajectories import Trajectories
from vidar.sampling.solvers import FewStep, level_table
from vidar.system import compose, load, system_config
from vidar.training.experiment import RunConfig, make_run, system_dict
from vidar.weights import save_weights

MODEL = {
    "width": 24, "layers": 1, "heads": 2, "mlp": 24, "channels": 12, "actions": {"kind": "discrete", "count": 2},
    "precision": {"compute": "float32"},
}  # fmt: skip
SYSTEM = {
    "objective": {"kind": "diffusion"},
    "video": {"height": 8, "width": 8, "frames": 4, "chunk": 2},
    "codec": {"kind": "pixel", "patch": 2},
    "model": MODEL,
}
BIDIRECTIONAL = SYSTEM | {
    "visibility": {"kind": "bidirectional"},
    "plan": {"lag": 0},
    "levels": {"base": {"kind": "shared"}, "context": [{"kind": "clean_prefix", "probabilities": (0.5, 0.5)}]},
}
FEW = {"kind": "few_step", "times": (1000.0, 500.0), "shift": 5.0}
GRID = ("--times", "1000,500,0", "--shift", "5", "--solver-steps", "4")


def save_teacher(path, system, seed):
    """A network of small random weights with its system."""
    composed = compose(system_config(system))
    template = jax.eval_shape(partial(composed.build, "student"), jax.random.key(0))
    rng = np.random.default_rng(seed)
    network = jax.tree.map(lambda leaf: np.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), template)
    save_weights(path, {"student": network}, {"systems": {"student": system_dict(composed.config)}})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Teachers, and ten episodes of six frames."""
    root = tmp_path_factory.mktemp("trajectories")
    save_teacher(root / "teacher.safetensors", BIDIRECTIONAL, seed=0)
    save_teacher(root / "causal.safetensors", SYSTEM, seed=1)
    rng = np.random.default_rng(1)
    for name, size in (("records", (8, 8)), ("large", (16, 8))):
        writer = EpisodeWriter(root / name, Format(size, ActionSpec("discrete", ("none", "go"))), {})
        episodes = [
            (rng.integers(0, 256, (6, *size, 3), dtype=np.uint8), rng.integers(0, 2, 6).astype(np.int32))
            for _ in range(10)
        ]
        writer.write_shard("train", 0, episodes)
        writer.finish()
    return root


def words(root, output, *extra, model="teacher", data="records"):
    source = ["--model", str(root / f"{model}.safetensors"), "--records", str(root / data)]
    return ["data", "trajectories", *source, *GRID, "--output", str(output), "--rows", "4", *map(str, extra)]


def refused(capsys, arguments, *expected):
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vidar data: ")]
    assert len(lines) == 1
    for word in expected:
        assert word in lines[0]


def student(place, **changes):
    objective = changes.pop("objective", {})
    return SYSTEM | {
        "objective": {"kind": "ode_regression", "ema": 0.9, **objective},
        "solver": FEW,
        "data": {"trajectories": str(place), "frames": 4, "batch": 4},
        "optimizers": {"student": {"learning_rate": 1e-3}},
        "training": {"steps": 1},
    } | changes  # fmt: skip


@pytest.mark.parametrize("model", ["teacher", "causal"])
def test_a_teacher_s_trajectories_train_a_student(root, tmp_path, model, capsys):
    from vidar.training import train

    place = tmp_path / "pairs"
    given = words(root, place, "--count", 10, "--given", 2, "--guidance", 2, model=model)
    for shard in ("1/2", "0/2"):
        assert main([*given, "--shard", shard]) == 0
    assert "10 trajectories at times 1000, 833.333, 0; complete" in capsys.readouterr().out
    stored = Trajectories(place)
    np.testing.assert_array_equal(stored.levels, level_table(FewStep((1000.0, 500.0), 5.0)))
    assert (stored.form.latent, stored.form.given, stored.form.rows) == ((4, 4, 4, 12), 2, 4)
    clip = stored.read(9)
    assert clip["actions"][0] == 0
    np.testing.assert_array_equal(clip["trajectory"][0, :2], clip["trajectory"][2, :2])
    assert np.abs(clip["trajectory"][0, 2:] - clip["trajectory"][2, 2:]).max() > 0.1
    # The same command in one go, elsewhere, makes the same bits.
    assert main([*words(root, tmp_path / "again", "--count", 10, "--given", 2, "--guidance", 2, model=model)]) == 0
    for path in place.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()

    if model == "causal":  # the other context, without a word of complaint
        objective, visibility = {"given": 1, "context": "clean"}, {"kind": "teacher_forcing"}
        make_run(system_config(student(place, objective=objective, visibility=visibility), RunConfig))
        return
    # Beside the trajectories stands the data set that the evaluation generates from.
    config = student(place, objective={"given": 1}, training={"steps": 3, "log_every": 1, "eval_every": 3})
    config["data"] |= {"records": str(root / "records")}
    config["evaluation"] = {"split": "train", "clips": 2, "given": 2}
    train(make_run(system_config(config, RunConfig)), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["student/loss"] for row in rows if "student/loss" in row]
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
    assert 0 < rows[-1]["evaluation/psnr"] < 40
    system, network = load(tmp_path / "run")
    assert (system.objective.kind, network.config.width) == ("ode_regression", 24)


def test_given_frames_are_those_of_the_clip(root, tmp_path):
    from vidar.data.pipeline import DataConfig, open_source
    from vidar.preparation.trajectories import clip_order

    assert main(words(root, tmp_path / "pairs", "--count", 3, "--given", 2, "--seed", 5)) == 0
    source = open_source(DataConfig(records=str(root / "records"), frames=4))
    order = clip_order(len(source), 3, seed=5)
    codec = compose(system_config(BIDIRECTIONAL)).config.codec
    for number in range(3):
        clip, stored = source.clip(int(order[number]), 0.0), Trajectories(tmp_path / "pairs").read(number)
        np.testing.assert_array_equal(stored["actions"], clip["actions"])
        latents = np.asarray(codec.encode(clip["pixels"][None, :2])[0])
        np.testing.assert_allclose(stored["trajectory"][-1, :2], latents, atol=1e-3)


def test_clips_that_changed_in_their_place_are_refused(root, tmp_path, capsys):
    records = tmp_path / "records"
    records.symlink_to(root / "records")
    assert main(words(root, tmp_path / "pairs", "--count", 4, data=records)) == 0
    records.unlink()
    records.symlink_to(root / "large")
    refused(capsys, words(root, tmp_path / "pairs", "--count", 4, data=records), "source.clips=")


def test_mistakes_get_one_line(root, tmp_path, capsys):
    place = tmp_path / "pairs"
    assert main(words(root, place, "--count", 4)) == 0
    refused(
        capsys,
        words(root, place, "--count", 4, "--guidance", 2),
        "source.sampler.guidance=",
        "choose another directory",
    )
    refused(capsys, words(root, place, "--count", 4, "--seed", 1), "source.seed=0 instead of 1")
    refused(capsys, words(root, place, "--count", 4, model="causal"), "source.teacher=", "choose another directory")
    refused(capsys, words(root, place, "--solver-steps", 5), "5 steps at shift 5 do not pass time 500", "4 or 6")
    refused(capsys, words(root, place, "--given", 3, model="causal"), "--given=3 of 4", "whole chunks of 2")
    refused(capsys, words(root, place, "--given", 2, data="large"), "16×8 pixels, the model 8×8")
    refused(capsys, words(root, place, "--shard", "2/2"), "--shard=2/2", "i/N")
    refused(capsys, words(root, place, "--times", "10,x"), "--times=10,x")
    refused(capsys, words(root, place, "--count", 0), "--count=0 must be at least 1")
    refused(capsys, [*words(root, place), "--tfds", "x"], "one of --tfds, --records and --prompts")
    (tmp_path / "prompts").write_text("a fox\n")
    bare = [word for word in words(root, tmp_path / "none") if word not in ("--records", str(root / "records"))]
    refused(capsys, [*bare, "--prompts", tmp_path / "prompts"], "the teacher needs actions", "only caption")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"solver": FEW | {"shift": 8.0}},
            ["levels 1, 0.8333333, 0", "visits 1, 0.8888889, 0"],
        ),
        ({"solver": {"kind": "euler", "steps": 2, "shift": 5.0}}, None),
        ({"objective": {"given": 1}}, ["objective.given=1 chunks are 2 frames", "0 given ones"]),
        ({"objective": {"given": 2}}, ["objective.given=2 of 2 chunks", "0 … 1"]),
        ({"objective": {"context": "clean"}}, ["OdeRegression and visibility ChunkCausal do not go together"]),
        ({"video": SYSTEM["video"] | {"frames": 6}, "data": {"frames": 6}}, ["[4, 4, 4, 12]", "[6, 4, 4, 12]"]),
        ({"data": {"trajectories": None}}, ["ode_regression needs a teacher's trajectories"]),
        ({"training": {"steps": 1, "eval_every": 1}}, ["no pixels to evaluate on", "data.tfds or data.records"]),
    ],
)
def test_a_run_checks_its_trajectories_before_it_starts(root, tmp_path_factory, changes, expected):
    from vidar.errors import VidarError

    place = tmp_path_factory.getbasetemp() / "checked"
    assert main(words(root, place, "--count", 4)) == 0
    config = student(place, **changes)
    config["data"] = {"trajectories": str(place), "frames": 4, "batch": 4} | changes.get("data", {})
    if expected is None:  # the same levels by another solver
        make_run(system_config(config, RunConfig))
        return
    with pytest.raises(VidarError) as error:
        make_run(system_config(config, RunConfig))
    for word in expected:
        assert word in str(error.value)


# ----------------------------------------------------------------------------------------------------------------- lmdb


def write_lmdb(path, latents, prompts):
    """The layout of the public recipes: rows by number, and shapes as text."""
    import lmdb

    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for number, (row, prompt) in enumerate(zip(latents, prompts, strict=True)):
            transaction.put(f"latents_{number}_data".encode(), row.tobytes())
            transaction.put(f"prompts_{number}_data".encode(), prompt.encode())
        transaction.put(b"latents_shape", " ".join(map(str, latents.shape)).encode())
        transaction.put(b"prompts_shape", str(len(prompts)).encode())


@pytest.mark.parametrize("shards", [1, 2])
def test_pairs_in_lmdb_become_trajectories(tmp_path, shards):
    pytest.importorskip("lmdb")
    latents = np.random.default_rng(0).normal(size=(6, 5, 3, 2, 4, 6)).astype(np.float16)
    prompts = ["a fox", "a crow", "ein Wolf — grau", "a crow", "a hen", "a fox"]
    if shards == 1:
        write_lmdb(tmp_path / "lmdb", latents, prompts)
    else:
        write_lmdb(tmp_path / "lmdb" / "shard_0", latents[:3], prompts[:3])
        write_lmdb(tmp_path / "lmdb" / "shard_1", latents[3:], prompts[3:])
    command = [
        "data",
        "trajectories",
        "--lmdb",
        str(tmp_path / "lmdb"),
        "--times",
        "1000,750,500,250,0",
        "--shift",
        "5",
    ]
    assert main([*command, "--output", str(tmp_path / "pairs"), "--rows", "3"]) == 0
    stored = Trajectories(tmp_path / "pairs")
    assert (len(stored), stored.form.latent, stored.form.shards) == (4, (3, 4, 6, 2), 2)
    np.testing.assert_array_equal(stored.levels, level_table(FewStep()))
    for number, row in enumerate((0, 1, 2, 4)):
        clip = stored.read(number)
        assert clip["caption"].decode() == prompts[row]
        # A loop over places, so that no transposition is tested against itself.
        for k, f, c, h, w in [(0, 0, 0, 0, 0), (4, 2, 1, 3, 5), (2, 1, 0, 3, 1), (1, 2, 1, 0, 4)]:
            assert clip["trajectory"][k, f, h, w, c] == latents[row, k, f, c, h, w]


def test_damaged_pairs_get_one_line(tmp_path, capsys):
    lmdb = pytest.importorskip("lmdb")
    latents = np.zeros((2, 3, 3, 2, 4, 6), np.float16)
    write_lmdb(tmp_path / "lmdb", latents, ["a", "b"])
    command = ["data", "trajectories", "--lmdb", tmp_path / "lmdb", "--shift", 5, "--output", tmp_path / "pairs"]
    refused(capsys, [*command, "--times", "1000,750,500,250"], "keeps 3 states", "needs 2 --times", "not 4")
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"latents_1_data", b"short")
        transaction.delete(b"prompts_0_data")
    refused(capsys, [*command, "--times", "1000,500"], "has no prompts_0_data")
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"prompts_0_data", b"a")
    refused(
        capsys, [*command, "--times", "1000,500"], "latents_1_data holds 5 bytes, not the 864", "copy the set again"
    )
    command[3] = tmp_path / "none"
    refused(capsys, [*command, "--times", "1000,500"], "none: no LMDB (data.mdb) in it")
