"""Every byte that is restored is one that was saved."""

import gc
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import ROOT, subprocess_environment
from vidar.checkpoint import Checkpoints, load_item
from vidar.errors import CheckpointError


class Network(nnx.Module):
    def __init__(self, width, rngs):
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])


class Counter:
    """An iterator with a position, as Grain's."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return self.position

    def get_state(self):
        return {"position": self.position, "bytes": b"\x00\xff", "numpy": np.int64(3)}

    def set_state(self, state):
        assert state["bytes"] == b"\x00\xff"
        assert state["numpy"] == 3
        self.position = state["position"]


def tree(value):
    return {
        "network": Network(8, nnx.Rngs(value)),
        "half": jnp.full((3, 5), value, jnp.bfloat16),
        "step": jnp.int32(value),
    }


def abstract(value):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), value)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def save(directory, steps, keep=10):
    checkpoints = Checkpoints(directory, keep=keep)
    for step in steps:
        checkpoints.save(step, {"state": tree(step), "meta": {"step": step}})
    checkpoints.wait()
    return checkpoints


def restore(directory, step=None):
    found, items = Checkpoints(directory, keep=10).restore(step, {"state": abstract(tree(0)), "meta": None})
    assert items["meta"] == {"step": found}
    assert_equal(items["state"], tree(found))
    return found


def test_items_come_back_as_they_were(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    counter = Counter()
    for _ in range(3):
        next(counter)
    saved = {"state": tree(7), "ema": tree(8), "data": counter, "meta": {"a": [1, {"b": None}]}}
    checkpoints.save(7, saved)
    next(counter)  # moves on while the save is under way
    checkpoints.wait()

    fresh = Counter()
    templates = {"state": abstract(tree(0)), "ema": abstract(tree(0)), "data": fresh, "meta": None}
    step, items = Checkpoints(tmp_path, keep=2).restore(None, templates)
    assert step == 7
    assert_equal(items["state"], saved["state"])
    assert_equal(items["ema"], saved["ema"])
    assert items["data"] is fresh
    assert fresh.position == 3
    assert items["meta"] == saved["meta"]


def test_grain_iterators_come_back_at_their_position(tmp_path):
    import grain

    def batches():
        source = grain.MapDataset.range(100).seed(0).shuffle().repeat(None).batch(4)
        return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    uninterrupted = batches()
    expected = [next(uninterrupted) for _ in range(6)]
    first = batches()
    for _ in range(3):
        next(first)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, {"data": first})
    checkpoints.wait()
    second = batches()
    Checkpoints(tmp_path, keep=1).restore(None, {"data": second})
    np.testing.assert_array_equal([next(second) for _ in range(3)], expected[3:])


def test_the_arrays_may_be_donated_while_they_are_written(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1.0, state), donate_argnums=0)
    state = {str(index): jnp.full((1 << 20,), 3.0) for index in range(8)}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, {"state": state})
    for _ in range(3):
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    _, items = checkpoints.restore(3, {"state": abstract(state)})
    for leaf in items["state"].values():
        assert (np.asarray(leaf) == 3.0).all()


def test_old_steps_are_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every=20)
    for step in (10, 20, 30, 40, 50, 60, 70):
        checkpoints.save(step, {"meta": {"step": step}})
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000020", "00000040", "00000060", "00000070"]
    assert checkpoints.latest() == 70


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), r"bytes instead of"),
    "emptied": (lambda path: os.truncate(path, 0), r"has 0 bytes instead of"),
    "bit flip": (flip_a_bit, r"the content of .* has changed"),
    "missing": (lambda path: path.unlink(), r"is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", ["arrays/state/**/d/*", "arrays/state/_METADATA", "meta.json"])
def test_a_damaged_step_is_passed_over_and_named(tmp_path, caplog, damage, pattern):
    save(tmp_path, (1, 2))
    hurt, message = DAMAGES[damage]
    files = sorted((tmp_path / "00000002").glob(pattern), key=lambda path: path.stat().st_size)
    hurt(files[-1])
    with caplog.at_level(logging.WARNING, "vidar"):
        assert restore(tmp_path) == 1
    assert len(caplog.messages) == 1
    assert "00000002 is damaged" in caplog.messages[0]
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path, 2)


@pytest.mark.parametrize("content", [None, "", '{"processes": 2, "arrays": {}, "files": {}}', "[]"])
def test_a_step_without_a_whole_manifest_is_passed_over(tmp_path, caplog, content):
    save(tmp_path, (1, 2))
    manifest = tmp_path / "00000002" / "manifest.0.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with caplog.at_level(logging.WARNING, "vidar"):
        assert restore(tmp_path) == 1
    assert len(caplog.messages) == 1


def test_the_course_goes_on_over_a_damaged_step(tmp_path):
    """Restored at 1 because 2 is damaged: step 2 is written again, and 3, of the abandoned course, goes."""
    save(tmp_path, (1, 2, 3))
    for step in (2, 3):
        (tmp_path / f"{step:08d}" / "meta.json").unlink()
    (tmp_path / "00000004").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=10)
    step, _ = checkpoints.restore(None, {"meta": None})
    assert step == 1
    checkpoints.save(2, {"state": tree(2), "meta": {"step": 2}})
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002"]
    assert restore(tmp_path) == 2


def test_nothing_whole_is_an_error_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        restore(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a file, not a directory of checkpoints"):
        restore(tmp_path / "file")
    (tmp_path / "file").unlink()
    save(tmp_path, (1,))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; there are \[1\]"):
        restore(tmp_path, 5)
    (tmp_path / "00000001" / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        restore(tmp_path)


def test_what_does_not_fit_is_named(tmp_path):
    save(tmp_path, (1,))
    checkpoints = Checkpoints(tmp_path, keep=1)
    narrow = abstract(tree(0)) | {"half": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)}
    with pytest.raises(CheckpointError, match=r"state/half has shape \(3, 5\), the configuration says \(3, 4\)"):
        checkpoints.restore(None, {"state": narrow})
    more = abstract(tree(0)) | {"extra": jax.ShapeDtypeStruct((), jnp.float32)}
    with pytest.raises(CheckpointError, match="item 'state' lacks 'extra'"):
        checkpoints.restore(None, {"state": more})
    less = {key: leaf for key, leaf in abstract(tree(0)).items() if key != "half"}
    with pytest.raises(CheckpointError, match="item 'state' has 'half', which the configuration does not"):
        checkpoints.restore(None, {"state": less})
    with pytest.raises(CheckpointError, match="there is no item 'ema'"):
        checkpoints.restore(None, {"ema": less})


def test_one_item_alone_may_be_loaded_in_part_and_in_another_type(tmp_path):
    save(tmp_path, (1, 2))
    shape = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    loaded = load_item(tmp_path, "state", {"half": shape})
    np.testing.assert_array_equal(np.asarray(loaded["half"]), np.full((3, 5), 2.0, np.float32))
    assert load_item(tmp_path, "meta", None, step=1) == {"step": 1}
    # Damage to what is not loaded does not matter.
    (tmp_path / "00000002" / "meta.json").unlink()
    assert load_item(tmp_path, "state", {"half": shape})["half"][0, 0] == 2.0
    assert load_item(tmp_path, "meta", None) == {"step": 1}


def test_a_checkpoint_moves_to_another_mesh(tmp_path, run_python):
    code = f"""
        import jax, jax.numpy as jnp, numpy as np
        from vidar.checkpoint import Checkpoints
        from vidar.sharding import MeshConfig, make_mesh, shardings
        mesh = make_mesh(MeshConfig(%s))
        abstract = {{"w": jax.ShapeDtypeStruct((8, 8), jnp.float32), "b": jax.ShapeDtypeStruct((8,), jnp.float32)}}
        places = shardings(abstract, lambda path, leaf: ("embed", "mlp")[-leaf.ndim:], mesh)
        values = {{"w": np.arange(64, dtype=np.float32).reshape(8, 8), "b": np.arange(8, dtype=np.float32)}}
        checkpoints = Checkpoints({str(tmp_path)!r}, keep=1)
        if %r:
            checkpoints.save(1, {{"state": jax.device_put(values, places)}})
            checkpoints.wait()
        else:
            placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, places)
            _, items = checkpoints.restore(None, {{"state": placed}})
            for key, value in values.items():
                np.testing.assert_array_equal(np.asarray(items["state"][key]), value)
                assert items["state"][key].sharding == places[key], items["state"][key].sharding
            print(places["w"].spec)
    """
    run_python(code % ("fsdp=4, tensor=2", True), devices=8)
    assert "('fsdp', 'sequence'), 'tensor'" in run_python(code % ("fsdp=2, tensor=1", False), devices=2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_is_one_line_and_the_last_good_step_stays(small_disk, tmp_path, monkeypatch, foreseen):
    directory = small_disk or tmp_path / "simulated"
    checkpoints = Checkpoints(directory, keep=2)
    checkpoints.save(1, {"state": tree(1), "meta": {"step": 1}})
    checkpoints.wait()
    free = 1 << 20 if foreseen else 1 << 40
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    if small_disk is None and not foreseen:
        from orbax.checkpoint import v1

        def full(*_args, **_options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(v1, "save_checkpointables_async", full)

    noise = jax.random.normal(jax.random.key(0), (1 << 20,))

    def overfill():
        checkpoints.save(2, {"state": {"noise": noise}})
        checkpoints.wait()

    with pytest.raises(CheckpointError, match=r"00000002: the disk is full; free some space") as caught:
        overfill()
    assert "\n" not in str(caught.value)
    assert not (directory / "00000002").exists()
    monkeypatch.undo()
    assert restore(directory) == 1
    gc.collect()  # what Orbax left behind is complained about here, not in another test


KILLED = """
    import sys, jax, jax.numpy as jnp
    from vidar.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep=3)
    start, value = 0, jnp.zeros((1 << 19,))
    if checkpoints.latest() is not None:
        template = {"value": jax.ShapeDtypeStruct(value.shape, value.dtype)}
        start, items = checkpoints.restore(None, {"state": template})
        assert (items["state"]["value"] == start).all(), "torn"
    for step in range(start + 1, 100_000):
        checkpoints.save(step, {"state": {"value": jnp.full_like(value, step)}, "meta": {"step": step}})
        checkpoints.wait()
        print(step, flush=True)
"""


def test_kill_at_random_instants_loses_nothing_that_was_complete(tmp_path):
    """Saves without pause, so that every kill falls into a save; each restart checks what it restores."""
    generator = random.Random(0)
    announced = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "run")],
            env=subprocess_environment(1),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        if not first:
            pytest.fail(process.communicate()[1])
        assert int(first) in (announced + 1, announced + 2), "a complete step was lost"
        time.sleep(generator.uniform(0.0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        rest = process.communicate()[0].split()
        announced = int(rest[-1] if rest else first)


def test_a_manifest_lists_every_file(tmp_path):
    save(tmp_path, (1,))
    step = tmp_path / "00000001"
    listed = set(json.loads((step / "manifest.0.json").read_text())["files"])
    present = {str(path.relative_to(step)) for path in Path(step).rglob("*") if path.is_file()}
    assert present - listed == {"manifest.0.json"}
