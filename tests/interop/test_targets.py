"""Checkpoints written a tensor at a time: what lies in them, what an interrupted one keeps, and what is never lost."""

import json
import logging
import re
import subprocess
import sys
import textwrap
import tracemalloc
import weakref
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.conftest import ROOT, subprocess_environment
from tests.interop.test_sources import ARRAYS, assert_holds, stored
from vidar.errors import CheckpointError, ConfigError
from vidar.interop.sources import CHECKSUMS, Stored, open_tensors
from vidar.interop.targets import fingerprint, save_tensors, size
from vidar.interop.torch_file import read_torch_file

EIGHT = {f"block.{number}.weight": np.full((16, 4), number, np.float32) for number in range(8)}
SHARD = 2 * 16 * 4 * 4  # two of them


def counted(arrays, fail=None):
    """Tensors that note the order in which they are read, one of which may fail."""
    reads = []

    def read(name):
        reads.append(name)
        if name == fail:
            raise CheckpointError("the cable")
        return arrays[name]

    return {name: replace(one, read=lambda name=name: read(name)) for name, one in stored(arrays).items()}, reads


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def whole(tmp_path):
    """What an uninterrupted conversion writes."""
    save_tensors(tmp_path / "whole", stored(EIGHT), shard=SHARD)
    return contents(tmp_path / "whole")


@pytest.fixture
def interrupted(tmp_path):
    """A directory in which two of four shards are complete."""
    tensors, reads = counted(EIGHT, fail="block.5.weight")
    with pytest.raises(CheckpointError, match="the cable"):
        save_tensors(tmp_path / "x", tensors, shard=SHARD, source="here")
    assert reads == list(EIGHT)[:6]
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["model.part"]
    return tmp_path / "x"


# --------------------------------------------------------------------------------------------------------------- files


def test_files_hold_their_tensors_and_checksums_of_them(tmp_path):
    path, arrays = tmp_path / "x.safetensors", {"odd": np.arange(3, dtype=np.uint8), **ARRAYS}
    save_tensors(path, stored(arrays))
    with safe_open(path, framework="np") as file:
        meta = file.metadata()
    assert meta["format"] == "pt"
    assert json.loads(meta[CHECKSUMS]) == {name: f"{zlib.crc32(array):08x}" for name, array in arrays.items()}
    assert_holds({name: open_tensors(path)[name] for name in arrays}, arrays)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    entries = json.loads(content[8 : 8 + length])
    for name, array in arrays.items():
        assert entries[name]["data_offsets"][0] % array.dtype.itemsize == 0


@pytest.mark.parametrize("kind", ["x", "x.safetensors", "x.pt"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, kind):
    alive, most, done = 0, 0, []

    def gone():
        nonlocal alive
        alive -= 1

    def read():
        nonlocal alive, most
        array = np.zeros(2**20, np.uint8)
        weakref.finalize(array, gone)
        alive += 1
        most = max(most, alive)
        return array

    tensors = {str(number): Stored((2**20,), np.dtype(np.uint8), read) for number in range(6)}
    tracemalloc.start()
    save_tensors(tmp_path / kind, tensors, shard=2**22 if kind == "x" else 2**30, progress=done.append)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most == 1
    assert peak < 1.5 * 2**20
    assert done == [2**20] * 6
    assert size(tensors) == 6 * 2**20


def test_tensors_that_changed_since_they_were_described_are_refused(tmp_path):
    tensors = {"x": Stored((3,), np.dtype(np.float32), lambda: np.zeros(4, np.float32))}
    with pytest.raises(CheckpointError, match=re.escape("x is float32 [4], and not what its file said before")):
        save_tensors(tmp_path / "x.safetensors", tensors)
    assert not list(tmp_path.iterdir())


def test_directories_may_have_a_version_in_their_names(tmp_path):
    for name in ("Wan2.1-T2V-1.3B", "Wan2.1"):
        assert save_tensors(tmp_path / name, stored(ARRAYS)) == [tmp_path / name / "model.safetensors"]
    with pytest.raises(ConfigError, match="unknown kind of file"):
        save_tensors(tmp_path / "model.ckpt", stored(ARRAYS))


def test_a_pth_file_holds_tensors_by_their_own_names(tmp_path):
    path = tmp_path / "vae.pth"
    save_tensors(path, stored(ARRAYS))
    assert list(read_torch_file(path)) == list(ARRAYS)
    assert_holds(open_tensors(path), ARRAYS)
    save_tensors(tmp_path / "student.pt", stored(ARRAYS))
    assert list(read_torch_file(tmp_path / "student.pt")) == ["generator_ema"]


def test_two_conversions_into_one_directory_do_not_meet(tmp_path):
    tensors = stored(EIGHT)

    def read():
        with pytest.raises(ConfigError, match="another conversion is writing here"):
            save_tensors(tmp_path / "x", stored(EIGHT), shard=SHARD)
        return EIGHT["block.3.weight"]

    tensors["block.3.weight"] = replace(tensors["block.3.weight"], read=read)
    save_tensors(tmp_path / "x", tensors, shard=SHARD)
    assert_holds(open_tensors(tmp_path / "x"), EIGHT)


# ----------------------------------------------------------------------------------------------------- interruptions


def test_an_interrupted_conversion_goes_on_where_it_was(interrupted, whole, caplog):
    tensors, reads = counted(EIGHT)
    done = []
    with caplog.at_level(logging.INFO, "vidar"):
        files = save_tensors(interrupted, tensors, shard=SHARD, source="here", progress=done.append)
    assert reads == list(EIGHT)[4:]
    assert f"{interrupted}: kept 2 of 4 files of an interrupted conversion" in caplog.messages
    assert sum(done) == size(tensors)
    assert contents(interrupted) == whole
    assert sorted(files) == sorted(interrupted.iterdir())


def test_killed_at_any_instant_it_writes_the_same_bytes_in_the_end(tmp_path, whole):
    code = f"""
        import os, sys
        from pathlib import Path
        from tests.interop.test_targets import EIGHT, SHARD, counted
        from vidar.interop import targets
        tensors, reads = counted(EIGHT)
        count = 0
        def kill(*_):
            global count
            count += 1
            if count == int(sys.argv[1]):
                os.kill(os.getpid(), 9)
        sys.addaudithook(lambda event, arguments: kill() if event in ("open", "os.rename", "os.remove") else None)
        targets.save_tensors({str(tmp_path / "x")!r}, tensors, shard=SHARD, source="here")
        print(count, len(reads))
    """
    environment = subprocess_environment(1)

    def run(instant):
        command = [sys.executable, "-c", textwrap.dedent(code), str(instant)]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)

    instant = 2
    while (result := run(instant)).returncode == -9:
        instant += 5  # and from here it goes on
        assert instant < 60
    assert result.returncode == 0, result.stderr
    assert instant > 10
    assert int(result.stdout.split()[1]) < len(EIGHT)
    assert contents(tmp_path / "x") == whole


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: flipped(content, len(content) - 1),
        lambda content: flipped(content, 60),
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"",
    ],
)
def test_damaged_files_are_not_kept(interrupted, whole, damage):
    file = interrupted / "model.part" / "model-00002-of-00004.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    tensors, reads = counted(EIGHT)
    save_tensors(interrupted, tensors, shard=SHARD, source="here")
    assert reads == list(EIGHT)[2:]
    assert contents(interrupted) == whole


@pytest.mark.parametrize("source", ["there", None])
def test_the_work_on_another_source_is_not_kept(interrupted, source):
    other = {name: array + 1 for name, array in EIGHT.items()}
    tensors, reads = counted(other)
    save_tensors(interrupted, tensors, shard=SHARD, source=source)
    assert reads == list(EIGHT)
    assert_holds(dict(sorted(open_tensors(interrupted).items())), other)


def test_tensors_by_other_names_or_of_other_types_are_not_kept(interrupted):
    other = {name.replace("3", "x"): array.astype(np.int32) if "0" in name else array for name, array in EIGHT.items()}
    tensors, reads = counted(other)
    save_tensors(interrupted, tensors, shard=SHARD, source="here")
    assert reads == list(other)
    assert_holds({name: open_tensors(interrupted)[name] for name in other}, other)


def test_without_a_source_nothing_is_left_to_go_on_with(tmp_path):
    tensors, _ = counted(EIGHT, fail="block.5.weight")
    with suppress(CheckpointError):
        save_tensors(tmp_path, tensors, shard=SHARD)
    assert not list(tmp_path.iterdir())


def test_the_old_checkpoint_stays_whole_until_the_new_one_is(tmp_path, whole):
    save_tensors(tmp_path / "x", stored(EIGHT), shard=SHARD)
    other = {name: array + 1 for name, array in EIGHT.items()}
    tensors, _ = counted(other, fail="block.7.weight")
    with pytest.raises(CheckpointError, match="the cable"):
        save_tensors(tmp_path / "x", tensors, shard=SHARD, source="there")
    assert {name: file.read_bytes() for name in whole if (file := tmp_path / "x" / name).is_file()} == whole
    save_tensors(tmp_path / "x", stored(other), shard=SHARD, source="there")
    assert_holds(dict(sorted(open_tensors(tmp_path / "x").items())), other)
    with pytest.raises(ConfigError, match="holds model-00001-of-00004.safetensors of another checkpoint"):
        save_tensors(tmp_path / "x", stored(other))
    assert_holds(dict(sorted(open_tensors(tmp_path / "x").items())), other)


def test_two_checkpoints_are_never_taken_for_one(tmp_path, monkeypatch):
    other = {name: array + 1 for name, array in EIGHT.items()}

    class KilledError(BaseException):
        pass

    def killed(act, left):
        def acting(path, *arguments, **options):
            if not left:
                raise KilledError  # and whatever would be done after it
            left.pop()
            return act(path, *arguments, **options)

        return acting

    seen = set()
    for instant in range(25):
        path = tmp_path / str(instant)
        save_tensors(path, stored(EIGHT), shard=SHARD)
        with monkeypatch.context() as patch, suppress(KilledError):
            left = [None] * instant
            patch.setattr(Path, "replace", killed(Path.replace, left))
            patch.setattr(Path, "unlink", killed(Path.unlink, left))
            save_tensors(path, stored(other), shard=SHARD, source="there")
        try:
            found = open_tensors(path)
            seen.add(tuple(float(found[name].read()[0, 0]) - array[0, 0] for name, array in EIGHT.items()))
        except CheckpointError as error:
            seen.add(str(error).partition(" (")[0].partition(": ")[2])
    assert seen == {(0.0,) * 8, (1.0,) * 8, "holds several checkpoints"}


def test_a_full_disk_is_one_line_and_what_was_done_stays(small_disk):
    if small_disk is None:
        pytest.skip("needs a file system of its own")
    (small_disk / "filler").write_bytes(bytes(2**20))
    arrays = {str(number): np.full(2**18, number, np.uint8) for number in range(6)}
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        save_tensors(small_disk / "x", stored(arrays), shard=2**19, source="here")
    assert [file.name for file in (small_disk / "x").iterdir()] == ["model.part"]
    (small_disk / "filler").unlink()
    tensors, reads = counted(arrays)
    save_tensors(small_disk / "x", tensors, shard=2**19, source="here")
    assert 0 < len(reads) < 6
    assert_holds({name: open_tensors(small_disk / "x")[name] for name in arrays}, arrays)


def test_a_fingerprint_follows_files_and_options(tmp_path):
    save_tensors(tmp_path / "x", stored(EIGHT), shard=SHARD)
    (tmp_path / "x.pt").write_bytes(b"1")
    given = (tmp_path / "x", tmp_path / "x.pt", None)
    first = fingerprint(*given, scale=1.0)
    assert fingerprint(*given, scale=1.0) == first
    index = tmp_path / "x" / "model.safetensors.index.json"
    assert fingerprint(index) == fingerprint(tmp_path / "x")
    found = {first, fingerprint(*given, scale=0.5), fingerprint(given[0], scale=1.0)}
    (tmp_path / "x.pt").write_bytes(b"22")
    found.add(fingerprint(*given, scale=1.0))
    (tmp_path / "x" / "model-00003-of-00004.safetensors").touch()
    found.add(fingerprint(*given, scale=1.0))
    assert len(found) == 5


def test_a_changed_byte_is_found_when_its_tensor_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, stored(EIGHT))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    tensors = open_tensors(path)
    np.testing.assert_array_equal(tensors["block.0.weight"].read(), EIGHT["block.0.weight"])
    with pytest.raises(CheckpointError, match=r"x.safetensors: block.7.weight does not have its checksum"):
        tensors["block.7.weight"].read()
